"""Work on weights some rows at a time: what it gives does not depend on how many, and sums are as exact as said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tessel.errors import TesselError
from tessel.ops import blocks
from tessel.ops.packed import dequantized
from tessel.ops.sparse import dense
from tessel.quant.formats import FORMATS, Format, integers, quantize
from tessel.quant.linear import pack, stored, unpack
from tessel.quant.moments import energy, shape_of
from tessel.quant.sparse import kept_of
from tessel.quant.sqnr import sqnr

EVERY: dict[str, Format] = {
    **FORMATS,
    "w8": integers(8),
    "w4": integers(4, 32),
    "w3": integers(3, 64, symmetric=False),
    "w5-minimum": integers(5, 16, minimum=True),
    "w2-tensor": integers(2, -1),
}


def some(n: int, k: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * torch.rand(n, 1, generator=g).exp()


@pytest.mark.parametrize("name", EVERY)
def test_rows_at_a_time_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, x = EVERY[name], some(200, 256)

    def everything() -> list[Tensor | None]:
        q = quantize(x, f)
        words, scale, zero, table = stored(q, x.device)
        made = dequantized(words, scale, zero, table, f.bits, 256, torch.float32)
        return [q.codes, q.scale, q.zero, q.dequantize(), words, made, unpack(words, f.bits, 256)]

    monkeypatch.setattr(blocks, "VALUES", 1 << 30)
    want = everything()
    for values in (1, 700, 4096):
        monkeypatch.setattr(blocks, "VALUES", values)
        for w, g in zip(want, everything(), strict=True):
            assert (w is None and g is None) or torch.equal(w, g), f"{values} values at a time"
    assert torch.allclose(want[3], want[5], atol=1e-6), "what is stored is what was rounded to"  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 64)])
def test_other_ranks(shape: tuple[int, ...]) -> None:
    x = some(30, shape[-1]).reshape(-1)[: math.prod(shape)].reshape(shape)
    for f in (integers(8), integers(4, 1), integers(4, -1), integers(4, 1, symmetric=False)):
        q = quantize(x, f)
        assert q.codes.shape == q.dequantize().shape == x.shape and q.scale.dim() == x.dim()
        assert sqnr(x, q.dequantize()) > 10


def test_two_of_four_and_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sorting; equal ones keep the first."""
    x = torch.randint(0, 4, (40, 64), generator=torch.Generator().manual_seed(1)).float()
    order = x.unflatten(1, (-1, 4)).sort(dim=-1, descending=True, stable=True).indices[..., :2]
    want = torch.zeros(40, 16, 4, dtype=torch.bool).scatter_(-1, order, True).flatten(1)
    for values in (1, 300, 1 << 20):
        monkeypatch.setattr(blocks, "VALUES", values)
        kept = kept_of(x)
        assert torch.equal(kept, want)
        assert torch.equal(dense(x[kept].reshape(40, 32), pack(kept, 1)), x * kept)


def test_sums_are_as_exact_as_said() -> None:
    """1e-5 dB of a signal-to-noise ratio, 1e-5 of a kurtosis, on a weight of several blocks, and far from 1."""
    x = some(300, 4096)
    for size in (1.0, 2.0**-60, 2.0**70):
        own = x * size
        q = quantize(own, integers(4, 128)).dequantize()
        signal, noise = own.double().square().sum(), (own.double() - q.double()).square().sum()
        assert sqnr(own, q) == pytest.approx(10 * math.log10(signal / noise), abs=1e-5)
        assert energy(own) == pytest.approx(float(signal), rel=1e-6)
        off = own.double() - own.double().mean()
        found = shape_of(own)
        assert found.kurtosis == pytest.approx(float(off.pow(4).mean() / off.square().mean() ** 2), rel=1e-5)
        assert torch.equal(found.largest, own.abs().amax(0))
    half = x.to(torch.bfloat16)
    assert sqnr(half, half) == math.inf and sqnr(torch.zeros(3), torch.ones(3)) == -math.inf
    assert sqnr(x, x + 1e-7) == pytest.approx(sqnr(x.double(), (x + 1e-7).double()), abs=1e-3)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x = 100 + some(64, 512)
    off = x.double() - x.double().mean()
    want = float(off.pow(4).mean() / off.square().mean() ** 2)
    assert shape_of(x).kurtosis == pytest.approx(want, rel=1e-4)
    x[0, 0] = 1e4
    off = x.double() - x.double().mean()
    assert shape_of(x).kurtosis == pytest.approx(float(off.pow(4).mean() / off.square().mean() ** 2), rel=1e-4)


def test_values_that_have_no_shape() -> None:
    assert shape_of(torch.full((4, 8), 3.7)).kurtosis is None
    for bad in (math.nan, math.inf):
        x = some(4, 8)
        x[2, 3] = bad
        found = shape_of(x)
        assert found.kurtosis is None and not torch.isfinite(found.largest).all()
        for f in (integers(4), integers(4, 4, symmetric=False), FORMATS["nvfp4"], FORMATS["e4m3"]):
            with pytest.raises(TesselError, match="1 of 32 values are NaN or infinite"):
                quantize(x.reshape(1, 32), f)
