"""Pipeline schedules: how long devices wait, what each stage holds, and where to cut.

With p stages, m microbatches, and v chunks of the model on each stage (in units of one microbatch's forward and
backward on one stage), the bubble is the part of a step in which a device waits, over the part in which it works:

    gpipe, 1f1b   (p − 1) / m             GPipe (arXiv 1811.06965), PipeDream-flush
    interleaved   (p − 1) / (v m)         Megatron-LM (arXiv 2104.04473)
    zb1p          (p − 1) / (3 m)         zero bubble (arXiv 2401.10241): weights' gradients fill two thirds
    zbv           0                       the same, two chunks in a V; needs as much memory as 1f1b

with forward, backward of activations and of weights taking equally long, as these papers assume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeAlias

import numpy as np

from ..errors import TesselError, check, did_you_mean

__all__ = [
    "APART",
    "SCHEDULES",
    "Cut",
    "Slot",
    "bubble",
    "cut",
    "cut_two_laps",
    "fill",
    "held",
    "stage_of",
    "step_seconds",
    "timeline",
]

Array: TypeAlias = "np.ndarray[Any, Any]"

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv")


def bubble(schedule: str, stages: int, microbatches: int, chunks: int = 1) -> float:
    """Time that a device waits over time that it works.

    >>> bubble("1f1b", 8, 32), bubble("interleaved", 8, 32, 2), round(bubble("zb1p", 8, 32), 4), bubble("zbv", 8, 32)
    (0.21875, 0.109375, 0.0729, 0.0)

    Raises:
        TesselError: an unknown schedule; too few microbatches or chunks; interleaved with microbatches that stages
            do not divide.
    """
    _check(schedule, stages, microbatches, chunks)
    wait = {"interleaved": (stages - 1) / chunks, "zb1p": (stages - 1) / 3, "zbv": 0.0}.get(schedule, stages - 1.0)
    return wait / microbatches


def held(schedule: str, stages: int, microbatches: int, stage: int, chunks: int = 1) -> float:
    """How many microbatches' activations of a whole stage are alive at once on stage ``stage`` (from 0).

    >>> [held("1f1b", 4, 16, s) for s in range(4)], held("gpipe", 4, 16, 0)
    ([4, 3, 2, 1], 16)

    Raises:
        TesselError: as ``bubble``; no such stage.
    """
    _check(schedule, stages, microbatches, chunks)
    check(0 <= stage < stages, lambda: f"pipeline: no stage {stage} of {stages}")
    if schedule == "gpipe":
        return microbatches
    if schedule == "interleaved":  # Megatron-LM: p v + p − 1 − 2 stage chunks of 1/v in flight at the most
        warm = (chunks - 1) * stages + 2 * (stages - stage - 1) + 1
        return min(microbatches * chunks, warm) / chunks
    if schedule in APART:  # a V evens out; or gradients of parameters wait where fewer microbatches are begun
        return min(stages, microbatches)
    return min(stages - stage, microbatches)


def _check(schedule: str, stages: int, microbatches: int, chunks: int) -> None:
    if schedule not in SCHEDULES:
        raise TesselError(f"unknown schedule {schedule!r}; {did_you_mean(schedule, SCHEDULES)}")
    for what, n in (("stages", stages), ("microbatches", microbatches), ("chunks", chunks)):
        check(n >= 1, lambda what=what, n=n: f"pipeline: {what} is {n}, must be at least 1")  # type: ignore[misc]
    if schedule == "interleaved":
        check(chunks >= 2, lambda: f"interleaved: {chunks} chunk a stage; it takes at least 2")
        check(
            microbatches % stages == 0,
            lambda: f"interleaved: {microbatches} microbatches are no multiple of {stages} stages",
        )
    elif schedule == "zbv":
        check(microbatches >= 2 * stages, lambda: f"zbv: {microbatches} microbatches, fewer than 2 × {stages} stages")
    elif schedule == "zb1p":  # torch's ScheduleInterleavedZeroBubble goes in rounds
        rounds = max(1, microbatches // stages)
        check(
            microbatches % rounds == 0,
            lambda: f"zb1p: {microbatches} microbatches on {stages} stages do not make {rounds} equal rounds",
        )


APART = ("zb1p", "zbv")  # gradients of parameters are a piece of work of their own


def fill(schedule: str, chunks: int = 1, weights: float = 1 / 3) -> float:
    """The part of a stage's work on one microbatch for which the other stages wait.

    Args:
        weights: the part of the work that gives gradients of parameters. In zb1p nobody waits for it, and a stage
            that waits does that of others: F + B − W of F + B + W are waited for (arXiv 2401.10241, table 2).
    """
    if schedule == "zb1p":
        return max(0.0, 1 - 2 * weights)
    return {"interleaved": 1 / chunks, "zbv": 0.0}.get(schedule, 1.0)


def step_seconds(
    schedule: str, seconds: Sequence[float], microbatches: int, chunks: int = 1, weights: float = 1 / 3
) -> float:
    """How long a step takes whose stages work ``seconds`` each, not all equally long.

    The slowest stage never waits once it has begun; the others' work on one microbatch goes before it and after it.

    >>> step_seconds("1f1b", [8.0] * 4, 8) / 8 - 1 == bubble("1f1b", 4, 8), step_seconds("1f1b", [8.0, 4.0], 4)
    (True, 9.0)
    """
    _check(schedule, len(seconds), microbatches, chunks)
    return max(seconds) + fill(schedule, chunks, weights) * (sum(seconds) - max(seconds)) / microbatches


def stage_of(schedule: str, part: int, stages: int) -> int:
    """The stage that holds a part of the model: parts go round the stages, in zbv there and back.

    >>> [stage_of("interleaved", i, 2) for i in range(4)], [stage_of("zbv", i, 2) for i in range(4)]
    ([0, 1, 0, 1], [0, 1, 1, 0])
    """
    lap, at = divmod(part, stages)
    return stages - 1 - at if schedule == "zbv" and lap else at


@dataclass(frozen=True)
class Cut:
    """Where parts begin, the seconds of each, and what was made least: see ``cut``."""

    starts: tuple[int, ...]
    seconds: tuple[float, ...]
    value: float


def cut(cost: Array, weight: float = 0.0) -> Cut | None:
    """The cut of a chain into parts that makes ``(1 - weight) · slowest + weight · sum`` least, exactly.

    Dynamic programming over the places of the chain, once for every limit on the slowest part that can pay.

    Args:
        cost: ``cost[i, a, b]`` seconds of part ``i`` if it holds the elements from ``a`` to before ``b``; inf where it
            must not, or does not fit.
        weight: from 0 to 1; with that of ``fill / microbatches`` the value is the step of ``step_seconds``.

    Returns:
        None where no cut fits.
    """
    slowest = cost[0, 0]
    for own in cost[1:]:
        slowest = np.maximum(slowest[:, None], own).min(axis=0)
    if not np.isfinite(slowest[-1]):
        return None
    low, best = float(slowest[-1]), _least(cost, float(slowest[-1]))
    free = _least(cost, inf)
    assert best is not None and free is not None
    found = [_cut(cost, starts, weight) for starts in (best, free)]
    # a slower part has to pay for itself by a smaller sum
    most = inf if weight == 1 else low + weight * (sum(found[0].seconds) - sum(found[1].seconds)) / (1 - weight)
    limits = np.unique(cost[(cost > low) & (cost <= min(most, max(found[1].seconds)))])
    found += [_cut(cost, s, weight) for x in limits if (s := _least(cost, float(x))) is not None]
    return min(found, key=lambda c: c.value)


def cut_two_laps(cost: Array, spare: Sequence[float], tolerance: float = 3e-4) -> tuple[float, tuple[int, ...] | None]:
    """A cut whose slowest stage is fastest, where each of ``len(spare)`` stages holds a part of either of two laps.

    For a limit on the stages and a place where the second lap begins, the longest second parts that first parts leave
    room for are found stage by stage.

    Args:
        cost: as in ``cut``, of the parts of the first lap, then of the second; a stretch within another one costs no
            more than it.
        spare: what is taken off the two parts of each stage.
        tolerance: by how much of it the slowest stage of the answer may be above the least.

    Returns:
        What no cut beats for its slowest stage, and where the parts of one begin that is within the tolerance of it; a
        part of it may be empty.
    """
    n, stages = cost.shape[2] - 1, len(spare)
    whole = cut(cost, 1.0)
    if whole is None:
        return inf, None
    low, best, starts = max(0.0, (whole.value - sum(spare)) / stages), whole.value, None
    for turn in range(1, n):
        found = _two_laps(cost, spare, turn, best * (1 - tolerance))
        if found is None:
            continue
        a, b = low, best * (1 - tolerance)
        while b - a > tolerance * b / 2:
            half = (a + b) / 2
            fits = _two_laps(cost, spare, turn, half)
            a, b, found = (half, b, found) if fits is None else (a, half, fits)
        best, starts = b, found
    return max(low, best * (1 - tolerance)), starts


def _two_laps(cost: Array, spare: Sequence[float], turn: int, limit: float) -> tuple[int, ...] | None:
    """Where parts begin, if no stage takes more than ``limit`` and the second lap begins at ``turn``."""
    n, stages = cost.shape[2] - 1, len(spare)
    reach = np.full(turn + 1, -1)  # where first parts end -> the furthest that second parts come
    reach[0] = turn
    steps = []
    for s, own in enumerate(spare):
        made, come = np.full(turn + 1, -1), np.full(turn + 1, -1)
        for a in np.flatnonzero(reach >= 0):
            left = limit + own - cost[s, a, a : turn + 1]
            left[0] = limit + own  # an empty part
            ends = np.concatenate(([0.0], cost[s + stages, reach[a], reach[a] + 1 :]))
            far = np.where(left >= 0, reach[a] + np.searchsorted(ends, left, side="right") - 1, -1)
            further = far > made[a:]
            made[a:][further], come[a:][further] = far[further], a
        steps.append((reach, come))
        reach = made
    if reach[turn] < n:
        return None
    first, second, at = [], [], turn
    for before, come in reversed(steps):
        at = int(come[at])
        first.append(at)
        second.append(int(before[at]))
    return (*reversed(first), *reversed(second))


def _cut(cost: Array, starts: tuple[int, ...], weight: float) -> Cut:
    ends = (*starts[1:], cost.shape[2] - 1)
    seconds = tuple(float(cost[i, a, b]) for i, (a, b) in enumerate(zip(starts, ends)))
    return Cut(starts, seconds, (1 - weight) * max(seconds) + weight * sum(seconds))


def _least(cost: Array, limit: float) -> tuple[int, ...] | None:
    """Where the parts of the least sum begin, none slower than ``limit``."""
    allowed = np.where(cost <= limit, cost, inf)
    total, come = allowed[0, 0], []
    for own in allowed[1:]:
        through = total[:, None] + own
        come.append(np.argmin(through, axis=0))
        total = np.min(through, axis=0)
    at = cost.shape[2] - 1
    if not np.isfinite(total[at]):
        return None
    starts = []
    for back in reversed(come):
        at = int(back[at])
        starts.append(at)
    return (0, *reversed(starts))


# ---------------------------------------------------------------- who works when

FORWARD, BACKWARD, WEIGHTS = range(3)
_WORDS = ("forward", "backward", "gradients of parameters")


@dataclass(frozen=True)
class Slot:
    """A stage's work on one microbatch of one part: from ``start`` to ``end`` seconds."""

    start: float
    end: float
    stage: int
    part: int
    microbatch: int
    kind: int

    @property
    def words(self) -> str:
        return _WORDS[self.kind]


