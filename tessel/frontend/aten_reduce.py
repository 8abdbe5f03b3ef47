"""ATen reductions and matrix products."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ir.node import Value
from ..ops.dims import try_divide
from .aten_pointwise import truth
from .lower import HALF, Lowering, Opaque, Table, axes, axis, numel, register

TABLE: Table = {}


def _sum_like(c: Lowering, name: str, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    # Integers are summed in i64 by the operator itself.
    if c.dtype.is_floating_point or x.dtype.is_floating_point or not dims:
        x = c.cast(x, c.dtype)
    return c.cast(c(name, x, dims=dims, keepdim=keepdim), c.dtype) if dims else x


@register(TABLE, "aten.sum.dim_IntList", "aten.sum.default")
def _sum(c: Lowering, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return _sum_like(c, "sum", x, axes(dim, len(x.shape)), keepdim)


@register(TABLE, "aten.prod.default")
def _prod(c: Lowering, x: Value, *, dtype: Any = None) -> Value:
    return _sum_like(c, "prod", x, axes(None, len(x.shape)), False)


@register(TABLE, "aten.prod.dim_int")
def _prod_dim(c: Lowering, x: Value, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return _sum_like(c, "prod", x, axes(dim, len(x.shape)), keepdim)


@register(TABLE, "aten.mean.dim", "aten.mean.default")
def _mean(c: Lowering, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    x = c.cast(x, c.dtype)
    dims = axes(dim, len(x.shape))
    return c("mean", x, dims=dims, keepdim=keepdim) if dims else x


def _var_arguments(x: Value, dim: Any, correction: Any) -> tuple[tuple[int, ...], float | int]:
    return axes(dim, len(x.shape)), 1 if correction is None else correction


@register(TABLE, "aten.var.correction")
def _var(c: Lowering, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    dims, correction = _var_arguments(x, dim, correction)
    if not dims:
        raise Opaque("the variance of a 0-d tensor")
    return c("var", x, dims=dims, keepdim=keepdim, correction=correction)


@register(TABLE, "aten.std.correction")
def _std(c: Lowering, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return c.cast(c("sqrt", _var(c, c.wide(x), dim, correction=correction, keepdim=keepdim)), c.dtype)


@register(TABLE, "aten.var_mean.correction")
def _var_mean(
    c: Lowering, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Value, ...]:
    dims, correction = _var_arguments(x, dim, correction)
    if not dims:
        raise Opaque("the variance of a 0-d tensor")
    return c.many("var_mean", x, dims=dims, keepdim=keepdim, correction=correction)


@register(TABLE, "aten.logsumexp.default")
def _logsumexp(c: Lowering, x: Value, dim: Any, keepdim: bool = False) -> Value:
    x = c.cast(x, c.dtype)
    dims = axes(dim, len(x.shape))
    return c("logsumexp", x, dims=dims, keepdim=keepdim) if dims else x


@register(TABLE, "aten.linalg_vector_norm.default")
def _vector_norm(
    c: Lowering, x: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    x = c.cast(x, c.dtype)
    dims = axes(dim, len(x.shape))
    if not dims:
        return c("abs", x) if ord != 0 else c.cast(truth(c, x), c.dtype)
    return c("vector_norm", x, ord=float(ord), dims=dims, keepdim=keepdim)


# ---------------------------------------------------------------- extremes


def _extreme(c: Lowering, name: str, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    return c(name, x, dims=dims, keepdim=keepdim) if dims else x


@register(TABLE, "aten.amax.default")
def _amax(c: Lowering, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    return _extreme(c, "amax", x, axes(dim, len(x.shape)), keepdim)


@register(TABLE, "aten.amin.default")
def _amin(c: Lowering, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    return _extreme(c, "amin", x, axes(dim, len(x.shape)), keepdim)


@register(TABLE, "aten.max.default")
def _max(c: Lowering, x: Value) -> Value:
    return _extreme(c, "amax", x, axes(None, len(x.shape)), False)


@register(TABLE, "aten.min.default")
def _min(c: Lowering, x: Value) -> Value:
    return _extreme(c, "amin", x, axes(None, len(x.shape)), False)


def _with_place(c: Lowering, name: str, x: Value, dim: int, keepdim: bool) -> tuple[Value, Value]:
    if not x.shape:
        return x, c.full((), 0, torch.int64)
    dims = axes(dim, len(x.shape))
    value = c(f"a{name}", x, dims=dims, keepdim=keepdim)
    return value, c(f"arg{name}", _ordered(c, x), dims=dims, keepdim=keepdim)


def _ordered(c: Lowering, x: Value) -> Value:
    """torch has no place of the greatest of bools."""
    return c.cast(x, torch.uint8) if x.dtype == torch.bool else x


@register(TABLE, "aten.max.dim")
def _max_dim(c: Lowering, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return _with_place(c, "max", x, dim, keepdim)


@register(TABLE, "aten.min.dim")
def _min_dim(c: Lowering, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return _with_place(c, "min", x, dim, keepdim)


def _place(c: Lowering, name: str, x: Value, dim: int | None, keepdim: bool) -> Value:
    if not x.shape:
        return c.full((), 0, torch.int64)
    x = _ordered(c, x)
    if dim is None:
        x, dims = c.reshape(x, (numel(x.shape),)), (0,)
        return c.reshape(c(name, x, dims=dims, keepdim=False), c.out.shape)
    return c(name, x, dims=(axis(dim, len(x.shape)),), keepdim=keepdim)


@register(TABLE, "aten.argmax.default")
def _argmax(c: Lowering, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _place(c, "argmax", x, dim, keepdim)


@register(TABLE, "aten.argmin.default")
def _argmin(c: Lowering, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _place(c, "argmin", x, dim, keepdim)


def _quantifier(name: str) -> Any:
    def lower(c: Lowering, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        # dims=() of any.dims and all.dims means none, None means all
        dims = () if dim == () else axes(dim, len(x.shape))
        x = truth(c, x)
        return c.cast(c(name, x, dims=dims, keepdim=keepdim) if dims else x, c.dtype)

    return lower


for _name in ("any", "all"):
    for _overload in ("default", "dim", "dims"):
        TABLE[f"aten.{_name}.{_overload}"] = _quantifier(_name)


@register(TABLE, "aten._is_all_true.default")
def _is_all_true(c: Lowering, x: Value) -> Value:
    return _quantifier("all")(c, x)


@register(TABLE, "aten._is_any_true.default")
def _is_any_true(c: Lowering, x: Value) -> Value:
    return _quantifier("any")(c, x)


# ---------------------------------------------------------------- matrix products


def _product(c: Lowering, a: Value, b: Value) -> Value:
    if not a.dtype.is_floating_point:
        raise Opaque("an integer matrix product")
    return c("matmul", a, b)


@register(TABLE, "aten.mm.default", "aten.bmm.default")
def _mm(c: Lowering, a: Value, b: Value) -> Value:
    return _product(c, a, b)


@register(TABLE, "aten.mm.dtype", "aten.bmm.dtype")
def _mm_dtype(c: Lowering, a: Value, b: Value, out_dtype: torch.dtype) -> Value:
    if out_dtype != a.dtype and not (a.dtype in HALF and out_dtype == torch.float32):
        raise Opaque("a matrix product with its own result dtype")
    return _product(c, c.cast(a, out_dtype), c.cast(b, out_dtype))


def _times(c: Lowering, x: Value, factor: Any) -> Value:
    if isinstance(factor, int | float) and factor == 1:
        return x
    return c("mul", x, factor if not isinstance(factor, int) else float(factor))


@register(TABLE, "aten.addmm.default", "aten.baddbmm.default")
def _addmm(c: Lowering, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    out = _times(c, _product(c, a, b), alpha)
    # torch ignores the bias, NaN and all, where beta is 0
    if isinstance(beta, int | float) and beta == 0:
        return out
    return c("add", out, _times(c, c.cast(bias, out.dtype), beta))


@register(TABLE, "aten.linear.default")
def _linear(c: Lowering, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if len(weight.shape) != 2:
        raise Opaque("a linear layer with a 1-d weight")
    rows = c.reshape(x, (numel(x.shape[:-1]), x.shape[-1]))
    out = _product(c, rows, c.transpose(weight))
    if bias is not None:
        out = c("add", out, bias)
    return c.reshape(out, c.out.shape)


@register(TABLE, "aten.mv.default")
def _mv(c: Lowering, a: Value, b: Value) -> Value:
    return c.reshape(_product(c, a, c.unsqueeze(b, 1)), c.out.shape)


@register(TABLE, "aten.dot.default", "aten.vdot.default")
def _dot(c: Lowering, a: Value, b: Value) -> Value:
    if not a.dtype.is_floating_point:
        raise Opaque("an integer matrix product")
    return c("sum", c("mul", a, b), dims=(0,), keepdim=False)


@register(TABLE, "aten.addmv.default")
def _addmv(c: Lowering, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    out = _times(c, _mv(c, a, b), alpha)
    if isinstance(beta, int | float) and beta == 0:
        return out
    return c("add", out, _times(c, bias, beta))


@register(TABLE, "aten._trilinear.default")
def _trilinear(
    c: Lowering,
    i1: Value,
    i2: Value,
    i3: Value,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    unroll_dim: int = 1,
) -> Value:
    """Sums over axes of products of three, as in ``nn.Bilinear`` and its gradients.

    Where one operand shares only the summed axes with the other two, it is a matrix, and the product of those two the
    rows that it is multiplied with.
    """
    if not c.dtype.is_floating_point:
        raise Opaque("an integer product of three")
    parts = [c.unsqueeze(x, *sorted(at)) for x, at in ((i1, expand1), (i2, expand2), (i3, expand3))]
    places = range(len(parts[0].shape))
    held = [set(places) - set(at) for at in (expand1, expand2, expand3)]
    size = {d: next(p.shape[d] for p, h in zip(parts, held, strict=True) if d in h) for d in places}
    summed = sorted(sumdim)

    def matrix(x: Value, rows: list[int], columns: list[int], ones: list[int]) -> Value:
        shape = [numel([size[d] for d in dims]) for dims in (rows, columns)]
        return c.reshape(c.permute(x, [*rows, *columns, *ones]), shape)

    for one in range(3):
        a, b = (i for i in range(3) if i != one)
        pair = held[a] | held[b]
        if pair & held[one] != set(summed):
            continue
        rows, columns = sorted(pair - held[one]), sorted(held[one] - pair)
        left = matrix(c("mul", parts[a], parts[b]), rows, summed, columns)
        out = _product(c, left, matrix(parts[one], summed, columns, rows))
        kept = [*rows, *columns]
        return c.permute(c.reshape(out, [size[d] for d in kept]), [kept.index(d) for d in sorted(kept)])
    return _sum_like(c, "sum", c("mul", c("mul", parts[0], parts[1]), parts[2]), tuple(summed), False)


# ---------------------------------------------------------------- attention


def attend(
    c: Lowering,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    causal: bool,
    scale: float | None,
    sink: Value | None = None,
    offset: Any = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Value, ...]:
    """The attention operator on rank-4 operands.

    Args:
        q, k, v: ``[batch, heads, rows, width]``; query heads share key heads evenly.
        mask: a bool (True shows) or an addend, broadcast to ``[batch, heads, queries, keys]``.
        causal: query ``i`` sees keys up to ``i + offset``.
        scale: of the products; 1/sqrt(width) by default.
        sink: a score of each head that has no value.
        window: how many keys up to its own a query sees.
        softcap: ``cap * tanh(score / cap)`` before the mask.

    Raises:
        Opaque: a form that the operator has not.
    """
    if isinstance(scale, float) and not math.isfinite(scale):
        raise Opaque("an attention scale that is not finite")
    if try_divide(q.shape[1], k.shape[1]) is None:
        raise Opaque("attention whose query heads are not known to share key heads evenly")
    edits = _edits(offset, window, softcap)
    more = () if sink is None else (sink,)
    return c.many("attention", q, k, v, mask, *more, causal=causal, scale=scale, **edits)


def _edits(offset: Any, window: int | None, softcap: float | None) -> dict[str, Any]:
    """The attributes that most attention has not, left out where they change nothing."""
    plain = isinstance(offset, int) and offset == 0
    given = {"offset": None if plain else offset, "window": window, "softcap": softcap}
    return {name: value for name, value in given.items() if value is not None}


@register(TABLE, "tessel.attention.default")
def _attention(c: Lowering, *args: Any) -> tuple[Value, ...]:
    return attend(c, *args)


@register(TABLE, "aten.scaled_dot_product_attention.default")
def _sdpa(c: Lowering, *args: Any, **kwargs: Any) -> Value:
    from .composites import covered, sdpa_arguments

    assert c.node is not None
    a = sdpa_arguments(args, kwargs)
    fakes = sdpa_arguments(tuple(c.node.args), dict(c.node.kwargs))
    names = ("query", "key", "value", "attn_mask")
    q, k, v, mask = (None if fakes[n] is None else fakes[n].meta["val"] for n in names)
    if not covered(q, k, v, mask, {**a, "attn_mask": mask}):
        raise Opaque("a form of attention without an IR operator (dropout, broadcast or rank)")
    query, key, value = (a[n] if len(c.out.shape) == 4 else c.unsqueeze(a[n], 0) for n in names[:3])
    scale = None if a["scale"] is None else float(a["scale"])
    out = attend(c, query, key, value, a["attn_mask"], a["is_causal"], scale)[0]
    return c.reshape(out, c.out.shape)


@register(TABLE, "tessel.attention_backward.default")
def _attention_backward(
    c: Lowering,
    grad: Value,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    sink: Value | None,
    out: Value,
    lse: Value,
    causal: bool,
    scale: float | None,
    offset: Any,
    window: int | None,
    softcap: float | None,
    mask_grad: bool,
) -> tuple[Value, ...]:
    attrs = {"causal": causal, "scale": scale, **_edits(offset, window, softcap)}
    attrs |= {"mask_grad": True} if mask_grad else {}
    dq, dk, dv, *rest = c.many("attention_backward", grad, q, k, v, mask, sink, out, lse, **attrs)
    dsink = rest.pop() if sink is not None else c.full((0,), 0, c.types[4].dtype)
    dmask = rest.pop() if mask_grad else c.full((0,), 0, c.types[3].dtype)
    return dq, dk, dv, dmask, dsink
