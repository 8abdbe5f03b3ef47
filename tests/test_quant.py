"""Few-bit formats, calibration and bits by budget against closed forms and measured figures.

The figures of SQNR, of outliers and of loss ratios are a table of measurements on N(0, 1) values, made with another
implementation (float64 numpy, 2-core x86-64); the spreads are those of repeated runs here.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessel.errors import TesselError
from tessel.quant.budget import Choice, Layer, assign, frontier
from tessel.quant.formats import FORMATS, WHOLE_ROW, Format, integers, quantize, round_float
from tessel.quant.hessian import damped, gptq, hessian, turboboa
from tessel.quant.scheme import scheme
from tessel.quant.sqnr import best_uniform, expected, lloyd_max, rate_distortion, sqnr
from tessel.quant.transforms import awq_scales, hadamard, rotate, signs, smooth_scales


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))


def error_db(x: Tensor, format: Format) -> float:
    return sqnr(x, quantize(x, format).dequantize())


# bits: rate-distortion, Lloyd-Max, best uniform (dB, step), symmetric g32, g128, a row of 4096, asymmetric g128
TABLE = {
    2: (12.04, 9.30, 9.25, 0.9957, 3.64, 2.31, 0.83, 5.96),
    3: (18.06, 14.62, 14.27, 0.5860, 12.90, 11.25, 8.71, 13.33),
    4: (24.08, 20.22, 19.38, 0.3352, 20.26, 18.61, 16.07, 19.95),
    5: (30.10, 26.01, 24.57, 0.1881, 26.88, 25.23, 22.70, 26.26),
    6: (36.12, 31.91, 29.83, 0.1041, 33.19, 31.54, 29.00, 32.42),
    8: (48.16, None, 40.57, 0.0308, 45.43, 43.78, 41.25, 44.56),
}


@pytest.mark.parametrize("bits", TABLE)
def test_sqnr_of_integers(bits: int, normal: Tensor) -> None:
    bound, lloyd, uniform, step, *measured = TABLE[bits]
    assert rate_distortion(bits) == pytest.approx(bound, abs=0.006)
    if lloyd is not None:
        assert lloyd_max(bits)[1] == pytest.approx(lloyd, abs=0.01)
    assert best_uniform(bits) == (pytest.approx(step, abs=1e-4), pytest.approx(uniform, abs=0.01))
    formats = [integers(bits, g) for g in (32, 128, WHOLE_ROW)] + [integers(bits, 128, symmetric=False)]
    got = [error_db(normal, f) for f in formats]
    assert got == pytest.approx(measured, abs=0.1)
    if bits > 3:
        assert got[:3] == pytest.approx([expected(bits, g) for g in (32, 128, 4096)], abs=0.15)


@pytest.mark.parametrize(
    ("name", "want"),
    [("e4m3", 31.5), ("mxfp8", 30.65), ("mxfp6", 30.94), ("mxfp4", 18.79), ("nvfp4", 20.44), ("nf4", 20.73)],
)
def test_sqnr_of_small_floats(name: str, want: float, normal: Tensor) -> None:
    assert error_db(normal, FORMATS[name]) == pytest.approx(want, abs=0.06)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_floats_round_as_torch_does(dtype: torch.dtype) -> None:
    exponent, mantissa = {torch.float8_e4m3fn: (4, 3), torch.float8_e5m2: (5, 2)}[dtype]
    top = torch.finfo(dtype).max
    x = torch.cat([torch.randn(4000) * 10.0**e for e in range(-8, 3)]).clamp(-top, top)
    assert torch.equal(round_float(x, exponent, mantissa, top), x.to(dtype).float())


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.sampled_from([WHOLE_ROW, -1, 4, 8]), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_codes_fit_their_bits_and_err_by_half_a_step(bits: int, group: int, sym: bool, low: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 16, generator=g) * 10 ** (torch.rand(3, 1, generator=g) * 8 - 4) + torch.randn(1, generator=g)
    q = quantize(x, integers(bits, group, sym, minimum=low))
    top = 2 ** (bits - 1) - 1 if sym and not low else 2**bits - 1
    assert torch.equal(q.codes, q.codes.round()) and float(q.codes.abs().max()) <= top
    step = q.scale.amax() if group == -1 else q.scale.repeat_interleave(16 if group == 0 else group, -1)
    # An integer zero point moves both ends of the range by up to half a step more.
    room = 0.5 if sym or low else 1.0
    assert ((q.dequantize() - x).abs() <= step * room * (1 + 1e-5) + x.abs() * 1e-6).all()


def test_constant_groups_and_zeros_come_back() -> None:
    x = torch.tensor([[0.0, 0.0, 3.0, 3.0]])
    for format in (
        integers(4, 2),
        integers(4, 2, symmetric=False),
        integers(2, 2, minimum=True),
        FORMATS["e4m3"],
    ):
        assert quantize(x, format).dequantize() == pytest.approx(x, rel=1e-6)


def test_blocks_share_a_scale_over_rows() -> None:
    x = torch.randn(200, 256)
    q = quantize(x, FORMATS["e4m3-block"])
    assert q.scale.shape == (2, 2)
    assert q.scale[1, 1] == pytest.approx(float(x[128:, 128:].abs().max()) / 448)
    assert sqnr(x, q.dequantize()) > 31


def test_two_of_four_keep_the_energy(normal: Tensor) -> None:
    groups = normal.reshape(-1, 4)
    kept = groups.abs().topk(2, -1).values
    assert float(kept.square().sum() / groups.square().sum()) == pytest.approx(0.8678, abs=0.001)


# ---------------------------------------------------------------- Hessians


def correlated(size: int, rho: float = 0.9) -> Tensor:
    """The covariance of an AR(1) process."""
    i = torch.arange(size)
    return (rho ** (i[:, None] - i[None]).abs()).double()


def losses(rho: float, seed: int) -> tuple[float, float, float]:
    """Of rounding to nearest, of GPTQ, and what theory says of GPTQ: ``sum s^2 / (12 U_ii^2)`` a row."""
    g = torch.Generator().manual_seed(seed)
    k, f = 256, integers(4)
    factor = torch.linalg.cholesky(correlated(k, rho)) if rho else torch.eye(k, dtype=torch.float64)
    h = hessian(torch.randn(8 * k, k, generator=g, dtype=torch.float64) @ factor.T)
    w = torch.randn(64, k, generator=g)
    near = quantize(w, f)
    error = w.double() - near.dequantize().double()
    hd = damped(h)
    u = torch.linalg.cholesky(torch.linalg.inv(hd), upper=True)
    theory = float((near.scale.double().square() / 12 / u.diagonal().square()).sum())
    return float(((error @ hd) * error).sum()), gptq(w, h, f).loss, theory


def test_gptq_wins_what_theory_says_and_nothing_on_uncorrelated_inputs() -> None:
    runs = [losses(0.9, seed) for seed in range(4)]
    assert sum(r / g for r, g, _ in runs) / 4 == pytest.approx(4.99, abs=0.3)
    assert all(g == pytest.approx(t, rel=0.05) for _, g, t in runs)
    r, g, _ = losses(0.0, 5)
    assert r / g == pytest.approx(1.06, abs=0.03)


def test_rounding_to_nearest_loses_what_theory_says() -> None:
    """``sum s^2 H_jj / 12``: errors of a step's width, alike and unrelated."""
    k, f, g = 256, integers(4), torch.Generator().manual_seed(0)
    hd, w = damped(correlated(k)), torch.randn(256, k, generator=g)
    near = quantize(w, f)
    error = w.double() - near.dequantize().double()
    theory = float(near.scale.double().square().sum() * hd.diagonal().sum() / 12)
    assert float(((error @ hd) * error).sum()) == pytest.approx(theory, rel=0.05)


