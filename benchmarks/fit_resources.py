"""Fit the resource model to the measured compiles and write its coefficients.

    python benchmarks/fit_resources.py            # tests/data/triton_resources.json -> tessel/solve/resources.json
    python benchmarks/fit_resources.py --check    # only compare with what is committed

Four of five parts of the rows are fitted, the fifth judges; `tests/test_resources.py` prints the table of errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tessel.solve.fit import fit, fold_of, read_rows  # noqa: E402

DATA = ROOT / "tests" / "data" / "triton_resources.json"
OUT = ROOT / "tessel" / "solve" / "resources.json"


def coefficients() -> dict[str, object]:
    """What ``resources.json`` holds: for each path its coefficients and where they are from."""
    data = json.loads(DATA.read_text())
    paths = {}
    for path in data["paths"]:
        rows = read_rows(data, path)
        train = np.array([fold_of(path, r.knobs) != 0 for r in rows])
        got = fit(path, rows, train)
        paths[path] = {
            "registers": got.registers,
            "spill": got.spill,
            "error": {"mean": got.error[0], "most": got.error[1]},
            "source": f"fitted from {got.rows} of {len(rows)} offline compiles with Triton 3.7.1 ({DATA.name}); "
            "error on the others",
        }
    return {
        "about": "Coefficients of the register and spill formulas that the templates' headers declare.",
        "paths": paths,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say whether the committed coefficients are these")
    args = parser.parse_args()
    text = json.dumps(coefficients(), indent=1) + "\n"
    if args.check:
        same = OUT.read_text() == text
        print("as committed" if same else f"{OUT} differs from a new fit")
        return 0 if same else 1
    OUT.write_text(text)
    print(f"wrote {OUT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
