"""Why a tile, and why not another: for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from ..targets import Target
from ..tiles.header import load_header
from ..tiles.kernel import Kernel
from .constraints import Constraint
from .problem import problem_of
from .resources import coefficients, nearest_path
from .solver import Candidate, Table, table_for

__all__ = ["explain_kernel", "nothing_fits", "reason"]


def tile_text(knobs: Mapping[str, int]) -> str:
    """Knobs on one line."""
    return " ".join(f"{n}={v}" for n, v in knobs.items())


def reason(pick: Candidate) -> str:
    """Why this tile, in a few words, for a kernel's header and the report."""
    assert pick.time is not None
    t = pick.time
    waits = {
        "matrix": "the matrix units",
        "l2": "L2",
        "memory": "memory",
        "shared": "shared memory",
        "vector": "arithmetic",
        "serial": "products, then arithmetic",
        "latency": "latency",
    }[t.bound]
    took = f"{t.total * 1e6:,.1f} µs"
    return f"solved: {took} predicted, bound by {waits}, {t.resident:.0f} resident a unit, {t.waves:.1f} waves"


def explain_kernel(kernel: Kernel, target: Target, hints: Mapping[str, int] | None = None, top: int = 5) -> str:
    """A page on one kernel: the pick term by term, the runners-up, and what rules the others out.

    Args:
        kernel: the tile program.
        target: a GPU.
        hints: values for sizes that are known at run time only.
        top: how many candidates to list.
    """
    problem = problem_of(kernel, target, hints)
    table = table_for(problem, target)
    lines = [f"{kernel.name}: {problem.family}, {problem}, on {target.name}"]
    lines.append(f"{len(table):,} tiles, {len(table.order):,} satisfy all constraints")
    if problem.symbolic:
        lines.append("sizes known at run time only count as 2048 here")
    if not len(table.order):
        return "\n".join([*lines, nothing_fits(table)])
    pick = table.candidate(0)
    lines += ["", f"1. {tile_text(pick.knobs)}", f"   {_takes(pick)}", *("   " + s for s in str(pick.time).split("\n"))]
    if problem.flops and pick.time is not None:
        rate = problem.flops / pick.time.total
        peak = target.flops.get(problem.dtype)
        part = f", {rate / peak:.0%} of the data sheet's" if peak and problem.matrix else ""
        lines.append(f"   {rate / 1e12:,.0f} TFLOP/s{part}")
    lines += [""] if len(table.order) > 1 else []
    for i in range(1, min(top, len(table.order))):
        other = table.candidate(i)
        assert other.time is not None and pick.time is not None
        slower = other.time.total / pick.time.total - 1
        lines.append(
            f"{i + 1}. {tile_text(other.knobs)}: {other.time.total * 1e6:,.2f} µs ({slower:+.1%}), "
            f"bound by {other.time.bound}; {_takes(other)}"
        )
    lines += ["", *_ruled_out(table)]
    path, measured = nearest_path(load_header(problem.family), target.arch)
    if path is not None:
        near = "" if measured else f" (nearest measured: {target.arch} has not been)"
        lines.append(f"resources: {path.what}{near}; {coefficients()[path.name]['source']}")
    return "\n".join(lines)


def _takes(c: Candidate) -> str:
    r = c.resources
    columns = f", {r.tensor_columns} columns of tensor memory" if r.tensor_columns else ""
    return f"{r.shared_bytes:,} bytes shared, about {r.registers:.0f} of {r.register_limit} registers{columns}"


def _ruled_out(table: Table) -> list[str]:
    """One line a constraint: how many tiles it rules out first, and an example."""
    first: Counter[str] = Counter()
    words: dict[str, str] = {}
    seen = np.zeros(len(table), dtype=bool)
    for constraint, broken in table.broken.items():
        new = np.flatnonzero(broken & ~seen)
        if len(new):
            first[constraint.name] += len(new)
            words.setdefault(constraint.name, constraint.explain(table.values, _nearest(table, constraint, new)))
        seen |= broken
    left = int(np.sum(~seen & ~table.ok))
    lines = [f"ruled out by {name}: {n:,} tiles, the nearest: {words[name]}" for name, n in first.items()]
    return lines + ([f"ruled out by occupancy: {left:,} tiles do not fit a unit"] if left else [])


def _nearest(table: Table, constraint: Constraint, rows: np.ndarray) -> int:
    """The row that breaks a constraint by least."""
    number = np.broadcast_to(np.asarray(constraint.number(table.values), dtype=float), (len(table),))
    limit = np.broadcast_to(np.asarray(constraint.limit(table.values), dtype=float), (len(table),))
    return int(rows[np.argmin((number - limit)[rows])])


def core_of(table: Table) -> list[tuple[Constraint, int]]:
    """Constraints that no tile satisfies together, none of which can be left out, each with the tile that comes
    nearest to it among those that satisfy the others. Judgements are left out before the machine's own rules."""
    kept = sorted(table.broken, key=lambda c: not c.hard)
    for constraint in sorted(table.broken, key=lambda c: c.hard):
        rest = [c for c in kept if c is not constraint]
        if rest and np.all(np.any([table.broken[c] for c in rest], axis=0)):
            kept = rest
    out = []
    for constraint in kept:
        others = [table.broken[c] for c in kept if c is not constraint]
        free = ~np.any(others, axis=0) if others else np.ones(len(table), dtype=bool)
        out.append((constraint, _nearest(table, constraint, np.flatnonzero(free))))
    return out


def nothing_fits(table: Table) -> str:
    """Why no tile satisfies all constraints: the ones that clash, in words, with their numbers."""
    if not len(table):
        return f"{table.problem.name}: no tile of the template has these knobs"
    words = [f"{c.name}: {c.explain(table.values, row)}" for c, row in core_of(table)]
    return f"{table.problem.name}: no tile fits {table.target.name}: " + "; ".join(words)
