"""Pipeline stages on this process: the parts that the mesh's axis ``pp`` gives it, run by torch's schedules.

    stages = tessel.distribute(model, plan, args=(ids,), loss=loss)       # a plan with stages, under torchrun
    out = stages.step(ids, target=labels)                                 # the results and gradients of one device

Each part is a module of its own (``sharding/distributed.py``), laid out over the other axes of the mesh. Between parts
every device hands its share of a tensor to the device that stands where it stands on the next stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from ..errors import TesselError, check
from ..frontend.joint import Output, tensors_of
from ..frontend.split import Part, capture_parts
from ..ir.sharding import Sharding
from ..passes._layouts import Seed
from ..runtime.collectives import ProcessGroups
from ..runtime.schedules import Message, run_schedule, stage_class
from ..runtime.shares import share
from ..solve.pipeline import SCHEDULES, bubble, stage_of
from ..targets.mesh import Mesh
from .annotate import Annotation, Annotations, annotations_of, seeds
from .distributed import Distributed, How, distribute
from .distributed import _groups as groups_of
from .distributed import _Step as Step
from .pipeline import AXIS
from .plan_file import ShardingPlan, fingerprint_of, read_plan
from .planner import parameters_of
from .spmd import Spmd, lay_out_prepared, prepared_step

__all__ = ["Pipeline", "Staged", "distribute_model", "distribute_stages", "lay_out_stages"]

Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Pipeline:
    """How a model is cut and run where no plan says it.

    Attributes:
        starts: modules at which parts begin, but the first: ``("layers.2",)`` makes two parts.
        microbatches: pieces of the batch; they divide it.
        schedule: "gpipe", "1f1b", "interleaved", "zb1p" or "zbv".
    """

    starts: Sequence[str]
    microbatches: int
    schedule: str = "1f1b"

    def part_of(self, names: Sequence[str]) -> dict[str, list[int]]:
        """The parts of each parameter, for the parameter of every use in order."""
        found: dict[str, list[int]] = {}
        part = 0
        starts = list(self.starts)
        for name in names:
            at = next((i for i, s in enumerate(starts) if name.startswith(s + ".") or f".{s}." in name), None)
            part = part if at is None else max(part, at + 1)
            own = found.setdefault(name, [])
            if part not in own:
                own.append(part)
        missing = [s for i, s in enumerate(starts) if i + 1 not in {p[0] for p in found.values()}]
        check(not missing, lambda: f"starts: no parameter is used first in {missing[0]!r}, or not in this order")
        return found


def plan_parts(plan: ShardingPlan) -> Callable[[Sequence[str]], dict[str, list[int]]]:
    """The parts of each parameter, as a plan says."""
    tensors = plan.data["tensors"]

    def part_of(names: Sequence[str]) -> dict[str, list[int]]:
        missing = [n for n in names if n not in tensors]
        check(not missing, lambda: f"the plan has no parameter {missing[0]!r}, which the model uses")
        return {n: list(tensors[n]["parts"]) for n in dict.fromkeys(names)}

    return part_of


# ---------------------------------------------------------------- layout


@dataclass(frozen=True)
class Laid:
    """A part on the mesh.

    Attributes:
        part: its graphs.
        spmd: its programs; the axis of stages splits nothing.
        handed: the layouts in which what the part before hands on arrives.
        results: those in which this part's own results leave; whole ones of the last part.
    """

    part: Part
    spmd: Spmd
    handed: tuple[Sharding, ...]
    results: tuple[Sharding, ...]

    def bytes_handed(self, mesh: Mesh) -> int:
        """Bytes of this part's results on one device."""
        values = self.spmd.step.forward.graph.outputs[: self.spmd.step.results]
        return sum(
            v.dtype.itemsize * torch.Size(s.local_shape(v.shape, mesh)).numel()
            for v, s in zip(values, self.results, strict=True)
        )


