"""``selective_scan_backward`` on the CPU, by Tessel's kernel (``codegen/templates/selective_scan.hpp``)."""

from __future__ import annotations

import ctypes
import struct
from functools import cache

import torch

from ..codegen.cpp.selective import STEPS, selective_unit
from .native import build, stop

__all__ = ["backward", "prepare"]


class SelectiveScan:
    """The kernel, compiled: called as the reference of the operator is, with float32 tensors.

    Raises:
        TesselError: it cannot be compiled here.
    """

    def __init__(self) -> None:
        self.library, _ = build(selective_unit())
        lanes, self.scratch = (self.library[f"selective_{name}"] for name in ("lanes", "scratch"))
        lanes.argtypes, lanes.restype = [], ctypes.c_int64
        self.scratch.argtypes, self.scratch.restype = [ctypes.c_int64], ctypes.c_int64
        self.lanes = int(lanes())
        self.fn = self.library["selective_backward"]
        self.fn.argtypes, self.fn.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int

    def backward(
        self, grad: torch.Tensor, w: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """See ``selective_scan_backward_ref``."""
        (batches, steps, channels), n = w.shape, A.shape[1]
        if w.numel() == 0 or n == 0:
            return tuple(torch.zeros_like(x) for x in (w, dt, A, B, C))
        a = A.t().contiguous()
        given = [x.contiguous() for x in (grad, w, dt, a, B, C)]
        threads = torch.get_num_threads()
        blocks = -(-channels // self.lanes)
        row = n * self.lanes
        dw, ddt = (torch.empty_like(given[1]) for _ in range(2))
        da = torch.zeros_like(a)
        db, dc = (w.new_zeros((threads, *B.shape)) for _ in range(2))
        kept = w.new_empty(blocks * -(-steps // STEPS) * row)
        adjoint = w.new_empty(blocks * row)
        scratch = w.new_empty(threads * self.scratch(n))
        tensors = (*given, dw, ddt, da, db, dc, kept, adjoint, scratch)
        args = struct.pack("18q", *(x.data_ptr() for x in tensors), batches, steps, channels, n)
        bad = self.fn(args, threads)
        if bad:
            stop(bad)
        return dw, ddt, da.t(), *((x[0] if threads == 1 else x.sum(0)) for x in (db, dc))


_kernel = cache(SelectiveScan)


def prepare(kind: str, dtype: torch.dtype, turned: bool = False) -> None:
    """Compile the kernel (there is one) before it is called.

    Raises:
        TesselError: it cannot be compiled here.
    """
    _kernel()


def backward(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """See ``selective_scan_backward_ref``; float32."""
    return _kernel().backward(*operands)
