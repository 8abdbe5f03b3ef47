"""Inputs rounded to small floats: an operator that kernels compute bit for bit as eager does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tessel
from tessel.quant.formats import FORMATS, quantize, rounded
from tessel.quant.scheme import scheme

pytestmark = pytest.mark.usefixtures("shared_cache")

# Of every scheme whose inputs are small floats.
INPUTS = {n: scheme(n).activation for n in ("fp8", "fp8-row", "fp8-block", "mxfp8", "mxfp4", "nvfp4")}


def hard(rows: int, k: int) -> Tensor:
    """Rows of every size, zeros, ties between codes, numbers below the smallest normal one, NaN and infinity."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=g) * torch.logspace(-44, 36, rows)[:, None]
    x[1] = 0
    x[2] = torch.randint(-12, 13, (k,), generator=g) / 8
    x[3] = torch.exp2(torch.randint(-12, 9, (k,), generator=g).float())  # powers of two: where logarithms go wrong
    x[4] = torch.nextafter(x[3], torch.zeros(k))
    x[5] = -0.0
    x[6, ::5] = 3e38
    return x


def bits(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.nan, x).view({4: torch.int32, 2: torch.int16}[x.element_size()])


@pytest.mark.parametrize("target", ["cpu", "triton-interpret"])
@pytest.mark.parametrize("name", INPUTS)
def test_kernels_give_the_bits_of_eager(name: str, target: str) -> None:
    torch._dynamo.reset()
    f = INPUTS[name]
    assert f is not None
    x = hard(17, 256)
    if f.group == -1 or f.scale == "e4m3":  # one scale for all: of numbers that it does not drown
        x = torch.where(x.abs() > 100, 0.0, x)
    fast = tessel.compile(lambda x: rounded(x, f), target=target)
    assert torch.equal(bits(fast(x)), bits(rounded(x, f)))
    x[7, 3], x[8, 200], x[9, 9] = torch.nan, torch.inf, -torch.inf
    want = rounded(x, f)
    assert torch.equal(bits(fast(x)), bits(want))
    assert want.isnan().nonzero().tolist() == [[7, 3]] and want[8, 200] == f.largest == -want[9, 9]
    (done,) = tessel.explain(fast).compilations
    assert done.kernels and not done.fallbacks and not done.calls


@pytest.mark.parametrize("target", ["cpu", "triton-interpret"])
def test_halves_and_odd_sizes(target: str) -> None:
    torch._dynamo.reset()
    f = FORMATS["mxfp4"]
    fast = tessel.compile(lambda x: rounded(x, f), target=target)
    for dtype in (torch.bfloat16, torch.float16):
        x = (torch.randn(3, 5, 96) * 3).to(dtype)
        got = fast(x)
        want = rounded(x, f)
        assert got.dtype == dtype and torch.equal(bits(got), bits(want))
        assert torch.equal(want.float(), rounded(x.float(), f)), "codes times powers of two fit into halves"


@pytest.mark.parametrize("name", INPUTS)
def test_it_is_what_quantize_gives(name: str) -> None:
    f = INPUTS[name]
    assert f is not None
    x = torch.randn(9, 256) * torch.logspace(-3, 3, 9)[:, None]
    assert torch.equal(rounded(x, f), quantize(x, f).dequantize())


def test_scales_are_powers_of_two_exactly() -> None:
    """A magnitude just below a power of two has the scale below, which a rounded logarithm would miss."""
    f = FORMATS["mxfp8"]
    for power in (-100, -3, 0, 20, 100):
        below = torch.nextafter(torch.tensor(2.0**power), torch.tensor(0.0))
        for value, scale in ((2.0**power, 2.0 ** (power - 8)), (float(below), 2.0 ** (power - 9))):
            assert quantize(torch.full((1, 32), value), f).scale.tolist() == [[scale]]


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    fast = tessel.compile(lambda x: (rounded(x, FORMATS["e4m3-row"]) * 2).sum(), target="cpu")
    (grad,) = torch.autograd.grad(fast(x), x)
    assert torch.equal(grad, torch.full_like(x, 2.0))


def test_groups_that_do_not_divide_a_row() -> None:
    with pytest.raises(tessel.TesselError, match="groups of 32 do not divide rows of 100 values"):
        rounded(torch.ones(2, 100), FORMATS["mxfp8"])
