"""Plans of a model that is at hand: searched on the very graph that runs, with the program's collectives to the byte.

    plan = tessel.plan(model, (ids,), mesh=tessel.Mesh({"dp": 2, "tp": 2}), target="h100", train=True)
    spmd = lay_out_plan(plan, capture_step(model, (ids,), train=True))     # what ``tessel.distribute`` does

The split of every node comes from the plan; a graph that has other nodes, and a program that would send something
else than the plan says, are refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from ..errors import TesselError, check
from ..frontend.joint import Step, capture_step
from ..ir.node import Graph, Node, Value
from ..ir.sharding import Sharding
from ..ir.text import value_names
from ..ir.types import DTYPE_NAMES, TensorType
from ..ops.dims import Shape
from ..passes._factors import Split, through
from ..passes._layouts import Seed
from ..passes._rank import Move, Start
from ..solve.shard_choice import Split as Asked
from ..solve.shard_choice import role_of
from ..solve.units import VIEWS, Unit, Use, place_of, units_of, view_back
from ..targets.mesh import Mesh
from .annotate import Annotations, annotations_of
from .captured import Captured, aliases_of, parameters_of
from .microbatches import microbatch
from .pipeline import AXIS
from .plan_file import ShardingPlan
from .planner import Request, make_plan
from .remat import recomputed
from .spmd import Spmd, lay_out_prepared, overlap_of, prepared_step, tokens_apart

__all__ = ["lay_out_plan", "plan_model"]

_LONGEST_NOTE, _MOST_WARNINGS = 1000, 100  # of a plan file


def plan_model(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, mesh: Mesh, target: str,
    request: Request, annotations: Annotations | None = None, name: str = "",
    progress: Callable[[str], None] | None = None,
) -> ShardingPlan:  # fmt: skip
    """The best plan of a model that fits, with the program that ``tessel.distribute`` runs.

    Args:
        model: on any device; on ``meta`` it needs no memory.
        args, kwargs: of one step, for the whole mesh; sizes are fixed to theirs.
        request: what is asked; ``runs`` and ``annotations`` are set here.
        annotations: instead of what ``tessel.annotate`` was told about the model.
        progress: is told in words what is being done.

    Raises:
        TesselError: torch cannot capture the model as one graph, an annotation does not fit, or nothing fits.
    """
    started = time.perf_counter()
    k = request.microbatches
    check(k == 1 or request.train or AXIS in mesh, lambda: f"{k} microbatches are for training: their gradients add up")
    small, _ = microbatch(args, kwargs, k)
    step = _ready(capture_step(model, *small, train=request.train), mesh)
    graph = _results_only(step)
    first = next((n.type for n in graph.inputs if n.attrs["role"] == "input"), None)
    rows, inner = (first.shape[i] if first is not None and len(first.shape) > i else None for i in (0, 1))
    captured = Captured(
        name or type(model).__name__, graph, tuple(parameters_of(model)), 0, 0,
        rows * k if isinstance(rows, int) else None, inner if isinstance(inner, int) else None,
        time.perf_counter() - started, _notes(graph, k), aliases_of(model), step.positions,
    )  # fmt: skip
    said = annotations if annotations is not None else annotations_of(model)
    asked = replace(request, annotations=said, runs=True)
    made = make_plan(captured, mesh, target, asked, progress)
    if AXIS in mesh:  # stages are cut out of the model where they run
        return made
    data = dict(made.data)
    data["aliases"] = dict(captured.aliases)
    data["inputs"] = _inputs(graph, data["nodes"], mesh)
    spmd = _laid(ShardingPlan(data), step)
    data["program"] = _program(spmd)
    data["time"], late = _waited_for(spmd, data)
    told = [w[:_LONGEST_NOTE] for w in spmd.warnings[:_MOST_WARNINGS]]
    data["provenance"] = {**data["provenance"], "notes": [*data["provenance"]["notes"], *late, *told]}
    return ShardingPlan(data)


def _notes(graph: Graph, microbatches: int) -> tuple[str, ...]:
    if microbatches == 1 or not any(n.op.random for n in graph.nodes):
        return ()
    return ("random operators draw for each microbatch: not what one device draws for the whole batch",)


def _ready(step: Step, mesh: Mesh) -> Step:
    """A captured step as it is laid out: with tokens apart where an axis of the mesh is there to split sequences."""
    step = prepared_step(step)
    return tokens_apart(step) if any(role_of(a).only == "sequence" for a in mesh) else step


def _results_only(step: Step) -> Graph:
    """The forward graph without what it saves for the backward; its nodes are those of the step."""
    graph = step.forward.graph
    return graph.replace(outputs=graph.outputs[: step.results]).live()


def lay_out_plan(plan: ShardingPlan, step: Step) -> Spmd:
    """A captured step laid out as a plan says.

    Raises:
        TesselError: the plan has no program; the step has other nodes than the plan, or would send other bytes. The
            first difference is named.
    """
    program = plan.data.get("program")
    if program is None:
        notes = plan.data["provenance"]["notes"]
        why = next((n.partition(": ")[2] for n in notes if n.startswith("no program is held")), "")
        raise TesselError(
            f"the plan of {plan.data['model']['name']} holds no program: "
            f"{why or f'it was searched on {_captured(plan)} of the model'}; make one that runs by "
            "tessel.plan(model, args, ...) or `tessel plan --whole`"
        )
    trains = bool(plan.data["settings"]["train"])
    if trains != (step.backward is not None):
        raise TesselError(f"the plan is for {'training' if trains else 'inference'}, the model is run for the other")
    spmd = _laid(plan, _ready(step, Mesh(plan.mesh)))
    own = _program(spmd)
    for i, (said, found) in enumerate(zip(program["collectives"], own["collectives"])):
        told = ("phase", "kind", "axes", "bytes", "tensor", *(k for k in ("call", "beside") if k in said))
        keys = [k for k in told if said[k] != found[k]]
        if keys:
            raise TesselError(
                f"collective {i} of the plan is {_words(said)}, the program that its nodes give has {_words(found)}: "
                "the plan was changed by hand or made by another version; make it again"
            )
    a, b = len(program["collectives"]), len(own["collectives"])
    check(a == b, lambda: f"the plan has {a} collectives, the program that its nodes give {b}; make the plan again")
    return spmd


def _captured(plan: ShardingPlan) -> str:
    return str(plan.data["provenance"]["captured"])


def _words(c: Mapping[str, Any]) -> str:
    how = f", in call {c['call']} beside {c['beside']} operations" if "call" in c else ""
    return f"{c['kind']} over {', '.join(c['axes'])} of {c['tensor']}, {c['bytes']} bytes{how}, at {c['where']}"


def _laid(plan: ShardingPlan, step: Step) -> Spmd:
    graph, mesh = _results_only(step), Mesh(plan.mesh)
    units, _, _ = units_of(graph, value_names(graph))
    nodes = plan.data["nodes"]
    if len(nodes) != len(units):
        raise TesselError(f"the plan has {len(nodes)} nodes, the model's graph {len(units)}; make the plan again")
    splits: dict[Node, Split] = {}
    axes: dict[str, set[str]] = {}
    travels: dict[str, frozenset[str]] = {}
    held: dict[Value, Sharding] = {}
    said = _given(plan, graph)
    for node, unit in zip(nodes, units, strict=True):
        own = f"{unit.node.loc.module}:{unit.op}"
        name = node["name"].partition("#")[0]
        if name != own:
            raise TesselError(f"the plan's node is {node['name']} where the model's graph has {own}; make it again")
        splits[unit.node] = _split(node, unit, mesh)
        axes.setdefault(unit.node.loc.module, set()).update(node["splits"])
        travelling = frozenset(a for a in node["splits"] if _asked(node, unit, a).both)
        travels[unit.node.loc.module] = travels.get(unit.node.loc.module, frozenset()) | travelling
        for tensor, text, v in zip(unit.results, node["makes"], _tensors(unit.node), strict=True):
            layout = Sharding.parse(text.partition(" ")[0])
            if not layout.partial and " " not in text:
                said.append(Seed(v, layout, f"the plan's {node['name']}"))
                layout.check(tensor.type.shape, mesh, node["name"])
        for text, v in zip(node.get("holds", ()), _tensors(unit.node), strict=False):
            if text is not None and " " not in text:
                held[v] = Sharding.parse(text)
    limits = {module: frozenset(own) for module, own in axes.items() if module}
    for view in graph.nodes:  # what is saved may be a view of it
        if view.op.name in VIEWS and view.args[0] in held:
            lies = through(view, held[view.args[0]], mesh)
            if lies is not None:
                held[view.out] = lies
    step, copies = recomputed(step, units, [node["keep"] for node in nodes])
    splits.update((copy, splits[own]) for copy, own in copies.items() if own in splits)
    kept, at_once = _levels(plan, graph)
    settings = plan.data["settings"]
    return lay_out_prepared(
        step, mesh, said, splits=splits, limits=limits, held=held, travels=travels,
        capacity=settings.get("capacity", math.inf), kept=kept, microbatches=settings["microbatches"],
        at_once=at_once, overlap=overlap_of(plan.data),
    )  # fmt: skip


def _levels(plan: ShardingPlan, graph: Graph) -> tuple[dict[str, Sharding], list[str]]:
    """Parameters whose gradients and state are kept apart though they are used whole all step long (ZeRO's stages 1
    and 2), and those whose gradients are finished in each microbatch (2 and 3)."""
    kept, at_once = {}, []
    for node in graph.inputs:
        name = str(node.attrs["name"])
        known = (
            plan.data["tensors"].get(plan.data["aliases"].get(name, name)) if node.attrs["role"] == "param" else None
        )
        levels = set((known or {}).get("level", {}).values())
        if known is not None and "state" in known and levels & {1, 2}:
            kept[name] = Sharding.parse(known["state"])
        if levels and min(levels) >= 2:
            at_once.append(name)
    return kept, at_once


def _tensors(node: Node) -> list[Value]:
    return [v for v in node.outs if isinstance(v.type, TensorType)]


def _given(plan: ShardingPlan, graph: Graph) -> list[Seed]:
    """What a plan says of parameters and inputs."""
    found = []
    for node in graph.inputs:
        name, role, v = str(node.attrs["name"]), node.attrs["role"], node.out
        known = plan.data["tensors"].get(plan.data["aliases"].get(name, name))
        if role == "param" and known is not None:
            kept = Sharding.parse(known["sharding"])
            used = Sharding.parse(known.get("use", known["sharding"]))
            found.append(Seed(v, used, f"the plan's {name}", 0, None if kept == used else kept))
        elif role == "input" and name in plan.data["inputs"]:
            found.append(Seed(v, Sharding.parse(plan.data["inputs"][name]["sharding"]), f"the plan's {name}"))
    return found


def _split(node: Mapping[str, Any], unit: Unit, mesh: Mesh) -> Split:
    """The split of a node, from ``{"dp": "m", "tp": "m/8"}``: for each factor its axes, the outer parts first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for axis in mesh:
        for own in _asked(node, unit, axis).factors if axis in node["splits"] else ():
            found.setdefault(own.factor, []).append((own.major, axis))
    return {f: tuple(a for _, a in sorted(axes, key=lambda x: x[0])) for f, axes in found.items()}


