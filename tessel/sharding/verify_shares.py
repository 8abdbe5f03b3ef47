"""Of which whole value the ranks' values are which shares: what is known while their graphs are read side by side.

What moves shares (``verify_moves.py``) and what computes on them (``verify_operations.py``, ``verify_exchanges.py``)
adds to it; ``verify.py`` reads the graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from math import prod
from typing import Any

from ..ir.node import INPUT, Graph, Node, Value
from ..ir.sharding import Sharding
from ..ir.text import value_names
from ..passes.partition import Program
from ..solve.lemma import Verdict
from .verify_report import Report

__all__ = ["QUESTION", "Fault", "Held", "Shares", "parts_of"]

QUESTION = 2000  # milliseconds for one question to z3
_FREE = frozenset({"full", "iota"})


class Fault(Exception):
    """The walk ends here; the text is for the user."""


@dataclass(frozen=True)
class Held:
    """A value of the ranks' graphs: the share of a whole value. ``number``: of all its elements, whatever its share."""

    value: Value
    sharding: Sharding
    number: float | None = None


class Shares:
    """What is known of every rank's values, and how far the whole graph is computed.

    Args:
        program: the whole graph and the shardings at both ends.
        ranks: a graph a rank.
        until: when questions are no longer asked, by ``time.monotonic``.
    """

    def __init__(self, program: Program, ranks: Sequence[Graph], until: float) -> None:
        self.program, self.graph, self.mesh = program, program.graph, program.mesh
        self.ranks, self.until = ranks, until
        self.report = Report()
        self.names = value_names(self.graph)
        self.held: dict[Value, Held] = {}  # of every rank's values
        self.free: list[list[Node]] = [[] for _ in ranks]  # constants since the last operation
        self.steps = [n for n in self.graph.nodes if n.op.name not in _FREE]
        self.before: list[list[Node]] = [[]]  # the whole graph's constants before each of them
        for n in self.graph.nodes:
            if n.op.name in _FREE:
                self.before[-1].append(n)
            else:
                self.before.append([])
        self.at = 0
        self.calls = 0
        self.coming: dict[Value, tuple[int, list[Held]]] = {}  # by token: calls that nobody has waited for
        self.known: dict[Any, Verdict] = {}

    def next(self, rank: int, queue: Iterator[Node]) -> Node | None:
        """The rank's next operation; constants on the way are put by."""
        for node in queue:
            if node.op.name not in _FREE:
                return node
            self.free[rank].append(node)
        return None

    def settle_free(self, all_there: bool = True) -> None:
        """Constants of the ranks that stand for those of the whole graph; what is left over are zeros for shares.

        Args:
            all_there: those before the next operation have all been seen.
        """
        for j, whole in enumerate(self.before[self.at]):
            own = [free[j] if j < len(free) else None for free in self.free]
            if None in own and not all_there:
                return
            for rank, n in enumerate(own):
                if n is None or n.op != whole.op:
                    raise Fault(f"{self.title(whole)}: rank {rank} does not make it")
            found = self.constant(whole, [n for n in own if n is not None])
            for n in own:
                if n is not None:
                    self.held[n.out] = found

    def constant(self, whole: Node, own: Sequence[Node]) -> Held:
        """Of which share of a constant the ranks have theirs."""
        shape = whole.out.shape
        ratios = [parts_of(n, m) for n, m in zip(shape, own[0].out.shape, strict=True)]
        number = whole.attrs["value"] if whole.op.name == "full" else None
        keys = [k for k in whole.attrs if k not in ("shape", "start")]
        for rank, n in enumerate(own):
            for k in keys:
                if n.attrs.get(k) != whole.attrs[k]:
                    raise Fault(f"{self.title(whole)}: {k} is {n.attrs.get(k)} on rank {rank}, not {whole.attrs[k]}")
        for s in self.shardings(ratios, self.mesh):
            if number is not None:
                return Held(whole.out, s, float(number))
            step, first = whole.attrs.get("step", 1), whole.attrs.get("start", 0)
            size = own[0].out.shape[0]
            starts = [first + self.mesh.index(r, s.dims[0]) * size * step for r in range(len(own))]
            if starts == [n.attrs.get("start", 0) for n in own]:
                return Held(whole.out, s)
        raise Fault(f"{self.title(whole)}: the ranks' constants are no shares of it")

    def shardings(self, ratios: Sequence[int | None], axes: Sequence[str] | Mapping[str, int]) -> Iterator[Sharding]:
        """Every sharding with so many parts of each dimension."""
        choices = []
        for ratio in ratios:
            ways = [p for k in range(len(axes) + 1) for c in combinations(axes, k) for p in permutations(c)]
            choices.append([w for w in ways if prod(self.mesh[a] for a in w) == ratio and (ratio != 1 or not w)])
        for dims in product(*choices):
            if len({a for d in dims for a in d}) == sum(map(len, dims)):
                yield Sharding(dims)

    def reads(self, nodes: Sequence[Node], i: int) -> tuple[Held | None, frozenset[int]]:
        """What operand ``i`` is, and the ranks that have zeros in its place."""
        found: set[Held] = set()
        zero = set()
        for rank, n in enumerate(nodes):
            v = n.operands[i]
            held = self.held.get(v)
            if held is not None:
                found.add(held)
            elif v.op.name == "full" and v.node.attrs["value"] == 0:
                zero.add(rank)
            else:
                raise Fault(f"{self.title(nodes[rank])}: operand {i} of rank {rank} is no share of anything")
        if len(found) > 1:
            a, b = sorted(map(self.told, found))[:2]
            raise Fault(f"{self.title(nodes[0])}: some ranks read {a}, others {b}")
        return next(iter(found), None), frozenset(zero)

    def go_on(self) -> None:
        self.at += 1
        for free in self.free:
            free.clear()

    def ask(self, key: Any, prove: Callable[[], Verdict]) -> Verdict:
        if key not in self.known:
            late = time.monotonic() > self.until
            verdict = Verdict("unknown", "the time was over") if late else prove()
            if late:
                return verdict
            self.known[key] = verdict
        return self.known[key]

    def keep(self, verdict: Verdict, node: Node) -> None:
        if verdict.state != "proved":
            self.report.unproved.append(f"{self.title(node)}: {verdict.why}")

    def lengths(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Sizes, so far as a lemma tells them apart: their common part with the mesh's devices."""
        most = self.mesh.devices
        return tuple(n if n <= most else most + 1 for n in shape)

    def literals(self, node: Node) -> str:
        return str([a for a in node.args if not isinstance(a, Value)])

    def name(self, v: Value) -> str:
        return f"{v.node.attrs['name']}" if v.op is INPUT else self.names[v]

    def told(self, held: Held) -> str:
        return f"{self.name(held.value)} {held.value.type} as {held.sharding}"

    def title(self, node: Node) -> str:
        return f"{node.op.name} at {node.loc}"


def parts_of(n: int, m: int) -> int | None:
    """Into how many parts of ``m`` a size falls."""
    if n == m:
        return 1
    return n // m if m > 0 and n % m == 0 else None
