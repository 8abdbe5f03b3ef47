"""Canonical arithmetic: operations that change no bit go away, constants are folded.

Floats are taken seriously: ``x + 0.0`` turns -0.0 into 0.0 and stays, ``x - 0.0`` and ``x * 1``
change nothing and go. A NaN stays a NaN; its payload is nobody's.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ir.node import Builder, Node, Value
from ..ir.rewrite import Rule
from ..ir.types import Dim, dim_equal, simplify_dim
from ..ops import OPS
from ._fold import FOLDABLE, fold, rounded
from ._rules import adds_ones, constant, instead, is_float, is_number, is_zero, make_full, producer, remake

COMMUTATIVE = ("add", "mul", "maximum", "minimum", "eq", "ne", "bitwise_and", "bitwise_or", "bitwise_xor") + (
    "logical_and",
    "logical_or",
    "logical_xor",
)
POINTWISE = tuple(name for name, op in OPS.items() if op.kind == "pointwise")


# ---------------------------------------------------------------- neutral elements


def _add(b: Builder, node: Node) -> Value | None:
    x, y = node.args
    for a, c in ((x, y), (y, x)):
        # the neutral float is -0.0
        if isinstance(a, Value) and not a.dtype.is_complex and is_zero(c, -1.0 if is_float(a) else 0.0):
            return instead(a, node)
    return None


def _sub(b: Builder, node: Node) -> Value | None:
    x, y = node.args
    if isinstance(x, Value) and is_zero(y, 1.0 if is_float(x) else 0.0):
        return instead(x, node)
    return None


def _mul(b: Builder, node: Node) -> Value | None:
    x, y = node.args
    for a, c in ((x, y), (y, x)):
        # complex infinities are not what they were after a product
        if isinstance(a, Value) and not a.dtype.is_complex and is_number(c, 1):
            return instead(a, node)
    return None


def _div(b: Builder, node: Node) -> Value | None:
    x, y = node.args
    if not isinstance(x, Value) or x.dtype.is_complex or not is_number(y, 1):
        return None
    return instead(x, node) if node.op.name == "div" or not is_float(x) else None


def _shift(b: Builder, node: Node) -> Value | None:
    x, y = node.args
    return instead(x, node) if isinstance(x, Value) and is_zero(y) else None


def _bits(b: Builder, node: Node) -> Value | None:
    """``x | 0``, ``x ^ 0``, ``x & ~0``, and the same of conditions."""
    x, y = node.args
    name = node.op.name
    for a, c in ((x, y), (y, x)):
        if not isinstance(a, Value) or (a.dtype != torch.bool and name.startswith("logical")):
            continue
        if name.endswith("_and"):
            value = constant(c)
            neutral = value is not None and rounded(value, a.dtype) == rounded(-1, a.dtype)
        else:
            neutral = is_zero(c)
        if neutral:
            return instead(a, node)
    return None


def _same_twice(b: Builder, node: Node) -> Value | None:
    """``max(x, x)``, ``x & x``."""
    x, y = node.args
    if isinstance(x, Value) and x == y and (x.dtype == torch.bool or not node.op.name.startswith("logical")):
        return instead(x, node)
    return None


# ---------------------------------------------------------------- operations on their own results


def _inverse(b: Builder, node: Node) -> Value | None:
    """``-(-x)``, ``not not x``."""
    x = node.args[0]
    inner = producer(x, node.op.name)
    if inner is None or (node.op.name == "logical_not" and inner.args[0].dtype != torch.bool):
        return None
    return instead(inner.args[0], node)


def _idempotent(b: Builder, node: Node) -> Value | None:
    return instead(node.args[0], node) if producer(node.args[0], node.op.name) else None


def _abs_neg(b: Builder, node: Node) -> Value | None:
    inner = producer(node.args[0], "neg")
    return None if inner is None else b.node(node.op, inner.args[0], types=node.types).out


# ---------------------------------------------------------------- cast


def _significant(dtype: torch.dtype) -> int:
    return {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(dtype, 0)


_SMALL_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def exact(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether every value of dtype ``a`` is one of ``b``.

    >>> exact(torch.float16, torch.float32), exact(torch.int32, torch.float32)
    (True, False)
    """
    if a == b or a == torch.bool:
        return a == b or b in (torch.uint8, torch.int8) or bool(_significant(b)) or not b.is_floating_point
    if a.is_complex or b.is_complex or b == torch.bool:
        return False
    if a in _SMALL_FLOATS:
        return bool(_significant(b))
    if a.is_floating_point:
        halves = (torch.float16, torch.bfloat16)
        return 0 < _significant(a) < _significant(b) and not (a in halves and b in halves)
    low, high = torch.iinfo(a).min, torch.iinfo(a).max
    if b.is_floating_point:
        return max(-low, high + 1) <= 2 ** _significant(b) > 1
    return torch.iinfo(b).min <= low and high <= torch.iinfo(b).max