def lay_out_stages(
    parts: Sequence[Part], mesh: Mesh, annotations: Annotations, tensors: int,
    handed: Sequence[Sharding | None] = (),
) -> list[Laid]:  # fmt: skip
    """Lay parts out one after the other, each result as the next part takes it.

    Args:
        tensors: how many the caller gives.
        handed: how the single tensor between each part and the next lies; the smallest share by default.

    Raises:
        TesselError: an annotation fits no part, or something else than it says.
    """
    out: list[Laid] = []
    unused = {id(a): a for a in annotations.entries}
    wrong: dict[int, TesselError] = {}
    known: dict[str, tuple[Sharding, Sharding]] = {}  # parameter -> how it is used and kept, by the first of its parts
    for i, part in enumerate(parts):
        step = prepared_step(part.step)
        graph = step.forward.graph
        said: dict[Any, Seed] = {}
        for node in graph.inputs:
            name = str(node.attrs["name"])
            if node.attrs["role"] == "param" and name in known:
                used, kept = known[name]
                said[node.out] = Seed(node.out, used, f"{name}, as an earlier stage keeps it", 0, kept)
        for entry in annotations.entries:
            try:
                found = seeds(Annotations([entry]), graph, mesh, step.positions)
            except TesselError as e:
                wrong.setdefault(id(entry), e)
                continue
            unused.pop(id(entry), None)
            for seed in found:
                said.setdefault(seed.value, seed)
        before = out[-1].results if out else ()
        places = {at: n for n, at in step.positions.items()}
        for k, lies in enumerate(before):
            v = graph.inputs[places[tensors + k]].out
            free = Sharding(lies.dims, (), frozenset(range(lies.rank)))
            said[v] = Seed(v, free, f"what part {i - 1} hands on", 0, lies)
        last = i == len(parts) - 1
        wanted = handed[i] if i < len(handed) else None
        results = {0: wanted} if wanted is not None and step.results == 1 else {}
        spmd = lay_out_prepared(step, mesh, list(said.values()), whole_results=last, results=results)
        for node, sharding in zip(graph.inputs, spmd.forward.inputs, strict=True):
            if node.attrs["role"] == "param" and sharding is not None:
                known.setdefault(str(node.attrs["name"]), (spmd.forward.layouts.of[node.out], sharding))
        leaving = tuple(s for s in spmd.forward.outputs[: step.results] if s is not None)
        check(len(leaving) == step.results, lambda i=i: f"part {i} hands on a number that is no tensor: cut elsewhere")  # type: ignore[misc]
        out.append(Laid(part, spmd, tuple(before), leaving))
    if unused:
        raise wrong[next(iter(unused))]
    return out


def annotations_of_stages(plan: ShardingPlan, tensors: Sequence[torch.Tensor]) -> Annotations:
    """What a plan says of parameters, and of the batch, as annotations."""
    found = []
    for name, t in plan.data["tensors"].items():
        kept = Sharding.parse(t["sharding"])
        used = Sharding.parse(t.get("use", t["sharding"]))
        gather = tuple(a for a in kept.axes if a not in used.axes)
        found.append(Annotation("tensor", name, kept, gather))
    batch = tuple(plan.data["settings"].get("batch_axes", ()))
    if batch:
        for i, x in enumerate(tensors):
            if x.dim() and x.shape[0] == tensors[0].shape[0]:
                found.append(Annotation("tensor", f"inputs[{i}]", Sharding((batch, *([()] * (x.dim() - 1))))))
    return Annotations(found)


# ---------------------------------------------------------------- a rank's parts


_ABSENT = object()  # in the place of a tensor that another stage holds


