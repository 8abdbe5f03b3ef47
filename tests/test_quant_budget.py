"""Bits by budget for whole models: what is promised is kept, and what cannot be is said with both numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import tessel
from tessel.errors import TesselError
from tessel.quant.bits import CONSTRAINTS, parse_budget
from tessel.quant.budget import Choice, Layer, frontier
from tessel.quant.formats import integers
from tessel.quant.linear import QuantLinear
from tessel.quant.speed import stored_bytes
from tessel.quant.sqnr import sqnr


class Uneven(nn.Module):
    """Six layers added to a stream, the last a thousand times as much as the first."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        for layer in self.layers:
            layer.weight.data = torch.randn(width, width, generator=g) / width**0.5

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + 10.0 ** (i / 2 - 2.5) * layer(torch.tanh(x))
        return x


@pytest.fixture(scope="module")
def uneven() -> tuple[nn.Module, list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    return Uneven().eval(), [torch.randn(64, 128, generator=g) for _ in range(3)]


def result_db(model: nn.Module, small: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return sqnr(torch.cat([model(x) for x in batches]), torch.cat([small(x) for x in batches]))


def stored(model: nn.Module) -> tuple[int, int]:
    """Bits and weights of the quantized layers, whole ones in 32."""
    bits = weights = 0
    for m in model.modules():
        if isinstance(m, QuantLinear):
            bits += 8 * sum(t.numel() * t.element_size() for t in (m.words, m.scale, m.zero) if t is not None)
            weights += m.in_features * m.out_features
        elif type(m) is nn.Linear:
            bits, weights = bits + 32 * m.weight.numel(), weights + m.weight.numel()
    return bits, weights


@pytest.mark.parametrize("scheme", [None, "w4a16-asym"])
def test_an_average_of_bits(uneven: tuple[nn.Module, list[Tensor]], scheme: str | None) -> None:
    """Within the budget, better than every layer alike, and the error is near the one that was predicted."""
    model, data = uneven
    small = tessel.quantize(model, scheme, data, budget="4.5bits")
    bits, weights = stored(small)
    said = small.quantization.bits
    assert 4.2 < bits / weights <= 4.5 and said.taken == pytest.approx(bits / weights)
    alike = tessel.quantize(model, "w4a16-g64" if scheme is None else "w4a16-g128-asym", data)
    got = result_db(model, small, data)
    assert got > result_db(model, alike, data) + 4
    assert got == pytest.approx(said.sqnr, abs=2.0)
    gains = list(said.gains.values())
    assert gains == sorted(gains) and gains[-1] > 1e4 * gains[0], "the errors of later layers count for more"
    assert len(said.frontier) > 20 and said.frontier == sorted(said.frontier)
    assert "budget 4.5bits" in str(small.quantization) and set(said.choices) == {f"layers.{i}" for i in range(6)}


def test_a_size_of_everything(uneven: tuple[nn.Module, list[Tensor]]) -> None:
    model, data = uneven
    small = tessel.quantize(model, None, data, budget="64KiB", method="gptq")
    held = sum(p.numel() * p.element_size() for p in small.parameters())
    held += sum(b.numel() * b.element_size() for b in small.buffers())
    assert 56 * 1024 < held <= 64 * 1024
    assert small.quantization.bits.taken == pytest.approx(held)


def test_a_signal_to_noise_ratio(uneven: tuple[nn.Module, list[Tensor]]) -> None:
    model, data = uneven
    small = tessel.quantize(model, None, data, budget="35dB")
    assert result_db(model, small, data) > 34
    bits, weights = stored(small)
    alike = next(b for b in (3, 4, 5, 6, 8) if result_db(model, tessel.quantize(model, f"w{b}a16"), data) > 34)
    per = 32 // alike
    assert bits / weights < (32 / per + 0.25) * 0.8, "as good, and smaller than all layers alike"


def test_without_data_the_weights_count() -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128))
    small = tessel.quantize(model, None, budget="30dB", skip=())
    assert small.quantization.bits.of == "the weights"
    pairs = [(m.weight.detach(), s.weight) for m, s in zip(model, small)]
    noise = sum(float((w - q).square().sum() / w.square().sum()) / 2 for w, q in pairs)
    assert -10 * math.log10(noise) == pytest.approx(small.quantization.bits.sqnr, abs=0.01)
    assert small.quantization.bits.sqnr >= 30


