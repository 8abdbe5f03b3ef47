"""All ranks of a mesh in one process: what collectives give by definition, without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tessel.errors import TesselError, check
from tessel.ops.collective import communicating, together
from tessel.runtime.collectives import Sent
from tessel.targets.mesh import Mesh

__all__ = ["InProcess"]


class _Meeting:
    """One rank of a mesh that lives in threads; collectives meet at a barrier."""

    def __init__(self, world: InProcess, rank: int) -> None:
        self.world, self.rank, self.sent = world, rank, Sent()
        self.calls = 0
        self.begun: dict[int, tuple[torch.Tensor, ...]] = {}

    def run(self, name: str, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
        self.sent.add(name, x, attrs["parts"])
        world = self.world
        world.asked[self.rank] = (name, tuple(attrs["axes"]))
        world.given[self.rank] = x
        world.barrier.wait()
        if len(set(world.asked)) > 1:
            raise TesselError(f"ranks disagree: {', '.join(sorted({f'{n} over {a}' for n, a in world.asked}))}")
        (ranks,) = (g for g in world.mesh.groups(*attrs["axes"]) if self.rank in g)
        got = together(name, [world.given[r] for r in ranks], attrs)[ranks.index(self.rank)]
        world.barrier.wait()
        return got.clone()

    def start(self, name: str, xs: Sequence[torch.Tensor], attrs: Sequence[Mapping[str, Any]]) -> int:
        """Carried out at once, one after the other: the definition of a call."""
        self.calls += 1
        self.begun[self.calls] = tuple(self.run(name, x, a) for x, a in zip(xs, attrs, strict=True))
        return self.calls

    def finish(self, number: int) -> tuple[torch.Tensor, ...]:
        return self.begun.pop(number)


class InProcess:
    """All ranks of a mesh in one process, a thread each, collectives by their definition: the oracle.

    Args:
        mesh: the devices.
        seconds: after which a rank that waits for others gives up.
    """

    def __init__(self, mesh: Mesh, seconds: float = 60.0) -> None:
        self.mesh = mesh
        self.barrier = threading.Barrier(mesh.devices, timeout=seconds)
        self.asked: list[tuple[str, tuple[str, ...]]] = [("", ())] * mesh.devices
        self.given: list[torch.Tensor] = [torch.empty(0)] * mesh.devices
        self.ranks = [_Meeting(self, r) for r in range(mesh.devices)]

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """``fn(rank)`` on every rank at once; what each gave.

        Raises:
            The first exception of a rank; the others stop with it.
        """
        results: list[Any] = [None] * self.mesh.devices
        failed: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                with communicating(self.ranks[rank]):
                    results[rank] = fn(rank)
            except BaseException as e:  # handed to the caller below
                if not isinstance(e, threading.BrokenBarrierError):
                    failed.append(e)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.mesh.devices)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if failed:
            raise failed[0]
        check(not self.barrier.broken, lambda: "a rank waited for a collective that the others never reached")
        return results
