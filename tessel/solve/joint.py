"""Tiles of several kernels chosen together: a shared stage, a fused chain's common tile, split-K, shards.

    parts = [part_of("qk", table_a), part_of("pv", table_b)]
    rules = [Rule("common tile", "qk.BM == pv.BM"), Rule("one block", "qk.shared + pv.shared <= 232448")]
    solve_joint(parts, rules).rows            # {"qk": {...}, "pv": {...}}, the cheapest that satisfies all rules

A rule is arithmetic over ``part.column``; columns are knobs and resources. Each part is a table of its tiles, so z3
decides which row each part takes and multiplies nothing itself: a rule that is linear goes to it as a sum, any other
as the table of the combinations that satisfy it. When nothing satisfies all rules, the unsat core is put into words.
z3 is imported on first use.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np

from ..errors import TesselError, did_you_mean
from .solver import Table

__all__ = ["Infeasible", "Part", "Plan", "Rule", "brute_force", "part_of", "solve_joint"]

_COMBINATIONS = 2_000_000  # a rule that is not linear is tabulated up to here


@dataclass(frozen=True)
class Part:
    """One kernel's tiles.

    Attributes:
        name: an identifier, as rules write it.
        rows: column -> values, one a tile.
        cost: of each tile, whole numbers (nanoseconds).
        broken: name of a constraint of the kernel's own -> the tiles that break it.
        explain: words for a constraint and a tile.
    """

    name: str
    rows: Mapping[str, np.ndarray]
    cost: np.ndarray
    broken: Mapping[str, np.ndarray] = field(default_factory=dict)
    explain: Callable[[str, int], str] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise TesselError(f"joint problem: {self.name!r} is no identifier, rules could not name it")

    def __len__(self) -> int:
        return len(self.cost)


@dataclass(frozen=True)
class Rule:
    """What several tiles must satisfy together: a comparison over ``part.column``; ``words`` say it for people."""

    name: str
    formula: str
    words: str = ""


@dataclass(frozen=True)
class Plan:
    """The answer: a row for each part and the total cost."""

    rows: Mapping[str, Mapping[str, int]]
    cost: int
    picks: Mapping[str, int]


class Infeasible(TesselError):
    """Nothing satisfies all rules. ``core`` names those that clash, ``part: constraint`` for a kernel's own."""

    def __init__(self, core: Sequence[str], words: Sequence[str]) -> None:
        self.core = tuple(core)
        super().__init__("no tiles satisfy all constraints together: " + "; ".join(words))


