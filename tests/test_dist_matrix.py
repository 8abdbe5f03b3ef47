"""Models of transformers under every kind of parallelism, as real processes: results, gradients, bytes of the plan.

``make test-dist`` runs all rows; the tests of every day run a few. Each row is planned with the annotations that name
its parallelism, the rest is the search's; then it runs, and the bytes that every rank hands to torch.distributed in a
step are those of the plan.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from groups import environment, free_port
from torch.utils import _pytree as pytree

import tessel
from tessel.frontend.joint import tensors_of
from tessel.models import load_model
from tessel.runtime.shares import share
from tessel.sharding.annotate import fits
from tessel.sharding.distributed import distribute
from tessel.sharding.plan_file import parse_plan
from tessel.sharding.planned import plan_model
from tessel.sharding.planner import Request

pytest.importorskip("transformers")

Line = tuple[str, tuple[Any, ...], dict[str, Any]]
SIZES = {"llama": (8, 8), "mixtral": (8, 8), "gpt2": (8, 8), "bert": (8, 8), "vit": (8, 16)}
COLUMNS = {
    "llama": ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"),
    "mixtral": ("q_proj", "k_proj", "v_proj"),
    "gpt2": (),  # keeps q, k and v in one matrix, whose split is not that of heads; its MLP is split
    "bert": ("query", "key", "value", "intermediate.dense"),
    "vit": ("q_proj", "k_proj", "v_proj", "fc1"),
}
ROWS = {
    "llama": ("o_proj", "down_proj"),
    "mixtral": ("o_proj",),
    "gpt2": (),
    "bert": ("attention.output.dense", "layer.*.output.dense"),
    "vit": ("o_proj", "fc2"),
}
LAYERS = {"llama": "layers.*", "mixtral": "layers.*", "gpt2": "h.*", "bert": "layer.*"}
PARALLEL: dict[str, dict[int, str]] = {
    "dp": {2: "dp=2", 4: "dp=4", 8: "dp=8"},
    "fsdp": {2: "fsdp=2", 4: "fsdp=4", 8: "fsdp=8"},
    "tp": {2: "tp=2", 4: "dp=2,tp=2", 8: "dp=4,tp=2"},
    "tp+sp": {2: "tp=2", 4: "dp=2,tp=2", 8: "dp=4,tp=2"},
    "ulysses": {4: "dp=2,sp=2", 8: "dp=4,sp=2"},
    "fsdp x tp": {4: "fsdp=2,tp=2", 8: "fsdp=4,tp=2"},
}
# (model, parallelism, processes) of which there is no such row, and why
ABSENT = {
    ("vit", "tp+sp"): "17 tokens do not divide",
    ("vit", "ulysses"): "17 tokens do not divide",
    ("mixtral", "ulysses"): "tokens sorted by expert need the whole sequence",
}
FEW = [("vit", "tp")]


def annotations(name: str, how: str, mesh: tessel.Mesh, module: torch.nn.Module, rank: int) -> list[Line]:
    """What names a kind of parallelism for a model; ``rank`` is that of its first input."""
    data = next((a for a in ("dp", "fsdp") if a in mesh), None)
    lines: list[Line] = []
    if data is not None:
        lines.append(("shard", ("inputs[0]", (data, *[None] * (rank - 1))), {}))
    split: dict[str, tuple[Any, ...]] = {}
    if "tp" in mesh:
        for word, dims in [*((w, ("tp", None)) for w in COLUMNS[name]), *((w, (None, "tp")) for w in ROWS[name])]:
            for n, p in module.named_parameters():
                if fits(f"{word}.weight", n) and p.dim() == 2:
                    split[n] = dims
        if name == "gpt2":
            split |= {n: (None, "tp") for n, _ in module.named_parameters() if n.endswith("c_fc.weight")}
            split |= {n: ("tp", None) for n, _ in module.named_parameters() if n.endswith("mlp.c_proj.weight")}
    for n, p in module.named_parameters():
        used = split.get(n)
        kept = list(used or [None] * p.dim())
        if "fsdp" in how and p.dim() == 2 and "position" not in n:
            d = 0 if kept[0] is None else 1
            parts = mesh["fsdp"]
            if p.shape[d] % parts == 0:
                kept[d] = "fsdp"
                lines.append(("shard", (n, tuple(kept)), {"gather": ["fsdp"]}))
                continue
        if used is not None:
            lines.append(("shard", (n, used), {}))
    if how == "tp+sp":
        lines.append(("output", (LAYERS[name], (data, "tp", None)), {}))
    if how == "ulysses":
        lines.append(("output", (LAYERS[name], (data, "sp", None)), {}))
    return lines


def loss(result: Any) -> torch.Tensor:
    found = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return torch.stack([x.double().square().mean() for x in found]).sum()


def row(rank: int, name: str, how: str, text: str) -> str:
    """One row on one rank."""
    mesh = tessel.Mesh.parse(text)
    batch, seq = SIZES[name]
    torch.manual_seed(0)
    module, args, kwargs = load_model(f"hf:{name}", layers=1, batch=batch, seq=seq)
    assert isinstance(module, torch.nn.Module)
    exact = copy.deepcopy(module).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    wide = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    said = tessel.Annotations()
    for method, given, options in annotations(name, how, mesh, module, tensors_of(args, kwargs)[0].dim()):
        getattr(said, method)(*given, **options)
    request = Request(train=True, remat="none")
    # every rank plans: the search is deterministic, and what differs is refused when the ranks compare programs
    plan = plan_model(module, args, kwargs, mesh=mesh, target="h100", request=request, annotations=said)
    placed = distribute(module, parse_plan(plan.text()), args=args, kwargs=kwargs, run="interpreted", seconds=100)
    runs = []
    for model, given in ((exact, wide), (module, kwargs), (placed, kwargs)):
        result = model(*args, **given)
        loss(result).backward()
        runs.append([x.detach() for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)])
    where = f"{name}, {how}, {text}"
    for triple in zip(*runs, strict=True):
        close(where, *triple)
    mine, best = dict(placed.module.named_parameters()), dict(exact.named_parameters())
    for n, p in module.named_parameters():
        if p.grad is None:
            continue
        whole = best[n].grad
        assert whole is not None and mine[n].grad is not None, f"{where}: {n} has no gradient"
        lies = placed.shardings[n]
        parts = [share(x, lies, mesh, rank) for x in (whole, p.grad)]
        close(f"{where}: {n}", parts[0], parts[1], mine[n].grad, float(whole.abs().max()))
    planned = plan.data["program"]["bytes"]
    assert placed.sent == planned, f"{where}: {placed.sent} bytes were sent, the plan says {planned}"
    assert how not in ("tp", "tp+sp", "fsdp", "ulysses") or planned > 0
    return f"{where}: {planned} bytes a device"


def close(
    what: str, want: torch.Tensor, single: torch.Tensor, got: torch.Tensor | None, scale: float | None = None
) -> None:
    """Not further from float64 than one device, by more than a small factor."""
    assert got is not None
    top = float(want.abs().max()) if scale is None else scale
    ours, theirs = (float((x.double() - want).abs().max()) for x in (got, single))
    allowed = 8 * max(theirs, 4 * torch.finfo(single.dtype).eps * top)
    assert ours <= allowed, f"{what}: {ours:.3g} from float64, one device {theirs:.3g}"


def process(rank: int, world: int, port: int, folder: str, rows: list[tuple[str, str]]) -> None:
    environment(rank, world, port, folder)
    for name, how in rows:
        said = row(rank, name, how, PARALLEL[how][world])
        torch._dynamo.reset()
        if rank == 0 and os.environ.get("TESSEL_TEST_DIST"):
            print(said, flush=True)
    dist.destroy_process_group()


def run(world: int, rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        mp.spawn(process, (world, free_port(), folder, rows), nprocs=world)


@pytest.mark.slow
def test_a_few_rows_over_two_processes() -> None:
    run(2, FEW)


@pytest.mark.skipif("TESSEL_TEST_DIST" not in os.environ, reason="make test-dist runs it")
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(SIZES))
def test_all_rows(name: str, world: int) -> None:
    run(world, [(name, how) for how, sizes in PARALLEL.items() if world in sizes and (name, how) not in ABSENT])
