"""From an imported graph to a callable: verify, passes, kernels, host program; all of it recorded.

compile_graph(imported, info, session) -> callable(list of inputs) -> list of outputs
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .codegen.host import Called, Launch
from .config import Options
from .errors import TesselError, check, did_you_mean
from .frontend.capture import GraphInfo
from .frontend.importer import Imported
from .ir.node import Graph, Node
from .report import Call, Compilation, Pass, Report
from .runtime.library import called
from .runtime.program import Program, build
from .targets import TARGETS, Target, get_target, match_device

__all__ = ["Place", "Session", "compile_graph", "place_for", "resolve_target"]


@dataclass
class Session:
    """One compiled function: what was asked for, and the record of what was done.

    Attributes:
        target: a target's name, "auto" or "cuda".
        options: see ``Options``.
        report: filled by every compilation.
    """

    target: str = "auto"
    options: Options = field(default_factory=Options)
    report: Report = field(default_factory=Report)


@dataclass(frozen=True)
class Place:
    """Where a graph runs and how.

    Attributes:
        target: the record the kernels are made for.
        how: ``launch`` (Triton on a GPU), ``interpret`` (Triton's interpreter) or ``torch`` (operator by
            operator), and then ``why``.
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
            return Place(get_target("cpu"), "torch", _NO_CPP)
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
        return Place(get_target("cpu"), "torch", _NO_CPP)
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


_NO_CPP = "no kernel generator for the CPU yet: torch runs each operator"


def _gpu(device: str) -> Target:
    """The record of a GPU of this machine: by its name, else the closest architecture that is not newer."""
    found = match_device(torch.cuda.get_device_name(device))
    if found is not None:
        return found
    major, minor = torch.cuda.get_device_capability(device)
    known = [
        t for t in TARGETS.values() if t.arch.startswith("sm_") and int(t.arch[3:]) <= major * 10 + minor
    ]
    check(
        bool(known),
        lambda: (
            f"{device} is {torch.cuda.get_device_name(device)} (sm_{major}{minor}), older than any known target"
        ),
    )
    return max(known, key=lambda t: int(t.arch[3:]))


def compile_graph(imported: Imported, info: GraphInfo, session: Session) -> Callable[[list[Any]], list[Any]]:
    """Compile one graph; the result takes a list of inputs, which it empties, and returns a list.

    Raises:
        TesselError: the request cannot be met, or Tessel itself failed; the message says which graph,
            and what to do.
    """
    record = Compilation(imported.graph.name, info.kind, session.target, captured=len(imported.graph.nodes))
    started = time.perf_counter()
    stage = ["import"]
    try:
        program = _compile(imported, session, record, stage)
    except TesselError:
        raise
    except Exception as e:
        raise TesselError(
            f"internal error while compiling the {info.kind} graph {imported.graph.name} ({stage[0]}): "
            f"{type(e).__name__}: {e}. This is a fault of Tessel. Run the function without it for now "
            "(call the original), or leave out the part: options={'fusion': False} compiles without the "
            "fuse pass. To report it, add the output of TESSEL_DEBUG=3."
        ) from e
    record.seconds = time.perf_counter() - started
    session.report.compilations.append(record)
    return program.run


def _compile(imported: Imported, session: Session, record: Compilation, stage: list[str]) -> Program:
    options = session.options
    graph = imported.graph
    record.passes.append(Pass("import", 0.0, len(graph.nodes), graph))
    record.fallbacks = [Call(f.target, str(f.loc), f.reason) for f in imported.fallbacks]
    device = imported.device
    place = place_for(session.target, device)
    record.target = place.target.name
    stage[0] = "host program"

    def call(node: Node) -> Called | Launch:
        return called(node, options.attention, device)

    program = build(
        graph,
        call,
        {},
        options.source_dir(),
        constants=imported.constants,
        device=device,
        hints=imported.hints,
        about=_about(graph, record),
    )
    record.host, record.host_file = program.source.text, str(program.path)
    record.peak_bytes = program.buffers.peak_bytes
    return program


def _about(graph: Graph, record: Compilation) -> list[str]:
    return [
        f"The {record.kind} graph {graph.name}: {record.launches} kernel launches, target {record.target}."
    ]
