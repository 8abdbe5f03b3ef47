"""Merged sums over more than two processes: as near to float64 as sums one by one, the same bits on every rank."""

from __future__ import annotations

import copy
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from groups import environment, free_port, start
from ranks import annotations
from test_distributed import DATA, KEPT, SEQUENCE, TENSOR, example, loss

from tessel.passes.collectives import Overlap
from tessel.runtime.collectives import ProcessGroups
from tessel.sharding.distributed import distribute
from tessel.sharding.materialize import region
from tessel.sharding.spmd import lay_out
from tessel.targets.mesh import Mesh

WORLD = 4


def sums(rank: int) -> None:
    """Merged sums over more than two ranks are as exact as those one by one, and the same bits on every rank.

    Which rank begins to add up an element depends on its place in the call, so that the last bits may be others.
    """
    by, n = ProcessGroups(Mesh({"a": WORLD})), WORLD
    generator = torch.Generator().manual_seed(0)
    given = [[torch.randn(n, k, generator=generator) for k in (1, 3, 250, 4099)] for _ in range(n)]
    exact = [torch.stack(xs).double().sum(0) for xs in zip(*given, strict=True)]
    # of any order of adding: Higham, Accuracy and Stability of Numerical Algorithms, section 4.2
    bounds = [(n - 1) * 2**-24 * torch.stack(xs).double().abs().sum(0) for xs in zip(*given, strict=True)]
    for name, more in (("all_reduce", {}), ("reduce_scatter", {"dim": 0})):
        attrs = {"axes": ("a",), "parts": n, "combine": "sum", **more}
        mine = slice(None) if name == "all_reduce" else slice(rank, rank + 1)
        single = [by.run(name, x, attrs) for x in given[rank]]
        merged = by.finish(by.start(name, given[rank], [attrs] * len(exact)))
        for x, want, bound in zip((*single, *merged), exact * 2, bounds * 2, strict=True):
            assert bool(((x - want[mine]).abs() <= bound[mine]).all()), name
        if name == "all_reduce":
            alike([(str(i), x) for i, x in enumerate((*single, *merged))])


def alike(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Tensors of one name are the same bits on every rank that has one."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [(name, zlib.crc32(x.numpy().tobytes())) for name, x in tensors])
    bits = {pair for own in found for pair in own}
    assert len(bits) == len({name for name, _ in bits}), "ranks have other bits of one tensor"


def merged_gradients(rank: int) -> None:
    """Gradients by merged collectives over more than two ranks are as near to float64 as those one by one."""
    module, ids, captured = example()
    exact = copy.deepcopy(module).double()
    loss(exact(ids), ids).backward()
    wants = {n: p.grad for n, p in exact.named_parameters()}
    cases = (({"dp": 4}, DATA + KEPT), ({"dp": 2, "tp": 2}, DATA + TENSOR + SEQUENCE))
    for mesh, lines in cases:
        far = []
        for overlap in (None, Overlap(8192, 2**20)):
            laid = lay_out(captured, Mesh(mesh), annotations(lines), overlap=overlap)
            placed = distribute(module, laid, run="interpreted")
            loss(placed(ids), ids).backward()
            shards, worst = [], 0.0
            for name, p in placed.module.named_parameters():
                whole, lies = wants[name], placed.shardings[name]
                assert whole is not None and p.grad is not None
                place = region(whole.shape, lies, laid.mesh, rank)
                error = (p.grad - whole[place]).abs().max() / whole.abs().max()
                worst = max(worst, float(error))
                shards.append((f"{name} {place}", p.grad))
            alike(shards)
            far.append(worst)
        assert far[1] <= 2 * far[0] < 1e-4, (mesh, far)
        rows = laid.collectives()
        assert len({(p.graph.name, c.call) for p in laid.programs() for c in p.collectives()}) < len(rows) - 4, mesh


def process(rank: int, world: int, port: int, folder: str) -> None:
    environment(rank, world, port, folder)
    try:
        sums(rank)
        merged_gradients(rank)
    finally:
        dist.destroy_process_group()


def test_merged_sums_of_four_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        start(process, WORLD, free_port(), folder)