def _cast_nothing(b: Builder, node: Node) -> Value | None:
    x = node.args[0]
    return instead(x, node) if x.dtype == node.attrs["dtype"] else None


def _cast(b: Builder, node: Node) -> Value | None:
    """A cast of an exact cast is one cast."""
    inner = producer(node.args[0], "cast")
    if inner is None:
        return None
    x, to = inner.args[0], node.attrs["dtype"]
    # float to integer out of range is whatever the instruction does, which differs between widths
    if not exact(x.dtype, inner.attrs["dtype"]) or (
        is_float(x) and not to.is_floating_point and to != torch.bool
    ):
        return None
    return b.node(OPS["cast"], x, types=node.types, dtype=to).out


# ---------------------------------------------------------------- where and pow


def _where(b: Builder, node: Node) -> Value | None:
    cond, x, y = node.args
    value = constant(cond)
    if value is None:
        return instead(x, node) if isinstance(x, Value) and x == y else None
    chosen = x if value else y
    if (number := constant(chosen)) is not None and (number := rounded(number, node.type.dtype)) is not None:
        return make_full(b, node, number)
    return instead(chosen, node) if isinstance(chosen, Value) else None


def _pow(b: Builder, node: Node) -> Value | None:
    """Literal exponents for which eager has its own short cuts, with the same bits."""
    x, e = node.args
    if (
        not isinstance(x, Value)
        or not isinstance(e, int | float)
        or isinstance(e, bool)
        or x.dtype == torch.bool
    ):
        return None
    if x.dtype.is_complex or (isinstance(e, float) and not is_float(x)):
        return None

    def new(op: str, *args: Any) -> Value:
        return b.node(OPS[op], *args, types=node.types).out

    if e == 1:
        return instead(x, node)
    if e == 2:
        return new("mul", x, x)
    if x.dtype == torch.float16:
        return None  # eager rounds its cubes and roots of these once, ours would be twice
    if e == 3:
        return new("mul", new("mul", x, x), x)
    if is_float(x) and e in (-1, 0.5, -0.5):
        return new({-1: "reciprocal", 0.5: "sqrt", -0.5: "rsqrt"}[e], x)
    return None


# ---------------------------------------------------------------- constants


def _literal_last(b: Builder, node: Node) -> Value | None:
    x, y = node.args
    if isinstance(x, Value) or not isinstance(y, Value):
        return None
    if node.op.name in ("maximum", "minimum") and is_float(y) and is_zero(x):
        return None  # of 0.0 and -0.0 it may be the first that wins
    return b.node(node.op, y, x, types=node.types).out


def _fold(b: Builder, node: Node) -> Value | None:
    """Constants in, a constant out."""
    args = [constant(a) for a in node.args]
    if any(a is None for a in args):
        return None
    operand = next(a.dtype for a in node.args if isinstance(a, Value))
    got = fold(node.op.name, tuple(args), operand, node.type.dtype)  # type: ignore[arg-type]
    return None if got is None else make_full(b, node, got)