def timeline(
    schedule: str, stages: int, microbatches: int, seconds: Sequence[tuple[float, float]], chunks: int = 1
) -> list[Slot]:
    """Who works when, if every stage does what is ready as the schedule prefers: a picture, in order of the starts.

    All forwards come first in gpipe, interleaved has an order of its own; else a backward goes before a forward, and no
    more microbatches are begun than a stage holds. The zero-bubble schedules do the gradients of parameters, half of a
    backward, where nothing else is ready.

    Args:
        seconds: forward and backward of one microbatch, of each part; a backward of 0 everywhere: forward only.

    >>> slots = timeline("1f1b", 4, 8, [(1.0, 2.0)] * 4)
    >>> max(s.end for s in slots) == 3 * 8 * (1 + bubble("1f1b", 4, 8))
    True
    """
    _check(schedule, stages, microbatches, chunks)
    count = stages * chunks
    trains = any(b > 0 for _, b in seconds)
    apart = schedule in APART
    # of zb1p what waits for a backward is as in 1f1b; what waits for gradients of parameters waits for nobody
    begun = "1f1b" if schedule == "zb1p" else schedule
    most = [held(begun, stages, microbatches, s, chunks) * chunks for s in range(stages)]
    if schedule in ("gpipe", "interleaved"):  # their orders say it already
        most = [inf] * stages
    home = [stage_of(schedule, i, stages) for i in range(count)]
    todo: list[list[tuple[int, int, int]]] = [
        [] for _ in range(stages)
    ]  # (kind, part, microbatch), the preferred first
    for part in range(count):
        for i in range(microbatches):
            todo[home[part]] += [(FORWARD, part, i)]
            todo[home[part]] += [(BACKWARD, part, i)] * trains + [(WEIGHTS, part, i)] * (trains and apart)
    for s, own in enumerate(todo):
        own.sort(key=lambda x: _wish(schedule, x))
        if schedule == "interleaved":
            todo[s] = _interleaved(own, stages, (chunks - 1) * stages + 2 * (stages - s - 1))
    done: dict[tuple[int, int, int], float] = {}
    free, alive, out = [0.0] * stages, [0] * stages, []
    now = 0.0
    while any(todo):
        began = False
        for s in range(stages):
            if free[s] > now:
                continue
            for work in todo[s][:1] if schedule == "interleaved" else todo[s]:
                kind, part, i = work
                first = kind == FORWARD and part < stages
                if _ready(work, done, count, now) and not (first and alive[s] >= most[s]):
                    break
            else:
                continue
            todo[s].remove(work)
            took = seconds[part][0] if kind == FORWARD else seconds[part][1] / (2 if apart else 1)
            alive[s] += {FORWARD: 1, BACKWARD: -1, WEIGHTS: 0}[kind]
            free[s] = done[work] = now + took
            out.append(Slot(now, free[s], s, part, i, kind))
            began = True
        if not began:
            later = [t for t in (*free, *done.values()) if t > now]
            if later:
                now = min(later)
            else:  # what is held at once keeps everyone waiting: a real schedule would begin one more
                most = [x + 1 for x in most]
    return out


