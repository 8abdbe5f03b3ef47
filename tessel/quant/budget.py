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

import numpy as np

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
    links: list[tuple[np.ndarray, np.ndarray]] = []  # a layer: of each point alive, the one before it and the choice
    size, loss = np.zeros(1), np.zeros(1)
    for layer in layers:
        check(bool(layer.choices), lambda layer=layer: f"{layer.name} has no way to be stored")  # type: ignore[misc]
        for c in layer.choices:
            if not (math.isfinite(c.size) and math.isfinite(c.loss)) or c.size < 0:
                raise TesselError(f"{layer.name} as {c.name}: a size of {c.size} and a loss of {c.loss}")
        own, lost = (np.array([getattr(c, what) for c in layer.choices], dtype=float) for what in ("size", "loss"))
        ways = _undominated(own, lost)
        sizes = (size[:, None] + own[ways]).ravel()
        losses = (loss[:, None] + lost[ways]).ravel()
        rows = _thinned(_undominated(sizes, losses), sizes, most)
        links.append((rows // len(ways), ways[rows % len(ways)]))
        size, loss = sizes[rows], losses[rows]
    at, chosen = np.arange(len(size)), []
    for before, choice in reversed(links):
        chosen.append(choice[at])
        at = before[at]
    table = np.stack(chosen[::-1], 1).tolist() if chosen else [[]] * len(size)
    return [(s, d, tuple(row)) for s, d, row in zip(size.tolist(), loss.tolist(), table, strict=True)]


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


def _undominated(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The points that lose less than all that are no larger, by rising size."""
    order = np.lexsort((losses, sizes))
    least = np.minimum.accumulate(losses[order])
    return order[np.concatenate(([True], losses[order][1:] < least[:-1]))]


def _thinned(rows: np.ndarray, sizes: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the points ``rows``, by rising size and falling loss: the first, and of those in one step of
    size the last."""
    if len(rows) <= most:
        return rows
    low, high = sizes[rows[0]], sizes[rows[-1]]
    step = ((sizes[rows] - low) / ((high - low) / (most - 1))).astype(np.int64)
    last = np.append(step[1:] != step[:-1], True)
    last[0] = True
    return rows[last]
