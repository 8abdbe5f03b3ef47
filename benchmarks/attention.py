"""Attention on the CPU: Tessel's kernel beside torch's scaled_dot_product_attention, in turns, medians.

    python benchmarks/attention.py [--train] [--only NAME] [--dtype float32] [--seconds S] [--threads N] [--clock cpu]

q, k and v are seen as [batch, heads, length, width]; they are laid out [batch, length, heads, width] as projections
leave them, but a cache in decoding is [batch, heads, length, width] as transformers keep it. torch gets masks
ready-made; where a case says "from indices", Tessel is given the comparison that makes the mask.

"fast ones" is the ratio of the fastest tenths: it says more than that of the medians where other work runs on the
machine. On a busy machine one thread's time on the CPU (--threads 1 --clock cpu) says still more. The GFLOP/s count
the products of the keys that a row may see, so that they compare across cases. "error" is the largest absolute
difference from the same operands in float64, Tessel's and torch's. With --train a run is the forward and the gradients
of q, k and v, the products of both count, and the error is that of the gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, table, write_result
from cpu_measure import interleaved, quiet, spread

F = torch.nn.functional
Attend = Callable[..., torch.Tensor]
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class Case:
    """One attention.

    Attributes:
        sizes: batch, query heads, key heads, queries, keys, width.
        causal: SDPA's own flag.
        mask: makes the mask that both are given, from the sizes.
        indices: Tessel is given this condition on (query, key) in place of a mask.
    """

    sizes: tuple[int, int, int, int, int, int]
    causal: bool = False
    mask: Callable[[int, int], torch.Tensor] | None = None
    indices: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


def _window(width: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda i, j: (j <= i) & (i - j < width)


def _filled(m: int, n: int) -> torch.Tensor:
    return (torch.arange(n) < n - 1).expand(1, 1, m, n)


def _bias(m: int, n: int) -> torch.Tensor:
    return torch.randn(1, 1, m, n)


CASES: dict[str, Case] = {
    "causal 1x16x2048x64": Case((1, 16, 16, 2048, 2048, 64), causal=True),
    "causal 4x12x256x64": Case((4, 12, 12, 256, 256, 64), causal=True),
    "whole 4x12x128x64": Case((4, 12, 12, 128, 128, 64)),
    "whole 4x12x197x64": Case((4, 12, 12, 197, 197, 64)),
    "whole 1x8x1024x128": Case((1, 8, 8, 1024, 1024, 128)),
    "causal, 32 heads on 8, 1x1024x128": Case((1, 32, 8, 1024, 1024, 128), causal=True),
    "window 256 from indices 1x16x2048x64": Case((1, 16, 16, 2048, 2048, 64), indices=_window(256)),
    "additive mask 1x16x1024x64": Case((1, 16, 16, 1024, 1024, 64), mask=_bias),
    "boolean mask 1x16x1024x64": Case((1, 16, 16, 1024, 1024, 64), mask=lambda m, n: torch.rand(1, 1, m, n) > 0.3),
    "decode, 12 heads, cache 512, mask": Case((1, 12, 12, 1, 512, 64), mask=_filled),
    "decode, 16 heads, cache 4096": Case((1, 16, 16, 1, 4096, 64)),
    "decode, 32 heads on 8, cache 4096x64": Case((1, 32, 8, 1, 4096, 64)),
    "decode, 32 heads on 8, cache 4096x128": Case((1, 32, 8, 1, 4096, 128)),
    "decode, 8x 32 heads on 8, cache 1024x128": Case((8, 32, 8, 1, 1024, 128)),
    "decode, 32 heads on 1, cache 4096x64": Case((1, 32, 1, 1, 4096, 64)),
}


def operands(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and perhaps the mask, drawn in float32 from one seed."""
    torch.manual_seed(0)
    b, h, heads, m, n, d = case.sizes
    made = [torch.randn(b, s, c, d).to(dtype).transpose(1, 2) for s, c in ((m, h), (n, heads), (n, heads))]
    if m == 1:
        made[1:] = [t.contiguous() for t in made[1:]]
    mask = case.mask(m, n) if case.mask else None
    return made if mask is None else [*made, mask if mask.dtype == torch.bool else mask.to(dtype)]


def functions(case: Case) -> tuple[Attend, Attend]:
    """What torch runs and what Tessel compiles; the same numbers."""
    _, h, heads, m, n, _ = case.sizes
    more: dict[str, Any] = {"is_causal": case.causal, "enable_gqa": h != heads}

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **more)

    if case.indices is None:
        return plain, plain
    condition = case.indices
    ready = condition(torch.arange(m)[:, None], torch.arange(n))

    def indexed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plain(q, k, v, condition(torch.arange(m)[:, None], torch.arange(n)))

    return lambda q, k, v: plain(q, k, v, ready), indexed


