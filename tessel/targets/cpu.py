"""The CPU of this machine, and Triton's interpreter, which runs GPU kernels on it to test them.

The machine's record is read from the operating system; nothing is measured, so bandwidths and rates
are unknown until something measures them.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from .target import Level, Limits, Target

__all__ = ["INTERPRET", "host_cpu"]

KIB = 2**10
_NOT_MEASURED = "unknown: not measured"
_FALLBACK_MEMORY = 4 * 2**30


def host_cpu(proc: str | Path = "/proc", sys: str | Path = "/sys") -> Target:
    """The record of this machine's CPU, read from ``proc`` and ``sys`` where they exist.

    A machine without them (macOS, some containers) gets cores and memory only; it never fails.
    """
    proc, sys = Path(proc), Path(sys)
    flags, model = _cpuinfo(proc / "cpuinfo")
    cores = _cores()
    levels: list[Level] = []
    sources = {
        "units": "the operating system: logical CPUs this process may use",
        "clock_hz": _NOT_MEASURED,
        "link_bytes_per_s": "none: one machine",
    }
    for number, size, shared_by in _caches(sys / "devices/system/cpu/cpu0/cache"):
        copies = -(-cores // shared_by)
        name = f"l{number}"
        levels.append(
            Level(name, size * copies, None, "device") if shared_by > 1 else Level(name, size, None, "unit")
        )
        sources[f"levels.{name}.capacity_bytes"] = (
            f"the operating system: {size // KIB} KiB for every {shared_by} CPUs"
        )
        sources[f"levels.{name}.bandwidth_bytes_per_s"] = _NOT_MEASURED
    memory = _memory_bytes(proc / "meminfo")
    levels.append(Level("memory", memory or _FALLBACK_MEMORY, None, "device"))
    sources["levels.memory.capacity_bytes"] = (
        "the operating system: MemTotal" if memory else "assumed: the system does not say"
    )
    sources["levels.memory.bandwidth_bytes_per_s"] = _NOT_MEASURED
    return Target(
        name="cpu",
        vendor="cpu",
        arch=platform.machine() or "unknown",
        units=cores,
        clock_hz=None,
        levels=tuple(levels),
        flops={},
        limits=None,
        link_bytes_per_s=None,
        gpu_target=None,
        sources=sources,
        features=tuple(sorted(_usable(flags))),
        device_names=(model,) if model else (),
    )


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0)) or 1
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _cpuinfo(path: Path) -> tuple[set[str], str]:
    """``(flags, model name)`` of the first processor; empty where the file is missing."""
    flags: set[str] = set()
    model = ""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    flags = set(value.split())
                elif key.strip() == "model name":
                    model = value.strip()
                if not line.strip():  # end of the first processor
                    break
    except OSError:
        pass
    return flags, model


def _usable(flags: set[str]) -> set[str]:
    """The flags without those of the matrix unit (AMX), if the system does not let this process use it.

    Its tiles are large, so Linux gives them only to a process that asks (``arch_prctl(2)``); once is enough, threads
    and children made later may use them too.
    """
    matrix_unit = {x for x in flags if x.startswith("amx_")}
    if not matrix_unit:
        return flags
    ask, permission, tile_data = 158, 0x1023, 18  # SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    try:
        allowed = ctypes.CDLL(None).syscall(ask, permission, tile_data) == 0
    except (AttributeError, OSError, TypeError):  # not on Linux
        allowed = False
    return flags if allowed else flags - matrix_unit


def _caches(folder: Path) -> list[tuple[int, int, int]]:
    """``(level, bytes, CPUs that share it)`` of the data caches of CPU 0, innermost first."""
    found = []
    for index in sorted(folder.glob("index*")):
        try:
            kind, level, size, shared = (
                (index / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
            if kind != "Instruction":
                found.append((int(level), _size(size), _count(shared)))
        except (OSError, ValueError):  # a cache the kernel describes only in part
            continue
    return sorted(found)


def _size(text: str) -> int:
    """
    >>> _size("48K"), _size("32M")
    (49152, 33554432)
    """
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


def _count(text: str) -> int:
    """How many CPUs a list names.

    >>> _count("0-3,8"), _count("0")
    (5, 1)
    """
    total = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def _memory_bytes(path: Path) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * KIB
    except (OSError, ValueError, IndexError):
        pass
    return None


_CHOSEN = "chosen: what every supported GPU has, so that a tile picked here is legal on all of them"
_LIMITS = Limits(
    shared_bytes_per_block=64 * KIB,
    shared_bytes_per_unit=64 * KIB,
    registers_per_unit=64 * KIB,
    registers_per_thread=255,
    warps_per_unit=32,
    threads_per_block=1024,
    warp_size=32,
)

INTERPRET = Target(
    name="triton-interpret",
    vendor="interpret",
    arch="interpret",
    units=1,
    clock_hz=None,
    levels=(
        Level("shared", 64 * KIB, None, "unit"),
        Level("memory", _FALLBACK_MEMORY, None, "device"),
    ),
    flops={},
    limits=_LIMITS,
    link_bytes_per_s=None,
    gpu_target=None,
    sources={
        "units": "chosen: the interpreter runs one program after another",
        "clock_hz": "none: not a device",
        "levels.shared.capacity_bytes": _CHOSEN,
        "levels.shared.bandwidth_bytes_per_s": "none: not a device",
        "levels.memory.capacity_bytes": "chosen: enough for tests; the interpreter has no memory of its own",
        "levels.memory.bandwidth_bytes_per_s": "none: not a device",
        **{f"limits.{name}": _CHOSEN for name in Limits.__dataclass_fields__},
        "link_bytes_per_s": "none: not a device",
    },
)