def _interleaved(work: list[tuple[int, int, int]], stages: int, warm: int) -> list[tuple[int, int, int]]:
    """The order of Megatron-LM: ``warm`` forwards, then one forward and one backward in turn, then the backwards left.

    As many microbatches as there are stages go through one part before the next part takes them.
    """
    forward = sorted((w for w in work if w[0] == FORWARD), key=lambda w: (w[2] // stages, w[1], w[2]))
    backward = sorted((w for w in work if w[0] == BACKWARD), key=lambda w: (w[2] // stages, -w[1], w[2]))
    warm = min(warm, len(forward)) if backward else len(forward)
    turns = [w for pair in zip(forward[warm:], backward) for w in pair]
    return [*forward[:warm], *turns, *backward[len(forward) - warm :]]


def _wish(schedule: str, work: tuple[int, int, int]) -> tuple[int, ...]:
    kind, part, i = work
    if kind == FORWARD:
        return (0 if schedule == "gpipe" else 1, -part, i)
    return (2 if schedule == "gpipe" or kind == WEIGHTS else 0, i, -part)


def _ready(work: tuple[int, int, int], done: dict[tuple[int, int, int], float], count: int, now: float) -> bool:
    """Whether what a piece of work needs is done."""
    kind, part, i = work
    if kind == FORWARD:
        needs = [(FORWARD, part - 1, i)] if part else []
    elif kind == BACKWARD:
        needs = [(FORWARD, part, i), *([(BACKWARD, part + 1, i)] if part < count - 1 else [])]
    else:
        needs = [(BACKWARD, part, i)]
    return all(done.get(n, inf) <= now for n in needs)