def seen_pairs(case: Case) -> int:
    """Pairs of a query and a key that it may see, by the causal flag or the indices; masks in memory count whole."""
    b, h, _, m, n, _ = case.sizes
    i, j = torch.arange(m)[:, None], torch.arange(n)
    seen = torch.ones(m, n, dtype=torch.bool)
    if case.indices:
        seen &= case.indices(i, j)
    if case.causal:
        seen &= j <= i
    return b * h * int(seen.sum())


def _trained(f: Attend, case: Case) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
    """The forward and the gradients of q, k and v for one gradient of the result, drawn in float32 from one seed."""
    b, h, _, m, _, d = case.sizes
    grad = torch.randn(b, m, h, d, generator=torch.Generator().manual_seed(1)).transpose(1, 2)

    def run(ins: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(f(*ins), ins[:3], grad.to(ins[0].dtype))

    return run


def _forward(f: Attend) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
    def run(ins: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (f(*ins),)

    return run


def measure(
    name: str, dtype: torch.dtype, seconds: float, way: str, clock: str = "wall", train: bool = False
) -> dict[str, Any]:
    """One case: milliseconds of both, their ratio (torch over Tessel), rates, errors."""
    import tessel

    torch._dynamo.reset()
    case = CASES[name]
    ins = operands(case, dtype)
    plain, given = functions(case)
    fast = tessel.compile(given, target="cpu", options={"attention": way})
    for t in ins[:3]:
        t.requires_grad_(train)
    own, other = (_trained(f, case) if train else _forward(f) for f in (fast, plain))
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in ins]
    want = other(wide)
    got = {"tessel": own(ins), "torch": other(ins)}
    errors = {w: max(float((a.double() - b).abs().max()) for a, b in zip(r, want)) for w, r in got.items()}
    times = interleaved(
        {"torch": lambda: other(ins), "tessel": lambda: own(ins)}, seconds, most=2001, clock=CLOCKS[clock]
    )
    out: dict[str, Any] = {"case": name, "dtype": str(dtype).removeprefix("torch.")}
    for w, found in times.items():
        out |= {f"{w}_{k}": v for k, v in spread(found).items()}
        out[f"{w}_gflops"] = round((14 if train else 4) * seen_pairs(case) * case.sizes[-1] / out[f"{w}_ms"] / 1e6, 1)
    kernels = [k.family for k in tessel.explain(fast).kernels]
    low = {w: statistics.quantiles(found, n=10)[0] for w, found in times.items()}
    out["ratio"] = round(out["torch_ms"] / out["tessel_ms"], 3)
    out["low_ratio"] = round(low["torch"] / low["tessel"], 3)
    wanted = {"attention", *(["attention_backward"] if train else [])}
    return {**out, "own": wanted <= set(kernels), **{f"{w}_error": e for w, e in errors.items()}}


def row(r: dict[str, Any]) -> list[str]:
    times = [f"{r[f'{w}_ms']:.3g} ±{r[f'{w}_iqr'] / 2:.0%}" for w in ("torch", "tessel")]
    rates = f"{r['torch_gflops']:.0f}, {r['tessel_gflops']:.0f}"
    errors = f"{r['tessel_error']:.1e}, {r['torch_error']:.1e}"
    return [
        f"{r['case']} {r['dtype']}",
        *times,
        f"{r['ratio']:.2f}",
        f"{r['low_ratio']:.2f}",
        rates,
        errors,
        "" if r["own"] else "library",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="forward and backward; not of decoding")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, a case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--way", default="auto", help="options.attention: auto, template or library")
    parser.add_argument("--out", type=Path, help="where the figures go; results/attention-<date>.json if all are run")
    given = parser.parse_args(arguments)
    if given.clock == "cpu" and given.threads != 1:
        parser.error("--clock cpu counts one thread: it needs --threads 1")
    quiet()
    torch.set_num_threads(given.threads)
    rows = []
    head = ["case", "torch ms", "Tessel ms", "times", "fast ones", "GFLOP/s torch, Tessel", "error, torch's", "by"]
    for dtype in given.dtype:
        for name in CASES:
            if given.only.lower() in name.lower() and not (given.train and "decode" in name):
                rows.append(measure(name, getattr(torch, dtype), given.seconds, given.way, given.clock, given.train))
                print(" | ".join(row(rows[-1])), flush=True)
    print(f"\n{table(head, map(row, rows))}")
    whole = not given.only and len(given.dtype) == 2 and given.way == "auto"
    if given.out:
        given.out.write_text(
            json.dumps({"machine": machine(), "threads": given.threads, "clock": given.clock, "cases": rows}, indent=1)
            + "\n",
            encoding="utf-8",
        )
    elif whole:
        name = "attention-training" if given.train else "attention"
        print(write_result(name, {"threads": given.threads, "clock": given.clock, "cases": rows}))


if __name__ == "__main__":
    main()
