"""The costs of one segment of a graph, as tables over choices and layouts, and their exact elimination.

The variables are the choice of every unit and the layout in which a tensor that several units read, or that lives
until the backward, is kept. Costs are tables over one or two of them, in seconds and in bytes. Eliminating variables
one by one leaves a table over the layouts at the segment's two ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, prod
from typing import Any, TypeAlias

import numpy as np

from .comm import Layouts, P, State
from .memory import Kept, kept_of
from .shard_price import Choice, Pricer
from .units import Param, Segment, Tensor, Unit

__all__ = ["Form", "Picked", "Solved", "Tables", "pareto"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Var: TypeAlias = object  # a Unit, a Tensor, "in" or "out"


@dataclass(frozen=True)
class Form:
    """How a tensor is kept for its readers: the layout, and whether its source is what lives until the backward."""

    state: State
    source: bool = False


@dataclass
class Factor:
    """A cost over variables: seconds and bytes for every combination of their values."""

    vars: tuple[Var, ...]
    seconds: Array
    nbytes: Array


@dataclass
class Picked:
    """What was chosen for one segment.

    Attributes:
        choices: of every unit.
        forms: of every tensor that has a choice of its own.
        seconds, nbytes: the segment's part of a step's time and of a device's memory.
    """

    segment: Segment
    mode: str
    choices: dict[Unit, Choice]
    forms: dict[Tensor, Form]
    entry: State | None
    exit: State | None
    seconds: float
    nbytes: float


class Tables:
    """The costs of one segment in one mode, and their elimination.

    ``pinned`` fixes how shared parameters lie.
    """

    def __init__(
        self, segment: Segment, pricer: Pricer, mode: str, choices: Mapping[Unit, Sequence[Choice]],
        pinned: Mapping[Param, Any],
    ) -> None:  # fmt: skip
        self.segment, self.pricer, self.mode = segment, pricer, mode
        self._times = pricer.setting.microbatches
        self._held = pricer.setting.in_flight
        self.kept: Kept = kept_of(segment.units, segment.before, mode) if pricer.setting.train else _NOTHING
        self.domains: dict[Var, list[Any]] = {}
        self.factors: list[Factor] = []
        self.ends = (_states(pricer, segment.before), _states(pricer, segment.after))
        self.domains["in"], self.domains["out"] = self.ends
        for unit in segment.units:
            fits = [c for c in choices[unit] if all(pinned.get(w.param, w.storage) == w.storage for w in c.weights)]
            self.domains[unit] = fits
            self._unit(unit, fits)
        if segment.before is not None:
            self._before(segment.before)
        for unit in segment.units:
            for i, tensor in enumerate(unit.results):
                self._tensor(tensor, i)
        self._order = self._elimination_order()

    # ---------------------------------------------------------------- costs

    def _unit(self, unit: Unit, choices: Sequence[Choice]) -> None:
        k = self._times
        again = k if unit in self.kept.again else 0
        seconds = [
            c.seconds(k) + again * (c.forward + sum(s.seconds for s in c.inner if not s.backward)) for c in choices
        ]
        nbytes = [c.nbytes + self._dead_ends(unit, c) for c in choices]
        self.factors.append(Factor((unit,), np.array(seconds), np.array(nbytes)))

    def _dead_ends(self, unit: Unit, choice: Choice) -> float:
        """Bytes of results that nobody in the graph reads but the backward does."""
        alone = [(t, s) for t, s in zip(unit.results, choice.outs) if not t.users and t in self.kept.saved]
        return self._held * sum(self.pricer.layouts(t).local_bytes(s) for t, s in alone)

    def _before(self, tensor: Tensor) -> None:
        layouts = self.pricer.layouts(tensor)
        if tensor in self.kept.saved:
            held = self._held * np.array([layouts.local_bytes(s) for s in self.ends[0]])
            self.factors.append(Factor(("in",), np.zeros(len(held)), held))
        self._readers(tensor, "in", [Form(s) for s in self.ends[0]])
        if self.segment.after is tensor:
            self._add(("in", "out"), self._times * self._rows(layouts, self.ends[0], self.ends[1]))

    def _tensor(self, tensor: Tensor, result: int) -> None:
        layouts = self.pricer.layouts(tensor)
        own = [c.outs[result] for c in self.domains[tensor.unit]]
        inside = {u for u, _ in tensor.users} & set(self.segment.units)
        if tensor is self.segment.after:
            self._add((tensor.unit, "out"), self._times * self._rows(layouts, own, self.ends[1]))
            if inside:
                self._readers(tensor, "out", [Form(s) for s in self.ends[1]])
        elif len(tensor.users) == 1 and tensor not in self.kept.saved and not self.pricer.is_pinned(tensor):
            user, i = tensor.users[0]
            if all(use.source is not tensor for j, use in enumerate(user.uses) if j != i):
                needs = [c.needs[i] for c in self.domains[user]]
                cost = self._rows(layouts, own, needs) + self._redo(tensor, layouts, own, needs)
                self._add((tensor.unit, user), self._times * cost)
        elif tensor.users:
            self._kept_tensor(tensor, layouts, own)

    def _kept_tensor(self, tensor: Tensor, layouts: Layouts, own: Sequence[State]) -> None:
        """A tensor with a form of its own: one its producer makes or a reader asks for."""
        asked: list[State | None] = [c.needs[i] for user, i in tensor.users for c in self.domains[user]]
        if self.pricer.is_pinned(tensor):  # nobody else may want what the user asked for
            asked = [*layouts.states]
        states = [s for s in dict.fromkeys([*own, *asked]) if s is not None and P not in s]
        states = [s for s in states if self.pricer.asked(tensor, s)]
        saved = tensor in self.kept.saved
        forms = [Form(s) for s in states] + [Form(s, True) for s in states if saved]
        self.domains[tensor] = forms
        seconds = self._rows(layouts, own, [f.state for f in forms])
        nbytes = np.zeros_like(seconds)
        ahead = self._forward(layouts, own, [f.state for f in forms])
        late = np.maximum(0.0, ahead - self._hidden(tensor))
        if tensor in self.kept.redone:
            seconds = seconds + late
        if saved:
            held = self._held * np.array([layouts.local_bytes(s) for s in own])[:, None]
            made = self._held * np.array([layouts.local_bytes(f.state) for f in forms])[None, :]
            source = np.array([f.source for f in forms])[None, :]
            partial = np.array([P in s for s in own])[:, None]
            seconds = np.where(source, seconds + late + np.where(partial | (ahead == 0), inf, 0.0), seconds)
            nbytes = np.where(source, held, made)
        self._add((tensor.unit, tensor), self._times * seconds, nbytes)
        self._readers(tensor, tensor, forms)

    def _readers(self, tensor: Tensor, var: Var, forms: Sequence[Form]) -> None:
        layouts = self.pricer.layouts(tensor)
        states = [f.state for f in forms]
        for user, i in tensor.users:
            if user in self.domains:
                needs = [c.needs[i] for c in self.domains[user]]
                cost = self._rows(layouts, states, needs)
                if tensor in self.kept.saved or tensor in self.kept.redone:
                    cost = cost + self._forward(layouts, states, needs)  # the copy that was read is gone
                self._add((var, user), self._times * cost)

    def _hidden(self, tensor: Tensor) -> float:
        """Seconds of work that a second gather of a product's operand hides behind: the other operand's gradient
        does not need it (Megatron's sequence parallelism, arXiv 2205.05198, section 4.2.2)."""
        products = [u for u, _ in tensor.users if u.node.op.kind == "contract"]
        return sum(self.pricer.least_work(u) for u in products)

    def _redo(self, tensor: Tensor, layouts: Layouts, a: Sequence[Any], b: Sequence[Any]) -> Array | float:
        return self._forward(layouts, a, b) if tensor in self.kept.redone else 0.0

    @staticmethod
    def _rows(layouts: Layouts, a: Sequence[Any], b: Sequence[Any]) -> Array:
        return layouts.total[np.ix_([layouts.number[s] for s in a], [layouts.number[s] for s in b])]

    @staticmethod
    def _forward(layouts: Layouts, a: Sequence[Any], b: Sequence[Any]) -> Array:
        return layouts.forward[np.ix_([layouts.number[s] for s in a], [layouts.number[s] for s in b])]

    def _add(self, vars_: tuple[Var, ...], seconds: Array, nbytes: Array | None = None) -> None:
        self.factors.append(Factor(vars_, seconds, np.zeros_like(seconds) if nbytes is None else nbytes))

    # ---------------------------------------------------------------- elimination

    def _elimination_order(self) -> list[Var]:
        """Greedy: the variable whose elimination makes the smallest table."""
        around: dict[Var, set[Var]] = {v: set() for v in self.domains}
        for f in self.factors:
            for v in f.vars:
                around[v] |= set(f.vars) - {v}
        size = {v: len(d) for v, d in self.domains.items()}
        number = {v: i for i, v in enumerate(self.domains)}
        left = [v for v in self.domains if v not in ("in", "out")]
        order = []
        while left:
            best = min(left, key=lambda v: (prod(size[w] for w in around[v]) * size[v], number[v]))
            left.remove(best)
            order.append(best)
            near = around.pop(best)
            for w in near:
                around[w] |= near - {w}
                around[w].discard(best)
        return order

    def solve(self, price: float) -> Solved:
        """The optimum of ``seconds + price · bytes`` for every pair of layouts at the ends."""
        factors = list(self.factors)
        trace: list[tuple[Var, tuple[Var, ...], Array]] = []
        for var in self._order:
            mine = [f for f in factors if var in f.vars]
            factors = [f for f in factors if var not in f.vars]
            scope = tuple(dict.fromkeys(v for f in mine for v in f.vars if v is not var))
            seconds, nbytes = self._joined(mine, (*scope, var))
            picks = np.argmin(seconds + price * nbytes, axis=-1)
            factors.append(Factor(scope, _at(seconds, picks), _at(nbytes, picks)))
            trace.append((var, scope, picks))
        return Solved(*self._joined(factors, ("in", "out")), trace)

    def _joined(self, factors: Sequence[Factor], scope: tuple[Var, ...]) -> tuple[Array, Array]:
        shape = [len(self.domains[v]) for v in scope]
        seconds, nbytes = np.zeros(shape), np.zeros(shape)
        place = {v: i for i, v in enumerate(scope)}
        for f in factors:
            order = sorted(range(len(f.vars)), key=lambda i: place[f.vars[i]])
            wide = [1] * len(scope)
            for v in f.vars:
                wide[place[v]] = len(self.domains[v])
            seconds += f.seconds.transpose(order).reshape(wide)
            nbytes += f.nbytes.transpose(order).reshape(wide)
        return seconds, nbytes

    def values(self, solved: Solved, ends: tuple[int, int]) -> dict[Var, int]:
        """The value of every variable that gave an entry of the table."""
        found: dict[Var, int] = {"in": ends[0], "out": ends[1]}
        for var, scope, picks in reversed(solved.trace):
            found[var] = int(picks[tuple(found[v] for v in scope)])
        return found

    def frontier(self, limit: int) -> dict[tuple[int, int], list[tuple[float, float, dict[Var, int]]]] | None:
        """All undominated (seconds, bytes) for every pair of ends; None where that takes more than ``limit`` labels."""
        tables: list[tuple[tuple[Var, ...], dict[tuple[int, ...], list[tuple[float, float, dict[Var, int]]]]]] = []
        for f in self.factors:
            entries: dict[tuple[int, ...], list[tuple[float, float, dict[Var, int]]]] = {}
            for row in np.argwhere(np.isfinite(f.seconds)):
                key = tuple(int(i) for i in row)
                entries[key] = [(float(f.seconds[key]), float(f.nbytes[key]), {})]
            tables.append((f.vars, entries))
        work = 0
        for var in [*self._order, None]:
            mine = [t for t in tables if var is None or var in t[0]]
            tables = [t for t in tables if var is not None and var not in t[0]]
            keep = ("in", "out") if var is None else tuple(dict.fromkeys(v for s, _ in mine for v in s if v is not var))
            out: dict[tuple[int, ...], list[tuple[float, float, dict[Var, int]]]] = {}
            for values in product(*(range(len(self.domains[v])) for v in keep)):
                at = dict(zip(keep, values))
                labels: list[tuple[float, float, dict[Var, int]]] = []
                for x in range(len(self.domains[var])) if var is not None else (0,):
                    at[var] = x
                    some = [(0.0, 0.0, {var: x} if var is not None else {})]
                    for scope, entries in mine:
                        more = entries.get(tuple(at[v] for v in scope), [])
                        work += len(some) * len(more) + 1
                        some = [(a[0] + b[0], a[1] + b[1], {**a[2], **b[2]}) for a in some for b in more]
                        if not some:
                            break
                    labels += some
                    if work > limit:
                        return None
                if labels:
                    out[values] = pareto(labels)
            tables.append((keep, out))
        return tables[0][1]  # type: ignore[return-value]

    def picked(self, values: Mapping[Var, int], seconds: float, nbytes: float) -> Picked:
        """The values of variables as what they stand for."""
        choices = {u: self.domains[u][values[u]] for u in self.segment.units}
        forms = {t: self.domains[t][i] for t, i in values.items() if isinstance(t, Tensor)}
        ends = [None if t is None else e[values[n]] for t, e, n in zip(
            (self.segment.before, self.segment.after), self.ends, ("in", "out"))]  # fmt: skip
        return Picked(self.segment, self.mode, choices, forms, ends[0], ends[1], seconds, nbytes)


_NOTHING = Kept(frozenset(), frozenset(), frozenset())


@dataclass
class Solved:
    """The table of one segment at one price: seconds and bytes by the layouts at its ends."""

    seconds: Array
    nbytes: Array
    trace: list[tuple[Var, tuple[Var, ...], Array]]


def _states(pricer: Pricer, tensor: Tensor | None) -> list[State]:
    """What a tensor between segments may lie like."""
    if tensor is None:
        return [()]
    return [s for s in pricer.layouts(tensor).states if P not in s and pricer.asked(tensor, s)]


def _at(table: Array, picks: Array) -> Array:
    return np.take_along_axis(table, picks[..., None], axis=-1)[..., 0]


def pareto(labels: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The labels (seconds, bytes, ...) that no other beats, the fastest first."""
    out, least = [], inf
    for label in sorted(labels, key=lambda x: (x[0], x[1])):
        if label[1] < least:
            out.append(label)
            least = label[1]
    return out
