"""The devices that Tessel knows: one frozen record each, in one explicit table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from ..config import target_file
from ..errors import TesselError, did_you_mean
from .amd import AMD
from .calibration import Calibration, calibration_of
from .cpu import INTERPRET, host_cpu
from .host import HostRates, read_record
from .load import load_target as _load
from .nvidia import NVIDIA
from .target import Level, Limits, MatrixInstruction, Target

__all__ = [
    "TARGETS",
    "Calibration",
    "HostRates",
    "Level",
    "Limits",
    "MatrixInstruction",
    "Target",
    "calibration_of",
    "get_target",
    "host_measured",
    "load_target",
    "match_device",
]


def _table(targets: Iterable[Target]) -> Mapping[str, Target]:
    table: dict[str, Target] = {}
    for target in targets:
        if target.name in table:
            raise TesselError(f"two targets are called {target.name!r}")
        table[target.name] = target
    return MappingProxyType(table)


TARGETS: Mapping[str, Target] = _table((host_cpu(), INTERPRET, *NVIDIA, *AMD))
"""Name -> record."""


def load_target(path: str | Path) -> Target:
    """The device that a user's JSON file describes; see ``load.py`` for what it holds.

    Raises:
        TesselError: the file cannot be read, or a number in it is missing, not a number or not positive.
    """
    return _load(path, TARGETS)


def get_target(name: str) -> Target:
    """The record called ``name``, as ``tessel targets`` lists them, or that of a JSON file (``"mychip.json"``).

    ``TESSEL_TARGET_PATH`` names a folder whose ``<name>.json`` describes a device of that name.

    >>> get_target("h100").units
    132
    >>> get_target("h10")
    Traceback (most recent call last):
        ...
    tessel.errors.TesselError: unknown target 'h10'; did you mean 'h100'? known: a100, ...

    Raises:
        TesselError: there is no such target.
    """
    if isinstance(name, str) and name.endswith(".json"):
        return load_target(name)
    if isinstance(name, str) and name not in TARGETS and (file := target_file(name)) is not None:
        return load_target(file)
    if not isinstance(name, str) or name not in TARGETS:
        raise TesselError(f"unknown target {name!r}; {did_you_mean(name, TARGETS)}")
    return TARGETS[name]


def match_device(device_name: str) -> Target | None:
    """The GPU record for a name as the driver gives it, or None when none is known.

    >>> match_device("NVIDIA H100 80GB HBM3").name
    'h100'
    >>> match_device("NVIDIA GeForce GT 710") is None
    True
    """
    words = device_name.replace("-", " ").split()
    for target in TARGETS.values():
        for known in target.device_names if target.gpu_target else ():
            want = known.split()
            if any(words[i : i + len(want)] == want for i in range(len(words))):
                return target
    return None


def host_measured() -> HostRates | None:
    """What was measured on this machine's CPU and kept; None before ``tessel targets --show cpu`` has run.

    Reads a small file and measures nothing.
    """
    return read_record(TARGETS["cpu"])
