"""Layers of packed and sparse weights on the CPU (``codegen/templates/packed.hpp``, ``int8.hpp``, ``sparse.hpp``)."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..codegen.cpp.packed import INTEGERS, TABLE, packed_unit
from ..ops.packed import rounded_rows
from ..ops.packed_stacks import packed_experts_ref
from .native import build, stop

__all__ = [
    "forward",
    "forward_either",
    "forward_experts",
    "forward_experts_integers",
    "forward_integers",
    "forward_sparse",
    "multiplies_int8",
    "prepare",
    "prepare_sparse",
]

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def multiplies_int8(features: Collection[str]) -> bool:
    """Whether a CPU with these flags has products of 8-bit integers, four a word.

    Without them int8 is slower than float32: 16 products of 16 bits take three instructions, 16 of floats take one.
    """
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(features)


@cache
def _function(name: str) -> Any:
    fn = build(packed_unit(name))[0][name]
    fn.argtypes, fn.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int
    return fn


def _name(dtype: torch.dtype, bits: int, integers: bool, table: bool, exponent: int) -> str:
    if integers:
        return f"int8_{_NAMES[dtype]}_{bits}"
    known = exponent if bits == 8 and exponent in (4, 5) else TABLE
    return f"packed_{_NAMES[dtype]}_{bits}_{known if table else INTEGERS}"


def prepare(dtype: torch.dtype, bits: int, integers: bool = False, table: bool = False, exponent: int = 0) -> None:
    """Compile the kernel before it is called.

    Args:
        integers: whole numbers are multiplied (``forward_integers``).

    Raises:
        TesselError: it cannot be compiled here.
    """
    _function(_name(dtype, bits, integers, table, exponent))


def prepare_sparse(dtype: torch.dtype) -> None:
    """The same for ``forward_sparse``."""
    _function(f"sparse_{_NAMES[dtype]}")


def forward(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    bits: int = 4,
    inputs: int = 0,
    exponent: int = 0,
) -> Tensor:
    """See ``packed_linear_ref``; inputs that are rounded are multiplied as floats."""
    if inputs:
        codes, rows = rounded_rows(x, inputs)
        x = (codes * rows).to(x.dtype)
    name = _name(x.dtype, bits, False, table is not None, exponent)
    return _run(name, x, words, scale, zero, bias, table)


def forward_integers(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    table: None = None,
    bits: int = 8,
    inputs: int = 8,
    exponent: int = 0,
) -> Tensor:
    """See ``packed_linear_ref``, of inputs of 8 bits and integers: sums are exact up to where scales come in."""
    return _run(_name(x.dtype, bits, True, False, 0), x, words, scale, zero, bias, None)


def forward_either(integers: Callable[[int], bool]) -> Callable[..., Tensor]:
    """``forward_integers`` or ``forward``, by what ``integers`` says of the number of rows of each call."""

    def run(x: Tensor, *args: Any, **attrs: Any) -> Tensor:
        return (forward_integers if integers(x.shape[0]) else forward)(x, *args, **attrs)

    return run


def forward_experts(*args: Any, **attrs: Any) -> tuple[Tensor, Tensor]:
    """See ``packed_experts_ref``; inputs that are rounded are multiplied as floats."""
    return packed_experts_ref(*args, **{**attrs, "linear": forward})


def forward_experts_integers(*args: Any, **attrs: Any) -> tuple[Tensor, Tensor]:
    """See ``packed_experts_ref``, of inputs of 8 bits and integers."""
    return packed_experts_ref(*args, **{**attrs, "linear": forward_integers})


def forward_sparse(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """See ``sparse_linear_ref``."""
    (m, k), n = x.shape, values.shape[0]
    out = x.new_empty((m, n))
    if out.numel() == 0:
        return out
    given = [None if t is None else t.contiguous() for t in (x, mask, values, bias)]
    places = (0 if t is None else t.data_ptr() for t in given)
    args = struct.pack("8q", *places, m, n, k, out.data_ptr())
    bad = _function(f"sparse_{_NAMES[x.dtype]}")(args, torch.get_num_threads())
    if bad:
        stop(bad)
    return out


def _run(name: str, x: Tensor, words: Tensor, scale: Tensor, *more: Tensor | None) -> Tensor:
    (m, k), (n, groups) = x.shape, scale.shape
    out = x.new_empty((m, n))
    if out.numel() == 0:
        return out
    given = [None if t is None else t.contiguous() for t in (x, words, scale, *more)]
    *places, table = (0 if t is None else t.data_ptr() for t in given)
    args = struct.pack("11q", *places, m, n, k, k // groups, out.data_ptr(), table)
    bad = _function(name)(args, torch.get_num_threads())
    if bad:
        stop(bad)
    return out
