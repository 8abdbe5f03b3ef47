"""Where a graph runs: the target that was asked for, met with the device its tensors are on.

place_for("auto", "cpu").how     # "native": kernels in C++
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import TesselError, check, did_you_mean
from .targets import TARGETS, Target, get_target, match_device

__all__ = ["Place", "place_for", "resolve_target"]


@dataclass(frozen=True)
class Place:
    """Where a graph runs and how.

    Attributes:
        target: the record the kernels are made for.
        how: ``launch`` (Triton on a GPU), ``native`` (C++ on the CPU), ``interpret`` (Triton's interpreter)
            or ``torch`` (operator by operator), and then ``why``.
    """

    target: Target
    how: str
    why: str = ""


def resolve_target(name: object) -> str:
    """The name, if there is such a target.

    Raises:
        TesselError: unknown, with the nearest match.
    """
    if name in ("auto", "cuda"):
        return str(name)
    if not isinstance(name, str) or name not in TARGETS:
        raise TesselError(f"unknown target {name!r}; {did_you_mean(name, ['auto', 'cuda', *TARGETS])}")
    return name


def place_for(name: str, device: str) -> Place:
    """What target a graph on ``device`` is compiled for when the user asked for ``name``.

    Raises:
        TesselError: the target and the device are not of one kind; the message names both.
    """
    kind = device.split(":")[0]
    if name == "auto":
        if kind == "cuda":
            return Place(_gpu(device), "launch")
        if kind == "cpu":
            return Place(get_target("cpu"), "native")
        return Place(get_target("cpu"), "torch", f"no generated kernels for tensors on {device}")
    wanted = "cuda" if name == "cuda" or get_target(name).gpu_target else "cpu"
    check(
        kind == wanted,
        lambda: (
            f"compiled for target {name!r}, which takes tensors on {wanted}, but called with tensors on {device}. "
            f"Move the model and its inputs to {wanted}, or compile with target='auto'"
        ),
    )
    if name == "cpu":
        return Place(get_target("cpu"), "native")
    if name == "triton-interpret":
        return Place(get_target(name), "interpret")
    here = _gpu(device)
    check(
        name in ("cuda", here.name),
        lambda: (
            f"compiled for target {name!r}, but {device} is {torch.cuda.get_device_name(device)} (target "
            f"{here.name!r}). Compile with target='cuda' to run here"
        ),
    )
    return Place(here, "launch")


def _gpu(device: str) -> Target:
    """The record of a GPU of this machine: by its name, else the closest architecture that is not newer."""
    found = match_device(torch.cuda.get_device_name(device))
    if found is not None:
        return found
    major, minor = torch.cuda.get_device_capability(device)
    known = [t for t in TARGETS.values() if t.arch.startswith("sm_") and int(t.arch[3:]) <= major * 10 + minor]
    check(
        bool(known),
        lambda: f"{device} is {torch.cuda.get_device_name(device)} (sm_{major}{minor}), older than any known target",
    )
    return max(known, key=lambda t: int(t.arch[3:]))
