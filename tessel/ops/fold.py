"""Composites that fold dimensions: means, variances, norms of vectors, softmax.

Halves are computed in f32. Variances take two passes: the mean first, then the squares of the
differences, so that large means cost no digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from ..errors import check
from ..ir.node import Builder, Node, Op, Value
from ..ir.types import Dim, TensorType, product
from .common import along, axes, axis, need_tensor, plain, result, table
from .emit import Emit
from .reduce import reduce_dims, reduced_shape

Types = tuple[TensorType, ...]


def need_float(name: str, x: Any) -> None:
    """Raise ``TesselError`` unless ``x`` is a floating (or complex) tensor."""
    need_tensor(name, x)
    floating = x.dtype.is_floating_point or x.dtype.is_complex
    check(floating, lambda: f"{name}: {x} is not floating; cast it first")


def composite(name: str, dims: Any, ref: Any, infer: Any, decompose: Any, **fields: Any) -> Op:
    """A table entry; ``decompose(e, *args, **attrs)`` gives one value or several, in the node's dtypes."""

    def opened(builder: Builder, node: Node) -> tuple[Value, ...]:
        e = Emit(builder)
        got = decompose(e, *node.args, **node.attrs)
        got = (got,) if isinstance(got, Value) else got
        return tuple(e.cast(v, t.dtype) for v, t in zip(got, node.types, strict=True))  # type: ignore[union-attr]

    return Op(name, "composite", dims=dims, ref=ref, infer=infer, decompose=opened, cost=50, **fields)


def sizes(x: Value, dims: Sequence[int]) -> Dim:
    """How many elements a reduction over ``dims`` folds into one."""
    return product(x.shape[d] for d in dims)


# ---------------------------------------------------------------- mean, var, norms of vectors


def _fold_infer(name: str, results: int = 1) -> Callable[..., Types]:
    def infer(x: Any, dims: Sequence[int], keepdim: bool = False, **attrs: Any) -> Types:
        need_float(name, x)
        return (result(reduced_shape(name, x, dims, keepdim), x.dtype, x),) * results

    return infer


def _mean(e: Emit, x: Value, dims: tuple[int, ...], keepdim: bool = False) -> Value:
    held = axes("mean", dims, x.type.rank)
    return e("div", e("sum", e.wide(x), dims=held, keepdim=keepdim), sizes(x, held))


