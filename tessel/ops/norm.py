"""The normalizations: layer, RMS, group and batch norm.

Statistics of halves are computed and returned in f32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import TesselError, check
from ..ir.node import Node, Value
from ..ir.types import Dim, TensorType, dim_equal, product, simplify_dim
from .common import letters, operand_types, result, table, words
from .dims import Piece, divide
from .emit import Emit, wide_dtype, widen
from .fold import composite, moments, need_float, sizes

Types = tuple[TensorType, ...]


def _affine(
    e: Emit, y: Value, weight: Value | None, bias: Value | None, shape: tuple[Dim, ...] | None = None
) -> Value:
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
            if not ok:
                raise TesselError(f"{name}: weight or bias {w} does not fit the last {ndim} dims of {x}")
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
    e: Emit,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    ndim: int = 1,
    eps: float = 1e-5,
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


def _rms_norm(
    e: Emit, x: Value, weight: Value | None = None, ndim: int = 1, eps: float = 1e-6
) -> tuple[Value, ...]:
    dims, wide = _last(x.type.rank, ndim), e.wide(x)
    rstd = e("rsqrt", e("add", e.mean(e("mul", wide, wide), dims, sizes(x, dims)), eps))
    return _affine(e, e("mul", wide, rstd), weight, None), rstd


def _rms_norm_ref(
    x: torch.Tensor, weight: Any = None, ndim: int = 1, eps: float = 1e-6
) -> tuple[torch.Tensor, ...]:
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
        if not ok:
            raise TesselError(f"{name}: {v} does not fit the {x.shape[1]} channels of {x}")


def _channels(x: Value) -> tuple[Dim, ...]:
    """The shape in which a vector over channels broadcasts."""
    return (1, x.shape[1], *([1] * (x.type.rank - 2)))


def _group_norm_infer(
    x: Any, weight: Any = None, bias: Any = None, *, groups: int, eps: float = 1e-5
) -> Types:
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
    e: Emit,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
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
