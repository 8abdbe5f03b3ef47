"""A linear layer whose weight is stored as integers of few bits, packed along k into 32-bit words.

    out[m, n] = sum over k of x[m, k] * (code[n, k] - zero[n, g]) * scale[n, g] + bias[n],    g = k // group

A word holds ``32 // bits`` codes, lowest bits first, as checkpoints of the compressed-tensors layout have them. What is
not an integer format multiplies ``table[code]`` instead of ``code - zero``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..ir.node import Builder, Node, Op, Value
from ..ir.types import Dim, dim_equal, product
from .common import arg_types, need_tensor, result, table
from .dims import Piece
from .emit import Emit, wide_dtype
from .fold import need_float

__all__ = ["PACKED", "dequantized", "has_kernel", "open_packed", "packed_linear_ref"]


def dequantized(
    words: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bits: int, k: int, dtype: torch.dtype
) -> Tensor:
    """The weight ``[n, k]`` that words ``[n, ceil(k * bits / 32)]`` and scales ``[n, groups]`` stand for.

    >>> dequantized(torch.tensor([[0x98]], dtype=torch.int32), torch.ones(1, 1), None, None, 4, 2, torch.float32)
    tensor([[0., 1.]])
    """
    per, wide = 32 // bits, wide_dtype(dtype)
    shifts = torch.arange(0, per * bits, bits, dtype=torch.int32, device=words.device)
    codes = ((words[:, :, None] >> shifts) & (2**bits - 1)).reshape(words.shape[0], -1)[:, :k]
    numbers = codes.to(wide) if table is None else table.to(wide)[codes.long()]
    grouped = numbers.reshape(*scale.shape, -1)
    if table is None:
        offset = float(2 ** (bits - 1)) if zero is None else zero.to(wide)[:, :, None]
        grouped = grouped - offset
    return (grouped * scale.to(wide)[:, :, None]).reshape(-1, k).to(dtype)


def packed_linear_ref(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    bits: int = 4,
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
    """
    weight = dequantized(words, scale, zero, table, bits, x.shape[1], x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _infer(x: Any, words: Any, scale: Any, zero: Any = None, bias: Any = None, table: Any = None, bits: int = 4) -> Any:
    need_float("packed_linear", x)
    need_tensor("packed_linear", words, scale)
    check(1 <= bits <= 8, lambda: f"packed_linear: codes of {bits} bits; 1 to 8 are possible")
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
    """Groups are what k may be split by, where words hold whole groups."""
    x, words, scale, zero, bias, lut = _all(node)
    k, groups, count = x.shape[1], scale.shape[1], words.shape[1]
    known = all(isinstance(n, int) for n in (k, groups, count))
    even = known and count % groups == 0 and (k // groups) % (32 // node.attrs.get("bits", 4)) == 0
    if even and groups > 1:
        given = ["m (g+ i*)", "n (g+ w*)", "n g+", "n g+" if zero is not None else ""]
    else:
        given = ["m i*", "n w*", "n g*", "n g*" if zero is not None else ""]
    given += ["n" if bias is not None else "", "t*" if lut is not None else ""]
    return f"{', '.join(filter(None, given))} -> m n"


def _all(node: Node) -> list[Any]:
    types = arg_types(node)
    return types + [None] * (6 - len(types))


_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def _split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """One piece of k adds the bias."""
    _, _, _, zero, bias, _ = _all(node)
    return Piece(once=(3 + (zero is not None),)) if factor == "g" and bias is not None else Piece()


def _flops(node: Node) -> Dim:
    x, words = arg_types(node)[:2]
    return product((2, *x.shape, words.shape[0]))


def has_kernel(node: Node) -> bool:
    """Whether the CPU has a kernel for this layer: whole words of four or eight bits a row, integers."""
    x, _, scale, _, _, lut = _all(node)
    bits = node.attrs.get("bits", 4)
    k, groups = x.shape[1], scale.shape[1]
    known = isinstance(k, int) and isinstance(groups, int) and k > 0
    return known and lut is None and bits in (4, 8) and k % (32 // bits) == 0 and x.dtype in _KERNEL_DTYPES


def open_packed(builder: Builder, node: Node) -> tuple[Value, ...]:
    """The layer in simple operators; a product that fuses them unpacks the weight where it multiplies."""
    x, words, scale, zero, bias, lut = [*node.args] + [None] * (6 - len(node.args))
    e, bits = Emit(builder), node.attrs.get("bits", 4)
    k, (n, groups), per = x.shape[1], scale.shape, 32 // bits
    wide = wide_dtype(x.dtype)
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
    weight = e.cast(e("mul", numbers, e.reshape(e.cast(scale, wide), (n, groups, 1))), x.dtype)
    out = e("matmul", x, e("permute", e.reshape(weight, (n, k)), dims=(1, 0)))
    return (out if bias is None else e("add", out, bias),)


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
        doc="packed_linear(x [m, k], words [n, k * bits / 32], scale [n, g], zero|None, bias|None, table|None, bits=)",
    ),
)
