"""Composites that reduce: means, variances, softmax and the normalizations.

Statistics of halves are computed and returned in f32. Variances take two passes: the mean
first, then the squares of the differences, so that large means cost no digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from ..errors import check
from ..ir.node import Builder, Node, Op, Value
from ..ir.types import Dim, TensorType, dim_equal, product, simplify_dim
from .common import along, axes, axis, letters, need_tensor, operand_types, plain, result, table, words
from .dims import Piece, divide
from .emit import Emit, wide_dtype, widen
from .reduce import reduce_dims, reduced_shape

Types = tuple[TensorType, ...]


def need_float(name: str, x: Any) -> None:
    need_tensor(name, x)
    check(x.dtype.is_floating_point or x.dtype.is_complex, lambda: f"{name}: {x} is not floating; cast it first")


def composite(name: str, dims: Any, ref: Any, infer: Any, decompose: Any, **fields: Any) -> Op:
    """A table entry; ``decompose(e, *args, **attrs)`` gives one value or several, cast to the node's dtypes."""

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
    return torch.mean(x, dims, keepdim) if dims else x


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


def _var_ref(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False, correction: Any = 1) -> torch.Tensor:
    return torch.var(x, dims, correction=correction, keepdim=keepdim)


def _var_mean_ref(x: torch.Tensor, dims: Sequence[int], keepdim: bool = False, correction: Any = 1) -> Any:
    return torch.var_mean(x, dims, correction=correction, keepdim=keepdim)


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


def _vector_norm_ref(x: torch.Tensor, dims: Sequence[int], ord: float = 2, keepdim: bool = False) -> torch.Tensor:
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
    return torch.logsumexp(x, dims, keepdim) if dims else x


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


# ---------------------------------------------------------------- layer, rms, group and batch norm


def _affine(e: Emit, y: Value, weight: Value | None, bias: Value | None, shape: tuple[Dim, ...] | None = None) -> Value:
    """``y * weight + bias`` in the dtype of ``y``, either may be missing."""
    for op, v in (("mul", weight), ("add", bias)):
        if v is not None:
            v = e.cast(v, y.dtype)
            y = e(op, y, v if shape is None else e.reshape(v, shape))
    return y


def _last(rank: int, ndim: int) -> tuple[int, ...]:
    return tuple(range(rank - ndim, rank))


def _norm_infer(name: str, stats: int) -> Callable[..., Types]:
    def infer(x: Any, *affine: Any, ndim: int = 1, eps: float) -> Types:
        need_float(name, x)
        check(1 <= ndim <= x.rank, lambda: f"{name}: cannot normalize {ndim} dims of {x}")
        for w in affine:
            ok = w is None or (w.rank == ndim and all(map(dim_equal, w.shape, x.shape[-ndim:])))
            check(ok, lambda w=w: f"{name}: weight or bias {w} does not fit the last {ndim} dims of {x}")
        kept = (*x.shape[: x.rank - ndim], *([1] * ndim))
        return result(x.shape, x.dtype, x), *[result(kept, wide_dtype(x.dtype), x)] * stats

    return infer


def _norm_dims(node: Node) -> str:
    x, *affine = operand_types(node)
    ndim = node.attrs.get("ndim", 1)
    names = letters(x.rank)
    kept = names[: x.rank - ndim]
    last = [w + "*" for w in names[x.rank - ndim :]]
    full = [*kept, *last]
    return words([full, *[last] * len(affine)], [full, *[[*kept, *["1"] * ndim]] * (len(node.types) - 1)])


def _layer_norm(
    e: Emit, x: Value, weight: Value | None = None, bias: Value | None = None, ndim: int = 1, eps: float = 1e-5
) -> tuple[Value, ...]:
    dims = _last(x.type.rank, ndim)
    mean, apart, squares = moments(e, e.wide(x), dims)
    rstd = e("rsqrt", e("add", e("div", squares, sizes(x, dims)), eps))
    return _affine(e, e("mul", apart, rstd), weight, bias), mean, rstd


def _layer_norm_ref(
    x: torch.Tensor, weight: Any = None, bias: Any = None, ndim: int = 1, eps: float = 1e-5
) -> tuple[torch.Tensor, ...]:
    dims, wide = _last(x.dim(), ndim), widen(x)
    var, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    y = (wide - mean) * rstd
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype), mean, rstd


