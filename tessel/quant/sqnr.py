"""Signal to quantization noise in dB: measured, and what a normal distribution is expected to give.

    >>> round(expected(4, group=128), 2), round(rate_distortion(4), 2)
    (18.58, 24.08)

A layer far below its expectation has outliers: that is what the report looks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import check
from ..ops.blocks import row_blocks
from .moments import energy

__all__ = ["best_uniform", "expected", "lloyd_max", "peak_energy", "rate_distortion", "sqnr", "sqnr_of"]

_REACH, _POINTS = 12.0, 24_001  # the normal density beyond 12 is 1e-32


def sqnr(x: Tensor, y: Tensor) -> float:
    """``10 log10(sum x^2 / sum (x - y)^2)``, in dB; infinite where nothing differs, to 1e-5 dB.

    Raises:
        TesselError: the shapes differ.
    """
    check(x.shape == y.shape, lambda: f"sqnr: shapes {tuple(x.shape)} and {tuple(y.shape)} differ")
    flat, other = (t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in (x, y))
    return sqnr_of((flat[part], other[part]) for part in row_blocks(flat))


def sqnr_of(blocks: Iterable[tuple[Tensor, Tensor]]) -> float:
    """``sqnr`` of pairs of blocks."""
    signal = noise = 0.0
    for x, y in blocks:
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        signal += energy(x.to(wide))
        noise += energy(x.to(wide) - y.to(wide))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def rate_distortion(bits: float) -> float:
    """The bound that no quantizer of a normal source passes: 20 log10(2) dB a bit (Shannon)."""
    return 20 * math.log10(2) * bits


@lru_cache
def peak_energy(count: int) -> float:
    """The expected square of the largest magnitude of ``count`` standard normal values.

    ``E[max^2]`` is the integral of ``2x (1 - F(x)^count)`` with ``F(x) = erf(x / sqrt 2)``.

    >>> [round(peak_energy(n), 3) for n in (32, 64, 128, 4096)]
    [5.71, 6.914, 8.148, 14.552]
    """
    x = torch.linspace(0, _REACH, _POINTS, dtype=torch.float64)
    return float(torch.trapezoid(2 * x * (1 - torch.erf(x / math.sqrt(2)) ** count), x))


def expected(bits: int, group: int) -> float:
    """What symmetric integers scaled by the largest magnitude of each group give on normal values, in dB.

    ``10 log10(12 q^2 / E[max^2])`` with q = 2^(bits-1) - 1: uniform rounding noise of step max/q. Too low by up to 0.3
    dB at three bits and by a dB or more at two, where rounding noise is not uniform.
    """
    return 10 * math.log10(12 * (2 ** (bits - 1) - 1) ** 2 / peak_energy(group))


def best_uniform(bits: int) -> tuple[float, float]:
    """The step and the SQNR in dB of the best uniform quantizer of a standard normal value, 2^bits levels around zero.

    >>> [round(v, 4 if v < 1 else 2) for v in best_uniform(4)]
    [0.3352, 19.38]
    """
    half = 2 ** (bits - 1)
    x, weight = _density()

    def noise(step: float) -> float:
        level = (torch.floor(x / step).clamp(-half, half - 1) + 0.5) * step
        return float(((x - level).square() * weight).sum())

    low, high = 1e-3, 4.0
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        a, b = high - golden * (high - low), low + golden * (high - low)
        if noise(a) < noise(b):
            high = b
        else:
            low = a
    step = (low + high) / 2
    return step, -10 * math.log10(noise(step))


def lloyd_max(bits: int) -> tuple[tuple[float, ...], float]:
    """The codebook of 2^bits values with the least noise for a standard normal value, and its SQNR in dB.

    Lloyd's iteration: each value is the mean of what is nearest to it.

    >>> table, db = lloyd_max(2)
    >>> [round(v, 2) for v in table], round(db, 2)
    ([-1.51, -0.45, 0.45, 1.51], 9.3)
    """
    x, weight = _density()
    mass, moment, energy = (torch.cumsum(w, 0) for w in (weight, weight * x, weight * x * x))
    count = 2**bits
    # The start: quantiles of the density to the power 1/3, which is the best one of many levels (Panter and Dite).
    spread = torch.cumsum(weight ** (1 / 3), 0)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * float(spread[-1])
    table = x[torch.searchsorted(spread, wanted)]
    before, noise = math.inf, 1.0
    while before - noise > 1e-9:
        ends = torch.searchsorted(x, (table[1:] + table[:-1]) / 2) - 1
        parts = [torch.diff(c[ends], prepend=c.new_zeros(1), append=c[-1:]) for c in (mass, moment, energy)]
        table = parts[1] / parts[0]
        before, noise = noise if noise < 1 else math.inf, float((parts[2] - parts[1] ** 2 / parts[0]).sum())
    return tuple(table.tolist()), -10 * math.log10(noise)


@lru_cache
def _density() -> tuple[Tensor, Tensor]:
    """Points and the normal probability around each."""
    x = torch.linspace(-_REACH, _REACH, 2 * _POINTS - 1, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2)
    return x, weight / weight.sum()
