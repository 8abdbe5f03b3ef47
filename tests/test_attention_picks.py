"""Attention of every head width on every kind of GPU: the solver picks a tile that was compiled, and that fits.

``data/attention_picks.json`` holds what the compiler made of the picks (``benchmarks/attention_picks.py``), in halves
and in full precision. A pick that is not among them has to be compiled, and to fit, before it is taken.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from offline_record import Recorded
from test_attention_kernels import TEMPLATE, kernel_of

from tessel.codegen.triton import render
from tessel.ir.node import Builder, make_input
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.passes import decode, fuse
from tessel.solve import tile
from tessel.targets import get_target
from tessel.tiles.kernel import Kernel
from tessel.tiles.lower import lower

FILE = Path(__file__).parent / "data" / "attention_picks.json"
TARGETS = ("a100", "h100", "b200", "mi300x")
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
WIDTHS = (*((w, w) for w in (40, 64, 80, 96, 128, 192, 256, 576)), (192, 128), (576, 512))
PARTS = ("forward", "keys", "queries", "decode")
# Bytes that are left: sums, rows and columns of the smallest tile are more than a lane has, even with the most warps
# that may have all registers. The solver says so of every tile.
SPILLS = {
    ("mi300x", 576, 576, "f32", "keys"): 116,
    ("mi300x", 576, 576, "f32", "queries"): 217,
    ("mi300x", 576, 512, "f32", "keys"): 95,
    ("mi300x", 576, 512, "f32", "queries"): 188,
}
KNOBS = ("BM", "BN", "num_stages", "num_warps")
COLUMNS = ("width", "value_width", "dtype", "part", *KNOBS, "shared_bytes", "registers", "spill_bytes")


@cache
def kernels_of(d: int, e: int, dtype: str) -> dict[str, Kernel]:
    """By part: forward and gradients of 8 heads of 2048, causal; one query of 32 heads on 8 with a cache of 4096."""
    q, k, v, grad = (torch.empty(1, 8, 2048, w, dtype=DTYPES[dtype], device="meta") for w in (d, d, e, e))
    row = torch.empty(1, 8, 2048, device="meta")
    given = (grad, q, k, v, None, row, row)
    made = {"forward": kernel_of("attention", (q, k, v), {"causal": True})[0]}
    for part in ("keys", "queries"):
        made[part] = kernel_of(f"attention_backward_{part}", given, {"causal": True})[0]
    return {**made, "decode": one_query(d, e, DTYPES[dtype])}


def one_query(d: int, e: int, dtype: torch.dtype) -> Kernel:
    """The kernel that computes parts of the keys side by side; reductions merge them."""
    shapes = ((1, 32, 1, d), (1, 8, 4096, d), (1, 8, 4096, e))
    inputs = [make_input(f"a{i}", TensorType(shape, dtype)) for i, shape in enumerate(shapes)]
    builder = Builder(inputs)
    node = builder.node(OPS["attention"], *(i.out for i in inputs), causal=False)
    graph = fuse.run(decode.run(builder.finish(tuple(node.outs)), TEMPLATE), TEMPLATE)
    kernels = [lower(n) for n in graph.nodes if n.op.name == "kernel"]
    (found,) = (k for k in kernels if k.family == "attention")
    assert len(kernels) > 1, "no merge: the keys are in one part"
    return found


def recorded(target: str) -> list[dict[str, int | str]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in json.loads(FILE.read_text())["targets"][target]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_picks_fit(target: str, dtype: str) -> None:
    """At every width no spills but those that are known and predicted, and shared memory within what was predicted and
    what a block has."""
    record = get_target(target)
    assert record.limits is not None
    compiled = {(r["width"], r["value_width"], r["part"]): r for r in recorded(target) if r["dtype"] == dtype}
    assert set(compiled) == {(d, e, part) for d, e in WIDTHS for part in PARTS}
    for (d, e, part), row in compiled.items():
        choice = tile(kernels_of(d, e, dtype)[part], record)
        what = f"{part} of width {d}, {e} in {dtype} on {target}"
        picked = {n: row[n] for n in KNOBS}
        assert dict(choice.knobs) == picked, f"{what}: another tile; run benchmarks/attention_picks.py {target}"
        left = SPILLS.get((target, d, e, dtype, part), 0)
        assert row["spill_bytes"] == left, what
        assert choice.resources.spills is (left > 0), what
        assert row["registers"] <= choice.resources.register_limit, what
        assert row["shared_bytes"] <= choice.resources.shared_bytes <= record.limits.shared_bytes_per_block, what


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_widest_compile(target: str, offline: Recorded) -> None:
    record = get_target(target)
    sources = [render(k, record) for k in kernels_of(576, 576, "bf16").values()]
    for source, got in zip(sources, offline(sources, record.arch), strict=True):
        assert got.ok and got.spills == 0, f"{source.name} on {target}: {got}"
        assert got.shared_bytes is not None and got.shared_bytes <= source.smem_bytes
