"""A model that keeps its keys and values in few bits whenever it keeps them at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import check
from .formats import integers
from .scheme import Scheme

__all__ = ["CACHE_KEY", "cache_for", "cache_words", "give_cache", "read_cache", "said_of_cache"]

CACHE_KEY = "tessel_cache"
"""Where ``config.json`` says what the cache is; the compressed-tensors layout has no words for these groups."""


def cache_for(model: nn.Module, scheme: Scheme) -> str:
    """What the cache of a language model of transformers is by a scheme, in words for a report.

    Raises:
        TesselError: the model is none that generates text, or has no cache that could be quantized.
    """
    config, able = getattr(model, "config", None), getattr(model, "can_generate", None)
    check(
        config is not None and able is not None and bool(able()),
        lambda: (
            f"quantize: scheme {scheme.name!r} is about the cache of a language model of transformers, "
            f"and {type(model).__name__} is none that generates"
        ),
    )
    from .kv import QuantCache  # needs transformers

    whole = QuantCache(config, scheme).whole
    left = f"; layers {', '.join(map(str, whole))} keep theirs whole" if whole else ""
    return cache_words(scheme) + left


def give_cache(model: nn.Module, scheme: Scheme) -> None:
    """Make a model that ``cache_for`` takes use a ``QuantCache`` wherever it would make a cache of its own."""
    model.register_forward_pre_hook(_GiveCache(model.config, scheme), with_kwargs=True)


def cache_words(scheme: Scheme) -> str:
    """A scheme's cache in words.

    >>> from .scheme import scheme
    >>> cache_words(scheme("kv4"))
    'keys int4, blocks of 32 tokens; values int4, groups of 32 channels; 128 recent tokens whole; 5 bits a value'
    """
    keys, values = scheme.keys, scheme.values
    assert keys is not None and values is not None
    mean = (keys.bits_per_value(keys.group) + values.bits_per_value(values.group)) / 2
    return (
        f"keys int{keys.bits}, blocks of {keys.group} tokens; values int{values.bits}, groups of {values.group} "
        f"channels; {scheme.recent} recent tokens whole; {mean:g} bits a value"
    )


def said_of_cache(model: nn.Module) -> dict[str, int] | None:
    """What is written of the cache that ``give_cache`` gave a model; None if it did not."""
    own = [h.scheme for h in model._forward_pre_hooks.values() if isinstance(h, _GiveCache)]
    if not own or own[-1].keys is None or own[-1].values is None:
        return None
    keys, values = own[-1].keys, own[-1].values
    return {
        "key_bits": keys.bits, "tokens": keys.group, "value_bits": values.bits, "channels": values.group,
        "recent": own[-1].recent,
    }  # fmt: skip


def read_cache(said: Any, where: str) -> Scheme:
    """The scheme that ``said_of_cache`` wrote.

    Raises:
        TesselError: something else was written; ``where`` names the file.
    """
    names = ("key_bits", "tokens", "value_bits", "channels", "recent")
    whole = isinstance(said, dict) and all(type(said.get(n)) is int and said[n] >= 0 for n in names)
    check(whole, lambda: f"load_quantized: {where}: {CACHE_KEY} is {said!r}, not numbers for {', '.join(names)}")
    key_bits, tokens, value_bits, channels, recent = (said[n] for n in names)
    keys, values = (
        replace(integers(bits, group, minimum=True), scale="f16")
        for bits, group in ((key_bits, tokens), (value_bits, channels))
    )
    return Scheme(f"kv{key_bits}", keys=keys, values=values, recent=recent)


class _GiveCache:
    """Before a call: a quantized cache in the place of none, or of an empty one of the usual kind."""

    def __init__(self, config: Any, scheme: Scheme) -> None:
        self.config, self.scheme = config, scheme

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from transformers.cache_utils import DynamicCache

        from .kv import QuantCache

        given, wanted = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if given is None:
            wanted = getattr(self.config, "use_cache", False) if wanted is None else wanted
            if not wanted or module.training:
                return None
        elif type(given) is not DynamicCache or given.get_seq_length() > 0:
            return None  # the caller's choice
        return args, {**kwargs, "past_key_values": QuantCache(self.config, self.scheme)}
