"""What a layer of few bits is predicted to take on a CPU, the kernel that it gets for that, and what has no kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tessel
from tessel.ir.node import Builder, Node, make_input
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.passes.quantize import notes
from tessel.quant import cpu_time
from tessel.quant.cpu_time import Product, product_seconds
from tessel.quant.formats import FORMATS, integers
from tessel.quant.report import LayerReport
from tessel.quant.scheme import NAMES, scheme
from tessel.quant.speed import packed_kernels, seconds, sparse_seconds
from tessel.runtime import packed_choice, packed_cpu
from tessel.targets import HostRates, get_target
from tessel.tiles.lower import lower

pytestmark = pytest.mark.usefixtures("own_cache")

BF16 = torch.bfloat16
ZEN5 = HostRates(71.6e9, 71.8e9, 90.2e9, 2, "2026-11-21", {"f32": 500e9, "bf16": 1000e9})
"""Measured on an AMD Zen 5, 2 cores."""


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> HostRates:
    monkeypatch.setattr(cpu_time, "host_measured", lambda: ZEN5)
    monkeypatch.setattr(cpu_time, "vector_bits", lambda _: 512)
    seconds.cache_clear()
    sparse_seconds.cache_clear()
    return ZEN5


def test_forms_are_those_of_the_kernels() -> None:
    """The conditions of ``packed.hpp``, ``packed_odd.hpp`` and ``int8.hpp``."""
    one = Product(1, 64, 4096, BF16, 4, groups=32)
    for change, want in (
        ({"rows": 10}, "few"),
        ({"rows": 11}, "panels"),
        ({"bits": 8, "rows": 7}, "panels"),
        ({"groups": 4096 // 32, "rows": 5}, "panels"),
        ({"groups": 4096 // 16}, "few"),
        ({"bits": 3}, "few"),
        ({"bits": 3, "rows": 11}, "panels"),
        ({"bits": 5, "k": 90}, "panels"),
        ({"k": 4100, "groups": 1}, "panels"),
        ({"bits": 8, "kind": "table"}, "columns"),
        ({"integers": True, "rows": 16}, "few"),
        ({"integers": True, "rows": 17}, "panels"),
    ):
        assert replace(one, **change).form(16) == want, change
    assert Product(1, 64, 64, BF16).form(16) == "whole" and Product(5, 64, 64, BF16, sparse=True).form(16) == "columns"


def test_few_rows_win_by_bytes_and_many_by_whole_numbers() -> None:
    def at(rows: int, **more: Any) -> float:
        return product_seconds(Product(rows, 8192, 8192, BF16, **more), ZEN5, 512)

    for rows in (1, 512):
        assert at(rows, bits=8) > 0
    assert at(1) > 1.5 * at(1, bits=8) and at(1, bits=8) > 1.3 * at(1, bits=4, groups=64)
    assert at(512) > 1.3 * at(512, bits=8, integers=True)
    assert at(512, bits=4, groups=64) > at(512, bits=8, integers=True)
    assert at(512, bits=3, groups=64) > at(512) > at(512, bits=4, groups=64)
    assert at(1024) < at(1025) and at(2048, bits=4) > 1.9 * at(1024, bits=4)


# Seconds of CPU time of one thread on that CPU, 2048 x 2048, bf16 inputs, measured 2026-11-21.
MEASURED = {
    (512, ""): 10.34e-3, (512, "w8a16"): 10.0e-3, (512, "w4a16"): 10.07e-3, (512, "w8a8"): 5.71e-3,
    (512, "w4a8"): 6.85e-3, (512, "nf4"): 10.16e-3, (512, "w3a16"): 10.5e-3, (512, "2:4"): 10.34e-3,
    (64, ""): 1.68e-3, (64, "w8a16"): 1.68e-3, (64, "w4a16"): 1.53e-3, (64, "w8a8"): 0.79e-3, (64, "nf4"): 1.67e-3,
    (1, "w8a16"): 0.18e-3, (1, "w4a16"): 0.11e-3, (1, "w8a8"): 0.083e-3, (1, "nf4"): 0.128e-3, (1, "2:4"): 0.36e-3,
    (4, "w8a16"): 0.35e-3, (4, "w4a16"): 0.19e-3, (4, "w8a8"): 0.116e-3, (4, "nf4"): 0.285e-3,
}  # fmt: skip


def test_the_constants_are_near_what_was_measured() -> None:
    one = replace(ZEN5, read_bytes_per_s=1e12, flops={n: r / 2 for n, r in ZEN5.flops.items()})
    for (rows, name), taken in MEASURED.items():
        s = scheme(name) if name else None
        p = Product(rows, 2048, 2048, BF16, sparse=s is not None and s.sparse)
        if s is not None and s.weight is not None:
            p = cpu_time.of_format(rows, 2048, 2048, BF16, s.weight, s.activation)
        ratio = product_seconds(p, one, 512) / taken
        assert 0.66 < ratio < 1.5, (rows, name, ratio)


def layers(rows: int, scheme_name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, dtype=dtype))
    return tessel.quantize(model, scheme_name), torch.randn(rows, 256).to(dtype)


def called(model: nn.Module, x: Tensor) -> str:
    """The reason of the one call that the compiled model makes."""
    torch._dynamo.reset()
    fast = tessel.compile(model, target="cpu")
    with torch.no_grad():
        want, got = model(x), fast(x)
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()
    (call,) = tessel.explain(fast).compilations[-1].calls
    return call.reason


@pytest.mark.skipif(
    not packed_cpu.multiplies_int8(get_target("cpu").features), reason="this CPU has no products of 8-bit integers"
)
def test_each_shape_gets_the_kernel_that_is_predicted_faster(rates: HostRates, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model, two shapes: whole numbers where they are cheaper, floats where they are not."""

    def predicted(p: Product, *_: Any) -> float:
        return (2e-3 if p.rows > 8 else 4e-3) if p.integers else 3e-3 if p.bits else 1e-3 if p.rows > 8 else 9e-3

    monkeypatch.setattr(packed_choice, "seconds", predicted)
    model, x = layers(16, "w8a8")
    many, few = called(model, x), called(model, x[:2])
    assert "predicted 2 ms for 16 rows by whole numbers, 3 ms by floats, 1 ms whole in float32, which is faster" in many
    assert "tessel.quantize(..., target='cpu', rows=16)" in many and "Tessel's kernel: inputs rounded" in many
    assert "predicted 3 ms for 2 rows by floats, 4 ms by whole numbers, 9 ms whole in float32" in few
    assert "which is faster" not in few and "multiplied as floats; predicted" in few

    taken: list[str] = []
    for name in ("forward", "forward_integers"):
        own = getattr(packed_cpu, name)
        monkeypatch.setattr(packed_cpu, name, lambda *a, n=name, f=own, **k: (taken.append(n), f(*a, **k))[1])
    fast = tessel.compile(model, target="cpu", dynamic=True)
    with torch.no_grad():
        for rows in (5, 16, 7, 9):
            torch.testing.assert_close(fast(x[:rows]), model(x[:rows]), rtol=2e-2, atol=2e-2)
    assert taken == ["forward", "forward_integers", "forward", "forward_integers"], "each call by its rows"
    (call,) = tessel.explain(fast).compilations[-1].calls
    assert (
        "as its rows are; predicted 3 ms for 1 rows by floats" in call.reason and "for 512 rows by whole" in call.reason
    )


