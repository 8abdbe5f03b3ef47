"""Linear recurrences along one dimension.

    h[0] = b[0],  h[t] = a[t] * h[t - 1] + b[t]

``reverse`` starts at the last step and goes down: h[t] = a[t] * h[t + 1] + b[t]. That is what gradients need.
A chain of t steps, of which each other axis has one of its own: those split anywhere, the scanned one stays whole.
Halves are computed in f32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import TensorType, product
from .common import HALVES, along, axis, equal_shapes, need_tensor, result, table


def _infer(a: Any, b: Any, dim: int, reverse: bool = False) -> tuple[TensorType, ...]:
    need_tensor("linear_scan", a, b)
    axis("linear_scan", dim, a.rank)
    equal_shapes("linear_scan", a, b)
    fits = a.rank > 0 and a.dtype == b.dtype and a.dtype.is_floating_point
    check(fits, lambda: f"linear_scan: {a} and {b} must be floats of one dtype with a dim to go along; cast them")
    return (result(a.shape, a.dtype, a, b),)


def linear_scan_ref(a: torch.Tensor, b: torch.Tensor, dim: int, reverse: bool = False) -> torch.Tensor:
    """The recurrence by its definition, one step after the other."""
    wide = torch.float32 if a.dtype in HALVES else a.dtype
    factors, steps = a.to(wide).unbind(dim), list(b.to(wide).unbind(dim))
    order = range(len(steps))[::-1] if reverse else range(len(steps))
    for before, t in pairwise(order):
        steps[t] = factors[t] * steps[before] + steps[t]
    return torch.stack(steps, dim).to(a.dtype) if steps else b.clone()


def _dims(node: Node) -> str:
    return along(node, (axis("linear_scan", node.attrs["dim"], node.type.rank),))


SCAN = table(
    Op(
        "linear_scan",
        "scan",
        dims=_dims,
        ref=linear_scan_ref,
        infer=_infer,
        flops=lambda node: product((2, *node.type.shape)),
        cost=2,
        doc="h[t] = a[t] * h[t - 1] + b[t] along ``dim``, h[0] = b[0]; reverse=: from the end",
    ),
)
