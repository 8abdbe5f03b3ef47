"""``packed_linear`` on the CPU, by Tessel's kernel (``codegen/templates/packed.hpp``)."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codegen.cpp_packed import packed_unit
from ..codegen.cpp_whole import headers
from .native import build, stop

__all__ = ["forward", "prepare"]

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@cache
def _function(dtype: torch.dtype, bits: int) -> Any:
    name = f"packed_{_NAMES[dtype]}_{bits}"
    fn = build(packed_unit(name), headers("packed"))[0][name]
    fn.argtypes, fn.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int
    return fn


def prepare(dtype: torch.dtype, bits: int) -> None:
    """Compile the kernel before it is called.

    Raises:
        TesselError: it cannot be compiled here.
    """
    _function(dtype, bits)


def forward(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    table: None = None,
    bits: int = 4,
) -> Tensor:
    """See ``packed_linear_ref``."""
    (m, k), (n, groups) = x.shape, scale.shape
    out = x.new_empty((m, n))
    if out.numel() == 0:
        return out
    given = [None if t is None else t.contiguous() for t in (x, words, scale, zero, bias)]
    places = (0 if t is None else t.data_ptr() for t in given)
    args = struct.pack("10q", *places, m, n, k, k // groups, out.data_ptr())
    bad = _function(x.dtype, bits)(args, torch.get_num_threads())
    if bad:
        stop(bad)
    return out
