"""Real processes over gloo: results and gradients of one device, bytes of the plan, errors that stop everyone."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import environment, free_port, start
from ranks import annotations
from test_partition import Layer
from torch import nn

import tessel
from tessel.errors import TesselError
from tessel.frontend.joint import Step, capture_step
from tessel.ops.collective import together
from tessel.passes.collectives import Overlap
from tessel.runtime.collectives import ProcessGroups
from tessel.runtime.shares import share
from tessel.sharding.distributed import Distributed, distribute
from tessel.sharding.spmd import lay_out
from tessel.targets.mesh import Mesh

DATA = [("shard", "inputs[0]", ("dp", None))]
TENSOR = [("shard", "*.q.weight", ("tp", None)), ("shard", "*.up.weight", ("tp", None))]
SEQUENCE = [("output", "layers.*", ("dp", "tp", None)), ("output", "embed", ("dp", "tp", None))]
KEPT = [
    ("shard", n, ("dp", None), {"gather": ["dp"]})
    for n in ("*.q.weight", "*.up.weight", "*.down.weight", "embed.weight")
]
# name -> mesh, annotations, how each rank runs its program
Cases = dict[str, tuple[dict[str, int], list[tuple[Any, ...]], str]]
TWO: Cases = {
    "data": ({"dp": 2}, DATA, "interpreted"),
    "kept split": ({"dp": 2}, DATA + KEPT, "interpreted"),
    "tensor and sequence": ({"dp": 1, "tp": 2}, TENSOR + SEQUENCE, "interpreted"),
    "ring": ({"sp": 2}, [("shard", "inputs[0]", (None, "sp"))], "interpreted"),
}
FOUR: Cases = {
    "tensor and sequence, over data": ({"dp": 2, "tp": 2}, DATA + TENSOR + SEQUENCE, "interpreted"),
    "tensor, over data, compiled": ({"dp": 2, "tp": 2}, DATA + TENSOR, "compiled"),
}


class Model(nn.Module):
    """A decoder of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Layer(32, 4) for _ in range(2))
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@cache
def example() -> tuple[Model, torch.Tensor, Step]:
    torch.manual_seed(0)
    module, ids = Model(), torch.randint(64, (4, 8))
    return module, ids, capture_step(module, (ids,), train=True)


