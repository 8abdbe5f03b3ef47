"""``make gpu``: scans on the GPU of this machine, checked, then timed against eager and torch.compile.

    python benchmarks/gpu_scans.py [--quick] [--only selective]

A selective scan (Mamba), forward and in training; linear recurrences along each kind of axis; cumulative sums, log-sums
of exponentials and maxima. Eager and torch.compile run the same function; a recurrence is ``associative_scan``, which
torch.compile has kernels for. Checked against float64, relative L2 error of each tensor at most 3 times eager's or
2e-6 (fp32), 1e-2 (bf16). Times are of one call, by CUDA events, in turns.

Writes ``benchmarks/results/<device>-scans-<date>.json``. Exit status: 0 all right, 1 a case failed, 2 no GPU here.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from common import spread, table, write_result
from gpu import WAYS, compiled, error, timed
from torch._higher_order_ops.associative_scan import associative_scan

Tensor = torch.Tensor
Call = Callable[..., Tensor]
LEAST = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def recurrence(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """h[t] = a[t] h[t - 1] + b[t]."""

    def joined(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return x[0] * y[0], y[0] * x[1] + y[1]

    return associative_scan(joined, (a, b), dim=dim, combine_mode="generic")[1]


def selective(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """dt and u [batch, time, d], A [d, n], B and C [batch, time, n]."""
    a = torch.exp(dt[..., None] * A)
    b = dt[..., None] * B[:, :, None] * u[..., None]
    return torch.matmul(recurrence(a, b, 1), C[..., None])[..., 0]


def cases(quick: bool) -> list[tuple[str, Call, list[Tensor], bool]]:
    """What, a function, its operands on the CPU, and whether its gradients are taken too."""
    torch.manual_seed(0)
    part = 8 if quick else 1

    def state_space(batch: int, steps: int, d: int, n: int) -> list[Tensor]:
        shapes = [(batch, steps, d), (d, n), (batch, steps, n), (batch, steps, n), (batch, steps, d)]
        dt, A, B, C, u = (torch.randn(s) for s in shapes)
        return [dt.abs() / 8, -A.abs(), B, C, u]

    def lines(*shape: int) -> list[Tensor]:
        return [torch.rand(shape), torch.randn(shape)]

    out: list[tuple[str, Call, list[Tensor], bool]] = []
    for batch, steps in ((1, 2048), (8, 2048), (1, 16384)):
        given = state_space(batch, steps // part, 1536, 16)
        out.append((f"selective scan {batch}x{steps // part}x1536x16", selective, given, False))
    out.append(
        (f"selective scan {2048 // part} steps, training", selective, state_space(2, 2048 // part, 1536, 16), True)
    )
    for shape, dim in (((8, 4096 // part, 2048), 1), ((512, 16384 // part), 1), ((4, 262144 // part), 1)):
        what = f"linear recurrence along {dim} of {'x'.join(map(str, shape))}"
        out.append((what, lambda a, b, dim=dim: recurrence(a, b, dim), lines(*shape), False))
    rows = torch.randn(4096 // part, 8192)
    out.append(("cumsum of rows", lambda x: x.cumsum(1).sigmoid(), [rows], False))
    out.append(("cumsum of columns", lambda x: x.cumsum(0).sigmoid(), [rows], False))
    out.append(("logcumsumexp of rows", lambda x: x.logcumsumexp(1), [rows], False))
    out.append(("cummax of rows", lambda x: x.cummax(1).values, [rows], False))
    return out


def outcome(fn: Call, given: list[Tensor], train: bool) -> list[Tensor]:
    """The result, and its gradients."""
    if not train:
        with torch.no_grad():
            return [fn(*given)]
    y = fn(*given)
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), given)]


def case(what: str, fn: Call, given: list[Tensor], train: bool, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Errors and times of one function."""
    given = [x.to("cuda", dtype).requires_grad_(train) for x in given]
    want = outcome(fn, [x.detach().double().requires_grad_(train) for x in given], train)
    torch._dynamo.reset()
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for way in WAYS:
        made = compiled(way, fn)  # type: ignore[arg-type]
        try:
            errors[way] = max(error(outcome(made, given, train), want))
        except Exception as e:
            failed[way] = f"{type(e).__name__}: {str(e)[:500]}"
            continue
        calls[way] = lambda made=made: outcome(made, given, train)  # type: ignore[misc]
    limit = max(3 * errors.get("eager", 0.0), LEAST[dtype])
    times = timed(calls, rounds)
    return {
        "case": f"{what}, {str(dtype).removeprefix('torch.')}",
        "right": errors.get("tessel", float("inf")) <= limit,
        "failed": failed,
        "error": errors,
        "ms": {way: spread(t) for way, t in times.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, few repetitions")
    parser.add_argument("--only", default="", help="cases with this in their name")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_scans: torch finds no GPU here; nothing was run or measured", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    broken = []
    for what, fn, operands, train in cases(given.quick):
        for dtype in (torch.float32, torch.bfloat16) if not train else (torch.float32,):
            if given.only not in what:
                continue
            try:
                rows.append(case(what, fn, operands, train, dtype, 3 if given.quick else 9))
            except Exception:
                broken.append(what)
                print(f"{what}: not measured\n{traceback.format_exc()}", file=sys.stderr)
            torch.cuda.empty_cache()
    cells = [
        [
            r["case"],
            *(f"{r['ms'][w]['median']:.3f}" if w in r["ms"] else "failed" for w in WAYS),
            " ".join(f"{w} {e:.1e}" for w, e in r["error"].items()),
            "right" if r["right"] else "WRONG",
        ]
        for r in rows
    ]
    print(table(["ms: median", *WAYS, "largest error", "checked"], cells))
    device = torch.cuda.get_device_name(0).replace(" ", "-")
    print(
        f"written: benchmarks/results/{write_result(f'{device}-scans', {'cases': rows, 'not measured': broken}).name}"
    )
    return 1 if broken or not all(r["right"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
