"""Models of transformers under every kind of parallelism, as real processes: results, gradients, bytes of the plan.

``make test-dist`` runs all rows of ``dist_rows.py`` under torchrun, 2, 4 and 8 processes, and prints a table; the tests
of every day run a few.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from dist_rows import ABSENT, FAMILIES, WORLDS, rows_of

# keys that go round, tokens sent to experts, sums finished as scatters, a parameter of two stages
FEW = ("llama:ring", "mixtral:ep, sent", "vit:tp+sp", "bert:pp")
ALL = "TESSEL_TEST_DIST" in os.environ
SECONDS = 1800


def run(world: int, folder: Path, rows: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What came of rows (all if none are named) in a world of processes, by their keys.

    Args:
        folder: what one world traced, another finds there.
    """
    script = str(Path(__file__).with_name("dist_rows.py"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TESSEL_CACHE_DIR": str(folder), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*start, script, str(folder), *rows], env=env, timeout=SECONDS, check=False, text=True,
        stdout=None if ALL else subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    file = folder / "rows.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert lines, f"no row was run: {done.stderr[-3000:]}"
    assert done.returncode == 0, done.stderr[-3000:]
    return {f"{r['name']}:{r['how']}": r for r in lines if r["world"] == world}


def judge(row: dict[str, Any] | None) -> None:
    assert row is not None, "it was not run"
    assert "error" not in row, f"{row['error']}\n{row['trace']}"
    assert row["bytes"] == row["planned"]


@pytest.mark.slow
def test_a_few_rows_over_two_processes(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    found = run(2, tmp_path, FEW)
    for key in FEW:
        judge(found.get(key))


@cache
def shared() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def everything(world: int) -> dict[str, dict[str, Any]]:
    return run(world, Path(shared().name))


@pytest.mark.skipif(not ALL, reason="make test-dist runs it")
@pytest.mark.parametrize(("world", "key"), [(w, r.key) for w in WORLDS for r in rows_of(w)])
def test_a_row(world: int, key: str) -> None:
    judge(everything(world).get(key))


@pytest.mark.skipif(not ALL, reason="make test-dist runs it")
def test_the_table() -> None:
    """Not a check of its own: what the rows above found, on one page."""
    heads = tuple("model,parallelism,processes,mesh,results,(one device),gradients,(one device),bytes".split(","))
    lines = [heads]
    for name in FAMILIES:
        for world in WORLDS:
            for row in (r for r in everything(world).values() if r["name"] == name):
                lines.append(cells(row))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    print()
    for line in lines:
        print("  ".join(word.ljust(n) for word, n in zip(line, widths, strict=True)).rstrip())
    print("\nErrors are the largest distance from float64 as a part of the largest value; bytes are those a process")
    print("hands to torch.distributed in a step, the same as the plan's (least and most where processes differ).")
    print("The rows of tp over two processes ran compiled kernels, the others interpreted the same programs.")
    for (name, how), why in ABSENT.items():
        print(f"There is no row of {name} under {how}: {why}.")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    first = (row["name"], row["how"], str(row["world"]), row["mesh"])
    if "error" in row:
        return (*first, "failed", "", "", "", row["error"][:60])
    least, most = row["bytes"]
    return (
        *first,
        *(f"{e:.1e}" for e in (*row["out"], *row["grad"])),
        str(most) if least == most else f"{least}-{most}",
    )
