"""Rows of the matrix of models and parallelisms, on one rank of a world that torchrun started.

    torchrun --nproc-per-node 4 tests/dist_rows.py FOLDER llama:tp mixtral:ep      # no rows: all there are

Every model is traced once, and every row planned once, by one of the ranks; all read both from files. Then the row
runs on this world's gloo groups: results and gradients are compared with float64, and the bytes that are handed to
torch.distributed in a step with those of the plan (of the layout, where annotations alone make one). Rank 0 writes
what came of each row to ``FOLDER/rows.jsonl``.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from groups import read_graphs, write_graphs
from torch.utils import _pytree as pytree

import tessel
from tessel.frontend.compat import default_store
from tessel.frontend.joint import capture_step
from tessel.frontend.split import capture_parts
from tessel.passes._reshard import Price, by_bytes, sources
from tessel.runtime.collectives import ProcessGroups
from tessel.runtime.shares import share
from tessel.sharding import parts, planned
from tessel.sharding.accumulate import Accumulating
from tessel.sharding.annotate import fits
from tessel.sharding.distributed import Distributed, distribute
from tessel.sharding.microbatches import microbatch
from tessel.sharding.parts import Pipeline
from tessel.sharding.plan_file import read_plan
from tessel.sharding.planner import Request
from tessel.sharding.spmd import Spmd, lay_out
from tessel.sharding.staged import Staged, distribute_model
from tessel.targets.mesh import Link

WORLDS = (2, 4, 8)
BATCH, SEQ, MICROBATCHES = 16, 16, 2
CAPACITY = {2: 0.95, 4: 1.5}  # of the even share: so many tokens of a rank may go to the experts of another
SECONDS = 300.0  # that a rank waits for others


@dataclass(frozen=True)
class Family:
    """How a family of models calls what is split.

    Attributes:
        columns, rows: linear layers whose outputs, and whose inputs, tensor parallelism splits.
        layers: its blocks; ``second`` is the one at which the second stage begins.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    layers: str = "layers.*"
    second: str = "layers.1"


