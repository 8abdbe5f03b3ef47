"""Operations whose ranks exchange pieces while they compute: that the ranks' steps are the whole pattern."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

from ..ir.node import Builder, Node, Value, map_values
from ..ir.sharding import Sharding
from ..ops.collective import units
from ..passes._exchange import EXCHANGING, exchange_of, write_exchange
from ..passes._factors import Rule, Split, layout, project, rule_of
from ..passes._places import Places
from ..passes._rank import Local
from .verify_operations import Operations
from .verify_shares import Fault, Held

__all__ = ["Exchanges"]

_FIRST = frozenset({"slice", "collective_start", "full", "iota"})  # what a ring has before its first attention


class Exchanges(Operations):
    """Rings, merges and what travels (``passes/_exchange.py``), place by place."""

    def exchanged(self, nodes: Sequence[Node], queues: Sequence[Iterator[Node]]) -> bool:
        """Take an operation whose ranks exchange pieces while they compute it, if that begins here.

        What the ranks do then has to be the whole pattern (``passes/_exchange.py``), place by place; that the pattern
        computes the operation is not proved here but tested against one device.
        """
        if self.at == len(self.steps):
            return False
        whole, seen = self.steps[self.at], [list(nodes)]
        if whole in self.patterns:
            return self.pattern(self.patterns[whole], nodes, queues)
        if whole.op.name not in EXCHANGING:
            return False
        while seen[-1] and seen[-1][0].op.name in ("slice", "collective_start"):
            if not self.of_ring(whole, seen[-1][0]):
                return False
            seen.append([n for r, q in enumerate(queues) if (n := self.next(r, q)) is not None])
        first = seen[-1]
        if len(first) != len(nodes) or any(n.op != whole.op for n in first):
            return False
        self.settle_free()
        masks = {n.out: n.args[0] for step in seen for n in step if n.op.name == "slice"}
        args = [[masks.get(a, a) if isinstance(a, Value) else a for a in n.args] for n in first]
        rule = rule_of(whole)
        flat = [[v for v in some if isinstance(v, Value)] for some in args]
        lies = []
        for i, v in enumerate(whole.operands):
            held = {self.held.get(own[i]) for own in flat}
            (one,) = held if len(held) == 1 else (None,)
            if one is None or one.value != v:
                raise Fault(f"{self.title(first[0])}: operand {i} is not {self.name(v)} on every rank")
            lies.append(one.sharding)
        split = self.joint_split(rule, lies)
        ex = exchange_of(rule, split)
        if ex is None:
            if masks:
                raise Fault(f"{self.title(first[0])}: reads part of a mask, and no ring goes through its keys")
            return False
        ring = ex.kind == "ring"
        apart = {f: a for f, a in split.items() if not (ring and f in ("s", "t"))}
        results = [layout(shape, split, rule, self.mesh) for shape in rule.dims.results]
        done: list[list[Value]] = []
        for rank, queue in enumerate(queues):
            attrs = dict(whole.attrs) | self.changed(whole, rule, apart, rank)
            expected = Builder()
            outs = write_exchange(expected, ex, whole, args[rank], attrs, Places(self.mesh, rank))
            actual: dict[Value, Value] = {}
            got = [step[rank] for step in seen]
            for i, want in enumerate(expected.nodes):
                n = got[i] if i < len(got) else self.next(rank, queue)
                same = tuple(_renamed(a, actual) for a in want.args)
                if n is None or n.op != want.op or dict(n.attrs) != dict(want.attrs) or tuple(n.args) != same:
                    where = self.title(n if n is not None else whole)
                    raise Fault(f"{where}: rank {rank} is to run {want.op.name} here, step {i} of a {ex.kind}")
                actual.update(zip(want.outs, n.outs, strict=True))
            done.append([actual[v] for v in outs])
            if rank == 0:
                self.report.collectives += sum(len(units(n)) for n in expected.nodes)
        for made in done:
            for old, new, s in zip(whole.outs, made, results, strict=True):
                assert s is not None
                self.held[new] = Held(old, s)
        self.go_on()
        self.report.operations += 1
        self.report.opaque[f"{whole.op.name} ({ex.kind})"] += 1
        return True

    def of_ring(self, whole: Node, node: Node) -> bool:
        """Whether a node of rank 0 is of a ring's first step: its part of the mask, or keys and values that go on."""
        if node not in self.order:
            return False
        later = (n for n in self.ranks[0].nodes[self.order[node] :] if n.op.name not in _FIRST)
        reads = [held.value for x in node.operands if (held := self.held.get(x)) is not None]
        at = whole.op.name == "attention_backward"  # its operands stand behind the gradient
        wanted = whole.args[1 + at : 3 + at] if node.op.name == "collective_start" else whole.args[3 + at : 4 + at]
        return reads == list(wanted) and next((n.op for n in later), None) == whole.op

    @cached_property
    def order(self) -> dict[Node, int]:
        """The places of rank 0's nodes."""
        return {n: i for i, n in enumerate(self.ranks[0].nodes)}

    @cached_property
    def patterns(self) -> dict[Node, Local]:
        """Operations that begin with something else than themselves, by how the program splits them."""
        kinds = ("sent", "halo", "states")
        found = (a for a in self.program.actions if isinstance(a, Local) and a.exchange is not None)
        return {a.node: a for a in found if a.exchange is not None and a.exchange.kind in kinds}

    @cached_property
    def owner(self) -> dict[Node, int]:
        """The rank that runs a node."""
        return {n: rank for rank, graph in enumerate(self.ranks) for n in (*graph.inputs, *graph.nodes)}

    def pattern(self, action: Local, nodes: Sequence[Node], queues: Sequence[Iterator[Node]]) -> bool:
        """Take tokens that are sent, edges or states, if their first step is here: every step has to be the whole
        pattern's, on operands that lie as the program says."""
        whole, ex, rule = action.node, action.exchange, rule_of(action.node)
        assert ex is not None
        lies = {(self.owner[x.node], h.value, h.sharding): x for x, h in self.held.items()}
        inside = [f for f, _ in ex.halos] if ex.kind == "halo" else ["t"] if ex.kind == "states" else []
        apart = {f: axes for f, axes in action.split.items() if f not in inside}
        expected, results = [], []
        for rank in range(len(queues)):
            found = iter([lies.get((rank, v, s)) for v, s in zip(rule.operands, action.reads, strict=True)])
            args = [map_values(a, lambda v, found=found: next(found)) for a in whole.args]  # type: ignore[misc]
            if any(isinstance(a, Value) and b is None for a, b in zip(whole.args, args, strict=True)):
                return False  # an operand is still on its way
            for f, axes in apart.items() if whole.op.split else ():
                size = rule.sizes[f] // prod(self.mesh[a] for a in axes)
                piece = whole.op.split(whole, f, self.mesh.index(rank, axes) * size, size)  # type: ignore[misc]
                for place, literal in piece.args.items():
                    args[place] = literal
            b = Builder()
            attrs = dict(whole.attrs) | self.changed(whole, rule, apart, rank)
            results.append(write_exchange(b, ex, whole, args, attrs, Places(self.mesh, rank)))
            expected.append(b.nodes)
        if any(not _same(own[0], n, {}) for own, n in zip(expected, nodes, strict=True)):
            return False
        self.settle_free()
        for rank, (own, first, queue) in enumerate(zip(expected, nodes, queues, strict=True)):
            actual = dict(zip(own[0].outs, first.outs, strict=True))
            for i, want in enumerate(own[1:], 1):
                n = next(queue, None)
                if n is None or not _same(want, n, actual):
                    where = self.title(n if n is not None else whole)
                    raise Fault(f"{where}: rank {rank} is to run {want.op.name} here, step {i} of {ex.kind}")
                actual.update(zip(want.outs, n.outs, strict=True))
            for old, new, s in zip(rule.results, results[rank], action.results, strict=True):
                self.held[actual[new]] = Held(old, s)
        self.report.collectives += sum(len(units(n)) for n in expected[0])
        self.go_on()
        self.report.operations += 1
        self.report.opaque[f"{whole.op.name} ({ex.kind})"] += 1
        return True

    def joint_split(self, rule: Rule, lies: Sequence[Sharding]) -> Split:
        """The mesh axes of every factor; one axis may split several."""
        found: Split = {}
        for sharding, shape in zip(lies, rule.dims.operands, strict=True):
            for term, axes in zip(shape, sharding.dims, strict=True):
                for factor, some in project(term, axes, rule.sizes, self.mesh)[0].items():
                    found.setdefault(factor, some)
        return found


def _same(want: Node, got: Node, actual: Mapping[Value, Value]) -> bool:
    """Whether a node is what a pattern says, read on the rank's own values."""
    args = tuple(_renamed(a, actual) for a in want.args)
    return got.op == want.op and dict(got.attrs) == dict(want.attrs) and tuple(got.args) == args


def _renamed(arg: Any, actual: Mapping[Value, Value]) -> Any:
    return map_values(arg, lambda v: actual.get(v, v))
