"""The record of one device: what it holds, how fast it is, what it allows, and who says so.

Units: bytes, bytes a second, operations a second (a multiply-add counts as two), hertz.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from ..errors import TesselError, did_you_mean

if TYPE_CHECKING:
    from .calibration import Calibration

__all__ = ["Level", "Limits", "MatrixInstruction", "Target"]

Vendor = Literal["nvidia", "amd", "cpu", "interpret"]
VENDORS = ("nvidia", "amd", "cpu", "interpret")
SCOPES = ("unit", "device")
_INSTRUCTION = ("m", "n", "k_bytes", "warps", "rate")  # the numbers of a matrix instruction


@dataclass(frozen=True)
class Level:
    """One level of the memory hierarchy.

    ``scope`` says what ``capacity_bytes`` is counted for: ``"unit"`` one SM, CU or core; ``"device"`` all of
    it. ``bandwidth_bytes_per_s`` is always for the whole device; None means nobody trustworthy has said,
    and then the source says "unknown".
    """

    name: str
    capacity_bytes: int
    bandwidth_bytes_per_s: float | None
    scope: Literal["unit", "device"]


@dataclass(frozen=True)
class Limits:
    """What one kernel may ask of one unit (SM or CU).

    Attributes:
        shared_bytes_per_block, shared_bytes_per_unit: shared memory of one block, and of all resident ones together.
        registers_per_unit, registers_per_thread: each 32 bits wide.
        warps_per_unit: resident at once.
        threads_per_block: at most.
        warp_size: threads of a warp or wave.
    """

    shared_bytes_per_block: int
    shared_bytes_per_unit: int
    registers_per_unit: int
    registers_per_thread: int
    warps_per_unit: int
    threads_per_block: int
    warp_size: int


@dataclass(frozen=True)
class MatrixInstruction:
    """A matrix instruction: ``m × n × k`` at its largest.

    Attributes:
        k_bytes: how wide it is along k, whatever the type.
        warps: that issue it together.
        rate: the part of the device's peak that it can reach.
        shared: its right operand is read from shared memory by the instruction, once for every ``m`` rows, not by each
            warp for itself.
        source: where the numbers are from.
    """

    name: str
    m: int
    n: int
    k_bytes: int
    warps: int
    rate: float
    shared: bool
    source: str


@dataclass(frozen=True)
class Target:
    """One device, frozen. Every number has its source in ``sources`` under the name :meth:`numbers` gives it.

    Fields:
        name: what ``target=`` takes, for example ``"h100"``.
        vendor: ``"nvidia"``, ``"amd"``, ``"cpu"`` or ``"interpret"`` (Triton's interpreter).
        arch: ``"sm_90"``, ``"gfx942"``, or the machine name of a CPU.
        units: SMs, CUs or cores.
        clock_hz: the clock that the peak rates are stated at; None where there is none.
        levels: memory from the innermost (registers) to the outermost (``"memory"``).
        flops: peak dense operations a second by type: ``f64 f32 tf32 f16 bf16 f8 i8``. A type that is
            missing has no fast path. ``f32`` is the plain vector rate, the others matrix rates.
        limits: what one kernel may ask; None for a CPU.
        link_bytes_per_s: to other devices, one direction, all links of the device together; None for none.
        gpu_target: ``(backend, arch, warp_size)`` as Triton names the device; None if Triton cannot compile
            for it.
        features: instruction-set extensions and the like, sorted.
        device_names: words of the driver's device name that mean this target, see ``match_device``.
        reached: rates seen in practice, same units as ``flops`` and, under ``"memory"``, bytes a second.
        sources: name of the number -> where it is from.
        matrix: matrix instructions, the fastest first.
        calibration: constants a user's file gave; None means those in ``calibration.py``.

    Raises:
        TesselError: a number that is not positive and finite, or that has no source, or a source for
            a number that does not exist.
    """

    name: str
    vendor: Vendor
    arch: str
    units: int
    clock_hz: float | None
    levels: tuple[Level, ...]
    flops: Mapping[str, float]
    limits: Limits | None
    link_bytes_per_s: float | None
    gpu_target: tuple[str, int | str, int] | None
    sources: Mapping[str, str]
    features: tuple[str, ...] = ()
    device_names: tuple[str, ...] = ()
    reached: Mapping[str, float] = field(default_factory=dict)
    matrix: tuple[MatrixInstruction, ...] = ()
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        own = {f"matrix.{i.name}.{n}": i.source for i in self.matrix for n in _INSTRUCTION}
        object.__setattr__(self, "sources", {**self.sources, **own})
        for name in ("flops", "reached", "sources"):  # read-only copies: a record is not edited in place
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        wrong = self._first_wrong()
        if wrong is not None:
            raise TesselError(f"target {self.name}: {wrong}")

    def _first_wrong(self) -> str | None:
        if self.vendor not in VENDORS:
            return f"unknown vendor {self.vendor!r}; known: {', '.join(VENDORS)}"
        for level in self.levels:
            if level.scope not in SCOPES:
                return f"{level.name}: scope {level.scope!r}, not one of {', '.join(SCOPES)}"
        numbers = self.numbers()
        for key, value in numbers.items():
            source = self.sources.get(key, "")
            if not source:
                return f"{key} has no source"
            if value is None:
                if not source.startswith(("unknown", "none")):
                    return f"{key} is missing and its source does not say why"
            elif not (math.isfinite(value) and value > 0):
                return f"{key} must be positive, got {value}"
        extra = [key for key in self.sources if key not in numbers]
        return f"a source for {extra[0]!r}, which is no number here" if extra else None

    def __hash__(self) -> int:
        return hash((self.name, self.arch, self.units))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle by itself
        values = (getattr(self, f.name) for f in fields(self))
        return Target, tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

    def numbers(self) -> dict[str, float | None]:
        """Every number by its dotted name, for example ``levels.l2.capacity_bytes``."""
        out: dict[str, float | None] = {"units": self.units, "clock_hz": self.clock_hz}
        for level in self.levels:
            out[f"levels.{level.name}.capacity_bytes"] = level.capacity_bytes
            out[f"levels.{level.name}.bandwidth_bytes_per_s"] = level.bandwidth_bytes_per_s
        out.update({f"flops.{dtype}": value for dtype, value in self.flops.items()})
        if self.limits is not None:
            out.update({f"limits.{f.name}": getattr(self.limits, f.name) for f in fields(self.limits)})
        for i in self.matrix:
            out.update({f"matrix.{i.name}.{n}": getattr(i, n) for n in _INSTRUCTION})
        out["link_bytes_per_s"] = self.link_bytes_per_s
        out.update({f"reached.{what}": value for what, value in self.reached.items()})
        return out

    def level(self, name: str) -> Level:
        """The memory level called ``name``.

        Raises:
            TesselError: there is none; the message lists those there are.
        """
        for level in self.levels:
            if level.name == name:
                return level
        names = [level.name for level in self.levels]
        raise TesselError(f"target {self.name}: no level {name!r}; {did_you_mean(name, names)}")

    def rows(self) -> list[tuple[str, str, str]]:
        """``(name, value with unit, source)`` for every number, in order."""
        return [(key, show(key, value), self.sources[key]) for key, value in self.numbers().items()]

    def describe(self) -> str:
        """A plain-text table of every number and its source."""
        head = f"{self.name}: {self.vendor} {self.arch}"
        rows = self.rows()
        wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join([head] + [f"  {k:<{wide[0]}}  {v:>{wide[1]}}  {s}" for k, v, s in rows])


def show(key: str, value: float | None) -> str:
    """A number in the unit that its name implies.

    >>> show("levels.l2.capacity_bytes", 50 * 2**20), show("flops.bf16", 989.4e12), show("units", 132)
    ('50 MiB', '989.4 TFLOP/s', '132')
    """
    if value is None:
        return "-"
    if "bytes_per_s" in key or key.startswith("reached.memory"):
        return f"{value / 1e12:.4g} TB/s" if value >= 1e12 else f"{value / 1e9:.4g} GB/s"
    if "bytes" in key:
        if value >= 1e9 and value % 2**20:  # sold in powers of ten
            return f"{value / 1e9:.4g} GB"
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= size:
                return f"{value / size:.4g} {unit}"
        return f"{value:.0f} B"
    if key.startswith(("flops.", "reached.")):
        return f"{value / 1e12:.4g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.4g} GFLOP/s"
    if key.endswith(".rate"):
        return f"{value:.0%}"
    if key == "clock_hz":
        return f"{value / 1e9:.4g} GHz"
    return f"{value:,.0f}"
