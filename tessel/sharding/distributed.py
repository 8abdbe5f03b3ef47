"""A model as one process of a mesh runs it: its shards of the parameters, its program, gradients included.

dist = tessel.distribute(model, mesh=tessel.Mesh({"dp": 2, "tp": 2}), args=(ids,))    # under torchrun
loss(dist(ids), labels).backward()                                                    # as on one device

Every process calls it with the whole inputs and gets the model's whole results; parameters, gradients and the
optimizer's state are shards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from ..driver import Session, compile_graph
from ..errors import TesselError, check
from ..frontend.capture import GraphInfo
from ..frontend.importer import Imported
from ..frontend.joint import Output, capture_step, tensors_of
from ..ir.interp import interpret
from ..ir.node import Graph
from ..ir.sharding import Sharding
from ..ops.collective import Communicator, communicating
from ..passes.partition import Program
from ..runtime.collectives import ProcessGroups
from ..runtime.shares import share
from ..targets.mesh import Mesh
from .annotate import Annotations, annotations_of, annotations_of_plan
from .plan_file import ShardingPlan
from .spmd import Spmd, lay_out

Run = Callable[[list[Any]], Sequence[Any]]
How = Literal["compiled", "interpreted"]


def distribute(
    model: torch.nn.Module,
    plan: Any = None,
    *,
    mesh: Mesh | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    annotations: Annotations | None = None,
    train: bool | None = None,
    run: How = "compiled",
) -> Distributed:
    """This process's part of a model, ready to train or to infer. Every process of the world has to call it.

    Args:
        model: with its parameters, the same on every process; they are read, not changed.
        plan: a plan file that was read, or a laid-out model (``Spmd``). Of a plan file, mesh, parameters and
            inputs are taken; what lies between follows by propagation.
        mesh: as many devices as there are processes; not with a plan.
        args, kwargs: example arguments; sizes are fixed to theirs.
        annotations: instead of what ``tessel.annotate`` was told about the model.
        train: with gradients; by default if the model is in training mode.
        run: "compiled" (kernels as ``tessel.compile`` makes them) or "interpreted" (each operator by its
            reference, slow, for checks).

    Raises:
        TesselError: torch.distributed is not initialised, the world is not the mesh, an annotation does not
            fit, or torch cannot capture the model as one graph.
    """
    if isinstance(plan, Spmd):
        return Distributed(model, plan, ProcessGroups(plan.mesh), run)
    if isinstance(plan, ShardingPlan):
        plan.check_model(world=dist.get_world_size() if dist.is_initialized() else None)
        mesh = Mesh(plan.mesh)
        ranks = [x.dim() for x in tensors_of(args, kwargs or {})]
        annotations = annotations_of_plan(plan, model, ranks)
    elif plan is not None:
        raise TesselError(
            f"distribute: a plan is a ShardingPlan (tessel.sharding.plan_file.read_plan) or an Spmd, not {plan!r}"
        )
    check(mesh is not None, lambda: "distribute: give a plan, or a mesh as mesh=tessel.Mesh({'dp': 2})")
    assert mesh is not None
    said = annotations if annotations is not None else annotations_of(model)
    step = capture_step(model, args, kwargs, train=model.training if train is None else train)
    spmd = lay_out(step, mesh, said)
    return Distributed(model, spmd, ProcessGroups(spmd.mesh), run)


class Distributed(torch.nn.Module):
    """One rank of a laid-out model; ``distribute`` makes it.

    Its parameters and buffers have the model's names and are this rank's shards, on the model's devices.
    Calls take the whole arguments, of the sizes of the example, and give the model's whole results.
    """

    def __init__(self, model: torch.nn.Module, spmd: Spmd, by: ProcessGroups, run: How) -> None:
        super().__init__()
        self.spmd, self.by = spmd, by
        rank, mesh = by.rank, spmd.mesh
        self.shardings: dict[str, Sharding] = spmd.inputs()
        self._take_shards(model, mesh, rank)
        forward, backward = spmd.forward, spmd.backward
        by.prepare(_groups(spmd))
        if any(n.op.random for n in forward.graph.nodes):
            by.check_random_state()
        self._forward = _runner(spmd.step.forward, forward, by, run, "inference" if backward is None else "forward")
        self._backward: Run | None = None
        if backward is not None and spmd.step.backward is not None:
            self._backward = _runner(spmd.step.backward, backward, by, run, "backward")

    def _take_shards(self, model: torch.nn.Module, mesh: Mesh, rank: int) -> None:
        """Parameters and buffers of this rank, under the model's names; shared ones stay shared."""
        made: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for name, p in model.named_parameters(remove_duplicate=False):
                if id(p) not in made:
                    made[id(p)] = torch.nn.Parameter(self._shard(name, p, mesh, rank), p.requires_grad)
            for name, b in model.named_buffers(remove_duplicate=False):
                if id(b) not in made:
                    made[id(b)] = self._shard(name, b, mesh, rank)
        # the same module tree, its tensors replaced: names, and what is shared, stay
        self.module = copy.deepcopy(model, memo=dict(made))

    def _shard(self, name: str, x: torch.Tensor, mesh: Mesh, rank: int) -> torch.Tensor:
        sharding = self.shardings.get(name)
        return (x if sharding is None else share(x, sharding, mesh, rank)).detach().clone()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result on these arguments."""
        given = tensors_of(args, kwargs)
        step, program = self.spmd.step, self.spmd.forward
        held = {**dict(self.module.named_parameters(remove_duplicate=False))}
        held.update(self.module.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
        inputs: list[torch.Tensor] = []
        for i, (node, sharding) in enumerate(zip(program.graph.inputs, program.inputs, strict=True)):
            name, role = str(node.attrs["name"]), node.attrs["role"]
            if role == "constant":
                continue
            if name in held and role != "input":
                inputs.append(held[name])
                continue
            check(i in step.positions, lambda n=name: f"input {n} of the graph is no argument of the model")  # type: ignore[misc]
            x = given[step.positions[i]]
            want = tuple(node.type.shape)
            check(
                tuple(x.shape) == want,
                lambda n=name, s=tuple(x.shape), w=want: (  # type: ignore[misc]
                    f"{n}: laid out for shape {list(w)}, called with {list(s)}; distribute again for other sizes"
                ),
            )
            inputs.append(x if sharding is None else share(x, sharding, self.spmd.mesh, self.by.rank).contiguous())
        if self._backward is None or not torch.is_grad_enabled():
            results = list(self._forward(list(inputs)))[: step.results]
        else:
            results = list(_Step.apply(self._forward, self._backward, step.results, step.differentiable, *inputs))
        leaves = [results[x.number] if isinstance(x, Output) else x for x in step.leaves]
        return pytree.tree_unflatten(leaves, step.tree)

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent in collectives so far."""
        return self.by.sent.total