def test_a_predicted_time() -> None:
    """On a GPU that is not here: less time than four bits everywhere is refused with both numbers."""
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16))
    data = [torch.randn(4, 4096, dtype=torch.bfloat16)]
    with pytest.raises(TesselError, match=r"budget '10ns': |budget '0.01us': .* µs is the least"):
        tessel.quantize(model, None, data, budget="0.01us", target="h100", widths=(4, 8))
    small = tessel.quantize(model, None, data, budget="1s", target="h100", widths=(4, 8))
    assert small.quantization.bits.choices["0"] == "whole", "with time enough nothing is rounded"
    many = tessel.quantize(model, None, data, budget="20dB", target="h100", rows=4096, widths=(4,))
    refused = many.quantization.bits.refused["0"]
    assert len(refused) == 4 and all("(slower than whole: " in why for why in refused)
    assert many.quantization.bits.choices["0"] == "whole"
    with pytest.raises(TesselError, match="name the target"):
        tessel.quantize(model, None, data, budget="1s")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("2bits", r"budget '2bits': 2\.25 bits a weight is the least"),
        ("1KiB", r"budget '1KiB': .* is the least that these layers can have, and .* is what stays whole"),
        ("4.25", "expected a number and a unit"),
        ("fourbits", "expected a number and a unit"),
        ("4parsecs", "unknown unit 'parsecs'"),
        ("0bits", "more than nothing"),
    ],
)
def test_budgets_that_nothing_meets(budget: str, words: str) -> None:
    with pytest.raises(TesselError, match=words):
        tessel.quantize(nn.Sequential(nn.Linear(128, 128)), None, [torch.randn(8, 128)], budget=budget, skip=())


def test_neither_scheme_nor_budget() -> None:
    with pytest.raises(TesselError, match="name a scheme"):
        tessel.quantize(nn.Sequential(nn.Linear(128, 128)))


def test_constraints_by_name() -> None:
    """k = 192 in three: shards of 64 hold groups of 32 and 64, of the words of 4 and 8 bits only."""
    model = nn.Sequential(nn.Linear(192, 32))
    small = tessel.quantize(model, None, budget="5bits", shards=3)
    refused = " ".join(small.quantization.bits.refused["0"])
    assert "w4-g128 (groups divide k: 192 % 128 = 64)" in refused
    assert "w4-channel (groups divide shards: 3 shards would share a scale)" in refused
    assert "w3-g32 (words divide shards: a group of 32 codes ends inside a word of 10)" in refused
    assert "w4-g32 (" not in refused and "w8-g64 (" not in refused
    assert small[0].format in (integers(4, 32), integers(4, 64))
    assert "could not have" in str(small.quantization)
    by_name = {c.name: c.broken for c in CONSTRAINTS}
    assert by_name["tiles lie in groups"](8, 80, integers(4, 40), 1) and by_name["groups divide shards"](
        8, 100, integers(4, 20), 3
    )


def test_what_is_no_number_is_named() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(TesselError, match="quantize: 1: .*NaN or infinit"):
        tessel.quantize(model, None, budget="4bits")
    model[1].weight.data[0, 0] = 1.0
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(TesselError, match="quantize: 1: .*NaN or infinit"):
        tessel.quantize(model, None, [torch.ones(2, 128)], budget="4bits")
    model[1].weight.data[0, 0] = 1.0
    with pytest.raises(TesselError, match="calibration gives 0 NaN or infinite inputs"):
        tessel.quantize(model, None, [torch.full((2, 128), math.inf)], budget="4bits")


def test_stored_bytes_are_those_of_a_layer() -> None:
    for f in (integers(4, 32), integers(3, 64), integers(8), integers(4, 32, symmetric=False), integers(5, 128)):
        from tessel.quant.formats import quantize

        linear = nn.Linear(256, 48, bias=False)
        layer = QuantLinear.of(linear, quantize(linear.weight.detach(), f))
        held = sum(t.numel() * t.element_size() for t in layer.buffers())
        assert stored_bytes(48, 256, f, torch.float32) == held


def test_many_layers_take_seconds_and_stay_exact_where_sizes_repeat() -> None:
    """224 layers of four shapes, as a large Llama has: sizes repeat, so that few points stay alive."""
    g = torch.Generator().manual_seed(0)
    layers = []
    for i in range(224):
        shape = (4096 * 4096, 4096 * 1024, 4096 * 14336)[i % 3]
        losses = torch.rand(6, generator=g).tolist()
        ways = zip((2.25, 3.45, 4.25, 5.58, 6.65, 8.0), losses)
        layers.append(Layer(str(i), tuple(Choice("", b * shape, loss * 4.0**-b) for b, loss in ways)))
    points = frontier(layers, most=2000)
    assert points[0][0] == pytest.approx(sum(x.choices[0].size for x in layers))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))


def test_budgets_are_read() -> None:
    got = {
        t: (b.kind, b.value) for t in ("4.25bits", "1bit", "2 MB", "1.5GiB", "20dB", "3ms") if (b := parse_budget(t))
    }
    assert got == {
        "4.25bits": ("bits", 4.25), "1bit": ("bits", 1.0), "2 MB": ("bytes", 2e6), "1.5GiB": ("bytes", 1.5 * 2**30),
        "20dB": ("dB", 20.0), "3ms": ("seconds", pytest.approx(3e-3)),
    }  # fmt: skip
