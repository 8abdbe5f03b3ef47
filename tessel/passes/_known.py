"""What is known of values while compiling: between which two numbers all their elements lie.

Small values that read no input are computed. Of others an operator may say it of its result: where ``ids`` is 0
everywhere, ``ids[b, i] == 0`` is true, however many places there are, and wherever a rank's own begin.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from ..ir.node import Node, Value, map_values
from ..ir.types import TensorType

__all__ = ["Known"]

Range: TypeAlias = "tuple[float, float]"

_SMALL = 1 << 22  # elements of a value that is computed here
_COMPUTED = frozenset({"pointwise", "view", "generate", "index", "library", "scan", "composite"})
_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)  # have every whole number below 2**24
_TRUE, _FALSE, _EITHER = (1, 1), (0, 0), (0, 1)


class Known:
    """What is known of the values of a graph, each looked at once."""

    def __init__(self) -> None:
        self._ranges: dict[Value, Range | None] = {}

    def range(self, v: Value) -> Range | None:
        """The smallest and the largest number that may be among the elements (a flag is 0 or 1), None if not known."""
        if v not in self._ranges:
            x = _computed(v)
            self._ranges[v] = self._told(v) if x is None else _extent(x)
        return self._ranges[v]

    def _told(self, v: Value) -> Range | None:
        """What an operator says of its result, from what is known of its operands."""
        node, name = v.node, v.op.name
        if node.op.kind == "view" or name == "index":  # elements of the first operand
            return self.range(node.operands[0])
        if name == "full":
            return _number(node.attrs["value"])
        if name == "cast":
            return _cast(self.range(node.operands[0]), v.dtype)
        if name not in _TELL or (name.startswith("bitwise") and v.dtype != torch.bool):
            return None
        given = [self.range(a) if isinstance(a, Value) else _number(a) for a in node.args]
        got = [x for x in given if x is not None]
        return _TELL[name](*got) if len(got) == len(given) else None


def _number(x: Any) -> Range | None:
    return (x, x) if isinstance(x, int | float) and not math.isnan(x) else None


def _extent(x: torch.Tensor) -> Range | None:
    if not x.numel() or x.is_complex():
        return None
    low, high = (float(y) if x.is_floating_point() else int(y) for y in (x.min(), x.max()))
    return None if math.isnan(low) else (low, high)


def _cast(given: Range | None, to: torch.dtype) -> Range | None:
    if given is None:
        return None
    if to == torch.bool:
        return _not(_equal(given, _FALSE))
    return given if to in _EXACT and all(abs(x) < 2**24 and x == int(x) for x in given) else None


def _equal(a: Range, b: Range) -> Range:
    if a[1] < b[0] or b[1] < a[0]:
        return _FALSE
    return _TRUE if a[0] == a[1] == b[0] == b[1] else _EITHER


def _less(a: Range, b: Range) -> Range:
    return _TRUE if a[1] < b[0] else _FALSE if a[0] >= b[1] else _EITHER


def _not(a: Range) -> Range:
    return 1 - a[1], 1 - a[0]


def _where(cond: Range, a: Range, b: Range) -> Range:
    return a if cond == _TRUE else b if cond == _FALSE else (min(a[0], b[0]), max(a[1], b[1]))


def _flags(how: Callable[[Any, Any], Any]) -> Callable[[Range, Range], Range]:
    return lambda a, b: (how(a[0], b[0]), how(a[1], b[1]))


_TELL: Mapping[str, Callable[..., Range]] = {
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
    "lt": _less,
    "gt": lambda a, b: _less(b, a),
    "le": lambda a, b: _not(_less(b, a)),
    "ge": lambda a, b: _not(_less(a, b)),
    "where": _where,
    "bitwise_and": _flags(operator.and_),
    "bitwise_or": _flags(operator.or_),
    "bitwise_not": _not,
    "logical_not": lambda a: _equal(a, _FALSE),
}


def _sources(v: Value, most: int) -> list[Node]:
    """What a value is computed from, in order, its own node last.

    Nothing if it reads an input, or something among it is random, has no fixed numbers or more than ``most`` elements.
    """
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(v.node, False)]
    while stack:
        node, done = stack.pop()
        if done:
            found[node] = None
            continue
        if node in seen:
            continue
        seen.add(node)
        if node.op.kind not in _COMPUTED or node.op.random or node.regions or node.symbols():  # a rank's place, say
            return []
        if not all(isinstance(t, TensorType) and math.prod(t.shape) <= most for t in node.types):
            return []
        stack.append((node, True))
        stack += [(x.node, False) for x in node.operands]
    return list(found)


def _computed(v: Value) -> torch.Tensor | None:
    """A small value that reads no input."""
    known: dict[Value, Any] = {}
    for node in _sources(v, _SMALL):
        attrs = {name: x for name, x in node.attrs.items() if name != "device"}
        got = node.op.ref(*map_values(node.args, known.__getitem__), **attrs)
        known.update(zip(node.outs, (got,) if isinstance(got, torch.Tensor) else got, strict=True))
    found = known.get(v)
    return found if isinstance(found, torch.Tensor) else None