def test_gptq_loss_is_that_of_the_weight_it_gives() -> None:
    h = hessian(torch.randn(500, 64) @ torch.randn(64, 64))
    w = torch.randn(24, 64)
    for f in (integers(4), integers(3, 16), integers(4, -1), FORMATS["nf4"], FORMATS["mxfp4"]):
        got = gptq(w, h, f)
        error = w.double() - got.weight.dequantize().double()
        assert got.loss == pytest.approx(float(((error @ damped(h)) * error).sum()), rel=1e-4)
        near = w.double() - quantize(w, f).dequantize().double()
        assert got.loss < float(((near @ damped(h)) * near).sum())


def test_rows_make_up_for_rows() -> None:
    """One row at a time is best; all at once is GPTQ; with AR(0.9) on both sides both factors near a fifth multiply."""
    n, k, f = 64, 64, integers(4)
    h, g = correlated(k), correlated(n)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    error = w.double() - quantize(w, f).dequantize().double()
    near = float(((error @ damped(h)) * (damped(g) @ error)).sum())
    ratios = [turboboa(w, h, g, f, rows).loss / near for rows in (1, 4, 16, 64)]
    assert ratios == sorted(ratios)
    assert 0.04 < ratios[0] < 0.08 and 0.2 < ratios[-1] < 0.3
    assert torch.equal(turboboa(w, h, g, f, rows=n).weight.codes, gptq(w, h, f).weight.codes)


def test_no_factor_means_rounded_to_nearest_and_said() -> None:
    w = torch.randn(4, 8)
    broken = -torch.eye(8)
    got = gptq(w, broken, integers(4))
    assert got.fallback.startswith("rounded to nearest: ")
    assert torch.equal(got.weight.codes, quantize(w, integers(4)).codes)


# ---------------------------------------------------------------- outliers


def linear_db(x: Tensor, w: Tensor, bits: int) -> float:
    got = [quantize(t, integers(bits)).dequantize() for t in (x, w)]
    return sqnr(x @ w.T, got[0] @ got[1].T)


