"""The lines that load an operand of a product by a tensor descriptor (``tiles/descriptors.py`` says which can)."""

from __future__ import annotations

from ..tiles.descriptors import OPERAND_AXES, Descriptor
from .dialect import size_text, widen
from .expr import Emitter

__all__ = ["load_lines", "making_lines"]

_BLOCK = {"m": ("BM", "tile_m * BM"), "n": ("BN", "tile_n * BN"), "k": ("BK", "k_start")}


def making_lines(d: Descriptor, e: Emitter) -> list[str]:
    """The lines that make a descriptor; ``e`` writes scalars, of a batch its index."""
    text, _ = e.index(d.base)
    pointer = f"{d.name}_ptr" if text == "0" else f"{d.name}_ptr + ({text})"
    sizes = ", ".join(size_text(s) for s in d.sizes)
    block = ", ".join(_BLOCK[axis][0] for axis in (d.outer, d.inner))
    made = f"{d.part}_tma = tl.make_tensor_descriptor({pointer}, [{sizes}], [{d.stride}, 1], [{block}])"
    return [*e.take(), made]


def load_lines(d: Descriptor, e: Emitter) -> list[str]:
    """The lines in the loop over k; the emitter then knows the value."""
    at = ", ".join(_BLOCK[axis][1] for axis in (d.outer, d.inner))
    text = f"{d.part}_tma.load([{at}])"
    if (d.outer, d.inner) != OPERAND_AXES[d.part]:
        text += ".T"
    if e.interpret:
        text = widen(text, e.kernel.params[d.param].type.dtype, True)
    else:
        e.raw.add(d.load.out)
    e.assign(d.load.out, d.name, text, frozenset({0, 1}), d.load.dtype)
    return e.take()
