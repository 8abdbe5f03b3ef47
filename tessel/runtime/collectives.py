"""Who carries collectives out: torch.distributed, one process a rank, or one process for all ranks (tests).

Both count what they are asked to send, per device, by the formulas of ``tessel.ops.collective``.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..errors import TesselError, check
from ..frontend.compat import default_store
from ..ir.types import Loc
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

_LOOK = 1.0  # seconds between two looks at what other ranks say


class Row(Protocol):
    """A collective that a program has: ``passes.partition.Collective``."""

    @property
    def kind(self) -> str: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def tensor(self) -> str: ...
    @property
    def loc(self) -> Loc: ...


class ProcessGroups:
    """Collectives over ``torch.distributed``: one group of processes for each set of axes that is used.

    Every rank has to make the same calls in the same order, groups included.

    When a rank fails, or dies, or asks for another collective than its program has, all ranks raise: the message names
    the collective, its place in the program and the source line. On gloo a rank that waits looks every second whether
    another one has given up.

    Args:
        mesh: as many devices as there are processes.
        seconds: that a rank waits for the others in one collective.

    Raises:
        TesselError: torch.distributed is not initialised, or the mesh has another size than the world.
    """

    made = 0  # in this process: the same on every rank, since all make the same ones

    def __init__(self, mesh: Mesh, seconds: float = 300.0) -> None:
        check(
            dist.is_available() and dist.is_initialized(),
            lambda: "torch.distributed is not initialised; start with torchrun and call dist.init_process_group",
        )
        world = dist.get_world_size()
        check(
            mesh.devices == world,
            lambda: f"the mesh {mesh} has {mesh.devices} devices, the world {world} processes",
        )
        self.mesh, self.rank, self.seconds = mesh, dist.get_rank(), seconds
        self.sent = Sent()
        ProcessGroups.made += 1
        self._store = dist.PrefixStore(f"tessel/{ProcessGroups.made}", default_store())
        self._polls = dist.get_backend() == "gloo"
        self._what, self._rows, self._at = "", [], 0  # type: ignore[var-annotated]
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

    @contextmanager
    def running(self, what: str, rows: Sequence[Row]) -> Iterator[None]:
        """What runs inside is a program with these collectives, in this order; what fails in it stops all ranks."""
        self._what, self._rows, self._at = what, list(rows), 0
        try:
            yield
            if self._at < len(rows):
                raise TesselError(f"rank {self.rank} ended the {what} before {self._place()}")
        except Exception as e:
            self.give_up(str(e))
            raise

    def give_up(self, why: str) -> None:
        """Tell the other ranks to stop."""
        try:
            self._store.set("stop", f"rank {self.rank}: {why}"[:2000])
        except RuntimeError:  # its keeper is gone, which the others see for themselves
            return

    def agree(self, programs: Sequence[tuple[str, Sequence[Row]]]) -> None:
        """Raise on every rank unless all would call the same collectives in the same order.

        Raises:
            TesselError: it names the first that differs, on either rank.
        """
        mine = [[what, r.kind, list(r.axes), r.tensor, r.loc.short] for what, rows in programs for r in rows]
        self._store.set(f"rows {self.rank}", json.dumps(mine))
        self._store.wait([f"rows {r}" for r in range(self.mesh.devices)], timedelta(seconds=self.seconds))
        first = json.loads(self._store.get("rows 0"))
        for rank in range(1, self.mesh.devices):
            other = json.loads(self._store.get(f"rows {rank}"))
            if other == first:
                continue
            i = next((i for i, (a, b) in enumerate(zip(first, other)) if a != b), min(len(first), len(other)))
            said = [f"{x[i][1]} over {', '.join(x[i][2])} of {x[i][3]} at {x[i][4]}" if i < len(x) else "none"
                    for x in (first, other)]  # fmt: skip
            raise TesselError(f"collective {i} of the step is {said[0]} on rank 0 and {said[1]} on rank {rank}")

    def run(self, name: str, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
        """One collective on this rank's share."""
        if self._rows:
            row = self._rows[self._at] if self._at < len(self._rows) else None
            if row is None or row.kind != name or tuple(row.axes) != tuple(attrs["axes"]):
                called = f"{name} over {', '.join(attrs['axes'])}"
                raise TesselError(f"rank {self.rank} calls {called} where its program has {self._place()}")
        self.sent.add(name, x, attrs["parts"])
        try:
            out = _BY_TORCH[name](self, x, attrs)
        except RuntimeError as e:
            raise TesselError(f"rank {self.rank}: {self._place(name)} failed: {self._reason(e)}") from e
        self._at += 1
        return out

    def _place(self, name: str = "") -> str:
        """The collective that is due, in words."""
        if self._at >= len(self._rows):
            return f"{name or 'nothing'} (collective {self._at} of the {self._what or 'step'})"
        row = self._rows[self._at]
        where = f"collective {self._at} of the {self._what}"
        return f"{row.kind} over {', '.join(row.axes)} of {row.tensor} ({where}, at {row.loc.short})"

    def _reason(self, e: RuntimeError) -> str:
        """Why a collective failed: what another rank said, if one did, or torch's own words."""
        said = self._stopped()
        if said:
            return f"another rank stopped: {said}"
        if "onnection" in str(e):
            return f"a rank is gone ({str(e).splitlines()[0][:200]})"
        return str(e).splitlines()[0][:300]

    def _stopped(self) -> str:
        try:
            return self._store.get("stop").decode() if self._store.check(["stop"]) else ""
        except RuntimeError:
            return "rank 0 is gone"

    def wait(self, work: dist.Work | None) -> None:
        """Wait for a collective, and meanwhile for word that a rank has stopped.

        Raises:
            RuntimeError: it failed, another rank stopped, or this one has waited long enough.
        """
        if work is None:
            return
        if not self._polls:
            work.wait()
            return
        waited = 0.0
        while True:
            try:
                work.wait(timedelta(seconds=_LOOK))
                return
            except RuntimeError:
                waited += _LOOK
                if work.is_completed() or self._stopped():
                    raise
                if waited >= self.seconds:
                    raise RuntimeError(f"waited {waited:.0f} s for the other ranks") from None

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
    by.wait(dist.all_reduce(out, _OPS[attrs["combine"]], group, async_op=True))
    return out.to(x.dtype)