@pytest.mark.parametrize(
    ("channels", "times", "bits", "want"),
    [(8, 50, 8, (26.5, 39.3, 40.1)), (4, 20, 4, (4.9, None, 14.4)), (0, 1, 8, (39.1, 39.1, 39.1))],
)
def test_planted_outliers(channels: int, times: float, bits: int, want: tuple[float | None, ...]) -> None:
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(512, 1024, generator=g), torch.randn(256, 1024, generator=g)
    x[:, torch.randperm(1024, generator=g)[:channels]] *= times
    s, sign = smooth_scales(x.abs().amax(0), w), signs(1024)
    got = (
        linear_db(x, w, bits),
        linear_db(x / s, w * s, bits),
        linear_db(rotate(x, sign), rotate(w, sign), bits),
    )
    assert all(a is None or b == pytest.approx(a, abs=0.35) for a, b in zip(want, got, strict=True)), got


@pytest.mark.parametrize("size", [1, 2, 12, 64, 96])
def test_rotation_is_orthogonal_and_its_own_matrix(size: int) -> None:
    sign = signs(size, 7)
    r = hadamard(size, sign)
    assert r @ r.T == pytest.approx(torch.eye(size), abs=1e-5)
    x = torch.randn(3, size)
    assert rotate(x, sign) == pytest.approx(x @ r, abs=1e-5)


def test_awq_is_never_worse_than_nearest_and_better_with_outliers() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, f = torch.randn(256, 128, generator=g), torch.randn(64, 128, generator=g), integers(4, 32)
    x[:, :4] *= 30
    s = awq_scales(x, w, f)
    near, scaled = quantize(w, f).dequantize(), quantize(w * s, f).dequantize() / s
    assert sqnr(x @ w.T, x @ scaled.T) > sqnr(x @ w.T, x @ near.T) + 3


# ---------------------------------------------------------------- budgets


def test_budget_equals_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(40):
        layers = [
            Layer(str(i), tuple(Choice(str(j), rng.randint(1, 9), rng.random()) for j in range(rng.randint(1, 4))))
            for i in range(rng.randint(1, 5))
        ]
        every = [
            (sum(c.size for c in cs), sum(c.loss for c in cs)) for cs in itertools.product(*(x.choices for x in layers))
        ]
        budget = rng.randint(3, 40)
        fits = [loss for size, loss in every if size <= budget]
        if not fits:
            with pytest.raises(TesselError, match=f"a budget of {budget}: the least that these layers can take is"):
                assign(layers, size=budget)
            continue
        assert sum(c.loss for c in assign(layers, size=budget)) == pytest.approx(min(fits))
        limit = min(fits)
        assert sum(c.size for c in assign(layers, loss=limit + 1e-12)) == min(s for s, d in every if d <= limit + 1e-9)


def test_a_thinned_frontier_still_fits_and_is_near() -> None:
    rng = random.Random(1)
    layers = [Layer(str(i), tuple(Choice("", rng.random(), rng.random()) for _ in range(6))) for i in range(12)]
    exact, thin = frontier(layers), frontier(layers, most=200)
    for size in (3.0, 5.0, 7.0):
        full, rough = (min(p[1] for p in points if p[0] <= size) for points in (exact, thin))
        assert full <= rough <= full * 1.05


# ---------------------------------------------------------------- schemes and bad input


def test_schemes_join_and_refuse() -> None:
    s = scheme("w4a16-g64+kv2")
    assert (s.weight, s.keys, s.recent) == (integers(4, 64), replace(integers(2, 32, minimum=True), scale="f16"), 128)
    assert scheme("w8a16").weight == integers(8) and scheme("w1a16").weight == integers(1, 128, symmetric=False)
    assert scheme("w4a16-channel").weight == integers(4) and scheme("w4a8").activation == integers(8)
    assert scheme("w4a16-asym").weight == integers(4, 128, symmetric=False)
    with pytest.raises(TesselError, match="says twice what becomes of weight"):
        scheme("w4a16+nf4")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize(torch.tensor([1.0, math.nan]), integers(4)), "1 of 2 values are NaN or infinite"),
        (lambda: quantize(torch.ones(2, 100), integers(4, 32)), "groups of 32 do not divide rows of 100"),
        (lambda: integers(9), "an integer format of 9 bits: 2 to 8"),
        (lambda: hessian(torch.ones(0, 4)), "0 rows of inputs"),
        (lambda: hessian(torch.full((2, 4), math.inf)), "NaN or infinite"),
        (lambda: gptq(torch.ones(2, 4), torch.eye(3), integers(4)), r"a Hessian of \[3, 3\] for 4 inputs"),
        (lambda: gptq(torch.ones(2, 4), torch.eye(4), integers(4, symmetric=False)), "no column-by-column rounding"),
        (lambda: assign([Layer("a", (Choice("w4", 4, 1.0),))], size=3), "a budget of 3: the least .* is 4"),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    with pytest.raises(TesselError, match=words):
        call()  # type: ignore[operator]
