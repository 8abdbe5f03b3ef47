"""A device that a user describes in one JSON file.

    {"name": "mychip", "like": "h100", "units": 114, "clock_hz": 1.755e9,
     "levels": {"memory": {"capacity_bytes": 80e9, "bandwidth_bytes_per_s": 2.0e12}},
     "flops": {"bf16": 756e12}, "device_names": ["MyChip PCIe"], "calibration": {"l2_bytes_per_s": 5.5e12}}

``like`` names a known target whose values stand where the file is silent. Without it every number that the models
need has to be there. ``sources`` (number -> text) is optional; a number without one is said to come from the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import TesselError, did_you_mean
from .calibration import Calibration, calibration_of
from .target import Level, Limits, Target

__all__ = ["load_target"]

_MAX_BYTES = 2**20
_KEYS = (
    "name", "like", "vendor", "arch", "units", "clock_hz", "levels", "flops", "limits", "link_bytes_per_s",
    "device_names", "reached", "calibration", "sources",
)  # fmt: skip
_LEVEL_KEYS = ("capacity_bytes", "bandwidth_bytes_per_s", "scope")
_DTYPES = ("f64", "f32", "tf32", "f16", "bf16", "f8", "i8")


def load_target(path: str | Path, known: Mapping[str, Target]) -> Target:
    """The record that a JSON file describes.

    Args:
        path: the file.
        known: the targets that ``like`` may name; a file may not take one of their names.

    Raises:
        TesselError: the file cannot be read, is not JSON, or a number in it is missing, not a number or not positive.
            The message names the file and the number.
    """
    path = Path(path)
    try:
        data = _read(path)
        return _target(data, path, known)
    except TesselError as e:
        raise TesselError(f"target file {path}: {e}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TesselError(f"larger than {_MAX_BYTES} bytes: not a device")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as e:
        raise TesselError(f"cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise TesselError(f"is not JSON: {str(e)[:200]}") from None
    if not isinstance(data, dict):
        raise TesselError("expected an object of numbers by name")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise TesselError("the same name is given twice")
    return out


def _target(data: dict[str, Any], path: Path, known: Mapping[str, Target]) -> Target:
    _names(data, _KEYS, "")
    name, arch, base = _identity(data, known)
    vendor: Any = "nvidia" if arch.startswith("sm_") else "amd"
    if data.get("vendor", vendor) != vendor:
        raise TesselError(f"vendor: {data['vendor']!r} makes no {arch}")
    numbers = {k: v for k, v in base.numbers().items() if v is not None} if base else {}
    sources = {k: f"as {base.name}: {v}" for k, v in base.sources.items()} if base else {}
    given, constants = _numbers(data)
    told = _texts_by_name(data.get("sources", {}))
    _names(told, [*given, *(f"calibration.{n}" for n in constants)], "sources: ")
    numbers |= given
    sources |= {k: told.get(k, f"given: {path.name}") for k in given}
    for need in _needed(arch):
        if need not in numbers:
            raise TesselError(f"{need} is missing")
    levels = _levels(numbers, data, base)
    for level in levels:
        if level.bandwidth_bytes_per_s is None:
            sources[f"levels.{level.name}.bandwidth_bytes_per_s"] = "unknown: not given"
    if "link_bytes_per_s" not in numbers:
        sources["link_bytes_per_s"] = "none: not given"
    limits = Limits(**{f.name: _whole(f"limits.{f.name}", numbers[f"limits.{f.name}"]) for f in fields(Limits)})
    like = base or next((t for t in known.values() if t.arch == arch), None)
    flops = {k.removeprefix("flops."): v for k, v in numbers.items() if k.startswith("flops.")}
    reached = {k.removeprefix("reached."): v for k, v in numbers.items() if k.startswith("reached.")}
    target = Target(
        name=name,
        vendor=vendor,
        arch=arch,
        units=_whole("units", numbers["units"]),
        clock_hz=numbers["clock_hz"],
        levels=levels,
        flops=flops,
        limits=limits,
        link_bytes_per_s=numbers.get("link_bytes_per_s"),
        gpu_target=("cuda", int(arch[3:].rstrip("a")), 32) if vendor == "nvidia" else ("hip", arch, limits.warp_size),
        sources={k: v for k, v in sources.items() if not k.startswith("matrix.")},
        device_names=_texts(data.get("device_names", [])),
        reached=reached,
        matrix=like.matrix if like is not None else (),
    )
    if not constants:
        return target
    source = {n: told.get(f"calibration.{n}", f"given: {path.name}") for n in constants}
    nearest = calibration_of(base or target)
    return replace(target, calibration=replace(nearest, **constants, sources={**nearest.sources, **source}))


def _identity(data: Mapping[str, Any], known: Mapping[str, Target]) -> tuple[str, str, Target | None]:
    """``(name, architecture, the target it is like)``."""
    name = data.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise TesselError(f"name: expected lower-case letters, digits, dots and dashes, got {name!r}")
    if name in known:
        raise TesselError(f"name: {name!r} is a target that Tessel knows; take another name")
    like = data.get("like")
    base = known.get(like) if isinstance(like, str) else None
    if like is not None and (base is None or base.gpu_target is None):
        raise TesselError(
            f"like: no GPU called {like!r}; {did_you_mean(like, [n for n, t in known.items() if t.gpu_target])}"
        )
    arch = data.get("arch", base.arch if base else None)
    if not isinstance(arch, str) or not re.fullmatch(r"sm_\d{2,3}a?|gfx[0-9a-f]{3,5}", arch):
        raise TesselError(f"arch: expected an architecture such as 'sm_90' or 'gfx942', got {arch!r}")
    return name, arch, base


def _numbers(data: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers of the file by their dotted names, and the calibration's by their own."""
    out: dict[str, float] = {}
    for key in ("units", "clock_hz", "link_bytes_per_s"):
        if data.get(key) is not None:
            out[key] = _number(key, data[key])
    groups = {"flops": _DTYPES, "limits": [f.name for f in fields(Limits)], "reached": (*_DTYPES, "memory")}
    for group, names in groups.items():
        for key, value in _group(data, group, names).items():
            out[f"{group}.{key}"] = _number(f"{group}.{key}", value)
    for level, entry in _object(data, "levels").items():
        if not isinstance(entry, dict):
            raise TesselError(f"levels.{level}: expected an object, got {entry!r}"[:200])
        _names(entry, _LEVEL_KEYS, f"levels.{level}: ")
        for key in ("capacity_bytes", "bandwidth_bytes_per_s"):
            if entry.get(key) is not None:
                out[f"levels.{level}.{key}"] = _number(f"levels.{level}.{key}", entry[key])
    constants = _group(data, "calibration", [f.name for f in fields(Calibration) if f.name != "sources"])
    return out, {n: _number(f"calibration.{n}", v) for n, v in constants.items()}


