"""A captured model laid out on a mesh: the partitioned forward and backward, and how every tensor is kept.

One program for all devices (SPMD): ``lay_out`` spreads the annotations, partitions both graphs and sees to it
that they fit together: what the forward saves arrives in the backward as it left, and each gradient has the
sharding of its parameter, so that what data parallelism adds up, or scatters, falls out of partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import TesselError, did_you_mean
from ..frontend.importer import Imported
from ..frontend.joint import Step
from ..ir.node import INPUT, Builder, Graph, Node, Value, make_input, map_values
from ..ir.sharding import Sharding
from ..ir.types import TensorType
from ..ops import OPS
from ..passes._draws import draw_apart
from ..passes._factors import Split
from ..passes._layouts import Layouts
from ..passes._reshard import Price
from ..passes._tokens import apart, splits_inside
from ..passes.collectives import Overlap, overlapped
from ..passes.partition import Collective, Program, partition
from ..passes.pipeline import BEFORE_SHARD, run_pipeline
from ..passes.shard import Seed, propagate
from ..targets.mesh import Mesh
from .annotate import Annotations, seeds


@dataclass(frozen=True)
class Spmd:
    """A model on a mesh.

    Attributes:
        step: as captured; the graphs of ``forward`` and ``backward`` have gone through ``BEFORE_SHARD``.
        mesh: the devices.
        forward, backward: the programs; no backward without gradients.
        microbatches: how often forward and backward run in a step.
        kept: parameters that lie otherwise between steps than ``forward`` takes them, their gradients with them.
        gather: brings ``kept`` to how it is used, once a step.
        reduce: finishes gradients that ``backward`` leaves as sums of microbatches, once a step.
    """

    step: Step
    mesh: Mesh
    forward: Program
    backward: Program | None
    microbatches: int = 1
    kept: Mapping[str, Sharding] = field(default_factory=dict)
    gather: Program | None = None
    reduce: Program | None = None

    def phases(self) -> list[tuple[str, Program, int]]:
        """The programs of a step in order, with a name and how often each runs."""
        own = [("gather", self.gather, 1), ("forward", self.forward, self.microbatches)]
        own += [("backward", self.backward, self.microbatches), ("reduce", self.reduce, 1)]
        return [(name, p, times) for name, p, times in own if p is not None]

    def collectives(self) -> list[Collective]:
        """Those of each program, in the order of a step."""
        return [c for p in self.programs() for c in p.collectives()]

    @property
    def bytes(self) -> int:
        """What one device sends in one step."""
        return sum(times * p.bytes for _, p, times in self.phases())

    @property
    def warnings(self) -> list[str]:
        """What no user would expect, each once: copies that are whole on every device, operators that are not split."""
        return list(dict.fromkeys(w for p in self.programs() for w in p.warnings))

    def explain(self, name: str) -> str:
        """Why a parameter, a buffer or an input lies as it does, and what is moved for it or where it is used.

        Args:
            name: as in ``inputs()``, or a module's: then what its lines move.

        Raises:
            TesselError: there is no such name; the nearest is given.
        """
        nodes = {str(n.attrs["name"]): n for n in self.forward.graph.inputs}
        modules = {n.loc.module for p in self.programs() for n in p.graph.nodes}
        if name not in nodes and name not in modules:
            raise TesselError(f"explain: nothing is called {name!r}; {did_you_mean(name, [*nodes, *modules])[:500]}")
        lines = []
        if name in nodes:
            v, layouts = nodes[name].out, self.forward.layouts
            lines.append(f"{name}: {v.type} lies as {layouts.arrives(v)}")
            if layouts.arrives(v) != layouts.of[v]:
                lines.append(f"  used as {layouts.of[v]}")
            for d, axes in enumerate(layouts.of[v].dims):
                for axis in axes:
                    lines.append(f"  dim {d} is split over {axis}:")
                    lines += [f"    {line}" for line in layouts.explain(v, d, axis)]
        inside = [
            (p, m) for p in self.programs() for m in p.moves() if name in (m.loc.module, m.value.node.attrs.get("name"))
        ]
        for program, move in inside:
            for s in move.steps:
                lines.append(f"  {program.graph.name}: {s.kind} over {', '.join(s.axes)}, {s.bytes} bytes: {move.why}")
        return "\n".join(lines) if lines else f"{name}: nothing is moved"

    def programs(self) -> tuple[Program, ...]:
        """The forward and, with gradients, the backward; with them what runs once a step before and after."""
        return tuple(p for _, p, _ in self.phases())

    def inputs(self) -> dict[str, Sharding]:
        """How every parameter, buffer and input of the model arrives, by name."""
        pairs = zip(self.forward.graph.inputs, self.forward.inputs, strict=True)
        return {str(n.attrs["name"]): s for n, s in pairs if s is not None} | dict(self.kept)


def prepared(imported: Imported) -> Graph:
    """The graph that is laid out: canonical, its composites opened, its draws apart from what they are used on.

    It has no copies that are made for the sake of strides: where those are is another matter on each device.
    """
    return draw_apart(run_pipeline(imported.graph, passes=BEFORE_SHARD).rewrite(_uncopied).live())


def _uncopied(builder: Builder, node: Node) -> Value | None:
    """What a copy is of, if that is computed here; copies of inputs keep what is returned apart from them."""
    root = node.operands[0] if node.op.name == "copy" else None
    while root is not None and root.op.kind == "view":
        root = root.node.operands[0]
    return None if root is None or root.op is INPUT else node.operands[0]


def lay_out(
    step: Step,
    mesh: Mesh,
    annotations: Annotations,
    *,
    whole_results: bool = True,
    splits: Mapping[Node, Split] | None = None,
    price: Price | None = None,
    ring: Collection[str] = (),
    overlap: Overlap | None = None,
) -> Spmd:
    """Lay a captured model out on a mesh.

    Args:
        step: from ``capture_step``.
        mesh: the devices.
        annotations: the user's.
        whole_results: every device returns the model's whole results, as one device would; else its share.
        splits: decided splits of nodes of the prepared graphs.
        price, ring: see ``partition``.
        overlap: how collectives are merged and begun early; one by one if not given.

    Raises:
        TesselError: an annotation fits nothing, or does not fit its tensor or the mesh.
    """
    step = prepared_step(step)
    said = seeds(annotations, step.forward.graph, mesh, step.positions)
    if splits is None and splits_inside(said, mesh):
        step = tokens_apart(step)
        said = seeds(annotations, step.forward.graph, mesh, step.positions)
    how: dict[str, Any] = {"splits": splits, "price": price, "ring": ring, "overlap": overlap}
    return lay_out_prepared(step, mesh, said, whole_results=whole_results, **how)


def prepared_step(step: Step) -> Step:
    """A step whose graphs are ready to be laid out."""
    step = replace(step, forward=replace(step.forward, graph=prepared(step.forward)))
    if step.backward is None:
        return step
    return _saved_in_full_rank(replace(step, backward=replace(step.backward, graph=prepared(step.backward))))


def tokens_apart(step: Step) -> Step:
    """A prepared step with batch and sequence apart in its linear layers."""
    forward = replace(step.forward, graph=apart(step.forward.graph))
    if step.backward is None:
        return replace(step, forward=forward)
    backward = replace(step.backward, graph=apart(step.backward.graph))
    return _saved_in_full_rank(replace(step, forward=forward, backward=backward))


def lay_out_prepared(
    step: Step,
    mesh: Mesh,
    said: Sequence[Seed],
    *,
    whole_results: bool = True,
    results: Mapping[int, Sharding] | None = None,
    splits: Mapping[Node, Split] | None = None,
    limits: Mapping[str, frozenset[str]] | None = None,
    held: Mapping[Value, Sharding] | None = None,
    price: Price | None = None,
    ring: Collection[str] = (),
    travels: Mapping[str, frozenset[str]] | None = None,
    capacity: float = math.inf,
    kept: Mapping[str, Sharding] | None = None,
    microbatches: int = 1,
    at_once: Collection[str] = (),
    overlap: Overlap | None = None,
) -> Spmd:
    """``lay_out`` of a step from ``prepared_step``, from what is known of its values.

    ``results`` says how results leave, by their number; ``limits`` are those of ``partition``, for the backward: its
    nodes carry the modules of the forward's. ``held`` are the forward's, for what it saves. ``price``, ``ring``,
    ``travels`` and ``capacity``: see ``partition``. ``kept`` are parameters that lie so between steps, with their
    gradients, and are brought to how they are used once a step. Of several microbatches only the gradients ``at_once``
    are finished in each; the others are sums until the last one is done. ``overlap``: see ``lay_out``.
    """
    graph = step.forward.graph
    layouts = propagate(graph, mesh, said)
    wanted = {}
    if whole_results:
        own = enumerate(graph.outputs[: step.results])
        wanted = {i: Sharding.replicated(o.type.rank) for i, o in own if _is_tensor(o)}
    wanted |= results or {}
    how: dict[str, Any] = {"splits": splits, "price": price, "ring": ring, "travels": travels, "capacity": capacity}
    forward = partition(graph, mesh, layouts, outputs=wanted, held=held, **how)
    if step.backward is None:
        return Spmd(step, mesh, _called(forward, overlap), None)
    back = step.backward.graph
    found = []
    arriving = [*forward.outputs[step.results :], *(forward.outputs[i] for i in step.differentiable)]
    saves = len(forward.outputs) - step.results
    takes = [n for n in back.inputs if n.attrs["role"] != "constant"]
    for i, (node, sharding) in enumerate(zip(takes, arriving, strict=True)):
        if sharding is None or not _is_tensor(node.out):
            continue
        name = node.attrs["name"]
        if i >= saves:
            # a gradient comes as its result left, and is used as the rest of the backward likes it
            anywhere = Sharding(((),) * node.out.type.rank, (), frozenset(range(node.out.type.rank)))
            found.append(Seed(node.out, anywhere, f"the gradient {name}", 1, sharding))
            continue
        saved = graph.outputs[step.results + i]
        used = forward.layouts.of[saved] if saved in forward.layouts.stored else sharding
        found.append(Seed(node.out, used, f"{name}, as the forward left it", 0, sharding))
    params = [n for n in graph.inputs if n.attrs["role"] != "constant"]
    kept = {str(n.attrs["name"]): s for n in params if (s := (kept or {}).get(str(n.attrs["name"]))) is not None}
    grads = {
        i: kept.get(str(n.attrs["name"]), forward.layouts.arrives(n.out))
        for i, n in enumerate(params)
        if i < len(back.outputs) and _is_tensor(back.outputs[i])
    }
    later = {i for i in grads if microbatches > 1 and params[i].attrs["name"] not in at_once}
    spread = propagate(back, mesh, found)
    backward = partition(back, mesh, spread, outputs=grads, unfinished=later, limits=limits, **how)
    arrive = {str(n.attrs["name"]): (n.out, s) for n, s in zip(graph.inputs, forward.inputs, strict=True)}
    gathers = [(name, arrive[name][0], lies, arrive[name][1]) for name, lies in kept.items()]
    sums = [(str(params[i].attrs["name"]), back.outputs[i], backward.outputs[i], grads[i]) for i in sorted(later)]
    more = {"gather": _moving("gather", mesh, gathers), "reduce": _moving("reduce", mesh, sums)}
    called = {what: _called(p, overlap) for what, p in more.items() if p is not None}
    handed = [i for i in grads if params[i].attrs["role"] == "input"]  # gradients that another stage may wait for
    backward = _called(backward, overlap, handed)
    return Spmd(step, mesh, _called(forward, overlap), backward, microbatches, kept, **called)


def _called(program: Program, overlap: Overlap | None, apart: Collection[int] = ()) -> Program:
    """A program with its collectives merged and begun early."""
    if overlap is None:
        return program
    actions = overlapped(program.graph, program.mesh, program.actions, program.inputs, overlap, apart)
    return replace(program, actions=actions)


def overlap_of(plan: Mapping[str, Any]) -> Overlap | None:
    """How a plan's programs call collectives; those of version 1 one by one."""
    asked = [plan["settings"].get(k) for k in ("bucket_bytes", "in_flight_bytes")]
    return None if None in asked else Overlap(*asked)