def part_of(name: str, table: Table, given: Mapping[str, int] | None = None) -> Part:
    """A part out of a solver's table: knobs, ``shared``, ``registers`` and ``per_unit`` are its columns.

    ``given`` forces knobs; each is a constraint of its own, ``given BM``, so that a core can name it.
    """
    n = len(table)
    cost = np.full(n, np.iinfo(np.int64).max // 2**16, dtype=np.int64)
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

    return Part(name, columns, cost, broken, explain)


# ---------------------------------------------------------------- rules


def _code(rule: Rule, parts: Sequence[Part]) -> tuple[CodeType, dict[str, tuple[str, ...]]]:
    """A rule compiled, and the columns it reads by part.

    Raises:
        TesselError: it is no comparison, or names a part or a column that there is not.
    """
    try:
        tree = ast.parse(rule.formula, mode="eval")
    except SyntaxError as e:
        raise TesselError(f"rule {rule.name!r}: {rule.formula!r} is no expression: {e.msg}") from None
    known = {p.name: p for p in parts}
    used: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            part = known.get(node.value.id)
            if part is None:
                raise TesselError(
                    f"rule {rule.name!r}: no part {node.value.id!r}; {did_you_mean(node.value.id, known)}"
                )
            if node.attr not in part.rows:
                raise TesselError(f"rule {rule.name!r}: {part.name} has no column {node.attr!r}")
            used.setdefault(part.name, []).append(node.attr)
        elif not isinstance(node, _ALLOWED):
            raise TesselError(f"rule {rule.name!r}: {type(node).__name__} is not allowed in {rule.formula!r}")
    if not used:
        raise TesselError(f"rule {rule.name!r}: {rule.formula!r} names no part")
    ordered = {p.name: tuple(dict.fromkeys(used[p.name])) for p in parts if p.name in used}
    return compile(tree, "<rule>", "eval"), ordered


_ALLOWED = (
    ast.Expression, ast.Compare, ast.BinOp, ast.UnaryOp, ast.Name, ast.Constant, ast.Load, ast.cmpop, ast.operator,
    ast.unaryop,
)  # fmt: skip


def _holds(code: CodeType, values: Mapping[str, Mapping[str, Any]]) -> Any:
    """Whether a rule holds, for numbers or arrays."""
    return eval(code, {"__builtins__": {}}, {n: SimpleNamespace(**columns) for n, columns in values.items()})


def _linear(rule: Rule) -> bool:
    """Whether a rule compares sums of columns times constants."""

    def degree(node: ast.AST) -> int:
        if isinstance(node, ast.Constant):
            return 0
        if isinstance(node, ast.Attribute):
            return 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return degree(node.operand)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            return max(degree(node.left), degree(node.right))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return degree(node.left) + degree(node.right)
        return 2

    body = ast.parse(rule.formula, mode="eval").body
    return (
        isinstance(body, ast.Compare) and len(body.ops) == 1 and max(map(degree, (body.left, *body.comparators))) <= 1
    )


@dataclass(frozen=True)
class _Classes:
    """The rows of a part that no rule tells apart, as one: ``row`` is the cheapest (the first of equal ones)."""

    columns: Mapping[str, np.ndarray]
    cost: np.ndarray
    row: np.ndarray
    broken: Mapping[str, np.ndarray]


def _classes(part: Part, used: Sequence[str], keep_broken: bool) -> _Classes:
    ok = np.ones(len(part), dtype=bool)
    if not keep_broken:
        for mask in part.broken.values():
            ok &= ~mask
    rows = np.flatnonzero(ok)
    marks = [np.asarray(part.rows[c])[rows] for c in used]
    if keep_broken:
        marks += [np.asarray(m)[rows].astype(np.int64) for m in part.broken.values()]
    order = rows[np.lexsort((rows, part.cost[rows]))]
    if marks:
        keys = np.stack([np.asarray(part.rows[c])[order] for c in used] + (
            [np.asarray(m)[order].astype(np.int64) for m in part.broken.values()] if keep_broken else []
        ), axis=1)  # fmt: skip
        _, first = np.unique(keys, axis=0, return_index=True)
        order = order[np.sort(first)]
    elif len(order):
        order = order[:1]
    order = np.sort(order)
    return _Classes(
        {c: np.asarray(part.rows[c])[order] for c in used},
        part.cost[order],
        order,
        {n: np.asarray(m)[order] for n, m in part.broken.items()} if keep_broken else {},
    )


def _used(parts: Sequence[Part], rules: Sequence[Rule]) -> tuple[list[Any], dict[str, tuple[str, ...]]]:
    if len({p.name for p in parts}) < len(parts):
        raise TesselError("joint problem: two parts have the same name")
    if len({r.name for r in rules}) < len(rules):
        raise TesselError("joint problem: two rules have the same name")
    compiled = [_code(r, parts) for r in rules]
    columns: dict[str, list[str]] = {p.name: [] for p in parts}
    for _, own in compiled:
        for part, names in own.items():
            columns[part] += names
    return compiled, {n: tuple(dict.fromkeys(c)) for n, c in columns.items()}


# ---------------------------------------------------------------- solving


def solve_joint(parts: Sequence[Part], rules: Sequence[Rule]) -> Plan:
    """The rows of least total cost that satisfy all rules; of equal ones the first, part by part.

    Raises:
        Infeasible: none do; the message says in words which constraints clash.
        TesselError: a rule names something that there is not.
    """
    import z3

    compiled, columns = _used(parts, rules)
    classes = {p.name: _classes(p, columns[p.name], keep_broken=False) for p in parts}
    if all(len(c.cost) for c in classes.values()):
        optimize = z3.Optimize()
        picks = {n: [z3.Bool(f"{n}.{i}") for i in range(len(c.cost))] for n, c in classes.items()}
        for own in picks.values():
            optimize.add(z3.PbEq([(b, 1) for b in own], 1))
        for rule, (code, used) in zip(rules, compiled):
            optimize.add(_encode(z3, rule, code, used, classes, picks))
        least = {n: int(c.cost.min()) for n, c in classes.items()}
        optimize.minimize(
            z3.Sum([z3.If(b, int(cost) - least[n], 0) for n, c in classes.items() for b, cost in zip(picks[n], c.cost)])
        )
        if optimize.check() == z3.sat:
            bound = _cost(z3, optimize.model(), picks, classes)
            return _first(parts, rules, compiled, classes, bound)
    core, words = _core(z3, parts, rules, compiled, columns)
    raise Infeasible(core, words)


def _cost(z3: Any, model: Any, picks: Mapping[str, Any], classes: Mapping[str, _Classes]) -> int:
    return sum(int(c.cost[i]) for n, c in classes.items() for i, b in enumerate(picks[n]) if z3.is_true(model[b]))


def _first(
    parts: Sequence[Part], rules: Sequence[Rule], compiled: Sequence[Any], classes: Mapping[str, _Classes], bound: int
) -> Plan:
    """The first rows, part by part, whose total is ``bound``: z3's own choice among equals is not promised to last."""
    names = [p.name for p in parts]
    floor = [sum(int(classes[n].cost.min()) for n in names[i:]) for i in range(len(names) + 1)]
    chosen: list[int] = []

    def ok(upto: int) -> bool:
        known = {n: classes[n] for n in names[:upto]}
        for code, used in compiled:
            if names[upto - 1] in used and set(used) <= set(known):
                values = {n: {c: int(known[n].columns[c][chosen[names.index(n)]]) for c in used[n]} for n in used}
                if not _holds(code, values):
                    return False
        return True

    def walk(i: int, spent: int) -> bool:
        if i == len(names):
            return spent == bound
        cost = classes[names[i]].cost
        for row in range(len(cost)):
            if spent + int(cost[row]) + floor[i + 1] > bound:
                continue
            chosen.append(row)
            if ok(i + 1) and walk(i + 1, spent + int(cost[row])):
                return True
            chosen.pop()
        return False

    if not walk(0, 0):
        raise TesselError("joint problem: the solver's optimum does not satisfy the rules; please report this")
    return _plan(parts, {n: int(classes[n].row[i]) for n, i in zip(names, chosen)})


def _plan(parts: Sequence[Part], picks: Mapping[str, int]) -> Plan:
    rows = {p.name: {c: int(v[picks[p.name]]) for c, v in p.rows.items()} for p in parts}
    return Plan(rows, sum(int(p.cost[picks[p.name]]) for p in parts), dict(picks))


def _encode(
    z3: Any,
    rule: Rule,
    code: CodeType,
    used: Mapping[str, tuple[str, ...]],
    classes: Mapping[str, _Classes],
    picks: Mapping[str, Any],
) -> Any:
    """A rule over the choice of rows: a sum where it is linear, else the combinations that satisfy it."""
    if _linear(rule):
        sums = {
            n: SimpleNamespace(
                **{c: z3.Sum([z3.If(b, int(v), 0) for b, v in zip(picks[n], classes[n].columns[c])]) for c in used[n]}
            )
            for n in used
        }
        return eval(code, {"__builtins__": {}}, sums)
    names = list(used)
    keys, holders = [], []
    for n in names:
        stacked = np.stack([classes[n].columns[c] for c in used[n]], axis=1)
        distinct, which = np.unique(stacked, axis=0, return_inverse=True)
        keys.append(distinct)
        which = np.asarray(which).ravel()
        holders.append([z3.Or([picks[n][i] for i in np.flatnonzero(which == k)]) for k in range(len(distinct))])
    count = int(np.prod([len(k) for k in keys]))
    if count > _COMBINATIONS:
        raise TesselError(f"rule {rule.name!r}: {count:,} combinations; at most {_COMBINATIONS:,} are tabulated")
    grids = np.meshgrid(*(np.arange(len(k)) for k in keys), indexing="ij")
    values = {n: {c: k[g.ravel(), j] for j, c in enumerate(used[n])} for n, k, g in zip(names, keys, grids)}
    good = np.broadcast_to(np.asarray(_holds(code, values), dtype=bool), (count,)).reshape([len(k) for k in keys])
    clauses = []
    for at in itertools.product(*(range(len(k)) for k in keys[:-1])):  # what the others hold says what the last may
        allowed = np.flatnonzero(good[at])
        if len(allowed) < good.shape[-1]:
            free = [z3.Not(holders[j][k]) for j, k in enumerate(at)]
            clauses.append(z3.Or(*free, *(holders[-1][k] for k in allowed)))
    return z3.And(clauses) if clauses else z3.BoolVal(True)


def _core(
    z3: Any, parts: Sequence[Part], rules: Sequence[Rule], compiled: Sequence[Any], columns: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """The names of constraints that clash, none of which can be left out, and words for each."""
    classes = {p.name: _classes(p, columns[p.name], keep_broken=True) for p in parts}
    picks = {n: [z3.Bool(f"{n}.{i}") for i in range(len(c.cost))] for n, c in classes.items()}
    solver = z3.Solver()
    for own in picks.values():
        solver.add(z3.PbEq([(b, 1) for b in own], 1))
    facts: dict[str, Any] = {}
    for p in parts:
        for name, mask in classes[p.name].broken.items():
            facts[f"{p.name}: {name}"] = z3.And([z3.Not(picks[p.name][i]) for i in np.flatnonzero(mask)])
    for rule, (code, used) in zip(rules, compiled):
        facts[rule.name] = _encode(z3, rule, code, used, classes, picks)
    marks = {name: z3.Bool(f"rule {name}") for name in facts}
    for name, fact in facts.items():
        solver.add(z3.Implies(marks[name], fact))
    if solver.check(*marks.values()) != z3.unsat:
        raise TesselError("joint problem: no answer was found, and none was ruled out; please report this")
    found = {str(m) for m in solver.unsat_core()}
    core = [n for n in facts if f"rule {n}" in found]
    for name in sorted(core, key=_dispensable):  # leave out what can be left out, judgements before the machine's rules
        rest = [n for n in core if n != name]
        if solver.check(*(marks[n] for n in rest)) == z3.unsat:
            core = rest
    words = [_words(z3, name, core, solver, marks, parts, rules, compiled, classes, picks) for name in core]
    return core, words


def _dispensable(name: str) -> tuple[int, str]:
    own = name.split(": ")[-1]
    order = ("overhang", "group", "warps", "idle", "compile", "compiler", "registers", "threads", "shared", "accum")
    return next((i for i, o in enumerate(order) if own.startswith(o)), len(order)), name


def _words(
    z3: Any, name: str, core: Sequence[str], solver: Any, marks: Mapping[str, Any], parts: Sequence[Part],
    rules: Sequence[Rule], compiled: Sequence[Any], classes: Mapping[str, _Classes], picks: Mapping[str, Any],
) -> str:  # fmt: skip
    """Why one constraint of the core is in the way: shown on rows that satisfy all the others."""
    solver.check(*(marks[n] for n in core if n != name))
    model = solver.model()
    at = {n: next(i for i, b in enumerate(own) if z3.is_true(model[b])) for n, own in picks.items()}
    for p in parts:
        if name.startswith(f"{p.name}: "):
            own = name.removeprefix(f"{p.name}: ")
            row = int(classes[p.name].row[at[p.name]])
            return f"{p.name}: {p.explain(own, row)}" if p.explain is not None else name
    i = next(i for i, r in enumerate(rules) if r.name == name)
    values = {f"{n}.{c}": int(classes[n].columns[c][at[n]]) for n, columns in compiled[i][1].items() for c in columns}
    shown = ", ".join(f"{k} {v:,}" for k, v in values.items())
    return f"{rules[i].name}: {rules[i].words or rules[i].formula} (with all others: {shown})"


def brute_force(parts: Sequence[Part], rules: Sequence[Rule]) -> Plan | None:
    """The same answer by trying everything: the oracle of the tests. None where nothing satisfies all rules."""
    compiled, columns = _used(parts, rules)
    best: tuple[Any, ...] | None = None
    rows = [[i for i in range(len(p)) if not any(m[i] for m in p.broken.values())] for p in parts]
    for at in itertools.product(*rows):
        cost = sum(int(p.cost[i]) for p, i in zip(parts, at))
        if best is not None and (cost, at) >= best:
            continue
        values = {p.name: {c: int(p.rows[c][i]) for c in columns[p.name]} for p, i in zip(parts, at)}
        if all(_holds(code, {n: values[n] for n in used}) for code, used in compiled):
            best = (cost, at)
    return None if best is None else _plan(parts, {p.name: i for p, i in zip(parts, best[1])})
