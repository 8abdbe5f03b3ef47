"""Number formats of few bits, as records, and the arithmetic that every kernel is held to.

A format says how a tensor's values become small codes and scales. Values of a group share one scale; a group lies along
the last dimension, which is the reduced dimension k of a weight ``[n, k]``:

    >>> import torch
    >>> w = torch.tensor([[-7.0, 1.0, 2.2, 14.0]])
    >>> q = quantize(w, integers(4, group=2))
    >>> q.codes, q.scale
    (tensor([[-7.,  1.,  1.,  7.]]), tensor([[1., 2.]]))
    >>> q.dequantize()
    tensor([[-7.,  1.,  2., 14.]])

Elements are integers (``int``), small floats (``float``: an exponent, a mantissa, no infinity) or entries of a table
(``codebook``). Scales are kept in float32, as a power of two (``e8m0``, the MX formats of the OCP specification), or in
``e4m3`` under one float32 scale of the whole tensor (NVFP4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import check
from ..frontend.rounding_op import rounded as rounded_op
from ..ops.blocks import row_blocks
from ..ops.rounding import WHOLE_ROW, WHOLE_TENSOR, round_float, scales

__all__ = [
    "FORMATS",
    "WHOLE_ROW",
    "WHOLE_TENSOR",
    "Format",
    "Quantized",
    "block_floats",
    "integers",
    "quantize",
    "round_float",
    "rounded",
]


@dataclass(frozen=True, slots=True)
class Format:
    """How values become codes.

    Attributes:
        kind: ``int``, ``float`` or ``codebook``.
        bits: of a code, 1 to 8.
        group: values along the last dimension that share a scale; ``WHOLE_ROW`` or ``WHOLE_TENSOR``.
        symmetric: integers around zero, -q to q with q = 2^(bits-1) - 1; otherwise 0 to 2^bits - 1 with a zero point.
        minimum: of an asymmetric one: codes count from the group's minimum, kept in float32, and not from an integer
            zero point, which needs zero inside the range (caches of keys and values have channels far from zero).
        exponent, mantissa: bits of each, of a float.
        largest: of a float: its largest finite value.
        codebook: the values of a table, ascending.
        scale: ``f32``, ``e8m0`` or ``e4m3``; of caches ``f16``, the minimum too.
        rows: rows (of the dimension before the last) that share a scale too: 128 for blocks of 128 by 128.
    """

    kind: str
    bits: int
    group: int = WHOLE_ROW
    symmetric: bool = True
    exponent: int = 0
    mantissa: int = 0
    largest: float = 0.0
    codebook: tuple[float, ...] = ()
    scale: str = "f32"
    minimum: bool = False
    rows: int = 1

    @property
    def top(self) -> float:
        """The code that the largest magnitude of a group is scaled to."""
        if self.kind == "int":
            return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1
        return self.largest if self.kind == "float" else max(map(abs, self.codebook))

    def bits_per_value(self, row: int) -> float:
        """Bits that a value takes with its share of scale and zero point, in rows of ``row`` values.

        >>> integers(4, group=128).bits_per_value(4096)
        4.25
        """
        own = {"f32": 32, "e8m0": 8, "e4m3": 8, "f16": 32}[self.scale]
        if self.kind == "int" and self.scale == "f32":
            own = 32 if self.symmetric else 64 if self.minimum else 32 + 8  # a float32 scale; a minimum or a zero point
        size = row if self.group == WHOLE_ROW else self.group
        return self.bits + (0.0 if self.group == WHOLE_TENSOR else own / max(size * self.rows, 1))


def integers(bits: int, group: int = WHOLE_ROW, symmetric: bool = True, minimum: bool = False) -> Format:
    """Integers of 1 to 8 bits; symmetric ones need 2 at least.

    Raises:
        TesselError: a number of bits or a group that is none.
    """
    least = 2 if symmetric and not minimum else 1
    check(least <= bits <= 8, lambda: f"an integer format of {bits} bits: {least} to 8 are possible")
    check(group >= WHOLE_TENSOR, lambda: f"a group of {group} values: at least 1, or WHOLE_ROW or WHOLE_TENSOR")
    return Format("int", bits, group, symmetric and not minimum, minimum=minimum)


def block_floats(bits: int, group: int = 32) -> Format:
    """Block floating point: integers whose group shares an exponent, a power of two (OCP's MXINT8 is that of 8 bits).

    Raises:
        TesselError: a number of bits or a group that is none.

    >>> quantize(torch.tensor([[5.0, -1.1, 0.2, 3.0]]), block_floats(4, 4)).dequantize()
    tensor([[ 5., -1.,  0.,  3.]])
    """
    check(group > 0, lambda: f"a block of {group} values: at least 1")
    return replace(integers(bits, group), scale="e8m0")


# NF4: quantiles of a normal distribution, so that each code is as likely (Dettmers et al., "QLoRA", appendix E).
_NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def _float(exponent: int, mantissa: int, largest: float, group: int, scale: str = "f32") -> Format:
    return Format(
        "float", 1 + exponent + mantissa, group, exponent=exponent, mantissa=mantissa, largest=largest, scale=scale
    )


# Largest values and block sizes: OCP Microscaling Formats (MX) Specification 1.0; NVFP4: blocks of 16 with E4M3 scales.
FORMATS: dict[str, Format] = {
    "e4m3": _float(4, 3, 448.0, WHOLE_TENSOR),
    "e4m3-row": _float(4, 3, 448.0, WHOLE_ROW),
    "e4m3-block": replace(_float(4, 3, 448.0, 128), rows=128),
    "e5m2": _float(5, 2, 57344.0, WHOLE_TENSOR),
    "mxfp8": _float(4, 3, 448.0, 32, "e8m0"),
    "mxfp6": _float(2, 3, 7.5, 32, "e8m0"),
    "mxfp4": _float(2, 1, 6.0, 32, "e8m0"),
    "nvfp4": _float(2, 1, 6.0, 16, "e4m3"),
    "nf4": Format("codebook", 4, 64, codebook=_NF4),
    "ternary": Format("codebook", 2, WHOLE_TENSOR, codebook=(-1.0, 0.0, 1.0)),
}


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor, codes not yet packed.

    Attributes:
        codes: of the tensor's shape, float32: integers, element values of a float format, or codebook values.
        scale: ``[..., groups]`` float32, what a code is multiplied by (NVFP4's scale of the tensor is in it); one for
            every ``format.rows`` rows.
        zero: ``[..., groups]`` the code of the value zero, of asymmetric formats (no whole number with ``minimum``).
        format: what it is in.
    """

    codes: Tensor
    scale: Tensor
    format: Format
    zero: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, float32."""
        made = torch.empty_like(self.codes)
        flat = made.view(-1, made.shape[-1])
        for part, values in self.blocks():
            flat[part] = values
        return made

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Values that the codes stand for, some rows at a time: of the codes as a matrix ``[rows, k]``."""
        flat = self.codes.reshape(-1, self.codes.shape[-1])
        scale, zero = self._of_rows(self.scale), None if self.zero is None else self._of_rows(self.zero)
        for part in row_blocks(flat):
            grouped = flat[part].unflatten(1, (scale.shape[1], -1))
            if zero is not None:
                grouped = grouped - _own(zero, part)
            yield part, (grouped * _own(scale, part)).flatten(1)

    def _of_rows(self, x: Tensor) -> Tensor:
        """Scales as ``[rows, groups]``, or one row for all."""
        if self.format.rows > 1:
            x = x.repeat_interleave(self.format.rows, -2)[..., : self.codes.shape[-2], :]
        return x.reshape(-1, x.shape[-1])


def _own(x: Tensor, part: slice) -> Tensor:
    """Of scales ``[rows, groups]``, or one row for all, those of some rows ``[rows, groups, 1]``."""
    return (x if len(x) == 1 else x[part])[..., None]


def quantize(x: Tensor, format: Format, clip: float = 1.0) -> Quantized:
    """Round to the nearest code, the largest magnitude of each group scaled to the format's largest.

    Args:
        x: floating, at least one dimension; the last one is what groups lie along.
        format: what to quantize to.
        clip: the share of each group's range that is kept; values beyond take the last code.

    Raises:
        TesselError: x holds NaN or infinity, or the group does not divide its last dimension (both numbers named).
    """
    check(x.is_floating_point() and x.dim() > 0, lambda: f"quantize: {x.dtype} of rank {x.dim()} is no row of floats")
    x = x.detach()
    low, high = _extremes(x, format)
    bad = not bool(torch.isfinite(low).all() & torch.isfinite(high).all())
    check(not bad, lambda: f"quantize: {_count_bad(x)} of {x.numel()} values are NaN or infinite")
    shape = (*x.shape[:-1], low.shape[1]) if format.group != WHOLE_TENSOR else (1,) * x.dim()
    if not format.symmetric:
        scale, zero = _of_range(low, high, format, clip)
        codes = _coded(x, scale, lambda own, part: (own + _own(zero, part)).round().clamp(0, format.top))
        return Quantized(codes, scale.reshape(shape), format, zero.reshape(shape))
    largest = torch.maximum(-low, high).mul(clip).reshape(shape)
    if format.rows == 1:
        scale = wide = scales_of(largest, format)
    else:
        scale = scales_of(_largest_of_rows(largest, format.rows), format)
        wide = scale.repeat_interleave(format.rows, -2)[..., : largest.shape[-2], :]
    codes = _coded(x, wide.reshape(low.shape), lambda own, part: to_codes(own, format))
    return Quantized(codes, scale, format)


def _extremes(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each group, float32 ``[rows, groups]``, NaN of one that holds NaN; ``[1, 1]``
    of one scale for all."""
    size, row = _size(format, x.shape), x.shape[-1]
    check(row % size == 0, lambda: f"quantize: groups of {size} do not divide rows of {row} values")
    flat = x.reshape(-1, row)
    low, high = (torch.empty(flat.shape[0], row // size, device=x.device) for _ in range(2))
    for part in row_blocks(flat):
        grouped = flat[part].float().unflatten(1, (row // size, size))
        low[part], high[part] = grouped.amin(-1), grouped.amax(-1)
    if format.group == WHOLE_TENSOR:
        return low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low, high


def _coded(x: Tensor, scale: Tensor, code: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """What ``code`` makes of values over their scales ``[rows, groups]``, in x's shape, float32."""
    made = torch.empty(x.shape, device=x.device)
    flat, to = x.reshape(-1, x.shape[-1]), made.view(-1, x.shape[-1])
    for part in row_blocks(flat):
        own = flat[part].float().unflatten(1, (scale.shape[1], -1)) / _own(scale, part)
        to[part] = code(own, part).flatten(1)
    return made


def rounded(x: Tensor, format: Format) -> Tensor:
    """What ``quantize(x, format).dequantize()`` gives for a symmetric format, in x's dtype, and NaN for NaN: for inputs
    that are rounded as they come. The gradient of small floats is that of x as it is, see ``frontend/rounding_op``."""
    if format.kind == "float":
        return rounded_op(x, format.group, format.exponent, format.mantissa, format.largest, format.scale)
    grouped, shape = _grouped(x.float(), format)
    scale = scales_of(grouped.abs().amax(-1), format)[..., None]
    return (to_codes(grouped / scale, format) * scale).reshape(shape).to(x.dtype)


def _largest_of_rows(largest: Tensor, rows: int) -> Tensor:
    """``[..., n, groups]`` -> ``[..., ceil(n / rows), groups]``; the last block may be short."""
    check(largest.dim() > 1, lambda: f"quantize: blocks of {rows} rows need a matrix")
    short = -largest.shape[-2] % rows
    return torch.nn.functional.pad(largest, (0, 0, 0, short)).unflatten(-2, (-1, rows)).amax(-2)


def _of_range(low: Tensor, high: Tensor, format: Format, clip: float) -> tuple[Tensor, Tensor]:
    """Scales and zeros of asymmetric groups with these least and largest values."""
    if not format.minimum:
        low, high = low.clamp(max=0), high.clamp(min=0)
    middle = (low + high) / 2 if format.minimum else torch.zeros_like(low)
    low, high = middle + (low - middle) * clip, middle + (high - middle) * clip
    scale = (high - low) / format.top
    # A group of one value is that value, whatever its scale.
    scale = torch.where(scale == 0, torch.ones_like(scale) if not format.minimum else low.abs().clamp(min=1e-30), scale)
    zero = -low / scale
    return scale, zero if format.minimum else zero.round().clamp(0, format.top)


def scales_of(largest: Tensor, format: Format) -> Tensor:
    """The scale of each group from its largest magnitude, see ``ops.rounding.scales``; groups of zeros get one."""
    return scales(largest, format.top, format.scale)


def to_codes(scaled: Tensor, format: Format) -> Tensor:
    """The nearest code of each scaled value."""
    if format.kind == "int":
        return scaled.round().clamp(-format.top, format.top)
    if format.kind == "float":
        return round_float(scaled, format.exponent, format.mantissa, format.largest)
    return nearest(scaled, format.codebook)


def nearest(x: Tensor, table: Sequence[float]) -> Tensor:
    """The entry of an ascending table that is nearest to each value.

    >>> nearest(torch.tensor([0.2, 0.9]), (-1.0, 0.0, 1.0))
    tensor([0., 1.])
    """
    entries = torch.tensor(table, dtype=x.dtype)
    return entries[torch.bucketize(x, (entries[1:] + entries[:-1]) / 2)]


def _size(format: Format, shape: Sequence[int]) -> int:
    return format.group if format.group > 0 else max(shape[-1], 1)


def _grouped(x: Tensor, format: Format) -> tuple[Tensor, torch.Size]:
    """Groups as the last dimension: ``[..., groups, size]``; of one scale for all, ``[1, ..., all]``."""
    if format.group == WHOLE_TENSOR:
        return x.reshape(*(1 for _ in x.shape), -1), x.shape
    size, row = _size(format, x.shape), x.shape[-1]
    check(row % size == 0, lambda: f"quantize: groups of {size} do not divide rows of {row} values")
    return x.unflatten(-1, (row // size, size)), x.shape


def _count_bad(x: Tensor) -> int:
    return int((~torch.isfinite(x)).sum())
