"""Schemes: which tensors of a model get which format, as frozen records with a name.

>>> scheme("w4a16").weight.group, scheme("w4a16-g32").weight.group
(128, 32)
>>> scheme("w8a8")
Scheme('w8a8': weight int8 a row, activation int8 a row)
>>> scheme("w4a17")
Traceback (most recent call last):
    ...
tessel.errors.TesselError: unknown scheme 'w4a17'; did you mean 'w4a16'? w<bits>a16[-g<group>|-channel], w<bits>a8, ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..errors import TesselError, check, nearest
from .formats import FORMATS, WHOLE_ROW, WHOLE_TENSOR, Format, block_floats, integers

__all__ = ["NAMES", "Scheme", "scheme"]

GROUP = 128
"""Values of a weight's row that share a scale where the name does not say, below 8 bits."""


@dataclass(frozen=True, slots=True, repr=False)
class Scheme:
    """What becomes of a model's tensors; ``None``: it stays as it is.

    Attributes:
        name: as ``scheme`` reads it.
        weight: of the linear layers' weights.
        activation: of their inputs, one scale a token unless the format says one a tensor, taken when they are there.
        keys, values: of the attention cache. Keys share scales along the tokens (a channel of keys is large or small
            for all tokens), values along the channels (Liu et al., "KIVI").
        recent: tokens of the cache that stay whole.
        sparse: of each four weights two are zero (2:4).
        ordered: channels of a weight of like size lie side by side, in an order chosen for each layer when it is
            quantized, so that they share a scale.
    """

    name: str
    weight: Format | None = None
    activation: Format | None = None
    keys: Format | None = None
    values: Format | None = None
    recent: int = 0
    sparse: bool = False
    ordered: bool = False

    def __repr__(self) -> str:
        parts = [f"{what} {_words(f)}" for what in _TENSORS if (f := getattr(self, what)) is not None]
        parts += ["2:4 sparse"] * self.sparse + ["channels in order"] * self.ordered
        return f"Scheme({self.name!r}: {', '.join(parts) or 'nothing'})"


_TENSORS = ("weight", "activation", "keys", "values")
_INTEGER = re.compile(r"w(?P<w>[1-8])a(?P<a>16|8)(?:-(?:g(?P<group>\d+)|(?P<channel>channel)))?(?P<asym>-asym)?\Z")
_BLOCKS = re.compile(r"bfp(?P<bits>[2-8])a16(?:-g(?P<group>[1-9]\d*))?\Z")
_CACHE = re.compile(r"kv(?P<bits>[248])\Z")
_RECENT = 128  # tokens that KIVI keeps whole
_CACHE_GROUP = 32  # KIVI's group
_BLOCK = 32  # values of a block in the MX formats

_NAMED: dict[str, Scheme] = {
    "fp8": Scheme("fp8", FORMATS["e4m3"], FORMATS["e4m3"]),
    "fp8-row": Scheme("fp8-row", FORMATS["e4m3-row"], FORMATS["e4m3-row"]),
    "fp8-block": Scheme("fp8-block", FORMATS["e4m3-block"], replace(FORMATS["e4m3"], group=128)),
    "mxfp8": Scheme("mxfp8", FORMATS["mxfp8"], FORMATS["mxfp8"]),
    "mxfp4": Scheme("mxfp4", FORMATS["mxfp4"], FORMATS["mxfp4"]),
    "mxfp4a16": Scheme("mxfp4a16", FORMATS["mxfp4"]),
    "nvfp4": Scheme("nvfp4", FORMATS["nvfp4"], FORMATS["nvfp4"]),
    "nvfp4a16": Scheme("nvfp4a16", FORMATS["nvfp4"]),
    "nf4": Scheme("nf4", FORMATS["nf4"]),
    "ternary": Scheme("ternary", FORMATS["ternary"]),
    "2:4": Scheme("2:4", sparse=True),
}
NAMES = ("w4a16", "w8a16", "w8a8", "w4a8", "w3a16", "w2a16", "bfp8a16", "bfp4a16", "kv8", "kv4", "kv2", *_NAMED)
"""Schemes by name, and examples of those whose names say their bits."""


def scheme(name: str) -> Scheme:
    """The scheme of a name; several joined by ``+`` (``"w4a16+kv4"`` or ``"w4a16-kv4"``) each say of their own tensors.

    ``w<bits>a16``: weights alone, 8 bits a row, fewer in groups of 128, or as ``-g32``, ``-channel`` says; ``-asym``:
    with a zero point. ``w<bits>a8``: inputs too, 8 bits, a scale a token. ``bfp<bits>a16[-g<group>]``: weights in block
    floating point, 32 channels of like size to an exponent. ``kv<bits>``: the attention cache.

    Raises:
        TesselError: there is no such name, or two parts say of one tensor.
    """
    parts = [_one(part) for part in name.replace("-kv", "+kv").split("+")]
    whole = Scheme(name)
    for part in parts:
        for what in (*_TENSORS, "recent", "sparse", "ordered"):
            value = getattr(part, what)
            if value in (None, 0, False):
                continue
            check(not getattr(whole, what), lambda what=what: f"scheme {name!r} says twice what becomes of {what}")  # type: ignore[misc]
            whole = replace(whole, **{what: value})
    return whole


def _one(name: str) -> Scheme:
    if name in _NAMED:
        return _NAMED[name]
    if found := _CACHE.match(name):
        own = replace(integers(int(found["bits"]), _CACHE_GROUP, minimum=True), scale="f16")
        return Scheme(name, keys=own, values=own, recent=_RECENT)
    if found := _BLOCKS.match(name):
        return Scheme(name, block_floats(int(found["bits"]), int(found["group"] or _BLOCK)), ordered=True)
    found = _INTEGER.match(name)
    if found is None:
        close = nearest(name, NAMES)
        hint = f"did you mean {close!r}? " if close else ""
        forms = f"w<bits>a16[-g<group>|-channel], w<bits>a8, bfp<bits>a16[-g<group>], kv<bits>, {', '.join(_NAMED)}"
        raise TesselError(f"unknown scheme {name!r}; {hint}{forms}")
    bits = int(found["w"])
    group = int(found["group"]) if found["group"] else WHOLE_ROW if found["channel"] or bits == 8 else GROUP
    check(group != 0 or not found["group"], lambda: f"scheme {name!r}: a group of 0 values")
    symmetric = not found["asym"] and bits > 1
    weight = integers(bits, group, symmetric)
    return Scheme(name, weight, integers(8) if found["a"] == "8" else None)


def _words(f: Format) -> str:
    kind = (
        f"int{f.bits}" if f.kind == "int" else f"float{f.bits}" if f.kind == "float" else f"table of {len(f.codebook)}"
    )
    shared = {WHOLE_ROW: "a row", WHOLE_TENSOR: "whole"}.get(f.group, f"groups of {f.group}")
    return f"{kind} {shared}" + f" by {f.rows}" * (f.rows > 1) + " with a zero" * (f.kind == "int" and not f.symmetric)
