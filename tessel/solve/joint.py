"""Tiles of several kernels chosen together: a shared stage, a fused chain's common tile, split-K, shards.

    parts = [part_of("qk", table_a), part_of("pv", table_b)]
    rules = [Rule("common tile", "qk.BM == pv.BM"), Rule("one block", "qk.shared + pv.shared <= 232448")]
    solve_joint(parts, rules).rows            # {"qk": {...}, "pv": {...}}, the cheapest that satisfies all rules

Each part is a table of its tiles, so z3 decides which row each part takes and multiplies nothing itself: a rule that is
linear goes to it as a sum, any other as the table of the combinations that satisfy it. Rows that no rule tells apart
are one choice, the cheapest of them, which leaves few. When nothing satisfies all rules, ``core.py`` puts the unsat
core into words. z3 is imported on first use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import TesselError, did_you_mean
from .rules import CheckedRule, Rule, check_rules
from .solver import Table

__all__ = ["Infeasible", "Part", "Plan", "Rule", "part_of", "solve_joint"]

_FEW = 4096  # combinations up to which a linear rule is tabulated too
_MANY = 2_000_000  # and any other rule at most


@dataclass(frozen=True)
class Part:
    """One kernel's tiles.

    Attributes:
        name: an identifier, as rules write it.
        rows: column -> values, one a tile.
        cost: of each tile, whole numbers (nanoseconds).
        broken: name of a constraint of the kernel's own -> the tiles that break it.
        explain: words for a constraint and a tile that breaks it.
        excess: by how much each tile breaks a constraint, to show the one that comes nearest.
    """

    name: str
    rows: Mapping[str, np.ndarray]
    cost: np.ndarray
    broken: Mapping[str, np.ndarray] = field(default_factory=dict)
    explain: Callable[[str, int], str] | None = None
    excess: Callable[[str], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise TesselError(f"joint problem: {self.name!r} is no identifier, rules could not name it")

    def __len__(self) -> int:
        return len(self.cost)


@dataclass(frozen=True)
class Plan:
    """The answer: a row for each part, its number, and the total cost."""

    rows: Mapping[str, Mapping[str, int]]
    cost: int
    picks: Mapping[str, int]


class Infeasible(TesselError):
    """Nothing satisfies all rules.

    Attributes:
        core: the constraints that clash, none of which can be left out: a rule's name, or ``part: constraint``.
    """

    def __init__(self, core: Sequence[str], words: Sequence[str]) -> None:
        self.core = tuple(core)
        super().__init__("no tiles satisfy all constraints together: " + "; ".join(words))


def part_of(name: str, table: Table, given: Mapping[str, int] | None = None) -> Part:
    """A part out of a solver's table: knobs, ``shared``, ``registers`` and ``per_unit`` are its columns.

    ``given`` forces knobs; each is a constraint of its own, ``given BM``, so that a core can name it.
    """
    n = len(table)
    cost = np.zeros(n, dtype=np.int64)  # of tiles that no constraint rules out
    if len(table.rows):
        cost[table.rows] = np.round(table.times["total"] * 1e9).astype(np.int64)
    columns = {k: np.asarray(v) for k, v in table.knobs.items()}
    for extra in ("shared", "registers", "per_unit"):
        columns[extra] = np.ceil(np.broadcast_to(np.asarray(table.values[extra], dtype=float), (n,))).astype(np.int64)
    broken = {c.name: mask for c, mask in table.broken.items()}
    for knob, value in (given or {}).items():
        if knob not in table.knobs:
            raise TesselError(f"{name}: no knob {knob!r}; {did_you_mean(knob, table.knobs)}")
        broken[f"given {knob}"] = table.knobs[knob] != value
    by_name = {c.name: c for c in table.constraints}

    def explain(constraint: str, row: int) -> str:
        if constraint in by_name:
            return by_name[constraint].explain(table.values, row)
        knob = constraint.removeprefix("given ")
        return f"{knob}={(given or {})[knob]} was asked for"

    def excess(constraint: str) -> np.ndarray:
        if constraint in by_name:
            return by_name[constraint].excess(table.values, n)
        knob = constraint.removeprefix("given ")
        return np.abs(table.knobs[knob] - (given or {})[knob])

    return Part(name, columns, cost, broken, explain, excess)


@dataclass(frozen=True)
class Classes:
    """The rows of a part that no rule tells apart, as one: ``row`` is the cheapest, the first of equal ones."""

    columns: Mapping[str, np.ndarray]
    cost: np.ndarray
    row: np.ndarray
    broken: Mapping[str, np.ndarray]

    def only(self, keep: np.ndarray) -> Classes:
        """Some of them."""
        columns, broken = ({n: v[keep] for n, v in m.items()} for m in (self.columns, self.broken))
        return Classes(columns, self.cost[keep], self.row[keep], broken)


def classes_of(part: Part, rules: Sequence[CheckedRule], keep_broken: bool = False) -> Classes:
    """A part's rows as the rules see them, without those that break the part's own constraints (or with them)."""
    used = list(dict.fromkeys(c for r in rules for c in r.used.get(part.name, ())))
    broken = part.broken if keep_broken else {}
    ok = np.ones(len(part), dtype=bool)
    for mask in () if keep_broken else part.broken.values():
        ok &= ~mask
    rows = np.flatnonzero(ok)
    rows = rows[np.lexsort((rows, part.cost[rows]))]  # the cheapest first, which is what `first` below finds
    marks = [np.asarray(part.rows[c])[rows] for c in used] + [np.asarray(m)[rows] for m in broken.values()]
    first = np.unique(np.stack(marks, axis=1), axis=0, return_index=True)[1] if marks else np.arange(min(1, len(rows)))
    rows = np.sort(rows[first])
    return Classes(
        {c: np.asarray(part.rows[c])[rows] for c in used},
        part.cost[rows],
        rows,
        {n: np.asarray(m)[rows] for n, m in broken.items()},
    )


def solve_joint(parts: Sequence[Part], rules: Sequence[Rule]) -> Plan:
    """The rows of least total cost that satisfy all rules; of equal ones the first, part by part.

    Raises:
        Infeasible: none do; the message says in words which constraints clash.
        TesselError: a rule names something that there is not.
    """
    import z3

    if len({p.name for p in parts}) < len(parts):
        raise TesselError("joint problem: two parts have the same name")
    checked = check_rules(rules, {p.name: p.rows for p in parts})
    classes = {p.name: classes_of(p, checked) for p in parts}
    bound = _least_cost(z3, checked, classes) if all(len(c.cost) for c in classes.values()) else None
    if bound is None:
        from .core import infeasible

        raise infeasible(parts, checked)
    return _first(parts, checked, classes, bound)


def _least_cost(z3: Any, rules: Sequence[CheckedRule], classes: Mapping[str, Classes]) -> int | None:
    """The least total cost; None where nothing satisfies all rules.

    Most rows cost far more than the answer. A row that alone is dearer than its part's cheapest by more than
    the whole answer is dearer than the sum of the cheapest cannot be in it, so few rows are tried first, then more.
    """
    floor = sum(int(c.cost.min()) for c in classes.values())
    spare = max(1, floor // 50)
    while True:
        few = {n: c.only(c.cost - c.cost.min() <= spare) for n, c in classes.items()}
        optimize = z3.Optimize()
        picks = {n: choose_one(z3, optimize, n, len(c.cost)) for n, c in few.items()}
        for rule in rules:
            optimize.add(encode(z3, rule, few, picks))
        over = [z3.If(b, int(v), 0) for n, c in few.items() for b, v in zip(picks[n], c.cost - c.cost.min())]
        optimize.minimize(z3.Sum(over))
        if optimize.check() == z3.sat:
            model = optimize.model()
            found = sum(int(c.cost[i]) for n, c in few.items() for i, b in enumerate(picks[n]) if z3.is_true(model[b]))
            if found - floor <= spare:
                return found
            spare = found - floor
        elif all(len(few[n].cost) == len(c.cost) for n, c in classes.items()):
            return None
        else:
            spare *= 8


def choose_one(z3: Any, solver: Any, name: str, count: int) -> list[Any]:
    """One truth a row, exactly one of which holds."""
    own = [z3.Bool(f"{name}.{i}") for i in range(count)]
    solver.add(z3.PbEq([(b, 1) for b in own], 1))
    return own


def encode(z3: Any, rule: CheckedRule, classes: Mapping[str, Classes], picks: Mapping[str, Any]) -> Any:
    """A rule over the choice of rows: the combinations that satisfy it, or, where those are many, a sum."""
    names = list(rule.used)
    keys, which = [], []
    for n in names:
        stacked = np.stack([classes[n].columns[c] for c in rule.used[n]], axis=1)
        distinct, of_row = np.unique(stacked, axis=0, return_inverse=True)
        keys.append(distinct)
        which.append(np.asarray(of_row).ravel())
    count = int(np.prod([len(k) for k in keys]))
    if rule.sides is not None and count > _FEW:
        return _as_sum(z3, rule, classes, picks)
    if count > _MANY:
        raise TesselError(f"rule {rule.rule.name!r}: {count:,} combinations; at most {_MANY:,} are tabulated")
    grids = np.meshgrid(*(np.arange(len(k)) for k in keys), indexing="ij")
    values = {n: {c: k[g.ravel(), j] for j, c in enumerate(rule.used[n])} for n, k, g in zip(names, keys, grids)}
    good = np.broadcast_to(np.asarray(rule.holds(values), dtype=bool), (count,)).reshape([len(k) for k in keys])
    holders = [
        [z3.Or([picks[n][i] for i in np.flatnonzero(w == k)]) for k in range(len(d))]
        for n, d, w in zip(names, keys, which)
    ]
    clauses = []
    for at in itertools.product(*(range(len(k)) for k in keys[:-1])):  # what the others hold says what the last may
        allowed = np.flatnonzero(good[at])
        if len(allowed) < good.shape[-1]:
            free = [z3.Not(holders[j][k]) for j, k in enumerate(at)]
            clauses.append(z3.Or(*free, *(holders[-1][k] for k in allowed)))
    return z3.And(clauses) if clauses else z3.BoolVal(True)


def _as_sum(z3: Any, rule: CheckedRule, classes: Mapping[str, Classes], picks: Mapping[str, Any]) -> Any:
    """A linear rule as a weighted count: what each row adds to left minus right, from that of the least row on."""
    none = {n: dict.fromkeys(used, 0) for n, used in rule.used.items()}
    start = int(rule.excess(none))
    weighted, least = [], start
    for n in rule.used:
        adds = np.broadcast_to(rule.excess({**none, n: classes[n].columns}) - start, (len(classes[n].cost),))
        least += int(adds.min())
        weighted += [(b, int(w)) for b, w in zip(picks[n], adds - adds.min())]
    strict = int(rule.sign in ("<", ">"))
    if rule.sign in ("<=", "<"):
        return z3.PbLe(weighted, -least - strict) if -least - strict >= 0 else z3.BoolVal(False)
    return (z3.PbEq if rule.sign == "==" else z3.PbGe)(weighted, -least + strict)


def _first(parts: Sequence[Part], rules: Sequence[CheckedRule], classes: Mapping[str, Classes], bound: int) -> Plan:
    """The first rows, part by part, whose total is ``bound``: z3's own choice among equals is not promised to last."""
    names = [p.name for p in parts]
    floor = [sum(int(classes[n].cost.min()) for n in names[i:]) for i in range(len(names) + 1)]
    chosen: dict[str, int] = {}

    def ok(newest: str) -> bool:
        values = {n: {c: int(v[i]) for c, v in classes[n].columns.items()} for n, i in chosen.items()}
        return all(r.holds(values) for r in rules if newest in r.used and set(r.used) <= set(chosen))

    def walk(i: int, spent: int) -> bool:
        if i == len(names):
            return spent == bound
        own = classes[names[i]].cost
        for row in np.flatnonzero(spent + own + floor[i + 1] <= bound):
            chosen[names[i]] = int(row)
            if ok(names[i]) and walk(i + 1, spent + int(own[row])):
                return True
            del chosen[names[i]]
        return False

    if not walk(0, 0):
        raise TesselError("joint problem: the solver's optimum does not satisfy the rules; please report this")
    picks = {n: int(classes[n].row[i]) for n, i in chosen.items()}
    rows = {p.name: {c: int(v[picks[p.name]]) for c, v in p.rows.items()} for p in parts}
    return Plan(rows, bound, picks)
