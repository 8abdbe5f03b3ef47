"""Operations whose ranks exchange pieces while they compute: that the ranks' steps are the whole pattern."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..ir.node import Builder, Node, Value, map_values
from ..ir.sharding import Sharding
from ..ops.collective import COLLECTIVE
from ..passes._exchange import EXCHANGING, exchange_of, write_exchange
from ..passes._factors import Rule, Split, layout, project, rule_of
from .verify_operations import Operations
from .verify_shares import Fault, Held

__all__ = ["Exchanges"]


class Exchanges(Operations):
    """Rings and merges (``passes/_exchange.py``), place by place."""

    def exchanged(self, nodes: Sequence[Node], queues: Sequence[Iterator[Node]]) -> bool:
        """Take an operation whose ranks exchange pieces while they compute it, if that begins here.

        What the ranks do then has to be the whole pattern (``passes/_exchange.py``), place by place; that the pattern
        computes the operation is not proved here but tested against one device.
        """
        if self.at == len(self.steps):
            return False
        whole, seen = self.steps[self.at], [list(nodes)]
        if whole.op.name not in EXCHANGING:
            return False
        cut = nodes[0].op.name == "slice" and self.held.get(nodes[0].operands[0])
        if cut:  # of a mask, of which each step of a ring takes a part
            if cut.value not in whole.operands:
                return False
            seen.append([n for r, q in enumerate(queues) if (n := self.next(r, q)) is not None])
        first = seen[-1]
        if len(first) != len(nodes) or any(n.op != whole.op for n in first):
            return False
        self.settle_free()
        args = [[seen[0][r].args[0] if cut and a == seen[0][r].out else a for a in n.args] for r, n in enumerate(first)]
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
            if cut:
                raise Fault(f"{self.title(first[0])}: reads part of a mask, and no ring goes through its keys")
            return False
        ring = ex.kind == "ring"
        apart = {f: a for f, a in split.items() if not (ring and f in ("s", "t"))}
        results = [layout(shape, split, rule, self.mesh) for shape in rule.dims.results]
        done: list[list[Value]] = []
        for rank, queue in enumerate(queues):
            attrs = dict(whole.attrs) | self.changed(whole, rule, apart, rank)
            expected = Builder()
            outs = write_exchange(expected, ex, whole, args[rank], attrs, self.mesh, rank)
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
                self.report.collectives += sum(n.op.name in COLLECTIVE for n in expected.nodes)
        for made in done:
            for old, new, s in zip(whole.outs, made, results, strict=True):
                assert s is not None
                self.held[new] = Held(old, s)
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


def _renamed(arg: Any, actual: Mapping[Value, Value]) -> Any:
    return map_values(arg, lambda v: actual.get(v, v))
