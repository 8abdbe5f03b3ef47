"""The recurrences of ``scan_op`` and ``linear_attention_op`` as IR operators."""

from __future__ import annotations

from ..ir.node import Value
from .linear_attention_op import operator  # noqa: F401  (defines the operators)
from .lower import Lowering, Table, axis, register

TABLE: Table = {}


@register(TABLE, "tessel.linear_scan.default")
def _linear_scan(c: Lowering, a: Value, b: Value, dim: int, reverse: bool) -> Value:
    more = {"reverse": True} if reverse else {}
    return c("linear_scan", a, b, dim=axis(dim, len(a.shape)), **more)


@register(TABLE, "tessel.selective_scan.default")
def _selective_scan(c: Lowering, *operands: Value) -> Value:
    return c("selective_scan", *operands)


@register(TABLE, "tessel.selective_scan_backward.default")
def _selective_scan_backward(c: Lowering, *operands: Value) -> tuple[Value, ...]:
    return c.many("selective_scan_backward", *operands)


@register(TABLE, "tessel.linear_attention.default")
def _linear_attention(c: Lowering, *operands: Value | None) -> tuple[Value, ...]:
    return c.many("linear_attention", *operands)


@register(TABLE, "tessel.linear_attention_backward.default")
def _linear_attention_backward(c: Lowering, *operands: Value | None) -> tuple[Value, ...]:
    return c.many("linear_attention_backward", *operands)


@register(TABLE, "aten.detach_copy.default")
def _detached(c: Lowering, x: Value) -> Value:
    return c("copy", x)


__all__ = ["TABLE"]
