"""A linear layer whose weight is stored as integers of few bits, packed along k into 32-bit words.

    out[m, n] = sum over k of x[m, k] * (code[n, k] - zero[n, g]) * scale[n, g] + bias[n],    g = k // group

A word holds ``32 // bits`` codes, lowest bits first, as checkpoints of the compressed-tensors layout have them. What is
not an integer format multiplies ``table[code]`` instead of ``code - zero``. With ``inputs=8`` x is rounded to as many
bits first, a scale a row, so that whole numbers may be multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..ir.node import Builder, Node, Op, Value
from ..ir.types import Dim, dim_equal, product
from .blocks import row_blocks
from .common import arg_types, need_tensor, result, table
from .dims import Piece
from .emit import Emit, wide_dtype
from .fold import need_float

__all__ = [
    "KERNEL_DTYPES",
    "PACKED",
    "by_integers",
    "dequantized",
    "emit_weight",
    "has_kernel",
    "open_packed",
    "packed_linear_ref",
    "rounded_rows",
    "whole_numbers",
]

_MOST = 2**17
"""Values along k from which on a sum of products of 8 bits may leave 32 bits."""


def dequantized(
    words: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bits: int, k: int, dtype: torch.dtype
) -> Tensor:
    """The weight ``[n, k]`` that words ``[n, ceil(k * bits / 32)]`` and scales ``[n, groups]`` stand for.

    >>> dequantized(torch.tensor([[0x98]], dtype=torch.int32), torch.ones(1, 1), None, None, 4, 2, torch.float32)
    tensor([[0., 1.]])
    """
    per, wide = 32 // bits, wide_dtype(dtype)
    shifts = torch.arange(0, per * bits, bits, dtype=torch.int32, device=words.device)
    made = torch.empty((words.shape[0], k), dtype=dtype, device=words.device)
    for part in row_blocks(made):
        codes = ((words[part, :, None] >> shifts) & (2**bits - 1)).flatten(1)[:, :k]
        numbers = codes.to(wide) if table is None else table.to(wide)[codes]
        grouped = numbers.unflatten(1, (scale.shape[1], -1))
        if table is None:
            grouped = grouped - (float(2 ** (bits - 1)) if zero is None else zero[part].to(wide)[:, :, None])
        made[part] = (grouped * scale[part].to(wide)[:, :, None]).flatten(1)
    return made


def packed_linear_ref(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    bits: int = 4,
    inputs: int = 0,
    exponent: int = 0,
) -> Tensor:
    """The layer by its definition.

    Args:
        x: [m, k] floating.
        words: [n, ceil(k / (32 // bits))] int32.
        scale: [n, groups] float32; groups divide k.
        zero: [n, groups] float32, the code of zero; None: ``2 ** (bits - 1)``.
        bias: [n] in x's dtype, or None.
        table: [2 ** bits] float32: what the codes stand for; None: integers.
        bits: of a code, 1 to 8.
        inputs: bits that x is rounded to, a scale a row, symmetric; 0: it is taken as it is.
        exponent: bits of the exponent of a table that is all small floats, whose codes are their bits; 0: any table.
    """
    if not inputs:
        weight = dequantized(words, scale, zero, table, bits, x.shape[1], x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    codes, row_scale = rounded_rows(x, inputs)
    weight = dequantized(words, scale, zero, table, bits, x.shape[1], codes.dtype)
    out = torch.nn.functional.linear(codes, weight) * row_scale
    return (out if bias is None else out + bias).to(x.dtype)


def rounded_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of x ``[m, k]``, half to even, and the scales ``[m, 1]`` of its rows, NaN for one that holds NaN or
    infinity; float32 for halves.

    >>> rounded_rows(torch.tensor([[0.5, -2.54]]), 8)
    (tensor([[  25., -127.]]), tensor([[0.0200]]))
    """
    wide, top = x.to(wide_dtype(x.dtype)), 2 ** (bits - 1) - 1
    scale = wide.abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale == 0, 1.0, scale)
    return (wide / scale).round().clamp(-top, top), torch.where(scale < torch.inf, scale, torch.nan)


def _infer(
    x: Any,
    words: Any,
    scale: Any,
    zero: Any = None,
    bias: Any = None,
    table: Any = None,
    bits: int = 4,
    inputs: int = 0,
    exponent: int = 0,
) -> Any:
    need_float("packed_linear", x)
    need_tensor("packed_linear", words, scale)
    check(1 <= bits <= 8, lambda: f"packed_linear: codes of {bits} bits; 1 to 8 are possible")
    check(inputs in (0, *range(2, 9)), lambda: f"packed_linear: inputs of {inputs} bits; 2 to 8, or 0, are possible")
    fits = x.rank == words.rank == scale.rank == 2 and words.dtype == torch.int32
    check(fits, lambda: f"packed_linear: {x}, {words} and {scale} are not of the ranks and dtypes it takes")
    k, per, groups = x.shape[1], 32 // bits, scale.shape[1]
    rows = [words.shape[0], scale.shape[0]] + [t.shape[0] for t in (zero, bias) if t is not None]
    check(
        all(dim_equal(n, rows[0]) for n in rows), lambda: f"packed_linear: {words}, {scale}, {zero}, {bias}: other rows"
    )
    if all(isinstance(n, int) for n in (k, words.shape[1], groups)):
        check(
            -(-k // per) == words.shape[1], lambda: f"packed_linear: {words} holds no rows of {k} codes of {bits} bits"
        )
        check(groups > 0 and k % groups == 0, lambda: f"packed_linear: {groups} groups do not divide k = {k}")
    return (result((x.shape[0], words.shape[0]), x.dtype, x),)


def _dims(node: Node) -> str:
    """Groups are what k may be split by, where words hold whole groups and x is not rounded by its row."""
    x, words, scale, zero, bias, lut = _all(node)
    k, groups, count = x.shape[1], scale.shape[1], words.shape[1]
    known = all(isinstance(n, int) for n in (k, groups, count))
    even = known and count % groups == 0 and (k // groups) % (32 // node.attrs.get("bits", 4)) == 0
    if even and not node.attrs.get("inputs") and groups > 1:
        given = ["m (g+ i*)", "n (g+ w*)", "n g+", "n g+" if zero is not None else ""]
    else:
        given = ["m i*", "n w*", "n g*", "n g*" if zero is not None else ""]
    given += ["n" if bias is not None else "", "t*" if lut is not None else ""]
    return f"{', '.join(filter(None, given))} -> m n"


def _all(node: Node) -> list[Any]:
    types = arg_types(node)
    return types + [None] * (6 - len(types))


KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""Of inputs for which the CPU has kernels."""


def _split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """One piece of k adds the bias."""
    _, _, _, zero, bias, _ = _all(node)
    return Piece(once=(3 + (zero is not None),)) if factor == "g" and bias is not None else Piece()


def _flops(node: Node) -> Dim:
    x, words = arg_types(node)[:2]
    return product((2, *x.shape, words.shape[0]))


def has_kernel(node: Node) -> bool:
    """Whether the CPU has a kernel for this layer."""
    x, _, scale, *_ = _all(node)
    k, groups = x.shape[1], scale.shape[1]
    known = isinstance(k, int) and isinstance(groups, int) and k > 0
    return known and x.dtype in KERNEL_DTYPES and node.attrs.get("inputs", 0) in (0, 8)


def by_integers(node: Node) -> bool:
    """Whether whole numbers are multiplied, where the CPU has instructions for them: both sides are integers of 8 bits
    or less, their sums fit into 32 bits, and groups hold whole words of four."""
    x, _, scale, _, _, lut = _all(node)
    return whole_numbers(node.attrs.get("inputs", 0), x.shape[1], scale.shape[1], lut)


def whole_numbers(inputs: int, k: Dim, groups: Dim, lut: Any) -> bool:
    """``by_integers`` of a product over k; ``lut``: the weight's table or None."""
    known = isinstance(k, int) and isinstance(groups, int)
    return known and inputs == 8 and lut is None and k < _MOST and (groups == 1 or k // groups % 4 == 0)


def open_packed(builder: Builder, node: Node) -> tuple[Value, ...]:
    """The layer in simple operators; a product that fuses them unpacks the weight where it multiplies."""
    x, words, scale, zero, bias, lut = [*node.args] + [None] * (6 - len(node.args))
    e, wide = Emit(builder), wide_dtype(x.dtype)
    weight = emit_weight(e, words, scale, zero, lut, node.attrs.get("bits", 4), x.shape[1], x.dtype)
    turned = e("permute", weight, dims=(1, 0))
    if not node.attrs.get("inputs"):
        out = e("matmul", x, turned)
        return (out if bias is None else e("add", out, bias),)
    rows, row_scale = _rounded(e, x, node.attrs["inputs"], wide)
    out = e("mul", e.wide(e("matmul", e.cast(rows, x.dtype), turned)), row_scale)
    return (e.cast(out if bias is None else e("add", out, e.cast(bias, wide)), x.dtype),)


def emit_weight(
    e: Emit, words: Value, scale: Value, zero: Value | None, lut: Value | None, bits: int, k: Dim, dtype: torch.dtype
) -> Value:
    """``dequantized`` in simple operators."""
    (n, groups), per, wide = scale.shape, 32 // bits, wide_dtype(dtype)
    shifts = e("iota", shape=(per,), start=0, step=bits, dtype=torch.int32)
    apart = e("shift_right", e.reshape(words, (n, words.shape[1], 1)), shifts)
    codes = e.reshape(e("bitwise_and", apart, 2**bits - 1), (n, words.shape[1] * per))
    if not dim_equal(codes.shape[1], k):
        codes = e("slice", codes, dim=1, start=0, size=k, step=1)
    grouped = e.reshape(codes, (n, groups, k // groups))
    if lut is None:
        offset = 2 ** (bits - 1) if zero is None else e.reshape(e.cast(zero, wide), (n, groups, 1))
        numbers = e("sub", e.cast(grouped, wide), offset)
    else:
        numbers = _looked_up(e, lut, grouped, wide)
    weight = e.cast(e("mul", numbers, e.reshape(e.cast(scale, wide), (n, groups, 1))), dtype)
    return e.reshape(weight, (n, k))


def _rounded(e: Emit, x: Value, bits: int, wide: torch.dtype) -> tuple[Value, Value]:
    """``rounded_rows`` in simple operators; codes of up to 8 bits are whole numbers in bfloat16 too."""
    top, held = 2 ** (bits - 1) - 1, e.cast(x, wide)
    scale = e("div", e("amax", e("abs", held), dims=(1,), keepdim=True), float(top))
    scale = e("where", e("eq", scale, 0.0), 1.0, scale)
    codes = e("round", e("div", held, scale))
    codes = e("minimum", e("maximum", codes, float(-top)), float(top))
    return codes, e("where", e("lt", scale, float("inf")), scale, float("nan"))


def _looked_up(e: Emit, lut: Value, codes: Value, wide: torch.dtype) -> Value:
    flat = e.reshape(e.cast(codes, torch.int64), (product(codes.shape),))
    return e.reshape(e("index_select", e.cast(lut, wide), flat, dim=0), codes.shape)


PACKED = table(
    Op(
        "packed_linear",
        "library",
        dims=_dims,
        ref=packed_linear_ref,
        infer=_infer,
        flops=_flops,
        split=_split,
        cost=1000,
        doc="packed_linear(x [m, k], words [n, k * bits / 32], scale [n, g], zero|None, bias|None, table|None, bits=, "
        "inputs=, exponent=)",
    ),
)
