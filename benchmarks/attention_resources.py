"""Compile the attention templates for GPUs that need not be here and write down what the compiler allocated.

    python benchmarks/attention_resources.py            # an hour -> tests/data/attention_resources.json
    python benchmarks/attention_resources.py dk90 dq90  # these paths alone; the others' rows stay

The rows that ``benchmarks/fit_resources.py`` fits to: attention of sm_80 and gfx942, and the two passes of its
gradients (``dq``, ``dk``) of all four architectures.
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
from test_attention_kernels import kernel_of  # noqa: E402

from tessel.codegen.offline import offline_compile  # noqa: E402
from tessel.codegen.source import Source  # noqa: E402
from tessel.codegen.triton import render  # noqa: E402
from tessel.targets import Target, get_target  # noqa: E402

OUT = ROOT / "tests" / "data" / "attention_resources.json"
FORWARD = {"attn80": "a100", "attn942": "mi300x"}
TARGETS = {"80": "a100", "90": "h100", "100": "b200", "942": "mi300x"}
BACKWARD = {f"{of}{arch}": target for arch, target in TARGETS.items() for of in ("dq", "dk")}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_tiles() -> list[tuple[int, ...]]:
    """BM, BN, width, stages, warps."""
    return list(itertools.product((32, 64, 128), (32, 64, 128), (64, 128), (2, 3), (4, 8)))


def backward_tiles(by_keys: int) -> list[tuple[int, ...]]:
    """BM, BN, width, by keys, stages, warps; wide heads and three stages of small tiles only."""
    sides, small = (32, 64, 128), (32, 64)
    tiles = list(itertools.product(sides, sides, (64, 128), (by_keys,), (2,), (4, 8)))
    tiles += itertools.product(small, small, (64, 128), (by_keys,), (3,), (4,))
    tiles += itertools.product(small, small, (256,), (by_keys,), (2,), (4, 8))
    tiles += itertools.product(small, small, (192,), (by_keys,), (2,), (8,))
    return tiles


def source(tile: tuple[int, ...], target: Target, by_keys: int | None) -> Source:
    """The causal kernel of one tile."""
    q, row = meta(1, 8, 2048, tile[2]), meta(1, 8, 2048, dtype=torch.float32)
    knobs = {"BM": tile[0], "BN": tile[1], "num_stages": tile[-2], "num_warps": tile[-1]}
    if by_keys is None:
        return render(attention_kernel(q, q, q, causal=True), target, knobs)
    name = f"attention_backward_{'keys' if by_keys else 'queries'}"
    return render(kernel_of(name, (q, q, q, q, None, row, row), {"causal": True})[0], target, knobs)


def rows(path: str) -> list[list[int]]:
    """One row a tile that compiles: the tile, shared bytes, registers a thread, spilled bytes."""
    target = get_target({**FORWARD, **BACKWARD}[path])
    by_keys = None if path in FORWARD else int(path.startswith("dk"))
    tiles = forward_tiles() if by_keys is None else backward_tiles(by_keys)
    done = offline_compile([source(tile, target, by_keys) for tile in tiles], target.arch)
    return [
        [*tile, got.shared_bytes or 0, got.registers, got.spills]
        for tile, got in zip(tiles, done)
        if got.ok and got.registers is not None and got.spills is not None
    ]


def main() -> int:
    import triton

    about = (
        f"What Triton {triton.__version__} allocated for this project's causal attention (bf16), compiled offline, no "
        "GPU. columns: BM,BN,D,stages,warps,shared_bytes,regs_per_thread,spill_bytes; of its gradients (dq, dk: the "
        "passes over tiles of queries and of keys) BM,BN,D,by_keys,stages,warps and the same"
    )
    asked = sys.argv[1:] or [*FORWARD, *BACKWARD]
    known = json.loads(OUT.read_text())["paths"] if OUT.exists() else {}
    lines = []
    for path, target in {**FORWARD, **BACKWARD}.items():
        found = rows(path) if path in asked else known.get(path, {"rows": []})["rows"]
        own = ",\n".join(json.dumps(row, separators=(",", ":")) for row in found)
        lines.append(f'{json.dumps(path)}:{{"what":{json.dumps(target)},"rows":[\n{own}]}}')
        print(f"{path}: {len(found)} rows", flush=True)
    origin = "measured on a 2-core x86-64 machine without a GPU by compiling every tile offline; one row a compile"
    head = f'{{"about":{json.dumps(about)},\n"origin":{json.dumps(origin)},\n"paths":{{\n'
    OUT.write_text(head + ",\n".join(lines) + "\n}}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
