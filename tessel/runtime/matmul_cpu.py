"""Who multiplies matrices on the CPU: Tessel's kernel, or one of torch's libraries and which.

Tessel's kernel runs a product where it is at least as fast as the libraries (``by_library`` says where not); what is
fused with it is then free.

Of the libraries, torch's own choice for float32 is MKL, which stays on an older instruction set on some vendors'
CPUs; oneDNN, which ships inside torch, may be twice as fast there. So a product is timed once for every size it
comes in (rows counted in powers of two), on the operands of its first call, and the faster of the two is kept for
the process. With ``deterministic`` nothing is timed: a rule decides.
"""

from __future__ import annotations

import ctypes
import math
import struct
import time
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch

from ..codegen.cpp.matmul import grouped_unit, refusal
from ..errors import TesselError
from ..ir.node import Node
from ..ops.backward import grouped_mm_ref
from ..targets import get_target
from .native import build

__all__ = ["Grouped", "Product", "by_library", "chosen", "grouped"]

_ROWS = 128  # of the left operand that are enough to time
_REPEATS = 3
_CLEAR = 0.95  # oneDNN must take less than this part of the other's time
_SAME = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # against the largest element

Key = tuple[Any, ...]
_choices: dict[Key, bool] = {}


def chosen() -> dict[Key, bool]:
    """What was decided so far: (dtype, rows in powers of two, k, n, layouts, bias, threads) -> oneDNN or not."""
    return dict(_choices)


def by_library(node: Node, features: Collection[str], wanted: bool = False) -> str | None:
    """Why a library runs a product on a CPU with these features, ``None`` where Tessel's kernel does.

    Measured on an AMD EPYC (Zen 5) of two cores against MKL and oneDNN, weights of 768 to 8192 rows, 1 to 1024 rows
    of the left operand: the kernel is ahead of both, from 1.02 times (1024 rows) to 1.9 times (1 row, bfloat16).
    Of float16, torch is ahead for one row (1.7 times), the kernel 5 to 9 times for 16 to 256 rows.
    On a Granite Rapids of two cores, bfloat16 by its matrix unit against oneDNN's use of it: 1024 rows, 768 to 768 and
    3072 to 768, the kernel is 1.3 and 1.6 times as fast, 768 to 3072 oneDNN 1.3 times (before what the kernel fuses).

    Args:
        node: a product of any kind: all its operands are of one dtype, but for offsets.
        wanted: the kernel is asked for wherever there is one.
    """
    dtype = node.operands[0].dtype
    why = refusal(dtype)
    if why is not None or wanted:
        return why
    have = set(features)
    if "avx512f" not in have and not {"avx2", "fma"} <= have:
        return "the kernel needs AVX-512, or AVX2 with FMA: torch has the product for this CPU"
    if dtype == torch.bfloat16 and "avx512_bf16" not in have:
        return "the kernel would widen bfloat16: this CPU does not multiply it (no AVX512_BF16)"
    if dtype == torch.float16 and node.type.shape[-2] == 1:
        return "one row of float16: the kernel would pack a matrix that the library reads once"
    return None