def step(rank: int, cases: Cases) -> None:
    """Every case, on one rank of one group of processes."""
    module, ids, captured = example()
    want = module(ids)
    loss(want, ids).backward()
    for name, (mesh, lines, run) in cases.items():
        laid = lay_out(captured, Mesh(mesh), annotations(lines), ring=("sp",))
        placed = distribute(module, laid, run=run)  # type: ignore[arg-type]
        got = placed(ids)
        loss(got, ids).backward()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        check_gradients(placed, module, name, rank)
        assert placed.sent == placed.spmd.bytes, f"{name}: sent {placed.sent}, the plan says {placed.spmd.bytes}"
        if name == "kept split":
            sizes = [sum(p.numel() for p in m.parameters()) for m in (placed, module)]
            assert sizes[0] < 0.75 * sizes[1]
        with torch.no_grad():
            torch.testing.assert_close(placed(ids), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(TesselError, match=r"laid out for shape \[4, 8\] of torch.int64, called with \[2, 8\]"):
            placed(ids[:2])
    with pytest.raises(TesselError, match="the mesh dp=3 has 3 devices, the world . processes"):
        distribute(module, lay_out(captured, Mesh({"dp": 3}), annotations([])))


def check_gradients(placed: Distributed, module: nn.Module, name: str, rank: int) -> None:
    mine = dict(placed.module.named_parameters())
    for n, p in module.named_parameters():
        assert p.grad is not None and mine[n].grad is not None, f"{name}: {n} has no gradient"
        want = share(p.grad, placed.shardings[n], placed.spmd.mesh, rank)
        torch.testing.assert_close(mine[n].grad, want, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{name}: {n}: {m}")


def optimize(rank: int) -> None:
    """Two steps of AdamW on shards are two steps on the whole; what the user annotated is found."""
    torch.manual_seed(0)
    # no bias before the norm: its gradient would be rounding noise, of which AdamW makes whole steps
    whole = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 8))
    x = torch.randn(4, 8)
    with tessel.annotate(whole) as a:
        a.shard("0.weight", ("tp", None))
    placed = distribute(whole, mesh=Mesh({"tp": dist.get_world_size()}), args=(x,), run="interpreted")
    assert placed.module[0].weight.shape == (16 // dist.get_world_size(), 8)  # type: ignore[index]
    both = [(m, torch.optim.AdamW(m.parameters(), lr=0.1)) for m in (whole, placed)]
    for _ in range(2):
        for m, optimizer in both:
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(placed(x), whole(x), rtol=1e-5, atol=1e-5)
    # the statistics of split channels are split, and written back
    for name, b in whole.named_buffers():
        mine = dict(placed.module.named_buffers())[name]
        torch.testing.assert_close(mine, share(b, placed.shardings[name], placed.spmd.mesh, rank))
    assert str(placed.shardings["1.running_mean"]) == "{tp}"


def draw(rank: int) -> None:
    """Dropout drops what it drops on one device, and costs no communication."""
    module, x = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8)), torch.ones(4, 8)
    torch.manual_seed(1)
    placed = distribute(module, mesh=Mesh({"dp": 2}), args=(x,), annotations=annotations(DATA), run="interpreted")
    torch.manual_seed(7)
    want = module(x)
    torch.manual_seed(7)
    torch.testing.assert_close(placed(x), want)
    assert [c.kind for c in placed.spmd.forward.collectives()] == ["all_gather"]  # of the result
    torch.manual_seed(rank)
    with pytest.raises(TesselError, match="the random state of rank 1 is not that of rank 0"):
        distribute(module, placed.spmd, run="interpreted")


def collectives(rank: int) -> None:
    """Each collective over torch.distributed is what its definition says, for every order of the axes."""
    mesh = Mesh({"a": 2, "b": 2})
    by = ProcessGroups(mesh)
    numbers = [torch.arange(16.0).reshape(4, 4) + 100 * r for r in range(4)]
    flags = [x.long() % 3 == 0 for x in numbers]
    for axes in (("a",), ("b",), ("a", "b"), ("b", "a")):
        (group,) = (g for g in mesh.groups(*axes) if rank in g)
        n, me = len(group), group.index(rank)
        for name, attrs in (
            ("all_reduce", {"combine": "sum"}),
            ("all_reduce", {"combine": "max"}),
            ("all_gather", {"dim": 1}),
            ("reduce_scatter", {"dim": 1, "combine": "sum"}),
            ("reduce_scatter", {"dim": 0, "combine": "min"}),
            ("all_to_all", {"split": 0, "join": 1}),
            ("collective_permute", {"sources": (*range(1, n), 0)}),
        ):
            given = {**attrs, "axes": axes, "parts": n}
            for data in (numbers,) if attrs.get("combine") == "sum" else (numbers, flags):
                want = together(name, [data[r] for r in group], given)[me]
                assert torch.equal(by.run(name, data[rank], given), want), (name, axes)
                more = [~x if x.dtype == torch.bool else 3 * x for x in data]
                call = by.start(name, (data[rank], more[rank]), (given, given))
                wants = want, together(name, [more[r] for r in group], given)[me]
                assert all(map(torch.equal, by.finish(call), wants)), f"a call of two: {name} over {axes}"


# parameters that are gathered, gradients that are scattered and added up; sums of activations
CALLED: Cases = {
    "kept split": ({"dp": 2}, DATA + KEPT, "interpreted"),
    "tensor": ({"dp": 1, "tp": 2}, TENSOR, "interpreted"),
}


