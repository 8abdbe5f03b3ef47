"""From a captured model to a sharding plan: the search, and everything that the plan file says.

    plan = make_plan(captured, Mesh({"dp": 8, "tp": 8}), "h100", Request(train=True))
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import prod
from typing import Any

import torch

from ..errors import TesselError, check, did_you_mean
from ..ir.sharding import Sharding
from ..passes.collectives import BUCKET, IN_FLIGHT, Overlap
from ..solve.comm import MeshAxis, axes_of
from ..solve.memory import optimizer_bytes
from ..solve.pipeline import APART, SCHEDULES
from ..solve.shard_choice import Pins, Setting, matches, role_of
from ..solve.shard_price import Pricer
from ..solve.shard_search import Answer, Search
from ..solve.shortage import shortage
from ..solve.transient import transient_bytes
from ..targets import Target, get_target
from ..targets.mesh import Mesh
from .annotate import Annotations
from .captured import Captured, Problem, problem_of
from .entries import Entries, entries_of, split_axes
from .pins import pins_of
from .pipeline import AXIS, microbatch_choices
from .pipeline_search import StageSearch, search_stages
from .pipeline_sections import sections_of
from .plan_file import VERSION, ShardingPlan
from .uneven import left_whole

__all__ = ["Request", "check_request", "make_plan", "make_staged_plan", "microbatches_for"]

_TRIES = 5  # times that what is transient is taken off the cap and the search repeated


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        train: price backward, gradients and optimizer too.
        memory: bytes a device may hold; the device's own by default.
        microbatches: parts of the batch that run one after another.
        gpus_per_node: ranks that share a node.
        schedule: of pipeline stages, ``auto`` for the best; see ``solve/pipeline.py``.
        pinned: parameter's name, ``*`` for any part, to the sharding it must have.
        annotations: what the user said of parameters, inputs and results of modules.
        runs: only what can be laid out and run as it is planned.
        zero: the level that every parameter has which can be kept apart (ZeRO's stages); the best by default.
        capacity: times the even share of tokens that a device may send to the experts of another one; without it tokens
            are not sent.
        bucket: the most bytes that one call of several collectives carries; 0 merges nothing.
        in_flight: the most bytes that calls take which begin before their results are read; 0 begins none early.
    """

    train: bool = False
    optimizer: str = "adamw"
    remat: str = "auto"
    memory: int | None = None
    microbatches: int = 1
    gpus_per_node: int | None = None
    roles: bool = True
    schedule: str = "auto"
    pinned: Mapping[str, Sharding] = field(default_factory=dict)
    annotations: Annotations = field(default_factory=Annotations)
    runs: bool = False
    zero: int | None = None
    capacity: float | None = None
    bucket: int = BUCKET
    in_flight: int = IN_FLIGHT


def check_request(mesh: Mesh, target: str, request: Request) -> tuple[Target, tuple[MeshAxis, ...], int]:
    """The device, the mesh's axes with their wires, and the bytes a device may hold.

    Raises:
        TesselError: something in the request is wrong, whatever the model.
    """
    record = get_target(target)
    optimizer_bytes(request.optimizer, 2)
    if request.schedule not in ("auto", *SCHEDULES):
        raise TesselError(f"unknown schedule {request.schedule!r}; {did_you_mean(request.schedule, SCHEDULES)}")
    limit = request.memory if request.memory is not None else record.level("memory").capacity_bytes
    check(limit > 0, lambda: f"memory: expected a positive number of bytes, got {limit}")
    share = request.capacity
    check(share is None or 0 < share < math.inf, lambda: f"capacity: expected a positive number, got {share}")
    Overlap(request.bucket, request.in_flight)  # refuses what is no number of bytes
    check(request.zero in (None, 0, 1, 2, 3), lambda: f"zero: expected a stage from 0 to 3, got {request.zero}")
    for pattern, sharding in request.pinned.items():
        for axis in sharding.axes:
            check(axis in mesh, lambda p=pattern, a=axis: f"annotation {p!r}: {a!r} is no axis of the mesh {mesh}")  # type: ignore[misc]
    return record, axes_of(mesh, record, request.gpus_per_node), limit


