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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from ..errors import TesselError, check, did_you_mean

__all__ = ["SCHEDULES", "Cut", "bubble", "cut", "held"]

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
    if schedule == "zbv":  # the two chunks of a V even out: every stage as many as the first of 1f1b
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


@dataclass(frozen=True)
class Cut:
    """Where stages begin, the slowest stage's seconds and every stage's bytes."""

    starts: tuple[int, ...]
    seconds: float
    nbytes: tuple[float, ...]


def cut(
    seconds: Sequence[float], state: Sequence[float], activations: Sequence[float], stages: int,
    in_flight: Callable[[int], float], limit: float = inf, places: Sequence[int] | None = None,
) -> Cut | None:  # fmt: skip
    """The cut of a chain into ``stages`` whose slowest stage is fastest, exactly, by dynamic programming.

    Args:
        seconds: of one microbatch on each element of the chain.
        state: bytes that each holds whatever the schedule: parameters, gradients, optimizer.
        activations: bytes that one microbatch leaves in each until its backward.
        in_flight: how many microbatches a stage holds, by its number.
        limit: bytes of a device.
        places: where a stage may begin; anywhere by default.

    Returns:
        None where no cut fits.

    Raises:
        TesselError: fewer elements than stages.
    """
    n = len(seconds)
    check(n >= stages >= 1, lambda: f"pipeline: {n} places cannot be cut into {stages} stages")
    allowed = sorted({0, n, *(range(n) if places is None else places)})
    sums = [[0.0] for _ in range(3)]
    for total, own in zip(sums, (seconds, state, activations)):
        for x in own:
            total.append(total[-1] + x)

    def nbytes(a: int, b: int, stage: int) -> float:
        return sums[1][b] - sums[1][a] + in_flight(stage) * (sums[2][b] - sums[2][a])

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for a, (slowest, starts) in best.items():
            for b in allowed:
                if b <= a or (stage == stages - 1) != (b == n) or nbytes(a, b, stage) > limit:
                    continue
                value = max(slowest, sums[0][b] - sums[0][a])
                if b not in after or value < after[b][0]:
                    after[b] = value, (*starts, a)
        best = after
    if n not in best:
        return None
    slowest, starts = best[n]
    ends = (*starts[1:], n)
    return Cut(starts, slowest, tuple(nbytes(a, b, i) for i, (a, b) in enumerate(zip(starts, ends))))
