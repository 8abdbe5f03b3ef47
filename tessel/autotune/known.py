"""What is known of a kernel on a target: a tile that was tuned or predicted, and whether it may be used here.

    hit = lookup(kernel, target)                       # None: tune it
    remember(kernel, target, knobs, predicted={"total": 3e-5})

A tile is legal or not by the caller's own check at every hit, whoever wrote it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

from ..errors import TesselError
from ..solve import tile
from ..targets import Target
from ..tiles.default import formula_values
from ..tiles.header import load_header
from ..tiles.kernel import Kernel
from .cache import Cache, Legal, default_cache
from .entry import Entry, Fact, Knob, Times
from .key import key_of, version_of

__all__ = ["Hit", "driver_version", "legal_tile", "lookup", "provenance", "remember", "solver_version"]

_DRIVER = Path("/proc/driver/nvidia/version")
_SOLVER = Path(__file__).parent.parent / "solve"


@dataclass(frozen=True)
class Hit:
    """An entry that was found, and what is different here from where its times come from (``driver: 550 -> 560``):
    its tile is legal, its measurement should be checked again, its prediction made again."""

    entry: Entry
    recheck: tuple[str, ...] = ()

    @property
    def knobs(self) -> Mapping[str, Knob]:
        return self.entry.knobs


def legal_tile(kernel: Kernel, target: Target, knobs: Mapping[str, Knob]) -> str | None:
    """Why a tile may not be used for a kernel, or None: by what its template declares and, for a GPU, by the rules
    of the machine that the solver knows.

    Knobs must be declared and have a declared value; shared memory, threads and registers must fit the target.
    """
    numbers = {n: v for n, v in knobs.items() if isinstance(v, int)}
    header = load_header(kernel.family)
    try:
        header.check_knobs(knobs)  # type: ignore[arg-type]
        if target.limits is None:
            return None
        warps, limits = numbers.get("num_warps", 1), target.limits
        if warps * limits.warp_size > limits.threads_per_block:
            return f"{warps} warps are more than {limits.threads_per_block} threads"
        shared = header.smem(target.arch, formula_values(kernel, numbers, target.vendor))
        if shared > limits.shared_bytes_per_block:
            return f"{shared} bytes of shared memory, {target.name} has {limits.shared_bytes_per_block} a block"
        if target.gpu_target is not None:
            tile(kernel, target, given=numbers)
    except TesselError as e:
        return str(e)
    return None


@cache
def driver_version() -> str:
    """NVIDIA's driver as the kernel module says it, ``"none"`` where there is none."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text())
    except OSError:
        return "none"
    return found[0] if found else "none"


@lru_cache(maxsize=64)
def solver_version(target: Target) -> str:
    """A digest of what predicts: the solver's text and coefficients and the target's record."""
    digest = hashlib.sha256(repr(target).encode())
    for path in sorted(_SOLVER.iterdir()):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def provenance(target: Target) -> dict[str, Fact]:
    """What of this machine's software makes a re-check: ``torch``, ``triton`` and ``driver`` with patch versions,
    and what makes a new prediction: ``solver``.

    Who measures adds ``clock_hz`` and ``tolerance``.
    """
    software: dict[str, Fact] = {name: version_of(name) for name in ("torch", "triton")}
    return {**software, "driver": driver_version(), "solver": solver_version(target)}


def lookup(
    kernel: Kernel,
    target: Target,
    *,
    legal: Legal | None = None,
    here: Mapping[str, Fact] | None = None,
    cache: Cache | None = None,
) -> Hit | None:
    """The tile that is known for a kernel on a target, or None. Never raises for what the cache holds.

    Args:
        legal: why knobs may not be used; :func:`legal_tile` if not given.
        here: this machine's provenance; fields that both sides know and that differ are named in ``Hit.recheck``.
        cache: the user's own if not given.
    """
    try:
        cache = default_cache() if cache is None else cache
    except TesselError:
        return None
    entry = cache.get(key_of(kernel, target), legal or partial(legal_tile, kernel, target))
    if entry is None:
        return None
    here = provenance(target) if here is None else here
    then = entry.provenance
    count = sorted(here.keys() & then.keys() & ({"torch", "triton", "driver"} if entry.measured else {"solver"}))
    return Hit(entry, tuple(f"{n}: {then[n]} -> {here[n]}" for n in count if then[n] != here[n]))


def remember(
    kernel: Kernel,
    target: Target,
    knobs: Mapping[str, Knob],
    *,
    predicted: Mapping[str, float] | None = None,
    measured: Mapping[str, Times] | None = None,
    here: Mapping[str, Fact] | None = None,
    cache: Cache | None = None,
) -> bool:
    """Keep a tile for a kernel on a target; whether it is on disk now.

    Args:
        predicted: seconds by term of the model, the whole under ``"total"``.
        measured: mode (``warm``, ``cold``) -> times; without, the entry is a prediction, which a measurement
            replaces and which never replaces one.
        here: this machine's provenance, completed by :func:`provenance`.
        cache: the user's own if not given.
    """
    cache = default_cache() if cache is None else cache
    facts = {**provenance(target), **(here or {})}
    return cache.put(Entry(key_of(kernel, target), knobs, predicted or {}, measured or {}, facts))
