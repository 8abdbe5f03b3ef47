"""The ``tessel`` command: `command` holds the group, each other file one or more of its commands."""

from .command import main

__all__ = ["main"]