def _asked(node: Mapping[str, Any], unit: Unit, axis: str) -> Asked:
    """What an axis splits of a node.

    Raises:
        TesselError: the node has no such factor.
    """
    text = node["splits"][axis]
    split = Asked.parse(text)
    if split is None or not all(s.factor in unit.dims.factors for s in split.factors):
        raise TesselError(f"{node['name']}: {axis} splits {text!r}; {unit.op} has '{unit.dims}'")
    return split


def _inputs(graph: Graph, nodes: Sequence[Mapping[str, Any]], mesh: Mesh) -> dict[str, Any]:
    """How the model's inputs lie: as the first unit that reads one wants it; whole where none does."""
    units, _, _ = units_of(graph, value_names(graph))
    lies: dict[str, Sharding] = {}
    for node, unit in zip(nodes, units, strict=True):
        for use, shape in zip(unit.uses, unit.dims.operands, strict=True):
            if use.source is None and use.name not in lies and use.roles:
                lies[use.name] = _read_as(_split(node, unit, mesh), unit, use, shape, mesh)
    found = {}
    for n in graph.inputs:
        name = str(n.attrs["name"])
        if n.attrs["role"] == "input" and isinstance(n.types[0], TensorType):
            sharding = str(lies.get(name, Sharding.replicated(n.type.rank)))
            found[name] = {"shape": list(n.type.shape), "dtype": DTYPE_NAMES[n.type.dtype], "sharding": sharding}
    return found


