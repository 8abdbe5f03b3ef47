"""How many bits each layer gets: the least loss for a size, or the least size for a loss.

A layer offers choices, each with a size and a loss; one of each layer is taken. Sizes add up, losses add up. The exact
answer for every budget at once is the Pareto frontier of the sums, built layer by layer (a knapsack by dominance,
Nemhauser and Ullmann 1969):

    >>> ways = {"a": (4.0, 0.3), "b": (1.0, 0.1)}
    >>> layers = [Layer(n, (Choice("w2", 2, two), Choice("w4", 4, four))) for n, (two, four) in ways.items()]
    >>> [c.name for c in assign(layers, size=6)], [c.name for c in assign(layers, loss=2.0)]
    (['w4', 'w2'], ['w4', 'w2'])
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import TesselError, check

__all__ = ["Choice", "Layer", "assign", "frontier", "reverse_water_filling"]

MOST_POINTS = 20_000
"""Points of the frontier that are kept (see ``frontier``)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a layer: its name, its size in bits (or bytes, or seconds: what the budget counts), its loss."""

    name: str
    size: float
    loss: float


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer and its choices, at least one."""

    name: str
    choices: tuple[Choice, ...]


def frontier(layers: Sequence[Layer], most: int = MOST_POINTS) -> list[tuple[float, float, tuple[int, ...]]]:
    """``(size, loss, choices)`` of every assignment that none beats in both, by rising size.

    Exact while no more than ``most`` points are alive; beyond that one point is kept in each of ``most`` steps of size:
    what is given is always a true assignment, and no worse than the best one of a budget smaller by a step a layer.

    Raises:
        TesselError: a layer without a choice, a size or a loss that is no number.
    """
    links: list[tuple[int, int]] = []  # (link before, choice): a point's assignment is one number
    alive: list[tuple[float, float, int]] = [(0.0, 0.0, -1)]
    for layer in layers:
        check(bool(layer.choices), lambda layer=layer: f"{layer.name} has no way to be stored")  # type: ignore[misc]
        for c in layer.choices:
            if not (math.isfinite(c.size) and math.isfinite(c.loss)) or c.size < 0:
                raise TesselError(f"{layer.name} as {c.name}: a size of {c.size} and a loss of {c.loss}")
        grown = [(s + c.size, d + c.loss, at, i) for s, d, at in alive for i, c in enumerate(layer.choices)]
        grown.sort(key=lambda p: (p[0], p[1]))
        kept: list[tuple[float, float, int]] = []
        for s, d, at, i in _thinned(_undominated(grown), most):
            links.append((at, i))
            kept.append((s, d, len(links) - 1))
        alive = kept
    found = []
    for s, d, at in alive:
        chosen: list[int] = []
        while at >= 0:
            at, i = links[at]
            chosen.append(i)
        found.append((s, d, tuple(reversed(chosen))))
    return found


def assign(layers: Sequence[Layer], *, size: float | None = None, loss: float | None = None) -> list[Choice]:
    """One choice a layer: the least loss within ``size``, or the least size within ``loss``.

    Raises:
        TesselError: nothing fits; the message has the least that is needed beside what was asked for.
    """
    check((size is None) != (loss is None), lambda: "assign: a budget of size or one of loss, not both and not neither")
    points = frontier(layers)
    if size is not None:
        at = bisect_right([p[0] for p in points], size)
        check(at > 0, lambda: f"a budget of {size:g}: the least that these layers can take is {points[0][0]:g}")
        chosen = points[at - 1][2]
    else:
        fits = [p for p in points if p[1] <= loss]  # type: ignore[operator]
        check(bool(fits), lambda: f"a loss of {loss:g} at most: the least that can be had is {points[-1][1]:g}")
        chosen = fits[0][2]
    return [layer.choices[i] for layer, i in zip(layers, chosen, strict=True)]


def reverse_water_filling(variances: Sequence[float], bits: float) -> float:
    """The least total squared error of independent normal values with ``bits`` bits a value on average (Shannon).

    Each gets ``max(0, log2(variance / level) / 2)`` bits; the level is found by bisection. No assignment of whole bits
    goes below it.

    >>> round(reverse_water_filling([1.0, 1.0], 1.0), 4)
    0.5
    """
    total = bits * len(variances)
    low, high = 0.0, max(variances)
    for _ in range(200):
        level = (low + high) / 2
        used = sum(max(0.0, 0.5 * math.log2(v / level)) for v in variances if v > 0) if level > 0 else math.inf
        low, high = (level, high) if used > total else (low, level)
    return sum(min(v, high) for v in variances)


def _undominated(
    points: Sequence[tuple[float, float, int, int]],
) -> list[tuple[float, float, int, int]]:
    """Of points by rising size: those with less loss than all before."""
    kept: list[tuple[float, float, int, int]] = []
    for p in points:
        if not kept or p[1] < kept[-1][1]:
            kept.append(p)
    return kept


def _thinned(points: list[tuple[float, float, int, int]], most: int) -> list[tuple[float, float, int, int]]:
    """At most ``most`` points: of those in one step of size the one with the least loss, which is the last."""
    if len(points) <= most:
        return points
    low, high = points[0][0], points[-1][0]
    step = (high - low) / (most - 1)
    last = {int((p[0] - low) / step): p for p in points}
    return [points[0], *(p for _, p in sorted(last.items()) if p is not points[0])]
