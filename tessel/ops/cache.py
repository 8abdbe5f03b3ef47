"""Keys or values of an attention cache, stored as codes of few bits in blocks of tokens.

    out[b, h, g * T + t, c] = code(g, t, c) * scale[b, h, g, c * C / width, t * P / T] + low[the same]

Keys have one scale a channel for all T tokens of a block (C = width, P = 1), values one a token for each of C groups of
channels (P = T): Liu et al. (2024), "KIVI". A 32-bit word holds ``32 // bits`` codes, as a kernel multiplies them: what
is summed over lies in one word, what stays apart lies side by side. So a word of keys has neighbouring channels of
one token, ``words [b, h, g, ceil(width * bits / 32), T]``, and a word of values neighbouring tokens of one channel,
``words [b, h, g, T * bits / 32, width]``. Of two neighbours the first lies in the lower half of the word, the second in
the same place of the upper half: a mask gives both as a pair of 16-bit numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..ir.node import Builder, Node, Op, Value
from ..ir.types import dim_equal
from .common import arg_types, need_tensor, result, table
from .dims import Piece
from .emit import Emit, wide_dtype

__all__ = ["ALONG", "CACHE", "dequantize_cache_ref", "place_in_word"]

ALONG = ("channels", "tokens")
"""What the codes of one word differ in: channels of keys, tokens of values."""


def place_in_word(bits: int) -> Tensor:
    """The lowest bit of each code of a word, int32 ``[32 // bits]``.

    >>> place_in_word(8).tolist()
    [0, 16, 8, 24]
    """
    at = torch.arange(32 // bits, dtype=torch.int32)
    return at // 2 * bits + at % 2 * 16


def dequantize_cache_ref(
    words: Tensor, scale: Tensor, low: Tensor, bits: int, width: int, along: str, dtype: torch.dtype
) -> Tensor:
    """The keys or values by their definition.

    Args:
        words: ``[batch, heads, blocks, W, T or width]`` int32, see above.
        scale, low: ``[batch, heads, blocks, C, P]``, floating; C divides the width, P the tokens of a block.
        bits: of a code: 1, 2, 4 or 8.
        width: of a key or value.
        along: what the codes of one word differ in, one of ``ALONG``.
        dtype: of the result ``[batch, heads, tokens, width]``.

    >>> words = torch.tensor([0x2_0001]).int().reshape(1, 1, 1, 1, 1)
    >>> one = torch.ones(1, 1, 1, 1, 1)
    >>> dequantize_cache_ref(words, one, -one, 8, 2, "channels", torch.float32).flatten()
    tensor([0., 1.])
    """
    b, h, blocks, count, last = words.shape
    (c, p), wide = scale.shape[3:], wide_dtype(dtype)
    shifts = place_in_word(bits).to(words.device)[:, None]
    codes = (words[:, :, :, :, None] >> shifts) & (2**bits - 1)
    codes = codes.reshape(b, h, blocks, count * (32 // bits), last).to(wide)
    if along == "channels":  # [.., channel, token] from here on
        codes = codes[:, :, :, :width]
    else:
        codes = codes.transpose(3, 4)
    tokens = codes.shape[4]
    grouped = codes.reshape(b, h, blocks, c, width // c, p, tokens // p)
    made = grouped * scale.to(wide)[..., :, None, :, None] + low.to(wide)[..., :, None, :, None]
    made = made.reshape(b, h, blocks, width, tokens).transpose(3, 4)
    return made.reshape(b, h, blocks * tokens, width).to(dtype)


def _tokens(words: Any, bits: int, along: str) -> Any:
    """Tokens of a block."""
    return words.shape[4] if along == "channels" else words.shape[3] * (32 // bits)


def _infer(words: Any, scale: Any, low: Any, bits: int, width: int, along: str, dtype: torch.dtype) -> Any:
    need_tensor("dequantize_cache", words, scale, low)
    check(bits in (1, 2, 4, 8), lambda: f"dequantize_cache: codes of {bits} bits; 1, 2, 4 and 8 are possible")
    check(along in ALONG, lambda: f"dequantize_cache: along={along!r}: {' or '.join(ALONG)}")
    fits = words.rank == scale.rank == low.rank == 5 and words.dtype == torch.int32
    check(fits, lambda: f"dequantize_cache: {words}, {scale} and {low} are not of the ranks and dtypes it takes")
    same = all(map(dim_equal, words.shape[:3], scale.shape[:3])) and all(map(dim_equal, scale.shape, low.shape))
    b, h, blocks, count, last = words.shape
    c, p = scale.shape[3:]
    known = all(isinstance(n, int) and n > 0 for n in (count, last, c, p))
    tokens = _tokens(words, bits, along)
    whole = known and width % c == 0 and tokens % p == 0
    whole = whole and (count == -(-width * bits // 32) if along == "channels" else last == width)
    check(
        same and whole,
        lambda: f"dequantize_cache: {scale} and {low} do not fit {words}, {width} wide, {bits} bits along {along}",
    )
    return (result((b, h, blocks * tokens, width), dtype, words),)


def _dims(node: Node) -> str:
    if node.attrs["along"] == "channels":
        return "b h g w* t*, b h g i* p*, b h g i* p* -> b h (g t*) i*"
    return "b h g w* (c i*), b h g c p*, b h g c p* -> b h (g t*) (c i*)"


def _split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """Some of the groups of channels."""
    groups = arg_types(node)[1].shape[3]
    return Piece({"width": size * (node.attrs["width"] // groups)}) if factor == "c" else Piece()


def _opened(builder: Builder, node: Node) -> tuple[Value, ...]:
    words, scale, low = node.args
    bits, width, along, dtype = (node.attrs[n] for n in ("bits", "width", "along", "dtype"))
    e, per, wide = Emit(builder), 32 // bits, wide_dtype(dtype)
    b, h, blocks, count, last = words.shape
    (c, p), tokens = scale.shape[3:], _tokens(words, bits, along)
    first = e.reshape(e("iota", shape=(per // 2,), start=0, step=bits, dtype=torch.int32), (per // 2, 1, 1))
    second = e.reshape(e("iota", shape=(2,), start=0, step=16, dtype=torch.int32), (2, 1))
    apart = e("shift_right", e.reshape(words, (b, h, blocks, count, 1, 1, last)), e("add", first, second))
    codes = e.reshape(e("bitwise_and", apart, 2**bits - 1), (b, h, blocks, count * per, last))
    if along == "channels" and count * per != width:
        codes = e("slice", codes, dim=3, start=0, size=width, step=1)
    if along == "channels":
        apart = e.reshape(codes, (b, h, blocks, c, width // c, p, tokens // p))
        codes = e("permute", apart, dims=(0, 1, 2, 5, 6, 3, 4))
    else:
        codes = e.reshape(codes, (b, h, blocks, p, tokens // p, c, width // c))
    numbers = e.cast(codes, wide)
    by = [e.reshape(e("permute", x, dims=(0, 1, 2, 4, 3)), (b, h, blocks, p, 1, c, 1)) for x in (scale, low)]
    made = e("add", e("mul", numbers, e.cast(by[0], wide)), e.cast(by[1], wide))
    return (e.reshape(e.cast(made, dtype), (b, h, blocks * tokens, width)),)


CACHE = table(
    Op(
        "dequantize_cache",
        "composite",
        dims=_dims,
        ref=dequantize_cache_ref,
        infer=_infer,
        decompose=_opened,
        split=_split,
        cost=8,
        doc="dequantize_cache(words [b, h, g, w, t | d], scale [b, h, g, c, p], low, bits=, width=, along=, dtype=)",
    ),
)
