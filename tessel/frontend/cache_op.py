"""``tessel::quantize_cache`` and ``tessel::dequantize_cache``: packed keys and values as operators no tracer opens.

    quantize_cache(x, bits, tokens, along, group) -> (words, scale, low)      x [b, h, n, d], n a multiple of ``tokens``
    dequantize_cache(words, scale, low, bits, width, along, dtype) -> x

Shapes and meaning are those of ``ops/cache.py``. Compiled, the second becomes part of the kernel that reads it; the
first stays a call, made once for each block of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..ir.node import Value
from ..ops.cache import ALONG, dequantize_cache_ref, place_in_word
from .lower import Lowering, Table, register

__all__ = ["dequantize_cache", "quantize_cache"]

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define(
    "quantize_cache(Tensor x, int bits, int tokens, str along, int group) -> (Tensor words, Tensor scale, Tensor low)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "dequantize_cache(Tensor words, Tensor scale, Tensor low, int bits, int width, str along, ScalarType dtype) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LARGEST = 65504.0  # float16's
_LEAST = 2.0**-14  # its smallest normal number: a scale below would be a rough one


def _quantize(x: Tensor, bits: int, tokens: int, along: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes count from the stored, rounded minimum in steps of the stored, rounded scale: what rounding these to
    float16 costs is a slightly wider range, not an error of its own."""
    check(bool(torch.isfinite(x).all()), lambda: f"quantize_cache: {_bad(x)} of {x.numel()} values are NaN or infinite")
    x = x.detach()
    b, h, n, d = x.shape
    per, top = 32 // bits, 2**bits - 1
    check(along in ALONG, lambda: f"quantize_cache: along={along!r}: {' or '.join(ALONG)}")
    check(n % tokens == 0 and tokens % per == 0, lambda: f"quantize_cache: {n} tokens are no blocks of {tokens}")
    check(d % group == 0, lambda: f"quantize_cache: groups of {group} do not divide {d} channels")
    blocks, c, p = n // tokens, d // group, 1 if along == "channels" else tokens
    wide = x.float().reshape(b, h, blocks, tokens, d).transpose(3, 4)  # [.., channel, token]
    grouped = wide.reshape(b, h, blocks, c, group, p, tokens // p)
    least, most = grouped.amin((4, 6), keepdim=True), grouped.amax((4, 6), keepdim=True)
    check(
        x.numel() == 0 or max(-float(least.min()), float(most.max())) < _LARGEST,
        lambda: f"quantize_cache: values reach {float(x.abs().max()):g}; minima are float16, up to {_LARGEST:g}",
    )
    low = _down(least)
    scale = -_down(-((most - low.float()) / top).clamp(min=_LEAST))
    codes = ((grouped - low.float()) / scale.float()).round().clamp(0, top).long()
    codes = codes.reshape(b, h, blocks, d, tokens)
    if along == "channels":
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -d % per))
    else:
        codes = codes.transpose(3, 4)
    apart = codes.reshape(b, h, blocks, codes.shape[3] // per, per, codes.shape[4])
    whole = (apart << place_in_word(bits).long().to(x.device)[:, None]).sum(4)
    words = torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)
    return words, scale.reshape(b, h, blocks, c, p), low.reshape(b, h, blocks, c, p)


def _down(x: Tensor) -> Tensor:
    """The float16 at or below."""
    near = x.half()
    bits = near.view(torch.int16)  # a sign and a magnitude: the next number is one word away
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -0x7FFF)).to(torch.int16)
    return torch.where(near.float() > x, below.view(torch.float16), near)


def _bad(x: Tensor) -> int:
    return int((~torch.isfinite(x)).sum())


def _quantize_fake(x: Tensor, bits: int, tokens: int, along: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, d = x.shape
    blocks, per, keys = n // tokens, 32 // bits, along == "channels"
    scale = x.new_empty((b, h, blocks, d // group, 1 if keys else tokens), dtype=torch.float16)
    shape = (-(-d // per), tokens) if keys else (tokens // per, d)
    return x.new_empty((b, h, blocks, *shape), dtype=torch.int32), scale, torch.empty_like(scale)


def _dequantize_fake(
    words: Tensor, scale: Tensor, low: Tensor, bits: int, width: int, along: str, dtype: torch.dtype
) -> Tensor:
    b, h, blocks, count, last = words.shape
    tokens = last if along == "channels" else count * (32 // bits)
    return words.new_empty((b, h, blocks * tokens, width), dtype=dtype)


def _dequantize(*args: Any) -> Tensor:
    return dequantize_cache_ref(*args)


_LIB.impl("quantize_cache", _quantize, "CompositeExplicitAutograd")
_LIB.impl("dequantize_cache", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::quantize_cache", _quantize_fake, lib=_LIB)
torch.library.register_fake("tessel::dequantize_cache", _dequantize_fake, lib=_LIB)

quantize_cache = torch.ops.tessel.quantize_cache.default
dequantize_cache = torch.ops.tessel.dequantize_cache.default

TABLE: Table = {}


@register(TABLE, "tessel.dequantize_cache.default")
def _dequantize_cache(
    c: Lowering, words: Any, scale: Any, low: Any, bits: int, width: int, along: str, dtype: torch.dtype
) -> Value:
    return c("dequantize_cache", words, scale, low, bits=bits, width=width, along=along, dtype=dtype)