FAMILIES = {
    "llama": Family(("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"), ("o_proj", "down_proj")),
    "mixtral": Family(("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    # keeps q, k and v in one matrix, whose split is not that of heads: its MLP is split
    "gpt2": Family((), (), "h.*", "h.1"),
    "bert": Family(
        ("query", "key", "value", "intermediate.dense"),
        ("attention.output.dense", "layer.*.output.dense"),
        "layer.*",
        "layer.1",
    ),
    "vit": Family(("q_proj", "k_proj", "v_proj", "fc1"), ("o_proj", "fc2")),
}
# parallelism -> its mesh in worlds of 2, 4 and 8
MESHES: dict[str, tuple[str, ...]] = {
    "dp": ("dp=2", "dp=4", "dp=8"),
    "zero-1": ("dp=2", "dp=4", "dp=8"),
    "zero-2": ("dp=2", "dp=4", "dp=8"),
    "fsdp": ("fsdp=2", "fsdp=4", "fsdp=8"),
    "tp": ("tp=2", "tp=4", "tp=8"),
    "tp+sp": ("tp=2", "tp=4", "dp=2,tp=4"),
    "ring": ("ring=2", "ring=4", "dp=2,ring=4"),
    "ulysses": ("ulysses=2", "ulysses=4", "dp=2,ulysses=4"),
    "ep": ("ep=2", "ep=4", "dp=2,ep=4"),
    "ep, sent": ("ep=2", "ep=4", "dp=2,ep=4"),
    "dp x tp": ("", "dp=2,tp=2", "dp=4,tp=2"),
    "fsdp x tp": ("", "fsdp=2,tp=2", "fsdp=2,tp=4"),
    "pp": ("pp=2", "pp=2,dp=2", "pp=2,dp=2,tp=2"),
}
# 4 heads of keys; 10 tokens of a picture
OTHERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("llama", "tp"): ("tp=2", "tp=4", "dp=2,tp=4"),
    ("mixtral", "tp"): ("tp=2", "tp=4", "dp=2,tp=4"),
    **{("vit", how): (f"{how}=2", f"dp=2,{how}=2", f"dp=4,{how}=2") for how in ("ring", "ulysses")},
    ("vit", "tp+sp"): ("tp=2", "dp=2,tp=2", "dp=4,tp=2"),
}
ABSENT: dict[tuple[str, str], str] = {
    (name, how): "it has no experts" for name in ("llama", "gpt2", "bert", "vit") for how in ("ep", "ep, sent")
}
# what a parallelism is known by: collectives of its programs
KNOWN_BY = {
    "dp": {"all_reduce"},
    "fsdp": {"all_gather", "reduce_scatter"},
    "tp": {"all_reduce"},
    "tp+sp": {"all_gather", "reduce_scatter"},
    "ring": {"collective_permute"},
    "ulysses": {"all_to_all"},
    "ep": {"all_reduce"},
    "ep, sent": {"all_to_all"},
    "zero-1": {"reduce_scatter", "all_gather"},
    "zero-2": {"reduce_scatter", "all_gather"},
}


@dataclass(frozen=True)
class Row:
    """A model under a kind of parallelism, ``how``, on a mesh."""

    name: str
    how: str
    mesh: tessel.Mesh

    @property
    def microbatches(self) -> int:
        """Stage 1 of ZeRO is stage 2 where a batch is taken at once."""
        return MICROBATCHES if self.how in ("zero-1", "pp") else 1

    @property
    def run(self) -> Any:
        """A row of each model has its kernels compiled; the others interpret the same programs."""
        return "compiled" if self.how == "tp" and self.mesh.devices == 2 else "interpreted"

    @property
    def layers(self) -> int:
        """A layer a stage."""
        return self.mesh.get("pp", 1)

    @property
    def planned(self) -> bool:
        """Whether the search makes a plan; else annotations alone lay the model out.

        Those of stages say all. A picture's tokens are made inside the model: an axis for sequences, which splits what
        is one among the inputs, has nothing to split in a search.
        """
        return "pp" not in self.mesh and not (self.name == "vit" and self.how in ("ring", "ulysses"))

    @property
    def capture(self) -> str:
        """The file of what is traced for the row; others share it."""
        return f"{self.name}.{self.microbatches}.{self.layers}.graphs"

    @property
    def plan(self) -> str:
        """The file of its plan."""
        return f"{self.name}.{re.sub(r'[^a-z0-9]+', '-', f'{self.how} {self.mesh}')}.json"

    @property
    def key(self) -> str:
        return f"{self.name}:{self.how}"


def fast(text: str) -> tessel.Mesh:
    """A mesh on which the smallest model is worth splitting: a byte counts, a message does not."""
    sizes = dict(tessel.Mesh.parse(text))
    return tessel.Mesh(sizes, {a: Link(1e-12, 1e13) for a in sizes})


def dear_gathers(mesh: tessel.Mesh) -> Price:
    """Of two devices Ulysses sends as many bytes as gathers of keys and values: here those cost more."""
    plain = by_bytes(mesh)
    return lambda kind, axes, nbytes: plain(kind, axes, nbytes) * (2 if kind in ("all_gather", "reduce_scatter") else 1)


def rows_of(world: int) -> list[Row]:
    """The rows of a world, by model."""
    at = WORLDS.index(world)
    found = []
    for name in FAMILIES:
        for how, meshes in MESHES.items():
            text = OTHERS.get((name, how), meshes)[at]
            if text and (name, how) not in ABSENT:
                found.append(Row(name, how, fast(text)))
    return found


# ---------------------------------------------------------------- models


def build(name: str, layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small model with random weights and its inputs, the same on every rank."""
    import transformers as t

    wide: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 8}
    made: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, {"intermediate_size": 128, "num_key_value_heads": 4}),
        "mixtral": (
            t.MixtralConfig,
            t.MixtralForCausalLM,
            {"intermediate_size": 64, "num_key_value_heads": 4, "num_local_experts": 4, "head_dim": 8},
        ),
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel, {"n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}),
        "bert": (t.BertConfig, t.BertForMaskedLM, {"intermediate_size": 128}),
        "vit": (
            t.ViTConfig,
            t.ViTForImageClassification,
            {"intermediate_size": 128, "image_size": 24, "patch_size": 8},
        ),
    }
    config, cls, more = made[name]
    text = {"vocab_size": 128, "max_position_embeddings": 32, "use_cache": False}
    own = {**wide, **more, **({} if name in ("vit", "gpt2") else text)}
    if name == "gpt2":
        own |= {"vocab_size": 128, "use_cache": False}
    torch.manual_seed(0)
    model = cls(config(**own)).eval()
    if name == "vit":
        return model, {"pixel_values": torch.randn(BATCH, 3, 24, 24)}
    return model, {"input_ids": torch.randint(3, 128, (BATCH, SEQ))}


@dataclass(frozen=True)
class Made:
    """A model on one device: what it gives in its own precision and in float64."""

    module: torch.nn.Module
    kwargs: dict[str, torch.Tensor]
    results: list[torch.Tensor]
    exact: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]  # exact ones


@cache
def made(name: str, layers: int = 1) -> Made:
    module, kwargs = build(name, layers)
    exact = copy.deepcopy(module).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    wide = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    runs = []
    for model, given in ((module, kwargs), (exact, wide)):
        result = model(**given)
        loss(result).backward()
        runs.append([x.detach() for x in tensors(result)])
    gradients = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    return Made(module, kwargs, runs[0], runs[1], gradients)


def capture(row: Row) -> Any:
    """What is traced of a row's model: its step, or the parts that its stages run."""
    of = made(row.name, row.layers)
    _, kwargs = microbatch((), of.kwargs, row.microbatches)[0]
    if "pp" not in row.mesh:
        return capture_step(of.module, (), kwargs, train=True)
    return capture_parts(of.module, (), kwargs, cut_of(row).part_of, train=True)


def captured(row: Row, folder: Path) -> Any:
    """``capture`` of a row, by whoever did it."""
    return read_graphs(folder / row.capture)


def cut_of(row: Row) -> Pipeline:
    """Where the second stage begins."""
    return Pipeline((FAMILIES[row.name].second,), MICROBATCHES, "1f1b")


def tensors(result: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def loss(result: Any, target: Any = None) -> torch.Tensor:
    """A mean over rows, so that of microbatches it is the mean; ``target`` is there for schedules."""
    return torch.stack([x.double().square().mean() for x in tensors(result) if x.is_floating_point()]).sum()


# ---------------------------------------------------------------- what names a parallelism


def annotations(row: Row, module: torch.nn.Module) -> tessel.Annotations:
    """What the user says to ask for a kind of parallelism."""
    said, family, mesh = tessel.Annotations(), FAMILIES[row.name], row.mesh
    data = next((a for a in ("dp", "fsdp") if a in mesh), None)
    sequence = next((a for a in ("ring", "ulysses") if a in mesh), None)
    rows = tuple(a for a in (data, "ep" if row.how == "ep, sent" else None) if a)
    inputs = [rows or None, sequence] if row.name != "vit" else [rows or None, None, None, None]
    if any(inputs):
        said.shard("inputs[0]", tuple(inputs))
    for n, p in module.named_parameters():
        kept: list[Any] = [None] * p.dim()
        if "tp" in mesh and p.dim() == 2:
            at = split_of(row.name, n)
            if at is not None:
                kept[at] = "tp"
        if "ep" in mesh and p.dim() == 3:
            kept[0] = "ep"
        if "fsdp" in mesh and p.dim() >= 2:
            d = next((d for d in range(2) if kept[d] is None and p.shape[d] % mesh["fsdp"] == 0), None)
            if d is not None:
                kept[d] = "fsdp"
                said.shard(n, tuple(kept), gather=["fsdp"])
                continue
        if any(kept):
            said.shard(n, tuple(kept))
    if row.how in ("tp", "tp+sp"):  # the stream between blocks is whole on every device, or its tokens are split
        said.output(family.layers, (data, "tp" if row.how == "tp+sp" else None, None))
    if sequence is not None and row.name == "vit":
        said.output(family.layers, (data, sequence, None))
    return said


def split_of(name: str, parameter: str) -> int | None:
    """The dimension of a matrix that Megatron's tensor parallelism splits."""
    if name == "gpt2":
        return next((d for word, d in (("c_fc", 1), ("mlp.c_proj", 0)) if parameter.endswith(f"{word}.weight")), None)
    family = FAMILIES[name]
    found = ((d, word) for d, words in enumerate((family.columns, family.rows)) for word in words)
    return next((d for d, word in found if fits(f"{word}.weight", parameter)), None)


def write_plan(row: Row, folder: Path) -> None:
    """Plan a row into its file."""
    of = made(row.name)
    zero = {"zero-1": 1, "zero-2": 2}.get(row.how, None if "fsdp" in row.mesh else 0)
    request = Request(
        train=True, remat="none", microbatches=row.microbatches, zero=zero,
        capacity=CAPACITY[row.mesh["ep"]] if row.how == "ep, sent" else None,
    )  # fmt: skip
    step = captured(row, folder)
    with mock.patch.object(planned, "capture_step", lambda *_, **__: step):
        plan = planned.plan_model(
            of.module, (), of.kwargs, mesh=row.mesh, target="h100", request=request,
            annotations=annotations(row, of.module),
        )  # fmt: skip
    plan.write(folder / row.plan)


# ---------------------------------------------------------------- bytes


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Payload bytes of what is handed to torch.distributed, from the very tensors that are."""
    total: Counter[str] = Counter()

    def nbytes(x: torch.Tensor) -> int:
        return x.numel() * x.element_size()

    def all_reduce(x: torch.Tensor, op: Any = None, group: Any = None, **_: Any) -> int:
        n = dist.get_world_size(group)
        return 2 * nbytes(x) * (n - 1) // n

    def all_gather(out: Sequence[torch.Tensor], x: torch.Tensor, group: Any = None, **_: Any) -> int:
        return nbytes(x) * (len(out) - 1)

    def reduce_scatter(
        out: torch.Tensor, given: Sequence[torch.Tensor], op: Any = None, group: Any = None, **_: Any
    ) -> int:
        return sum(map(nbytes, given)) - nbytes(given[dist.get_rank(group)])

    def all_to_all_single(
        out: torch.Tensor, x: torch.Tensor, got: Any = None, given: Any = None, group: Any = None, **_: Any
    ) -> int:
        n, me = dist.get_world_size(group), dist.get_rank(group)
        return nbytes(x) * (n - 1) // n if given is None else (sum(given) - given[me]) * x.element_size()

    def send(group: Any, given: Sequence[torch.Tensor], *_: Any) -> int:
        return sum(map(nbytes, given))

    def counted(of: Any, name: str, size: Any) -> Any:
        call = getattr(of, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            total[name] += size(*args, **kwargs)
            return call(*args, **kwargs)

        return called

    with ExitStack() as stack:
        for size in (all_reduce, all_gather, reduce_scatter, all_to_all_single, send):
            of: Any = dist.ProcessGroup if size is send else dist  # schedules compare dist.isend with their own
            stack.enter_context(mock.patch.object(of, size.__name__, counted(of, size.__name__, size)))
        yield total


# ---------------------------------------------------------------- a row


@dataclass
class Errors:
    """The largest distance from float64, of this run and of one device's, as parts of ``scale``, the largest value."""

    scale: float
    ours: float = 0.0
    single: float = 0.0

    def add(self, what: str, want: torch.Tensor, single: torch.Tensor, got: torch.Tensor | None, top: float) -> None:
        """Not further from float64 than one device, but for a small factor and rounding of the largest value."""
        assert got is not None, f"{what}: there is none"
        assert got.shape == want.shape, f"{what}: {list(got.shape)}, not {list(want.shape)}"
        ours, theirs = (float((x.double() - want).abs().max()) if x.numel() else 0.0 for x in (got, single))
        allowed = 8 * max(theirs, 4 * torch.finfo(single.dtype).eps * top)
        assert ours <= allowed, f"{what}: {ours:.3g} from float64, one device {theirs:.3g}, the largest value {top:.3g}"
        self.ours, self.single = max(self.ours, ours / self.scale), max(self.single, theirs / self.scale)


def errors_of(of: Made) -> tuple[Errors, Errors]:
    """None yet, of results and of gradients."""
    return tuple(Errors(max(float(x.abs().max()) for x in xs)) for xs in (of.exact, of.gradients.values()))  # type: ignore[return-value]


def compare(
    errors: Errors, of: Made, named: Mapping[str, torch.nn.Parameter], shardings: Mapping[str, Any], mesh: tessel.Mesh,
    rank: int,
) -> None:  # fmt: skip
    """This rank's gradients, each with its part of the whole."""
    for n, p in of.module.named_parameters():
        if p.grad is None or n not in named:
            continue
        whole = of.gradients[n]
        want, single = (share(x, shardings[n], mesh, rank) for x in (whole, p.grad))
        errors.add(n, want, single, named[n].grad, float(whole.abs().max()))


def run_row(row: Row, rank: int, folder: Path) -> dict[str, Any]:
    """One row on one rank: errors, and bytes handed to torch.distributed, which are the plan's.

    Raises:
        AssertionError: something is further off than it may be.
    """
    if "pp" in row.mesh:
        return run_stages(row, rank, folder)
    of, mesh = made(row.name), row.mesh
    if row.planned:
        spmd = planned.lay_out_plan(read_plan(folder / row.plan), captured(row, folder))
    else:
        ring = ("ring",) if row.how == "ring" else ()
        price = dear_gathers(mesh) if row.how == "ulysses" else None
        spmd = lay_out(captured(row, folder), mesh, annotations(row, of.module), ring=ring, price=price)
    placed: Distributed
    if row.microbatches > 1:
        by = ProcessGroups(mesh, SECONDS)
        placed = Accumulating(of.module, spmd, by, row.run, None, None, cut=[True], loss=loss)
        with counting() as sent:
            result, _ = placed.step(**of.kwargs, target=torch.zeros(BATCH))
    else:
        placed = distribute(of.module, spmd, run=row.run, seconds=SECONDS)
        with counting() as sent:
            result = placed(**of.kwargs)
            loss(result).backward()
    out, grad = errors_of(of)
    for want, single, got in zip(of.exact, of.results, tensors(result), strict=True):
        out.add("results", want, single, got.detach(), float(want.abs().max()))
    compare(grad, of, dict(placed.module.named_parameters()), placed.shardings, mesh, rank)
    kinds = {c.kind for c in spmd.collectives()}
    assert KNOWN_BY.get(row.how, set()) <= kinds, f"{row.how} is known by {KNOWN_BY[row.how]}, this has {kinds}"
    assert placed.sent == spmd.bytes, f"the library counts {placed.sent} bytes, the plan {spmd.bytes}"
    return told(out, grad, sent, spmd.bytes - stays(spmd, rank))


def run_stages(row: Row, rank: int, folder: Path) -> dict[str, Any]:
    """A row with pipeline stages."""
    of, mesh, found = made(row.name, row.layers), row.mesh, captured(row, folder)
    with mock.patch.object(parts, "capture_parts", lambda *_, **__: found):
        placed = distribute_model(
            of.module, mesh=mesh, kwargs=of.kwargs, pipeline=cut_of(row), loss=loss,
            annotations=annotations(row, of.module), run=row.run, seconds=SECONDS,
        )  # fmt: skip
    assert isinstance(placed, Staged)
    target = torch.zeros(BATCH)
    placed.step(**of.kwargs, target=target)  # torch's schedules shake hands before the first step
    placed.zero_grad()
    before = placed.sent
    with counting() as sent:
        got = placed.step(**of.kwargs, target=target)
    out, grad = errors_of(of)
    if got is not None:
        for want, single, x in zip(of.exact, of.results, tensors(got[0]), strict=True):
            out.add("results", want, single, x.detach(), float(want.abs().max()))
    for part in placed.parts.values():
        compare(grad, of, dict(part.module.named_parameters()), part.shardings, mesh, rank)  # type: ignore[arg-type]
    plan = planned_stages(placed)
    assert placed.sent - before == plan, f"the library counts {placed.sent - before} bytes, the plan {plan}"
    stay = MICROBATCHES * sum(stays(placed.laid[int(i)].spmd, rank) for i in placed.parts)
    return told(out, grad, sent, plan - stay)


def planned_stages(placed: Staged) -> int:
    """Collectives of each microbatch, gradients of parameters that several stages keep, messages to neighbours."""
    mine = sorted(map(int, placed.parts))
    inside = sum(placed.laid[i].spmd.bytes for i in mine)
    handed = {i: placed.laid[i].bytes_handed(placed.mesh) for i in range(len(placed.laid))}
    for i in mine:
        inside += handed[i] if i + 1 < len(handed) and i + 1 not in mine else 0
        inside += handed[i - 1] if i > 0 and i - 1 not in mine else 0
    tied = sum((2 * (size - 1) * own[0].numel() * own[0].element_size()) // size for _, size, own in placed._ties)
    return MICROBATCHES * inside + tied


def stays(spmd: Spmd, rank: int) -> int:
    """Bytes of a plan's permutes that this rank, unlike others, keeps: a plan says what a device sends at most."""
    found = 0
    for _, program, times in spmd.phases():
        for move in program.moves():
            for s in move.steps:
                if s.kind == "collective_permute":
                    come = sources(s.before, s.after, s.axes, spmd.mesh)
                    at = spmd.mesh.index(rank, s.axes)
                    found += times * s.bytes if come[at] == at else 0
    return found


def told(out: Errors, grad: Errors, sent: Counter[str], planned: int) -> dict[str, Any]:
    measured = sum(sent.values())
    assert measured == planned, f"{measured} bytes were handed to torch.distributed ({dict(sent)}), the plan: {planned}"
    assert planned > 0, "nothing was sent: the row runs nothing in parallel"
    return {"out": [out.ours, out.single], "grad": [grad.ours, grad.single], "bytes": measured, "planned": planned}


# ---------------------------------------------------------------- a rank


def main(folder: Path, wanted: Sequence[str]) -> None:
    """All rows of this world on this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("rows", default_store())
    everyone, long = list(range(world)), timedelta(minutes=10)
    rows = [r for r in rows_of(world) if not wanted or r.key in wanted]
    for i, row in enumerate({r.capture: r for r in rows}.values()):
        if i % world == rank and not (folder / row.capture).exists():
            alone(row.capture, folder, lambda row=row: write_graphs(capture(row), folder / row.capture))
    store.set(f"captured {rank}", "")
    store.wait([f"captured {r}" for r in everyone], long)
    for i, row in enumerate(rows):
        if row.planned and i % world == rank:
            alone(row.plan, folder, lambda row=row: write_plan(row, folder))
            store.set(f"planned {i}", "")
    for i, row in enumerate(rows):
        if row.planned:
            store.wait([f"planned {i}"], long)
        started = time.perf_counter()
        found: dict[str, Any]
        try:
            failed = [p.read_text() for name in (row.capture, row.plan) if (p := folder / f"{name}.error").exists()]
            assert not failed, failed[0]
            found = run_row(row, rank, folder)
        except Exception as e:
            found = {"error": f"rank {rank}: {type(e).__name__}: {e}", "trace": traceback.format_exc()[-3000:]}
        store.set(f"{i} {rank}", json.dumps(found))
        store.wait([f"{i} {r}" for r in everyone], long)
        if rank == 0:
            ranks = [json.loads(store.get(f"{i} {r}")) for r in everyone]
            report(row, world, ranks, time.perf_counter() - started, folder)
    dist.destroy_process_group()


def alone(name: str, folder: Path, work: Any) -> None:
    """Do what all ranks wait for; what goes wrong is told to them by a file."""
    try:
        work()
    except Exception:
        (folder / f"{name}.error").write_text(traceback.format_exc())


def report(row: Row, world: int, ranks: list[dict[str, Any]], seconds: float, folder: Path) -> None:
    """Write down what all ranks found: the largest of each."""
    whole: dict[str, Any] = {"name": row.name, "how": row.how, "mesh": str(row.mesh), "world": world}
    errors = [r for r in ranks if "error" in r]
    if errors:
        # what made others stop comes last in what they say
        first = next((r for r in errors if "another rank stopped" not in r["error"]), errors[0])
        whole |= first
    else:
        for what in ("out", "grad"):
            whole[what] = [max(r[what][i] for r in ranks) for i in range(2)]
        whole["bytes"], whole["planned"] = (
            [min(r[k] for r in ranks), max(r[k] for r in ranks)] for k in ("bytes", "planned")
        )
    whole["seconds"] = round(seconds, 2)
    with (folder / "rows.jsonl").open("a") as f:
        f.write(json.dumps(whole) + "\n")
    print(f"{row.name:8} {row.how:10} {row.mesh!s:16} {seconds:5.1f} s  {whole.get('error', 'ok')[:300]}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TESSEL_CACHE_DIR", sys.argv[1])
    main(Path(sys.argv[1]), sys.argv[2:])