class StageModule(Distributed):
    """One part of the model on this rank: it takes and gives shares, but whole arguments and whole last results.

    Calls take what the part before handed on and give a tuple of what is handed on. ``microbatches`` holds the caller's
    tensors that the part reads, by number, and ``at`` which of them the next call is for.
    """

    def __init__(self, model: torch.nn.Module, laid: Laid, by: ProcessGroups, run: How, last: bool) -> None:
        self.laid, self.last = laid, last
        self.held = {str(n.attrs["name"]) for n in laid.spmd.step.forward.graph.inputs if n.attrs["role"] != "input"}
        super().__init__(model, laid.spmd, by, run)
        self.microbatches: list[dict[int, torch.Tensor]] = []
        self.at = 0

    def _take_shards(self, model: torch.nn.Module, mesh: Mesh, rank: int) -> None:
        made: dict[int, Any] = {}
        with torch.no_grad():
            named = [getattr(model, f"named_{what}")(remove_duplicate=False) for what in ("parameters", "buffers")]
            for name, x in (pair for own in named for pair in own):
                check(not x.is_meta, lambda n=name: f"stages take a model with its tensors; {n} is on the meta device")  # type: ignore[misc]
                if name in self.held and made.get(id(x), _ABSENT) is _ABSENT:
                    self.shapes[name] = tuple(x.shape)
                    own = self._shard(name, x, mesh, rank)
                    made[id(x)] = torch.nn.Parameter(own, x.requires_grad) if isinstance(x, torch.nn.Parameter) else own
                else:
                    made.setdefault(id(x), _ABSENT)
        self.module = copy.deepcopy(model, memo=made)
        for module in self.module.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update((k, None) for k, x in tensors.items() if x is _ABSENT)

    def user_inputs(self) -> list[int]:
        """The caller's tensors that the part reads."""
        step = self.spmd.step
        handed = {self.tensors + k for k in range(len(self.laid.handed))}
        return sorted({n for n in step.positions.values() if n not in handed})

    @property
    def tensors(self) -> int:
        """How many tensors the caller gives; what is handed on counts from there."""
        own = sorted(self.spmd.step.positions.values())
        return own[-1] + 1 - len(self.laid.handed) if self.laid.handed else len(own)

    def forward(self, *handed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Results of one microbatch."""
        step, program = self.spmd.step, self.spmd.forward
        held: dict[str, torch.Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        held.update(self.module.named_buffers(remove_duplicate=False))
        first = self.tensors if handed else 10**9
        inputs: list[torch.Tensor] = []
        for i, (node, sharding) in enumerate(zip(program.graph.inputs, program.inputs, strict=True)):
            name, role = str(node.attrs["name"]), node.attrs["role"]
            if role == "constant":
                continue
            if name in held and role != "input":
                inputs.append(held[name])
                continue
            at = step.positions.get(i)
            check(at is not None, lambda n=name: f"input {n} of the graph is no argument of the model")  # type: ignore[misc]
            assert at is not None
            if at >= first:
                inputs.append(handed[at - first])
                continue
            x = self.microbatches[self.at][at]
            want = tuple(node.type.shape)
            check(
                tuple(x.shape) == want,
                lambda n=name, s=tuple(x.shape), w=want: (  # type: ignore[misc]
                    f"{n}: laid out for microbatches of shape {list(w)}, called with {list(s)}; distribute again"
                ),
            )
            inputs.append(x if sharding is None else share(x, sharding, self.spmd.mesh, self.by.rank).contiguous())
        if self._backward is None or not torch.is_grad_enabled():
            results = list(self._forward(inputs))[: step.results]
        else:
            results = list(Step.apply(self._forward, self._backward, step.results, step.differentiable, *inputs))
        if self.last:
            leaves = [results[x.number] for x in step.leaves if isinstance(x, Output)]
            return tuple(x.reshape(1) if x.dim() == 0 else x for x in leaves)
        return tuple(x.contiguous() for x in results)

    def result(self, leaves: Sequence[torch.Tensor], whole: bool) -> Any:
        """The model's own result from a tuple of what ``forward`` gives, or (``whole``) of what microbatches give."""
        given = iter(leaves)
        out = []
        for x in self.spmd.step.leaves:
            if not isinstance(x, Output):
                out.append(x)
                continue
            got = next(given)
            scalar = self.spmd.step.forward.graph.outputs[x.number].type.rank == 0  # type: ignore[union-attr]
            out.append((got.mean(0) if whole else got.reshape(())) if scalar else got)
        return pytree.tree_unflatten(out, self.spmd.step.tree)

    def example(self, shardings: Sequence[Sharding], values: Sequence[Any], grads: Sequence[bool]) -> tuple[Any, ...]:
        """Empty tensors as they travel, on the model's device."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        return tuple(
            torch.empty(s.local_shape(v.shape, self.spmd.mesh), dtype=v.dtype, device=device).requires_grad_(g)
            for s, v, g in zip(shardings, values, grads, strict=True)
        )


class _Groups(ProcessGroups):
    """Groups of a mesh with stages: what one stage draws is no other's business."""

    def check_random_state(self) -> None:
        """Checked once, before the stages are made."""

    def agree(self, programs: Sequence[Any]) -> None:
        """Checked once, of the programs of all stages."""


class Staged(torch.nn.Module):
    """The parts of a model that this rank holds; ``distribute`` makes it.

    Its parameters and buffers are those of the parts that this rank's stage holds, under the model's names behind
    ``parts.<i>.module.``.
    """

    def __init__(
        self, model: torch.nn.Module, laid: Sequence[Laid], mesh: Mesh, schedule: str, microbatches: int,
        batched: Sequence[bool], loss: Loss | None, run: How, seconds: float,
    ) -> None:  # fmt: skip
        super().__init__()
        stages = mesh[AXIS]
        self.laid, self.mesh, self.schedule = laid, mesh, schedule
        self.microbatches, self.batched = microbatches, batched
        self.by = _Groups(mesh, seconds)
        rows = [(f"part {i}", p.collectives()) for i, x in enumerate(laid) for p in x.spmd.programs()]
        ProcessGroups.agree(self.by, rows)
        if any(n.op.random for x in laid for n in x.spmd.forward.graph.nodes):
            ProcessGroups.check_random_state(self.by)
        self.by.prepare(sorted({(AXIS,), *(g for x in laid for g in groups_of(x.spmd))}))
        self.stage = mesh.coordinates(self.by.rank)[AXIS]
        own = [i for i in range(len(laid)) if stage_of(schedule, i, stages) == self.stage]
        self.parts = torch.nn.ModuleDict(
            {str(i): StageModule(model, laid[i], self.by, run, i == len(laid) - 1) for i in own}
        )
        self.loss = loss
        self.handed = Message()
        self._ties = self._tied()
        group, _ = self.by.group((AXIS,))
        trains = any(x.spmd.backward is not None for x in laid)
        cls = stage_class(self.handed)
        made = []
        for i in own:
            part = self.parts[str(i)]
            assert isinstance(part, StageModule)
            made.append(cls(part, i, len(laid), next(part.parameters()).device, group=group, **self._metas(i, part)))
        self._run = run_schedule(schedule, made, microbatches, self._loss if trains else None)

    def _metas(self, i: int, part: StageModule) -> dict[str, Any]:
        """Examples of what part ``i`` takes and gives."""
        step = self.laid[i].spmd.step
        inputs = {at: step.forward.graph.inputs[k].out for k, at in step.positions.items()}
        values = [inputs[part.tensors + k] for k in range(len(self.laid[i].handed))]
        before = self.laid[i - 1].spmd.step.differentiable if i else ()
        outs = step.forward.graph.outputs[: step.results]
        gives = range(step.results)
        return {
            "input_args": part.example(self.laid[i].handed, values, [k in before for k in range(len(values))]),
            "output_args": part.example(self.laid[i].results, outs, [k in step.differentiable for k in gives]),
        }

    def _loss(self, out: Any, target: Any) -> torch.Tensor:
        last = self.parts[str(len(self.laid) - 1)]
        assert isinstance(last, StageModule) and self.loss is not None
        return self.loss(last.result(out if isinstance(out, tuple) else (out,), False), target)

    # ------------------------------------------------------------ parameters of several stages

    def _tied(self) -> list[tuple[Any, int, list[torch.nn.Parameter]]]:
        """Groups of stages that keep a copy of a parameter, their size, and this rank's copies."""
        users: dict[str, list[int]] = {}
        for i, laid in enumerate(self.laid):
            for node in laid.spmd.step.forward.graph.inputs:
                if node.attrs["role"] == "param":
                    users.setdefault(str(node.attrs["name"]), []).append(i)
        out = []
        stages = self.mesh[AXIS]
        for name, parts in users.items():
            over = sorted({stage_of(self.schedule, i, stages) for i in parts})
            if len(parts) == 1:
                continue
            mine = [dict(self.parts[str(i)].module.named_parameters())[name] for i in parts if str(i) in self.parts]  # type: ignore[operator, union-attr]
            group = None
            for line in self.mesh.groups(AXIS):  # every rank makes every group, in the same order
                ranks = [line[s] for s in over]
                made = dist.new_group(ranks) if len(over) > 1 else None
                group = made if self.by.rank in ranks else group
            if mine:
                out.append((group, len(over), mine))
        return out

    def _tie(self) -> None:
        """Add up the gradients of every copy of a parameter."""
        for group, size, copies in self._ties:
            grads = [p.grad for p in copies if p.grad is not None]
            if not grads:
                continue
            total = grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)
            if size > 1:
                self.by.sent.add("all_reduce", total, size)
                dist.all_reduce(total, group=group)
            for p in copies:
                p.grad = total.clone() if p is not copies[0] else total

    # ------------------------------------------------------------ running

    def step(self, *args: Any, target: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """One step over the whole batch: forward, and with a loss backward of every microbatch.

        Every process gives the whole arguments. Gradients are those of the mean of the microbatches' losses.

        Returns:
            ``(results, losses)`` on the last stage's ranks: the model's results, of scalars the mean, and the loss of
            each microbatch, empty without one. On others None.

        Raises:
            TesselError: the batch has another size; a loss without a target.
        """
        given = tensors_of(args, kwargs)
        n = len(self.batched)
        check(len(given) == n, lambda: f"laid out for {n} tensors, called with {len(given)}")
        check(
            self.loss is None or target is not None,
            lambda: "step: the stages have a loss, which takes a target: step(inputs, target=...)",
        )
        for x, cut in zip(given, self.batched, strict=True):
            check(
                not cut or x.shape[0] % self.microbatches == 0,
                lambda x=x: f"a batch of {x.shape[0]} rows does not divide into {self.microbatches} microbatches",  # type: ignore[misc]
            )
        for part in self.parts.values():
            assert isinstance(part, StageModule)
            pieces = {
                n: given[n].chunk(self.microbatches) if self.batched[n] else [given[n]] * self.microbatches
                for n in part.user_inputs()
            }
            part.microbatches = [{n: own[i] for n, own in pieces.items()} for i in range(self.microbatches)]
        before = {id(p): p.grad for _, _, copies in self._ties for p in copies}
        for _, _, copies in self._ties:  # what is added up is this step's
            for p in copies:
                p.grad = None
        losses: list[torch.Tensor] = []
        out = self._run(target, losses)
        if self.loss is not None:
            self._tie()
            for _, _, copies in self._ties:
                for p in copies:
                    old = before[id(p)]
                    if old is not None:
                        p.grad = old if p.grad is None else old + p.grad
        name = str(len(self.laid) - 1)
        if name not in self.parts:
            return None
        last = self.parts[name]
        assert isinstance(last, StageModule)
        return last.result(out if isinstance(out, tuple) else (out,), True), losses

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stages have no call of their own.

        Raises:
            TesselError: always.
        """
        raise TesselError("a model with pipeline stages runs by .step(inputs, target=...): each call is a whole step")

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far, in collectives and to other stages."""
        return self.by.sent.total + self.handed.bytes


# ---------------------------------------------------------------- the door


def distribute_model(
    model: torch.nn.Module, plan: Any = None, *, mesh: Mesh | None = None, loss: Loss | None = None,
    pipeline: Pipeline | None = None, **asked: Any,
) -> Distributed | Staged:  # fmt: skip
    """``distribute`` (of ``sharding/distributed.py``) of plans and meshes without stages and with them.

    Args:
        mesh: with an axis ``pp`` if there are stages and no plan.
        loss: of stages that train: ``loss(result, target)`` of one microbatch.
        pipeline: where stages begin, if no plan says it.

    Raises:
        TesselError: as ``distribute`` and ``distribute_stages``.
    """
    if isinstance(plan, str | Path):
        plan = read_plan(plan)
    found = plan if isinstance(plan, ShardingPlan) and "pipeline" in plan.data else None
    if found is None and (plan is not None or mesh is None or AXIS not in mesh):
        check(
            loss is None and pipeline is None, lambda: "distribute: loss and pipeline are for a mesh with stages (pp)"
        )
        return distribute(model, plan, mesh=mesh, **asked)
    if found is not None:
        found.check_model(
            fingerprint_of(parameters_of(model)), dist.get_world_size() if dist.is_initialized() else None
        )
        mesh = Mesh(found.mesh)
    assert mesh is not None
    unknown = [k for k in ("weights", "init") if asked.pop(k, None) is not None]
    check(not unknown, lambda: f"distribute: {unknown[0]} is for meshes without stages; give a model with its tensors")
    train = asked.pop("train", None)
    trains = (
        bool(found.data["settings"]["train"]) if found is not None else loss is not None if train is None else train
    )
    return distribute_stages(
        model, found, mesh, asked.pop("args", ()), asked.pop("kwargs", None) or {}, pipeline=pipeline,
        annotations=asked.pop("annotations", None), train=trains, loss=loss, run=asked.pop("run", "compiled"), **asked,
    )  # fmt: skip


def distribute_stages(
    model: torch.nn.Module, plan: ShardingPlan | None, mesh: Mesh, args: Sequence[Any], kwargs: Mapping[str, Any], *,
    pipeline: Pipeline | None, annotations: Annotations | None, train: bool, loss: Loss | None, run: How,
    seconds: float = 300.0,
) -> Staged:  # fmt: skip
    """This process's stages of a model; see ``distribute``.

    Raises:
        TesselError: neither a plan nor a ``Pipeline`` says how to cut; the model cannot be cut there; what they say
            does not go together.
    """
    handed: list[Sharding | None] = []
    if plan is not None:
        p = plan.data["pipeline"]
        pipeline = Pipeline((), int(plan.data["settings"]["microbatches"]), p["schedule"])
        part_of: Any = plan_parts(plan)
        count = len(p["parts"])
        handed = [Sharding.parse(s["layout"]) if " " not in s["layout"] else None for s in p["sends"]]
    else:
        if pipeline is None:
            raise TesselError(
                f"mesh {mesh}: say where stages begin, as pipeline=Pipeline(('layers.2',), microbatches=4)"
            )
        part_of, count = pipeline.part_of, len(pipeline.starts) + 1
    stages, m = mesh[AXIS], pipeline.microbatches
    check(pipeline.schedule in SCHEDULES, lambda: f"unknown schedule {pipeline.schedule!r}: {', '.join(SCHEDULES)}")
    chunks, over = divmod(count, stages)
    check(chunks >= 1 and not over, lambda: f"{count} parts do not make {stages} stages of equally many")
    single = pipeline.schedule in ("gpipe", "1f1b", "zb1p")
    check(single == (chunks == 1), lambda: f"{pipeline.schedule} of {chunks} parts a stage: there is no such schedule")
    bubble(pipeline.schedule, stages, m, chunks)
    check(train == (loss is not None), lambda: "a pipeline trains with a loss: distribute(..., loss=fn), and only then")
    tensors = tensors_of(args, kwargs)
    check(bool(tensors), lambda: "distribute: give example arguments of the whole batch")
    rows = tensors[0].shape[0] if tensors[0].dim() else 0
    batched = [bool(x.dim()) and x.shape[0] == rows for x in tensors]
    check(rows > 0 and rows % m == 0, lambda: f"a batch of {rows} rows does not divide into {m} microbatches")
    small = iter([x[: rows // m] if cut else x for x, cut in zip(tensors, batched, strict=True)])
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
    leaves = [next(small) if isinstance(x, torch.Tensor) else x for x in leaves]
    micro_args, micro_kwargs = pytree.tree_unflatten(leaves, tree)
    parts = capture_parts(model, micro_args, micro_kwargs, part_of, train=train)
    if plan is not None and annotations is None:
        annotations = annotations_of_stages(plan, tensors_of(micro_args, micro_kwargs))
    said = annotations if annotations is not None else annotations_of(model)
    laid = lay_out_stages(parts, mesh, said, len(tensors), handed)
    return Staged(model, laid, mesh, pipeline.schedule, m, batched, loss, run, seconds)
