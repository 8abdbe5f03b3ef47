"""A linear layer that holds its weight in few bits.

>>> import torch
>>> from tessel.quant.formats import integers
>>> layer = torch.nn.Linear(64, 8)
>>> packed = QuantLinear.of(layer, quantize(layer.weight, integers(4, group=32)))
>>> packed.words.shape, packed.scale.shape
(torch.Size([8, 8]), torch.Size([8, 2]))
>>> x = torch.randn(3, 64)
>>> torch.allclose(packed(x), torch.nn.functional.linear(x, packed.weight, layer.bias), atol=1e-5)
True
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..frontend.packed_op import packed_linear
from ..ops.blocks import row_blocks
from ..ops.packed import dequantized
from .formats import WHOLE_ROW, Format, Quantized, quantize, rounded  # noqa: F401  (quantize: of the example)
from .transforms import rotate

__all__ = ["QuantLinear", "divided", "pack", "stored", "table_of", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n, k]``, 0 to ``2 ** bits - 1``, as int32 words ``[n, ceil(k / (32 // bits))]``, lowest bits first.

    >>> pack(torch.tensor([[1, 2, 3]]), 4)
    tensor([[801]], dtype=torch.int32)
    """
    (n, k), per = codes.shape, 32 // bits
    words = torch.empty((n, -(-k // per)), dtype=torch.int32, device=codes.device)
    for part in row_blocks(codes):
        whole = nn.functional.pad(codes[part].to(torch.uint8), (0, -k % per))
        if 8 % bits == 0:  # bytes first, which are words as they lie
            words[part] = _joined(whole, 8 // bits, bits).view(torch.int32)
        else:
            words[part] = _joined(whole.int(), per, bits)
    return words


def _joined(codes: Tensor, count: int, bits: int) -> Tensor:
    """``count`` codes side by side as one number, the first lowest."""
    apart = codes.unflatten(1, (-1, count))
    made = apart[:, :, 0].contiguous()
    for i in range(1, count):
        made |= apart[:, :, i] << (i * bits)
    return made


def unpack(words: Tensor, bits: int, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """What ``pack`` packed, ``[n, k]``."""
    codes = torch.empty((words.shape[0], k), dtype=dtype, device=words.device)
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
    for part in row_blocks(codes):
        codes[part] = ((words[part, :, None] >> shifts) & (2**bits - 1)).flatten(1)[:, :k]
    return codes


def table_of(format: Format) -> Tensor | None:
    """What each code of a format that is no integer stands for, float32 ``[2 ** bits]``; None for integers.

    Codes of small floats are their bits: a sign, then exponent and mantissa. Those that stand for no number (E4M3 has
    two) take the largest value.
    """
    if format.kind == "int":
        return None
    if format.kind == "codebook":
        values = torch.tensor(format.codebook)
        return torch.cat([values, values[-1:].expand(2**format.bits - len(values))])
    bias, size = 2 ** (format.exponent - 1) - 1, 2**format.mantissa
    code = torch.arange(2 ** (format.bits - 1))
    power, part = code // size, code % size
    normal = torch.exp2(power - bias) * (1 + part / size)
    small = 2.0 ** (1 - bias) * part / size
    values = torch.where(power == 0, small, normal).clamp(max=format.largest)
    return torch.cat([values, -values])


def _numbered(weight: Quantized) -> Tensor:
    """Codes as numbers from 0, bytes."""
    format, codes = weight.format, weight.codes
    made = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    if format.kind == "int":
        offset = 2 ** (format.bits - 1) if weight.zero is None else 0
        for part in row_blocks(codes):
            made[part] = codes[part] + offset
        return made
    lut = table_of(format)
    assert lut is not None
    order = torch.sort(lut.to(codes.device), stable=True)
    numbers = order.indices.to(torch.uint8)
    for part in row_blocks(codes):
        places = torch.searchsorted(order.values, codes[part].contiguous(), out_int32=True).clamp_(max=len(lut) - 1)
        made[part] = numbers[places]
    return made


def _by_rows(x: Tensor, n: int, rows: int) -> Tensor:
    """Scales ``[n, groups]`` of those that rows share."""
    if rows > 1:
        x = x.repeat_interleave(rows, 0)[:n]
    return x.expand(n, -1).float().contiguous()


def stored(weight: Quantized, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A weight ``[n, k]`` as ``QuantLinear`` stores it: words, scales, zeros, table."""
    n, bits, rows = weight.codes.shape[0], weight.format.bits, weight.format.rows
    zero, lut = weight.zero, table_of(weight.format)
    return (
        pack(_numbered(weight), bits).to(device),
        _by_rows(weight.scale, n, rows).to(device),
        None if zero is None else _by_rows(zero, n, rows).to(device),
        None if lut is None else lut.to(device),
    )


class QuantLinear(nn.Module):
    """``x W^T + b`` with W in few bits, and x too if the scheme says so.

    Attributes:
        dtype: of ``weight``.
        words: int32 ``[n, ceil(k / (32 // bits))]``, see ``pack``.
        scale: float32 ``[n, groups]``; ``zero``: the same, the code of zero, or None.
        table: float32 ``[2 ** bits]`` of formats that are not integers, or None.
        divisor: ``[k]`` what x is divided by, the weight's columns multiplied (SmoothQuant, AWQ), or None.
        sign: ``[k]`` of a rotation of x and the weight's columns, or None.
        order: int64 ``[k]``, the channel of x (divided and rotated) that each column of the codes is multiplied by, or
            None: as they come.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    divisor: Tensor | None
    sign: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        activation: Format | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.activation = format, activation
        self.dtype = dtype

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        weight: Quantized,
        activation: Format | None = None,
        divisor: Tensor | None = None,
        sign: Tensor | None = None,
        order: Tensor | None = None,
    ) -> QuantLinear:
        """The layer with another weight ``[n, k]`` (of the layer's dtype, bias and device).

        Args:
            weight: of the columns times ``divisor``, rotated by ``sign`` and put in ``order``, where these are given.
        """
        n, k = weight.codes.shape
        own: Any = layer
        made, device = cls(k, n, weight.format, activation, own.weight.dtype), own.weight.device
        for name, part in zip(("words", "scale", "zero", "table"), stored(weight, device), strict=True):
            made.register_buffer(name, part, persistent=name != "table")
        made.register_buffer("divisor", None if divisor is None else divisor.to(device, own.weight.dtype))
        made.register_buffer("sign", None if sign is None else sign.to(device, own.weight.dtype))
        made.register_buffer("order", None if order is None else order.to(device))
        bias = getattr(own, "bias", None)
        made.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        made.train(layer.training)
        return made

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, ``[n, k]``, of inputs as they come (neither divided, nor rotated, nor in
        another order)."""
        args = (self.words, self.scale, self.zero, self.table, self.format.bits, self.in_features)
        made = dequantized(*args, torch.float32)
        if self.order is not None:
            made = made[:, self.order.argsort()]
        if self.sign is not None:  # the transform without signs is its own inverse
            made = rotate(made) * self.sign.float()
        if self.divisor is not None:
            made = made / self.divisor.float()
        return made.to(self.dtype)

    def inputs(self, x: Tensor) -> Tensor:
        """What the weight is multiplied by: x divided, rotated and rounded as the scheme says."""
        x = self._met(x)
        return x if self.activation is None else rounded(x, self.activation)

    def _met(self, x: Tensor) -> Tensor:
        if self.divisor is not None:
            x = x / self.divisor
        if self.sign is not None:
            x = rotate(x, self.sign)
        return x if self.order is None else x[..., self.order]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., n]``."""
        f, a = self.format, self.activation
        # integers of a row are rounded by the product itself, which then is one of whole numbers
        bits = a.bits if a is not None and a.kind == "int" and a.group == WHOLE_ROW and a.symmetric else 0
        rows = (self._met(x) if bits else self.inputs(x)).reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        exponent = f.exponent if f.kind == "float" else 0
        out = packed_linear(rows, self.words, self.scale, self.zero, bias, self.table, f.bits, bits, exponent)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        inputs = "" if self.activation is None else f", inputs of {self.activation.bits} bits"
        return f"{self.in_features}, {self.out_features}, {self.format.kind} of {self.format.bits} bits{inputs}"


def divided(weight: Tensor, divisor: Tensor | None, sign: Tensor | None) -> Tensor:
    """The columns that meet the inputs which ``QuantLinear.inputs`` makes."""
    weight = weight.float() if divisor is None else weight.float() * divisor.float()
    return weight if sign is None else rotate(weight, sign.float())
