"""Small kernels that follow one another, run by one call: what a decoding step mostly consists of.

A launch through Python costs a few microseconds: memory for every result, addresses, one foreign call. A small
model has dozens of launches that take no longer than that each. So where all values of a graph are small, those
that only kernels read get places in one block of memory (``plan_places``: offsets by liveness, first fit), and a
function in the compiled file runs kernel after kernel from a table that holds everything but the addresses of a
few tensors.

Large values are left to ``buffers``: there a launch costs nothing beside the kernel, and memory is freed at the last
use of each value.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..codegen.steps import Called, Launch, Run
from ..ir.node import Graph, Node, Value
from ..ir.types import TensorType
from ..ops.inplace import INPLACE
from .buffers import first_fit, span_bytes
from .native import NativeKernel, c_int64, stop

__all__ = ["RUNNER", "Places", "all_native", "native_sequence", "plan_places", "sequences"]

SMALL = 256 * 2**10  # bytes: no value may be larger
LEAVING = 2**20  # what leaves the graph is there from the beginning of a run, and may be a bit larger
BLOCK = 4 * 2**20  # bytes of all places
_ALIGN = 64
_PARAMS = 64  # of one kernel

RUNNER = f"""
// Runs kernels one after the other until one has a reason to stop. A step is a kernel, the number of its arguments,
// and for each the position of an address in values and an offset in bytes.
EXPORT int run_kernels(const i64* steps, i64 count, const i64* values, i64 threads) {{
  i64 args[{_PARAMS}];
  for (; count > 0; --count) {{
    auto kernel = (int (*)(const i64*, i64))steps[0];
    i64 n = steps[1];
    steps += 2;
    for (i64 i = 0; i < n; ++i, steps += 2) args[i] = values[steps[0]] + steps[1];
    if (int bad = kernel(args, threads)) return bad;
  }}
  return 0;
}}
"""


class Places:
    """Offsets of values in one block.

    Attributes:
        at: value -> its offset in bytes, a multiple of 64. Values with overlapping bytes are never alive together.
        bytes: the size of the block.
        runs: position of the first node -> position after the last node of launches that follow one another.
    """

    def __init__(self, at: Mapping[Value, int], size: int, runs: Mapping[int, int]) -> None:
        self.at, self.bytes, self.runs = dict(at), size, dict(runs)


def plan_places(graph: Graph, call: Callable[[Node], Called | Launch | None]) -> Places | None:
    """Places for the values that only kernels read, ``None`` where the graph has symbolic or large values.

    Args:
        graph: the final graph.
        call: what runs at a node; ``None`` for views and what is written into the host program itself.
    """
    launches = {n: what for n in graph.nodes if isinstance(what := call(n), Launch)}
    leaving = set(graph.results())
    users = graph.users()
    for node, what in launches.items():
        if what.sizes or len(what.params) > _PARAMS:
            return None
        for v in () if node.op.name in INPLACE else node.outs:
            size = span_bytes(v.type) if isinstance(v.type, TensorType) else None
            if not isinstance(size, int) or size > (LEAVING if v in leaving else SMALL):
                return None
    made = [v for n in launches for v in n.outs if n.op.name not in INPLACE and v not in leaving]
    inside = [v for v in made if all(u in launches for u in users.get(v, ()))]
    at, size = _first_fit(graph, set(inside))
    if size > BLOCK:
        return None
    runs: dict[int, int] = {}
    start: int | None = None
    for i, node in enumerate(graph.nodes):
        if node not in launches:
            start = None
        else:
            start = i if start is None else start
            runs[start] = i + 1
    return Places(at, size, runs)


def _first_fit(graph: Graph, placed: set[Value]) -> tuple[dict[Value, int], int]:
    last = {v: i for i, n in enumerate(graph.nodes) for v in (*n.outs, *n.operands) if v in placed}
    ends: dict[int, list[Value]] = {}
    for v, i in last.items():
        ends.setdefault(i, []).append(v)
    at: dict[Value, int] = {}
    alive: list[tuple[int, int, Value]] = []  # offset, end
    most = 0
    for i, node in enumerate(graph.nodes):
        for v in node.outs:
            if v not in placed:
                continue
            need = max(-(-int(span_bytes(v.type)) // _ALIGN), 1) * _ALIGN  # type: ignore[arg-type]
            offset = first_fit([a[:2] for a in alive], need)
            at[v] = offset
            alive.append((offset, offset + need, v))
            most = max(most, offset + need)
        dead = set(ends.get(i, ()))
        alive = [a for a in alive if a[2] not in dead]
    return at, most


def native_sequence(run: Run, kernels: Mapping[str, NativeKernel]) -> Callable[..., None]:
    """Some kernels as one callable of the tensors they share: ``sequence(*tensors)``.

    It raises IndexError, RuntimeError and MemoryError as the kernel does that stops the sequence. A closure: its names
    are found faster than attributes, and what it does around the foreign call takes longer than a small kernel.
    """
    words: list[int] = []
    for name, args in run.steps:
        kernel = kernels[name]
        words += [ctypes.cast(kernel.fn, ctypes.c_void_p).value or 0, len(args)]
        words += [w for arg in args for w in arg]
    steps, count = struct.pack(f"{len(words)}q", *words), c_int64(len(run.steps))
    fn = kernels[run.steps[0][0]].library.run_kernels
    fn.restype = ctypes.c_int  # no argtypes: converting by them takes as long as the call
    pack, threads = struct.Struct(f"{run.tensors}q").pack, torch.get_num_threads

    def sequence(*tensors: torch.Tensor) -> None:
        bad = fn(steps, count, pack(*[x.data_ptr() for x in tensors]), c_int64(threads()))
        if bad:
            stop(bad)

    return sequence


def sequences(runs: Mapping[str, Run], kernels: Mapping[str, Any]) -> dict[str, Callable[..., None]]:
    """The callables of a host program's runs, by name."""
    return {name: native_sequence(run, kernels) for name, run in runs.items()}


def all_native(kernels: Mapping[str, Any]) -> bool:
    """Whether there are kernels, all of one compiled file that can run sequences."""
    return bool(kernels) and all(
        isinstance(k, NativeKernel) and hasattr(k.library, "run_kernels") for k in kernels.values()
    )