def broadcast(shapes: list[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The common shape of shapes that are known to broadcast."""
    shape: list[Dim] = []
    for place in range(1, max(map(len, shapes), default=0) + 1):
        sizes = [s[-place] for s in shapes if len(s) >= place]
        shape.append(next((n for n in sizes if not dim_equal(n, 1)), 1))
    return tuple(reversed(shape))


def _fits(node: Node, args: tuple[Any, ...]) -> bool:
    """Whether the node has the same shape with these arguments."""
    shape = broadcast([a.shape for a in args if isinstance(a, Value)])
    return len(shape) == node.type.rank and all(map(dim_equal, shape, node.type.shape))


def _replace_one(b: Builder, node: Node, fits: Any) -> Value | None:
    """Put ``fits(arg)`` in place of the first arguments that allow it."""
    args = node.args
    for i, a in enumerate(args):
        got = fits(i, a) if isinstance(a, Value) else None
        if got is not None:
            changed = (*args[:i], got, *args[i + 1 :])
            args = changed if _fits(node, changed) else args
    return None if args is node.args else b.node(node.op, *args, types=node.types, **node.attrs).out


# Of these a literal operand gives the same bits as a constant tensor (not of pow and div, where torch
# has its own routines for scalars).
_TAKES_LITERAL = ("add", "sub", "mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where")


def _to_literal(b: Builder, node: Node) -> Value | None:
    """A constant tensor as operand becomes a literal, so that nothing is read."""

    first = 1 if node.op.name == "where" else 0
    tensors = [i for i, a in enumerate(node.args) if i >= first and isinstance(a, Value)]
    # one tensor must stay to say the dtype
    able = [i for i in tensors if constant(node.args[i]) is not None]
    if len(able) == len(tensors):
        able = able[1:]
    return _replace_one(b, node, lambda i, a: constant(a) if i in able else None)


def _drop_expand(b: Builder, node: Node) -> Value | None:
    """Pointwise operators broadcast by themselves."""
    return _replace_one(
        b, node, lambda i, a: a.node.args[0] if a.op.name == "expand" or adds_ones(a) else None
    )


def _iota(b: Builder, node: Node) -> Value | None:
    """``iota + c`` and ``iota * c`` in 64 bits."""
    x, c = node.args
    inner = producer(x, "iota")
    if inner is None or inner.attrs.get("dtype", torch.int64) != torch.int64:
        return None
    start, step = inner.attrs.get("start", 0), inner.attrs.get("step", 1)
    if any(isinstance(n, Value | float | bool) for n in (start, step, c)):
        return None
    if node.op.name == "mul":
        start, step = simplify_dim(start * c), simplify_dim(step * c)
    else:
        start = simplify_dim(start + (c if node.op.name == "add" else -c))
    if any(isinstance(n, int) and abs(n) >= 2**62 for n in (start, step)):
        return None
    return remake(b, node, "iota", **{**inner.attrs, "start": start, "step": step})


VALUE_RULES: tuple[Rule, ...] = (
    Rule("literal last", COMMUTATIVE, _literal_last),
    Rule("operation on constants", FOLDABLE, _fold),
    Rule("x + 0", ("add",), _add),
    Rule("x - 0", ("sub",), _sub),
    Rule("x * 1", ("mul",), _mul),
    Rule("x / 1", ("div", "floor_div", "trunc_div"), _div),
    Rule("shift by 0", ("shift_left", "shift_right"), _shift),
    Rule(
        "neutral bits",
        ("bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor"),
        _bits,
    ),
    Rule(
        "the same twice",
        ("maximum", "minimum", "bitwise_and", "bitwise_or", "logical_and", "logical_or"),
        _same_twice,
    ),
    Rule("double inverse", ("neg", "bitwise_not", "logical_not"), _inverse),
    Rule("idempotent", ("abs", "relu", "floor", "ceil", "trunc", "round"), _idempotent),
    Rule("abs of neg", ("abs",), _abs_neg),
    Rule("cast to the same dtype", ("cast",), _cast_nothing),
    Rule("cast of an exact cast", ("cast",), _cast),
    Rule("where of a constant", ("where",), _where),
    Rule("power by a literal", ("pow",), _pow),
    Rule("iota with a literal", ("add", "sub", "mul"), _iota),
    Rule("constant operand", _TAKES_LITERAL, _to_literal),
    Rule("expanded operand", POINTWISE, _drop_expand),
)
