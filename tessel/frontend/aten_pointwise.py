"""ATen pointwise operators: one IR operator each, with the casts that torch makes silently."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ir.node import Value
from .lower import INTEGERS, Lowering, Opaque, Table, axis, literal, promoted, register

TABLE: Table = {}

# Computed in the result's dtype: for these torch promotes integers to float where it must.
_UNARY = (
    "abs neg sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tan asin acos atan "
    "sinh cosh tanh asinh acosh atanh erf erfc sigmoid relu bitwise_not mish"
).split()
_ROUND = "floor ceil round trunc".split()
_BINARY = {
    "mul": "Tensor Scalar",
    "maximum": "default",
    "minimum": "default",
    "fmod": "Tensor Scalar",
    "remainder": "Tensor Scalar Scalar_Tensor",
    "atan2": "default",
    "bitwise_and": "Tensor Scalar Scalar_Tensor",
    "bitwise_or": "Tensor Scalar Scalar_Tensor",
    "bitwise_xor": "Tensor Scalar Scalar_Tensor",
    "hypot": "default",
    "copysign": "Tensor Scalar",
}
_COMPARE = "eq ne lt le gt ge".split()
_LOGICAL = "logical_and logical_or logical_xor".split()


def _unary(name: str) -> Any:
    def lower(c: Lowering, x: Value) -> Value:
        return c.pointwise(name, x)

    return lower


def _round(name: str) -> Any:
    def lower(c: Lowering, x: Value) -> Value:
        return x if x.dtype in INTEGERS else c(name, x)

    return lower


def _binary(name: str) -> Any:
    def lower(c: Lowering, a: Any, b: Any) -> Value:
        return c.pointwise(name, a, b)

    return lower


def _shift_number(name: str) -> Any:
    def lower(c: Lowering, number: int, by: Value) -> Value:
        return c(name, c.full((), number, by.dtype), by)

    return lower


def _compare(name: str) -> Any:
    def lower(c: Lowering, a: Any, b: Any) -> Value:
        return c.pointwise(name, a, b, dtype=promoted(a, b))

    return lower


def _logical(name: str) -> Any:
    def lower(c: Lowering, a: Value, b: Value) -> Value:
        return c(name, truth(c, a), truth(c, b))

    return lower


def truth(c: Lowering, x: Value) -> Value:
    """Whether each element is not zero."""
    return x if x.dtype == torch.bool else c("ne", x, literal(0, x.dtype))


for _name in _UNARY:
    TABLE[f"aten.{_name}.default"] = _unary(_name)
for _name in _ROUND:
    TABLE[f"aten.{_name}.default"] = _round(_name)
for _name, _overloads in _BINARY.items():
    for _overload in _overloads.split():
        TABLE[f"aten.{_name}.{_overload}"] = _binary(_name)
for _name in _COMPARE:
    for _overload in ("Tensor", "Scalar"):
        TABLE[f"aten.{_name}.{_overload}"] = _compare(_name)
for _name in _LOGICAL:
    TABLE[f"aten.{_name}.default"] = _logical(_name)


@register(TABLE, "aten.logical_not.default")
def _logical_not(c: Lowering, x: Value) -> Value:
    return c("logical_not", truth(c, x))


@register(TABLE, "aten.positive.default")
def _positive(c: Lowering, x: Value) -> Value:
    return x


@register(TABLE, "aten.round.decimals")
def _round_decimals(c: Lowering, x: Value, *, decimals: int) -> Value:
    if decimals or x.dtype in INTEGERS:
        raise Opaque("rounding to decimals")
    return c("round", x)


@register(TABLE, "aten.isnan.default")
def _isnan(c: Lowering, x: Value) -> Value:
    return _nothing(c, x) if not x.dtype.is_floating_point else c("isnan", x)


@register(TABLE, "aten.isinf.default")
def _isinf(c: Lowering, x: Value) -> Value:
    return _nothing(c, x) if not x.dtype.is_floating_point else c("isinf", x)


def _nothing(c: Lowering, x: Value) -> Value:
    return c("ne", x, x)


@register(TABLE, "aten.signbit.default")
def _signbit(c: Lowering, x: Value) -> Value:
    if x.dtype.is_floating_point:
        raise Opaque("the sign of a floating-point zero")
    return c("lt", x, 0) if x.dtype != torch.bool else _nothing(c, x)


@register(TABLE, "aten.square.default")
def _square(c: Lowering, x: Value) -> Value:
    return c.pointwise("mul", x, x)


# ---------------------------------------------------------------- arithmetic


def _scaled(c: Lowering, x: Any, alpha: Any) -> Any:
    if isinstance(alpha, int | float) and alpha == 1:
        return x
    if not isinstance(x, Value):
        return x * alpha
    return c.pointwise("mul", x, alpha)


@register(TABLE, "aten.add.Tensor", "aten.add.Scalar")
def _add(c: Lowering, a: Any, b: Any, alpha: Any = 1) -> Value:
    if c.dtype == torch.bool:
        if alpha != 1:
            raise Opaque("scaled addition of bools")
        return c("logical_or", a, b)
    return c.pointwise("add", a, _scaled(c, b, alpha))


@register(TABLE, "aten.sub.Tensor", "aten.sub.Scalar")
def _sub(c: Lowering, a: Any, b: Any, alpha: Any = 1) -> Value:
    return c.pointwise("sub", a, _scaled(c, b, alpha))


@register(TABLE, "aten.rsub.Tensor", "aten.rsub.Scalar")
def _rsub(c: Lowering, a: Any, b: Any, alpha: Any = 1) -> Value:
    return c.pointwise("sub", b, _scaled(c, a, alpha))


@register(TABLE, "aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor")
def _div(c: Lowering, a: Any, b: Any) -> Value:
    return c.pointwise("div", a, b)


@register(TABLE, "aten.div.Tensor_mode", "aten.div.Scalar_mode")
def _div_mode(c: Lowering, a: Any, b: Any, *, rounding_mode: str | None = None) -> Value:
    name = {None: "div", "floor": "floor_div", "trunc": "trunc_div"}[rounding_mode]
    return c.pointwise(name, a, b)


@register(TABLE, "aten.floor_divide.default", "aten.floor_divide.Scalar")
def _floor_divide(c: Lowering, a: Any, b: Any) -> Value:
    return c.pointwise("floor_div", a, b)


@register(TABLE, "aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def _pow(c: Lowering, a: Any, b: Any) -> Value:
    if isinstance(b, int | float) and isinstance(a, Value):
        base = c.cast(a, c.dtype)
        if b == 1:
            return base
        if b == 2:
            return c("mul", base, base)
        if c.dtype.is_floating_point:
            if b == 0.5:
                return c("sqrt", base)
            if b == -0.5:
                return c("rsqrt", base)
            if b == -1:
                return c("reciprocal", base)
            if b == 3:
                return c("mul", c("mul", base, base), base)
    return c.pointwise("pow", a, b)


for _side in ("left", "right"):
    for _overload in ("Tensor", "Tensor_Scalar"):
        TABLE[f"aten.bitwise_{_side}_shift.{_overload}"] = _binary(f"shift_{_side}")
    TABLE[f"aten.bitwise_{_side}_shift.Scalar_Tensor"] = _shift_number(f"shift_{_side}")
    for _overload in ("Tensor", "Scalar"):
        TABLE[f"aten.__{_side[0]}shift__.{_overload}"] = _binary(f"shift_{_side}")
for _name in ("and", "or", "xor"):
    for _overload in ("Tensor", "Scalar"):
        TABLE[f"aten.__{_name}__.{_overload}"] = _binary(f"bitwise_{_name}")


@register(TABLE, "aten.addcmul.default")
def _addcmul(c: Lowering, x: Value, a: Value, b: Value, *, value: Any = 1) -> Value:
    product = c.pointwise("mul", a, b)
    return c.pointwise("add", x, _scaled(c, product, value))


@register(TABLE, "aten.addcdiv.default")
def _addcdiv(c: Lowering, x: Value, a: Value, b: Value, *, value: Any = 1) -> Value:
    quotient = c.pointwise("div", a, b)
    return c.pointwise("add", x, _scaled(c, quotient, value))


@register(TABLE, "aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def _where(c: Lowering, cond: Value, a: Any, b: Any) -> Value:
    return c("where", truth(c, cond), c.operand(a, c.dtype), c.operand(b, c.dtype))


@register(TABLE, "aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(c: Lowering, x: Value, mask: Value, value: Any) -> Value:
    return c("where", truth(c, mask), c.operand(value, c.dtype), c.cast(x, c.dtype))


@register(TABLE, "aten.clamp.default", "aten.clamp.Tensor", "aten.clip.default", "aten.clip.Tensor")
def _clamp(c: Lowering, x: Value, min: Any = None, max: Any = None) -> Value:
    low = None if min is None else c.operand(min, c.dtype)
    high = None if max is None else c.operand(max, c.dtype)
    return c("clamp", c.cast(x, c.dtype), low, high)


@register(TABLE, "aten.clamp_min.default", "aten.clamp_min.Tensor")
def _clamp_min(c: Lowering, x: Value, min: Any) -> Value:
    return c("clamp", c.cast(x, c.dtype), c.operand(min, c.dtype), None)


@register(TABLE, "aten.clamp_max.default", "aten.clamp_max.Tensor")
def _clamp_max(c: Lowering, x: Value, max: Any) -> Value:
    return c("clamp", c.cast(x, c.dtype), None, c.operand(max, c.dtype))


# ---------------------------------------------------------------- activations


@register(TABLE, "aten.gelu.default")
def _gelu(c: Lowering, x: Value, *, approximate: str = "none") -> Value:
    return c("gelu", x, approximate=approximate)


@register(TABLE, "aten.silu.default")
def _silu(c: Lowering, x: Value) -> Value:
    return c("silu", x)


@register(TABLE, "aten.hardswish.default")
def _hardswish(c: Lowering, x: Value) -> Value:
    return c("hardswish", x)


@register(TABLE, "aten.hardsigmoid.default")
def _hardsigmoid(c: Lowering, x: Value) -> Value:
    return c("hardsigmoid", x)


@register(TABLE, "aten.leaky_relu.default")
def _leaky_relu(c: Lowering, x: Value, negative_slope: float = 0.01) -> Value:
    return c("leaky_relu", x, slope=float(negative_slope))


@register(TABLE, "aten.hardtanh.default")
def _hardtanh(c: Lowering, x: Value, min_val: float = -1, max_val: float = 1) -> Value:
    if not x.dtype.is_floating_point:
        return c("clamp", x, literal(min_val, x.dtype), literal(max_val, x.dtype))
    return c("hardtanh", x, low=float(min_val), high=float(max_val))


@register(TABLE, "aten.relu6.default")
def _relu6(c: Lowering, x: Value) -> Value:
    return _hardtanh(c, x, 0, 6)


@register(TABLE, "aten.elu.default")
def _elu(c: Lowering, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    if scale == 1 and input_scale == 1:
        return c("elu", x, alpha=float(alpha))
    below = c("mul", c("expm1", _scaled(c, x, input_scale)), float(alpha * scale))
    return c("where", c("gt", x, 0.0), _scaled(c, x, scale), below)


@register(TABLE, "aten.softplus.default")
def _softplus(c: Lowering, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    return c("softplus", x, beta=float(beta), threshold=float(threshold))


@register(TABLE, "aten.threshold.default")
def _threshold(c: Lowering, x: Value, threshold: Any, value: Any) -> Value:
    return c("where", c("le", x, literal(threshold, x.dtype)), literal(value, x.dtype), x)


@register(TABLE, "aten._prelu_kernel.default")
def _prelu(c: Lowering, x: Value, weight: Value) -> Value:
    return c("where", c("gt", x, 0.0), x, c.pointwise("mul", x, weight))


@register(TABLE, "aten.glu.default")
def _glu(c: Lowering, x: Value, dim: int = -1) -> Value:
    dim = axis(dim, len(x.shape))
    half = c.out.shape[dim]
    gate = c.slice(x, dim, half, half)
    return c("mul", c.slice(x, dim, 0, half), c("sigmoid", gate))


# ---------------------------------------------------------------- their gradients


def _narrow(c: Lowering, x: Value) -> Value:
    return c.cast(x, c.dtype)


@register(TABLE, "aten.threshold_backward.default")
def _threshold_backward(c: Lowering, grad: Value, x: Value, threshold: Any) -> Value:
    keep = c("le", x, literal(threshold, x.dtype))
    return c("where", keep, literal(0, c.dtype), c.cast(grad, c.dtype))


@register(TABLE, "aten.sigmoid_backward.default")
def _sigmoid_backward(c: Lowering, grad: Value, out: Value) -> Value:
    grad, out = c.wide(grad), c.wide(out)
    return _narrow(c, c("mul", grad, c("mul", out, c("sub", 1.0, out))))


@register(TABLE, "aten.tanh_backward.default")
def _tanh_backward(c: Lowering, grad: Value, out: Value) -> Value:
    grad, out = c.wide(grad), c.wide(out)
    return _narrow(c, c("mul", grad, c("sub", 1.0, c("mul", out, out))))


@register(TABLE, "aten.silu_backward.default")
def _silu_backward(c: Lowering, grad: Value, x: Value) -> Value:
    grad, x = c.wide(grad), c.wide(x)
    s = c("sigmoid", x)
    slope = c("mul", s, c("add", c("mul", x, c("sub", 1.0, s)), 1.0))
    return _narrow(c, c("mul", grad, slope))


@register(TABLE, "aten.gelu_backward.default")
def _gelu_backward(c: Lowering, grad: Value, x: Value, *, approximate: str = "none") -> Value:
    grad, x = c.wide(grad), c.wide(x)
    if approximate == "tanh":
        beta, kappa = math.sqrt(2 / math.pi), 0.044715
        square = c("mul", x, x)
        inner = c("mul", c("mul", x, c("add", c("mul", square, kappa), 1.0)), beta)
        t = c("tanh", inner)
        left = c("mul", c("add", t, 1.0), 0.5)
        dinner = c("mul", c("add", c("mul", square, 3 * kappa), 1.0), beta)
        right = c("mul", c("mul", c("mul", x, 0.5), c("sub", 1.0, c("mul", t, t))), dinner)
        return _narrow(c, c("mul", grad, c("add", left, right)))
    cdf = c("mul", c("add", c("erf", c("mul", x, math.sqrt(0.5))), 1.0), 0.5)
    bell = c("mul", c("exp", c("mul", c("mul", x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return _narrow(c, c("mul", grad, c("add", cdf, c("mul", x, bell))))


@register(TABLE, "aten.native_dropout_backward.default")
def _native_dropout_backward(c: Lowering, grad: Value, mask: Value, scale: float) -> Value:
    return c("mul", c("mul", grad, c.cast(mask, grad.dtype)), float(scale))
