"""Published and measured figures of quantization that no other test compares with.

Figures and the tests that hold them:

    SQNR of integers, by bits and group, their bounds  test_quant.test_sqnr_of_integers
    SQNR of small floats and NF4                       test_quant.test_sqnr_of_small_floats
    2:4 keeps 86.78% of the energy                     test_quant.test_two_of_four_keep_the_energy
    RTN's loss, sum s^2 H_jj / 12                      test_quant.test_rounding_to_nearest_loses_*
    GPTQ's loss, RTN / GPTQ on AR(0.9) and on iid      test_quant.test_gptq_wins_what_theory_says_*
    GPTQ's loss is sum e^2 exactly                     test_quant.test_gptq_loss_is_that_of_the_weight_it_gives
    TurboBoA, rows at a time                           here
    SmoothQuant and Hadamard on planted outliers       test_quant.test_planted_outliers
    KIVI: keys a channel, keys a token                 here
    RotateKV                                           here
    bits by budget against reverse water-filling       here; exact: test_quant.test_budget_equals_brute_force
    legal shapes                                       here; in a budget: test_quant_budget.test_constraints_by_name
    one row on an H100                                 here
    split-K is the same in every run                   here
    packing of the compressed-tensors layout           test_quantize_files
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from kernels import interpret, poisoned, product_kernel, rand
from torch import Tensor

from tessel.codegen.triton import render
from tessel.errors import TesselError
from tessel.quant.bits import CONSTRAINTS
from tessel.quant.budget import Choice, Layer, assign, reverse_water_filling
from tessel.quant.formats import integers, quantize
from tessel.quant.hessian import damped, turboboa
from tessel.quant.speed import seconds
from tessel.quant.sqnr import sqnr
from tessel.quant.transforms import rotate, signs
from tessel.targets import get_target
from tessel.tiles.split import split_k

# ---------------------------------------------------------------- rows jointly, bits by budget


def test_rows_jointly_by_how_many_at_a_time() -> None:
    """Of RTN's loss, with AR(0.9) over the inputs, and over the outputs in a random orthogonal basis, where, other than
    in the process's own order, any row may make up for any other. Means of six draws, 64 rows and 64 columns."""
    n, f, ratios = 64, integers(4), []
    h = 0.9 ** (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
        g, w = basis @ h @ basis.T, torch.randn(n, n, generator=draw)
        error = w.double() - quantize(w, f).dequantize().double()
        near = float(((error @ damped(h)) * (damped(g) @ error)).sum())
        ratios.append([turboboa(w, h, g, f, rows).loss / near for rows in (1, 4, 16, 32, 64)])
    mean = torch.tensor(ratios).mean(0).tolist()
    assert mean == pytest.approx([0.065, 0.078, 0.107, 0.162, 0.258], rel=0.15), mean


def test_bits_by_budget_against_the_same_bits_everywhere() -> None:
    """2.64 times less error at 4 bits: 32 layers whose variances are spread by e^1.5, means of many draws."""
    gains, over = [], []
    for seed in range(64):
        rng = random.Random(seed)
        variances = [math.exp(rng.gauss(0, 1.5)) for _ in range(32)]
        layers = [
            Layer(str(i), tuple(Choice(f"w{b}", b, v * 2.0 ** (-2 * b)) for b in range(9)))
            for i, v in enumerate(variances)
        ]
        best = sum(c.loss for c in assign(layers, size=4 * len(layers)))
        gains.append(sum(variances) * 2.0**-8 / best)
        over.append(best / reverse_water_filling(variances, 4))
    assert min(over) >= 1 and sum(over) / len(over) < 1.10
    assert sum(gains) / len(gains) == pytest.approx(2.64, abs=0.3)


# ---------------------------------------------------------------- caches


def keys(correlation: float, seed: int = 0) -> Tensor:
    """1024 keys of 128 channels, every 32nd 30 times as large; ``correlation`` of a token with the next."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 128, generator=draw)
    for t in range(1, len(x) * (correlation > 0)):
        x[t] = correlation * x[t - 1] + math.sqrt(1 - correlation**2) * x[t]
    x[:, ::32] *= 30
    return x


def test_kivi_keys_by_channel_and_by_token() -> None:
    """2 bits: 12.1 dB where a channel of 32 tokens shares a scale, -16.5 where a token does, of the other channels.

    More than 9.3 dB takes keys that a scalar quantizer can tell more of than of normal values: those that change slowly
    from token to token, by a correlation of 0.925 for 12.1 (KIVI's groups of 32); unrelated ones give 8.1.
    """
    others = torch.arange(128) % 32 > 0
    for correlation, want in ((0.925, 12.1), (0.0, 8.1)):
        x = keys(correlation)
        by_channel = quantize(x.T.contiguous(), integers(2, 32, minimum=True)).dequantize().T
        by_token = quantize(x, integers(2, 128, minimum=True)).dequantize()
        assert sqnr(x[:, others], by_channel[:, others]) == pytest.approx(want, abs=0.3)
        assert sqnr(x[:, others], by_token[:, others]) == pytest.approx(-16.5, abs=0.8)


def test_rotatekv_keys_by_token() -> None:
    """2 bits a token, in groups of 64 channels, 0.7 of each group's range kept: 2.5 dB becomes 16.9 (2.4 and 16.75).

    RotateKV's steps: channels in an order of their size, dealt out to the groups in turn, so that each has as many
    outliers, in its first places; then a Hadamard matrix, for one head or four, which gives all channels of a group one
    of two sums of outliers. Without that order 11 is reached. Groups and the range kept were found by fitting to the
    two published figures, whose setup is not given; where all of the range is kept, 2.5 becomes 13.3.
    """
    places = torch.arange(128)
    places[[0, 32, 64, 96, 3, 50, 77, 120]] = torch.tensor([3, 50, 77, 120, 0, 32, 64, 96])
    x = torch.stack([keys(0.0, seed)[:, places] for seed in range(4)], 1)  # [tokens, heads, channels]
    f = integers(2, 64, minimum=True)

    def rotated(x: Tensor, clip: float) -> float:
        sign = signs(x.shape[-1], 1)
        return sqnr(x, rotate(quantize(rotate(x, sign), f, clip).dequantize()) * sign)

    for clip, before, after, left in ((0.7, 2.5, 16.9, 11.0), (1.0, 2.5, 13.3, 9.0)):
        assert sqnr(x, quantize(x, f, clip).dequantize()) == pytest.approx(before, abs=0.3)
        for heads in (1, 4):
            whole = x.reshape(1024, -1, heads * 128)
            assert rotated(whole, clip) == pytest.approx(left, abs=0.3)
            for head in whole.unbind(1):
                by_size = head.square().sum(0).argsort(descending=True)
                dealt = by_size.view(64, -1).T.flatten()
                assert rotated(head[:, dealt], clip) == pytest.approx(after, abs=0.3)


# ---------------------------------------------------------------- shapes and times


@pytest.mark.parametrize(
    ("name", "n", "k", "bits", "group", "shards", "words"),
    [
        ("groups divide k", 8, 192, 4, 128, 1, "192 % 128 = 64"),
        ("groups divide shards", 8, 384, 4, 128, 2, "(384 / 2 shards) % 128 = 64"),
        ("groups divide shards", 8, 100, 4, 20, 3, "100 % 3 shards = 1"),
        ("words divide shards", 8, 128, 3, 64, 2, "a group of 64 codes ends inside a word of 10"),
        ("tiles lie in groups", 8, 80, 4, 40, 1, "a tile of 16 columns reaches over groups of 40"),
    ],
)
def test_shapes_that_are_not_legal_are_said_with_both_numbers(
    name: str, n: int, k: int, bits: int, group: int, shards: int, words: str
) -> None:
    """BK within a group, k over shards in whole groups; cutting k for split-K and k that groups do not divide."""
    broken = {c.name: c.broken for c in CONSTRAINTS}
    assert broken[name](n, k, integers(bits, group), shards) == words
    assert not any(c.broken(8, 256, integers(4, 128), 2) for c in CONSTRAINTS)


def test_parts_of_k_are_whole_steps() -> None:
    with pytest.raises(TesselError, match="its k cannot be cut into 4 equal parts"):
        split_k(product_kernel(rand(3, 96), rand(96, 5)), 4)


def test_one_row_on_an_h100() -> None:
    """17.9 us + bytes / 3.23 TB/s was measured of 8192 x 8192: what is predicted lies within 30%, so that four bits buy
    about two times, not four, and eight less than that."""
    device, k, took = get_target("h100"), 8192, {}
    for bits, f in ((16, None), (8, integers(8)), (4, integers(4, 128))):
        stored = k * k * (16 if f is None else f.bits_per_value(k)) / 8
        took[bits] = seconds(k, k, 1, torch.bfloat16, f, device)
        assert took[bits] == pytest.approx(17.9e-6 + stored / 3.23e12, rel=0.3)
    assert 1.5 < took[16] / took[8] <= took[16] / took[4] < 2.3


# ---------------------------------------------------------------- split-K


def test_split_k_is_the_same_in_every_run() -> None:
    """Each part writes a buffer of its own, which one program adds up in the order of the parts: nothing is added to
    what lies in memory, and how the sum is cut into programs changes no bit."""
    a, b = rand(17, 64, dtype=torch.bfloat16), rand(64, 40, dtype=torch.bfloat16)
    partial, combine, buffer = split_k(product_kernel(a, b), 4)
    for step in (partial, combine):
        assert "atomic" not in render(step, get_target("h100")).text
    between, outs = poisoned(buffer.shape, buffer.dtype), []
    for blocks in (16, 64, 256):  # of what the run before left in the buffer, nothing may be seen
        interpret(partial, [a, b, between], knobs={"BM": 32, "BN": 64, "BK": 16})
        out = poisoned((17, 40), a.dtype)
        interpret(combine, [between, out], knobs={"XB": blocks})
        outs.append(out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    whole = sum(between[s] for s in range(4))
    assert (outs[0].double() - whole.double()).abs().max() <= 2.0**-8 * whole.abs().max()
