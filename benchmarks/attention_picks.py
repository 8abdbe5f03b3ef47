"""Compile the tiles that the solver picks for attention, head width by head width, for GPUs that need not be here.

    python benchmarks/attention_picks.py           # half an hour -> tests/data/attention_picks.json
    python benchmarks/attention_picks.py h100 b200 # these GPUs alone; the others' rows stay
    python benchmarks/attention_picks.py h100 f32  # and in this precision alone

Forward and both passes of the gradients, causal, and one query against a cache, whose keys are in parts. What is known
of a tile is not compiled again. The tests ask the solver again: a tile that is not in the file, spills or takes more
shared memory than was predicted fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from offline_rows import Row, write_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_attention_picks import COLUMNS, DTYPES, FILE, KNOBS, TARGETS, WIDTHS, kernels_of  # noqa: E402

from tessel.codegen.offline import offline_compile  # noqa: E402
from tessel.codegen.triton import render  # noqa: E402
from tessel.errors import TesselError  # noqa: E402
from tessel.solve import tile  # noqa: E402
from tessel.targets import get_target  # noqa: E402

WHAT = (
    "the tiles that the solver picks for causal attention and its gradients (8 heads of 2048) and for one query "
    "(decode: 32 heads on 8, a cache of 4096)"
)


def rows(name: str, dtype: str, width: tuple[int, int], known: list[Row]) -> list[Row]:
    """One row a part; what has no tile or did not compile is printed and left out."""
    target = get_target(name)
    of_tile = {tuple(row[:-3]): row for row in known}
    picks, new = [], []
    for part, kernel in kernels_of(*width, dtype).items():
        try:
            choice = tile(kernel, target)
        except TesselError as e:
            print(name, *width, dtype, part, e, flush=True)
            continue
        head = (*width, dtype, part, *(choice.knobs[n] for n in KNOBS))
        picks.append(head)
        if head not in of_tile:
            new.append((head, choice.resources, render(kernel, target, choice)))
    for (head, predicted, _), got in zip(new, offline_compile([s for *_, s in new], target.arch), strict=True):
        if got.ok:
            of_tile[head] = [*head, got.shared_bytes, got.registers, got.spills]
        print(name, *head, "shared", got.shared_bytes, f"of {predicted.shared_bytes}, registers", got.registers, end="")
        print(f" of {predicted.registers:.0f}, spills {got.spills} {got.error[:200]}", flush=True)
    return [of_tile[head] for head in picks if head in of_tile]


def main() -> int:
    known = json.loads(FILE.read_text())["targets"]
    found = {name: known.get(name, []) for name in TARGETS}
    for dtype in [d for d in DTYPES if d in sys.argv] or DTYPES:
        for d, e in WIDTHS:
            for name in [n for n in TARGETS if n in sys.argv] or TARGETS:
                own = [row for row in found[name] if row[:3] == [d, e, dtype]]
                found[name] = [row for row in found[name] if row not in own] + rows(name, dtype, (d, e), own)
                write_rows(FILE, WHAT, COLUMNS, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
