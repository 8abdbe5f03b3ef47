"""Pipeline schedules: published bubbles, memory by stage, and cuts against every cut there is."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.errors import TesselError
from tessel.solve.pipeline import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    Slot,
    bubble,
    cut,
    cut_two_laps,
    fill,
    held,
    step_seconds,
    timeline,
)

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
    r = np.random.default_rng(1)
    for _ in range(60):
        n, parts = int(r.integers(2, 9)), int(r.integers(1, 5))
        weight = float(r.choice([0.0, 0.1, 0.5, 1.0]))
        cost = r.random((parts, n + 1, n + 1))
        cost[r.random(cost.shape) < 0.1] = np.inf
        cost[:, np.tril_indices(n + 1)[0], np.tril_indices(n + 1)[1]] = np.inf
        found = []
        for inner in combinations(range(1, n), parts - 1):
            own = [cost[i, a, b] for i, (a, b) in enumerate(zip((0, *inner), (*inner, n), strict=True))]
            found.append((1 - weight) * max(own) + weight * sum(own) if max(own) < np.inf else np.inf)
        got = cut(cost, weight)
        assert (got is None) == (min(found, default=np.inf) == np.inf)
        assert got is None or got.value == pytest.approx(min(found))


def slowest_stage(cost: np.ndarray[Any, Any], spare: list[float], starts: tuple[int, ...]) -> float:
    """Of stages that hold a part of either lap; a part that is empty takes nothing."""
    p, ends = len(spare), (*starts[1:], cost.shape[2] - 1)
    own = [0.0 if a == b else float(cost[i, a, b]) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]
    return max(own[s] + own[s + p] - spare[s] for s in range(p))


def test_cuts_of_two_laps_against_exhaustive_search() -> None:
    r = np.random.default_rng(3)
    for _ in range(60):
        p = int(r.integers(1, 4))
        n = int(r.integers(2 * p, 2 * p + 4))
        work, more = r.random((2 * p, n)) + 0.05, r.random(2 * p)
        cost = np.full((2 * p, n + 1, n + 1), np.inf)
        for a, b in combinations(range(n + 1), 2):
            cost[:, a, b] = work[:, a:b].sum(axis=1) + more
        spare = [float(x) for x in 0.2 * r.random(p)]
        best = min(slowest_stage(cost, spare, (0, *inner)) for inner in combinations(range(1, n), 2 * p - 1))
        bound, starts = cut_two_laps(cost, spare)
        assert starts is not None and bound <= best + 1e-12
        assert slowest_stage(cost, spare, starts) <= best * (1 + 1e-3)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zb1p", 1), ("zbv", 2)])
def test_a_step_of_equal_stages_has_the_bubble_of_the_formula(schedule: str, chunks: int) -> None:
    assert step_seconds(schedule, [2.0] * 8, 32, chunks) / 2 - 1 == pytest.approx(bubble(schedule, 8, 32, chunks))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("1f1", 2, 4), "did you mean '1f1b'"),
        (("1f1b", 0, 4), "stages is 0"),
        (("interleaved", 4, 6, 2), "6 microbatches are no multiple of 4 stages"),
        (("interleaved", 4, 8), "1 chunk a stage"),
        (("zbv", 4, 4), "4 microbatches, fewer than 2 × 4"),
        (("zb1p", 4, 9), "9 microbatches on 4 stages do not make 2 equal rounds"),
    ],
)
def test_impossible_schedules(args: tuple[object, ...], words: str) -> None:
    with pytest.raises(TesselError, match=words):
        bubble(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb1p", 1)])
def test_timelines_have_the_bubble_of_the_formula(schedule: str, chunks: int) -> None:
    slots = timeline(schedule, 8, 32, [(1.0, 2.0)] * (8 * chunks), chunks)
    end = max(s.end for s in slots)
    assert end / (3 * 32 * chunks) - 1 == pytest.approx(bubble(schedule, 8, 32, chunks))
    check_order(slots, 8 * chunks)


def test_a_v_is_nearly_full_and_in_order() -> None:
    slots = timeline("zbv", 4, 16, [(1.0, 2.0)] * 8, 2)
    assert max(s.end for s in slots) / (3 * 16 * 2) - 1 < bubble("1f1b", 4, 16) / 2
    check_order(slots, 8)


def check_order(slots: list[Slot], parts: int) -> None:
    """Nobody does two things at once, and nothing begins before what it needs has ended."""
    for stage in {s.stage for s in slots}:
        own = sorted((s.start, s.end) for s in slots if s.stage == stage)
        assert all(a[1] <= b[0] for a, b in pairwise(own))
    at = {(s.kind, s.part, s.microbatch): s for s in slots}
    assert len(at) == len(slots)
    for (kind, part, i), s in at.items():
        before = [(FORWARD, part - 1, i)] if kind == FORWARD else [(FORWARD, part, i), (BACKWARD, part + 1, i)]
        assert all(at[n].end <= s.start for n in before if 0 <= n[1] < parts)


def test_zero_bubble_waits_for_what_is_not_gradients_of_parameters() -> None:
    """F + B − W of arXiv 2401.10241, table 2; and as much is held as by 1f1b's first stage."""
    assert fill("zb1p") == pytest.approx(1 / 3) and fill("zb1p", weights=0.5) == 0
    assert fill("zb1p", weights=0.25) == pytest.approx(0.5) and fill("1f1b") == 1
    assert [held("zb1p", 4, 8, s) for s in range(4)] == [4] * 4
