"""Matrix products on the CPU: Tessel's kernel, oneDNN with plain and with packed weights, and torch's own choice.

    python benchmarks/gemm.py [--dtype float32 bfloat16] [--shapes 1024x1024x1024 1x3072x768] [--seconds S] [--turned]

A shape is rows x columns x inner size; the right operand is a weight [columns, inner], as a linear layer has it. With
``--turned`` both operands are [inner, rows] and [inner, columns], as in the gradient of a weight. The ways take turns,
and each goes through as many copies of the weight as the last cache cannot hold, so that few rows find it in memory,
as in a model. "of peak" is of the multiply-adds, and "of reading" of the read bandwidth, that
``tessel targets --show cpu`` measures (measured here first, in the same process). Other work on the machine makes
every figure worse: ``load`` is the number of processes that wanted to run at the start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, table

import tessel
from tessel.runtime.host_rates import measure_host
from tessel.targets import get_target
from tessel.targets.host import TILES

SHAPES = (
    "1024x1024x1024 1024x3072x768 1024x768x3072 256x3072x768 128x3072x768 32x3072x768 16x3072x768 8x3072x768 "
    "4x3072x768 1x768x768 1x3072x768 1x768x3072 1x8192x768"
).split()
NAMES = {"float32": "f32", "bfloat16": "bf16"}
Run = Callable[[], torch.Tensor]


def weights(n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies of a weight that together are three times the last cache; the products compared take turns with them."""
    cache = max((x.capacity_bytes for x in get_target("cpu").levels if x.name != "memory"), default=2**25)
    count = max(1, min(64, -(-3 * cache // (n * k * dtype.itemsize))))
    return [torch.randn(n, k).to(dtype) for _ in range(count)]


def ways(m: int, n: int, k: int, dtype: torch.dtype, turned: bool) -> dict[str, Run]:
    """The ways to multiply, each with the next copy of the weight at every call.

    Raises:
        AssertionError: Tessel's result is not that of float64.
    """
    a, every = torch.randn(m, k).to(dtype), weights(n, k, dtype)
    if turned:
        a, every = a.t().contiguous().t(), [w.t().contiguous().t() for w in every]
    torch._dynamo.reset()
    own = tessel.compile(lambda a, w: a @ w.t(), target="cpu", options={"matmul": "template"})
    got, want = own(a, every[0]), a.double() @ every[0].double().t()
    assert (got.double() - want).abs().amax() < (1e-5 if dtype == torch.float32 else 2e-2) * want.abs().amax()
    linear = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)

    def turns(fn: Callable[[Any], torch.Tensor], all_: list[torch.Tensor], first: int = 0) -> Run:
        at = first * len(all_) // 3  # a weight that another way has just read would lie in the last cache
        turn: Iterator[torch.Tensor] = itertools.cycle(all_[at:] + all_[:at])
        return lambda: fn(next(turn))

    found = {"tessel": turns(lambda w: own(a, w), every), "torch": turns(lambda w: torch.mm(a, w.t()), every, 1)}
    if linear is not None and not turned:
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, m) for w in every]
        found["onednn"] = turns(lambda w: linear(a, w, None, "none", [], ""), every, 2)
        found["onednn, packed"] = turns(lambda w: linear(a, w, None, "none", [], ""), packed)
    return found


def measure(shape: str, name: str, seconds: float, peak: float, read: float, turned: bool) -> dict[str, Any]:
    """Medians and best times of one shape, in microseconds, and what the best of Tessel's is of the peaks."""
    m, n, k = map(int, shape.split("x"))
    dtype = getattr(torch, name)
    runs = ways(m, n, k, dtype, turned)
    times: dict[str, list[float]] = {w: [] for w in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["tessel"]) < 9:
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - start)
    row: dict[str, Any] = {"shape": shape, "dtype": name, "runs": len(times["tessel"])}
    for way, took in times.items():
        row |= {f"{way}_us": round(statistics.median(took) * 1e6, 1), f"{way}_best_us": round(min(took) * 1e6, 1)}
    best = min(times["tessel"])
    row["of_peak"] = round(2 * m * n * k / best / peak, 3)
    row["of_reading"] = round((m * k + n * k + m * n) * dtype.itemsize / best / read, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--seconds", type=float, default=0.5, help="of every shape")
    parser.add_argument("--turned", action="store_true", help="both operands lie along their rows and columns")
    parser.add_argument("--out", help="a JSON file for the rows")
    given = parser.parse_args()
    rates = measure_host(keep=False)
    rows = []
    with torch.no_grad():
        for name in given.dtype:
            vectors = rates.flops.get(NAMES[name], rates.flops["f32"])
            peak = rates.flops.get(TILES, vectors) if name == "bfloat16" else vectors
            rows += [measure(s, name, given.seconds, peak, rates.read_bytes_per_s, given.turned) for s in given.shapes]
    result = {
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1),
        "read_gb_per_s": round(rates.read_bytes_per_s / 1e9, 1),
        "peak_gflops": {n: round(f / 1e9) for n, f in rates.flops.items()},
        "rows": rows,
    }
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{k} {v}" for k, v in result.items() if k not in ("rows", "machine")))
    keys = ["shape", "dtype", *(k for k in rows[0] if k.endswith("_us") and "best" not in k), "of_peak", "of_reading"]
    print(table([k.removesuffix("_us") for k in keys], [[str(r.get(k, "")) for k in keys] for r in rows]))


if __name__ == "__main__":
    main()
