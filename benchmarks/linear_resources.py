"""Compile the kernels of linear attention for GPUs that need not be here, and write down what the compiler allocated.

    python benchmarks/linear_resources.py           # a quarter of an hour -> tests/data/linear_resources.json
    python benchmarks/linear_resources.py h100 b200 # these GPUs alone; the others' rows stay

The tests compare: a kernel that is no longer the one that was compiled, spills or takes more shared memory than was
predicted fails. What is known of a kernel is not compiled again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from offline_rows import Row, write_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_linear_triton import COLUMNS, FILE, TARGETS, sources  # noqa: E402

from tessel.codegen.offline import offline_compile  # noqa: E402
from tessel.targets import get_target  # noqa: E402


def rows(name: str, known: list[Row]) -> list[Row]:
    """One row a kernel; what did not compile is printed and left out."""
    target = get_target(name)
    found = {(row[0], row[1]): row for row in known}
    made = {(what, source.body_key[:16]): source for what, source in sources(target).items()}
    new = {key: source for key, source in made.items() if key not in found}
    for (key, source), got in zip(new.items(), offline_compile(list(new.values()), target.arch, 300.0), strict=True):
        print(name, *key, got.shared_bytes, f"of {source.smem_bytes}", got.registers, got.spills, got.error[:200])
        if got.ok:
            found[key] = [*key, got.shared_bytes, got.registers, got.spills]
    return [found[key] for key in made if key in found]


def main() -> int:
    known = json.loads(FILE.read_text())["targets"] if FILE.exists() else {}
    found = {name: known.get(name, []) for name in TARGETS}
    for name in sys.argv[1:] or TARGETS:
        found[name] = rows(name, found[name])
        write_rows(FILE, "the kernels of linear attention", COLUMNS, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
