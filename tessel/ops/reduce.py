"""Reductions over named dimensions: attributes ``dims`` (a tuple) and ``keepdim``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, product
from .common import axes, letters, need_tensor, operand_types, result, sum_dtype, table, words


def reduced_shape(name: str, x: TensorType, dims: Sequence[int], keepdim: bool) -> tuple[Dim, ...]:
    """The shape after folding ``dims`` away (or to size 1)."""
    held = axes(name, dims, x.rank)
    return tuple(1 if d in held else n for d, n in enumerate(x.shape) if keepdim or d not in held)


def reduce_dims(node: Node) -> str:
    """``a b+ -> a``: reduced dimensions carry ``+``."""
    (x,) = operand_types(node)
    held = axes(node.op.name, node.attrs["dims"], x.rank)
    names = letters(x.rank)
    kept = ["1" if d in held else w for d, w in enumerate(names) if node.attrs["keepdim"] or d not in held]
    return words([[w + "+" if d in held else w for d, w in enumerate(names)]], [kept] * len(node.types))


def infer_for(
    name: str, dtype_of: Callable[[torch.dtype], torch.dtype]
) -> Callable[..., tuple[TensorType, ...]]:
    def infer(x: Any, dims: Sequence[int], keepdim: bool = False) -> tuple[TensorType, ...]:
        need_tensor(name, x)
        return (result(reduced_shape(name, x, dims, keepdim), dtype_of(x.dtype), x),)

    return infer


def over_each(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A torch reduction that takes one dimension, applied to several."""

    def ref(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False) -> torch.Tensor:
        for d in sorted((d % max(x.dim(), 1) for d in dims), reverse=True):
            x = fn(x, d, keepdim)
        return x

    return ref


def _sum_ref(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    # An empty tuple of dims means "all" to torch and "none" here.
    return torch.sum(x, tuple(dims), keepdim) if dims else x.to(sum_dtype(x.dtype))


def _extreme(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, dims, keepdim=False: fn(x, dims, keepdim) if dims else x


def _arg_infer(name: str) -> Callable[..., tuple[TensorType, ...]]:
    def infer(x: Any, dims: Sequence[int], keepdim: bool = False) -> tuple[TensorType, ...]:
        need_tensor(name, x)
        check(
            len(dims) == 1, lambda: f"{name}: takes exactly one dim, got {tuple(dims)}; reshape to one first"
        )
        return (result(reduced_shape(name, x, dims, keepdim), torch.int64, x),)

    return infer


def _flops(node: Node) -> Dim:
    return product(operand_types(node)[0].shape)


def _entry(name: str, combine: str, ref: Callable[..., Any], infer: Callable[..., Any], doc: str = "") -> Op:
    return Op(name, "reduce", dims=reduce_dims, ref=ref, infer=infer, combine=combine, flops=_flops, doc=doc)


def _argmax(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    return torch.argmax(x, dims[0], keepdim)


def _argmin(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    return torch.argmin(x, dims[0], keepdim)


REDUCE = table(
    _entry("sum", "sum", _sum_ref, infer_for("sum", sum_dtype), "integers and bools sum in i64"),
    _entry("prod", "prod", over_each(torch.prod), infer_for("prod", sum_dtype), "integers and bools in i64"),
    _entry("amax", "max", _extreme(torch.amax), infer_for("amax", lambda d: d), "NaN wins"),
    _entry("amin", "min", _extreme(torch.amin), infer_for("amin", lambda d: d), "NaN wins"),
    _entry(
        "any",
        "any",
        over_each(lambda x, d, k: torch.any(x != 0, d, k)),
        infer_for("any", lambda d: torch.bool),
    ),
    _entry(
        "all",
        "all",
        over_each(lambda x, d, k: torch.all(x != 0, d, k)),
        infer_for("all", lambda d: torch.bool),
    ),
    _entry("argmax", "argmax", _argmax, _arg_infer("argmax"), "the first place of the greatest, NaN wins"),
    _entry("argmin", "argmin", _argmin, _arg_infer("argmin"), "the first place of the least, NaN wins"),
)
