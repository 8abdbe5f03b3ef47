"""Who carries collectives out: torch.distributed, one process a rank.

What it is asked to send is counted, per device, by the formulas of ``tessel.ops.collective``.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist

from ..errors import TesselError, check
from ..frontend.compat import default_store
from ..ir.types import Loc
from ..ops.collective import payload
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
    @property
    def call(self) -> int: ...


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
        self._calls = 0
        self._begun: dict[int, tuple[str, int, _Begun]] = {}  # calls that nobody has waited for
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
        self._begun.clear()
        try:
            yield
            for name, at, _ in self._begun.values():
                raise TesselError(f"rank {self.rank} ended the {what} without waiting for {self._place(name, at)}")
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
        mine = [[what, r.kind, list(r.axes), r.tensor, r.loc.short, r.call] for what, rows in programs for r in rows]
        self._store.set(f"rows {self.rank}", json.dumps(mine))
        try:
            self._store.wait([f"rows {r}" for r in range(self.mesh.devices)], timedelta(seconds=self.seconds))
        except RuntimeError as e:
            late = ", ".join(str(r) for r in range(self.mesh.devices) if not self._store.check([f"rows {r}"]))
            raise TesselError(
                f"rank {self.rank} waited {self.seconds:.0f} s for the other ranks to lay out the model; not done: "
                f"rank {late}. Give more time (seconds=, --timeout) if they are only slow"
            ) from e
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
        return self.finish(self.start(name, (x,), (attrs,)))[0]

    def start(self, name: str, xs: Sequence[torch.Tensor], attrs: Sequence[Mapping[str, Any]]) -> int:
        """Begin collectives of one kind on this rank's shares, as one call."""
        axes, at = tuple(attrs[0]["axes"]), self._at
        for x, a in zip(xs, attrs, strict=True):
            if self._rows:
                row = self._rows[self._at] if self._at < len(self._rows) else None
                if row is None or row.kind != name or tuple(row.axes) != axes:
                    called = f"{name} over {', '.join(axes)}"
                    raise TesselError(f"rank {self.rank} calls {called} where its program has {self._place()}")
            self.sent.add(name, x, a["parts"])
            self._at += 1
        self._calls += 1
        try:
            begun = _BY_TORCH[name](self, xs, attrs)
        except RuntimeError as e:
            raise self._failed(name, at, e) from e
        self._begun[self._calls] = (name, at, begun)
        return self._calls

    def finish(self, number: int) -> tuple[torch.Tensor, ...]:
        """Wait for a call; this rank's results."""
        name, at, begun = self._begun.pop(number)
        try:
            self.wait(begun.work)
        except RuntimeError as e:
            raise self._failed(name, at, e) from e
        return tuple(begun.results())

    def _failed(self, name: str, at: int, e: RuntimeError) -> TesselError:
        return TesselError(f"rank {self.rank}: {self._place(name, at)} failed: {self._reason(e)}")

    def _place(self, name: str = "", at: int | None = None) -> str:
        """A collective of the program in words, the one that is due if none is said."""
        at = self._at if at is None else at
        if at >= len(self._rows):
            return f"{name or 'nothing'} (collective {at} of the {self._what or 'step'})"
        row = self._rows[at]
        where = f"collective {at} of the {self._what}"
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
                if work.is_completed():  # it failed, or it was done after the time to look was up
                    work.wait()
                    return
                waited += _LOOK
                if self._stopped():
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


@dataclass(frozen=True)
class _Begun:
    """A call that torch.distributed carries out: what is waited for, and then gives the results."""

    work: dist.Work | None
    results: Callable[[], list[torch.Tensor]]


Attrs: TypeAlias = "Sequence[Mapping[str, Any]]"


def _flat(xs: Sequence[torch.Tensor], own: bool = False) -> torch.Tensor:
    """The elements of tensors behind one another; ``own``: in memory of their own."""
    if len(xs) > 1:
        return torch.cat([x.reshape(-1) for x in xs])
    return (xs[0].clone(memory_format=torch.contiguous_format) if own else xs[0].contiguous()).view(-1)


def _pieces(flat: torch.Tensor, shapes: Sequence[torch.Size], own: bool = True) -> list[torch.Tensor]:
    """What ``_flat`` put together; ``own``: each in memory of its own, which ends with it."""
    if len(shapes) == 1:
        return [flat.view(shapes[0])]
    cut = zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
    return [x.view(s).clone() if own else x.view(s) for x, s in cut]


