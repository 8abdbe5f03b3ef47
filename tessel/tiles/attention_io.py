"""Bytes that attention's tiles move, beside the least that any schedule could.

A program holds a tile of queries (in the pass over keys of the backward: a tile of keys) and streams the other side
past it, so the held side moves once and the streamed side once for each tile. What the attributes hide is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ..ir.types import TensorType
from .cost import stored_bytes
from .default import batch_axes, operand_dtype
from .kernel import Kernel

__all__ = ["least_bytes", "moved_bytes"]


def moved_bytes(kernel: Kernel, knobs: Mapping[str, int]) -> int | None:
    """Bytes that the programs of an attention kernel load and store, caches left aside; None of symbolic sizes."""
    sizes = _sizes(kernel)
    if sizes is None:
        return None
    batch, m, n, d, e = sizes
    heads, shared = kernel.attrs.get("heads", (1, 1))
    item = operand_dtype(kernel).itemsize
    window, offset = kernel.attrs.get("window"), kernel.attrs.get("offset", 0)
    causal = bool(kernel.attrs.get("causal", False))
    if not isinstance(offset, int):
        return None
    backward = kernel.family == "attention_backward"
    queries, keys = m * ((d + e) * item + 8 if backward else d * item), n * (d + e) * item
    if kernel.attrs.get("wrt") == "keys":
        streamed = steps(n, m, knobs["BN"], causal, offset, window, by_keys=True)
        return batch * (streamed * queries // max(m, 1)) + batch * shared // heads * 2 * keys
    streamed = steps(m, n, knobs["BM"], causal, offset, window)
    results = m * (d if backward else e) * item + (0 if backward else 4 * m)
    return batch * (queries + streamed * keys // max(n, 1) + results)


def least_bytes(kernel: Kernel, on_chip_bytes: int) -> int | None:
    """A lower bound of the bytes between memory and a fast memory of ``on_chip_bytes``, up to a constant factor.

    The larger of what must be read and written once (all operands and results), and, of a head with m queries, n keys
    and widths d and e, ``m n d e / M`` elements with M elements of fast memory: Dao et al., FlashAttention (2022),
    theorem 2 and proposition 3, proved for M >= d^2 by Saha and Ye, "The I/O complexity of attention" (2024). Hidden
    keys count as seen in the second term only where no attribute hides them. None of symbolic sizes.
    """
    sizes = _sizes(kernel)
    once = [stored_bytes(p.type) for p in kernel.params if isinstance(p.type, TensorType)]
    if sizes is None or not all(isinstance(n, int) for n in once):
        return None
    batch, m, n, d, e = sizes
    item = operand_dtype(kernel).itemsize
    seen = 0 if kernel.attrs.get("causal") or kernel.attrs.get("window") is not None else 1
    return max(sum(map(int, once)), seen * batch * m * n * d * e * item // max(1, on_chip_bytes // item))


def steps(
    held: int, streamed: int, tile: int, causal: bool, offset: int, window: int | None, by_keys: bool = False
) -> int:
    """Rows of the streamed side that pass all tiles of the held side; by keys, queries pass tiles of keys.

    >>> steps(100, 100, 16, True, 0, None), steps(100, 100, 16, False, 0, None)
    (436, 700)
    """
    total = 0
    for start in range(0, held, tile):
        last = start + tile - 1
        low, high = 0, streamed
        if by_keys:
            low = start - offset if causal else low
            if window is not None:
                high = last + window - offset
                low = low if causal else start - offset - window + 1
        else:
            high = last + offset + 1 if causal else high
            if window is not None:
                low = start + offset - window + 1
                high = high if causal else last + offset + window
        total += max(0, min(high, streamed) - max(low, 0))
    return total


def _sizes(kernel: Kernel) -> tuple[int, int, int, int, int] | None:
    own = [kernel.axis(a).extent for a in "mnde"]
    batch = [a.extent for a in batch_axes(kernel)]
    if not all(isinstance(x, int) for x in (*own, *batch)):
        return None
    m, n, d, e = (int(x) for x in own)
    return prod(int(x) for x in batch), m, n, d, e
