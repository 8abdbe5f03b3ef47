"""What a device's data sheet does not say and a kernel's time hangs on, one frozen record beside each GPU.

A number is either fitted from measurements on the device or assumed, and its source says which. The
assumed ones are round and err to the slow side; ``make gpu`` is where they get fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from ..errors import TesselError
from .target import Target

__all__ = ["CALIBRATIONS", "Calibration", "calibration_of"]


@dataclass(frozen=True)
class Calibration:
    """The constants of the time model (``solve/time.py``) on one device.

    Attributes:
        issue_s: seconds one step of a program's loop costs however small it is: barriers, loop control.
        copy_s: seconds a unit needs to issue one warp's copy of 16 bytes a thread, addresses and masks included.
        latency_s: seconds from asking for a tile to having it, under load.
        l2_bytes_per_s: what L2 delivers to all units together.
        memory_efficiency: part of the record's memory bandwidth that a long copy reaches.
        matrix_efficiency: part of the record's matrix rate that a long product reaches (the clock sags under power).
        program_s: seconds to start a program and to retire it.
        dispatch_s: seconds between two programs that the device hands to its units.
        exchange_s: seconds for warps of one program to exchange partial results: write, barrier, read.
        exps_per_clock: exponentials a clock a unit.
        lanes_per_clock: single-precision operations a clock a unit.
        launch_s: seconds from one kernel's end to the next one's start on a busy stream.
        sources: name of the number -> ``"fitted from ..."``, ``"derived: ..."`` or ``"assumed: ..."``.

    Raises:
        TesselError: a number that is not positive and finite, or that has no source.
    """

    issue_s: float
    copy_s: float
    latency_s: float
    l2_bytes_per_s: float
    memory_efficiency: float
    matrix_efficiency: float
    program_s: float
    dispatch_s: float
    exchange_s: float
    exps_per_clock: float
    lanes_per_clock: float
    launch_s: float
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))
        for name, value in self.numbers().items():
            if not (math.isfinite(value) and value > 0):
                raise TesselError(f"calibration: {name} must be positive, got {value}")
            if not self.sources.get(name):
                raise TesselError(f"calibration: {name} has no source")
        for name in ("memory_efficiency", "matrix_efficiency"):
            if getattr(self, name) > 1:
                raise TesselError(f"calibration: {name} is a part of the peak, at most 1, got {getattr(self, name)}")

    def __hash__(self) -> int:
        return hash(tuple(self.numbers().values()))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy does not pickle by itself
        return Calibration, (*self.numbers().values(), dict(self.sources))

    def numbers(self) -> dict[str, float]:
        """Every number by its name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sources"}

    def rows(self) -> list[tuple[str, str, str]]:
        """``(name, value with unit, source)`` for every number, in order."""
        return [(f"calibration.{n}", _show(n, v), self.sources[n]) for n, v in self.numbers().items()]

    def changed(self, source: str, **numbers: float) -> Calibration:
        """A copy with some numbers replaced, all from one source, for example after a fit."""
        return replace(self, **numbers, sources={**self.sources, **dict.fromkeys(numbers, source)})  # type: ignore[arg-type]


def _show(name: str, value: float) -> str:
    if name.endswith("_bytes_per_s"):
        return f"{value / 1e12:.4g} TB/s"
    return f"{value * 1e9:.4g} ns" if name.endswith("_s") else f"{value:.4g}"


_ASSUMED = {
    "issue_s": "assumed: some 70 clocks for a barrier, its wait and the loop's own instructions",
    "copy_s": "assumed: 8 instructions a copy on one of 4 schedulers at the boost clock",
    "latency_s": "assumed: twice the idle latency of memory (about 480 clocks, Luo et al., arXiv 2501.12084)",
    "memory_efficiency": "assumed: nine tenths, what published softmax and norm kernels reach",
    "program_s": "assumed: some 500 clocks to start, find out the tile and drain",
    "dispatch_s": "assumed: two clocks",
    "exchange_s": "assumed: two barriers and a round trip through shared memory, some 100 clocks",
    "launch_s": "assumed: kernels back to back on a stream",
}
_EXPS = "derived: 16 special-function results a clock an SM, CUDA programming guide (throughput of native instructions)"
_LANES = "derived: the record's f32 rate ÷ 2 ÷ units ÷ clock"