def _summable(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.uint8) if x.dtype == torch.bool else x


def _all_reduce(by: ProcessGroups, xs: Sequence[torch.Tensor], attrs: Attrs) -> _Begun:
    group, _ = by.group(tuple(attrs[0]["axes"]))
    flat, shapes, dtype = _flat([_summable(x) for x in xs], own=True), [x.shape for x in xs], xs[0].dtype
    work = dist.all_reduce(flat, _OPS[attrs[0]["combine"]], group, async_op=True)
    return _Begun(work, lambda: [x.to(dtype) for x in _pieces(flat, shapes)])


def _all_gather(by: ProcessGroups, xs: Sequence[torch.Tensor], attrs: Attrs) -> _Begun:
    group, order, _ = by.in_order(tuple(attrs[0]["axes"]))
    flat, shapes = _flat(xs), [x.shape for x in xs]
    got = [torch.empty_like(flat) for _ in order]
    work = dist.all_gather(got, flat, group, async_op=True)
    return _Begun(work, lambda: _joined([got[i] for i in order], shapes, [a["dim"] for a in attrs]))


def _joined(shares: Sequence[torch.Tensor], shapes: Sequence[torch.Size], dims: Sequence[int]) -> list[torch.Tensor]:
    """Each tensor along its dimension from the shares of all ranks, each of which holds a piece of every one."""
    cut = [_pieces(s, shapes, own=False) for s in shares]
    return [torch.cat([c[i] for c in cut], d) for i, d in enumerate(dims)]


def _chunks(xs: Sequence[torch.Tensor], dims: Sequence[int], order: Sequence[int]) -> list[list[torch.Tensor]]:
    """For each place in the group the pieces of all tensors, cut along their dimensions, for the rank there."""
    cut = [x.chunk(len(order), d) for x, d in zip(xs, dims, strict=True)]
    return [[c[order.index(place)] for c in cut] for place in range(len(order))]


def _reduce_scatter(by: ProcessGroups, xs: Sequence[torch.Tensor], attrs: Attrs) -> _Begun:
    group, order, _ = by.in_order(tuple(attrs[0]["axes"]))
    chunks = _chunks([_summable(x) for x in xs], [a["dim"] for a in attrs], order)
    given, shapes, dtype = [_flat(c) for c in chunks], [c.shape for c in chunks[0]], xs[0].dtype
    out = torch.empty_like(given[0])
    work = dist.reduce_scatter(out, given, _OPS[attrs[0]["combine"]], group, async_op=True)
    return _Begun(work, lambda: [x.to(dtype) for x in _pieces(out, shapes)])


def _all_to_all(by: ProcessGroups, xs: Sequence[torch.Tensor], attrs: Attrs) -> _Begun:
    group, order, _ = by.in_order(tuple(attrs[0]["axes"]))
    chunks = _chunks(xs, [a["split"] for a in attrs], order)
    given, shapes = torch.stack([_flat(c) for c in chunks]), [c.shape for c in chunks[0]]
    got = torch.empty_like(given)
    work = dist.all_to_all_single(got, given, group=group, async_op=True)
    return _Begun(work, lambda: _joined([got[i] for i in order], shapes, [a["join"] for a in attrs]))


def _permute(by: ProcessGroups, xs: Sequence[torch.Tensor], attrs: Attrs) -> _Begun:
    """An exchange in which most send nothing to most: unlike a send, it may be waited for a while at a time."""
    group, order, mine = by.in_order(tuple(attrs[0]["axes"]))
    sources, flat, shapes = attrs[0]["sources"], _flat(xs), [x.shape for x in xs]
    targets = [i for i, s in enumerate(sources) if s == mine]
    given, got = [0] * len(order), [0] * len(order)
    got[order[sources[mine]]] = flat.numel()
    for i in targets:
        given[order[i]] = flat.numel()
    sent, out = flat.repeat(len(targets)), torch.empty_like(flat)
    work = dist.all_to_all_single(out, sent, got, given, group=group, async_op=True)
    return _Begun(work, lambda: _pieces(out, shapes))


_BY_TORCH: dict[str, Callable[[ProcessGroups, Sequence[torch.Tensor], Attrs], _Begun]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "collective_permute": _permute,
}


__all__ = ["ProcessGroups", "Sent"]
