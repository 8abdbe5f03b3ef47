"""Losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..errors import check
from ..ir.node import Node, Op, Value
from ..ir.types import TensorType, dim_equal
from .common import need_tensor, operand_types, result, table
from .emit import Emit
from .fold import composite, need_float

REDUCTIONS = ("none", "mean", "sum")


def _infer(x: Any, target: Any, ignore_index: int = -100, reduction: str = "mean") -> tuple[TensorType, ...]:
    need_float("cross_entropy", x)
    need_tensor("cross_entropy", target)
    fits = x.rank == 2 and target.rank == 1 and dim_equal(x.shape[0], target.shape[0])
    check(fits, lambda: f"cross_entropy: {x} and target {target} must be [n, classes] and [n]")
    check(target.dtype == torch.int64, lambda: f"cross_entropy: the target is {target}, it must be i64")
    check(reduction in REDUCTIONS, lambda: f"cross_entropy: reduction {reduction!r} is none of {REDUCTIONS}")
    return (result(target.shape if reduction == "none" else (), x.dtype, x),)


def _dims(node: Node) -> str:
    reduction = node.attrs.get("reduction", "mean")
    if reduction == "none":
        return "n c*, n -> n"
    # The mean counts only rows that are not ignored, so pieces do not weigh by their size.
    return "n+ c*, n+ -> ." if reduction == "sum" else "n* c*, n* -> ."


def _decompose(e: Emit, x: Value, target: Value, ignore_index: int = -100, reduction: str = "mean") -> Value:
    wide, rows = e.wide(x), target.shape[0]
    top = e("amax", wide, dims=(1,), keepdim=True)
    shifted = e("sub", wide, top)
    total = e("log", e("sum", e("exp", shifted), dims=(1,), keepdim=False))
    counted = e("ne", target, ignore_index)
    place = e("where", counted, target, 0)
    picked = e.reshape(e("gather", shifted, e.reshape(place, (rows, 1)), dim=1), (rows,))
    loss = e("where", counted, e("sub", total, picked), 0.0)
    if reduction == "none":
        return loss
    summed = e("sum", loss, dims=(0,), keepdim=False)
    if reduction == "sum":
        return summed
    return e("div", summed, e("sum", e.cast(counted, wide.dtype), dims=(0,), keepdim=False))


def _ref(
    x: torch.Tensor, target: torch.Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    return F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)


def _flops(node: Node) -> Any:
    return 4 * operand_types(node)[0].numel


LOSS: dict[str, Op] = table(
    composite(
        "cross_entropy",
        _dims,
        _ref,
        _infer,
        _decompose,
        flops=_flops,
        doc='cross_entropy(x [n, classes], target [n], ignore_index=, reduction="none"|"mean"|"sum")',
    )
)
