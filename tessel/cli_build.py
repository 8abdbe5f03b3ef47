"""``tessel compile``: a model into a folder, for a device that need not be here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .cli_model import model_options
from .errors import TesselError, check
from .targets import get_target

__all__ = ["compile_command"]


@click.command(name="compile")
@model_options
@click.option("--target", required=True, help="A name from `tessel targets`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="A field of tessel.Options; repeatable.")
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at once [the number of CPUs].")
def compile_command(
    model: str, target: str, out: Path, options: tuple[str, ...], jobs: int | None, **size: Any
) -> None:
    """Compile MODEL for a device, here or not, into a folder that tessel.load reads.

    The folder has every kernel as text and machine code, the host program and the report, which lists what each
    kernel needs beside what was predicted. Exits with 1 if the device will not run one of them.
    """
    from .build import build  # torch with it: only where it is needed
    from .config import Options
    from .models import load_model

    record = get_target(target)
    chosen = Options.of(parse_options(options))
    module, args, kwargs = load_model(model, **size, device="meta" if record.gpu_target else None)
    columns = (TextColumn("compiling kernels"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=None)
        made = build(
            module, args, kwargs, target=target, out=out, options=chosen, jobs=jobs or os.cpu_count() or 1,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    click.echo(str(made.report))
    click.echo(f"written: {out}")
    if made.faults:
        names = ", ".join(made.faults)
        raise click.ClickException(
            f"{len(made.faults)} kernels will not run on {target}: {names}; see the report above"
        )


def parse_options(given: tuple[str, ...]) -> dict[str, Any]:
    """``name=value`` texts as the fields of ``Options`` they stand for.

    >>> parse_options(("matmul=library", "fusion=false", "recompile_limit=4"))
    {'matmul': 'library', 'fusion': False, 'recompile_limit': 4}
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        check(bool(equals and name), lambda text=text: f"--option {text!r}: expected name=value")  # type: ignore[misc]
        if name in found:
            raise TesselError(f"--option {name}: given twice")
        words = {"true": True, "false": False, "none": None}
        found[name] = words[value.lower()] if value.lower() in words else int(value) if value.isdecimal() else value
    return found
