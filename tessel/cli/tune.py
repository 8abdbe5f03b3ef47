"""``tessel tune``: the tiles of a model's kernels, predicted or measured, kept for whoever compiles it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config import Options
from ..errors import TesselError
from .model import gpu_named, model_options, parse_options

__all__ = ["tune"]

_INTERRUPTED = 130  # 128 + SIGINT, as shells count


@click.command()
@model_options
@click.option("--target", default="auto", show_default=True, help="A GPU's name from `tessel targets`, or auto.")
@click.option("--measure", is_flag=True, help="Run the best tiles on this machine's GPU and keep the fastest.")
@click.option("--top", type=click.IntRange(1, 64), default=6, show_default=True, help="Tiles to run, with --measure.")
@click.option("--again", is_flag=True, help="Also the kernels whose tile is kept already.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="A field of tessel.Options; repeatable.")
@click.option("--quiet", "-q", is_flag=True, help="The summary alone.")
def tune(
    model: str, target: str, measure: bool, top: int, again: bool, options: tuple[str, ...], quiet: bool, **size: Any
) -> None:
    """Find a tile for every kernel of MODEL and keep it, for `tessel compile` and tessel.compile to use.

    Without --measure no GPU is needed: tiles are predicted. Ctrl-C keeps what is done. Exits with 1 if a kernel got
    no tile.
    """
    device = gpu_named(target)
    chosen = Options.of(parse_options(options))
    from ..autotune.cache import default_cache
    from ..autotune.kernels import kernels_of
    from ..autotune.tune import tune as run
    from ..models import load_model

    measurer: Any = None
    if measure:
        from ..autotune.measure import GpuMeasurer  # refuses where there is no such GPU, before the model is made

        measurer = GpuMeasurer(device)
    own = default_cache()
    if why := own.usable(create=True):
        raise TesselError(f"the cache cannot be used: {why}. Repair that, or name another in TESSEL_CACHE_DIR")
    module, args, kwargs = load_model(model, **size, device="meta")
    err = Console(stderr=True)
    with err.status("tracing the model"):
        kernels = kernels_of(module, args, kwargs, chosen)
    done: Counter[str] = Counter()
    columns = (
        TextColumn("tuning kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    stopped = False
    try:
        with Progress(*columns, console=err, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
            task = bar.add_task("", total=len(kernels))
            for step in run(kernels, device, measurer=measurer, again=again, top=top, cache=own):
                done[step.how] += 1
                bar.update(task, advance=1, description=step.found.kernel.name)
                if not quiet or step.how == "failed":
                    click.echo(str(step))
    except KeyboardInterrupt:
        stopped = True
    words = ", ".join(f"{n} {how}" for how, n in sorted(done.items())) or "none"
    click.echo(f"{sum(done.values())} of {len(kernels)} kernels for {device.name}: {words}, in {own.root}")
    if stopped:
        click.echo("stopped; what is done is kept, and the same command goes on from there", err=True)
        sys.exit(_INTERRUPTED)
    if done["failed"]:
        sys.exit(1)
