"""``tessel quantize``: a model's linear layers in few bits, reported and written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .cli_model import model_options
from .errors import check

if TYPE_CHECKING:
    import torch

__all__ = ["quantize"]


@click.command()
@model_options
@click.option("--scheme", required=True, help="w8a16, w4a16-g64, w8a8, fp8, mxfp4, nf4, ...")
@click.option("--method", default="rtn", show_default=True, help="rtn, mse, gptq, smoothquant, awq, hadamard; + joins.")
@click.option("--calibration", metavar="FILE.py:FUNCTION", help="Gives what the model is called with, call by call.")
@click.option("--skip", multiple=True, default=("lm_head",), show_default=True, help="Layers left whole; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder for the safetensors file and config.json.")
def quantize(
    model: str, scheme: str, method: str, calibration: str | None, skip: tuple[str, ...], out: Path | None, **size: Any
) -> None:
    """Quantize MODEL's linear layers; print what it cost each, and write the result with --out.

    Without --calibration, methods that need data get the model's example inputs. A folder has the compressed-tensors
    layout; schemes that it has no words for are refused before anything is written.
    """
    from . import quantize as run
    from .models import load_batches, load_model
    from .quant.files import save_quantized

    check(out is None or not out.exists() or out.is_dir(), lambda: f"--out {out}: is no folder")
    module, args, kwargs = load_model(model, **size)
    check(hasattr(module, "named_modules"), lambda: f"quantize: {model} gives {module!r}, which is no module")
    batches = load_batches(calibration) if calibration else [kwargs if kwargs else tuple(args)]
    columns = (TextColumn("quantizing {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=None)
        made = run(
            cast("torch.nn.Module", module), scheme, batches, method=method, skip=skip, inplace=True,
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )  # fmt: skip
    click.echo(str(made.quantization))
    if out is not None:
        click.echo(f"written: {save_quantized(made, out)}")