def call(rank: int) -> None:
    """Collectives that are merged and begun early give, bit for bit, what they give one by one."""
    module, ids, captured = example()
    for name, (mesh, lines, run) in CALLED.items():
        found = []
        for overlap in (None, Overlap(8192, 2**20)):
            laid = lay_out(captured, Mesh(mesh), annotations(lines), overlap=overlap)
            placed = distribute(module, laid, run=run)  # type: ignore[arg-type]
            got = placed(ids)
            loss(got, ids).backward()
            assert placed.sent == laid.bytes, name
            found.append([got.detach(), *(p.grad for p in placed.module.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found)), name
        rows = laid.collectives()
        assert any(c.beside for c in rows), name
        if name == "kept split":
            calls = {(p.graph.name, c.call) for p in laid.programs() for c in p.collectives()}
            assert len(calls) < len(rows) - 8, (calls, rows)
    # a program that does not wait for what it begins is stopped
    x = torch.ones(4)
    by = ProcessGroups(Mesh({"dp": 2}))
    row = next(c for c in laid.collectives() if c.kind == "all_reduce")
    attrs = {"axes": ("dp",), "parts": 2, "combine": "sum"}
    words = "ended the forward without waiting for all_reduce over dp"
    with pytest.raises(TesselError, match=words), by.running("forward", [replace(row, axes=("dp",))]):
        by.start("all_reduce", (x,), (attrs,))
    dist.barrier()


def process(rank: int, world: int, port: int, cases: Cases, folder: str) -> None:
    environment(rank, world, port, folder)
    try:
        step(rank, cases)
        optimize(rank)
        if world == 2:
            draw(rank)
            call(rank)
        else:
            collectives(rank)
    finally:
        dist.destroy_process_group()


def run_processes(world: int, cases: Cases) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        start(process, world, free_port(), cases, folder)


def test_two_processes_give_what_one_device_gives() -> None:
    run_processes(2, TWO)


@pytest.mark.slow
def test_four_processes_give_what_one_device_gives() -> None:
    run_processes(4, FOUR)


def test_without_processes_it_says_what_to_do() -> None:
    with pytest.raises(TesselError, match=r"torch\.distributed is not initialised; start with torchrun"):
        tessel.distribute(nn.Linear(4, 4), mesh=tessel.Mesh({"dp": 1}), args=(torch.ones(1, 4),))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("shard", "0.weigt", (None,)), r"nothing has such a name; did you mean '0.weight'\?"),
        (("shard", "0.weight", ("tp",)), "1 dims are given"),
        (("shard", "0.weight", ("xx", None)), "names mesh axis 'xx'; the mesh has dp"),
        (("shard", "inputs[3]", ("dp", None)), r"known: .*inputs\[0\]"),
        (("output", "7", ("dp", None)), "nothing has such a name"),
    ],
)
def test_bad_annotations_name_the_users_line(line: tuple[Any, ...], words: str) -> None:
    module = nn.Sequential(nn.Linear(8, 8))
    captured = capture_step(module, (torch.ones(2, 8),), train=False)
    with tessel.annotate(module) as a:
        getattr(a, line[0])(*line[1:])
    with pytest.raises(TesselError, match=words) as e:
        lay_out(captured, Mesh({"dp": 2}), a)
    assert "test_distributed.py:" in str(e.value)


def test_capture_touches_no_gradient() -> None:
    module, x = nn.Linear(8, 8), torch.ones(4, 8)
    module(x).sum().backward()
    before = [p.grad for p in module.parameters()]
    capture_step(module, (x,), train=True)
    assert all(p.grad is g for p, g in zip(module.parameters(), before, strict=True))


def test_annotations_that_no_model_could_have() -> None:
    with tessel.annotate(nn.Linear(2, 2)) as a:
        for call, words in (
            (lambda: a.shard("weight", ("dp", "dp")), "'dp' is used twice"),
            (lambda: a.shard("weight", "dp"), "give one entry a dimension"),
            (lambda: a.shard("weight", (3, None)), ".*"),
            (lambda: a.shard("weight", ("d p", None)), "'d p' is no name of a mesh axis"),
            (lambda: a.shard("weight", ("dp", None), gather=["tp"]), "gather names 'tp'"),
        ):
            with pytest.raises((TesselError, TypeError), match=words):
                call()