def _mean_ref(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    return torch.mean(x, tuple(dims), keepdim) if dims else x


def _less(count: Dim, correction: Any) -> Any:
    """``max(count - correction, 0)``: what the squares are divided by."""
    left = count - correction
    return max(left, 0) if isinstance(count, int) else sympy.Max(left, 0) if correction > 1 else left


def moments(e: Emit, x: Value, dims: tuple[int, ...]) -> tuple[Value, Value, Value]:
    """Mean (kept dims), difference from it, and sum of its squares (kept dims)."""
    mean = e.mean(x, dims, sizes(x, dims))
    apart = e("sub", x, mean)
    return mean, apart, e("sum", e("mul", apart, apart), dims=dims, keepdim=True)


def _var_mean(
    e: Emit, x: Value, dims: tuple[int, ...], keepdim: bool = False, correction: Any = 1
) -> tuple[Value, Value]:
    held = axes("var", dims, x.type.rank)
    mean, _, squares = moments(e, e.wide(x), held)
    var = e("div", squares, _less(sizes(x, held), correction))
    return e.drop(var, held, keepdim), e.drop(mean, held, keepdim)


def _var(e: Emit, x: Value, dims: tuple[int, ...], keepdim: bool = False, correction: Any = 1) -> Value:
    return _var_mean(e, x, dims, keepdim, correction)[0]


def _held_dims(node: Node) -> str:
    """The reduced dimensions stay whole."""
    return reduce_dims(node).replace("+", "*")


def _var_ref(
    x: torch.Tensor, dims: Sequence[int], keepdim: bool = False, correction: Any = 1
) -> torch.Tensor:
    return torch.var(x, tuple(dims), correction=correction, keepdim=keepdim)


def _var_mean_ref(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False, correction: Any = 1) -> Any:
    return torch.var_mean(x, tuple(dims), correction=correction, keepdim=keepdim)


def _vector_norm(e: Emit, x: Value, dims: tuple[int, ...], ord: float = 2, keepdim: bool = False) -> Value:
    held, size = axes("vector_norm", dims, x.type.rank), e("abs", e.wide(x))
    if ord in (math.inf, -math.inf):
        return e("amax" if ord > 0 else "amin", size, dims=held, keepdim=keepdim)
    if ord == 0:
        return e("sum", e.cast(e("ne", size, 0.0), size.dtype), dims=held, keepdim=keepdim)
    if ord == 1:
        return e("sum", size, dims=held, keepdim=keepdim)
    if ord == 2:
        return e("sqrt", e("sum", e("mul", size, size), dims=held, keepdim=keepdim))
    return e("pow", e("sum", e("pow", size, float(ord)), dims=held, keepdim=keepdim), 1.0 / ord)


def _vector_norm_dims(node: Node) -> str:
    marks = {math.inf: "+max", -math.inf: "+min", 0: "+sum", 1: "+sum"}
    return reduce_dims(node).replace("+", marks.get(node.attrs.get("ord", 2), "*"))


def _vector_norm_ref(
    x: torch.Tensor, dims: Sequence[int], ord: float = 2, keepdim: bool = False
) -> torch.Tensor:
    if not dims:  # to torch an empty tuple means all
        return torch.linalg.vector_norm(x[..., None], ord, -1)
    return torch.linalg.vector_norm(x, ord, dims, keepdim)


def _logsumexp(e: Emit, x: Value, dims: tuple[int, ...], keepdim: bool = False) -> Value:
    held, x = axes("logsumexp", dims, x.type.rank), e.wide(x)
    top = e("amax", x, dims=held, keepdim=True)
    top = e("where", e("isinf", top), 0.0, top)  # inf - inf would be NaN
    total = e("sum", e("exp", e("sub", x, top)), dims=held, keepdim=True)
    return e.drop(e("add", e("log", total), top), held, keepdim)


def _logsumexp_ref(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    return torch.logsumexp(x, tuple(dims), keepdim) if dims else x


# ---------------------------------------------------------------- softmax


def _same_infer(name: str) -> Callable[..., Types]:
    def infer(x: Any, dim: int) -> Types:
        need_float(name, x)
        axis(name, dim, x.rank)
        return (result(x.shape, x.dtype, x),)

    return infer


def _softmax_dims(node: Node) -> str:
    x = node.type
    return along(node, (axis(node.op.name, node.attrs["dim"], x.rank),) if x.rank else ())


def _shifted(e: Emit, x: Value, dim: int) -> tuple[Value, tuple[int, ...]]:
    """``x`` less its greatest along ``dim``: exponentials of it cannot overflow."""
    held = (axis("softmax", dim, x.type.rank),) if x.type.rank else ()
    x = e.wide(x)
    return e("sub", x, e("amax", x, dims=held, keepdim=True)), held


def _empty_along(x: Value, dim: int) -> bool:
    return x.type.rank > 0 and plain(x.shape[dim]) == 0  # amax of nothing is an error


def _softmax(e: Emit, x: Value, dim: int) -> Value:
    if _empty_along(x, dim):
        return x
    shifted, held = _shifted(e, x, dim)
    weights = e("exp", shifted)
    return e("div", weights, e("sum", weights, dims=held, keepdim=True))


def _log_softmax(e: Emit, x: Value, dim: int) -> Value:
    if _empty_along(x, dim):
        return x
    shifted, held = _shifted(e, x, dim)
    return e("sub", shifted, e("log", e("sum", e("exp", shifted), dims=held, keepdim=True)))


FOLD = table(
    composite("mean", reduce_dims, _mean_ref, _fold_infer("mean"), _mean, combine="mean"),
    composite(
        "var", _held_dims, _var_ref, _fold_infer("var"), _var, doc="var(x, dims=, keepdim=, correction=)"
    ),
    composite("var_mean", _held_dims, _var_mean_ref, _fold_infer("var_mean", 2), _var_mean),
    composite(
        "vector_norm",
        _vector_norm_dims,
        _vector_norm_ref,
        _fold_infer("vector_norm"),
        _vector_norm,
        doc="vector_norm(x, ord=, dims=, keepdim=)",
    ),
    composite(
        "logsumexp", reduce_dims, _logsumexp_ref, _fold_infer("logsumexp"), _logsumexp, combine="logsumexp"
    ),
    composite(
        "softmax", _softmax_dims, lambda x, dim: torch.softmax(x, dim), _same_infer("softmax"), _softmax
    ),
    composite(
        "log_softmax",
        _softmax_dims,
        lambda x, dim: torch.log_softmax(x, dim),
        _same_infer("log_softmax"),
        _log_softmax,
    ),
)

__all__ = ["FOLD", "composite", "moments", "need_float", "sizes"]
