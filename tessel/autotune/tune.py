"""Fill the cache with the tiles of a model's kernels: predicted for a device that need not be here, or measured on it.

    for step in tune(kernels_of(model, args), get_target("h100")):
        print(step)

Every kernel is kept as soon as it is done: whoever stops half-way loses one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from ..errors import TesselError
from ..solve import Choice, Time, tile
from ..targets import Target
from .cache import Cache, default_cache
from .entry import Fact, Knob, Times
from .kernels import Found
from .key import key_of
from .known import Hit, legal_tile, lookup, remember

__all__ = ["DeviceLost", "Measured", "Measurer", "Step", "seconds_by_term", "tune"]

MOST = 6  # candidates measured of one kernel
_COUNTS = frozenset({"programs", "resident", "waves", "steps", "ahead"})  # fields of Time that are no seconds


@dataclass(frozen=True)
class Measured:
    """One tile on the device: its times by mode (``warm``, ``cold``), or why it may not win (``refused``).

    ``error`` and ``bound`` are relative L2 errors against a run in float64: what the tile gave, what it may.
    """

    knobs: Mapping[str, int]
    times: Mapping[str, Times]
    error: float = 0.0
    bound: float = 0.0
    refused: str = ""


class DeviceLost(TesselError):
    """The device takes no more work: what is left cannot be measured in this process."""


class Measurer(Protocol):
    """Runs tiles of a kernel on a device, in turns (see ``measure.py``)."""

    def measure(self, found: Found, tiles: Sequence[Mapping[str, int]]) -> list[Measured]:
        """One result a tile, in order."""

    def facts(self) -> Mapping[str, Fact]:
        """What of the device goes into an entry's provenance."""


@dataclass(frozen=True)
class Step:
    """What became of one kernel.

    Attributes:
        found: the kernel.
        how: ``kept`` (it was there), ``predicted``, ``measured``, or ``failed``.
        knobs: its tile; none if it failed.
        seconds: measured, else predicted.
        why: what else there is to say: why it failed, that it is kept in memory only, tiles that were refused.
    """

    found: Found
    how: str
    knobs: Mapping[str, Knob]
    seconds: float | None = None
    why: str = ""

    def __str__(self) -> str:
        took = "" if self.seconds is None else f", {self.seconds * 1e6:,.1f} µs"
        shown = " ".join(f"{n}={v}" for n, v in self.knobs.items())
        return f"{self.found.kernel.name}: {self.how}{took}" + "".join(f"; {t}" for t in (shown, self.why) if t)


def tune(
    kernels: Sequence[Found],
    target: Target,
    *,
    measurer: Measurer | None = None,
    again: bool = False,
    top: int = MOST,
    cache: Cache | None = None,
) -> Iterator[Step]:
    """Tune kernels one by one; each is in the cache when its step is yielded.

    What is kept already stays: a measurement, unless other software took it, and without ``measurer`` a prediction
    of the same solver.

    Args:
        kernels: see ``kernels_of``; sizes known at run time only are predicted at 2048.
        target: a GPU.
        measurer: measures the best ``top`` tiles; without it nothing is run.
        again: do not look at what is kept. A prediction still never replaces a measurement.
        top: tiles measured of one kernel. One of them is the tile of the nearest shape that was measured, if there is.
        cache: the user's own if not given.

    Raises:
        DeviceLost: a tile broke the device; the steps before are kept.
    """
    cache = default_cache() if cache is None else cache
    for found in kernels:
        hit = None if again else lookup(found.kernel, target, cache=cache)
        if hit is not None and _stays(hit, measurer):
            yield Step(found, "kept", hit.knobs, hit.entry.seconds, f"{hit.entry.kind} before")
            continue
        try:
            choice = tile(found.kernel, target)
            yield (
                _predicted(found, target, choice, cache)
                if measurer is None
                else _measured(found, target, choice, measurer, top, cache)
            )
        except DeviceLost:
            raise
        except TesselError as e:
            yield Step(found, "failed", {}, why=str(e))


def _stays(hit: Hit, measurer: Measurer | None) -> bool:
    if measurer is None:
        return bool(hit.entry.measured) or not hit.recheck
    return bool(hit.entry.measured) and not hit.recheck


def _predicted(found: Found, target: Target, choice: Choice, cache: Cache) -> Step:
    times = seconds_by_term(choice.predicted)
    written = remember(found.kernel, target, choice.knobs, predicted=times, cache=cache)
    return Step(found, "predicted", choice.knobs, times["total"], "" if written else _IN_MEMORY)


_IN_MEMORY = "not written, see `tessel cache verify`"


def _measured(found: Found, target: Target, choice: Choice, measurer: Measurer, top: int, cache: Cache) -> Step:
    """Measure the tiles that are predicted to be the fastest, and keep the fastest that is right."""
    predicted = {tuple(c.knobs.items()): c.time for c in choice.shortlist(top)}
    near = next((k for k in _near(found, target, cache) if tuple(k.items()) not in predicted), None)
    tiles = [dict(k) for k in predicted]
    if near is not None:
        tiles[max(1, top - 1) :] = [near]
    results = measurer.measure(found, tiles)
    refused = [f"{_short(m.knobs)}: {m.refused}" for m in results if m.refused]
    right = [m for m in results if not m.refused and m.times]
    if not right:
        why = f"not one of {len(results)} tiles is right: {refused[0] if refused else 'nothing was measured'}"
        return Step(found, "failed", {}, why=why)
    best = min(right, key=_median)
    time = predicted.get(tuple(best.knobs.items())) or tile(found.kernel, target, given=best.knobs).predicted
    written = remember(
        found.kernel,
        target,
        best.knobs,
        predicted=seconds_by_term(time),
        measured=best.times,
        here={**measurer.facts(), "tolerance": best.bound},
        cache=cache,
    )
    words = [f"the fastest of {len(results)}"]
    words += [f"{len(refused)} refused ({refused[0]})"] if refused else []
    words += [] if written else [_IN_MEMORY]
    return Step(found, "measured", best.knobs, _median(best), "; ".join(words))


def _median(m: Measured) -> float:
    times = m.times.get("warm") or next(iter(m.times.values()))
    return times.median


def _near(found: Found, target: Target, cache: Cache) -> Iterator[dict[str, int]]:
    """Tiles that won for other shapes of the same computation, nearest first, and are legal here."""
    for entry in cache.nearest(key_of(found.kernel, target)):
        if entry.measured and legal_tile(found.kernel, target, entry.knobs) is None:
            yield {n: v for n, v in entry.knobs.items() if isinstance(v, int)}


def _short(knobs: Mapping[str, Knob]) -> str:
    return " ".join(f"{n}={v}" for n, v in knobs.items())


def seconds_by_term(time: Time) -> dict[str, float]:
    """The terms of a prediction that are seconds, the whole under ``"total"``."""
    return {f.name: float(getattr(time, f.name)) for f in fields(time) if f.name not in _COUNTS}
