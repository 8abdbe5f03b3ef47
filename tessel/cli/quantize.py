"""``tessel quantize``: a model's linear layers in few bits, reported and written."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import TesselError, check
from .model import model_options

if TYPE_CHECKING:
    import torch

    from ..quant.report import Measured

__all__ = ["quantize"]

_UNFINISHED = ".unfinished"
_RUNS = 15  # of each model, interleaved


@click.command()
@model_options
@click.option(
    "--scheme", help="w8a16, w4a16-g64, w8a8, fp8, mxfp4, nf4, kv4, ...; with --budget, what becomes of the inputs."
)
@click.option("--budget", help="Bits and group by layer for 4.25bits (a weight), 30GiB, 20dB or, with --target, 250us.")
@click.option(
    "--widths", help="Bits that --budget chooses from, as 2,3,4,8 [all; with --out 4,8, which files can hold]."
)
@click.option("--shards", type=click.IntRange(min=1), default=1, help="Pieces that every k will be cut in.")
@click.option("--method", default="rtn", show_default=True,
              help="rtn, mse, gptq, turboboa, smoothquant, awq, hadamard; + joins.")  # fmt: skip
@click.option("--calibration", metavar="FILE.py:FUNCTION", help="Gives what the model is called with, call by call.")
@click.option("--skip", multiple=True, default=("lm_head",), show_default=True, help="Layers left whole; repeatable.")
@click.option("--target", help="Predict speed there; layers that would be slower stay whole.")
@click.option(
    "--rows", type=click.IntRange(min=1), default=1, show_default=True, help="Of a layer's inputs, for --target."
)
@click.option("--measure", is_flag=True, help="Time the model before and after on this machine's CPU.")
@click.option("--work", type=click.Path(path_type=Path), help="Finished layers are kept there [OUT/.unfinished].")
@click.option("--out", type=click.Path(path_type=Path), help="The folder for the safetensors file and config.json.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as JSON.")
@click.option("--html", "html_file", type=click.Path(path_type=Path, dir_okay=False), help="And as a page with plots.")
def quantize(
    model: str,
    scheme: str | None,
    budget: str | None,
    widths: str | None,
    shards: int,
    method: str,
    calibration: str | None,
    skip: tuple[str, ...],
    target: str | None,
    rows: int,
    measure: bool,
    work: Path | None,
    out: Path | None,
    json_file: Path | None,
    html_file: Path | None,
    **size: Any,
) -> None:
    """Quantize MODEL's linear layers; print what it cost each, and write the result with --out.

    Without --calibration, methods that need data get the model's example inputs. A folder has the compressed-tensors
    layout; schemes that it has no words for are refused before anything is written. A run that was interrupted goes on
    where it was if it is started again with the same arguments.
    """
    from .. import quantize as run
    from ..models import load_batches, load_model
    from ..quant.files import save_quantized

    check(out is None or not out.exists() or out.is_dir(), lambda: f"--out {out}: is no folder")
    allowed = _widths(widths) if widths else (4, 8) if out is not None and budget else None
    module, args, kwargs = load_model(model, **size)
    check(hasattr(module, "named_modules"), lambda: f"quantize: {model} gives {module!r}, which is no module")
    whole = cast("torch.nn.Module", module)
    batches = load_batches(calibration) if calibration else [kwargs if kwargs else tuple(args)]
    work = work if work is not None or out is None else out / _UNFINISHED
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task("", total=None)
            made = run(
                whole, scheme, batches, method=method, skip=skip, inplace=not measure, budget=budget, widths=allowed,
                shards=shards, target=target, rows=rows, work=work,
                progress=lambda name, done, of: bar.update(task, description=_doing(name), completed=done, total=of),
            )  # fmt: skip
    except KeyboardInterrupt:
        where = "nothing is kept: name a folder with --work" if work is None else f"finished layers are in {work}"
        again = "" if work is None else "; the same command goes on from there"
        click.echo(f"interrupted; {where}{again}", err=True)
        raise SystemExit(130) from None
    report: Any = made.quantization
    if measure:
        report.measured = _measured(whole, made, args, kwargs)
    click.echo(str(report))
    for file, text in ((json_file, report.to_json), (html_file, report.to_html)):
        if file is not None:
            file.write_text(text(), encoding="utf-8")
            click.echo(f"written: {file}")
    if out is not None:
        click.echo(f"written: {save_quantized(made, out)}")
        if work is not None:
            from ..quant.resume import forget

            forget(work)


def _doing(name: str) -> str:
    """What the progress bar says: a layer's name alone is one that is finished."""
    return name if " " in name else f"quantizing {name}"


def _widths(text: str) -> tuple[int, ...]:
    """
    >>> _widths("8,4")
    (4, 8)
    """
    try:
        return tuple(sorted({int(x) for x in text.split(",")}))
    except ValueError:
        raise TesselError(f"--widths {text!r}: expected whole numbers, as 2,3,4,8") from None


def _measured(whole: torch.nn.Module, small: torch.nn.Module, args: Any, kwargs: Any) -> Measured:
    """Both models compiled for this CPU and run in turns."""
    import torch

    import tessel  # the public face

    from ..quant.bits import result_of
    from ..quant.report import Measured
    from ..quant.sqnr import sqnr

    calls = [tessel.compile(m.eval(), target="cpu") for m in (whole, small)]
    taken: list[list[float]] = [[], []]
    with torch.no_grad():
        want, got = (result_of(c(*args, **kwargs)) for c in calls)
        for _ in range(_RUNS):
            for own, c in zip(taken, calls, strict=True):
                start = time.perf_counter()
                c(*args, **kwargs)
                own.append(time.perf_counter() - start)
    before, after = (1e3 * statistics.median(t) for t in taken)
    near = sqnr(want, got)
    return Measured("cpu", before, after, _RUNS, None if near == float("inf") else near)
