"""Stretches of a graph that repeat themselves: where a loop was unrolled.

The graph is read as text: each node's operator, the places of its arguments and its result's type are one letter,
numbers that index a tensor left out.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ..fx_words import value_of

__all__ = ["LEAST", "Stretch", "letters", "repeated"]

LEAST = 4  # repetitions of a loop
_LONGEST = 400  # nodes of a step
_INDEXED = {operator.getitem, operator.setitem, torch.select, torch.narrow, "select", "narrow"}


@dataclass(frozen=True)
class Stretch:
    """``repeats`` times ``period`` nodes, from the ``start``-th on."""

    start: int
    period: int
    repeats: int


def letters(nodes: Sequence[fx.Node]) -> np.ndarray:
    """A number for each node, equal where two could be the same node of two repetitions; unique for inputs."""
    numbers: dict[Any, int] = {}
    out = []
    for i, node in enumerate(nodes):
        if node.op in ("call_function", "call_method"):
            loose = node.target in _INDEXED
            args = (_shape_of(node.args, loose), _shape_of(tuple(sorted(node.kwargs.items())), loose))
            key: Any = (node.op, node.target, args, _type_of(node))
        else:
            key = i
        out.append(numbers.setdefault(key, len(numbers)))
    return np.array(out)


def _shape_of(a: Any, loose: bool) -> Any:
    if isinstance(a, fx.Node):
        return fx.Node
    if isinstance(a, tuple | list):
        return (type(a).__name__, *(_shape_of(x, loose) for x in a))
    if isinstance(a, slice):
        return ("slice", *(_shape_of(x, loose) for x in (a.start, a.stop, a.step)))
    if loose and type(a) is int:
        return int
    return (type(a), repr(a))


def _type_of(node: fx.Node) -> Any:
    val = value_of(node)
    return (tuple(map(str, val.shape)), val.dtype) if isinstance(val, torch.Tensor) else type(val)


def repeated(text: np.ndarray, start: int) -> Iterator[Stretch]:
    """Stretches from ``start`` on that repeat themselves often enough, by where they begin and then by period."""
    places: dict[int, list[int]] = {}
    for i, x in enumerate(text.tolist()):
        places.setdefault(x, []).append(i)
    for i in range(start, len(text)):
        where = places[int(text[i])]
        if len(where) < LEAST:
            continue
        k = bisect.bisect_right(where, i)
        for later in where[k : k + 8]:
            period = later - i
            end = i + LEAST * period
            if period > _LONGEST or end > len(text):
                break
            if (text[i : end - period] == text[later:end]).all():
                differ = np.flatnonzero(text[i:-period] != text[later:])
                same = int(differ[0]) if len(differ) else len(text) - later
                yield Stretch(i, period, same // period + 1)
