"""Compile the attention template for GPUs that need not be here and write down what the compiler allocated.

    python benchmarks/attention_resources.py      # minutes -> tests/data/attention_resources.json

The rows that ``benchmarks/fit_resources.py`` fits the attention paths of sm_80 and gfx942 to.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kernels import attention_kernel  # noqa: E402

from tessel.codegen.offline import offline_compile  # noqa: E402
from tessel.codegen.triton import render  # noqa: E402
from tessel.targets import get_target  # noqa: E402

OUT = ROOT / "tests" / "data" / "attention_resources.json"
PATHS = {"attn80": "a100", "attn942": "mi300x"}


def rows(target: str) -> list[list[int]]:
    """One row a tile that compiles: BM, BN, width, stages, warps, shared bytes, registers a thread, spilled bytes."""
    record = get_target(target)
    tiles = list(itertools.product((32, 64, 128), (32, 64, 128), (64, 128), (2, 3), (4, 8)))
    sources = []
    for bm, bn, d, stages, warps in tiles:
        heads = [torch.empty(1, 8, 2048, d, dtype=torch.bfloat16, device="meta") for _ in range(3)]
        knobs = {"BM": bm, "BN": bn, "num_stages": stages, "num_warps": warps}
        sources.append(render(attention_kernel(*heads, causal=True), record, knobs))
    done = offline_compile(sources, record.arch)
    return [
        [*tile, got.shared_bytes or 0, got.registers, got.spills]
        for tile, got in zip(tiles, done)
        if got.ok and got.registers is not None and got.spills is not None
    ]


def main() -> int:
    import triton

    about = (
        f"What Triton {triton.__version__} allocated for this project's causal attention (bf16), compiled offline, no "
        "GPU. columns: BM,BN,D,stages,warps,shared_bytes,regs_per_thread,spill_bytes"
    )
    lines = []
    for path, target in PATHS.items():
        own = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows(target))
        lines.append(f'{json.dumps(path)}:{{"what":{json.dumps(target)},"rows":[\n{own}]}}')
        print(f"{path}: {own.count(chr(10)) + 1} rows", flush=True)
    origin = "measured on a 2-core x86-64 machine without a GPU by compiling every tile offline; one row a compile"
    head = f'{{"about":{json.dumps(about)},\n"origin":{json.dumps(origin)},\n"paths":{{\n'
    OUT.write_text(head + ",\n".join(lines) + "\n}}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
