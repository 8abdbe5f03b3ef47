"""What every stretch of a chain of segments costs as a stage of a pipeline, with the memory of one device.

For a price of a byte the best way through every stretch is one sweep of matrix products over (min, +). At several
prices the sweeps give, for a stretch and a cap, a way that fits (the fastest of those seen) and a bound that no way
beats (Lagrange, as in ``shard_search.py``). The layouts at the ends of a stretch are free: a bound stays a bound, and
the search of the stages that were cut then settles them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

from .pipeline import Array
from .shard_search import Search
from .shard_tables import Tables

__all__ = ["Spans", "spans_of"]

_RATIO, _PRICES = 8.0, 3  # prices to each side of the one between the fastest and the leanest plan, this ratio apart
_ROUNDS = 5  # times that prices are put where the lines of plans on both sides of a cap cross


@dataclass
class Spans:
    """Seconds and bytes of every stretch ``[price, a, b]``, the segments from ``a`` to before ``b``; inf where none."""

    prices: tuple[float, ...]
    seconds: Array
    nbytes: Array
    usual: float  # the price that bounds most stretches of the usual length best

    def fastest(self, cap: Array | float) -> Array:
        """The seconds of the fastest way that was seen to fit, for every stretch."""
        return np.where(self.nbytes <= cap, self.seconds, inf).min(axis=0)

    def bound(self, cap: Array | float) -> Array:
        """Seconds that no way within the cap beats, for every stretch; inf where none fits."""
        prices = np.array(self.prices)[:, None, None]
        room = np.where(np.isfinite(self.seconds), self.nbytes - cap, 0.0)
        found = (self.seconds + prices * room).max(axis=0)
        return np.where(self.nbytes[-1] <= cap, found, inf)  # the last price asks for memory alone

    @property
    def priced(self) -> Array:
        """Seconds and bytes at the usual price, together, that no way through a stretch beats."""
        i = self.prices.index(self.usual)
        return self.seconds[i] + (self.usual * self.nbytes[i] if self.usual else 0.0)  # 0 · inf is no number

    @property
    def least(self) -> Array:
        """The least bytes of every stretch."""
        return self.nbytes[-1]


def spans_of(search: Search, cap: float, length: int) -> list[Spans]:
    """The costs of all stretches, once for every way to keep parameters that several segments share.

    Args:
        cap: bytes of a stretch of ``length`` segments, for which prices are made fine.
    """
    found = []
    for chain in search.chains:
        swept = {price: _sweep(chain.tables, chain.order, price) for price in (0.0, _MEMORY)}
        (fast, most), (slow, least) = ((t[0, -1], m[0, -1]) for t, m in swept.values())
        middle = (slow - fast) / (most - least) if most > least and slow > fast else 0.0
        prices = [middle * _RATIO**i for i in range(-_PRICES, _PRICES + 1)] if middle else []
        for _ in range(_ROUNDS + 1):
            swept |= {p: _sweep(chain.tables, chain.order, p) for p in prices}
            usual, prices = _between(swept, cap, length)
        order = sorted(swept)
        seconds, nbytes = (np.stack([swept[p][i] for p in order]) for i in (0, 1))
        found.append(Spans(tuple(order), seconds, nbytes, usual))
    return found


def _between(swept: Mapping[float, tuple[Array, Array]], cap: float, length: int) -> tuple[float, list[float]]:
    """The price that bounds the stretch in the middle best; those where the best plans above and below a cap cross.

    The highest point of the bound over prices lies between such two, and after a few rounds on one of them (Kelley's
    cutting planes); stretches of equal layers share it.
    """
    order = sorted(swept)
    seconds, nbytes = (np.stack([np.diagonal(swept[p][i], length) for p in order]) for i in (0, 1))
    usual, prices = 0.0, list[float]()
    for x in {len(seconds[0]) * k // 4 for k in (1, 2, 3)}:
        own = [t + p * (m - cap) for p, t, m in zip(order, seconds[:, x], nbytes[:, x], strict=True)]
        at = int(np.argmax(own))
        usual = order[at] if x == len(seconds[0]) // 2 else usual
        over = [i for i in range(len(order)) if nbytes[i, x] > cap]
        under = [i for i in range(len(order)) if nbytes[i, x] <= cap]
        if over and under:
            a, b = over[-1], under[0]
            price = (seconds[b, x] - seconds[a, x]) / (nbytes[a, x] - nbytes[b, x])
            if not any(np.isclose(price, p, rtol=1e-6, atol=0.0) for p in [*order, *prices]):
                prices.append(float(price))
    return usual, prices


_MEMORY = 1e9  # seconds a byte: more than any plan takes


def _sweep(tables: list[list[Tables]], order: list[int], price: float) -> tuple[Array, Array]:
    """Seconds and bytes of the best way through every stretch at one price."""
    steps = []
    for modes in tables:
        solved = [t.solve(price) for t in modes]
        seconds, nbytes = (np.stack([getattr(s, n) for s in solved]) for n in ("seconds", "nbytes"))
        mode = np.argmin(seconds + price * nbytes, axis=0)[None]
        steps.append(tuple(np.take_along_axis(x, mode, axis=0)[0] for x in (seconds, nbytes)))
    n = len(order)
    out_seconds, out_nbytes = np.full((n + 1, n + 1), inf), np.full((n + 1, n + 1), inf)
    held = tuple(np.zeros((0, steps[order[0]][0].shape[0])) for _ in range(2))
    for i, kind in enumerate(order):
        own = steps[kind]
        before = [np.vstack([x, np.zeros((1, own[0].shape[0]))]) for x in held]  # a stretch may begin here
        through = [x[:, :, None] + y[None] for x, y in zip(before, own, strict=True)]
        best = np.argmin(through[0] + price * through[1], axis=1)[:, None]
        held = tuple(np.take_along_axis(x, best, axis=1)[:, 0] for x in through)
        end = np.argmin(held[0] + price * held[1], axis=1)[:, None]
        out_seconds[: i + 1, i + 1], out_nbytes[: i + 1, i + 1] = (
            np.take_along_axis(x, end, axis=1)[:, 0] for x in held
        )
    return out_seconds, out_nbytes
