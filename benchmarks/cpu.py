"""Eager, torch.compile and Tessel on the CPU: whole models and fused micro-cases, medians of interleaved runs.

    python benchmarks/cpu.py [models] [micro] [--dtype float32] [--runs 15] [--only NAME]

Each case runs in a process of its own, and in it the three take turns, so that a disturbance hits all of them.
Beside a model stands the time of its matrix products alone, which no fusion can go below. Writes
``results/cpu-<date>.json`` when nothing is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import Size, build, machine, table, write_result

F = torch.nn.functional
MODELS = {
    "Llama": Size(layers=4, hidden=768, heads=12, batch=4, seq=256, vocab=8192),
    "GPT-2": Size(layers=4, hidden=768, heads=12, batch=4, seq=256, vocab=8192),
    "BERT": Size(layers=4, hidden=768, heads=12, batch=4, seq=128, vocab=8192),
    "ViT": Size(layers=4, hidden=768, heads=12, batch=4, image=224),
}


def _norm_chain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(F.layer_norm(F.gelu(x) + x, (x.shape[-1],), w), -1)


def _rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


MICRO: dict[str, tuple[Callable[..., Any], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "gelu-norm-softmax 4096x1024": (_norm_chain, lambda: (_r(4096, 1024), _r(1024))),
    "rms_norm 4096x1024": (_rms, lambda: (_r(4096, 1024), _r(1024))),
    "silu * gate 1024x3072": (lambda a, b: F.silu(a) * b, lambda: (_r(1024, 3072), _r(1024, 3072))),
    "gelu tanh + bias 1024x3072": (
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        lambda: (_r(1024, 3072), _r(3072)),
    ),
    "softmax 2048x2048": (lambda x: torch.softmax(x * 0.125, -1), lambda: (_r(2048, 2048),)),
    "cross entropy 256x32000": (F.cross_entropy, lambda: (_r(256, 32000), torch.randint(0, 32000, (256,)))),
    "rotary 4x12x256x64": (_rotary, lambda: (_r(4, 12, 256, 64), _r(256, 64), _r(256, 64))),
    "sum over rows 4096x1024": (lambda x: (x * x).sum(0), lambda: (_r(4096, 1024),)),
    "sum over columns 4096x1024": (lambda x: (x * x).sum(1), lambda: (_r(4096, 1024),)),
    "sum of all 4096x1024": (lambda x: (x - 1).abs().sum(), lambda: (_r(4096, 1024),)),
    "transpose and add 2048x2048": (lambda x, y: x.t() + y, lambda: (_r(2048, 2048), _r(2048, 2048))),
    "embedding sum 8192x768": (
        lambda i, w, p: w[i] + p,
        lambda: (torch.randint(0, 8192, (4, 256)), _r(8192, 768), _r(256, 768)),
    ),
}


def measure(name: str, dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """One case: seconds per call of the three, medians; the first calls, compile time included."""
    import tessel

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if name in MODELS:
        model, kwargs = build(name, MODELS[name])
        fn: Callable[..., Any] = model.to(dtype)
        kwargs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items()}
        args: tuple[Any, ...] = ()
    else:
        fn, make = MICRO[name]
        args, kwargs = tuple(a.to(dtype) if a.is_floating_point() else a for a in make()), {}
    result: dict[str, Any] = {"case": name, "dtype": str(dtype).removeprefix("torch.")}
    with torch.no_grad():
        runners = {"eager": fn, "compile": torch.compile(fn), "tessel": tessel.compile(fn, target="cpu")}
        for label in ("tessel", "compile", "eager"):
            start = time.perf_counter()
            runners[label](*args, **kwargs)
            result[f"first_{label}_s"] = round(time.perf_counter() - start, 3)
        times: dict[str, list[float]] = {k: [] for k in runners}
        for _ in range(runs + 2):
            for label, run in runners.items():
                start = time.perf_counter()
                run(*args, **kwargs)
                times[label].append(time.perf_counter() - start)
        for label, all_of_them in times.items():
            result[f"{label}_ms"] = round(statistics.median(all_of_them[2:]) * 1e3, 4)
        if name in MODELS:
            result["products_ms"] = round(_products(runners["tessel"], args, kwargs), 3)
    return result


def _products(run: Callable[..., Any], args: Any, kwargs: Any) -> float:
    """Milliseconds of one call that go into matrix products."""
    from tessel.runtime.matmul_cpu import Product

    spent = [0.0]
    original = Product.__call__

    def timed(self: Product, *operands: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        got = original(self, *operands)
        spent[0] += time.perf_counter() - start
        return got

    Product.__call__ = timed  # type: ignore[method-assign]
    found = []
    for _ in range(5):
        spent[0] = 0.0
        run(*args, **kwargs)
        found.append(spent[0] * 1e3)
    Product.__call__ = original  # type: ignore[method-assign]
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="models, micro; both if none is named")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", help="one case")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.case, getattr(torch, given.dtype), given.runs)))
        return
    parts = given.parts or ["models", "micro"]
    names = [*(MODELS if "models" in parts else ()), *(MICRO if "micro" in parts else ())]
    names = [n for n in names if given.only in (None, n)]
    results = []
    for name in names:
        command = [sys.executable, __file__, "--case", name, "--dtype", given.dtype, "--runs", str(given.runs)]
        got = subprocess.run(command, capture_output=True, text=True)
        if got.returncode:
            sys.exit(f"{name}:\n{got.stderr[-2000:]}")
        results.append(json.loads(got.stdout.splitlines()[-1]))
        r = results[-1]
        print(f"{name}: eager {r['eager_ms']}, torch.compile {r['compile_ms']}, tessel {r['tessel_ms']} ms", flush=True)
    show(results)
    if given.only is None and not given.parts:
        print(write_result(f"cpu-{given.dtype}", {"cases": results, "threads": torch.get_num_threads()}))


def show(results: list[dict[str, Any]]) -> None:
    head = [
        "case",
        "eager",
        "torch.compile",
        "tessel",
        "products",
        "faster than torch.compile",
        "first call: compile, tessel",
    ]
    rows = []
    for r in results:
        ratio = r["compile_ms"] / r["tessel_ms"]
        first = f"{r['first_compile_s']:.1f}, {r['first_tessel_s']:.1f} s"
        rows.append(
            [r["case"], r["eager_ms"], r["compile_ms"], r["tessel_ms"], r.get("products_ms", ""), f"{ratio:.2f}", first]
        )
    print(f"\n{machine()['cpu']}, {torch.get_num_threads()} threads, milliseconds\n")
    print(table(head, rows))
    ratios = [r["compile_ms"] / r["tessel_ms"] for r in results]
    print(f"\ngeometric mean {math.exp(statistics.fmean(map(math.log, ratios))):.2f}, least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
