"""Packed products as Triton kernels: on odd sizes in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from offline_record import Recorded

import tessel
from tessel.codegen.source import Source
from tessel.codegen.triton import render
from tessel.quant.formats import FORMATS, Format, integers, quantize
from tessel.quant.linear import QuantLinear
from tessel.quant.speed import packed_kernels
from tessel.targets import Target, get_target
from tessel.tiles.lower import lower

BF16 = torch.bfloat16
WAYS: dict[str, Format] = {
    "w4a16": integers(4, 128),
    "w4a16-asym": integers(4, 128, symmetric=False),
    "w8a16": integers(8),
    "w3a16": integers(3, 128),
    "w2a16": integers(2, 64),
    **{n: FORMATS[n] for n in ("e4m3", "e4m3-row", "e4m3-block", "mxfp8", "mxfp4", "nvfp4", "nf4", "ternary")},
}


@pytest.mark.parametrize("name", WAYS)
def test_odd_sizes_in_the_interpreter(name: str) -> None:
    """m, n and the number of groups odd, words not filled: the kernel's own masks are what keeps it right."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    f = WAYS[name]
    k = 3 * f.group if f.group > 0 else 45
    linear = torch.nn.Linear(k, 19)
    layer = QuantLinear.of(linear, quantize(linear.weight.detach(), f))
    x = torch.randn(5, k)
    fast = tessel.compile(lambda x: layer(x), target="triton-interpret", options={"matmul": "template"})
    with torch.no_grad():
        want = x.double() @ layer.weight.double().T + linear.bias.double()
        torch.testing.assert_close(fast(x).double(), want, rtol=1e-5, atol=1e-5)
    (done,) = tessel.explain(fast).compilations
    assert [kernel.family for kernel in done.kernels] == ["matmul"] and not done.calls and not done.fallbacks


def sources(target: Target) -> list[tuple[str, Source]]:
    """Of every kind of format: a product for one row and for many."""
    found = []
    for name in ("w4a16", "w4a16-asym", "w8a16", "w3a16", "e4m3-row", "mxfp4"):
        for rows in (1, 1024):
            for node in packed_kernels(1024, 1024, rows, BF16, WAYS[name]):
                kernel = dataclasses.replace(lower(node), name=f"k_{len(found)}")
                found.append((f"{name}, {rows} rows", render(kernel, target)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a100", "h100", "b200", "mi300x"])
def test_packed_products_compile_offline(target: str, offline: Recorded) -> None:
    """Within what was predicted of shared memory, and without a spill."""
    record = get_target(target)
    made = sources(record)
    offline.fitting([s for _, s in made], record)


def test_every_way_is_one_kernel_that_writes_no_weight() -> None:
    for name, f in WAYS.items():
        (node,) = packed_kernels(1024, 512, 16, BF16, f)
        kernel = lower(node)
        assert kernel.family == "matmul", name
        outs = [p.type for p in kernel.params if p.out]
        assert [o.shape for o in outs] == [(16, 1024)], name
        assert max(p.type.dtype.itemsize * p.type.numel for p in kernel.params) <= 1024 * 512, "stored in few bits"
