"""A model as one process of a mesh runs it: its shards of the parameters, its program, gradients included.

dist = tessel.distribute(model, mesh=tessel.Mesh({"dp": 2, "tp": 2}), args=(ids,))    # under torchrun
loss(dist(ids), labels).backward()                                                    # as on one device

Every process calls it with the whole inputs and gets the model's whole results; parameters, gradients and the
optimizer's state are shards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..driver import Session, compile_graph
from ..errors import TesselError, check
from ..frontend.capture import GraphInfo
from ..frontend.compat import pytree
from ..frontend.importer import Imported
from ..frontend.joint import Output, capture_step, tensors_of
from ..ir.interp import interpret
from ..ir.node import Graph
from ..ir.sharding import Sharding
from ..ops.collective import communicating
from ..passes.collectives import Overlap
from ..passes.partition import Collective, Program
from ..runtime.collectives import ProcessGroups
from ..runtime.shares import share
from ..targets.mesh import Mesh
from .annotate import Annotations, annotations_of
from .captured import parameters_of
from .checkpoint import DTensors
from .materialize import Files, drawn, region
from .microbatches import microbatch
from .plan_file import ShardingPlan, read_plan
from .planned import lay_out_plan
from .spmd import Spmd, lay_out

Run = Callable[[list[Any]], Sequence[Any]]
Weights = str | Path | Mapping[str, torch.Tensor] | None
Init = Callable[[torch.nn.Module], Any] | None
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
    weights: Weights = None,
    init: Init = None,
    run: How = "compiled",
    seconds: float = 300.0,
    loss: Callable[..., torch.Tensor] | None = None,
) -> Distributed:
    """This process's part of a model, ready to train or to infer. Every process of the world has to call it.

    Args:
        model: with its parameters, the same on every process; they are read, not changed. Or on the meta device: then
            this rank's shards are made by ``weights`` or ``init``, and nothing is ever whole here.
        plan: what ``tessel.plan`` made, the name of a plan file, or a laid-out model (``Spmd``).
        mesh: as many devices as there are processes; not with a plan.
        args, kwargs: example arguments; sizes are fixed to theirs.
        annotations: instead of what ``tessel.annotate`` was told about the model.
        train: with gradients; by default if the model is in training mode.
        weights: of a model on the meta device: safetensors (a file, an index, a folder) that are read by slices, or
            tensors by name.
        init: of a model on the meta device, for what ``weights`` has not: called with it, it writes parameters and
            buffers in place, as it would on one device; the shards are drawn as parts of what it would draw there.
        run: "compiled" (kernels as ``tessel.compile`` makes them) or "interpreted" (each operator by its
            reference, slow, for checks).
        seconds: that a rank waits for the others in one collective before it gives up.
        loss: of a plan with microbatches: ``loss(result, target)`` of one of them; such a model runs by ``.step``.

    Raises:
        TesselError: torch.distributed is not initialised, the world is not the mesh, an annotation does not
            fit, or torch cannot capture the model as one graph.
    """
    if isinstance(plan, Spmd):
        return Distributed(model, plan, ProcessGroups(plan.mesh, seconds), run, weights, init)
    if isinstance(plan, str | Path):
        plan = read_plan(plan)
    if isinstance(plan, ShardingPlan):
        plan.check_model(parameters_of(model), dist.get_world_size() if dist.is_initialized() else None)
        small, cut = microbatch(args, kwargs, plan.data["settings"]["microbatches"])
        spmd = lay_out_plan(plan, capture_step(model, *small, train=bool(plan.data["settings"]["train"])))
        by = ProcessGroups(spmd.mesh, seconds)
        if spmd.microbatches > 1:
            from .accumulate import Accumulating  # which is a Distributed

            return Accumulating(model, spmd, by, run, weights, init, cut=cut, loss=loss)
        check(loss is None, lambda: "distribute: a loss is for plans with microbatches, and for stages")
        return Distributed(model, spmd, by, run, weights, init)
    if plan is not None:
        raise TesselError(
            f"distribute: a plan is what tessel.plan gives, the name of a plan file, or an Spmd, not {plan!r}"
        )
    check(mesh is not None, lambda: "distribute: give a plan, or a mesh as mesh=tessel.Mesh({'dp': 2})")
    assert mesh is not None
    said = annotations if annotations is not None else annotations_of(model)
    step = capture_step(model, args, kwargs, train=model.training if train is None else train)
    spmd = lay_out(step, mesh, said, overlap=Overlap())
    return Distributed(model, spmd, ProcessGroups(spmd.mesh, seconds), run, weights, init)


class Distributed(torch.nn.Module):
    """One rank of a laid-out model; ``distribute`` makes it.

    Its parameters and buffers have the model's names and are this rank's shards, on the model's devices.
    Calls take the whole arguments, of the sizes of the example, and give the model's whole results.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spmd: Spmd,
        by: ProcessGroups,
        run: How,
        weights: Weights = None,
        init: Init = None,
    ) -> None:
        super().__init__()
        self.spmd, self.by = spmd, by
        rank, mesh = by.rank, spmd.mesh
        self.shardings: dict[str, Sharding] = spmd.inputs()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tell()
        self._source = (weights, init)
        self._take_shards(model, mesh, rank)
        held = next((x.device for x in (*self.module.parameters(), *self.module.buffers())), torch.device("cpu"))
        self._dtensors = DTensors(mesh, rank, held.type)
        forward, backward = spmd.forward, spmd.backward
        by.agree([(what, p.collectives()) for what, p, _ in spmd.phases()])  # or a rank would wait in a group alone
        by.prepare(_groups(spmd))
        if any(n.op.random for n in forward.graph.nodes):
            by.check_random_state()
        self._plain = rank_runner(spmd.step.forward, forward, by, run, "inference" if backward is None else "forward")
        self._gather = None if spmd.gather is None else rank_runner(spmd.step.forward, spmd.gather, by, run, "gather")
        self._forward: Run = lambda inputs: self._plain(self._whole(inputs))
        self._backward: Run | None = None
        if backward is not None and spmd.step.backward is not None:
            self._backward = self._run_backward(spmd.step.backward, backward, run)

    def _tell(self) -> None:
        """Say once, on one rank, what no user would expect of the programs."""
        if self.by.rank == 0:
            tell(self.spmd.warnings)

    def _run_backward(self, imported: Imported, program: Program, run: How) -> Run:
        """What runs this rank's backward."""
        return rank_runner(imported, program, self.by, run, "backward")

    def _take_shards(self, model: torch.nn.Module, mesh: Mesh, rank: int) -> None:
        """Parameters and buffers of this rank, under the model's names; shared ones stay shared."""
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names: dict[int, list[str]] = {}
        for name, x in tensors:
            names.setdefault(id(x), []).append(name)
            self.shapes[name] = tuple(x.shape)
        for own in names.values():
            known = next((self.shardings[n] for n in own if n in self.shardings), None)
            if known is not None:
                self.shardings.update(dict.fromkeys(own, known))
        missing = {own[0]: own for own in names.values() if dict(tensors)[own[0]].is_meta}
        parts = _made(model, missing, self.shardings, mesh, rank, *self._source)
        made: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for name, x in tensors:
                if id(x) in made:
                    continue
                part = parts[name] if name in parts else self._shard(name, x, mesh, rank)
                made[id(x)] = torch.nn.Parameter(part, x.requires_grad) if isinstance(x, torch.nn.Parameter) else part
        # the same module tree, its tensors replaced: names, and what is shared, stay
        self.module = copy.deepcopy(model, memo=dict(made))

    def _shard(self, name: str, x: torch.Tensor, mesh: Mesh, rank: int) -> torch.Tensor:
        sharding = self.shardings.get(name)
        return (x if sharding is None else share(x, sharding, mesh, rank)).detach().clone()

    # ------------------------------------------------------------ state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's state under its own names, shards as DTensors that share memory with the parameters."""
        own = self.module.state_dict(*args, **kwargs)
        return {
            n: self._dtensors.of(x, self._lies(n, x), self.shapes[n]) if n in self.shapes else x for n, x in own.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Write a state into the shards: DTensors of any layout or whole tensors.

        Raises:
            TesselError: a name is missing or unknown (if ``strict``), a shape is another, or ``assign`` is asked for.
        """
        check(not assign, lambda: "load_state_dict: assign=True would put tensors in the place of shards; copy instead")
        own = self.module.state_dict()
        unknown, missing = [n for n in state_dict if n not in own], [n for n in own if n not in state_dict]
        if strict and (unknown or missing):
            lists = (", ".join(names[:5]) or "nothing" for names in (missing, unknown))
            raise TesselError("load_state_dict: missing {}; unknown {}".format(*lists))
        for name, x in own.items():
            if name in state_dict:
                self._dtensors.into(x, state_dict[name], self._lies(name, x), name, self.shapes[name])
        return torch.nn.modules.module._IncompatibleKeys(missing, unknown)

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of an optimizer over these parameters by their names, shards as DTensors."""
        return self._dtensors.optimizer_state(
            optimizer, dict(self.module.named_parameters()), self.shardings, self.shapes
        )

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Write the state that ``optimizer_state_dict`` gave, under this plan or another, into an optimizer."""
        named = dict(self.module.named_parameters())
        self._dtensors.load_optimizer_state(optimizer, state, named, self.shardings, self.shapes)

    def _lies(self, name: str, x: torch.Tensor) -> Sharding:
        return self.shardings.get(name, Sharding.replicated(x.dim()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result on these arguments."""
        step, results = self.spmd.step, self._results(self._arguments(tensors_of(args, kwargs)))
        leaves = [results[x.number] if isinstance(x, Output) else x for x in step.leaves]
        return pytree.tree_unflatten(leaves, step.tree)

    def _results(self, inputs: list[torch.Tensor]) -> list[Any]:
        """What the forward gives for its inputs; autograd knows it by the backward."""
        step = self.spmd.step
        if self._backward is None or not torch.is_grad_enabled():
            return list(self._forward(list(inputs)))[: step.results]
        return list(_Step.apply(self._forward, self._backward, step.results, step.differentiable, *inputs))

    def _arguments(
        self, given: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        known: Sequence[torch.Tensor] | None = None, handed: Mapping[int, torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """What the forward takes: parameters and buffers (``known`` ones at their places), shares of the caller's.

        Args:
            given: the caller's tensors by number.
            handed: those that are this rank's shares already.
        """
        step, program = self.spmd.step, self.spmd.forward
        held: dict[str, torch.Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        held.update(self.module.named_buffers(remove_duplicate=False))
        inputs: list[torch.Tensor] = []
        for i, (node, sharding) in enumerate(zip(program.graph.inputs, program.inputs, strict=True)):
            name, role = str(node.attrs["name"]), node.attrs["role"]
            if role == "constant":
                continue
            if name in held and role != "input":
                inputs.append(held[name] if known is None else known[len(inputs)])
                continue
            check(i in step.positions, lambda n=name: f"input {n} of the graph is no argument of the model")  # type: ignore[misc]
            at = step.positions[i]
            if handed and at in handed:
                inputs.append(handed[at])
                continue
            x, want = given[at], node.type
            check(
                tuple(x.shape) == tuple(want.shape) and x.dtype == want.dtype,
                lambda n=name, x=x, w=want: (  # type: ignore[misc]
                    f"{n}: laid out for shape {list(w.shape)} of {w.dtype}, called with {list(x.shape)} of {x.dtype}; "
                    "distribute again for others"
                ),
            )
            inputs.append(x if sharding is None else share(x, sharding, self.spmd.mesh, self.by.rank).contiguous())
        return inputs

    def _whole(self, inputs: list[Any]) -> list[Any]:
        """What the forward takes, with parameters that are kept apart between steps as it uses them."""
        program = self.spmd.gather
        if self._gather is None or program is None:
            return inputs
        names = [str(n.attrs["name"]) for n in self.spmd.forward.graph.inputs if n.attrs["role"] != "constant"]
        at = [names.index(str(n.attrs["name"])) for n in program.graph.inputs]
        out = list(inputs)
        for i, x in zip(at, self._gather([inputs[i] for i in at]), strict=True):
            out[i] = x
        return out

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent in collectives so far."""
        return self.by.sent.total

    @property
    def planned(self) -> int:
        """Bytes that this rank sends in a step by its programs."""
        return self.spmd.bytes


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


def _made(
    model: torch.nn.Module, missing: Mapping[str, Sequence[str]], shardings: Mapping[str, Sharding], mesh: Mesh,
    rank: int, weights: Weights, init: Init,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """This rank's part of tensors on the meta device: name to all its names, from weights, else drawn."""
    found: dict[str, torch.Tensor] = {}
    if not missing:
        check(weights is None and init is None, lambda: "weights and init are for a model on the meta device")
        return found
    files = Files(weights) if isinstance(weights, str | Path) else None
    given: Mapping[str, torch.Tensor] = weights if isinstance(weights, Mapping) else {}
    whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, names in missing.items():
        place = region(whole[name].shape, shardings.get(name), mesh, rank)
        known = next((n for n in names if n in (files.files if files is not None else given)), None)
        if known is None:
            continue
        if files is not None:
            found[name] = files.part(known, whole[name], place)
            continue
        if given[known].shape != whole[name].shape:
            raise TesselError(f"weights: {name} is {list(given[known].shape)}, in the model {list(whole[name].shape)}")
        found[name] = given[known][place].to(whole[name].dtype, copy=True)
    left = [n for n in missing if n not in found]
    if left and init is None:
        raise TesselError(f"{', '.join(left[:5])}: on the meta device, and no weights hold them; give weights or init")
    if left and init is not None:
        drawing = drawn(model, init, left)
        found |= {n: x for n, x in drawing.shards(shardings, mesh, rank).items() if n in left}
    return found


def _groups(spmd: Spmd) -> list[tuple[str, ...]]:
    """The sets of axes that collectives run over, in the same order on every rank."""
    return sorted({c.axes for c in spmd.collectives()})


def tell(lines: Iterable[str]) -> None:
    """What no user would expect of a program, as warnings."""
    for line in lines:
        warnings.warn(f"tessel: {line}", stacklevel=2)


def rank_runner(
    imported: Imported, program: Program, by: ProcessGroups, how: How, kind: str, graph: Graph | None = None,
    rows: Sequence[Collective] | None = None,
) -> Run:  # fmt: skip
    """What runs this rank's program, or a piece of it; it takes a list without constants.

    Args:
        graph, rows: the piece and its collectives; all of the program by default.
    """
    device = "cpu" if imported.device == "meta" else imported.device  # where shards of such a model are made
    places: dict[str, int] = {}
    if graph is None and how == "compiled" and device == "cpu":
        graph, places = program.shared(by.rank)  # one build for all ranks; a GPU's kernels are fast by their constants
    graph = program.rank(by.rank) if graph is None else graph
    rows = program.collectives() if rows is None else rows
    constants: dict[str, torch.Tensor] = {}
    taken = {str(n.attrs["name"]) for n in graph.inputs}
    for node, sharding in zip(program.graph.inputs, program.inputs, strict=True):
        name = str(node.attrs["name"])
        if node.attrs["role"] == "constant" and sharding is not None and name in taken:
            constants[name] = share(imported.constants[name], sharding, program.mesh, by.rank).contiguous()
    if how == "interpreted":
        return _with(by, rows, kind, _interpreted(graph, constants))
    local = Imported(graph, constants, imported.fallbacks, {**imported.hints, **places}, device)
    run = compile_graph(local, GraphInfo(kind), Session())

    def here(inputs: list[Any]) -> Sequence[Any]:
        inputs.extend(places.values())
        return run(inputs)

    return _with(by, rows, kind, here)


def _with(by: ProcessGroups, rows: Sequence[Collective], kind: str, run: Run) -> Run:
    def called(inputs: list[Any]) -> Sequence[Any]:
        with communicating(by), by.running(kind, rows):
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
