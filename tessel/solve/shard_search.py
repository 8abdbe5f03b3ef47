"""The cheapest sharding of a graph: exact dynamic programming over its segments, under a cap on memory.

``shard_tables.py`` gives the cost of a segment for every pair of layouts at its ends; segments that are equal up to
names share it. A chain of such tables is a shortest path.

The cap couples everything. For a price λ of a byte the sum ``seconds + λ · bytes`` has its exact optimum L(λ) by the
same elimination, and ``L(λ) - λ · cap`` is a lower bound on the time of every plan that fits (Lagrange; the best such
bound is the optimum of the linear program over mixtures of plans). The search for the best λ meets plans on both sides
of the cap. Labels (seconds, bytes) over the segments' points found on the way then give the best mix of them: layers
may differ. The gap between that and the bound is the certificate; where the segments are small the points are all that
matter (their exact frontier), and the answer is optimal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf
from typing import Any, TypeAlias

import numpy as np

from ..errors import TesselError, check
from .comm import State
from .memory import MODES
from .shard_price import Choice, Pricer
from .shard_tables import Array, Picked, Solved, Tables, Var, pareto
from .units import Param, Segment, Unit

__all__ = ["Answer", "Search", "alternatives", "search"]

_WORK = 100_000  # labels that the exact frontier of one segment may touch before points of several prices must do
_LABELS = 2000  # labels a layout in the chain's search
_NONE, _ENOUGH = 1e-9, 2e-4  # a gap that is none; one that nobody would search on for
_ROUNDS = 40  # prices to try; each halves what is unknown or better

# ---------------------------------------------------------------- the chain


@dataclass
class Points:
    """Ways through one kind of segment: seconds and bytes, ``[way, layout before, layout after]``, inf where none.

    ``values(way, before, after)`` gives the tables it is from and the value of every variable.
    """

    seconds: Array
    nbytes: Array
    values: Callable[[int, int, int], tuple[Tables, dict[Var, int]]]


@dataclass
class Answer:
    """The result of a search.

    Attributes:
        segments: what was picked, in order; what needs the least memory where nothing fits.
        seconds: of a step.
        nbytes: of parameters, their state and what lives until the backward, on one device.
        bound: no plan that fits takes less; ``price`` is the λ it was found at, in seconds a byte.
        least: the least memory that any plan needs.
        exact: whether the search compared all plans.
        took: seconds of searching.
    """

    segments: list[Picked]
    seconds: float
    nbytes: float
    bound: float
    price: float
    least: float
    exact: bool
    took: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether there is a plan within the cap."""
        return self.seconds < inf

    @property
    def gap(self) -> float:
        """How far the answer may be from the best: 0.01 is one in a hundred."""
        return max(0.0, self.seconds / self.bound - 1) if self.fits and self.bound > 0 else 0.0


Path: TypeAlias = "list[tuple[Tables, dict[Var, int], float, float]]"


