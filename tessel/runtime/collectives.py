"""Who carries collectives out: torch.distributed, one process a rank, or one process for all ranks (tests).

Both count what they are asked to send, per device, by the formulas of ``tessel.ops.collective``.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..errors import TesselError, check
from ..ops.collective import communicating, payload, together
from ..targets.mesh import Mesh


@dataclass
class Sent:
    """What one rank has sent: calls and bytes by collective."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, x: torch.Tensor, parts: int) -> None:
        self.calls[name] += 1
        self.bytes[name] += payload(name, x.numel() * x.element_size(), parts)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


# ---------------------------------------------------------------- torch.distributed


class ProcessGroups:
    """Collectives over ``torch.distributed``: one group of processes for each set of axes that is used.

    Every rank has to make the same calls in the same order, groups included.

    Args:
        mesh: as many devices as there are processes.

    Raises:
        TesselError: torch.distributed is not initialised, or the mesh has another size than the world.
    """

    def __init__(self, mesh: Mesh) -> None:
        check(
            dist.is_available() and dist.is_initialized(),
            lambda: "torch.distributed is not initialised; start with torchrun and call dist.init_process_group",
        )
        world = dist.get_world_size()
        check(
            mesh.devices == world,
            lambda: f"the mesh {mesh} has {mesh.devices} devices, the world {world} processes",
        )
        self.mesh, self.rank = mesh, dist.get_rank()
        self.sent = Sent()
        self.groups: dict[tuple[str, ...], tuple[dist.ProcessGroup, tuple[int, ...]]] = {}

    def group(self, axes: tuple[str, ...]) -> tuple[dist.ProcessGroup, tuple[int, ...]]:
        """The group of this rank along axes, and its ranks in the order of the axes, the first the slowest."""
        known = self.groups.get(axes)
        if known is None:
            for ranks in self.mesh.groups(*axes):
                made = dist.new_group(sorted(ranks))  # all ranks make all groups: that is the rule of new_group
                if self.rank in ranks:
                    known = (made, ranks)
            assert known is not None
            self.groups[axes] = known
        return known

    def prepare(self, sets: Sequence[tuple[str, ...]]) -> None:
        """Make the groups of all these sets of axes, in this order, before anything runs."""
        for axes in sets:
            self.group(axes)

    def check_random_state(self) -> None:
        """Raise on every rank unless all would draw the same random numbers."""
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
        mine = torch.tensor([zlib.crc32(bytes(state.tolist()))], device=device)
        all_ = [torch.empty_like(mine) for _ in range(self.mesh.devices)]
        dist.all_gather(all_, mine)
        apart = [r for r, x in enumerate(all_) if int(x) != int(all_[0])]
        check(
            not apart,
            lambda: (
                f"the model draws random numbers, and the random state of rank {apart[0]} is not that of rank 0: call "
                "torch.manual_seed with one seed on every rank before distribute"
            ),
        )

    def run(self, name: str, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
        """One collective on this rank's share."""
        self.sent.add(name, x, attrs["parts"])
        return _BY_TORCH[name](self, x, attrs)

    def in_order(self, axes: tuple[str, ...]) -> tuple[dist.ProcessGroup, list[int], int]:
        """The group, for each member in the order of axes its place in the group, and this rank's own."""
        group, ranks = self.group(axes)
        places = sorted(ranks)
        order = [places.index(r) for r in ranks]
        return group, order, ranks.index(self.rank)


_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN} if dist.is_available() else {}


def _all_reduce(by: ProcessGroups, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
    group, _ = by.group(tuple(attrs["axes"]))
    out = x.to(torch.uint8) if x.dtype == torch.bool else x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, _OPS[attrs["combine"]], group)
    return out.to(x.dtype)


def _gathered(by: ProcessGroups, x: torch.Tensor, axes: tuple[str, ...]) -> list[torch.Tensor]:
    """What every member of the group gives, in the order of axes."""
    group, order, _ = by.in_order(axes)
    x = x.contiguous()
    out = [torch.empty_like(x) for _ in order]
    dist.all_gather(out, x, group)
    return [out[i] for i in order]


def _all_gather(by: ProcessGroups, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
    return torch.cat(_gathered(by, x, tuple(attrs["axes"])), attrs["dim"])


def _reduce_scatter(by: ProcessGroups, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
    group, order, _ = by.in_order(tuple(attrs["axes"]))
    wide = x.to(torch.uint8) if x.dtype == torch.bool else x
    shares = [c.contiguous() for c in wide.chunk(len(order), attrs["dim"])]
    inputs = [shares[0]] * len(order)
    for share, place in zip(shares, order, strict=True):
        inputs[place] = share
    out = torch.empty_like(shares[0])
    dist.reduce_scatter(out, inputs, _OPS[attrs["combine"]], group)
    return out.to(x.dtype)


def _all_to_all(by: ProcessGroups, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
    group, order, _ = by.in_order(tuple(attrs["axes"]))
    shares = [c.contiguous() for c in x.chunk(len(order), attrs["split"])]
    given = torch.empty((len(order), *shares[0].shape), dtype=x.dtype, device=x.device)
    for share, place in zip(shares, order, strict=True):
        given[place] = share
    got = torch.empty_like(given)
    dist.all_to_all_single(got, given, group=group)
    return torch.cat([got[i] for i in order], attrs["join"])


def _permute(by: ProcessGroups, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
    _, ranks = by.group(tuple(attrs["axes"]))
    mine = ranks.index(by.rank)
    x = x.contiguous()
    out = torch.empty_like(x)
    sources = attrs["sources"]
    targets = [i for i, s in enumerate(sources) if s == mine]
    if sources[mine] == mine:
        out.copy_(x)
    calls = [dist.P2POp(dist.isend, x, ranks[i]) for i in targets if i != mine]
    if sources[mine] != mine:
        calls.append(dist.P2POp(dist.irecv, out, ranks[sources[mine]]))
    for work in dist.batch_isend_irecv(calls) if calls else ():
        work.wait()
    return out


_BY_TORCH: dict[str, Callable[[ProcessGroups, torch.Tensor, Mapping[str, Any]], torch.Tensor]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "collective_permute": _permute,
}


# ---------------------------------------------------------------- all ranks in one process


class _Meeting:
    """One rank of a mesh that lives in threads; collectives meet at a barrier."""

    def __init__(self, world: InProcess, rank: int) -> None:
        self.world, self.rank, self.sent = world, rank, Sent()

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


__all__ = ["InProcess", "ProcessGroups", "Sent"]
