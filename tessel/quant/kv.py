"""Attention caches in few bits, for transformers models: old tokens packed, the most recent ones whole.

    cache = QuantCache(model.config, scheme("kv4"))
    model.generate(ids, past_key_values=cache)

Keys share a scale along a block of tokens, channel by channel, since a channel of keys is large or small for all
tokens; values share one along a group of channels, token by token (Liu et al. (2024), "KIVI"). A block is packed once,
when enough newer tokens have come, and attention always sees the newest tokens whole. In a compiled model the attention
kernel unpacks what it reads; elsewhere the cache is unpacked before each attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from ..errors import TesselError, check
from ..frontend.cache_op import dequantize_cache, quantize_cache
from .formats import Format
from .scheme import Scheme

__all__ = ["Packed", "QuantCache", "QuantCacheLayer", "pack_keys", "pack_values"]


@dataclass(frozen=True)
class Packed:
    """Tokens of a cache in few bits; see ``ops/cache.py``.

    Attributes:
        words: ``[batch, heads, blocks, ...]`` int32.
        scale, low: ``[batch, heads, blocks, groups of channels, groups of tokens]`` float16.
        bits: of a code.
        width: of a key or value.
        along: what the codes of a word differ in: "channels" of keys, "tokens" of values.
    """

    words: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    width: int
    along: str

    @property
    def tokens(self) -> int:
        """How many there are."""
        count, last = self.words.shape[3:]
        return int(self.words.shape[2] * (last if self.along == "channels" else count * (32 // self.bits)))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.words, self.scale, self.low))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``[batch, heads, tokens, width]``."""
        for t in (self.scale, self.low):  # what a compiler that keeps sizes as symbols cannot know
            torch._check(t.shape[2] == self.words.shape[2])
        return dequantize_cache(self.words, self.scale, self.low, self.bits, self.width, self.along, dtype)

    def and_then(self, more: Packed) -> Packed:
        """These tokens, then others."""
        mine, theirs = (self.words, self.scale, self.low), (more.words, more.scale, more.low)
        words, scale, low = (torch.cat(pair, 2) for pair in zip(mine, theirs, strict=True))
        return Packed(words, scale, low, self.bits, self.width, self.along)

    def of_batch(self, index: Tensor) -> Packed:
        """Rows of the batch in another order."""
        words, scale, low = (t.index_select(0, index) for t in (self.words, self.scale, self.low))
        return Packed(words, scale, low, self.bits, self.width, self.along)


def pack_keys(x: Tensor, format: Format) -> Packed:
    """Keys ``[batch, heads, tokens, width]``: a scale a channel for each block of ``format.group`` tokens.

    Raises:
        TesselError: NaN, infinity, values beyond float16, or tokens that are no whole blocks.
    """
    words, scale, low = quantize_cache(x, format.bits, format.group, "channels", 1)
    return Packed(words, scale, low, format.bits, x.shape[3], "channels")


def pack_values(x: Tensor, format: Format, tokens: int) -> Packed:
    """Values ``[batch, heads, n, width]``: a scale a token for each ``format.group`` channels (for all of them, where
    these do not divide the width), in blocks of ``tokens``."""
    group = format.group if x.shape[3] % format.group == 0 else x.shape[3]
    words, scale, low = quantize_cache(x, format.bits, tokens, "tokens", group)
    return Packed(words, scale, low, format.bits, x.shape[3], "tokens")


class QuantCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer.

    Args:
        keys: format of the keys; its group is the tokens of a block.
        values: format of the values.
        recent: so many of the newest tokens stay whole; up to a block less one more wait for their block to be full.

    Raises:
        TesselError: a format that caches have not.
    """

    keys: Any  # the recent tokens; None before the first
    values: Any
    is_sliding = False
    is_croppable = False  # of packed tokens, whole blocks at most could be put back

    def __init__(self, keys: Format, values: Format, recent: int) -> None:
        super().__init__()
        for what, f in (("keys", keys), ("values", values)):
            fits = f.kind == "int" and f.minimum and f.group > 0 and f.bits in (2, 4, 8)
            check(fits, lambda what=what, f=f: f"a cache of {what} in {f}: 2, 4 or 8 bits in groups, from a minimum")  # type: ignore[misc]
        check(recent >= 0, lambda: f"a cache with {recent} recent tokens")
        per = max(32 // keys.bits, 32 // values.bits)
        check(keys.group % per == 0, lambda: f"a cache in blocks of {keys.group} tokens: words hold {per}")
        self.key_format, self.value_format, self.recent = keys, values, recent
        self.packed: tuple[Packed, Packed] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; all keys and values so far, those just given whole.

        Args:
            key_states, value_states: ``[batch, heads, new tokens, width]``.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        torch._check(self.keys.shape[2] == self.values.shape[2])  # see ``Packed.dequantize``
        whole = [torch.cat(pair, 2) for pair in ((self.keys, key_states), (self.values, value_states))]
        seen = whole
        if self.packed is not None:
            torch._check(self.packed[0].words.shape[2] == self.packed[1].words.shape[2])
            seen = [torch.cat((p.dequantize(self.dtype), x), 2) for p, x in zip(self.packed, whole, strict=True)]
        block = self.key_format.group
        blocks = (whole[0].shape[2] - self.recent) // block
        if blocks > 0:
            old, whole = [x[:, :, : blocks * block] for x in whole], [x[:, :, blocks * block :] for x in whole]
            made = pack_keys(old[0], self.key_format), pack_values(old[1], self.value_format, block)
            before = self.packed
            self.packed = made if before is None else (before[0].and_then(made[0]), before[1].and_then(made[1]))
            whole = [x.clone() for x in whole]  # a view would keep the tokens that are packed now
        self.keys, self.values = whole
        return seen[0], seen[1]

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        if not self.is_initialized:
            return 0
        return int(self.keys.shape[2]) + (0 if self.packed is None else self.packed[0].tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there are for the next queries, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        if not self.is_initialized:
            return 0
        whole = sum(t.numel() * t.element_size() for t in (self.keys, self.values))
        return whole + sum(p.nbytes for p in self.packed or ())

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = self.packed = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens.

        Raises:
            TesselError: some of them are packed.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        left = self.keys.shape[2] + tokens_to_remove
        if tokens_to_remove > 0 or left < 0:
            raise TesselError(
                f"a quantized cache with {self.keys.shape[2]} whole tokens cannot be cropped by {tokens_to_remove}: "
                "give a negative number of them, or keep more recent tokens"
            )
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows ``indices`` of the batch."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.keys, self.values = self.keys.index_select(0, indices), self.values.index_select(0, indices)
        if self.packed is not None:
            self.packed = self.packed[0].of_batch(indices), self.packed[1].of_batch(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch as beam search continues them."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch ``repeats`` times."""
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0], device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        """Not done: what is packed is small."""

    def prefetch(self) -> None:
        """Not needed: nothing is offloaded."""


class QuantCache(DynamicCache):  # type: ignore[misc]
    """The cache of a model, a drop-in for transformers' ``DynamicCache``.

    Args:
        config: of the model. Its layers of full attention are quantized, windows and states stay as they are
            (``whole`` names them).
        scheme: with ``keys`` and ``values``.

    >>> from .scheme import scheme
    >>> from transformers import LlamaConfig
    >>> cache = QuantCache(LlamaConfig(num_hidden_layers=2), scheme("kv4"))
    >>> x = torch.randn(1, 4, 200, 64)
    >>> k, v = cache.update(x, x, 0)
    >>> k.shape, cache.get_seq_length(), cache.layers[0].packed[0].tokens
    (torch.Size([1, 4, 200, 64]), 200, 64)

    Raises:
        TesselError: the scheme says nothing of caches, or no layer of the model has one that can be quantized.
    """

    layers: list[Any]

    def __init__(self, config: Any, scheme: Scheme) -> None:
        keys, values = scheme.keys, scheme.values
        if keys is None or values is None:
            raise TesselError(f"scheme {scheme.name!r} says nothing of a cache; kv8, kv4 and kv2 do")
        super().__init__(config=config)
        plain = [type(layer) is DynamicLayer for layer in self.layers]
        kinds = sorted({type(layer).__name__ for layer in self.layers})
        check(any(plain), lambda: f"no layer has a cache that grows, only {', '.join(kinds)}: nothing to quantize")
        self.whole: tuple[int, ...] = tuple(i for i, p in enumerate(plain) if not p)
        self.layers = [
            QuantCacheLayer(keys, values, scheme.recent) if p else layer
            for p, layer in zip(plain, self.layers, strict=True)
        ]
