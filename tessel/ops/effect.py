"""Effects, kept in order, and the op that a fused group becomes."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import TesselError, check
from ..ir.node import Op
from ..ir.types import SymType, unbacked
from .common import need_tensor, table, whole_dims


def _item_infer(x: Any, symbol: str) -> tuple[SymType, ...]:
    need_tensor("item", x)
    check(x.rank == 0, lambda: f"item: {x} must be a 0-d tensor")
    return (SymType(unbacked(symbol)),)


def _assert_scalar(cond: Any, message: str = "") -> tuple[()]:
    if not cond:
        raise RuntimeError(message or "a runtime assertion on sizes failed")
    return ()


def _assert_true(x: torch.Tensor, message: str = "") -> tuple[()]:
    if not bool(x.all()):
        raise RuntimeError(message or "a runtime assertion on values failed")
    return ()


def _assert_true_infer(x: Any, message: str = "") -> tuple[()]:
    need_tensor("assert_true", x)
    return ()


def _kernel_ref(*args: Any, **attrs: Any) -> Any:
    raise TesselError(
        f"kernel {attrs.get('name', '')}: a fused group is run through its region, not by itself"
    )


EFFECT = table(
    Op(
        "item",
        "effect",
        dims=whole_dims,
        ref=lambda x, symbol: x.item(),
        infer=_item_infer,  # type: ignore[arg-type]
        doc="item(x, symbol=): a host number read from a 0-d tensor; binds the symbol",
    ),
    Op(
        "assert_scalar",
        "effect",
        dims=whole_dims,
        ref=_assert_scalar,
        infer=lambda cond, message="": (),
        doc="assert_scalar(condition on sizes, message=): RuntimeError as in eager",
    ),
    Op(
        "assert_true",
        "effect",
        dims=whole_dims,
        ref=_assert_true,
        infer=_assert_true_infer,
        doc="assert_true(x, message=): RuntimeError as in eager unless all of x hold",
    ),
    Op(
        "kernel",
        "kernel",
        dims=whole_dims,
        ref=_kernel_ref,
        doc="kernel(args..., name=, family=, ...) with a region; made by the fuse pass",
    ),
)
