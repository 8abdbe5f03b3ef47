"""Compile the tiles that the solver picks for attention, head width by head width, for GPUs that need not be here.

    python benchmarks/attention_picks.py           # a quarter of an hour -> tests/data/attention_picks.json
    python benchmarks/attention_picks.py h100 b200 # these GPUs alone; the others' rows stay

Forward and both passes of the gradients, causal, in bf16. The tests ask the solver again: a tile that is not in the
file, spills or takes more shared memory than was predicted fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_attention_picks import COLUMNS, FILE, KNOBS, TARGETS, WIDTHS, kernels_of  # noqa: E402

from tessel.codegen.offline import offline_compile  # noqa: E402
from tessel.codegen.triton import render  # noqa: E402
from tessel.solve import tile  # noqa: E402
from tessel.targets import get_target  # noqa: E402


def rows(name: str, known: list[list[object]]) -> Iterator[list[object]]:
    """One row a kernel; what is known of the same tile is not compiled again."""
    target = get_target(name)
    of_tile = {tuple(row[:-3]): row for row in known}
    for d, e in WIDTHS:
        for part, kernel in kernels_of(d, e).items():
            choice = tile(kernel, target)
            head = [d, e, part, *(choice.knobs[n] for n in KNOBS)]
            if tuple(head) not in of_tile:
                (got,) = offline_compile([render(kernel, target, choice)], target.arch)
                of_tile[tuple(head)] = [*head, got.shared_bytes, got.registers, got.spills]
                print(name, *of_tile[tuple(head)], got.error[:200], flush=True)
            yield of_tile[tuple(head)]


def main() -> int:
    import triton

    about = (
        f"What Triton {triton.__version__} allocated for the tiles that the solver picks for causal attention and its "
        f"gradients (bf16, 8 heads of 2048), compiled offline, no GPU. columns: {','.join(COLUMNS)}"
    )
    found = json.loads(FILE.read_text())["targets"] if FILE.exists() else {}
    for name in sys.argv[1:] or TARGETS:
        found[name] = list(rows(name, found.get(name, [])))
        own = [
            f"{json.dumps(target)}:[\n" + ",\n".join(json.dumps(r, separators=(",", ":")) for r in found[target]) + "]"
            for target in TARGETS
            if target in found
        ]
        FILE.write_text(f'{{"about":{json.dumps(about)},\n"targets":{{\n' + ",\n".join(own) + "\n}}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