@dataclass
class _Chain:
    """All segments in order, with the tables that equal ones share."""

    order: list[int]
    tables: list[list[Tables]]  # for each kind of segment, for each mode
    points: list[Points] = field(default_factory=list)
    exact: bool = True  # the points are all there are
    entry: State | None = None  # the layout that comes in; any if None

    def entries(self) -> Array:
        """Zero for every layout that may come in, inf for others."""
        states = self.tables[self.order[0]][0].ends[0]
        return np.array([0.0 if self.entry is None or s == self.entry else inf for s in states])

    def solve(self, price: float) -> _Optimum:
        """The optimum of ``seconds + price · bytes`` over the whole chain."""
        kinds = [[t.solve(price) for t in modes] for modes in self.tables]
        costs = [np.stack([s.seconds + price * s.nbytes for s in solved]) for solved in kinds]
        best = [c.min(axis=0) for c in costs]
        cost, back = self.entries(), []
        for kind in self.order:
            through = cost[:, None] + best[kind]
            back.append(np.argmin(through, axis=0))
            cost = np.min(through, axis=0)
        at, ends = int(np.argmin(cost)), []
        for come in reversed(back):
            ends.append((int(come[at]), at))
            at = ends[-1][0]
        picks = [(k, int(np.argmin(costs[k][:, e[0], e[1]])), e) for k, e in zip(self.order, reversed(ends))]
        seconds = sum(float(kinds[k][m].seconds[e]) for k, m, e in picks)
        return _Optimum(seconds, sum(float(kinds[k][m].nbytes[e]) for k, m, e in picks), self.tables, kinds, picks)

    def all_points(self) -> bool:
        """Collect the exact frontier of every kind of segment, if that is little work."""
        found: list[Points] = []
        for modes in sorted(self.tables, key=lambda m: -len(m[0].domains)):
            ways: dict[tuple[int, int], list[tuple[float, float, Tables, dict[Var, int]]]] = {}
            for tables in modes:
                table = tables.frontier(_WORK)
                if table is None:
                    return False
                for ends, labels in table.items():
                    ways.setdefault(ends, []).extend((a, b, tables, values) for a, b, values in labels)
            ways = {ends: pareto(own) for ends, own in ways.items()}
            shape = (max(map(len, ways.values()), default=1), *(len(e) for e in modes[0].ends))
            seconds, nbytes = np.full(shape, inf), np.zeros(shape)
            for (a, b), own in ways.items():
                seconds[: len(own), a, b] = [x[0] for x in own]
                nbytes[: len(own), a, b] = [x[1] for x in own]

            def values(way: int, a: int, b: int, ways: Any = ways) -> tuple[Tables, dict[Var, int]]:
                _, _, tables, own = ways[a, b][way]
                return tables, {**own, "in": a, "out": b}

            found.append(Points(seconds, nbytes, values))
        place = {id(m): i for i, m in enumerate(sorted(self.tables, key=lambda m: -len(m[0].domains)))}
        self.points = [found[place[id(m)]] for m in self.tables]
        return True

    def points_of(self, optima: Sequence[_Optimum]) -> None:
        """Collect the points that optima at several prices go through."""
        self.points = []
        for kind, modes in enumerate(self.tables):
            solved = [(t, s) for o in optima for t, s in zip(modes, o.solved[kind])]

            def values(way: int, a: int, b: int, solved: Any = solved) -> tuple[Tables, dict[Var, int]]:
                tables, s = solved[way]
                return tables, tables.values(s, (a, b))

            seconds, nbytes = (np.stack([getattr(s, n) for _, s in solved]) for n in ("seconds", "nbytes"))
            order = np.lexsort((nbytes, seconds), axis=0)
            held = np.take_along_axis(nbytes, order, axis=0)
            before = np.minimum.accumulate(held, axis=0)
            beaten = np.concatenate([np.zeros_like(held[:1], dtype=bool), held[1:] >= before[:-1]])
            np.put_along_axis(seconds, order, np.where(beaten, inf, np.take_along_axis(seconds, order, axis=0)), axis=0)
            self.points.append(Points(seconds, nbytes, values))

    def mix(self, cap: float, price: float, limit: float) -> tuple[tuple[Path, float, float] | None, bool]:
        """The fastest chain of points within ``cap`` that takes less than ``limit`` seconds, and whether all were seen.

        A point, or a label, that cannot be part of such a chain at ``price`` is left out.
        """
        costs = [p.seconds + price * p.nbytes for p in self.points]
        least = [c.min(axis=0) for c in costs]
        ahead, rest = [self.entries()], [np.zeros(least[self.order[-1]].shape[1])]
        for kind in self.order:
            ahead.append(np.min(ahead[-1][:, None] + least[kind], axis=0))
        for kind in reversed(self.order):
            rest.append(np.min(least[kind] + rest[-1][None, :], axis=1))
        rest.reverse()
        limit += price * cap
        complete = self.exact
        labels = {int(a): (np.zeros(1), np.zeros(1)) for a in np.flatnonzero(np.isfinite(ahead[0]))}
        trail: list[dict[int, tuple[Array, Array]]] = []
        for i, kind in enumerate(self.order):
            own = self.points[kind]
            through = ahead[i][None, :, None] + costs[kind] + rest[i + 1][None, None, :]
            made: dict[int, list[tuple[Array, Array, Array, Array]]] = {}
            for way, a, b in np.argwhere(through < limit):
                if a not in labels:
                    continue
                t, m = labels[a][0] + own.seconds[way, a, b], labels[a][1] + own.nbytes[way, a, b]
                keep = np.flatnonzero(t + price * m + rest[i + 1][b] < limit)
                if len(keep):
                    made.setdefault(int(b), []).append((t[keep], m[keep], keep, np.tile([way, a], (len(keep), 1))))
            labels, marks = {}, {}
            for b, parts in made.items():
                t, m, come, by = (np.concatenate([p[j] for p in parts]) for j in range(4))
                order = np.lexsort((m, t))
                order = order[_falling(m[order])]
                if len(order) > _LABELS:
                    complete = False
                    order = order[np.linspace(0, len(order) - 1, _LABELS).astype(int)]
                labels[b], marks[b] = (t[order], m[order]), (come[order], by[order])
            trail.append(marks)
        ends = [(float(t[i]), float(m[i]), b, int(i)) for b, (t, m) in labels.items() for i in np.flatnonzero(m <= cap)]
        if not ends:
            return None, complete
        seconds, nbytes, b, i = min(ends)
        path: Path = []
        for kind, marks in zip(reversed(self.order), reversed(trail)):
            way, a = map(int, marks[b][1][i])
            tables, values = self.points[kind].values(way, a, b)
            t, m = self.points[kind].seconds[way, a, b], self.points[kind].nbytes[way, a, b]
            path.append((tables, values, float(t), float(m)))
            i, b = int(marks[b][0][i]), a
        return (path[::-1], seconds, nbytes), complete


