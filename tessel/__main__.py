"""``python -m tessel`` is the ``tessel`` command."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="tessel")
