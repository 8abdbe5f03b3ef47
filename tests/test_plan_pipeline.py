"""Pipeline schedules: published bubbles, memory by stage, and cuts against every cut there is."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import pytest

from tessel.errors import TesselError
from tessel.solve.pipeline import SCHEDULES, bubble, cut, held

ORACLES = json.loads((Path(__file__).parent / "data/sharding_oracles.json").read_text())["bubble_p8_m32_v2"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bubbles(schedule: str) -> None:
    chunks = 2 if schedule == "interleaved" else 1
    assert bubble(schedule, 8, 32, chunks) == pytest.approx(ORACLES[schedule], abs=1e-12)
    assert bubble(schedule, 1, 32, chunks) == 0
    assert bubble(schedule, 8, 64, chunks) <= bubble(schedule, 8, 32, chunks)


def simulate_1f1b(stages: int, microbatches: int) -> tuple[float, list[int]]:
    """A step of 1F1B, event by event, with a backward twice as long as a forward: (waiting ÷ work, held by stage)."""
    done: dict[tuple[str, int, int], float] = {}
    most = []
    clock = [0.0] * stages
    plans = []
    for s in range(stages):
        warm = min(stages - s - 1, microbatches)
        order = [("f", i) for i in range(warm)]
        for i in range(microbatches - warm):
            order += [("f", warm + i), ("b", i)]
        order += [("b", i) for i in range(microbatches - warm, microbatches)]
        plans.append(order)
        alive = peak = 0
        for kind, _ in order:
            alive += 1 if kind == "f" else -1
            peak = max(peak, alive)
        most.append(peak)
    at = [0] * stages
    while any(i < len(plans[s]) for s, i in enumerate(at)):
        for s in range(stages):
            while at[s] < len(plans[s]):
                kind, i = plans[s][at[s]]
                if kind == "f":
                    ready = 0.0 if s == 0 else done.get(("f", s - 1, i))
                else:
                    ready = done.get(("f", s, i)) if s == stages - 1 else done.get(("b", s + 1, i))
                if ready is None:
                    break
                clock[s] = max(clock[s], ready) + (1 if kind == "f" else 2)
                done[kind, s, i] = clock[s]
                at[s] += 1
    work = 3 * microbatches
    return (max(clock) - work) / work, most


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8), (8, 32), (3, 5)])
def test_1f1b_against_a_simulation(p: int, m: int) -> None:
    waits, most = simulate_1f1b(p, m)
    assert waits == pytest.approx(bubble("1f1b", p, m))
    assert most == [held("1f1b", p, m, s) for s in range(p)]


def test_cuts_equal_exhaustive_search() -> None:
    r = random.Random(1)
    for _ in range(60):
        n, stages = r.randint(2, 9), r.randint(1, 4)
        if n < stages:
            continue
        seconds, state, kept = ([r.random() for _ in range(n)] for _ in range(3))
        limit = r.choice([1e9, 3.0, 1.5])

        def flight(s: int, stages: int = stages) -> float:
            return held("1f1b", stages, 8, s)

        found = []
        for inner in combinations(range(1, n), stages - 1):
            ends = [0, *inner, n]
            spans = [slice(a, b) for a, b in zip(ends, ends[1:])]  # noqa: RUF007
            if all(sum(state[x]) + flight(i) * sum(kept[x]) <= limit for i, x in enumerate(spans)):
                found.append(max(sum(seconds[x]) for x in spans))
        got = cut(seconds, state, kept, stages, flight, limit)
        assert (got is None) == (not found)
        assert got is None or got.seconds == pytest.approx(min(found))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("1f1", 2, 4), "did you mean '1f1b'"),
        (("1f1b", 0, 4), "stages is 0"),
        (("interleaved", 4, 6, 2), "6 microbatches are no multiple of 4 stages"),
        (("interleaved", 4, 8), "1 chunk a stage"),
        (("zbv", 4, 4), "4 microbatches, fewer than 2 × 4"),
    ],
)
def test_impossible_schedules(args: tuple[object, ...], words: str) -> None:
    with pytest.raises(TesselError, match=words):
        bubble(*args)  # type: ignore[arg-type]
