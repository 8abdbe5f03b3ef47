"""A loop over time whose step is a region.

    loop((h0,), (x, y), (w,)) -> h, out        with the region  (h, x[t], y[t], w) -> (h, out[t])

Steps follow one another: what a step may be split into is the region's own business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import product
from .common import need_tensor, table, whole_dims

Step = Callable[..., list[Any]]


def loop_ref(
    init: tuple[torch.Tensor, ...],
    xs: tuple[torch.Tensor, ...],
    extras: tuple[torch.Tensor, ...],
    regions: tuple[Step, ...],
) -> tuple[torch.Tensor, ...]:
    """Run the step over the first dimension of ``xs``: the last carries, then every step's results, time first.

    Args:
        init: where the carries start.
        xs: of every one the step takes a slice.
        extras: given to every step.
        regions: the step, a function of all three.
    """
    (step,) = regions
    carries, results = list(init), []
    for parts in zip(*(x.unbind(0) for x in xs), strict=True):
        out = step(*carries, *parts, *extras)
        carries = out[: len(init)]
        results.append(out[len(init) :])
    return (*carries, *(torch.stack(r) for r in zip(*results, strict=True)))


def steps_of(node: Node) -> Any:
    """How many steps a loop has, a size."""
    return node.args[1][0].type.shape[0]


def _flops(node: Node) -> Any:
    inside = [n.op.flops(n) for n in node.regions[0].nodes if n.op.flops is not None]
    return product((steps_of(node), sum(inside)))


def check_loop(node: Node) -> None:
    """Raise ``TesselError`` unless a loop's region takes and gives what its operands and results are."""
    init, xs, extras = node.args
    need_tensor("loop", *(v.type for v in (*init, *xs, *extras)))
    check(len(xs) > 0, lambda: "loop: nothing to go over; a loop needs a tensor whose first dimension is time")
    lengths = {v.type.shape[0] for v in xs if v.type.rank}
    check(
        len(lengths) == 1 and all(v.type.rank for v in xs),
        lambda: f"loop: {', '.join(str(v.type) for v in xs)} differ in their first dimension, which is time",
    )
    region = node.regions[0]
    given, wanted = len(init) + len(xs) + len(extras), len(region.inputs)
    check(given == wanted, lambda: f"loop: {given} operands for a region of {wanted} inputs")
    made, kept = len(region.outputs), len(node.types)
    check(made == kept, lambda: f"loop: {kept} results of a region that gives {made}")


LOOP = table(
    Op(
        "loop",
        "library",
        dims=whole_dims,
        ref=loop_ref,
        flops=_flops,
        cost=1000,
        doc="loop((carry, ...), (x, ...), (w, ...)): the region, step by step along the first dimension of each x",
    )
)

__all__ = ["LOOP", "check_loop", "loop_ref", "steps_of"]