def _needed(arch: str) -> list[str]:
    """The numbers that the models cannot do without."""
    levels = [f"levels.{level}.capacity_bytes" for level in ("registers", "shared", "l2", "memory")]
    speeds = ["levels.shared.bandwidth_bytes_per_s", "levels.memory.bandwidth_bytes_per_s"]
    return [
        "units",
        "clock_hz",
        *levels,
        *speeds,
        "flops.f32",
        "flops.bf16",
        *(f"limits.{f.name}" for f in fields(Limits)),
    ]


def _levels(numbers: Mapping[str, float], data: Mapping[str, Any], base: Target | None) -> tuple[Level, ...]:
    """The levels, innermost first: in the order of the target it is like, new ones before memory."""
    names = [level.name for level in base.levels] if base else ["registers", "shared", "l2", "memory"]
    entries = _object(data, "levels")
    names[-1:-1] = [n for n in entries if n not in names]
    scopes = {level.name: level.scope for level in base.levels} if base else {}
    out = []
    for n in names:
        scope = entries.get(n, {}).get("scope", scopes.get(n, "unit" if n in ("registers", "shared") else "device"))
        if f"levels.{n}.capacity_bytes" not in numbers:
            raise TesselError(f"levels.{n}.capacity_bytes is missing")
        size = _whole(f"levels.{n}.capacity_bytes", numbers[f"levels.{n}.capacity_bytes"])
        out.append(Level(n, size, numbers.get(f"levels.{n}.bandwidth_bytes_per_s"), scope))
    return tuple(out)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TesselError(f"{key}: expected a number, got {value!r}"[:200])
    if not (0 < value < 1e30 and math.isfinite(value)):
        raise TesselError(f"{key} must be positive and finite, got {value}"[:200])
    return value


def _whole(key: str, value: float) -> int:
    if value != int(value):
        raise TesselError(f"{key}: expected a whole number, got {value}")
    return int(value)


def _object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    got = data.get(key, {})
    if not isinstance(got, dict):
        raise TesselError(f"{key}: expected an object, got {got!r}"[:200])
    return got


def _group(data: Mapping[str, Any], key: str, names: Sequence[str]) -> dict[str, Any]:
    got = _object(data, key)
    _names(got, names, f"{key}: ")
    return got


def _names(got: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for name in got:
        if name not in allowed:
            raise TesselError(f"{where}unknown name {name!r}; {did_you_mean(name, allowed)}"[:300])


def _texts(got: Any) -> tuple[str, ...]:
    if not isinstance(got, list) or not all(isinstance(t, str) and t.strip() for t in got):
        raise TesselError("device_names: expected a list of texts")
    return tuple(got)


def _texts_by_name(got: Any) -> dict[str, str]:
    if not isinstance(got, dict) or not all(isinstance(v, str) and v for v in got.values()):
        raise TesselError("sources: expected a text for each number")
    return got