def make_plan(
    captured: Captured, mesh: Mesh, target: str, request: Request, progress: Callable[[str], None] | None = None
) -> ShardingPlan:
    """The best plan that fits.

    Raises:
        TesselError: nothing fits; the message says what needs how much. Or the request is wrong.
    """
    if AXIS in mesh:
        return make_staged_plan({request.microbatches: captured}, mesh, target, request, progress)
    started = time.perf_counter()
    record, axes, limit = check_request(mesh, target, request)
    pins = pins_of(request.annotations, captured.graph, mesh, captured.positions, captured.aliases)
    setting = _setting(request, request.microbatches, pins)
    problem = problem_of(captured, pins)
    _check_pinned(request.pinned, captured)
    pricer = Pricer(record, axes, setting)
    whole = left_whole(problem.kinds, axes, setting)
    answer, held = _search(problem, pricer, limit, progress)
    if not answer.fits:
        raise TesselError(shortage(answer, pricer, limit, mesh, held))
    entries = entries_of(answer, pricer, problem.chain, problem.shift, captured.held)
    entries.notes += whole
    sections = entries.sections(transient=held)
    return _document(captured, mesh, target, request, pricer, axes, limit, answer, entries, sections, started)


def microbatches_for(mesh: Mesh, batch: int | None, asked: int | None) -> list[int]:
    """Numbers of microbatches to compare: the one asked for, several where a pipeline may choose, else one."""
    if asked is not None or AXIS not in mesh:
        return [asked or 1]
    apart = prod(n for a, n in mesh.axes if role_of(a).only == "batch")
    return microbatch_choices(batch, mesh[AXIS], apart)


def make_staged_plan(
    captures: Mapping[int, Captured], mesh: Mesh, target: str, request: Request,
    progress: Callable[[str], None] | None = None,
) -> ShardingPlan:  # fmt: skip
    """The best plan that fits, of a mesh with an axis ``pp`` of stages.

    Args:
        captures: the model with the rows of one microbatch, by numbers of microbatches; the best is taken.

    Raises:
        TesselError: as ``make_plan``.
    """
    started = time.perf_counter()
    record, axes, limit = check_request(mesh, target, request)
    stages = next(a for a in axes if a.name == AXIS)
    inner = tuple(a for a in axes if a is not stages)
    for pattern, sharding in request.pinned.items():
        check(AXIS not in sharding.axes, lambda p=pattern: f"annotation {p!r}: {AXIS!r} splits layers, not tensors")  # type: ignore[misc]
    searches, problems = {}, {}
    for m, captured in captures.items():
        _check_pinned(request.pinned, captured)
        pins = pins_of(request.annotations, captured.graph, mesh, captured.positions, captured.aliases)
        problems[m] = problem_of(captured, pins)
        pricer = Pricer(record, inner, _setting(request, m, pins))
        searches[m] = StageSearch(problems[m].kinds, problems[m].order, pricer, stages, limit, request.schedule)
    m, staged = search_stages(searches, progress or (lambda _: None))
    captured, problem, answer = captures[m], problems[m], staged.merged()
    entries = entries_of(answer, staged.pricer, problem.chain, problem.shift, captured.held)
    entries.notes += left_whole(problem.kinds, inner, staged.pricer.setting)
    sections = sections_of(staged, entries)
    if any(u.node.op.random for s in problem.kinds for u in s.units):
        entries.notes.append("random operators draw for each microbatch: not what one device draws for the whole batch")
    if staged.way.schedule in APART:
        entries.notes.append(
            f"{staged.way.schedule}: gradients of parameters are {staged.weights:.0%} of the slowest stage's work and "
            "wait their turn; the gradients of results that they are made of are among the temporaries"
        )
    asked = replace(request, microbatches=m)
    return _document(captured, mesh, target, asked, staged.pricer, axes, limit, answer, entries, sections, started)


def _setting(request: Request, microbatches: int, pins: Pins) -> Setting:
    return Setting(
        request.train, request.optimizer, microbatches, request.remat if request.train else "none",
        levels=(0, 1, 2, 3) if request.zero is None else (request.zero,), roles=request.roles,
        pinned=tuple(request.pinned.items()), pins=pins, runs=request.runs, capacity=request.capacity,
        merged=request.bucket > 0, overlap=request.in_flight > 0,
    )  # fmt: skip


