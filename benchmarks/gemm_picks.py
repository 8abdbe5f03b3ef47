"""The tiles that the solver picks for matrix products on a GPU that need not be here, with their predicted efficiency.

    python benchmarks/gemm_picks.py                     # 20 shapes on an H100, as markdown
    python benchmarks/gemm_picks.py --target mi300x
    python benchmarks/gemm_picks.py --llama             # and how long the tiles of a two-layer Llama take to solve

Nothing is measured on a GPU here: times are predictions. ``of peak`` is against the data sheet's matrix rate; ``of
roofline`` against the longer of multiplying at that rate and moving every operand once at the data sheet's bandwidth.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tessel.solve import Problem, tile_of  # noqa: E402
from tessel.targets import Target, get_target  # noqa: E402

SHAPES: tuple[tuple[str, int, int, int, str], ...] = (
    ("square", 512, 512, 512, "bf16"),
    ("square", 1024, 1024, 1024, "bf16"),
    ("square", 2048, 2048, 2048, "bf16"),
    ("square", 4096, 4096, 4096, "bf16"),
    ("square", 8192, 8192, 8192, "bf16"),
    ("square", 16384, 16384, 16384, "bf16"),
    ("8B, qkv, 4096 tokens", 4096, 6144, 4096, "bf16"),
    ("8B, gate and up", 4096, 28672, 4096, "bf16"),
    ("8B, down", 4096, 4096, 14336, "bf16"),
    ("8B, vocabulary", 4096, 128256, 4096, "bf16"),
    ("70B, gate and up over 8", 8192, 7168, 8192, "bf16"),
    ("70B, down over 8", 8192, 8192, 3584, "bf16"),
    ("decode, 1 token", 1, 4096, 4096, "bf16"),
    ("decode, 16 tokens", 16, 8192, 8192, "bf16"),
    ("decode, 64 tokens", 64, 28672, 4096, "bf16"),
    ("prefill, 256 tokens", 256, 14336, 4096, "bf16"),
    ("tall", 65536, 256, 1024, "bf16"),
    ("deep", 256, 256, 65536, "bf16"),
    ("rows of 8190 bytes", 4096, 4096, 4095, "bf16"),
    ("full precision", 2048, 2048, 2048, "f32"),
)


def _tile_text(v: Mapping[str, int]) -> str:
    """Sides, and the variants that are not plain: descriptors, programs that stay, parts of k."""
    text = f"{v['BM']}×{v['BN']}×{v['BK']}" + ", TMA" * v.get("TMA", 0) + ", stays" * (v.get("PERSIST", 0) > 0)
    return text + (f", k in {v['SPLIT']} parts" if v.get("SPLIT", 1) > 1 else "")


def picks(target: Target) -> str:
    """The table."""
    lines = [
        "| product | m × n × k | tile | group | warps | stages | predicted | TFLOP/s | of peak | of roofline "
        "| bound by | next best | CPU time to solve |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    memory = target.level("memory").bandwidth_bytes_per_s
    assert memory is not None
    tile_of(Problem.product(64, 64, 64), target)  # imports, headers
    for what, m, n, k, dtype in SHAPES:
        problem = Problem.product(m, n, k, dtype)
        start = time.process_time()
        choice = tile_of(problem, target)
        took = time.process_time() - start
        v, seconds = choice.knobs, choice.predicted.total
        peak = target.flops[dtype]
        floor = max(problem.flops / peak, (problem.total_bytes + problem.out_bytes) / memory)
        second = choice.candidates(2)[-1].time.total / seconds - 1
        cells = [
            what + (f", {dtype}" if dtype != "bf16" else ""),
            f"{m} × {n} × {k}",
            _tile_text(v),
            v["GROUP"],
            v["num_warps"],
            v["num_stages"],
            f"{seconds * 1e6:,.1f} µs",
            f"{problem.flops / seconds / 1e12:,.0f}",
            f"{problem.flops / seconds / peak:.0%}",
            f"{floor / seconds:.0%}",
            choice.predicted.bound,
            f"{second:+.1%}",
            f"{took * 1e3:.0f} ms",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def llama(target: Target) -> str:
    """How long the tiles of a two-layer Llama's kernels take, products and attention from templates."""
    from tessel.autotune.kernels import kernels_of
    from tessel.models import load_model
    from tessel.solve import tile
    from tessel.solve.choice import forget

    module, args, kwargs = load_model("hf:llama", layers=2, dtype="bfloat16", device="meta")
    found = kernels_of(module, args, kwargs)
    forget()
    start = time.process_time()
    chosen = [tile(f.kernel, target) for f in found]
    took = time.process_time() - start
    lines = [f"two layers of Llama: {len(found)} kernels solved in {took * 1e3:.0f} ms of CPU time", ""]
    lines += [f"- {c.name}: {c.problem}: {' '.join(f'{n}={v}' for n, v in c.knobs.items())} ({c.why})" for c in chosen]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100")
    parser.add_argument("--llama", action="store_true", help="also solve the kernels of a two-layer Llama")
    args = parser.parse_args()
    target = get_target(args.target)
    print(picks(target))
    if args.llama:
        print(f"\n{llama(target)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
