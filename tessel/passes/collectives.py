"""Collectives of a rank's program merged into fewer calls, begun early and waited for late.

    %2 = matmul(%0, %1)                              %2 = matmul(%0, %1)
    %3 = matmul(%4, %5)                              %6 = collective_start(%2)         # all_reduce, goes on from here
    %7 = all_reduce(%2)             becomes          %3 = matmul(%4, %5)
    %8 = all_reduce(%3)                              %9 = collective_start(%3)
    return %7, %8                                    %7 = collective_wait(%6, %2)
                                                     %8 = collective_wait(%9, %3)

What is computed, and its order, stay as they are: only collectives move. Three kinds are told apart, by who waits:

    ahead    of an input (a parameter that is kept apart): it may begin at once. Those of one layer are one call, as
             FSDP gathers a block (Zhao et al. 2023), and begin in the order of their use as far as memory allows
    late     read by nobody but the program's end (a gradient): calls of ``bucket_bytes``, as DDP's (Li et al. 2020),
             each as soon as its last operand is there
    now      all others: begin when their operand is there; those that one node reads at once are one call

A call carries collectives of one kind, over the same ranks, of one dtype, and its payload is the sum of theirs to the
byte. A collective whose result is at hand is left out. The order depends on nothing that differs between ranks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

from ..errors import check
from ..ir.node import INPUT, Graph, Value
from ..ir.sharding import Sharding
from ..ir.types import TensorType
from ..ops.collective import payload
from ._rank import Action, Local, Move, Start, Wait
from ._reshard import sources

__all__ = ["BUCKET", "IN_FLIGHT", "Overlap", "overlapped"]

BUCKET = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb
IN_FLIGHT = 4 * BUCKET

Held: TypeAlias = "tuple[Value, Sharding]"


@dataclass(frozen=True)
class Overlap:
    """How collectives are called.

    Attributes:
        bucket_bytes: the most that one call of several collectives carries, operands or results, whichever is more.
            0 merges nothing.
        in_flight_bytes: the most memory that calls may take because they begin before their results are read: results,
            the operands of calls that are not waited for, and the buffers of merged ones. 0 begins nothing early.
    """

    bucket_bytes: int = BUCKET
    in_flight_bytes: int = IN_FLIGHT

    def __post_init__(self) -> None:
        for name in ("bucket_bytes", "in_flight_bytes"):
            n = getattr(self, name)
            check(n >= 0, lambda name=name, n=n: f"{name}: expected a number of bytes, got {n}")  # type: ignore[misc]


def overlapped(
    graph: Graph, mesh: Mapping[str, int], actions: Sequence[Action], inputs: Sequence[Sharding | None],
    overlap: Overlap, apart: Collection[int] = (),
) -> list[Action]:  # fmt: skip
    """A program's actions with its collectives merged and begun early.

    Args:
        graph: of the whole tensors.
        mesh: axis to size.
        actions: as ``partition`` gives them, collectives one by one.
        inputs: how the graph's inputs arrive.
        overlap: how much may be merged and be on its way at once.
        apart: outputs, by number, that are not merged with others: somebody waits for them alone.
    """
    there = {(n.out, s) for n, s in zip(graph.inputs, inputs, strict=True) if s is not None}
    alone = {v for i in apart if isinstance(v := graph.outputs[i], Value)}
    run = _Run(mesh, list(_singles(actions, there)), overlap, there, alone)
    run.all()
    return _settled(run.out)


def _singles(actions: Sequence[Action], there: Iterable[Held]) -> Iterator[Move | Local]:
    """The actions with moves of one step each, without those whose result is at hand."""
    made = set(there)
    for a in actions:
        if isinstance(a, Local):
            made.update(_made(a))
            yield a
        elif isinstance(a, Move):
            for step in a.steps:
                if (a.value, step.after) not in made:
                    made.add((a.value, step.after))
                    yield Move(a.value, (step,), a.why, a.loc)


def _made(a: Local | Move) -> list[Held]:
    if isinstance(a, Move):
        return [(a.value, a.after)]
    values = (v for v in a.node.outs if isinstance(v.type, TensorType))
    return list(zip(values, a.results, strict=True))


def _reads(a: Local | Move) -> list[Held]:
    if isinstance(a, Move):
        return [(a.value, a.before)]
    return list(zip((v for v in a.node.operands if isinstance(v.type, TensorType)), a.reads, strict=True))


@dataclass(eq=False)
class _One:
    """A collective of the program.

    Attributes:
        move: one step.
        key: those with the same key may be one call.
        layer: of the line that wants it.
        index: its place in the program.
        operand, result: bytes on a device.
        when: ``ahead``, ``late`` or ``now``.
        reader: the place of the first action that reads the result.
    """

    move: Move
    key: Any
    layer: str
    index: int
    operand: int
    result: int
    when: str = "now"
    reader: int = 0

    @property
    def held(self) -> Held:
        return self.move.value, self.move.before

    @property
    def made(self) -> Held:
        return self.move.value, self.move.after

    @property
    def size(self) -> int:
        """What it adds to a call, in bytes."""
        return max(self.operand, self.result)

    def early(self, merged: bool) -> int:
        """Bytes that are taken while it is on its way."""
        own = self.result + (0 if self.when == "ahead" else self.operand)
        return own + (self.operand + self.result if merged else 0)


@dataclass(eq=False)
class _Call:
    """Collectives begun together; ``taken`` are the bytes that count for it."""

    number: int
    ones: list[_One]
    taken: int

    @property
    def ahead(self) -> bool:
        return self.ones[0].when == "ahead"


class _Run:
    """One walk over a program: what is emitted, in order, and what is on its way."""

    def __init__(
        self, mesh: Mapping[str, int], actions: Sequence[Move | Local], overlap: Overlap, there: set[Held],
        alone: set[Value],
    ) -> None:  # fmt: skip
        self.mesh, self.actions, self.overlap, self.there, self.alone = mesh, actions, overlap, set(there), alone
        self.out: list[Action] = []
        self.ones: dict[Held, _One] = {}  # by result, those that have not begun
        self.readers: dict[Held, list[_One]] = {}  # of these, by operand
        self.ready: dict[str, dict[_One, None]] = {"ahead": {}, "late": {}, "now": {}}  # their operands are there
        self.to_come: Counter[Any] = Counter()  # late ones that have not begun, by key
        self.flying: dict[_Call, None] = {}  # begun and not waited for, oldest first
        self.bringing: dict[Held, _Call] = {}
        self.ending: dict[int, list[_Call]] = {}  # ahead: where the last of their results is first read
        self.taken = 0
        self.number = 0
        self.fresh = False  # something late has become ready
        self.collect()

    def collect(self) -> None:
        """Every collective, with who waits for it."""
        reads: dict[Held, list[int]] = {}
        at: dict[int, _One] = {}
        for i, a in enumerate(self.actions):
            for held in _reads(a):
                reads.setdefault(held, []).append(i)
            if isinstance(a, Move) and _is_collective(a):
                at[i] = self.ones[a.value, a.after] = self.one(a, i)
        for i in reversed(at):
            one, own = at[i], reads.get(at[i].made, [])
            one.reader = min(own, default=len(self.actions))
            if all(j in at and at[j].when == "late" for j in own):
                one.when = "late"
                self.to_come[one.key] += 1
            elif one.move.value.op is INPUT:
                one.when = "ahead"
        for one in at.values():
            self.readers.setdefault(one.held, []).append(one)
        self.arrived(sorted(self.there & self.readers.keys(), key=lambda h: self.readers[h][0].index))

    def one(self, move: Move, index: int) -> _One:
        (step,), v = move.steps, move.value
        operand, result = (
            int(v.dtype.itemsize * prod(s.local_shape(v.shape, self.mesh)))  # type: ignore[arg-type]
            for s in (step.before, step.after)
        )
        come = sources(step.before, step.after, step.axes, self.mesh) if step.kind == "collective_permute" else ()
        key = (step.kind, step.axes, v.dtype, v.type.device, step.combine, come, v in self.alone)
        return _One(move, key, _layer(move.loc.module), index, operand, result)

    # ------------------------------------------------------------ in order

    def all(self) -> None:
        for place, a in enumerate(self.actions):
            if not _is_collective(a):  # those have their own time
                self.need(_reads(a))
                self.begin()
                self.out.append(a)
                self.arrived(_made(a))
            for call in self.ending.pop(place, ()):
                self.free(call)
        while self.ones:
            ready = next((list(some) for some in self.ready.values() if some), [])
            if ready:
                some = self.bucket(ready[0], ready)
                self.room(some)
                self.start(some)
            else:
                self.wait(next(iter(self.flying)))
        for call in list(self.flying):
            self.wait(call)

    def arrived(self, made: Iterable[Held]) -> None:
        for held in made:
            self.there.add(held)
            for one in self.readers.pop(held, ()):
                self.ready[one.when][one] = None
                self.fresh |= one.when == "late"

    def need(self, wanted: Sequence[Held]) -> None:
        """Have these values there: what brings them is begun, if it is not, and waited for."""
        for held in wanted:
            if held in self.there:
                continue
            if held not in self.bringing:
                one = self.ones[held]
                self.need([one.held])
                if one.when == "ahead":
                    some = [x for x in self.ready["ahead"] if x.layer == one.layer]
                else:
                    some = [x for x in self.ready[one.when] if x.made in wanted]
                self.start(self.bucket(one, some))
            self.wait(self.bringing[held])

    def begin(self) -> None:
        """Begin what is ready, as far as memory allows."""
        if not self.overlap.in_flight_bytes:
            return
        for one in list(self.ready["now"]):
            if one in self.ready["now"]:
                self.try_start(self.bucket(one, self.ready["now"]))
        if self.fresh:
            self.fresh = False
            for one in list(self.ready["late"]):
                if one in self.ready["late"]:
                    call = self.bucket(one, self.ready["late"])
                    there = sum(x.key == one.key for x in self.ready["late"])
                    full = there > len(call) or self.to_come[one.key] == len(call)
                    if full or sum(x.size for x in call) >= self.overlap.bucket_bytes:
                        self.try_start(call)
        while self.ready["ahead"]:  # in the order of their use: nothing is passed over
            one = next(iter(self.ready["ahead"]))
            call = self.bucket(one, [x for x in self.ready["ahead"] if x.layer == one.layer])
            if not self.fits(call):
                return
            self.start(call)

    # ------------------------------------------------------------ calls

    def bucket(self, one: _One, some: Iterable[_One]) -> list[_One]:
        """A collective and those among ``some`` that one call carries with it."""
        found = [one]
        for x in some:
            if x is not one and x.key == one.key:
                if not self.joins(found, x):
                    break
                found.append(x)
        return sorted(found, key=lambda x: x.index)

    def joins(self, call: Sequence[_One], x: _One) -> bool:
        """Whether a call with one more stays within its limit and sends what its collectives would."""
        if sum(y.size for y in call) + x.size > self.overlap.bucket_bytes:
            return False
        step = x.move.steps[0]
        parts = prod(self.mesh[a] for a in step.axes)
        each = [y.operand for y in (*call, x)]
        return payload(step.kind, sum(each), parts) == sum(payload(step.kind, n, parts) for n in each)

    def fits(self, call: Sequence[_One]) -> bool:
        return self.taken + _early(call) <= self.overlap.in_flight_bytes

    def room(self, call: Sequence[_One]) -> None:
        """Wait for the oldest calls, as far as that makes room: of those begun ahead the results would stay."""
        for old in list(self.flying):
            if self.fits(call):
                return
            if not old.ahead:
                self.wait(old)

    def try_start(self, call: Sequence[_One]) -> None:
        self.room(call)
        if self.fits(call):
            self.start(call)

    def start(self, ones: Sequence[_One]) -> None:
        call = _Call(self.number, list(ones), _early(ones))
        self.number += 1
        for one in ones:
            del self.ones[one.made], self.ready[one.when][one]
            self.to_come[one.key] -= one.when == "late"
            self.bringing[one.made] = call
        self.taken += call.taken
        self.flying[call] = None
        if call.ahead:
            self.ending.setdefault(max(one.reader for one in ones), []).append(call)
        self.out.append(Start(call.number, tuple(one.move for one in ones)))

    def wait(self, call: _Call) -> None:
        del self.flying[call]
        self.out.append(Wait(call.number, tuple(one.move for one in call.ones)))
        self.arrived(one.made for one in call.ones)
        if not call.ahead:
            self.free(call)

    def free(self, call: _Call) -> None:
        self.taken -= call.taken
        call.taken = 0


def _is_collective(a: Move | Local) -> bool:
    return isinstance(a, Move) and a.steps[0].kind != "slice"


def _early(ones: Sequence[_One]) -> int:
    return sum(one.early(len(ones) > 1) for one in ones)


def _layer(module: str) -> str:
    """The block that a module is in, itself if none.

    >>> _layer("model.layers.3.mlp.up_proj"), _layer("lm_head")
    ('model.layers.3', 'lm_head')
    """
    found = re.match(r"(.*?(?:^|\.)\d+)(\.|$)", module)
    return found[1] if found else module


def _settled(out: Sequence[Action]) -> list[Action]:
    """The actions with what each call goes on beside; one collective that is waited for at once is a plain move."""
    computed = 0
    begun: dict[int, int] = {}
    beside: dict[int, int] = {}
    for a in out:
        computed += isinstance(a, Local) and a.node.op.kind not in ("view", "generate")
        if isinstance(a, Start):
            begun[a.number] = computed
        elif isinstance(a, Wait):
            beside[a.number] = computed - begun[a.number]
    found: list[Action] = []
    for i, a in enumerate(out):
        if isinstance(a, Start):
            after = out[i + 1]
            plain = len(a.moves) == 1 and isinstance(after, Wait) and after.number == a.number
            found.append(a.moves[0] if plain else replace(a, beside=beside[a.number]))
        elif not (isinstance(a, Wait) and isinstance(found[-1], Move) and isinstance(out[i - 1], Start)):
            found.append(a)
    return found