@dataclass
class _Optimum:
    """The chain at one price: what its segments' tables are, and which entries the optimum goes through."""

    seconds: float
    nbytes: float
    tables: list[list[Tables]]
    solved: list[list[Solved]]
    picks: list[tuple[int, int, tuple[int, int]]]

    def path(self) -> Path:
        out: Path = []
        for kind, mode, ends in self.picks:
            tables, s = self.tables[kind][mode], self.solved[kind][mode]
            out.append((tables, tables.values(s, ends), float(s.seconds[ends]), float(s.nbytes[ends])))
        return out


def _falling(x: Array) -> Array:
    """Where ``x`` is below all before it."""
    before = np.concatenate(([inf], np.minimum.accumulate(x)[:-1]))
    return np.flatnonzero(x < before)


class Search:
    """A search that can be asked again with another cap: prices and tables are made once.

    Args:
        segments: the kinds of segments.
        order: the chain, by their numbers; equal ones share their tables.
        pricer: prices; ``pricer.setting.remat`` says which modes there are.
        entry: the layout in which the first segment's operand comes; the best by default.
        shared: how parameters are kept that units outside of these segments use too.

    Raises:
        TesselError: there are no segments, or no way to run one of them.
    """

    def __init__(
        self, segments: Sequence[Segment], order: Sequence[int], pricer: Pricer, *, entry: State | None = None,
        shared: Mapping[Param, Any] | None = None,
    ) -> None:  # fmt: skip
        check(bool(order), lambda: "nothing to plan: no parameter flows into any result of the graph")
        started = time.perf_counter()
        choices = {u: pricer.choices(u) for s in segments for u in s.units}
        for unit, own in choices.items():
            if not own:
                asked = [f"{n} as {s}" for n, s in pricer.setting.pinned] + pricer.setting.pins.of_unit(unit)
                wanted = ", ".join(asked) or "the mesh"
                raise TesselError(f"{unit.name} ({unit.op}, {unit.node.loc.short}): no way to run it fits {wanted}")
        remat = pricer.setting.remat
        modes = (MODES if remat == "auto" else (remat,)) if pricer.setting.train else ("none",)
        self.chains: list[_Chain] = []
        for pinned in _pins(choices, shared or {}):
            tables = [[Tables(s, pricer, m, choices, pinned) for m in modes] for s in segments]
            if all(d for modes_ in tables for t in modes_ for d in t.domains.values()):
                chain = _Chain(list(order), tables, entry=entry)
                chain.exact = chain.all_points()
                self.chains.append(chain)
        check(bool(self.chains), lambda: "the units that share a parameter agree on no way to keep it")
        self._took = time.perf_counter() - started

    def answer(self, cap: float, progress: Callable[[str], None] | None = None) -> Answer:
        """The fastest plan whose parameters, state and kept activations take at most ``cap`` bytes on a device.

        ``progress`` is told in words what is being done.
        """
        started = time.perf_counter()
        answers = [_solve(chain, cap, progress or (lambda _: None)) for chain in self.chains]
        best = min(answers, key=lambda a: (a.seconds, a.nbytes))
        best.bound = min(a.bound for a in answers)
        best.least = min(a.least for a in answers)
        best.exact = all(a.exact for a in answers)
        best.took = time.perf_counter() - started + self._took
        self._took = 0.0
        return best