def _document(
    captured: Captured, mesh: Mesh, target: str, request: Request, pricer: Pricer, axes: Sequence[MeshAxis],
    limit: int, answer: Answer, entries: Entries, sections: Mapping[str, Any], started: float,
) -> ShardingPlan:  # fmt: skip
    """The plan file of an answer."""
    setting = pricer.setting
    seconds = {
        "capture": captured.seconds,
        "solve": answer.took,
        "all": captured.seconds + time.perf_counter() - started,
    }
    data: dict[str, Any] = {
        "format": "tessel-plan",
        "version": VERSION,
        "model": {
            "name": captured.name,
            "fingerprint": captured.fingerprint,
            "parameters": sum(prod(shape) for _, shape, _ in captured.parameters),
        },
        "mesh": {
            "axes": [{"name": a.name, "size": a.size, "wires": str(a)} for a in axes],
            "world": mesh.devices,
            "target": target,
            "gpus_per_node": request.gpus_per_node or min(mesh.devices, getattr(axes[-1].links, "node", mesh.devices)),
        },
        "settings": {
            "train": request.train,
            "optimizer": request.optimizer if request.train else None,
            "remat": setting.remat,
            "microbatches": request.microbatches,
            "global_batch": captured.global_batch,
            "seq": captured.seq,
            "memory_limit": limit,
            **({} if request.capacity is None else {"capacity": request.capacity}),
            **_calls(request, setting, limit - sections["memory"]["total"]),
            "batch_axes": split_axes(answer, pricer, "batch"),
            "sequence_axes": split_axes(answer, pricer, "sequence"),
        },
        **sections,
        "certificate": {
            "bound": answer.bound,
            "gap": answer.gap,
            "price": answer.price,
            "exact": answer.exact,
        },
        "provenance": {
            "tessel": version("tessel"),
            "torch": torch.__version__,
            "captured": f"{captured.held} of {captured.layers} layers" if captured.layers else "everything",
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "notes": [*captured.notes, *entries.notes],
        },
    }
    return ShardingPlan(data)


def _calls(request: Request, setting: Setting, left: float) -> dict[str, int]:
    """How collectives are called, in what memory the plan leaves: a call of several takes its size twice."""
    room = max(0, int(left))
    return {
        "bucket_bytes": min(request.bucket, room // 2) if setting.merged else 0,
        "in_flight_bytes": min(request.in_flight, room) if setting.overlap else 0,
    }


def _search(
    problem: Problem, pricer: Pricer, limit: int, progress: Callable[[str], None] | None
) -> tuple[Answer, dict[str, float]]:
    """The search under the cap, less what is transient in the answer: searched again until both fit.

    The bound of the first search holds for every plan: something transient takes no less than nothing.
    """
    searching = Search(problem.kinds, problem.order, pricer)
    took, bound, spared = 0.0, 0.0, 0.0
    held = {"temporaries": 0.0, "inputs": 0.0}
    for i in range(_TRIES):
        answer = searching.answer(limit - spared, progress)
        took += answer.took
        bound = answer.bound if i == 0 else bound
        held = transient_bytes(answer, pricer)
        if not answer.fits or answer.nbytes + sum(held.values()) <= limit:
            break
        spared = max(spared, sum(held.values())) * (1.0 if i < _TRIES - 2 else 1.1)
    else:
        raise TesselError("no plan was found whose temporaries fit; give more memory, or more microbatches")
    return replace(answer, took=took, bound=min(bound, answer.bound)), held


def _check_pinned(pinned: Mapping[str, Sharding], captured: Captured) -> None:
    for pattern, sharding in pinned.items():
        found = [(n, shape) for n, shape, _ in captured.parameters if matches(pattern, n)]
        if not found:
            names = ", ".join(n for n, _, _ in captured.parameters[:8])
            raise TesselError(f"annotation {pattern!r}: no parameter has that name; parameters are {names}, ...")
        for name, shape in found:
            if len(shape) != sharding.rank:
                raise TesselError(
                    f"annotation {pattern!r}: {sharding} has {sharding.rank} entries, one a dimension; {name} has "
                    f"{len(shape)}, its shape is {list(shape)}"
                )
