"""``tessel cache``: look into the cache of tuned tiles, carry it elsewhere, keep it small, ask why a kernel misses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..config import Options
from ..errors import TesselError, check
from .model import gpu_named, model_options, parse_options

__all__ = ["cache"]

_PIPE_WIDTH = 200  # columns when the output is not a terminal
_FILE = click.Path(path_type=Path)
_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@click.group()
def cache() -> None:
    """The tuned tiles that are kept for each kernel and device."""


def _cache() -> Any:
    from ..autotune.cache import default_cache

    found = default_cache()
    why = found.usable()
    if why:
        raise TesselError(f"the cache cannot be used: {why}. Repair that, or name another in TESSEL_CACHE_DIR")
    return found


@cache.command("ls")
def ls() -> None:
    """List the entries."""
    own = _cache()
    entries = own.entries()
    if not entries:
        click.echo(f"no entries in {own.root}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("key", "device", "family", "dtypes", "shape", "tile", "kind"):
        table.add_column(heading, no_wrap=heading in ("key", "device"))
    table.add_column("time", justify="right", no_wrap=True)
    for e in entries:
        tile = " ".join(f"{n}={v}" for n, v in sorted(e.knobs.items()))
        row = (e.key.short, e.key.device, e.key.family, e.key.dtypes, e.key.shape, tile, e.kind, _time(e.seconds))
        table.add_row(*row)
    _console().print(table)


@cache.command()
@click.argument("key")
def show(key: str) -> None:
    """Print one entry; KEY is the first digits of its key, as `tessel cache ls` lists it."""
    from ..autotune.transfer import readable

    found = [e for e in _cache().entries() if key and e.key.digest.startswith(key.lower())]
    check(found, lambda: f"no entry whose key starts with {key!r}; `tessel cache ls` lists them")
    check(len(found) == 1, lambda: f"{len(found)} keys start with {key!r}: {', '.join(e.key.short for e in found[:5])}")
    click.echo(readable(found[0]))


@cache.command()
@click.argument("file", type=_FILE)
def export(file: Path) -> None:
    """Write all entries to FILE (- for the output), to be imported on another machine."""
    from ..autotune.transfer import dump

    entries = _cache().entries()
    _write(file, dump(entries))
    click.echo(f"{_count(len(entries))} written to {file}", err=True)


@cache.command("import")
@click.argument("file", type=_FILE)
def import_(file: Path) -> None:
    """Take the entries of an exported FILE where they are better than what is there."""
    from ..autotune.cache import default_cache
    from ..autotune.transfer import import_entries, read_file

    entries = read_file(file)
    own = default_cache()
    done = import_entries(own, entries)
    click.echo(f"{_count(done.new)} new, {done.replaced} replaced, {done.kept} kept as they were, in {own.root}")


@cache.command()
@click.argument("files", metavar="A B ...", type=_FILE, nargs=-1, required=True)
@click.option("--out", "-o", type=_FILE, default=Path("-"), help="Where to write; the output if not given.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Merge exported files into one: of each key the measured entry, the one with more runs, the faster."""
    from ..autotune.transfer import dump, merged, read_file

    check(len(files) >= 2, lambda: "merge takes at least two exported files")
    entries = [e for file in files for e in read_file(file)]
    _write(out, dump(entries))
    click.echo(f"{_count(len(merged(entries)))} of {len(entries)} written to {out}", err=True)


@cache.command()
def verify() -> None:
    """Read every file and name those that are no sound entries; exits with 1 if there are any."""
    from ..autotune.upkeep import verify as check_all

    own = _cache()
    checked = check_all(own)
    for name, wrong in checked.broken.items():
        click.echo(f"{_printable(name)}: {wrong}")
    click.echo(f"{_count(len(checked.sound))} sound, {len(checked.broken)} files are not, in {own.root}")
    if checked.broken:
        sys.exit(1)


@cache.command()
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Entries written before that.")
@click.option("--versions", is_flag=True, help="What other versions of Tessel, its templates or Triton left.")
@click.option("--max-size", metavar="SIZE", help="Oldest entries until no more is left, for example 10M.")
def prune(older_than: float | None, versions: bool, max_size: str | None) -> None:
    """Remove broken files, leftovers of writers that died, and what the options name."""
    from ..autotune.upkeep import prune as remove

    own = _cache()
    seconds = None if older_than is None else older_than * 86400
    done = remove(own, older_than=seconds, versions=versions, max_bytes=_bytes(max_size))
    for name, reason in done.removed.items():
        click.echo(f"{_printable(name)}: {reason}")
    click.echo(f"{len(done.removed)} files removed, {_count(done.left)} left ({done.bytes_left / 1024:.1f} KiB)")


@cache.command()
@model_options
@click.option("--target", default="auto", show_default=True, help="A GPU's name from `tessel targets`, or auto.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="A field of tessel.Options; repeatable.")
def why(model: str, target: str, options: tuple[str, ...], **size: Any) -> None:
    """Tell of each kernel of MODEL whether its tile is in the cache, and if not which field of its key differs."""
    device = gpu_named(target)
    from ..autotune.kernels import kernels_of
    from ..autotune.why import why as explain
    from ..models import load_model

    own = _cache()
    chosen = Options.of(parse_options(options))
    module, args, kwargs = load_model(model, **size, device="meta")
    entries = own.entries()
    answers = [(f, explain(f.kernel, device, own, entries)) for f in kernels_of(module, args, kwargs, chosen)]
    for found, answer in answers:
        click.echo(f"{answer.kernel} ({len(found.places)}×, {found.places[0]}): {answer}")
    hits = sum(a.hit is not None for _, a in answers)
    click.echo(f"{hits} of {len(answers)} kernels hit for {device.name}, {_count(len(entries))} in {own.root}")


def _write(file: Path, data: bytes) -> None:
    from ..autotune.transfer import write_file

    if str(file) == "-":
        click.echo(data, nl=False)
    else:
        write_file(file, data)


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    number, unit = text.strip().lower().removesuffix("b").removesuffix("i"), ""
    if number and number[-1] in _SIZES:
        number, unit = number[:-1], number[-1]
    check(number.isdecimal(), lambda: f"--max-size: expected a size such as 500K or 10M, got {text!r}")
    return int(number) * _SIZES[unit]


def _count(n: int) -> str:
    return f"{n} entry" if n == 1 else f"{n} entries"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _printable(name: str) -> str:
    """A file's name as the terminal may have it: somebody else may have chosen it."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _console() -> Console:
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console
