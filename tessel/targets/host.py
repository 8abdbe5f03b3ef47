"""What was measured on this machine's CPU: a record a CPU, in the cache, read back only if it can be trusted.

    rates = host_measured()                   # None where nothing was measured
    rates.copy_bytes_per_s, rates.flops["f32"]

``tessel targets --show cpu`` measures (``runtime/host_rates.py``) and keeps the record; nothing else does, so a
compilation never waits for it. The folder is this user's alone, the file carries a checksum and is named by
the CPU: its model, its instruction sets, the cores this process may use and its caches.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import cache_dir
from ..safe_dir import open_private
from .target import Target

__all__ = [
    "TILES",
    "HostRates",
    "features_that_matter",
    "key_of",
    "read_record",
    "vector_bits",
    "with_rates",
    "write_record",
]

TILES = "bf16 in tiles"  # the rate of the matrix unit
_FORMAT = 2  # of the file; a record of another one is measured again
_FOLDER = "host"
_LARGEST = 1 << 16  # bytes of a record that is read

# What generated code and the libraries choose by, of the many flags a CPU lists.
_MATTER = {
    "x86_64": "avx avx2 fma f16c avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_bf16 amx_int8",
    "aarch64": "asimd asimdhp asimddp bf16 i8mm sve sve2 svebf16 sme",
}
_VECTORS = {"avx512f": 512, "avx": 256, "sse2": 128, "asimd": 128}


@dataclass(frozen=True)
class HostRates:
    """Rates of the whole CPU, ``threads`` threads at work.

    Attributes:
        read_bytes_per_s: bytes read of an array far larger than the caches.
        copy_bytes_per_s: bytes read plus bytes written by a plain copy of such an array. The lines that plain
            stores make the CPU read first are not counted.
        stream_copy_bytes_per_s: the same with stores that go past the caches, the most that a copy reaches.
        flops: operations a second in registers, a multiply-add counts as two: ``f32``, ``bf16`` where there is a
            dot-product instruction, ``bf16 in tiles`` where there is a matrix unit (AMX).
        threads: that ran.
        when: UTC, ISO 8601.
        how: what each number is from, by its name here (``"flops.f32"``).
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    stream_copy_bytes_per_s: float
    threads: int
    when: str
    flops: Mapping[str, float] = field(default_factory=dict)
    how: Mapping[str, str] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Every rate by its name."""
        rates = {k: v for k, v in asdict(self).items() if k.endswith("per_s")}
        return rates | {f"flops.{k}": v for k, v in self.flops.items()}


def vector_bits(target: Target) -> int | None:
    """Width of the CPU's vectors as far as its flags say; None where they do not.

    Scalable vectors (SVE) are counted as the 128 bits that every such CPU has.
    """
    return next((bits for flag, bits in _VECTORS.items() if flag in target.features), None)


def features_that_matter(target: Target) -> list[str]:
    """The flags that code is chosen by, of those the CPU has."""
    return [f for f in _MATTER.get(target.arch, "").split() if f in target.features]


def key_of(target: Target) -> str:
    """The name of the record of a CPU: equal for the same model, flags, usable cores and caches."""
    levels = [(level.name, level.capacity_bytes, level.scope) for level in target.levels if level.name != "memory"]
    parts = [_FORMAT, target.arch, target.units, target.device_names, target.features, levels]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def read_record(target: Target) -> HostRates | None:
    """The record of a CPU; None where there is none, or none to be trusted: then it is to be measured again."""
    try:
        folder = open_private(cache_dir() / _FOLDER, create=False)
    except OSError:
        return None
    try:
        fd = os.open(f"{key_of(target)}.json", os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0), dir_fd=folder.fd)
        with open(fd, encoding="utf-8") as f:
            return _parsed(f.read(_LARGEST))
    except (OSError, ValueError):
        return None
    finally:
        folder.close()


def write_record(target: Target, rates: HostRates) -> None:
    """Keep a record; a reader sees the old file or the new one, never a half.

    Raises:
        OSError: the folder is not this user's alone (``UnsafeDirectory``), or cannot be written to.
    """
    folder = open_private(cache_dir() / _FOLDER)
    try:
        data = json.dumps(asdict(rates))
        text = json.dumps({"checksum": hashlib.sha256(data.encode()).hexdigest(), "rates": data})
        with tempfile.NamedTemporaryFile("w", dir=folder.path, delete=False, encoding="utf-8") as f:
            try:
                f.write(text)
                f.flush()
                os.replace(
                    os.path.basename(f.name), f"{key_of(target)}.json", src_dir_fd=folder.fd, dst_dir_fd=folder.fd
                )
            except BaseException:
                os.unlink(f.name)
                raise
    finally:
        folder.close()


def _parsed(text: str) -> HostRates:
    """
    Raises:
        ValueError: it is not a record, or not the one that was written.
    """
    outer = json.loads(text)
    if not isinstance(outer, dict) or not isinstance(data := outer.get("rates"), str):
        raise ValueError("no record")
    if hashlib.sha256(data.encode()).hexdigest() != outer.get("checksum"):
        raise ValueError("the checksum differs")
    found: dict[str, Any] = json.loads(data)
    try:
        rates = HostRates(**found)
        numbers = [*rates.numbers().values(), rates.threads]
        if not all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in numbers):
            raise ValueError("a rate that is no positive number")
    except (TypeError, AttributeError) as e:
        raise ValueError(f"another form: {e}") from e
    return rates


def with_rates(target: Target, rates: HostRates) -> Target:
    """A CPU's record with what was measured in it: memory bandwidth (reading), copies under ``reached``, rates.

    Sources say ``measured``, how and when.
    """
    source = {name: f"measured {rates.when[:10]}: {rates.how.get(name, 'unknown how')}" for name in rates.numbers()}
    levels = tuple(
        replace(level, bandwidth_bytes_per_s=rates.read_bytes_per_s) if level.name == "memory" else level
        for level in target.levels
    )
    sources = {
        **target.sources,
        "levels.memory.bandwidth_bytes_per_s": source["read_bytes_per_s"],
        **{f"flops.{k}": source[f"flops.{k}"] for k in rates.flops},
        "reached.memory": source["copy_bytes_per_s"],
        "reached.memory, past the caches": source["stream_copy_bytes_per_s"],
    }
    reached = {"memory": rates.copy_bytes_per_s, "memory, past the caches": rates.stream_copy_bytes_per_s}
    return replace(target, levels=levels, flops=dict(rates.flops), reached=reached, sources=sources)
