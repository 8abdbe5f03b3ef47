"""What the commands that take a MODEL have in common: its options, options of Tessel, a GPU's name, what plans say."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import click

from ..errors import TesselError, check
from ..targets import Target, get_target, match_device

if TYPE_CHECKING:
    from ..sharding.plan_file import ShardingPlan

__all__ = ["LIGHT", "MODEL_HELP", "as_planned", "gpu_named", "model_options", "parse_options"]

LIGHT = 2**28  # parameters of a model that is made to be looked at, though it is not run

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


def as_planned(plan: ShardingPlan, model: str, *, meta: bool = False, **asked: Any) -> dict[str, Any]:
    """Arguments of ``load_model`` that give the model of a plan: what it was planned with.

    A plan that does not say it was made of a module: a model of transformers then has the sizes of the plan's inputs
    and the dtype of its parameters, a function says itself what its tensors are.

    Args:
        meta: without weights, unless the plan runs a model that is small.
        asked: instead of what the plan says, where not None.
    """
    data, named = plan.data, model.startswith("hf:")
    settings, inputs = data["settings"], data.get("inputs")
    found: dict[str, Any] = {}
    if "given" in data["model"] and named == data["model"]["name"].startswith("hf:"):
        found = dict(data["model"]["given"])
    elif named:
        tokens = inputs is None or any(x["dtype"].startswith("i") for x in inputs.values())
        seq = settings["seq"] if tokens else None
        said = {"batch": settings["global_batch"], "seq": seq, "dtype": _dtype(plan)}
        found = {k: v for k, v in said.items() if v is not None}
    small = "program" in data and (data["model"]["parameters"] <= LIGHT or not model.endswith(".json"))
    if meta and named and not small:
        found["device"] = "meta"
    return found | {k: v for k, v in asked.items() if v is not None}


def _dtype(plan: ShardingPlan) -> str | None:
    """That of most parameters, by elements."""
    count: Counter[str] = Counter()
    for t in plan.data["tensors"].values():
        count[t["dtype"]] += prod(t["shape"])
    return count.most_common(1)[0][0] if count else None
