"""A model cut into parts for pipeline stages, each laid out over the other axes of the mesh.

    cut = cut_model(model, (ids,), None, mesh, pipeline=Pipeline(("layers.2",), microbatches=4), train=True)
    cut.laid[1].spmd          # the programs of the second part

Between parts every device hands its share of a tensor to the device that stands where it stands on the next stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TesselError, check
from ..frontend.joint import tensors_of
from ..frontend.split import Part, capture_parts
from ..ir.sharding import Sharding
from ..passes._layouts import Seed
from ..passes.collectives import Overlap
from ..solve.pipeline import SCHEDULES, bubble
from ..targets.mesh import Mesh
from .annotate import Annotation, Annotations, annotations_of, seeds
from .microbatches import microbatch
from .pipeline import AXIS
from .plan_file import ShardingPlan
from .spmd import Spmd, lay_out_prepared, overlap_of, prepared_step

__all__ = ["CutModel", "Laid", "Pipeline", "cut_model"]


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


def _plan_parts(plan: ShardingPlan) -> Callable[[Sequence[str]], dict[str, list[int]]]:
    """The parts of each parameter, as a plan says."""
    tensors = plan.data["tensors"]

    def part_of(names: Sequence[str]) -> dict[str, list[int]]:
        missing = [n for n in names if n not in tensors]
        check(not missing, lambda: f"the plan has no parameter {missing[0]!r}, which the model uses")
        return {n: list(tensors[n]["parts"]) for n in dict.fromkeys(names)}

    return part_of


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


def _lay_out(
    parts: Sequence[Part], mesh: Mesh, annotations: Annotations, tensors: int,
    handed: Sequence[Sharding | None] = (), overlap: Overlap | None = None,
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
        how = {"results": results, "overlap": overlap}
        spmd = lay_out_prepared(step, mesh, list(said.values()), whole_results=last, **how)  # type: ignore[arg-type]
        for node, sharding in zip(graph.inputs, spmd.forward.inputs, strict=True):
            if node.attrs["role"] == "param" and sharding is not None:
                known.setdefault(str(node.attrs["name"]), (spmd.forward.layouts.of[node.out], sharding))
        leaving = tuple(s for s in spmd.forward.outputs[: step.results] if s is not None)
        check(len(leaving) == step.results, lambda i=i: f"part {i} hands on a number that is no tensor: cut elsewhere")  # type: ignore[misc]
        out.append(Laid(part, spmd, tuple(before), leaving))
    if unused:
        raise wrong[next(iter(unused))]
    return out


def _annotations_of(plan: ShardingPlan, tensors: Sequence[torch.Tensor]) -> Annotations:
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


# ---------------------------------------------------------------- a model


@dataclass(frozen=True)
class CutModel:
    """A model's parts on a mesh.

    Attributes:
        pipeline: microbatches and schedule; where parts begin, if no plan says it.
        laid: the parts, in order.
        batched: for each tensor that the caller gives, whether microbatches take a piece of it.
    """

    pipeline: Pipeline
    laid: list[Laid]
    batched: list[bool]


def cut_model(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, mesh: Mesh, *,
    plan: ShardingPlan | None = None, pipeline: Pipeline | None = None, annotations: Annotations | None = None,
    train: bool = False,
) -> CutModel:  # fmt: skip
    """Cut a model as a plan says, or a ``Pipeline``, and lay its parts out.

    Args:
        args, kwargs: example arguments of the whole batch.
        mesh: with the axis ``pp``.
        annotations: instead of the plan's, or of what ``tessel.annotate`` was told about the model.

    Raises:
        TesselError: neither a plan nor a ``Pipeline`` says how to cut; the model cannot be cut there; what they say
            does not go together.
    """
    handed: list[Sharding | None] = []
    if plan is not None:
        p = plan.data["pipeline"]
        pipeline = Pipeline((), int(plan.data["settings"]["microbatches"]), p["schedule"])
        part_of: Any = _plan_parts(plan)
        count = len(p["parts"])
        handed = [Sharding.parse(s["layout"]) if " " not in s["layout"] else None for s in p["sends"]]
    else:
        if pipeline is None:
            raise TesselError(
                f"mesh {mesh}: say where stages begin, as pipeline=Pipeline(('layers.2',), microbatches=4)"
            )
        part_of, count = pipeline.part_of, len(pipeline.starts) + 1
    _check(pipeline, mesh[AXIS], count)
    tensors = tensors_of(args, kwargs or {})
    check(bool(tensors), lambda: "distribute: give example arguments of the whole batch")
    (micro_args, micro_kwargs), batched = microbatch(args, kwargs, pipeline.microbatches)
    parts = capture_parts(model, micro_args, micro_kwargs, part_of, train=train)
    if plan is not None and annotations is None:
        annotations = _annotations_of(plan, tensors_of(micro_args, micro_kwargs))
    said = annotations if annotations is not None else annotations_of(model)
    overlap = Overlap() if plan is None else overlap_of(plan.data)
    return CutModel(pipeline, _lay_out(parts, mesh, said, len(tensors), handed, overlap), batched)


def _check(pipeline: Pipeline, stages: int, count: int) -> None:
    """Whether a schedule runs so many parts on so many stages."""
    schedule = pipeline.schedule
    check(schedule in SCHEDULES, lambda: f"unknown schedule {schedule!r}: {', '.join(SCHEDULES)}")
    chunks, over = divmod(count, stages)
    check(chunks >= 1 and not over, lambda: f"{count} parts do not make {stages} stages of equally many")
    single = schedule in ("gpipe", "1f1b", "zb1p")
    check(single == (chunks == 1), lambda: f"{schedule} of {chunks} parts a stage: there is no such schedule")
    bubble(schedule, stages, pipeline.microbatches, chunks)