def _moving(what: str, mesh: Mesh, tensors: Sequence[tuple[str, Any, Any, Any]]) -> Program | None:
    """A program that brings tensors (name, value, as it lies, as it is to lie) from one sharding to another."""
    some = [(name, v, before, after) for name, v, before, after in tensors if before != after]
    if not some:
        return None
    nodes = [make_input(name, TensorType(v.shape, v.dtype, None, v.type.device), "param", v.node.loc)
             for name, v, _, _ in some]  # fmt: skip
    layouts = Layouts(mesh)
    for node, (_, _, before, after) in zip(nodes, some, strict=True):
        layouts.of[node.out], layouts.stored[node.out] = after, before
    graph = Builder(nodes).finish([n.out for n in nodes], (), what)
    return partition(graph, mesh, layouts, outputs={i: after for i, (_, _, _, after) in enumerate(some)})


def _saved_in_full_rank(step: Step) -> Step:
    """The step with saved tensors in the shape that has most dimensions, of those that are views of one another.

    Linear layers flatten batch and sequence. Saved like that, a tensor whose sequence is split could not be kept
    split; the backward takes it as it was before, and flattens it again.
    """
    assert step.backward is not None
    forward, back = step.forward.graph, step.backward.graph
    users = forward.users()
    outputs = list(forward.outputs)
    changed: dict[Node, Node] = {}
    turns: set[Node] = set()  # those that were saved turned
    for i, node in zip(range(step.results, len(outputs)), back.inputs, strict=False):
        v = outputs[i]
        if not _is_tensor(v):
            continue
        turned = v.op.name == "permute" and tuple(v.node.attrs["dims"]) == (1, 0)
        rows = v.node.args[0] if turned else v
        same = [rows, *(n.out for n in users.get(rows, ()) if n.op.name == "reshape")]
        if rows.op.name == "reshape":
            same.append(rows.node.args[0])
        best = max(same, key=lambda x: (x.type.rank, x is rows))
        if best != rows:
            outputs[i] = best
            t = TensorType(best.shape, best.dtype, None, node.out.type.device)
            changed[node] = make_input(node.attrs["name"], t, node.attrs["role"], node.loc)
            if turned:
                turns.add(node)
    if not changed:
        return step
    builder = Builder(changed.get(n, n) for n in back.inputs)
    new = {n.out: changed.get(n, n).out for n in back.inputs}
    for old, node in changed.items():
        shape = old.out.shape
        if old in turns:
            rows = builder.add(OPS["reshape"], node.out, shape=shape[::-1])
            new[old.out] = builder.add(OPS["permute"], rows, dims=(1, 0))
        else:
            new[old.out] = builder.add(OPS["reshape"], node.out, shape=shape)
    for old in back.nodes:
        node = builder.append(old.replace(args=map_values(old.args, new.__getitem__)))
        new.update(zip(old.outs, node.outs, strict=True))
    effects = tuple((n, new[v]) for n, v in back.effects)
    flat = builder.finish(map_values(back.outputs, new.__getitem__), effects, back.name)
    return replace(
        step,
        forward=replace(step.forward, graph=forward.replace(outputs=tuple(outputs)).live()),
        backward=replace(step.backward, graph=run_pipeline(flat, passes=BEFORE_SHARD[:1])),
    )


def _is_tensor(x: object) -> bool:
    return isinstance(x, Value) and isinstance(x.type, TensorType)


__all__ = ["Spmd", "lay_out", "lay_out_prepared", "overlap_of", "prepared", "prepared_step", "tokens_apart"]