def _read_as(split: Split, unit: Unit, use: Use, shape: Shape, mesh: Mesh) -> Sharding:
    """How a unit reads an input of the model, before its views."""
    rank = use.views[0].args[0].type.rank if use.views else use.type.rank
    dims: list[list[str]] = [[] for _ in range(rank)]
    for factor, axes in split.items():
        at = place_of(shape, factor, unit.sizes)
        found = view_back(use.views, at, prod(mesh[a] for a in axes)) if at is not None else None
        if found is not None and not isinstance(found, bool) and found[1] == 1:
            dims[found[0]] += axes
    return Sharding(tuple(map(tuple, dims)))


def _program(spmd: Spmd) -> dict[str, Any]:
    """The collectives of the program, in order."""
    rows = [
        {
            "phase": phase,
            **({"times": spmd.microbatches} if spmd.microbatches > 1 and phase in ("forward", "backward") else {}),
            "kind": c.kind,
            "axes": list(c.axes),
            "bytes": c.bytes,
            "call": c.call,
            "beside": c.beside,
            "tensor": c.tensor,
            "where": c.loc.short[:1000],
            "why": c.why[:2000],
        }
        for phase, program, _ in spmd.phases()
        for c in program.collectives()
    ]
    return {"bytes": spmd.bytes, "collectives": rows}


