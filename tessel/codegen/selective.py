"""Triton kernels of the selective scan's gradients, around ``templates/selective_scan.triton.j2``.

    source = selective_source("gradients", torch.float32, get_target("h100"))

Chunks of steps run side by side: what each hands on is computed from it alone, carried from chunk to chunk, and the
states inside are made again where they are read. Nothing of the size of all states is written: of ``BT`` steps one
state and one adjoint are.
"""

from __future__ import annotations

import torch

from ..errors import check
from ..ir.types import product, symbol
from ..targets import Target
from .fused import source_of
from .source import Source
from .triton import ceil_div

__all__ = ["PARTS", "selective_source"]

_F32 = torch.float32
_BLOCK = 256  # chains of states that a program of ``carry`` takes
_STEPS = 32  # of a chunk
PARTS = ("chunks", "carry", "gradients")


def selective_source(part: str, dtype: torch.dtype, target: Target) -> Source:
    """One of ``PARTS``, which run in this order.

    Args:
        dtype: of the operands and of dw and ddt; what is handed on, and the parts of dA, dB and dC, are f32.
    """
    check(part in PARTS, lambda: f"no kernel {part!r} of a selective scan; there are {', '.join(PARTS)}")
    between = [("state", _F32), ("adjoint", _F32)]
    reads = [(name, dtype) for name in ("grad", "w", "dt", "a", "b", "c")]
    if part == "chunks":
        params, outs = reads, [*between, ("total", _F32)]
    elif part == "carry":
        params, outs = [("a", dtype), ("total", _F32)], between
    else:
        params, outs = [*reads, ("adjoint", _F32)], [("state", _F32), ("dw", dtype), ("ddt", dtype)]
        outs += [("db", _F32), ("dc", _F32)]
    knobs = _knobs(part, target)
    batches, steps, channels, states = (symbol(n) for n in ("batches", "steps", "channels", "states"))
    chunks, blocks = ceil_div(steps, knobs["BT"]), ceil_div(channels, knobs["BD"])
    largest = [
        product((batches, steps, channels)),
        product((batches, chunks, states, channels)),
        product((blocks, batches, steps, states)),
    ]
    # Scans and folds across warps leave what each warp has; a tile may be turned around.
    smem = 1024 + (0 if part == "carry" else 2 * 5 * knobs["BD"] * knobs["BT"])
    sizes = ["batches", "steps", "channels", "states"]
    return source_of("selective_scan", part, params, outs, sizes, {}, target, knobs, smem, largest)


def _knobs(part: str, target: Target) -> dict[str, int]:
    """Few steps a tile: a thread then holds the dozen values that ``gradients`` has of each place."""
    if target.vendor == "interpret":
        return {"BD": 16, "BT": 16, "num_warps": 1, "num_stages": 1}
    if part == "carry":
        return {"BD": _BLOCK, "BT": _STEPS, "num_warps": 4, "num_stages": 1}
    return {"BD": 32, "BT": _STEPS, "num_warps": 4, "num_stages": 1}
