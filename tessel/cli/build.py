"""``tessel compile`` and ``tessel explain``: what becomes of a model on a device that need not be here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import Options
from ..errors import TesselError, check, did_you_mean
from ..report import Report
from ..sharding.plan_file import read_plan
from ..sharding.text import node_text
from ..targets import get_target
from .model import model_options, parse_options

__all__ = ["compile_command", "explain"]


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
    from ..build import build  # torch with it: only where it is needed
    from ..models import load_model

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


@click.command()
@model_options
@click.option("--target", default="auto", show_default=True, help="auto, cpu, cuda, or a name from `tessel targets`.")
@click.option(
    "--kernel", help="One kernel of a GPU, by its name or the start of it: its tiles, and what rules them out."
)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Tiles to list, with --kernel.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="A field of tessel.Options; repeatable.")
@click.argument("node", required=False)
def explain(
    model: str, node: str | None, target: str, kernel: str | None, top: int, options: tuple[str, ...], **size: Any
) -> None:
    """Compile MODEL and print what became of it: passes, kernels, what fused, what fell back and why.

    `tessel explain plan.json NODE` says what a sharding plan does with a node, what it communicates and why, and what
    other splits would cost.

    For a GPU, here or not, nothing is run. With --kernel: the tiles that its template can have, the time that each is
    predicted to take, term by term, and why the others are ruled out.
    """
    if node is not None or (model.endswith(".json") and not model.startswith("hf:")):
        check(node is not None, lambda: f"explain {model}: name a node of the plan, `tessel explain {model} NODE`")
        click.echo(node_text(read_plan(model), str(node)))
        return
    from ..models import load_model

    given = Options.of(parse_options(options))
    named = target not in ("auto", "cuda") and get_target(target).gpu_target is not None  # refuses wrong names early
    check(kernel is None or named, lambda: f"--kernel: tiles are chosen for GPUs: --target h100, not {target!r}")
    module, args, kwargs = load_model(model, **size, device="meta" if named else None)
    if not named:
        import tessel  # the public face

        compiled = tessel.compile(module, target=target, options=given)
        click.echo(str(tessel.explain(compiled, *args, **kwargs)))
        return
    from ..build import plan

    report = plan(module, args, kwargs, target=target, options=given)
    click.echo(str(report) if kernel is None else explain_one(report, kernel, target, top, given))


def explain_one(report: Report, name: str, target: str, top: int, options: Options | None = None) -> str:
    """The page on one kernel of a report, by its name or the start of it that no other has.

    Raises:
        TesselError: there is no such kernel, or there are several.
    """
    from ..solve import tile

    names = [k.name for k in report.kernels]
    found = [k for k in report.kernels if k.name == name] or [k for k in report.kernels if k.name.startswith(name)]
    if len(found) != 1:
        what = f"could be {', '.join(k.name for k in found)}" if found else did_you_mean(name, names)
        raise TesselError(f"--kernel {name!r}: {what}")
    return tile(found[0].rendered.kernel, get_target(target), options).explain(top)