def test_without_rates_whole_numbers_are_multiplied_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_time, "host_measured", lambda: None)
    if packed_cpu.multiplies_int8(get_target("cpu").features):
        assert "whole numbers; the CPU's rates are not known" in called(*layers(2, "w8a8"))
    assert "predicted" not in called(*layers(2, "w4a16"))


@pytest.mark.parametrize("name", ["w3a16", "2:4"])
def test_a_layer_that_would_be_slower_on_the_cpu_stays_whole_and_is_listed(name: str, rates: HostRates) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False, dtype=BF16))
    slow = tessel.quantize(model, name, target="cpu", rows=512)
    (row,) = slow.quantization.whole
    assert type(slow[0]) is nn.Linear and row.slower.after > row.slower.before and row.slower.rows == 512
    said = str(slow.quantization)
    assert f"left whole, since {name} is predicted to be slower on cpu: 1 layers" in said and " whole\n" in said
    (held,) = json.loads(slow.quantization.to_json())["whole"]
    assert held["slower"]["after"] == row.slower.after and LayerReport.from_dict(held) == row
    fast = tessel.quantize(model, "2:4" if name == "2:4" else "w4a16", target="cpu", rows=1)
    (row,) = fast.quantization.layers
    assert row.speed.after < row.speed.before and row.slower is None


# ---------------------------------------------------------------- schemes without a kernel


