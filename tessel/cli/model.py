"""What the commands that take a MODEL have in common: its options, options of Tessel, and a GPU's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import click

from ..errors import TesselError, check
from ..targets import Target, get_target, match_device

__all__ = ["MODEL_HELP", "gpu_named", "model_options", "parse_options"]

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
    command.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{MODEL_HELP}\n"
    return command


def gpu_named(name: str) -> Target:
    """The record of a GPU by its name; ``auto`` is the one of this machine.

    Raises:
        TesselError: there is none, or the target is no GPU.
    """
    if name in ("auto", "cuda"):
        import torch

        found = match_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if found is None:
            raise TesselError("no known GPU here: name one with --target (`tessel targets` lists them)")
        return found
    target = get_target(name)
    check(target.gpu_target is not None, lambda: f"target {name!r} has no tuned tiles; name a GPU")
    return target


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
