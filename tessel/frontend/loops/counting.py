"""What repetitions of a loop take of a tensor: indices whose numbers stay the same, or count up or down evenly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..fx_words import value_of

__all__ = ["Counting", "NoLoop", "Slices", "counts", "slices_of"]


class NoLoop(Exception):
    """A repeated stretch that is no loop."""


@dataclass(frozen=True)
class Counting:
    """The numbers ``first``, ``first + step``, and so on, one a repetition."""

    first: int
    step: int


@dataclass
class Slices:
    """What a node takes of a tensor, repetition by repetition.

    Attributes:
        source: the tensor.
        index: an index of which one part counts: ``Counting``, or a slice of two of these.
        example: the tensor as Dynamo saw it.
    """

    source: fx.Node
    index: tuple[Any, ...]
    example: torch.Tensor

    @property
    def dim(self) -> int:
        """Which dimension counts after the other parts of the index are applied."""
        dim = 0
        for p in self.index:
            if counts(p):
                return dim
            if p is Ellipsis:
                dim += self._left_out
            elif not isinstance(p, int):
                dim += 1
        raise NoLoop

    def own_dim(self, at: int) -> int:
        """Which dimension of the source the ``at``-th part of the index is for."""
        return sum(self._left_out if p is Ellipsis else p is not None for p in self.index[:at])

    @property
    def _left_out(self) -> int:
        """How many dimensions of the source the index has no part for."""
        return self.example.dim() - sum(p is not None and p is not Ellipsis for p in self.index)


def slices_of(sources: Sequence[Any], indices: Sequence[Any]) -> Slices | None:
    """An index whose numbers stay or count evenly, into one tensor."""
    source = sources[0]
    if not isinstance(source, fx.Node) or any(s is not source for s in sources):
        return None
    parts = [i if isinstance(i, tuple) else (i,) for i in indices]
    if len({len(p) for p in parts}) != 1:
        return None
    out: list[Any] = []
    val = value_of(source)
    for versions in zip(*parts, strict=True):
        plain = isinstance(val, torch.Tensor) and all(isinstance(p, int | slice | Counting) for p in out)
        size = val.shape[len(out)] if plain and len(out) < val.dim() else None
        got = _counted(_from_the_front(versions, size))
        if got is None:
            return None
        out.append(got[0])
    if sum(map(counts, out)) > 1:
        return None
    return Slices(source, tuple(out), val)


def _from_the_front(versions: Sequence[Any], n: Any) -> Sequence[Any]:
    """Numbers that count from the end of a dimension of known size, counted from its beginning."""
    if type(n) is not int or not all(type(v) is int and -n <= v < 0 for v in versions):
        return versions
    return [v + n for v in versions]


def counts(p: Any) -> bool:
    return isinstance(p, Counting) or (isinstance(p, slice) and isinstance(p.start, Counting))


def _counted(versions: Sequence[Any]) -> tuple[Any] | None:
    """One part of an index: as it is if all are the same, ``Counting`` where it counts."""
    first = versions[0]
    if all(type(v) is type(first) and v == first for v in versions) and not isinstance(first, fx.Node):
        return (first,)
    if all(type(v) is int for v in versions):
        step = versions[1] - first
        even = step != 0 and all(b - a == step for a, b in itertools.pairwise(versions))
        return (Counting(first, step),) if even and min(versions) >= 0 else None
    if all(isinstance(v, slice) and v.step is None for v in versions):
        starts, stops = [0 if v.start is None else v.start for v in versions], [v.stop for v in versions]
        if not all(type(x) is int for x in (*starts, *stops)) or len({b - a for a, b in zip(starts, stops)}) != 1:
            return None
        a, b = _counted(starts), _counted(stops)
        if a is None or b is None or stops[0] <= starts[0]:
            return None
        return (slice(a[0], b[0]),)
    return None