def _gathered(by: ProcessGroups, x: torch.Tensor, axes: tuple[str, ...]) -> list[torch.Tensor]:
    """What every member of the group gives, in the order of axes."""
    group, order, _ = by.in_order(axes)
    x = x.contiguous()
    out = [torch.empty_like(x) for _ in order]
    by.wait(dist.all_gather(out, x, group, async_op=True))
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
    by.wait(dist.reduce_scatter(out, inputs, _OPS[attrs["combine"]], group, async_op=True))
    return out.to(x.dtype)


def _all_to_all(by: ProcessGroups, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
    group, order, _ = by.in_order(tuple(attrs["axes"]))
    shares = [c.contiguous() for c in x.chunk(len(order), attrs["split"])]
    given = torch.empty((len(order), *shares[0].shape), dtype=x.dtype, device=x.device)
    for share, place in zip(shares, order, strict=True):
        given[place] = share
    got = torch.empty_like(given)
    by.wait(dist.all_to_all_single(got, given, group=group, async_op=True))
    return torch.cat([got[i] for i in order], attrs["join"])


def _permute(by: ProcessGroups, x: torch.Tensor, attrs: Mapping[str, Any]) -> torch.Tensor:
    """An exchange in which most send nothing to most: unlike a send, it may be waited for a while at a time."""
    group, order, mine = by.in_order(tuple(attrs["axes"]))
    sources = attrs["sources"]
    targets = [i for i, s in enumerate(sources) if s == mine]
    given, got = [0] * len(order), [0] * len(order)
    got[order[sources[mine]]] = x.numel()
    for i in targets:
        given[order[i]] = x.numel()
    sent = x.reshape(-1).repeat(len(targets))
    out = x.new_empty(x.shape)
    by.wait(dist.all_to_all_single(out.view(-1), sent, got, given, group=group, async_op=True))
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
