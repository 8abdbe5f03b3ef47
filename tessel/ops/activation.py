"""Pointwise composites: kept whole until the decompose pass opens them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..ir.node import Builder, Node, Op, Value
from .common import pointwise_dims, table
from .elementwise import infer_for, lifted
from .emit import Emit

Body = Callable[..., Value]


def entry(name: str, ref: Callable[..., torch.Tensor], body: Body, of: str = "float", doc: str = "") -> Op:
    """A composite of pointwise ops. ``body(e, *args, **attrs)`` gives the result's value.

    Halves are computed in f32 throughout and rounded once at the end, as eager does.
    """
    infer = infer_for(name, of, False)

    def decompose(builder: Builder, node: Node) -> tuple[Value, ...]:
        e = Emit(builder)
        args = [e.wide(a) if isinstance(a, Value) else a for a in node.args]
        return (e.cast(body(e, *args, **node.attrs), node.type.dtype),)

    def infer_attrs(*args: Any, **attrs: Any) -> Any:
        return infer(*args)

    return Op(
        name,
        "composite",
        dims=pointwise_dims,
        ref=ref,
        infer=infer_attrs,
        decompose=decompose,
        cost=20,
        doc=doc,
    )


# ---------------------------------------------------------------- bodies


def _gelu(e: Emit, x: Value, approximate: str = "none") -> Value:
    if approximate == "tanh":
        cube = e("mul", e("mul", x, x), x)
        inner = e("mul", e("add", x, e("mul", cube, 0.044715)), math.sqrt(2 / math.pi))
        gate = e("tanh", inner)
    else:
        gate = e("erf", e("mul", x, math.sqrt(0.5)))
    return e("mul", e("mul", x, 0.5), e("add", gate, 1.0))


def _silu(e: Emit, x: Value) -> Value:
    return e("mul", x, e("sigmoid", x))


def _leaky_relu(e: Emit, x: Value, slope: float = 0.01) -> Value:
    return e("where", e("gt", x, 0.0), x, e("mul", x, slope))


def _clamp(e: Emit, x: Value, low: Any = None, high: Any = None) -> Value:
    x = x if low is None else e("maximum", x, low)
    return x if high is None else e("minimum", x, high)


def _hardtanh(e: Emit, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    return _clamp(e, x, low, high)


def _hardsigmoid(e: Emit, x: Value) -> Value:
    return e("div", _clamp(e, e("add", x, 3.0), 0.0, 6.0), 6.0)


def _hardswish(e: Emit, x: Value) -> Value:
    return e("mul", x, _hardsigmoid(e, x))


def _elu(e: Emit, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    # The exponential only ever sees the negative part, so that it cannot overflow.
    low = e("expm1", e("mul", e("minimum", x, 0.0), input_scale))
    return e("where", e("gt", x, 0.0), e("mul", x, scale), e("mul", low, alpha * scale))


def _softplus(e: Emit, x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    scaled = e("mul", x, beta)
    soft = e("div", e("log1p", e("exp", e("minimum", scaled, threshold))), beta)
    return e("where", e("gt", scaled, threshold), x, soft)


def _mish(e: Emit, x: Value) -> Value:
    return e("mul", x, e("tanh", _softplus(e, x)))


def _log_sigmoid(e: Emit, x: Value) -> Value:
    return e("sub", e("minimum", x, 0.0), e("log1p", e("exp", e("neg", e("abs", x)))))


def _lerp(e: Emit, a: Value, b: Value, weight: Any) -> Value:
    span = e("sub", b, a)
    near_a = e("add", a, e("mul", span, weight))
    if not isinstance(weight, Value):
        return near_a if abs(weight) < 0.5 else e("sub", b, e("mul", span, 1.0 - weight))
    near_b = e("sub", b, e("mul", span, e("sub", 1.0, weight)))
    # From the nearer end, as torch does, so that weight 1 gives b exactly.
    return e("where", e("lt", e("abs", weight), 0.5), near_a, near_b)


def _scaled(e: Emit, x: Value, value: Any) -> Value:
    return x if value == 1 else e("mul", x, value)


def _addcmul(e: Emit, a: Value, b: Any, c: Any, value: Any = 1) -> Value:
    return e("add", a, _scaled(e, e("mul", b, c), value))


def _addcdiv(e: Emit, a: Value, b: Any, c: Any, value: Any = 1) -> Value:
    return e("add", a, _scaled(e, e("div", b, c), value))


def _clamp_ref(x: torch.Tensor, low: Any = None, high: Any = None) -> torch.Tensor:
    got = x if low is None else lifted(torch.maximum)(x, low)
    return got if high is None else lifted(torch.minimum)(got, high)


def _elu_ref(
    x: torch.Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> torch.Tensor:
    return torch.where(x > 0, x * scale, torch.expm1(x.clamp(max=0) * input_scale) * (alpha * scale))


def _addcmul_ref(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, value: Any = 1) -> torch.Tensor:
    return torch.addcmul(a, b, c, value=value)


def _addcdiv_ref(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, value: Any = 1) -> torch.Tensor:
    return torch.addcdiv(a, b, c, value=value)


ACTIVATION = table(
    entry(
        "gelu",
        lambda x, approximate="none": F.gelu(x, approximate=approximate),
        _gelu,
        doc='"none" or "tanh"',
    ),
    entry("silu", F.silu, _silu),
    entry("leaky_relu", lambda x, slope=0.01: F.leaky_relu(x, slope), _leaky_relu),
    entry("hardtanh", lambda x, low=-1.0, high=1.0: F.hardtanh(x, low, high), _hardtanh),
    entry("hardsigmoid", F.hardsigmoid, _hardsigmoid),
    entry("hardswish", F.hardswish, _hardswish),
    entry("elu", _elu_ref, _elu, doc="scale and input_scale make it selu and celu"),
    entry("softplus", lambda x, beta=1.0, threshold=20.0: F.softplus(x, beta, threshold), _softplus),
    entry("mish", F.mish, _mish),
    entry("log_sigmoid", F.logsigmoid, _log_sigmoid),
    entry("clamp", _clamp_ref, _clamp, "any", doc="clamp(x, low|None, high|None); NaN stays"),
    entry("lerp", lifted(torch.lerp), _lerp),
    entry("addcmul", lifted(_addcmul_ref), _addcmul, "any"),
    entry("addcdiv", lifted(_addcdiv_ref), _addcdiv),
)
