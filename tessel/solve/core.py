"""Why nothing satisfies all rules of a joint problem: a smallest set of constraints that clash, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import TesselError
from .joint import Infeasible, Part, choose_one, classes_of, encode
from .rules import CheckedRule

__all__ = ["infeasible"]

# A kernel's own constraints in the order in which they are left out of a core, judgements before the machine's rules.
_DISPENSABLE = (
    "overhang", "group", "depth", "warps", "idle", "compile", "registers", "occupancy", "threads", "shared", "accum",
)  # fmt: skip


def infeasible(parts: Sequence[Part], rules: Sequence[CheckedRule]) -> Infeasible:
    """The error for a problem that has no answer. Every constraint has a marker; z3's core says which markers clash."""
    import z3

    solver = z3.Solver()
    classes = {p.name: classes_of(p, rules, keep_broken=True) for p in parts}
    picks = {n: choose_one(z3, solver, n, len(c.cost)) for n, c in classes.items()}
    facts: dict[str, Any] = {}
    for name, own in classes.items():
        for constraint, mask in own.broken.items():
            facts[f"{name}: {constraint}"] = z3.And([z3.Not(picks[name][i]) for i in np.flatnonzero(mask)])
    for rule in rules:
        facts[rule.rule.name] = encode(z3, rule, classes, picks)
    marks = {name: z3.Bool(f"constraint {name}") for name in facts}
    for name, fact in facts.items():
        solver.add(z3.Implies(marks[name], fact))
    if solver.check(*marks.values()) != z3.unsat:
        raise TesselError("joint problem: no answer was found, and none was ruled out; please report this")
    found = {str(m) for m in solver.unsat_core()}
    core = [n for n in facts if str(marks[n]) in found]
    for name in sorted(core, key=_order):
        rest = [n for n in core if n != name]
        if solver.check(*(marks[n] for n in rest)) == z3.unsat:
            core = rest

    words = []
    for name in core:
        solver.check(*(marks[n] for n in core if n != name))  # rows that satisfy all of the core but one
        model = solver.model()
        at = {n: int(classes[n].row[_taken(z3, model, own)]) for n, own in picks.items()}
        part = next((p for p in parts if name.startswith(f"{p.name}: ")), None)
        if part is not None:
            words.append(_own_words(part, name.removeprefix(f"{part.name}: "), core, parts, rules, at))
            continue
        rule = next(r for r in rules if r.rule.name == name)
        rows = {p.name: p.rows for p in parts}
        values = [f"{n}.{c} {int(rows[n][c][at[n]]):,}" for n, used in rule.used.items() for c in used]
        words.append(f"{name}: {rule.rule.words or rule.rule.formula} (with all others: {', '.join(values)})")
    return Infeasible(core, words)


def _taken(z3: Any, model: Any, own: Sequence[Any]) -> int:
    return next(i for i, b in enumerate(own) if z3.is_true(model[b]))


def _own_words(
    part: Part, constraint: str, core: Sequence[str], parts: Sequence[Part], rules: Sequence[CheckedRule],
    at: Mapping[str, int],
) -> str:  # fmt: skip
    """Words for a kernel's own constraint, shown on the row that comes nearest to satisfying it."""
    if part.explain is None:
        return f"{part.name}: {constraint}"
    row = at[part.name]
    if part.excess is not None:
        free = np.ones(len(part), dtype=bool)
        for name, mask in part.broken.items():
            if name != constraint and f"{part.name}: {name}" in core:
                free &= ~mask
        values: dict[str, Any] = {p.name: {c: v[at[p.name]] for c, v in p.rows.items()} for p in parts}
        values[part.name] = part.rows
        for rule in rules:
            if rule.rule.name in core and part.name in rule.used:
                free &= np.asarray(rule.holds(values), dtype=bool)
        row = int(np.flatnonzero(free)[np.argmin(part.excess(constraint)[free])])
    return f"{part.name}: {part.explain(constraint, row)}"


def _order(name: str) -> tuple[int, str]:
    own = name.split(": ")[-1]
    return next((i for i, o in enumerate(_DISPENSABLE) if own.startswith(o)), len(_DISPENSABLE)), name