def _calibration(
    target_clock_hz: float,
    l2: tuple[float, str],
    matrix: tuple[float, str],
    lanes: float,
    memory: tuple[float, str] | None = None,
    exps: tuple[float, str] = (16, _EXPS),
    launch_s: float = 2.5e-6,
) -> Calibration:
    """A record from what differs between GPUs; times that are clocks scale with the clock."""
    clock = 1 / target_clock_hz
    sources = dict(_ASSUMED)
    sources |= {"l2_bytes_per_s": l2[1], "matrix_efficiency": matrix[1], "exps_per_clock": exps[1]}
    if memory is not None:
        sources["memory_efficiency"] = memory[1]
    return Calibration(
        issue_s=70 * clock,
        copy_s=2 * clock,
        latency_s=960 * clock,
        l2_bytes_per_s=l2[0],
        memory_efficiency=memory[0] if memory is not None else 0.9,
        matrix_efficiency=matrix[0],
        program_s=500 * clock,
        dispatch_s=2 * clock,
        exchange_s=100 * clock,
        exps_per_clock=exps[0],
        lanes_per_clock=lanes,
        launch_s=launch_s,
        sources={**sources, "lanes_per_clock": _LANES},
    )


_L2_5120 = (
    "assumed: 95% of 5,120 bytes a clock (A100 7,219 and H100 8,986 GB/s in the hardware table of PMC10448217); "
    "a 650 TFLOP/s product in 128×256 tiles draws 7.6 TB/s"
)
_PART = "derived: published large product ÷ data-sheet rate, {0} ÷ {1} TFLOP/s; unconfirmed"

CALIBRATIONS: Mapping[str, Calibration] = MappingProxyType(
    {
        "a100": _calibration(1.41e9, (6.86e12, _L2_5120), (0.87, _PART.format(271, 312)), 64),
        "h100": _calibration(1.83e9, (8.5e12, _L2_5120), (0.80, _PART.format(794, 989)), 128),
        "h200": _calibration(
            1.83e9,
            (8.5e12, _L2_5120),
            (0.80, "derived: measured with torch.matmul on one H200 ÷ data-sheet rate, 788 ÷ 989 TFLOP/s"),
            128,
            memory=(0.895, "derived: measured with a large copy on one H200 ÷ data-sheet rate, 4.3 ÷ 4.8 TB/s"),
        ),
        "b200": _calibration(
            1.856e9, (16e12, "assumed: 64 bytes a clock an SM, nine tenths"), (0.775, _PART.format(1745, 2250)), 128
        ),
        "l40s": _calibration(2.52e9, (4.5e12, "assumed: as published for the RTX 4090"), (0.85, "assumed"), 128),
        "rtx4090": _calibration(2.52e9, (4.5e12, "assumed: published microbenchmarks"), (0.95, "assumed"), 128),
        "mi300x": _calibration(
            2.1e9,
            (20e12, "assumed: 128 bytes a clock on each of 16 channels of 8 dies (CDNA 3 white paper), six tenths"),
            (0.51, _PART.format(668, 1307)),
            128,
            exps=(16, "assumed: a quarter rate of 64 lanes"),
            launch_s=5e-6,
        ),
    }
)
"""Target name -> constants."""

_NEAREST = {"sm_80": "a100", "sm_89": "l40s", "sm_90": "h100", "sm_100": "b200", "gfx942": "mi300x"}


def calibration_of(target: Target) -> Calibration:
    """The constants of a GPU: its own, those a user's file gave, or those of the nearest known architecture.

    >>> from tessel.targets import get_target
    >>> round(calibration_of(get_target("h100")).launch_s * 1e6, 1)
    2.5

    Raises:
        TesselError: the target is no GPU.
    """
    if target.calibration is not None:
        return target.calibration
    if target.name in CALIBRATIONS:
        return CALIBRATIONS[target.name]
    if target.gpu_target is None:
        raise TesselError(f"target {target.name} is no GPU: it has no calibration constants for tiles")
    near = _NEAREST.get(target.arch, "h100" if target.vendor == "nvidia" else "mi300x")
    known = CALIBRATIONS[near]
    return replace(known, sources={n: f"assumed: as on {near} ({s})" for n, s in known.sources.items()})
