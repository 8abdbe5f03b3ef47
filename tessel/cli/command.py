"""The ``tessel`` command. A refused request prints one line and exits with 2."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..errors import TesselError, check
from ..targets import TARGETS, Target, get_target, host_measured
from ..targets.host import features_that_matter, vector_bits, with_rates
from .build import compile_command, explain
from .cache import cache
from .plan import diff, lint, plan, verify
from .quantize import quantize
from .run import run
from .tune import tune

__all__ = ["main"]

_PIPE_WIDTH = 160  # columns when the output is not a terminal


class _Refused(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    """A group whose commands may raise TesselError."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TesselError as e:
            raise _Refused(str(e)) from e


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tessel")
def main() -> None:
    """Compile PyTorch models to fused Triton kernels, and see what was done and why."""
    # torch copies its own trees while it captures a training step, and warns of what it does itself
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)


main.add_command(cache)
main.add_command(compile_command)
main.add_command(diff)
main.add_command(explain)
main.add_command(lint)
main.add_command(plan)
main.add_command(quantize)
main.add_command(run)
main.add_command(tune)
main.add_command(verify)


@main.command()
@click.option("--show", metavar="NAME", help="Every number of one target, with its source.")
@click.option("--measure", is_flag=True, help="Measure this machine's CPU again (seconds); with --show cpu.")
def targets(show: str | None, measure: bool) -> None:
    """List the devices that Tessel knows.

    The first `--show cpu` measures the CPU's bandwidths and rates, and keeps them in the cache.
    """
    check(not measure or show in (None, "cpu"), lambda: f"--measure: only the CPU can be measured, not {show!r}")
    console = _console()
    if show is None and not measure:
        console.print(_all())
        return
    target = get_target(show or "cpu")
    console.print(_one(_measured(target, measure) if target.name == "cpu" else target))


def _measured(cpu: Target, again: bool) -> Target:
    """The CPU's record with its rates: those that are kept, or measured now."""
    rates = None if again else host_measured()
    if rates is None:
        from ..runtime.host_rates import measure_host  # torch with it: only where it is needed

        rates = measure_host()
    return with_rates(cpu, rates)


def _console() -> Console:
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def _all() -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "vendor", "arch"):
        table.add_column(heading)
    for heading in ("units", "shared/block", "memory", "bandwidth", "bf16"):
        table.add_column(heading, justify="right")
    for t in TARGETS.values():
        shown = {key: text for key, text, _ in t.rows()}
        columns = (
            "units",
            "limits.shared_bytes_per_block",
            "levels.memory.capacity_bytes",
            "levels.memory.bandwidth_bytes_per_s",
            "flops.bf16",
        )
        table.add_row(t.name, t.vendor, t.arch, *(shown.get(c, "-") for c in columns))
    return table


def _one(t: Target) -> Table:
    table = Table(box=None, pad_edge=False, title=f"{t.name}: {t.vendor} {t.arch}", title_justify="left")
    table.add_column("number", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for row in t.rows():
        table.add_row(*row)
    if bits := vector_bits(t):
        table.add_row("vector width", f"{bits} bits", "the operating system: the CPU's flags")
    if matter := features_that_matter(t):
        table.add_row("features that matter", str(len(matter)), " ".join(matter))
    if t.features:
        table.add_row("features", str(len(t.features)), " ".join(t.features))
    return table
