"""What the memory gives to a kernel with nothing to compute, measured on tensors like that kernel's.

    variants = streams([a, b], like=out)      # name -> a call that reads a and b and writes as much as out
    for run in variants.values():
        run()

The best of them is the streaming copy (one array read, one written), the reading (one read), or the same with more
arrays read; ``rows`` copies the rows of a table in the order of an index. Which way of writing is best differs from CPU
to CPU, so several are tried: stores past the caches or not, lines asked for early or not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tessel.runtime.native import build
from tessel.runtime.results import result

__all__ = ["rows", "streams"]

_EARLY = (0, 2048, 4096, 16384)  # bytes ahead of what is read
_EARLY_ROWS = (0, 1, 2, 4)


def _library() -> Any:
    library, _ = build(Path(__file__).with_name("streams.cpp").read_text(encoding="utf-8"), {})
    return library


def streams(reads: Sequence[torch.Tensor], like: torch.Tensor | None) -> dict[str, Callable[[], None]]:
    """Ways to read whole tensors of the same size, at most three, and to write one of the size of ``like``.

    Raises:
        TesselError: there is no compiler.
        ValueError: the tensors are of different sizes, or do not lie at multiples of 64 bytes.
    """
    # memory of the kind that a kernel's results get, huge pages and all
    written = result(like.shape, like.stride(), like.dtype).zero_() if like is not None else None
    each = [*reads, *([written] if written is not None else [])]
    if len({t.nbytes for t in each}) != 1 or any(t.data_ptr() % 64 for t in each):
        raise ValueError(f"streams of {[t.nbytes for t in each]} bytes: one size and whole lines are needed")
    call = _library().stream
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = (pointer, ctypes.c_int, pointer, whole, ctypes.c_int, ctypes.c_int, whole)
    addresses = (ctypes.c_void_p * len(reads))(*(t.data_ptr() for t in reads))
    to = written.data_ptr() if written is not None else None
    lines, threads = each[0].nbytes // 64, torch.get_num_threads()

    def run(past: bool, early: int) -> None:
        held = (reads, written)  # the tensors live as long as the call may be made
        if call(addresses, len(reads), to, lines, threads, past, early):
            raise ValueError(f"streams of {len(held[0])} arrays by {threads} threads: at most 3 and 256")

    ways = [(past, early) for past in ((True, False) if written is not None else (False,)) for early in _EARLY]
    return {
        f"{'past the caches' if p else 'plain'}, {e} B early": lambda p=p, e=e: run(p, e)  # type: ignore[misc]
        for p, e in ways
    }


def rows(table: torch.Tensor, index: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Ways to copy rows of a table in the order of an index of int64, to an array of their own.

    Raises:
        TesselError: there is no compiler.
        ValueError: a row is not of whole lines of 64 bytes, or an index is outside of the table.
    """
    row = table.stride(0) * table.itemsize
    inside = int(index.min()) >= 0 and int(index.max()) < table.shape[0]
    if table.data_ptr() % 64 or row % 64 or not table.is_contiguous() or not index.is_contiguous() or not inside:
        raise ValueError(f"rows of {row} bytes of a table of {table.shape[0]}: whole lines, and indices inside")
    written = result((index.numel(), *table.shape[1:]), table.stride(), table.dtype).zero_()
    call = _library().rows
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = (pointer, pointer, pointer, whole, whole, ctypes.c_int, ctypes.c_int, whole)
    threads = torch.get_num_threads()

    def run(past: bool, early: int) -> None:
        call(table.data_ptr(), index.data_ptr(), written.data_ptr(), index.numel(), row // 64, threads, past, early)

    return {
        f"rows, {'past the caches' if past else 'plain'}, {early} rows early": lambda p=past, e=early: run(p, e)  # type: ignore[misc]
        for past in (True, False)
        for early in _EARLY_ROWS
    }
