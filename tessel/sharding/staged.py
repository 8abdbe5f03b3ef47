"""Pipeline stages on this process: the parts that the mesh's axis ``pp`` gives it, run by torch's schedules.

    stages = tessel.distribute(model, plan, args=(ids,), loss=loss)       # a plan with stages, under torchrun
    out = stages.step(ids, target=labels)                                 # the results and gradients of one device

Each part is a module of its own (``sharding/distributed.py``), laid out over the other axes of the mesh. Between parts
every device hands its share of a tensor to the device that stands where it stands on the next stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import TesselError, check
from ..frontend.joint import tensors_of
from ..ops.collective import payload
from ..runtime.collectives import ProcessGroups
from ..runtime.schedules import Message, run_schedule, stage_class
from ..solve.pipeline import APART, stage_of
from ..targets.mesh import Mesh
from .annotate import Annotations
from .captured import parameters_of
from .distributed import Distributed, How, distribute, tell
from .distributed import _groups as groups_of
from .parts import CutModel, Pipeline, cut_model
from .pipeline import AXIS
from .plan_file import ShardingPlan, read_plan
from .stage_module import StageModule

__all__ = ["Pipeline", "Staged", "distribute_model"]

Loss = Callable[..., torch.Tensor]


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
        self, model: torch.nn.Module, cut: CutModel, mesh: Mesh, loss: Loss | None, run: How, seconds: float
    ) -> None:
        super().__init__()
        stages, laid, schedule = mesh[AXIS], cut.laid, cut.pipeline.schedule
        self.laid, self.mesh, self.schedule = laid, mesh, schedule
        self.microbatches, self.batched = cut.pipeline.microbatches, cut.batched
        self.by = _Groups(mesh, seconds)
        rows = [(f"part {i}", p.collectives()) for i, x in enumerate(laid) for p in x.spmd.programs()]
        ProcessGroups.agree(self.by, rows)
        if any(n.op.random for x in laid for n in x.spmd.forward.graph.nodes):
            ProcessGroups.check_random_state(self.by)
        self.by.prepare(sorted({(AXIS,), *(g for x in laid for g in groups_of(x.spmd))}))
        self.stage = mesh.coordinates(self.by.rank)[AXIS]
        if self.by.rank == 0:
            tell(dict.fromkeys(w for x in laid for w in x.spmd.warnings))
        own = [i for i in range(len(laid)) if stage_of(schedule, i, stages) == self.stage]
        self.parts = torch.nn.ModuleDict(
            {str(i): StageModule(model, laid[i], self.by, run, i == len(laid) - 1, schedule in APART) for i in own}
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
        self._run = run_schedule(schedule, made, self.microbatches, self._loss if trains else None)

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

    @property
    def planned(self) -> int:
        """Bytes that this rank sends in a step by its programs: collectives of every microbatch, tensors handed to the
        stages before and after, gradients of parameters that several stages keep."""
        mine = sorted(map(int, self.parts))
        inside = sum(self.laid[i].spmd.bytes for i in mine)
        tied = sum(payload("all_reduce", own[0].numel() * own[0].element_size(), n) for _, n, own in self._ties)
        return self.microbatches * (inside + self._handed_on(mine)) + (tied if self.loss is not None else 0)

    def _handed_on(self, mine: Sequence[int]) -> int:
        """Bytes of a microbatch that this rank hands to other stages: results forward, their gradients back."""
        nbytes = [x.bytes_handed(self.mesh) for x in self.laid[:-1]]
        there = sum(nbytes[i] for i in mine if i < len(nbytes) and i + 1 not in mine)
        back = sum(nbytes[i - 1] for i in mine if i and i - 1 not in mine) if self.loss is not None else 0
        return there + back


# ---------------------------------------------------------------- the door


def distribute_model(
    model: torch.nn.Module, plan: Any = None, *, mesh: Mesh | None = None, loss: Loss | None = None,
    pipeline: Pipeline | None = None, **asked: Any,
) -> Distributed | Staged:  # fmt: skip
    """``distribute`` (of ``sharding/distributed.py``) of plans and meshes without stages and with them.

    Args:
        mesh: with an axis ``pp`` if there are stages and no plan.
        loss: of stages that train, and of microbatches: ``loss(result, target)`` of one microbatch.
        pipeline: where stages begin, if no plan says it.

    Raises:
        TesselError: as ``distribute`` and ``cut_model``.
    """
    if isinstance(plan, str | Path):
        plan = read_plan(plan)
    found = plan if isinstance(plan, ShardingPlan) and "pipeline" in plan.data else None
    if found is None and (plan is not None or mesh is None or AXIS not in mesh):
        check(pipeline is None, lambda: "distribute: pipeline is for a mesh with stages (pp)")
        check(loss is None or plan is not None, lambda: "distribute: a loss is for stages, or a plan with microbatches")
        return distribute(model, plan, mesh=mesh, loss=loss, **asked)
    if found is not None:
        found.check_model(parameters_of(model), dist.get_world_size() if dist.is_initialized() else None)
        mesh = Mesh(found.mesh)
    assert mesh is not None
    unknown = [k for k in ("weights", "init") if asked.pop(k, None) is not None]
    check(not unknown, lambda: f"distribute: {unknown[0]} is for meshes without stages; give a model with its tensors")
    train = asked.pop("train", None)
    trains = (
        bool(found.data["settings"]["train"]) if found is not None else loss is not None if train is None else train
    )
    return _distribute_stages(
        model, found, mesh, asked.pop("args", ()), asked.pop("kwargs", None) or {}, pipeline=pipeline,
        annotations=asked.pop("annotations", None), train=trains, loss=loss, run=asked.pop("run", "compiled"), **asked,
    )  # fmt: skip


def _distribute_stages(
    model: torch.nn.Module, plan: ShardingPlan | None, mesh: Mesh, args: Sequence[Any], kwargs: Mapping[str, Any], *,
    pipeline: Pipeline | None, annotations: Annotations | None, train: bool, loss: Loss | None, run: How,
    seconds: float = 300.0,
) -> Staged:  # fmt: skip
    """This process's stages of a model."""
    check(train == (loss is not None), lambda: "a pipeline trains with a loss: distribute(..., loss=fn), and only then")
    cut = cut_model(model, args, kwargs, mesh, plan=plan, pipeline=pipeline, annotations=annotations, train=train)
    return Staged(model, cut, mesh, loss, run, seconds)
