"""Triton kernels of linear attention: against float64 in the interpreter, and compiled for absent GPUs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import triton
from test_linear_attention import compare_with, operands

import tessel
from tessel.codegen.fused_linear import linear_source
from tessel.codegen.offline import offline_compile
from tessel.codegen.source import Source
from tessel.errors import TesselError
from tessel.frontend.linear_attention_op import linear_attention
from tessel.runtime.linear_gpu import GpuLinear
from tessel.targets import Target, get_target

INTERPRET = get_target("triton-interpret")
FILE = Path(__file__).parent / "data" / "linear_resources.json"
TARGETS = ("a100", "h100", "b200", "mi300x")
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
EVERY_KIND = (("bf16", 64), ("bf16", 128))
WIDTHS = (*EVERY_KIND, ("bf16", 256), ("f32", 64), ("f32", 128), ("f32", 256))
COLUMNS = ("kernel", "digest", "shared_bytes", "registers", "spill_bytes")


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "number", "channels"])
def test_interpreted(decay: str, delta: bool, tmp_path: Path) -> None:
    kernels = GpuLinear(INTERPRET, tmp_path)
    for sizes in ((1, 2, 21, 40, 33), (2, 1, 1, 16, 5)):
        given = operands(*sizes, decay, delta, delta, torch.float32)
        compare_with(kernels, given, torch.float32, delta)


@pytest.mark.parametrize("kind", ["number", "channels"])
def test_factors_that_vanish(kind: str, tmp_path: Path) -> None:
    q, k, v, decay, beta, start = operands(1, 1, 20, 16, 16, kind, True, True, torch.float32)
    compare_with(
        GpuLinear(INTERPRET, tmp_path), [q, k, v, torch.where(decay < 0.7, 0.0, decay), beta, start], torch.float32
    )


def test_whole_graphs_run_by_them() -> None:
    """Through the compiler, on the interpreter's target: gradients too."""
    torch._dynamo.reset()
    q, k, v, decay, beta, _ = operands(1, 1, 18, 16, 16, "number", True, False, torch.float32)
    given = [x.requires_grad_() for x in (q, k, v, decay, beta)]

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return linear_attention(q, k, v, decay=decay, beta=beta)[0]

    fast = tessel.compile(fn, target="triton-interpret")
    got, want = (torch.autograd.grad(f(*given).sin().sum(), given) for f in (fast, fn))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    reasons = [c.reason for r in tessel.explain(fast).compilations for c in r.calls if "linear" in c.operator]
    assert len(reasons) == 2 and all(r.startswith("Tessel's kernel") for r in reasons)


def test_what_has_no_kernel() -> None:
    with pytest.raises(TesselError, match="registers for 256"):
        linear_source("forward", torch.float32, INTERPRET, 512, 16, {})
    with pytest.raises(TesselError, match="no kernel 'backward' with channels=False"):
        linear_source("backward", torch.float32, INTERPRET, 64, 64, {"decay": True})


def sources(target: Target) -> dict[str, Source]:
    """Kernels of every kind for keys and values of 64 and of 128 in halves, and of those that hold most for 256 and in
    full precision, by what they are."""
    made = {}
    for decay, delta, (dtype, width) in itertools.product(("number", "channels"), (False, True), WIDTHS):
        if not delta and (dtype, width) not in EVERY_KIND:
            continue
        for part in ("forward", "states", *(("backward",) if decay == "channels" else ("adjoints", "gradients"))):
            kind = {"decay": True, "channels": decay == "channels", "delta": delta, "start": True}
            kind |= {"last_grad": part not in ("forward", "states"), "keep": part == "states"}
            of = "forward" if part == "states" else part
            name = f"{part}, a {decay}{' and delta' * delta}, {width} in {dtype}"
            made[name] = linear_source(of, DTYPES[dtype], target, width, width, kind)
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_compiled_offline(target: str) -> None:
    """Every kernel is as it was when it was compiled: without spills, in the shared memory that was predicted."""
    record = get_target(target)
    assert record.limits is not None
    rows = {name: row for name, *row in json.loads(FILE.read_text())["targets"][target]}
    made = sources(record)
    assert set(rows) == set(made)
    for name, source in made.items():
        key, shared, registers, spills = rows[name]
        what = f"{name} on {target}"
        assert key == source.body_key[:16], f"{what}: another kernel; run benchmarks/linear_resources.py {target}"
        assert shared <= source.smem_bytes <= record.limits.shared_bytes_per_block, what
        assert registers <= record.limits.registers_per_thread, what
        assert spills == 0, what


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compile_offline(target: str) -> None:
    """The kernel that holds most: as it is written down by the Triton that made the record, without spills by any."""
    record, known = get_target(target), json.loads(FILE.read_text())
    name = "gradients, a number and delta, 128 in bf16"
    source = sources(record)[name]
    (got,) = offline_compile([source], record.arch)
    assert got.ok, got.error
    assert got.spills == 0 and got.shared_bytes is not None and got.shared_bytes <= source.smem_bytes
    if f"Triton {triton.__version__} " in known["about"]:
        (row,) = (row for row in known["targets"][target] if row[0] == name)
        assert got.shared_bytes == row[2]