def alternatives(picked: Picked, pricer: Pricer, price: float) -> dict[Unit, list[tuple[Choice, float]]]:
    """For each product of a segment its other splits, and by how much each is worse than what was picked.

    Seconds, with memory at its price; what goes in and out stays, everything else in the segment may change.
    """
    segment = picked.segment
    choices = {u: pricer.choices(u) for u in segment.units}
    storage = {w.param: w.storage for c in picked.choices.values() for w in c.weights if len(w.param.users) > 1}

    def best(some: Mapping[Unit, Sequence[Choice]]) -> float:
        tables = Tables(segment, pricer, picked.mode, some, storage)
        if not all(tables.domains.values()):
            return inf
        ends = tuple(e.index(() if s is None else s) for e, s in zip(tables.ends, (picked.entry, picked.exit)))
        solved = tables.solve(price)
        return float((solved.seconds + price * solved.nbytes)[ends])

    own = best(choices)
    found: dict[Unit, list[tuple[Choice, float]]] = {}
    for unit in segment.units:
        if unit.node.op.kind not in ("contract", "attention"):
            continue
        ways = {c.splits: c for c in choices[unit] if c.splits != picked.choices[unit].splits}
        costs = [(c, best({**choices, unit: [x for x in choices[unit] if x.splits == s]})) for s, c in ways.items()]
        found[unit] = [(c, max(0.0, cost - own)) for c, cost in sorted(costs, key=lambda x: x[1]) if cost < inf][:4]
    return found


def search(segments: Sequence[Segment], order: Sequence[int], pricer: Pricer, cap: float) -> Answer:
    """One answer of a ``Search``."""
    return Search(segments, order, pricer).answer(cap)


def _pins(choices: Mapping[Unit, Sequence[Choice]], kept: Mapping[Param, Any]) -> Iterator[dict[Param, Any]]:
    """Every way to keep the parameters that several units share; ``kept`` are decided."""
    shared: dict[Param, set[Any]] = {p: {storage} for p, storage in kept.items()}
    for own in choices.values():
        here: dict[Param, set[Any]] = {}
        for c in own:
            for w in c.weights:
                if len(w.param.users) > 1:
                    here.setdefault(w.param, set()).add(w.storage)
        for p, storages in here.items():
            shared[p] = shared[p] & storages if p in shared else storages
    for pick in product(*(sorted(s) for s in shared.values())):
        yield dict(zip(shared, pick))


def _solve(chain: _Chain, cap: float, say: Callable[[str], None]) -> Answer:
    chain.exact = chain.all_points()
    fast = chain.solve(0.0)
    lean = chain.solve(1e9)  # memory alone: a byte costs more than any plan takes
    least = lean.nbytes
    if fast.nbytes <= cap:
        return _answer(fast.path(), fast.seconds, fast.nbytes, fast.seconds, 0.0, least, True)
    if least > cap:
        return _answer(lean.path(), inf, least, inf, inf, least, chain.exact)
    bound, price = fast.seconds, 0.0
    optima: list[_Optimum] = [lean]
    for _ in range(_ROUNDS):
        at = (lean.seconds - fast.seconds) / (fast.nbytes - lean.nbytes)
        found = chain.solve(at)
        optima.append(found)
        value = found.seconds + at * (found.nbytes - cap)
        if value > bound:
            bound, price = value, at
        say(f"memory at {at * 2**30:.3g} s/GiB: a step takes {bound:.4g} to {lean.seconds:.4g} s")
        over = found.nbytes > cap
        if (found.nbytes >= fast.nbytes) if over else (found.seconds >= lean.seconds):
            break
        fast, lean = (found, lean) if over else (fast, found)
    best = lean.path(), lean.seconds, lean.nbytes
    if not chain.exact:
        chain.points_of([*optima[-4:], *(chain.solve(price * f) for f in (0.7, 0.9, 1.1, 1.4))])
    complete = False
    for slack in (2e-4, 2e-3, inf):  # a good answer first: it leaves less to look at
        say(f"mixing layers: a step takes {bound:.4g} to {best[1]:.4g} s")
        if best[1] <= bound * (1 + (_NONE if chain.exact else _ENOUGH)):
            break
        mixed, complete = chain.mix(cap, price, min(best[1], bound * (1 + slack)))
        if mixed is not None and mixed[1] < best[1]:
            best = mixed
    exact = complete and slack == inf
    return _answer(*best, best[1] if exact else bound, price, least, exact)


def _answer(path: Path, seconds: float, nbytes: float, bound: float, price: float, least: float, exact: bool) -> Answer:
    picked = [t.picked(values, a, b) for t, values, a, b in path]
    return Answer(picked, seconds, nbytes, min(bound, seconds), price, least, exact)
