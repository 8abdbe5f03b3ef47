"""``make bench``: speed, bytes moved and compile time on this machine, as tables and as files in ``results/``.

python benchmarks/run.py [cpu] [algebra] [quant] [bytes] [compile_time] [--repeat N]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import algebra
import compile_time
import cpu
import quant
from common import RESULTS, Size, write_result

PARTS = ("cpu", "algebra", "quant", "bytes", "compile_time")


def _counting() -> ModuleType:
    """``bytes.py``: a plain import would be of nothing or of a module of that name elsewhere."""
    spec = importlib.util.spec_from_file_location("bench_bytes", Path(__file__).with_name("bytes.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_bytes"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, help=" or ".join(PARTS))
    parser.add_argument("--repeat", type=int, default=5, help="cold compiles of each kind")
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {' and '.join(PARTS)}")
    if "cpu" in given.parts:
        cpu.main([])
        print(flush=True)
    if "algebra" in given.parts:
        algebra.main([])
        print(flush=True)
    if "quant" in given.parts:
        quant.main([])
        print(flush=True)
    if "bytes" in given.parts:
        counting = _counting()
        size = Size()
        results = counting.measure(size)
        print(counting.as_table(results), end="\n\n", flush=True)
        _said(write_result("bytes", counting.to_dict(results, size)))
    if "compile_time" in given.parts:
        cold = compile_time.cold(given.repeat)
        print(compile_time.cold_table(cold), end="\n\n", flush=True)
        rows = compile_time.scaling()
        print(compile_time.scaling_table(rows), end="\n\n", flush=True)
        _said(write_result("compile_time", {"cold": cold, "scaling": rows}))


def _said(file: Path) -> None:
    print(f"written: {file.relative_to(RESULTS.parents[1])}\n", flush=True)


if __name__ == "__main__":
    main()
