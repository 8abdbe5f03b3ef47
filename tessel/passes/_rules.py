"""What the rules of the canonicalize pass share. Every rule keeps a value's type, strides included."""

from __future__ import annotations

import math
from typing import Any

import sympy

from ..ir.node import Builder, Node, Value
from ..ir.types import TensorType, dim_equal
from ..ops import OPS
from ._fold import FOLDED, Number, rounded


def equal_shape(a: TensorType, b: TensorType) -> bool:
    return a.rank == b.rank and (a.shape == b.shape or all(map(dim_equal, a.shape, b.shape)))


def same_layout(a: TensorType, b: TensorType) -> bool:
    """Equal types; strides of sizes up to 1 do not count."""
    if a == b:
        return True
    return (
        a.dtype == b.dtype
        and a.device == b.device
        and equal_shape(a, b)
        and all(
            (isinstance(n, int) and n <= 1) or dim_equal(s, t)
            for n, s, t in zip(a.shape, a.strides, b.strides, strict=True)
        )
    )


def instead(v: Value, node: Node) -> Value | None:
    """``v`` in place of the node's result, if it lies in memory as that does."""
    return v if same_layout(v.type, node.type) else None


def remake(b: Builder, node: Node, op: str, *args: Any, **attrs: Any) -> Value | None:
    """``op`` in place of ``node``, if its result would lie in memory as the node's."""
    infer = OPS[op].infer
    assert infer is not None
    (t,) = infer(*(a.type if isinstance(a, Value) else a for a in args), **attrs)
    return b.node(OPS[op], *args, types=node.types, **attrs).out if same_layout(t, node.type) else None


def constant(x: Any) -> Number | None:
    """The number that an argument is: a literal, or each element of a constant tensor, rounded to it."""
    if isinstance(x, bool | int | float):
        return x
    if isinstance(x, sympy.Basic) or not isinstance(x, Value):
        return None
    while x.op.kind == "view":
        x = x.node.args[0]
    if x.op.name != "full" or x.type.dtype not in FOLDED:
        return None
    value = x.node.attrs["value"]
    return rounded(value, x.type.dtype) if isinstance(value, bool | int | float) else None


def is_zero(x: Any, sign: float = 0.0) -> bool:
    """Whether an argument is a constant zero; ``sign`` 1.0 or -1.0 asks for that zero of a float."""
    c = constant(x)
    if c is None or c != 0:
        return False
    return not sign or math.copysign(1.0, c) == sign


def is_number(x: Any, number: int) -> bool:
    c = constant(x)
    return c is not None and c == number


def make_full(b: Builder, node: Node, value: Number) -> Value | None:
    """A constant tensor in place of ``node``; only where its elements lie side by side in memory."""
    t = node.type
    if not t.contiguous:
        return None
    attrs: dict[str, Any] = {"shape": t.shape, "value": value, "dtype": t.dtype}
    if t.device is not None:
        attrs["device"] = t.device
    return b.node(OPS["full"], types=node.types, **attrs).out


def producer(x: Any, op: str) -> Node | None:
    """The node that made an argument, if it is that operator."""
    return x.node if isinstance(x, Value) and x.op.name == op else None


def adds_ones(v: Value) -> bool:
    """Whether a value is a reshape that only puts dims of size 1 in front."""
    if v.op.name != "reshape":
        return False
    old, new = v.node.args[0].shape, v.shape
    more = len(new) - len(old)
    return more >= 0 and all(dim_equal(n, 1) for n in new[:more]) and all(map(dim_equal, new[more:], old))


def is_float(v: Value) -> bool:
    return v.dtype.is_floating_point or v.dtype.is_complex


__all__ = [
    "adds_ones",
    "constant",
    "equal_shape",
    "instead",
    "is_float",
    "is_number",
    "is_zero",
    "make_full",
    "producer",
    "remake",
    "same_layout",
]
