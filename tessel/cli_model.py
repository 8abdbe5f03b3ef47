"""What every command that takes a MODEL has in common: its options, and how the model is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["MODEL_HELP", "model_options"]

MODEL_HELP = """MODEL is file.py:function or package.module:function, where the function returns (module, args) or
(module, args, kwargs); hf:config.json for the transformers model of a configuration; or hf:<model type>."""


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument ``model`` and the options ``batch``, ``seq``, ``dtype`` and ``layers`` for a click command.

    The command's own help is completed by what a MODEL is.
    """
    for add in (
        click.option("--layers", type=click.IntRange(min=1), help="Layers to build, in place of the model's own."),
        click.option("--dtype", help="float32, bfloat16, float16 or float64 (hf: float32)."),
        click.option("--seq", type=click.IntRange(min=1), help="Tokens in a row."),
        click.option("--batch", type=click.IntRange(min=1), help="Rows in a batch (hf: 1)."),
        click.argument("model"),
    ):
        command = add(command)
    command.__doc__ = f"{command.__doc__ or ''}\n\n    {MODEL_HELP}\n"
    return command