def _rms_norm(e: Emit, x: Value, weight: Value | None = None, ndim: int = 1, eps: float = 1e-6) -> tuple[Value, ...]:
    dims, wide = _last(x.type.rank, ndim), e.wide(x)
    rstd = e("rsqrt", e("add", e.mean(e("mul", wide, wide), dims, sizes(x, dims)), eps))
    return _affine(e, e("mul", wide, rstd), weight, None), rstd


def _rms_norm_ref(x: torch.Tensor, weight: Any = None, ndim: int = 1, eps: float = 1e-6) -> tuple[torch.Tensor, ...]:
    wide = widen(x)
    rstd = torch.rsqrt(wide.square().mean(_last(x.dim(), ndim), keepdim=True) + eps)
    y = wide * rstd
    y = y if weight is None else y * weight.to(y.dtype)
    return y.to(x.dtype), rstd


def _channel_infer(name: str, x: Any, *vectors: Any) -> None:
    need_float(name, x)
    check(x.rank >= 2, lambda: f"{name}: {x} must be [batch, channels, ...]")
    for v in vectors:
        ok = v is None or (v.rank == 1 and dim_equal(v.shape[0], x.shape[1]))
        check(ok, lambda v=v: f"{name}: {v} does not fit the {x.shape[1]} channels of {x}")


def _channels(x: Value) -> tuple[Dim, ...]:
    """The shape in which a vector over channels broadcasts."""
    return (1, x.shape[1], *([1] * (x.type.rank - 2)))


def _group_norm_infer(x: Any, weight: Any = None, bias: Any = None, *, groups: int, eps: float = 1e-5) -> Types:
    _channel_infer("group_norm", x, weight, bias)
    divide(x.shape[1], groups)
    stats = result((x.shape[0], groups), wide_dtype(x.dtype), x)
    return result(x.shape, x.dtype, x), stats, stats


def _group_norm_dims(node: Node) -> str:
    x, *affine = operand_types(node)
    rest = [w + "*" for w in letters(x.rank - 2, 7)]
    full = ["n", "(g c*)", *rest]
    return words([full, *[["(g c*)"]] * len(affine)], [full, ["n", "g"], ["n", "g"]])


def _group_norm(
    e: Emit, x: Value, weight: Value | None = None, bias: Value | None = None, *, groups: int, eps: float = 1e-5
) -> tuple[Value, ...]:
    per_group = simplify_dim(divide(x.shape[1], groups) * product(x.shape[2:]))
    rows = e.reshape(e.wide(x), (x.shape[0], groups, per_group))
    mean, apart, squares = moments(e, rows, (2,))
    rstd = e("rsqrt", e("add", e("div", squares, per_group), eps))
    y = e.reshape(e("mul", apart, rstd), x.shape)
    stats = (x.shape[0], groups)
    return _affine(e, y, weight, bias, _channels(x)), e.reshape(mean, stats), e.reshape(rstd, stats)