class _Step(torch.autograd.Function):
    """A partitioned forward and its backward as one node of autograd."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, forward: Run, backward: Run, results: int, differentiable: tuple[int, ...], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        out = list(forward(list(inputs)))
        ctx.run, ctx.differentiable = backward, differentiable
        ctx.types = [(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else None for x in out[:results]]
        saved = out[results:]
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in saved]
        ctx.save_for_backward(*(x for x in saved if isinstance(x, torch.Tensor)))
        fixed = [x for i, x in enumerate(out[:results]) if i not in differentiable and isinstance(x, torch.Tensor)]
        ctx.mark_non_differentiable(*fixed)
        return tuple(out[:results])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if x is None else x for x in ctx.others]
        for i in ctx.differentiable:
            shape, dtype, device = ctx.types[i]
            given = grads[i]
            inputs.append(torch.zeros(shape, dtype=dtype, device=device) if given is None else given.contiguous())
        return (None, None, None, None, *ctx.run(inputs))


def _groups(spmd: Spmd) -> list[tuple[str, ...]]:
    """The sets of axes that collectives run over, in the same order on every rank."""
    return sorted({c.axes for c in spmd.collectives()})


def _runner(imported: Imported, program: Program, by: ProcessGroups, how: How, kind: str) -> Run:
    """What runs this rank's program; it takes a list without constants."""
    graph = program.rank(by.rank)
    constants: dict[str, torch.Tensor] = {}
    for node, sharding in zip(program.graph.inputs, program.inputs, strict=True):
        if node.attrs["role"] == "constant" and sharding is not None:
            name = str(node.attrs["name"])
            constants[name] = share(imported.constants[name], sharding, program.mesh, by.rank).contiguous()
    if how == "interpreted":
        return _with(by, _interpreted(graph, constants))
    local = Imported(graph, constants, imported.fallbacks, imported.hints, imported.device)
    return _with(by, compile_graph(local, GraphInfo(kind), Session()))


def _with(by: Communicator, run: Run) -> Run:
    def called(inputs: list[Any]) -> Sequence[Any]:
        with communicating(by):
            return run(inputs)

    return called


def _interpreted(graph: Graph, constants: Mapping[str, torch.Tensor]) -> Run:
    def run(inputs: list[Any]) -> Sequence[Any]:
        given = iter(inputs)
        names = ((str(n.attrs["name"]), n.attrs["role"]) for n in graph.inputs)
        values = [constants[name] if role == "constant" else next(given) for name, role in names]
        got = interpret(graph, values)
        held = dict(zip(graph.inputs, values, strict=True))
        for (node, _), new in zip(graph.effects, got[len(graph.outputs) :], strict=True):
            held[node].copy_(new)
        return got[: len(graph.outputs)]

    return run


__all__ = ["Distributed", "distribute"]
