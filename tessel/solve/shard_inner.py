"""What a unit sends while it computes, by how it is split: ``passes/_exchange.py`` does it, here is its price.

Partial results that no sum merges are put together; keys go round a ring, tokens to their experts and back, edges to
the shares beside; of linear attention states are gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from ..ir.node import Value
from ..ops.attention import ring_steps
from ..ops.dims import window_of
from ..ops.experts import room
from .comm import MeshAxis, Step, bytes_sent
from .shard_choice import Setting, Split
from .units import Unit, place_of

__all__ = ["SUMS", "Inner"]

SUMS = ("sum", "mean")  # combines that the layouts of results price


@dataclass(frozen=True)
class Inner:
    """One unit, split so on these axes."""

    unit: Unit
    splits: Sequence[Split | None]
    axes: Sequence[MeshAxis]
    setting: Setting

    def steps(self) -> Iterator[Step]:
        """The collectives of one microbatch, those of the backward among them."""
        for axis, split in zip(self.axes, self.splits):
            if split is None:
                continue
            factor = self.unit.dims.factors[split.factor]
            if split.both == "t":
                yield from self.ring(axis)
            elif split.both == "e":
                yield from self.sent(axis)
            elif split.both == "states":
                yield from self.states(axis)
            elif factor.kind == "window":
                yield from self.edges(axis, split.factor)
            elif factor.kind == "reduce" and factor.combine not in SUMS:
                yield from self.merged(axis, split.factor)

    def step(self, kind: str, axis: MeshAxis, size: float, backward: bool = False) -> Step:
        return Step(kind, axis.name, size, bytes_sent(kind, size, axis.size), axis.seconds(kind, size), backward)

    def parts(self, factors: Collection[str], but: MeshAxis | None = None) -> int:
        """Into how many pieces axes split something that has these factors."""
        return prod(a.size for a, s in zip(self.axes, self.splits) if s and a is not but and s.factor in factors)

    def merged(self, axis: MeshAxis, factor: str) -> Iterator[Step]:
        """Results that every piece of a factor has a part of, as a softmax's are."""
        for tensor, shape in zip(self.unit.results, self.unit.dims.results, strict=True):
            if place_of(shape, factor, self.unit.sizes) is None:
                own = {f.name for term in shape for f in term}
                yield self.step("all-reduce", axis, tensor.nbytes / self.parts(own))

    def ring(self, axis: MeshAxis) -> Iterator[Step]:
        """Keys and values go round, and in the backward their gradients with them, and home."""
        keys = self.unit.uses[1:3]
        whole = sum(int(u.source.type.nbytes if u.source else u.type.nbytes) for u in keys)
        size = whole / self.parts("bhg", axis) / axis.size
        stops = ring_steps(self.unit.sizes["t"] // axis.size, axis.size, self.unit.node.attrs)
        for back in (False, True) if self.setting.train else (False,):
            hops = stops - 1 + (stops if back and stops > 1 else 0)
            yield Step("permute", axis.name, size, hops * size, hops * axis.seconds("permute", size), back)

    def edges(self, axis: MeshAxis, factor: str) -> Iterator[Step]:
        """What the shares beside a share read of it."""
        halo = window_of(self.unit.node, self.unit.dims, factor)
        assert halo is not None
        shape = self.unit.dims.operands[halo.operand]
        names = {f.name for d, term in enumerate(shape) for f in term if d != halo.dim}
        size = int(self.unit.uses[halo.operand].type.nbytes) / halo.size / self.parts(names)
        for n in (halo.before, halo.after):
            if n:
                yield self.step("permute", axis, n * size)

    def states(self, axis: MeshAxis) -> Iterator[Step]:
        """The states that shares of the tokens make, with how they decay; in the backward again, with gradients."""
        unit = self.unit
        each = self.parts("bhkv") / self.parts("t")
        sizes = [unit.results[1].nbytes / each]
        if any(isinstance(a, Value) for a in unit.node.args[3:4]):
            sizes.append(int(unit.uses[3].type.nbytes) / unit.sizes["t"] / each)
        yield from (self.step("all-gather", axis, size) for size in sizes)
        if self.setting.train:
            yield from (self.step("all-gather", axis, size, True) for size in (sizes[0], *sizes))

    def sent(self, axis: MeshAxis) -> Iterator[Step]:
        """Tokens with the numbers and weights of their experts go there, results come back; the backward sends tokens
        again, with the gradients of their results, and brings theirs and those of the weights."""
        assert self.setting.capacity is not None
        unit = self.unit
        x, *_, index, scale = unit.uses
        rows = axis.size * room(unit.sizes["t"] // self.parts("t"), unit.sizes["c"], axis.size, self.setting.capacity)
        read, made = (rows * t.type.dtype.itemsize * int(t.type.shape[-1]) for t in (x, unit.results[0]))  # type: ignore[arg-type]
        numbers, weights = (rows * u.type.dtype.itemsize * unit.sizes["c"] for u in (index, scale))
        yield from (self.step("all-to-all", axis, size) for size in (read, numbers, weights, made))
        if self.setting.train:
            back = (made, read, numbers, weights, read, weights)
            yield from (self.step("all-to-all", axis, size, True) for size in back)
