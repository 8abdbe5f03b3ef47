"""Collectives and slices of the ranks' programs: which share of the same value a share becomes, proved by z3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from ..ir.node import Builder, Node
from ..ir.sharding import Sharding
from ..ops.collective import COLLECTIVE, units
from ..solve.lemma import Verdict, moved
from .verify_shares import QUESTION, Fault, Held, Shares, parts_of

__all__ = ["Moves"]


class Moves(Shares):
    """Proofs of what only moves shares."""

    def is_share(self, nodes: Sequence[Node]) -> bool:
        """Whether slices cut the ranks' shares, and are none of the whole graph."""
        if nodes[0].op.name != "slice":
            return False
        if self.at == len(self.steps) or self.steps[self.at].op.name != "slice":
            return True
        whole, own = self.steps[self.at].attrs, [n.attrs for n in nodes]
        return any(a.get(k) != whole.get(k) for a in own for k in ("start", "size", "step") if k in whole)

    def move(self, nodes: Sequence[Node]) -> None:
        first = nodes[0]
        self.settle_free(all_there=False)
        held, zero = self.reads(nodes, 0)
        if held is None or zero:
            raise Fault(f"{self.title(first)}: moves zeros")
        shape = tuple(held.value.shape)
        attrs = {r: n.attrs for r, n in enumerate(nodes)}
        if first.op.name in COLLECTIVE:
            for r, n in enumerate(nodes):
                if dict(n.attrs) != dict(first.attrs):
                    raise Fault(f"{self.title(first)}: rank {r} calls it otherwise than rank 0: they would wait")
            parts = prod(self.mesh.get(a, 0) for a in first.attrs["axes"])
            if parts != first.attrs["parts"]:
                raise Fault(f"{self.title(first)}: {first.attrs['parts']} parts over axes of {parts} devices")
        last = Verdict("refuted", "no sharding fits")
        for after in self.goals(first, held, shape):
            key = (first.op.name, held.sharding, after, self.lengths(shape), self.frozen(attrs, first, shape))
            verdict = self.ask(
                key, partial(moved, first.op.name, held.sharding, after, shape, attrs, self.mesh, QUESTION)
            )
            if verdict.state != "refuted":
                self.keep(verdict, first)
                for n in nodes:
                    self.held[n.out] = Held(held.value, after, held.number)
                return
            last = verdict
        over = f" over {', '.join(first.attrs['axes'])}" if "axes" in first.attrs else ""
        raise Fault(f"{self.title(first)}: {first.op.name}{over} of {self.told(held)} makes no share of it: {last.why}")

    def begin(self, nodes: Sequence[Node]) -> None:
        """A call: what each of its collectives brings is nobody's to read until it is waited for."""
        first = nodes[0]
        for r, n in enumerate(nodes):
            if dict(n.attrs) != dict(first.attrs):
                raise Fault(f"{self.title(first)}: rank {r} begins another call than rank 0: they would wait")
        brings: list[list[Held]] = [[] for _ in nodes]
        for parts in zip(*map(units, nodes), strict=True):
            alone = [Builder(loc=n.loc).node(COLLECTIVE[name], x, **attrs) for n, (name, x, attrs) in zip(nodes, parts)]
            self.move(alone)
            for own, n in zip(brings, alone, strict=True):
                own.append(self.held.pop(n.out))
        self.calls += 1
        for own, n in zip(brings, nodes, strict=True):
            self.coming[n.out] = (self.calls, own)

    def end(self, nodes: Sequence[Node]) -> None:
        """The results of a call, which every rank waits for at the same place."""
        numbers = set()
        for r, n in enumerate(nodes):
            token, *operands = n.args
            number, brought = self.coming.pop(token, (0, []))
            same = tuple(operands) == token.node.args and dict(n.attrs) == dict(token.node.attrs)
            if not number or not same:
                raise Fault(f"{self.title(n)}: rank {r} waits for a call that was not begun so, or waits twice")
            numbers.add(number)
            self.held.update(zip(n.outs, brought, strict=True))
        if len(numbers) > 1:
            raise Fault(f"{self.title(nodes[0])}: ranks wait for different calls")

    def goals(self, node: Node, held: Held, shape: Sequence[int]) -> Iterator[Sharding]:
        """The shardings that a collective could bring its operand to."""
        s, a = held.sharding, node.attrs
        axes: tuple[str, ...] = tuple(a.get("axes", ()))
        rest = tuple(p for p in s.partial if p[0] not in axes)
        name = node.op.name
        reduced = name in ("all_reduce", "reduce_scatter")
        if reduced and len(rest) + len(axes) != len(s.partial):
            return  # an axis that nothing is partial over: copies would be added up
        if name == "all_reduce":
            yield Sharding(s.dims, rest)
        elif name == "reduce_scatter":
            yield Sharding(s.dims, rest).with_dim(a["dim"], s.dims[a["dim"]] + axes)
        elif name in ("all_gather", "all_to_all"):
            d = a["dim"] if name == "all_gather" else a["join"]
            if s.dims[d][len(s.dims[d]) - len(axes) :] == axes:
                after = s.with_dim(d, s.dims[d][: len(s.dims[d]) - len(axes)])
                yield after if name == "all_gather" else after.with_dim(a["split"], s.dims[a["split"]] + axes)
        elif name == "slice":
            d = a["dim"]
            ratio = parts_of(s.local_shape(tuple(shape), self.mesh)[d], a["size"])
            unused = [x for x in self.mesh if x not in s.axes and x not in dict(s.partial)]
            for found in self.shardings([ratio], unused):
                yield s.with_dim(d, s.dims[d] + found.dims[0])
        else:
            mine = [x for x in self.mesh if x in {*axes, *s.axes} and x not in dict(s.partial)]
            for found in self.shardings(list(s.parts(self.mesh)), mine):
                yield Sharding(found.dims, s.partial)

    def frozen(self, attrs: Mapping[int, Mapping[str, Any]], node: Node, shape: Sequence[int]) -> Any:
        if node.op.name != "slice":
            return tuple(sorted((k, str(v)) for k, v in node.attrs.items()))
        return node.attrs["dim"], tuple(a["start"] // max(a["size"], 1) for a in attrs.values()), tuple(shape)
