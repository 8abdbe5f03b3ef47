"""Fit the resource model to the measured compiles, write its coefficients, and say how far off it is.

    python benchmarks/fit_resources.py            # tests/data/*_resources.json -> tessel/solve/resources.json
    python benchmarks/fit_resources.py --check    # only compare with what is committed
    python benchmarks/fit_resources.py --table    # only the table of errors, as markdown

Rows are dealt into five parts by the hash of their tile. The committed coefficients are fitted to four, the
table judges every row by a fit to the four parts it is not in. Its last column is the harder question: tiles
of a shape (all knobs but stages and warps) that the fit has never seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tessel.solve.fit import cross, fit, fold_of, header_of, read_rows  # noqa: E402

DATA = tuple(ROOT / "tests" / "data" / f"{name}_resources.json" for name in ("triton", "attention"))
OUT = ROOT / "tessel" / "solve" / "resources.json"


def _paths() -> list[tuple[Path, dict[str, Any], str]]:
    """``(file, its data, path)`` for every path."""
    read = [(file, json.loads(file.read_text())) for file in DATA]
    return [(file, data, path) for file, data in read for path in data["paths"]]


def coefficients() -> dict[str, object]:
    """What ``resources.json`` holds: for each path its coefficients and where they are from."""
    paths = {}
    for file, data, path in _paths():
        rows = read_rows(data, path)
        train = np.array([fold_of(path, r.knobs) != 0 for r in rows])
        got = fit(path, rows, train)
        paths[path] = {
            "registers": got.registers,
            "spill": got.spill,
            "error": {"mean": got.error[0], "most": got.error[1]},
            "source": f"fitted from {got.rows} of {len(rows)} offline compiles with Triton 3.7.1 ({file.name}); "
            "error on the others",
        }
    return {
        "about": "Coefficients of the register and spill formulas that the templates' headers declare.",
        "paths": paths,
    }


def errors() -> str:
    """The table of model error per path, as markdown."""
    lines = [
        "| path | rows | shared bytes exact | bounded | registers off: mean | 90% | most "
        "| spills missed | called wrongly | of unseen shapes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for _, data, path in _paths():
        rows = read_rows(data, path)
        v = cross(path, rows)
        w = cross(path, rows, by=[n for n in rows[0].knobs if n not in ("num_stages", "num_warps")])
        cells = [
            f"{path}: {header_of(path)[1].what}",
            v.rows,
            v.exact,
            v.bounded,
            *v.error,
            f"{v.missed} of {v.spilling}",
            f"{v.false} of {v.others}",
            f"{w.missed} and {w.false}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say whether the committed coefficients are these")
    parser.add_argument("--table", action="store_true", help="print the table of errors only")
    args = parser.parse_args()
    if args.table:
        print(errors())
        return 0
    text = json.dumps(coefficients(), indent=1) + "\n"
    if args.check:
        same = OUT.read_text() == text
        print("as committed" if same else f"{OUT} differs from a new fit")
        return 0 if same else 1
    OUT.write_text(text)
    print(f"wrote {OUT}\n\n{errors()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
