"""Measure this machine's CPU: memory bandwidth and multiply-adds a second, in a second or two.

With a C++ compiler, by the loops in ``templates/host_rates.cpp``; without one, by torch's own operators, which then
give lower bounds, and the record says so.
"""

from __future__ import annotations

import ctypes
import datetime
import math
import time
import warnings
from collections.abc import Callable

import torch

from ..codegen.cpp.gemm import has_matrix_unit
from ..errors import TesselError, check
from ..targets import Target, get_target
from ..targets.host import TILES, HostRates, write_record
from ..tiles.header import TEMPLATES
from .native import build

__all__ = ["measure_host"]

_ROUNDS, _BUDGET = 3, 0.15  # of every measurement, and seconds of a round: spread out, for other work to pass
_LEAST, _MOST = 256 * 2**20, 2**30  # bytes of an array
_SIDE = 1024  # of the matrices, without a compiler


def measure_host(keep: bool = True) -> HostRates:
    """The rates of the CPU with all cores that this process may use, measured now and kept in the cache.

    A cache that cannot be used is said in a warning. Other work on the machine makes the figures lower.

    Raises:
        TesselError: there is no memory for the arrays.
    """
    cpu = get_target("cpu")
    try:
        rates = _by_kernel(cpu)
    except TesselError as e:
        if "no memory" in str(e):
            raise
        rates = _by_torch(cpu, str(e).splitlines()[0])
    if keep:
        try:
            write_record(cpu, rates)
        except OSError as e:
            warnings.warn(f"tessel: what was measured is not kept: {e}", stacklevel=2)
    return rates


def _array_bytes(cpu: Target) -> int:
    """Four times the last cache and at least 256 MiB, but no more than an eighth of the memory."""
    caches = [level.capacity_bytes for level in cpu.levels if level.name != "memory"]
    wanted = min(max(4 * max(caches, default=0), _LEAST), _MOST)
    return min(wanted, cpu.level("memory").capacity_bytes // 8) // 4096 * 4096


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _by_kernel(cpu: Target) -> HostRates:
    text = (TEMPLATES / "host_rates.cpp").read_text(encoding="utf-8")
    library, _ = build(f"#define MATRIX_UNIT\n{text}" if has_matrix_unit(cpu.features) else text)
    whole, count, real = ctypes.c_int64, ctypes.c_int, ctypes.c_double

    def function(name: str, *types: type) -> Callable[..., float]:
        fn = getattr(library, name)
        fn.restype, fn.argtypes = ctypes.c_double, types
        return fn

    threads = int(library.host_threads(cpu.units))
    size = _array_bytes(cpu)
    read, copy = function("host_read", whole, count, real), function("host_copy", whole, count, real, count)
    fma, dot = function("host_fma", count, real), function("host_dot_bf16", count, real)
    tiles = function("host_tiles_bf16", count, real)
    runs = (
        lambda: read(size, threads, _BUDGET),
        lambda: 2 * copy(size, threads, _BUDGET, 0),
        lambda: 2 * copy(size, threads, _BUDGET, 1),
        lambda: fma(threads, _BUDGET),
        lambda: dot(threads, _BUDGET),
        lambda: tiles(threads, _BUDGET),
    )
    rounds = [[run() for run in runs] for _ in range(_ROUNDS)]
    reading, plain, past, f32, bf16, in_tiles = map(max, *rounds)
    check(min(reading, plain, past) > 0, lambda: f"measuring the CPU: no memory for arrays of {size} bytes")
    best = f"best 2 ms of {_ROUNDS} x {_BUDGET} s, {threads} threads"
    array = f"of {size >> 20} MiB, {best}"
    how = {
        "read_bytes_per_s": f"sum of an array {array}",
        "copy_bytes_per_s": f"copy, bytes read plus written, arrays {array}",
        "stream_copy_bytes_per_s": f"copy with non-temporal stores, bytes read plus written, arrays {array}",
    }
    flops = {}
    for name, rate, words in (
        ("f32", f32, f"multiply-adds in {library.host_vector_bits()}-bit registers"),
        ("bf16", bf16, "dot-product instructions in registers, sums in float32"),
        (TILES, in_tiles, "products of tiles in registers (AMX), sums in float32"),
    ):
        if rate:
            flops[name] = rate
            how[f"flops.{name}"] = f"{words}, {best}"
    return HostRates(reading, plain, past, threads, _now(), flops, how)


def _by_torch(cpu: Target, why: str) -> HostRates:
    """Lower bounds without a compiler; ``why`` there is none."""
    size = _array_bytes(cpu)
    try:
        x = torch.ones(size // 4, dtype=torch.float32)
        y = torch.zeros_like(x)
    except RuntimeError as e:
        raise TesselError(f"measuring the CPU: no memory for arrays of {size} bytes") from e
    note = f"a lower bound, by torch's own operators, since kernels cannot be compiled: {why}"
    read, copy = _shortest(x.sum), _shortest(lambda: y.copy_(x))
    flops = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.ones(_SIDE, _SIDE, dtype=dtype)
        flops[name] = 2 * _SIDE**3 / _shortest(lambda a=a: a @ a)  # type: ignore[misc]
    rates = HostRates(size / read, 2 * size / copy, 2 * size / copy, torch.get_num_threads(), _now(), flops)
    words = {
        "flops.f32": f"product of {_SIDE} x {_SIDE} matrices",
        "flops.bf16": f"product of {_SIDE} x {_SIDE} matrices",
    }
    how = {name: f"{words.get(name, f'arrays of {size >> 20} MiB')}; {note}" for name in rates.numbers()}
    return HostRates(**{**vars(rates), "how": how})


def _shortest(run: Callable[[], object]) -> float:
    best = math.inf
    end = time.perf_counter() + _BUDGET
    while (start := time.perf_counter()) < end or math.isinf(best):
        run()
        best = min(best, time.perf_counter() - start)
    return best