@cache
def _onednn() -> Callable[..., torch.Tensor] | None:
    """oneDNN's linear layer, ``None`` where torch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return getattr(packet, "default", None)


def _by_library(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _by_onednn(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    linear = _onednn()
    assert linear is not None
    return linear(a, b.t(), bias, "none", [], "")


class Product:
    """``product(a, b)`` and ``product(bias, a, b)`` for matrices a [m, k], b [k, n] and bias [n]."""

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.known: dict[Key, Callable[..., torch.Tensor]] = {}

    def __call__(self, *operands: torch.Tensor) -> torch.Tensor:
        bias = operands[0] if len(operands) == 3 else None
        a, b = operands[-2:]
        # What this call site may see change; the rest is fixed by its types.
        key = (a.shape, b.shape, a.stride(), b.stride(), torch.get_num_threads())
        run = self.known.get(key)
        if run is None:
            run = self.known[key] = _by_onednn if self._prefers_onednn(a, b, bias) else _by_library
        return run(a, b, bias)

    def _prefers_onednn(self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> bool:
        if _onednn() is None or a.dtype not in _SAME or min(*a.shape, *b.shape) == 0:
            return False
        if a.stride(1) != 1 or 1 not in b.stride():
            return False
        if self.deterministic:
            return a.dtype != torch.float32 or _mkl_is_held_back()
        rows = max(a.shape[0] - 1, 0).bit_length()
        layout = (b.stride(0) == 1, bias is not None)
        key = (a.dtype, rows, a.shape[1], b.shape[1], *layout, torch.get_num_threads())
        if key not in _choices:
            _choices[key] = _faster(a[:_ROWS], b, bias)
        return _choices[key]


def _mkl_is_held_back() -> bool:
    """Whether this is a CPU on which MKL does not use the widest vectors."""
    return any("AMD" in name for name in get_target("cpu").device_names)


def _faster(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Time both on real operands; oneDNN must also give the same result."""
    want, got = _by_library(a, b, bias), _by_onednn(a, b, bias)
    scale = want.abs().amax().item()
    if math.isfinite(scale) and (got - want).abs().amax().item() > _SAME[a.dtype] * max(scale, 1e-30):
        return False
    best = [math.inf, math.inf]
    for _ in range(_REPEATS):
        for i, run in enumerate((_by_library, _by_onednn)):
            start = time.perf_counter()
            run(a, b, bias)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[1] < _CLEAR * best[0]


_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Grouped:
    """``grouped_mm`` by Tessel's kernel: the rows of each group times that group's matrix.

    Other forms of the operator (groups of columns or of inner dims, a bias, other dtypes) run by its definition.

    Raises:
        TesselError: the kernel cannot be compiled here.
    """

    def __init__(self) -> None:
        self.library, _ = build(grouped_unit())

    def __call__(
        self, a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
    ) -> torch.Tensor:
        order = "nk" if b.stride(-2) == 1 else "kn" if b.stride(-1) == 1 else ""
        plain = (a.dim(), b.dim()) == (2, 3) and bias is None and out_dtype in (None, a.dtype) and offs is not None
        fits = plain and order and a.stride(1) == 1 and a.dtype == b.dtype and a.dtype in _NAMES
        if not fits or b.shape[0] != offs.shape[0] or b.shape[1] != a.shape[1]:
            return grouped_mm_ref(a, b, offs, bias, out_dtype)
        ends = offs.to(torch.int32).contiguous()
        (m, k), n = a.shape, b.shape[2]
        out = a.new_empty(m, n)
        step = b.stride(2) if order == "nk" else b.stride(1)
        args = (a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), step, ends.data_ptr(), out.data_ptr())
        fn = self.library[f"grouped_{_NAMES[a.dtype]}_{order}"]
        fn.argtypes, fn.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int
        if fn(struct.pack("11q", *args, len(ends), m, n, k), torch.get_num_threads()):
            raise MemoryError("no memory for the panels of a grouped product")
        return out


@cache
def _grouped_kernel() -> Grouped:
    return Grouped()


def grouped(node: Node, features: Collection[str], wanted: bool = False) -> tuple[Grouped | None, str]:
    """What runs a grouped product here, and the reason in words where that is its definition.

    Args:
        node: ``grouped_mm``.
        wanted: as ``by_library`` has it.
    """
    a, b = node.operands[:2]
    why = by_library(node, features, wanted)
    if why is None and (a.dtype not in _NAMES or (a.dtype == torch.bfloat16 and "avx512_bf16" not in features)):
        why = f"grouped products of {str(a.dtype).removeprefix('torch.')} have no kernel"
    if why is None and (a.type.rank, b.type.rank) != (2, 3):
        why = "only groups of rows have a kernel"
    if why is None:
        try:
            return _grouped_kernel(), "Tessel's kernel, called for all groups at once"
        except TesselError as e:
            why = str(e)
    return None, why