def _waited_for(spmd: Spmd, data: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The times of a plan, where the search hid what its program waits for at once, and a note about it.

    The search takes it that work hides the collectives of parameters and their gradients. Of what it hid, the part
    (by bytes) that nothing is computed beside is exposed.
    """
    times, rows = dict(data["time"]), data["collectives"]
    of_parameters = [c for c in rows if c["phase"] in ("parameters", "gradients")]
    others = sum(c["seconds"] * c["times"] for c in rows if c not in of_parameters and c["kind"] != "permute")
    seconds = sum(c["seconds"] * c["times"] for c in of_parameters)
    hidden = max(0.0, seconds - max(0.0, times["exposed"] - others))
    sent, late = 0, 0
    for phase, program, repeats in spmd.phases():
        ends = {v for v in program.graph.outputs if phase in ("backward", "reduce") and isinstance(v, Value)}
        for action in program.actions:
            if isinstance(action, Move | Start):
                moves, beside = ((action,), 0) if isinstance(action, Move) else (action.moves, action.beside)
                own = (m for m in moves if m.value in ends or m.value.node.attrs.get("role") == "param")
                nbytes = repeats * sum(s.bytes for m in own for s in m.steps)
                sent, late = sent + nbytes, late + (0 if beside else nbytes)
    more = hidden * late / sent if sent else 0.0
    if more <= 0.0:
        return times, []
    times["exposed"] += more
    times["step"] += more
    note = (
        f"of the collectives of parameters {late / sent:.0%} of the bytes are waited for at once: exposed, not hidden"
    )
    return times, [note]
