"""Rounding to small floats, the values of a group under one scale: what inputs of few bits are, as they come.

    floor_pow2(x)                                          the largest power of two up to |x|, by the bits of x alone
    rounded(x, group=, exponent=, mantissa=, largest=, scale=)        x, as it is in such a format

The reference and the operators that ``rounded`` is opened into do the same arithmetic step by step, all of it exact or
rounded as IEEE says, so that a kernel gives the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..ir.node import Node, Value
from ..ir.types import Dim
from .common import letters, operand_types, result, table, words
from .elementwise import op
from .emit import Emit, wide_dtype
from .fold import composite, need_float

__all__ = ["ROUNDING", "SCALES", "WHOLE_ROW", "WHOLE_TENSOR", "floor_pow2", "round_float", "rounded_ref", "scales"]

WHOLE_ROW = 0
"""As a group: all values of a row share one scale."""

WHOLE_TENSOR = -1
"""As a group: all values of the tensor share one scale."""

SCALES = ("f32", "e8m0", "e4m3")
"""What scales are kept in; see ``quant/formats.py``."""

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}
_E4M3 = (4, 3, 448.0)  # bits of exponent and mantissa, the largest number


def floor_pow2(x: Tensor) -> Tensor:
    """The largest power of two that is at most ``|x|``: zero for what is smaller than any normal number of float32 (of
    x's dtype, if that is float64), infinity for what is infinite or no number.

    >>> floor_pow2(torch.tensor([0.3, -8.0, 9.9, 1e-40]))
    tensor([0.2500, 8.0000, 8.0000, 0.0000])
    """
    wide = x.to(wide_dtype(x.dtype)).contiguous()
    words_, mask = _EXPONENT[wide.dtype]
    return (wide.view(words_) & mask).view(wide.dtype).to(x.dtype)


def round_float(x: Tensor, exponent: int, mantissa: int, largest: float) -> Tensor:
    """Round to a small float of these bits (half to even, subnormals kept); beyond ``largest`` it saturates.

    >>> round_float(torch.tensor([0.3, 2.4, 5.1, 9.0]), exponent=2, mantissa=1, largest=6.0)
    tensor([0.5000, 2.0000, 6.0000, 6.0000])
    """
    least, most = _powers(exponent, largest)
    step = floor_pow2(x).clamp(least, most) * 2.0**-mantissa
    return ((x / step).round() * step).clamp(-largest, largest)


def _powers(exponent: int, largest: float) -> tuple[float, float]:
    """The smallest normal number, and the power of two in the largest number, above which all saturates."""
    return 2.0 ** (2 - 2 ** (exponent - 1)), 2.0 ** math.floor(math.log2(largest))


def scales(most: Tensor, top: float, kind: str) -> Tensor:
    """The scale of each group from its largest magnitude, which becomes about ``top``; one for groups of zeros, and for
    those that hold NaN or infinity.

    ``e8m0``: the power of two in the largest magnitude over that in ``top``, the rule of the MX specification: what
    lies above the largest value saturates. ``e4m3``: of NVFP4, under one float32 scale of all.
    """
    if kind == "e8m0":
        scale = floor_pow2(most) * _over(top)
    elif kind == "e4m3":
        whole = most.amax() / (448.0 * top)
        whole = torch.where(whole == 0, torch.ones_like(whole), whole)
        scale = round_float(most / (top * whole), *_E4M3) * whole
    else:
        scale = most / top
    return torch.where((scale == 0) | ~torch.isfinite(scale), torch.ones_like(scale), scale)


def _over(top: float) -> float:
    return 2.0 ** -math.floor(math.log2(top))


def rounded_ref(x: Tensor, group: int, exponent: int, mantissa: int, largest: float, scale: str = "f32") -> Tensor:
    """The rounding by its definition.

    Args:
        x: ``[..., k]`` floating.
        group: values along k that share a scale, or ``WHOLE_ROW`` or ``WHOLE_TENSOR``.
        exponent, mantissa, largest: of the float, as ``round_float`` takes them.
        scale: one of ``SCALES``.

    Returns:
        x's shape and dtype; NaN for NaN. A group that holds NaN or infinity has a scale of one.

    >>> rounded_ref(torch.tensor([[0.1, 1.0, 2.6, 12.0]]), 2, 2, 1, 6.0)
    tensor([[ 0.0833,  1.0000,  3.0000, 12.0000]])
    """
    check(scale in SCALES, lambda: f"rounded: scales in {scale!r}; {', '.join(SCALES)} are known")
    if x.numel() == 0:
        return x.clone()
    wide = x.to(wide_dtype(x.dtype))
    grouped = wide.reshape(_grouped(tuple(x.shape), group))
    most = grouped.abs().amax(tuple(range(x.dim())) if group == WHOLE_TENSOR else -1, keepdim=True)
    own = scales(most, largest, scale)
    return (round_float(grouped / own, exponent, mantissa, largest) * own).reshape(x.shape).to(x.dtype)


def _grouped(shape: tuple[Dim, ...], group: int) -> tuple[Dim, ...]:
    if group <= 0:
        return shape
    fits = not isinstance(shape[-1], int) or shape[-1] % group == 0
    check(fits, lambda: f"rounded: groups of {group} do not divide rows of {shape[-1]} values")
    return (*shape[:-1], shape[-1] // group, group)


# ---------------------------------------------------------------- as operators


def _rounded(e: Emit, x: Value, group: int, exponent: int, mantissa: int, largest: float, scale: str = "f32") -> Value:
    if any(isinstance(n, int) and n == 0 for n in x.shape):
        return e("copy", x)
    grouped = e.reshape(e.wide(x), _grouped(x.shape, group))
    rank = len(grouped.shape)
    held = tuple(range(rank)) if group == WHOLE_TENSOR else (rank - 1,)
    own = _scales(e, e("amax", e("abs", grouped), dims=held, keepdim=True), largest, scale)
    codes = _round_float(e, e("div", grouped, own), exponent, mantissa, largest)
    return e.reshape(e("mul", codes, own), x.shape)


def _scales(e: Emit, most: Value, top: float, kind: str) -> Value:
    if kind == "e8m0":
        scale = e.b.add(ROUNDING["floor_pow2"], most)
        scale = e("mul", scale, _over(top))
    elif kind == "e4m3":
        whole = e("div", e("amax", most, dims=tuple(range(len(most.shape))), keepdim=True), 448.0 * top)
        whole = e("where", e("eq", whole, 0.0), 1.0, whole)
        scale = e("mul", _round_float(e, e("div", most, e("mul", whole, top)), *_E4M3), whole)
    else:
        scale = e("div", most, top)
    fine = e("logical_and", e("ne", scale, 0.0), e("lt", e("abs", scale), float("inf")))
    return e("where", fine, scale, 1.0)


def _round_float(e: Emit, x: Value, exponent: int, mantissa: int, largest: float) -> Value:
    least, most = _powers(exponent, largest)
    power = e.b.add(ROUNDING["floor_pow2"], x)
    step = e("mul", e("minimum", e("maximum", power, least), most), 2.0**-mantissa)
    got = e("mul", e("round", e("div", x, step)), step)
    return e("minimum", e("maximum", got, -largest), largest)


def _infer(x: Any, group: int, exponent: int, mantissa: int, largest: float, scale: str = "f32") -> Any:
    need_float("rounded", x)
    check(x.rank > 0, lambda: f"rounded: {x} has no last dimension for groups to lie along")
    check(scale in SCALES, lambda: f"rounded: scales in {scale!r}; {', '.join(SCALES)} are known")
    _grouped(x.shape, group)
    return (result(x.shape, x.dtype, x),)


def _dims(node: Node) -> str:
    """Rows stand apart, unless one scale is above them all."""
    (x,) = operand_types(node)
    whole = node.attrs["group"] == WHOLE_TENSOR or node.attrs.get("scale", "f32") == "e4m3"
    names = letters(x.rank)
    shape = [w + "*" if whole or i == x.rank - 1 else w for i, w in enumerate(names)]
    return words([shape], [shape])


ROUNDING = table(
    (
        op(
            "floor_pow2",
            floor_pow2,
            "tessel_floor_pow2({0})",
            "tessel::floor_pow2({0})",
            "float",
            doc="the largest power of two up to |x|, by its bits",
        ),
        composite(
            "rounded",
            _dims,
            rounded_ref,
            _infer,
            _rounded,
            doc="rounded(x, group=, exponent=, mantissa=, largest=, scale=): values of a group as small floats",
        ),
    )
)
