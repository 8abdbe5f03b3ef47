"""A model that keeps its keys and values in few bits whenever it keeps them at all."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import check
from .scheme import Scheme

__all__ = ["cache_for", "cache_words", "give_cache"]


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
