"""ATen softmax, normalizations and losses, and their gradients.

Gradients are written out in a few pointwise operators and reductions over the same axes, so that the
fuse pass can make one kernel of each. f16 and bf16 operands are computed in f32, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..ir.node import Value
from ..ir.types import Dim, product
from .checks import check_classes
from .lower import Lowering, Opaque, Table, axis, register

TABLE: Table = {}


def _pair(c: Lowering, x: Value) -> tuple[Value, bool]:
    """A 0-d tensor as one of one axis; whether it was 0-d."""
    return (x, False) if x.shape else (c.reshape(x, (1,)), True)


# ---------------------------------------------------------------- softmax


def _softmax_like(name: str) -> Any:
    def lower(c: Lowering, x: Value, dim: int, half_to_float: Any = False) -> Value:
        x, scalar = _pair(c, c.cast(x, c.dtype))
        out = c(name, x, dim=axis(dim, len(x.shape)))
        return c.reshape(out, ()) if scalar else out

    return lower


for _name in ("softmax", "log_softmax"):
    TABLE[f"aten._{_name}.default"] = _softmax_like(_name)
    TABLE[f"aten.{_name}.int"] = _softmax_like(_name)


def _row_sum(c: Lowering, x: Value, dim: int) -> Value:
    return c("sum", x, dims=(dim,), keepdim=True)


@register(TABLE, "aten._softmax_backward_data.default")
def _softmax_backward(c: Lowering, grad: Value, out: Value, dim: int, input_dtype: torch.dtype) -> Value:
    (grad, scalar), (out, _) = _pair(c, c.wide(grad)), _pair(c, c.wide(out))
    dim = axis(dim, len(out.shape))
    scaled = c("mul", grad, out)
    dx = c("sub", scaled, c("mul", out, _row_sum(c, scaled, dim)))
    return c.cast(c.reshape(dx, ()) if scalar else dx, c.dtype)


@register(TABLE, "aten._log_softmax_backward_data.default")
def _log_softmax_backward(c: Lowering, grad: Value, out: Value, dim: int, input_dtype: torch.dtype) -> Value:
    (grad, scalar), (out, _) = _pair(c, c.wide(grad)), _pair(c, c.wide(out))
    dim = axis(dim, len(out.shape))
    dx = c("sub", grad, c("mul", c("exp", out), _row_sum(c, grad, dim)))
    return c.cast(c.reshape(dx, ()) if scalar else dx, c.dtype)


# ---------------------------------------------------------------- layer and rms norm


def _as_given(c: Lowering, results: Sequence[Value], first: int = 0) -> tuple[Value, ...]:
    """Statistics in the shape and dtype that eager gives them."""
    types = c.types[first : first + len(results)]
    return tuple(c.reshape(c.cast(s, t.dtype), t.shape) for s, t in zip(results, types, strict=True))


@register(TABLE, "aten.native_layer_norm.default")
def _layer_norm(
    c: Lowering, x: Value, shape: Sequence[Dim], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, ...]:
    return _as_given(c, c.many("layer_norm", x, weight, bias, ndim=len(shape), eps=float(eps)))


@register(TABLE, "aten._fused_rms_norm.default")
def _rms_norm(
    c: Lowering, x: Value, shape: Sequence[Dim], weight: Value | None, eps: float | None
) -> tuple[Value, ...]:
    if eps is None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    return _as_given(c, c.many("rms_norm", x, weight, ndim=len(shape), eps=float(eps)))


class _Rows:
    """A tensor normalized over its last ``ndim`` axes, for writing the gradients down."""

    def __init__(self, c: Lowering, x: Value, ndim: int) -> None:
        rank = len(x.shape)
        self.c = c
        self.inner = tuple(range(rank - ndim, rank))
        self.outer = tuple(range(rank - ndim))
        self.lead = x.shape[: rank - ndim]
        self.ndim = ndim

    def stat(self, s: Value) -> Value:
        """A statistic with one value a row, shaped to broadcast over the row."""
        return self.c.reshape(self.c.wide(s), (*self.lead, *(1,) * self.ndim))

    def mean(self, x: Value) -> Value:
        return self.c("mean", x, dims=self.inner, keepdim=True)

    def total(self, x: Value) -> Value:
        """The sum over all rows, in the shape of the weight."""
        return self.c("sum", x, dims=self.outer, keepdim=False) if self.outer else x


@register(TABLE, "aten.native_layer_norm_backward.default")
def _layer_norm_backward(
    c: Lowering,
    grad: Value,
    x: Value,
    shape: Sequence[Dim],
    mean: Value,
    rstd: Value,
    weight: Value | None,
    bias: Value | None,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    rows = _Rows(c, x, len(shape))
    types = iter(c.types)
    g, scale = c.wide(grad), rows.stat(rstd)
    normal = c("mul", c("sub", c.wide(x), rows.stat(mean)), scale)
    out: list[Value | None] = [None, None, None]
    if mask[0]:
        gw = g if weight is None else c("mul", g, c.wide(weight))
        centred = c("sub", gw, rows.mean(gw))
        inner = c("sub", centred, c("mul", normal, rows.mean(c("mul", gw, normal))))
        out[0] = c.cast(c("mul", inner, scale), next(types).dtype)
    if mask[1] and weight is not None:
        out[1] = c.cast(rows.total(c("mul", g, normal)), next(types).dtype)
    if mask[2] and bias is not None:
        out[2] = c.cast(rows.total(g), next(types).dtype)
    return tuple(out)


@register(TABLE, "aten._fused_rms_norm_backward.default")
def _rms_norm_backward(
    c: Lowering,
    grad: Value,
    x: Value,
    shape: Sequence[Dim],
    rstd: Value,
    weight: Value | None,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    rows = _Rows(c, x, len(shape))
    types = iter(c.types)
    g, scale = c.wide(grad), rows.stat(rstd)
    normal = c("mul", c.wide(x), scale)
    out: list[Value | None] = [None, None]
    if mask[0]:
        gw = g if weight is None else c("mul", g, c.wide(weight))
        inner = c("sub", gw, c("mul", normal, rows.mean(c("mul", gw, normal))))
        out[0] = c.cast(c("mul", inner, scale), next(types).dtype)
    if mask[1] and weight is not None:
        out[1] = c.cast(rows.total(c("mul", g, normal)), next(types).dtype)
    return tuple(out)


@register(TABLE, "aten.native_group_norm.default")
def _group_norm(
    c: Lowering,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    n: Dim,
    channels: Dim,
    spatial: Dim,
    groups: int,
    eps: float,
) -> tuple[Value, ...]:
    return _as_given(c, c.many("group_norm", x, weight, bias, groups=groups, eps=float(eps)))


# ---------------------------------------------------------------- batch norm


def _empty_stats(c: Lowering, first: int) -> list[Value]:
    """The remaining results of a batch norm that has nothing to say (shape [0])."""
    return [c.full(t.shape, 0, t.dtype) for t in c.types[first:]]


@register(TABLE, "aten._native_batch_norm_legit_no_training.default", "aten._batch_norm_no_update.default")
def _batch_norm_inference(
    c: Lowering,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value, ...]:
    y = c("batch_norm_inference", x, weight, bias, mean, var, eps=float(eps))
    return y, *_empty_stats(c, 1)


def _batch_norm(
    c: Lowering, x: Value, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, tuple[Value, ...], Value]:
    """The result, mean and reciprocal deviation as eager gives them, and the biased variance."""
    y, *stats, var = c.many("batch_norm_training", x, weight, bias, eps=float(eps))
    return y, _as_given(c, stats, 1), var


def _running(c: Lowering, x: Value, at: int, old: Value, batch: Value, momentum: float) -> Value:
    """Result ``at``, a running statistic after this batch; variances (the last) are kept unbiased."""
    batch = c.cast(batch, c.wide(old).dtype)
    if at == len(c.types) - 1:
        count = product(n for d, n in enumerate(x.shape) if d != 1)
        if isinstance(count, int):
            batch = c("mul", batch, count / max(count - 1, 1))
        else:
            batch = c("div", c("mul", batch, count), count - 1)
    kept = c("mul", c.wide(old), 1.0 - float(momentum))
    return c.cast(c("add", c("mul", batch, float(momentum)), kept), c.types[at].dtype)


@register(TABLE, "aten._native_batch_norm_legit.no_stats")
def _batch_norm_no_stats(
    c: Lowering,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Value, ...]:
    y, stats, _ = _batch_norm(c, x, weight, bias, eps)
    return y, *stats


@register(TABLE, "aten._native_batch_norm_legit_functional.default")
def _batch_norm_functional(
    c: Lowering,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Value, ...]:
    if not training:
        y = c("batch_norm_inference", x, weight, bias, running_mean, running_var, eps=float(eps))
        empty = [c.full(t.shape, 0, t.dtype) for t in c.types[1:3]]
        return y, *empty, running_mean, running_var
    y, stats, var = _batch_norm(c, x, weight, bias, eps)
    mean = _running(c, x, 3, running_mean, stats[0], momentum)
    return y, *stats, mean, _running(c, x, 4, running_var, var, momentum)


@register(TABLE, "aten._batch_norm_with_update_functional.default")
def _batch_norm_with_update(
    c: Lowering,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value, ...]:
    if product(c.types[3].shape) != 0:
        raise Opaque("batch norm with a backend's own reserve")
    y, stats, var = _batch_norm(c, x, weight, bias, eps)
    reserve = c.full(c.types[3].shape, 0, c.types[3].dtype)
    mean = _running(c, x, 4, running_mean, stats[0], momentum)
    return y, *stats, reserve, mean, _running(c, x, 5, running_var, var, momentum)


# ---------------------------------------------------------------- cross entropy


class _Classes:
    """Which class each row asks for, as a comparison along the class axis.

    A comparison rather than a gather keeps the loss and its gradient in the row's own kernel.
    A target outside the classes selects nothing; ``checked`` sees to that.
    """

    def __init__(self, c: Lowering, x: Value, target: Value, ignore: Any) -> None:
        rank = len(x.shape)
        self.c, self.dim, self.shape = c, 1 if rank > 1 else 0, x.shape
        wanted = c.unsqueeze(target, self.dim)
        self.valid = c("ne", wanted, ignore)
        hit = c("eq", c.iota(x.shape[self.dim], self.dim, rank, target.dtype), wanted)
        self.hit = c("logical_and", hit, self.valid)

    def checked(self, target: Value, loss: Value, ignore: Any) -> Value:
        """The rows' losses, where a target is a class or ignored.

        On the CPU any other target raises, as in eager. A GPU would have to wait for that: there such a
        row gives NaN.
        """
        c, classes = self.c, self.shape[self.dim]
        if c.device == "cpu":
            name = str(check_classes)
            c.builder.node(c.find("call_random"), target, classes, ignore, types=(), target=name)
            return loss
        known = c("logical_and", c("ge", target, 0), c("lt", target, classes))
        return c("where", c("logical_or", known, c("eq", target, ignore)), loss, math.nan)

    def pick(self, x: Value) -> Value:
        """The element of each row at its class, 0 for rows that do not count."""
        return self.c("sum", self.c("where", self.hit, x, 0.0), dims=(self.dim,), keepdim=False)

    def per_class(self, weight: Value, dtype: torch.dtype) -> Value:
        """The class weights shaped to broadcast along the input."""
        shape = tuple(n if d == self.dim else 1 for d, n in enumerate(self.shape))
        return self.c.reshape(self.c.cast(weight, dtype), shape)

    def weights(self, weight: Value | None, x: Value) -> Value:
        """The weight of each row."""
        c = self.c
        if weight is not None:
            return self.pick(self.per_class(weight, x.dtype))
        rest = tuple(n for d, n in enumerate(self.shape) if d != self.dim)
        return c.cast(c.reshape(self.valid, rest), x.dtype)


_NONE, _MEAN = 0, 1


@register(TABLE, "aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default")
def _nll_loss(
    c: Lowering, x: Value, target: Value, weight: Value | None, reduction: int, ignore_index: Any
) -> tuple[Value, ...]:
    x = c.wide(x)
    rows = _Classes(c, x, target, ignore_index)
    scored = x if weight is None else c("mul", x, rows.per_class(weight, x.dtype))
    loss = rows.checked(target, c("neg", rows.pick(scored)), ignore_index)
    if reduction == _NONE:
        return c.cast(loss, c.dtype), c.full(c.types[1].shape, 0, c.types[1].dtype)
    every = tuple(range(len(loss.shape)))
    counted = rows.weights(weight, x)
    if every:
        loss = c("sum", loss, dims=every, keepdim=False)
        counted = c("sum", counted, dims=every, keepdim=False)
    if reduction == _MEAN:
        loss = c("div", loss, counted)
    return c.cast(loss, c.dtype), c.cast(counted, c.types[1].dtype)


@register(TABLE, "aten.nll_loss_backward.default", "aten.nll_loss2d_backward.default")
def _nll_loss_backward(
    c: Lowering,
    grad: Value,
    x: Value,
    target: Value,
    weight: Value | None,
    reduction: int,
    ignore_index: Any,
    total_weight: Value,
) -> Value:
    rows = _Classes(c, x, target, ignore_index)
    step = c("neg", c.wide(grad))
    if reduction == _MEAN:
        step = c("div", step, c.cast(total_weight, step.dtype))
    if step.shape:
        step = c.unsqueeze(step, rows.dim)
    if weight is not None:
        step = c("mul", step, rows.per_class(weight, step.dtype))
    return c.cast(c("where", rows.hit, step, 0.0), c.dtype)

