"""Proves that the programs of all ranks compute what one device computes, operation by operation.

The ranks' graphs are read side by side, in order, against the graph of whole tensors. Of every value of theirs it
is worked out of which whole tensor it is which share, or which term of a sum: for inputs that is said, for each
operation and each collective it is proved (``solve/lemma.py``) or the walk ends there, with the operation's line.
Nothing is taken over from what made the programs but the shardings of inputs and outputs.

    report = verify_program(program, seconds=60)
    report.faults      # ["add at model.py:12: reads %7 as {·,·|tp:sum}, ..."]
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ..errors import TesselError
from ..frontend.joint import Step
from ..ir.node import Graph, Value
from ..ir.sharding import Sharding
from ..ir.types import Loc
from ..ops.collective import COLLECTIVE, units
from ..passes.partition import Program
from ..targets.mesh import Mesh
from .annotate import Annotation, Annotations
from .plan_file import ShardingPlan
from .spmd import Spmd, lay_out
from .verify_exchanges import Exchanges
from .verify_moves import Moves
from .verify_report import Report
from .verify_shares import Fault, Held

__all__ = ["Report", "lay_out_planned", "verify_program", "verify_ranks"]


def lay_out_planned(plan: ShardingPlan, model: torch.nn.Module, step: Step) -> tuple[Spmd, str]:
    """The programs that a plan gives for a captured step of a model, and what has to be said of them.

    A plan of part of a model's layers holds no program: parameters and inputs lie as it says then, the rest follows.

    Raises:
        TesselError: the plan is for another model.
    """
    if "program" in plan.data:
        from .planned import lay_out_plan  # the planner with it

        return lay_out_plan(plan, step), ""
    where = Loc(f"the plan of {plan.data['model']['name']}")
    said = Annotations()
    for name, p in model.named_parameters():
        kept = plan.sharding(name)
        entry = plan.data["tensors"][name]
        if list(p.shape) != list(entry["shape"]):
            raise TesselError(f"{name} is {list(p.shape)} in the model and {list(entry['shape'])} in the plan")
        used = Sharding.parse(entry.get("use", entry["sharding"]))
        gathered = tuple(a for a in kept.axes if a not in used.axes)
        said.entries.append(Annotation("tensor", name, kept, gathered, 0, where))
    split = [tuple(plan.data["settings"][k]) for k in ("batch_axes", "sequence_axes")]
    inputs = [n.out for i, n in enumerate(step.forward.graph.inputs) if i in step.positions]
    for i, v in enumerate(inputs):
        known = split[:1] if v.dtype.is_floating_point else split  # tokens have a sequence, features other dimensions
        dims = (known + [()] * v.type.rank)[: v.type.rank]
        said.entries.append(Annotation("tensor", f"inputs[{i}]", Sharding(tuple(dims)), (), 0, where))
    note = "the plan holds no program: of it, what parameters and inputs are split by is taken"
    return lay_out(step, Mesh(plan.mesh), said), note


def verify_program(program: Program, *, seconds: float = 120.0) -> Report:
    """Prove the programs of all ranks.

    Args:
        program: of ``partition``.
        seconds: what remains then is not proved.
    """
    graphs = [program.rank(r, flat=False) for r in range(program.mesh.devices)]
    return verify_ranks(program, graphs, seconds=seconds)


def verify_ranks(program: Program, ranks: Sequence[Graph], *, seconds: float = 120.0) -> Report:
    """Prove these graphs, one a rank; of ``program`` the whole graph and the shardings at both ends count."""
    walk = _Walk(program, ranks, time.monotonic() + seconds)
    try:
        walk.inputs()
        walk.nodes()
        walk.outputs()
    except Fault as e:
        walk.report.faults.append(str(e))
    walk.report.lemmas = len(walk.known)
    return walk.report


class _Walk(Moves, Exchanges):
    """The ranks' graphs side by side, from the inputs to the outputs."""

    # ------------------------------------------------------------ both ends

    def inputs(self) -> None:
        for i, (node, sharding) in enumerate(zip(self.graph.inputs, self.program.inputs, strict=True)):
            for rank, graph in enumerate(self.ranks):
                got = graph.inputs[i].out
                if sharding is not None:
                    want = sharding.local_shape(node.out.shape, self.mesh)
                    if tuple(got.shape) != tuple(want):
                        raise Fault(
                            f"input {node.attrs['name']} of rank {rank} is {list(got.shape)}, its share as {sharding} "
                            f"is {list(want)}"
                        )
                self.held[got] = Held(node.out, sharding or Sharding(()))

    def outputs(self) -> None:
        for token in self.coming:
            raise Fault(f"{self.title(token.node)}: a call is begun, and nobody waits for it")
        if self.at < len(self.steps):
            node = self.steps[self.at]
            wanted = {v for n in self.steps[self.at :] for v in n.outs} & set(self.graph.results())
            if wanted:
                raise Fault(f"{self.title(node)}: no rank computes it, or what is left of the program")
        self.settle_free()
        for i, (out, sharding) in enumerate(zip(self.graph.outputs, self.program.outputs, strict=True)):
            if sharding is not None:
                self.leaves([g.outputs[i] for g in self.ranks], out, sharding, f"output {i}")
        for i, ((target, v), sharding) in enumerate(zip(self.graph.effects, self.program.effects, strict=True)):
            self.leaves([g.effects[i][1] for g in self.ranks], v, sharding, f"new {target.attrs['name']}")

    def leaves(self, got: Sequence[Value], want: Value, sharding: Sharding, what: str) -> None:
        for rank, v in enumerate(got):
            held = self.held.get(v)
            if held is None or held.value != want:
                is_ = "something else" if held is None else self.name(held.value)
                raise Fault(f"{what} of rank {rank} is {is_}, not {self.name(want)}")
            same = held.sharding == sharding or (
                held.number is not None and held.sharding.parts(self.mesh) == sharding.parts(self.mesh)
            )
            if not same:
                made = self.title(want.node)
                raise Fault(f"{made}: {what} leaves as {held.sharding}, it is to be {sharding}")

    # ------------------------------------------------------------ side by side

    def nodes(self) -> None:
        queues = [iter(g.nodes) for g in self.ranks]
        while True:
            step = [self.next(rank, q) for rank, q in enumerate(queues)]
            if all(n is None for n in step):
                return
            for rank, n in enumerate(step):
                first = step[0]
                if n is None or first is None or n.op.name != first.op.name:
                    a, b = (m.op.name if m else "nothing" for m in (first, n))
                    where = next(m for m in step if m is not None)
                    raise Fault(f"{self.title(where)}: rank 0 runs {a} where rank {rank} runs {b}: they would wait")
            nodes = [n for n in step if n is not None]
            if self.exchanged(nodes, queues):
                continue
            if nodes[0].op.name == "collective_start":
                self.begin(nodes)
                self.report.collectives += len(units(nodes[0]))
            elif nodes[0].op.name == "collective_wait":
                self.end(nodes)
            elif nodes[0].op.name in COLLECTIVE or self.is_share(nodes):
                self.move(nodes)
                self.report.collectives += nodes[0].op.name in COLLECTIVE
            else:
                self.operation(nodes)
                self.report.operations += 1