def graph_of(op: str, dtype: torch.dtype, **attrs: Any) -> Any:
    f32 = torch.float32
    inputs: list[Node] = [make_input("x", TensorType((4, 64), dtype))]
    if op == "sparse_linear":
        inputs += [make_input("v", TensorType((8, 32), dtype)), make_input("m", TensorType((8, 2), torch.int32))]
    else:
        inputs += [make_input("w", TensorType((8, 16), torch.int32)), make_input("s", TensorType((8, 1), f32))]
    builder = Builder(inputs)
    return builder.finish((builder.add(OPS[op], *(i.out for i in inputs), **attrs),))


def test_what_no_kernel_computes_is_named() -> None:
    eight = {"bits": 8, "inputs": 8}
    for native, op, dtype, attrs, words in (
        (True, "packed_linear", torch.float16, {"bits": 8}, "no kernel for weights of few bits and inputs of float16"),
        (True, "sparse_linear", torch.float16, {}, "no kernel for 2:4 weights and inputs of float16 on the CPU"),
        (True, "packed_linear", BF16, eight, ""),
        (False, "packed_linear", BF16, eight, "no kernel here multiplies integers: inputs of 8 bits are multiplied as"),
        (False, "packed_linear", BF16, {"bits": 8}, ""),
        (False, "sparse_linear", BF16, {}, "no kernel here uses products of 2:4 weights: zeros are put in, bfloat16"),
    ):
        said = notes(graph_of(op, dtype, **attrs), native)
        assert len(said) == bool(words) and words in "".join(said), (op, dtype, said)


@pytest.mark.parametrize("name", ["2:4", "w8a16"])
def test_halves_on_the_cpu_are_right_and_named(name: str) -> None:
    model, x = layers(3, name, torch.float16)
    fast = tessel.compile(model, target="cpu")
    with torch.no_grad():
        want, got = model(x).double(), fast(x).double()
    assert (got - want).abs().max() <= 1e-2 * want.abs().max()
    (done,) = tessel.explain(fast).compilations
    assert any("inputs of float16 on the CPU: the weight is written out" in n for n in done.notes), done.notes


@pytest.mark.parametrize("name", [n for n in NAMES if scheme(n).weight is not None])
def test_every_scheme_has_kernels_on_every_gpu(name: str) -> None:
    """What a GPU has no products of (small floats on an A100, say) becomes numbers inside a kernel: nothing is left to
    torch. (``packed_kernels`` raises where something is; kernels do not depend on the GPU before they are tiled.)"""
    s = scheme(name)
    assert s.weight is not None
    for rows in (1, 256):
        nodes = packed_kernels(256, 512, rows, BF16, s.weight, s.activation)
        assert any(lower(node).family == "matmul" for node in nodes)


@pytest.mark.parametrize("target", ["a100", "mi300x"])
@pytest.mark.parametrize("name", ["fp8", "nvfp4", "2:4"])
def test_schemes_on_targets_without_such_products(name: str, target: str) -> None:
    """Priced as the kernels that there are; a layer that is slower so stays whole, by name."""
    device, s = get_target(target), scheme(name)
    if s.sparse:
        assert 0 < sparse_seconds(1024, 1024, 16, BF16, device) < 1e-2
    else:
        assert 0 < seconds(1024, 1024, 16, BF16, s.weight, device, s.activation) < 1e-2
    small = tessel.quantize(nn.Sequential(nn.Linear(512, 512, dtype=BF16)), name, target=target, rows=4096)
    report = small.quantization
    for row in (*report.layers, *report.whole):
        assert row.speed is not None and (row.slower is None) == (row in report.layers)


def test_the_record_of_rates_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path))
    p = cpu_time.of_format(1, 1024, 1024, BF16, FORMATS["nf4"], None)
    assert (p.kind, p.groups, p.integers) == ("table", 16, False) and cpu_time.seconds(p) is None
    from tessel.targets.host import write_record

    write_record(get_target("cpu"), ZEN5)
    assert cpu_time.seconds(p) == pytest.approx(
        product_seconds(p, ZEN5, cpu_time.vector_bits(get_target("cpu")) or 128)
    )
    eight = cpu_time.of_format(1, 1024, 1024, BF16, integers(8), integers(8))
    assert eight.integers and not cpu_time.of_format(1, 1024, 1024, BF16, FORMATS["e4m3-row"], integers(8)).integers
