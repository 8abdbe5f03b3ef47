"""ATen operators that move or make data without arithmetic: views, concatenation, constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from ..ir.node import Value
from ..ir.types import Dim, dim_equal, simplify_dim
from .lower import INTEGERS, Lowering, Opaque, Table, axes, axis, less, literal, register, same_shape

TABLE: Table = {}


# ---------------------------------------------------------------- identity


@register(
    TABLE,
    "aten.alias.default",
    "aten.detach.default",
    "aten.lift_fresh.default",
    "aten.contiguous.default",
    "aten._conj.default",
    "aten._neg_view.default",
)
def _alias(c: Lowering, x: Value, **_: Any) -> Value:
    assert c.node is not None
    if "_neg_view" in str(c.node.target):
        return c("neg", x)
    return x


@register(TABLE, "aten.clone.default", "aten.lift_fresh_copy.default")
def _clone(c: Lowering, x: Value, *, memory_format: Any = None) -> Value:
    return x


@register(TABLE, "aten._to_copy.default")
def _to_copy(c: Lowering, x: Value, **kwargs: Any) -> Value:
    if c.out.device != x.type.device:
        raise Opaque("a copy to another device")
    if kwargs.get("layout") not in (None, torch.strided):
        raise Opaque("a copy to another layout")
    return x if x.dtype == c.dtype else c("cast", x, dtype=c.dtype)


@register(TABLE, "prims.convert_element_type.default")
def _convert(c: Lowering, x: Value, dtype: torch.dtype) -> Value:
    return x if x.dtype == dtype else c("cast", x, dtype=dtype)


@register(TABLE, "aten.copy.default")
def _copy(c: Lowering, x: Value, src: Value, non_blocking: bool = False) -> Value:
    if src.type.device != c.out.device:
        raise Opaque("a copy to another device")
    moved = c.expand(c.cast(src, c.dtype), c.out.shape)
    return moved if moved is not src else src


# ---------------------------------------------------------------- shape


@register(
    TABLE,
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.reshape.default",
    "aten._reshape_alias.default",
    "aten.unsqueeze.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.view_copy.default",
)
def _reshape(c: Lowering, x: Value, *_: Any, **__: Any) -> Value:
    return c.reshape(x, c.out.shape)


@register(TABLE, "aten.permute.default")
def _permute(c: Lowering, x: Value, dims: Sequence[int]) -> Value:
    return c.permute(x, axes(dims, len(x.shape)) if dims else ())


@register(TABLE, "aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def _t(c: Lowering, x: Value) -> Value:
    return c.transpose(x) if len(x.shape) > 1 else x


@register(TABLE, "aten.transpose.int")
def _transpose(c: Lowering, x: Value, dim0: int, dim1: int) -> Value:
    rank = len(x.shape)
    order = list(range(rank))
    if rank:
        a, b = axis(dim0, rank), axis(dim1, rank)
        order[a], order[b] = order[b], order[a]
    return c.permute(x, order)


@register(TABLE, "aten.expand.default")
def _expand(c: Lowering, x: Value, size: Any, *, implicit: bool = False) -> Value:
    return c.expand(x, c.out.shape)


@register(TABLE, "aten.flip.default")
def _flip(c: Lowering, x: Value, dims: Sequence[int]) -> Value:
    dims = axes(dims, len(x.shape)) if dims else ()
    return c("flip", x, dims=dims) if dims else x


@register(TABLE, "aten.repeat.default")
def _repeat(c: Lowering, x: Value, repeats: Sequence[Dim]) -> Value:
    lead = len(repeats) - len(x.shape)
    shape = (*(1,) * lead, *x.shape)
    inner: list[Dim] = []
    outer: list[Dim] = []
    for times, size in zip(repeats, shape, strict=True):
        inner += [1, size]
        outer += [times, size]
    return c.reshape(c.expand(c.reshape(x, inner), outer), c.out.shape)


# ---------------------------------------------------------------- slices


def _bound(c: Lowering, at: Any, size: Dim, default: Dim) -> Dim:
    """A slice bound brought into 0..size, as Python does."""
    if at is None:
        return default
    if isinstance(at, int) and at >= 2**62:
        return size
    if c.known(at, "a slice bound") < 0:
        at = at + size
        if c.known(at, "a slice bound") < 0:
            return 0
    return simplify_dim(at) if c.known(less(at, size), "a slice bound") < 0 else size


def _start(c: Lowering, start: Any, size: Dim, length: Dim) -> Dim:
    """Where a slice of ``length`` elements begins; an empty one begins anywhere."""
    return 0 if isinstance(length, int) and length == 0 else _bound(c, start, size, 0)


@register(TABLE, "aten.slice.Tensor")
def _slice(c: Lowering, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    dim = axis(dim, len(x.shape))
    size = c.out.shape[dim]
    return c.slice(x, dim, _start(c, start, x.shape[dim], size), size, step)


@register(TABLE, "aten.select.int")
def _select(c: Lowering, x: Value, dim: int, index: Dim) -> Value:
    dim = axis(dim, len(x.shape))
    if c.known(index, "a selected position") < 0:
        index = simplify_dim(index + x.shape[dim])
    return c.reshape(c("slice", x, dim=dim, start=index, size=1, step=1), c.out.shape)


@register(TABLE, "aten.narrow.default")
def _narrow(c: Lowering, x: Value, dim: int, start: Dim, length: Dim) -> Value:
    dim = axis(dim, len(x.shape))
    if c.known(start, "a slice bound") < 0:
        start = simplify_dim(start + x.shape[dim])
    return c.slice(x, dim, start, length)


@register(
    TABLE,
    "aten.split_with_sizes.default",
    "aten.split_with_sizes_copy.default",
    "aten.unsafe_split_with_sizes.default",
    "aten.split.Tensor",
    "aten.unsafe_split.Tensor",
    "aten.chunk.default",
)
def _split(c: Lowering, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    dim = axis(dim, len(x.shape))
    pieces, start = [], 0
    for t in c.types:
        pieces.append(c.slice(x, dim, start, t.shape[dim]))
        start = simplify_dim(start + t.shape[dim])
    return tuple(pieces)


@register(TABLE, "aten.unbind.int")
def _unbind(c: Lowering, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = axis(dim, len(x.shape))
    return tuple(
        c.reshape(c("slice", x, dim=dim, start=i, size=1, step=1), t.shape) for i, t in enumerate(c.types)
    )


@register(TABLE, "aten.slice_scatter.default")
def _slice_scatter(
    c: Lowering, x: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    dim = axis(dim, len(x.shape))
    src = c.cast(src, x.dtype)
    size = src.shape[dim]
    if same_shape(src.shape, x.shape):
        return src
    at = _start(c, start, x.shape[dim], size)
    return c("slice_scatter", x, src, dim=dim, start=at, size=size, step=step)


@register(TABLE, "aten.select_scatter.default")
def _select_scatter(c: Lowering, x: Value, src: Value, dim: int, index: Dim) -> Value:
    dim = axis(dim, len(x.shape))
    if c.known(index, "a selected position") < 0:
        index = simplify_dim(index + x.shape[dim])
    src = c.unsqueeze(c.expand(c.cast(src, x.dtype), (*x.shape[:dim], *x.shape[dim + 1 :])), dim)
    if dim_equal(x.shape[dim], 1):
        return src
    return c("slice_scatter", x, src, dim=dim, start=index, size=1, step=1)


def _pad_at(c: Lowering, x: Value, dim: int, start: Dim, size: Dim) -> Value:
    """``x`` inside zeros: axis ``dim`` grows to ``size`` with ``x`` from ``start`` on."""
    rank = len(x.shape)
    low, high = [0] * rank, [0] * rank
    low[dim] = start  # type: ignore[call-overload]
    high[dim] = simplify_dim(less(size, start) - x.shape[dim])  # type: ignore[call-overload]
    if all(isinstance(n, int) and n == 0 for n in (*low, *high)):
        return x
    return c("pad", x, low=tuple(low), high=tuple(high), value=literal(0, x.dtype))


@register(TABLE, "aten.slice_backward.default")
def _slice_backward(
    c: Lowering, grad: Value, input_sizes: Any, dim: int, start: Any, end: Any, step: int
) -> Value:
    dim = axis(dim, len(c.out.shape))
    size = grad.shape[dim]
    at = _start(c, start, c.out.shape[dim], size)
    if step == 1:
        return _pad_at(c, grad, dim, at, c.out.shape[dim])
    zeros = c.full(c.out.shape, 0, c.dtype)
    return c("slice_scatter", zeros, grad, dim=dim, start=at, size=size, step=step)


@register(TABLE, "aten.select_backward.default")
def _select_backward(c: Lowering, grad: Value, input_sizes: Any, dim: int, index: Dim) -> Value:
    dim = axis(dim, len(c.out.shape))
    size = c.out.shape[dim]
    if c.known(index, "a selected position") < 0:
        index = simplify_dim(index + size)
    return _pad_at(c, c.unsqueeze(grad, dim), dim, index, size)


# ---------------------------------------------------------------- joining


def _joined(c: Lowering, parts: Sequence[Value], dim: int) -> Value:
    return parts[0] if len(parts) == 1 else c("cat", tuple(parts), dim=dim)


@register(TABLE, "aten.cat.default")
def _cat(c: Lowering, tensors: Sequence[Value], dim: int = 0) -> Value:
    rank = len(c.out.shape)
    # torch skips legacy empty tensors of shape [0] whatever the other shapes are
    real = [t for t in tensors if len(t.shape) == rank and not (rank > 1 and t.shape == (0,))]
    if not real:
        return c.full(c.out.shape, 0, c.dtype)
    return _joined(c, [c.cast(t, c.dtype) for t in real], axis(dim, rank))


@register(TABLE, "aten.stack.default")
def _stack(c: Lowering, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = axis(dim, len(c.out.shape))
    return _joined(c, [c.unsqueeze(c.cast(t, c.dtype), dim) for t in tensors], dim)


@register(TABLE, "aten.constant_pad_nd.default")
def _constant_pad(c: Lowering, x: Value, pad: Sequence[Dim], value: Any = 0) -> Value:
    rank = len(x.shape)
    low: list[Dim] = [0] * rank
    high: list[Dim] = [0] * rank
    for i in range(len(pad) // 2):
        dim = rank - 1 - i
        before, after = pad[2 * i], pad[2 * i + 1]
        cut_low = c.known(before, "a padding") < 0
        cut_high = c.known(after, "a padding") < 0
        if cut_low or cut_high:
            start: Dim = -before if cut_low else 0
            size = x.shape[dim] - start + (after if cut_high else 0)
            x = c.slice(x, dim, start, simplify_dim(size))
        low[dim] = 0 if cut_low else before
        high[dim] = 0 if cut_high else after
    if all(isinstance(n, int) and n == 0 for n in (*low, *high)):
        return x
    return c("pad", x, low=tuple(low), high=tuple(high), value=literal(value, x.dtype))


@register(TABLE, "aten.tril.default")
def _tril(c: Lowering, x: Value, diagonal: Dim = 0) -> Value:
    return _triangle(c, x, "le", diagonal)


@register(TABLE, "aten.triu.default")
def _triu(c: Lowering, x: Value, diagonal: Dim = 0) -> Value:
    return _triangle(c, x, "ge", diagonal)


def _triangle(c: Lowering, x: Value, compare: str, diagonal: Dim) -> Value:
    rank = len(x.shape)
    column = c.iota(x.shape[-1], 1, 2)
    row = c.iota(x.shape[-2], 0, 2)
    if not (isinstance(diagonal, int) and diagonal == 0):
        row = c("add", row, diagonal)
    keep = c(compare, column, row)
    return c("where", c.reshape(keep, (*(1,) * (rank - 2), *keep.shape)), x, literal(0, x.dtype))


# ---------------------------------------------------------------- constants


@register(TABLE, "aten.full.default", "aten.full_like.default")
def _full(c: Lowering, _: Any, value: Any, **__: Any) -> Value:
    return _filled(c, value)


@register(TABLE, "aten.new_full.default")
def _new_full(c: Lowering, _: Any, size: Any, value: Any, **__: Any) -> Value:
    return _filled(c, value)


def _filled(c: Lowering, value: Any) -> Value:
    if isinstance(value, Value):
        return c.expand(c.cast(value, c.dtype), c.out.shape)
    return c.full(c.out.shape, value, c.dtype)


@register(
    TABLE,
    "aten.zeros.default",
    "aten.zeros_like.default",
    "aten.new_zeros.default",
    # The contents of these are nobody's business; zeros keep runs reproducible.
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.empty_permuted.default",
    "aten.empty_strided.default",
    "aten.new_empty.default",
    "aten.new_empty_strided.default",
)
def _zeros(c: Lowering, *_: Any, **__: Any) -> Value:
    return c.full(c.out.shape, 0, c.dtype)


@register(TABLE, "aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")
def _ones(c: Lowering, *_: Any, **__: Any) -> Value:
    return c.full(c.out.shape, 1, c.dtype)


@register(TABLE, "aten.scalar_tensor.default")
def _scalar_tensor(c: Lowering, value: Any, **__: Any) -> Value:
    return c.full((), value, c.dtype)


@register(TABLE, "aten.fill.Scalar", "aten.fill.Tensor")
def _fill(c: Lowering, x: Value, value: Any) -> Value:
    return _filled(c, value)


@register(TABLE, "aten.arange.start_step")
def _arange(c: Lowering, start: Any, end: Any, step: Any = 1, **__: Any) -> Value:
    kind = int if c.dtype in INTEGERS else float
    if c.dtype in INTEGERS and not all(_whole(v) for v in (start, step)):
        raise Opaque("an integer range with fractional bounds")
    start, step = (v if isinstance(v, sympy.Basic) else kind(v) for v in (start, step))
    return c("iota", shape=c.out.shape, start=start, step=step, dtype=c.dtype, **c.placed())


@register(TABLE, "aten.arange.start")
def _arange_start(c: Lowering, start: Any, end: Any, **__: Any) -> Value:
    return _arange(c, start, end, 1)


@register(TABLE, "aten.arange.default")
def _arange_end(c: Lowering, end: Any, **__: Any) -> Value:
    return _arange(c, 0, end, 1)


@register(TABLE, "prims.iota.default")
def _iota(c: Lowering, length: Dim, *, start: Any, step: Any, **__: Any) -> Value:
    return c("iota", shape=(length,), start=start, step=step, dtype=c.dtype, **c.placed())


def _whole(v: Any) -> bool:
    if isinstance(v, sympy.Basic):
        return bool(v.is_integer)  # type: ignore[attr-defined]
    return not (isinstance(v, float) and (math.isinf(v) or v != int(v)))
