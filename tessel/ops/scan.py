"""Linear recurrences along one dimension, and running folds.

    h[0] = b[0],  h[t] = a[t] * h[t - 1] + b[t]

``reverse`` starts at the last step and goes down: h[t] = a[t] * h[t + 1] + b[t]. That is what gradients need.
A running fold is a recurrence too: h[t] = fold(h[t - 1], x[t]).
A chain of t steps, of which each other axis has one of its own: those split anywhere, the scanned one stays whole.
Halves are computed in f32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from ..errors import check, did_you_mean
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
    """The recurrence by its definition, one step after the other; on a GPU by doubling, or every step is a launch."""
    wide = torch.float32 if a.dtype in HALVES else a.dtype
    if a.device.type == "cuda":
        x, y = (v.to(wide).flip(dim) if reverse else v.to(wide) for v in (a, b))
        h = linear_scan_doubling(x, y, dim)
        return (h.flip(dim) if reverse else h).to(a.dtype)
    factors, steps = a.to(wide).unbind(dim), list(b.to(wide).unbind(dim))
    order = range(len(steps))[::-1] if reverse else range(len(steps))
    for before, t in pairwise(order):
        steps[t] = factors[t] * steps[before] + steps[t]
    return torch.stack(steps, dim).to(a.dtype) if steps else b.clone()


def linear_scan_doubling(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """The recurrence in as many rounds as the length has bits: each doubles how far back every step has looked.

    Hillis and Steele, "Data parallel algorithms"; sums come in another order than one step after the other.
    """
    n, back = a.shape[dim], 1
    while back < n:
        (a0, a1), (b0, b1) = (x.split([back, n - back], dim) for x in (a, b))
        b = torch.cat([b0, a1 * b.narrow(dim, 0, n - back) + b1], dim)
        a = torch.cat([a0, a1 * a.narrow(dim, 0, n - back)], dim)
        back *= 2
    return b


FOLDS = ("sum", "prod", "amax", "amin", "logsumexp")  # of a running fold


def _infer_running(x: Any, dim: int, fold: str) -> tuple[TensorType, ...]:
    need_tensor("running", x)
    axis("running", dim, x.rank)
    check(fold in FOLDS, lambda: f"running: no fold {fold!r}; {did_you_mean(fold, FOLDS)}")
    fits = x.rank > 0 and (x.dtype.is_floating_point or (x.dtype != torch.bool and fold != "logsumexp"))
    check(fits, lambda: f"running: no {fold} of {x} along a dim; cast it")
    return (result(x.shape, x.dtype, x),)


def running_ref(x: torch.Tensor, dim: int, fold: str) -> torch.Tensor:
    """What all steps up to each make together, NaN from the first one on.

    >>> running_ref(torch.tensor([1, 3, 2]), 0, "amax").tolist()
    [1, 3, 3]
    """
    wide = x.float() if x.dtype in HALVES else x
    if fold in ("amax", "amin"):
        got = (torch.cummax if fold == "amax" else torch.cummin)(wide, dim).values
    elif fold == "logsumexp":
        got = torch.logcumsumexp(wide, dim)
    else:
        got = (torch.cumsum if fold == "sum" else torch.cumprod)(wide, dim, dtype=wide.dtype)
    return got.to(x.dtype)


def _dims(node: Node) -> str:
    return along(node, (axis(node.op.name, node.attrs["dim"], node.type.rank),))


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
    Op(
        "running",
        "scan",
        dims=_dims,
        ref=running_ref,
        infer=_infer_running,
        flops=lambda node: product(node.type.shape),
        cost=2,
        doc="sum, prod, amax, amin or logsumexp (``fold``) of all steps up to each along ``dim``",
    ),
)

__all__ = ["FOLDS", "SCAN", "linear_scan_doubling", "linear_scan_ref", "running_ref"]