def _group_norm_ref(
    x: torch.Tensor, weight: Any = None, bias: Any = None, *, groups: int, eps: float = 1e-5
) -> tuple[torch.Tensor, ...]:
    per_group = x[0].numel() // groups if x.shape[0] else 1
    rows = widen(x).reshape(x.shape[0], groups, per_group)
    var, mean = torch.var_mean(rows, 2, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    y = ((rows - mean) * rstd).reshape(x.shape)
    return _affine_ref(y, weight, bias).to(x.dtype), mean[..., 0], rstd[..., 0]


def _affine_ref(y: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
    shape = (1, -1, *[1] * (y.dim() - 2))
    y = y if weight is None else y * weight.to(y.dtype).reshape(shape)
    return y if bias is None else y + bias.to(y.dtype).reshape(shape)


def _split_groups(node: Node, factor: str, start: Any, size: Any) -> Piece:
    return Piece({"groups": size}) if factor == "g" else Piece()


def _batch_infer(x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float = 1e-5) -> Types:
    _channel_infer("batch_norm_inference", x, weight, bias, mean, var)
    return (result(x.shape, x.dtype, x),)


def _batch_dims(mark: str) -> Callable[[Node], str]:
    def dims(node: Node) -> str:
        x, *vectors = operand_types(node)
        full = ["n" + mark, "c", *(w + mark for w in letters(x.rank - 2, 7))]
        return words([full, *[["c"]] * len(vectors)], [full, *[["c"]] * (len(node.types) - 1)])

    return dims


def _batch_inference(
    e: Emit, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, eps: float = 1e-5
) -> Value:
    wide, shape = e.wide(x), _channels(x)
    mean, var = (e.reshape(e.cast(v, wide.dtype), shape) for v in (mean, var))
    scaled = e("mul", e("sub", wide, mean), e("rsqrt", e("add", var, eps)))
    return _affine(e, scaled, weight, bias, shape)


def _batch_inference_ref(
    x: torch.Tensor, weight: Any, bias: Any, mean: torch.Tensor, var: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    wide, shape = widen(x), (1, -1, *[1] * (x.dim() - 2))
    mean, var = (v.to(wide.dtype).reshape(shape) for v in (mean, var))
    return _affine_ref((wide - mean) * torch.rsqrt(var + eps), weight, bias).to(x.dtype)


def _training_infer(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Types:
    _channel_infer("batch_norm_training", x, weight, bias)
    stats = result((x.shape[1],), wide_dtype(x.dtype), x)
    return result(x.shape, x.dtype, x), stats, stats, stats


def _not_channels(x: Value) -> tuple[int, ...]:
    return tuple(d for d in range(x.type.rank) if d != 1)


def _batch_training(
    e: Emit, x: Value, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5
) -> tuple[Value, ...]:
    dims = _not_channels(x)
    mean, apart, squares = moments(e, e.wide(x), dims)
    var = e("div", squares, sizes(x, dims))
    rstd = e("rsqrt", e("add", var, eps))
    y = _affine(e, e("mul", apart, rstd), weight, bias, _channels(x))
    return y, *(e.reshape(v, (x.shape[1],)) for v in (mean, rstd, var))


def _batch_training_ref(
    x: torch.Tensor, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[torch.Tensor, ...]:
    wide, dims = widen(x), tuple(d for d in range(x.dim()) if d != 1)
    var, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    y = _affine_ref((wide - mean) * rstd, weight, bias).to(x.dtype)
    return y, mean.reshape(-1), rstd.reshape(-1), var.reshape(-1)


NORM = table(
    composite("mean", reduce_dims, _mean_ref, _fold_infer("mean"), _mean, combine="mean"),
    composite("var", _held_dims, _var_ref, _fold_infer("var"), _var, doc="var(x, dims=, keepdim=, correction=)"),
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
    composite("softmax", _softmax_dims, lambda x, dim: torch.softmax(x, dim), _same_infer("softmax"), _softmax),
    composite(
        "log_softmax",
        _softmax_dims,
        lambda x, dim: torch.log_softmax(x, dim),
        _same_infer("log_softmax"),
        _log_softmax,
    ),
    composite(
        "layer_norm",
        _norm_dims,
        _layer_norm_ref,
        _norm_infer("layer_norm", 2),
        _layer_norm,
        doc="layer_norm(x, weight|None, bias|None, ndim=, eps=) -> (y, mean, rstd)",
    ),
    composite(
        "rms_norm",
        _norm_dims,
        _rms_norm_ref,
        _norm_infer("rms_norm", 1),
        _rms_norm,
        doc="rms_norm(x, weight|None, ndim=, eps=) -> (y, rstd)",
    ),
    composite(
        "group_norm",
        _group_norm_dims,
        _group_norm_ref,
        _group_norm_infer,
        _group_norm,
        split=_split_groups,
        doc="group_norm(x, weight|None, bias|None, groups=, eps=) -> (y, mean, rstd [n, groups])",
    ),
    composite(
        "batch_norm_inference",
        _batch_dims(""),
        _batch_inference_ref,
        _batch_infer,
        _batch_inference,
        doc="batch_norm_inference(x, weight|None, bias|None, mean, var, eps=)",
    ),
    composite(
        "batch_norm_training",
        _batch_dims("*"),
        _batch_training_ref,
        _training_infer,
        _batch_training,
        doc="batch_norm_training(x, weight|None, bias|None, eps=) -> (y, mean, rstd, biased var)",
    ),
)
