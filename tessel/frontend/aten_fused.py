"""What Tessel's own torch operators become in the IR: those that stand for several calls (losses, experts)."""

from __future__ import annotations

from typing import Any

from ..ir.node import Value
from .experts_op import experts  # noqa: F401  (defines the operators)
from .loss_op import linear_cross_entropy  # noqa: F401  (defines the operators)
from .lower import Lowering, Table, register

TABLE: Table = {}


@register(TABLE, "tessel.linear_cross_entropy.default")
def _linear_cross_entropy(
    c: Lowering,
    x: Value,
    weight: Value,
    bias: Value | None,
    target: Value,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> tuple[Value, ...]:
    attrs: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
    }
    return c.many("linear_cross_entropy", x, weight, bias, target, **attrs)


@register(TABLE, "tessel.linear_cross_entropy_backward.default")
def _linear_cross_entropy_backward(
    c: Lowering,
    grad: Value,
    x: Value,
    weight: Value,
    bias: Value | None,
    target: Value,
    lse: Value,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    wanted: tuple[bool, ...],
) -> tuple[Value, ...]:
    attrs: dict[str, Any] = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "wanted": wanted,
    }
    return c.many("linear_cross_entropy_backward", grad, x, weight, bias, target, lse, **attrs)


@register(TABLE, "tessel.linear_cross_entropy_gradients.default")
def _linear_cross_entropy_gradients(c: Lowering, *args: Any) -> tuple[Value, ...]:
    names = ("ignore_index", "label_smoothing", "softcap", "wanted")
    return c.many("linear_cross_entropy_gradients", *args[:4], **dict(zip(names, args[4:], strict=True)))


@register(TABLE, "tessel.scaled_gradients.default")
def _scaled_gradients(c: Lowering, *args: Any) -> tuple[Value, ...]:
    return c.many("scaled_gradients", *args)


def _expert_attrs(act: str, interleaved: bool, turned: bool, alpha: float, limit: float) -> dict[str, Any]:
    attrs: dict[str, Any] = {"act": act, "interleaved": interleaved, "turned": turned}
    return attrs | ({"alpha": alpha, "limit": limit} if act == "limited" else {})


@register(TABLE, "tessel.experts.default")
def _experts(c: Lowering, *args: Any) -> tuple[Value, ...]:
    operands, attrs, keep = args[:7], args[7:-1], args[-1]
    return c.many("experts", *operands, **_expert_attrs(*attrs), keep=keep)


@register(TABLE, "tessel.experts_backward.default")
def _experts_backward(c: Lowering, *args: Any) -> tuple[Value, ...]:
    operands, attrs, wanted = args[:9], args[9:-1], args[-1]
    return c.many("experts_backward", *operands, **_expert_attrs(*attrs), wanted=wanted)
