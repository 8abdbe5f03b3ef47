"""The sweep of tiles on a GPU, with a stand-in for the device: what is compared with what."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_tiles  # noqa: E402

from tessel.autotune.entry import Times  # noqa: E402
from tessel.autotune.kernels import kernels_of  # noqa: E402
from tessel.autotune.tune import Measured  # noqa: E402
from tessel.solve import Choice, tile  # noqa: E402
from tessel.targets import get_target  # noqa: E402


def choice(family: str) -> Choice:
    _, _, fn, inputs = next(c for c in gpu_tiles.cases() if c[0] == family)
    found = next(f for f in kernels_of(fn, inputs("meta")) if f.kernel.family == family)
    return tile(found.kernel, get_target("h200"))


def took(knobs: dict[str, int], seconds: float, refused: str = "") -> Measured:
    return Measured(knobs, {"warm": Times(seconds, seconds, seconds, 1)}, refused=refused)


def test_there_are_as_many_cases_as_said() -> None:
    families = [c[0] for c in gpu_tiles.cases()]
    assert [families.count(f) for f in ("matmul", "reduction", "attention")] == [20, 8, 6]


@pytest.mark.parametrize("family", ["matmul", "reduction"])
def test_a_sweep_begins_with_the_pick_and_the_shortlist(family: str) -> None:
    picked = choice(family)
    tiles = gpu_tiles.sweep(picked, 30)
    assert dict(tiles[0]) == dict(picked.knobs) and len(tiles) == 30
    assert len({tuple(sorted(t.items())) for t in tiles}) == 30
    assert tiles == gpu_tiles.sweep(picked, 30) != gpu_tiles.sweep(picked, 30, seed=1)

    slow = [took(dict(t), 10.0 - i / 10, "wrong result" if i == 7 else "") for i, t in enumerate(tiles)]
    got = gpu_tiles.compared(picked, slow)
    assert (got["pick"], got["shortlist"], got["best"], got["refused"]) == (10.0, 9.5, 10.0 - 2.9, 1)
    row = {"family": family, "case": "x", "torch": 19.0, "torch.compile": 9.5, "bound": "memory", **got}
    text = gpu_tiles.report([row])
    assert "pick / best 0.710" in text and "torch 2.000, torch.compile 1.000" in text
    with pytest.raises(RuntimeError, match="the pick is refused: too large"):
        gpu_tiles.compared(picked, [took(dict(tiles[0]), 1.0, "too large"), *slow[1:]])
