"""Why a tile, and why not another: for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..tiles.header import load_header
from .constraints import Constraint
from .resources import coefficients, nearest_path, variants_of
from .solver import Candidate, Table

__all__ = ["RuledOut", "core_of", "nothing_fits", "page", "reason", "ruled_out", "tile_text"]

_WAITS = {
    "matrix": "the matrix units",
    "l2": "L2",
    "memory": "memory",
    "shared": "shared memory",
    "vector": "arithmetic",
    "serial": "products, then arithmetic",
    "latency": "latency",
}


@dataclass(frozen=True)
class RuledOut:
    """How many tiles a constraint is the first to rule out, and the one that comes nearest to passing.

    Attributes:
        constraint: its name.
        tiles: how many.
        knobs: of the nearest.
        words: why that one is out, with both numbers.
    """

    constraint: str
    tiles: int
    knobs: Mapping[str, int]
    words: str


def tile_text(knobs: Mapping[str, int]) -> str:
    """Knobs on one line."""
    return " ".join(f"{n}={v}" for n, v in knobs.items())


def reason(table: Table) -> str:
    """Why the first tile of a table, in a few words, for a kernel's header and the report."""
    t = table.candidate(0).time
    text = (
        f"{t.total * 1e6:,.1f} µs predicted, bound by {_WAITS[t.bound]}, "
        f"{t.resident:.0f} resident a unit, {t.waves:.1f} waves"
    )
    if table.relaxed:
        text += f"; no tile satisfies all constraints: {_clash(table)}"
    return text


def page(name: str, table: Table, top: int = 5) -> str:
    """A page on one kernel: the pick term by term, the runners-up, and what rules the others out."""
    problem, target = table.problem, table.target
    fit = 0 if table.relaxed else len(table.order)
    count = len(table) + (len(table.before) - len(table.before.rows) if table.before is not None else 0)
    lines = [f"{name}: {problem.family}, {problem}, on {target.name}"]
    lines.append(f"{count:,} tiles, {fit:,} satisfy all constraints")
    if table.given:
        lines.append(f"given: {tile_text(table.given)}")
    if problem.symbolic:
        lines.append("sizes known at run time only are taken from the first call, or count as 2048")
    if table.relaxed:
        lines.append(nothing_fits(table))
    if len(table.order):
        lines += ["", *_candidates(table, top), "", *_ruled_out_lines(table)]
    header = load_header(problem.family)
    for variant in variants_of(table.knobs):
        path, measured = nearest_path(header, target.arch, variant)
        if path is None:
            continue
        near = "" if measured else f" (nearest measured: {target.arch} has not been)"
        lines.append(f"resources: {path.what}{near}; {coefficients()[path.name]['source']}")
    return "\n".join(lines)


def _candidates(table: Table, top: int) -> list[str]:
    """The pick in full, a line for each of those that come next."""
    problem, pick = table.problem, table.candidate(0)
    lines = [f"1. {tile_text(pick.knobs)}", f"   {_takes(pick)}", *("   " + s for s in str(pick.time).split("\n"))]
    if problem.flops:
        rate = problem.flops / pick.time.total
        peak = table.target.flops.get(problem.dtype)
        part = f", {rate / peak:.0%} of the data sheet's" if peak and problem.matrix else ""
        lines.append(f"   {rate / 1e12:,.0f} TFLOP/s{part}")
    lines += [""] if len(table.order) > 1 else []
    for i in range(1, min(top, len(table.order))):
        other = table.candidate(i)
        slower = other.time.total / pick.time.total - 1
        lines.append(
            f"{i + 1}. {tile_text(other.knobs)}: {other.time.total * 1e6:,.2f} µs ({slower:+.1%}), "
            f"bound by {_WAITS[other.time.bound]}; {_takes(other)}"
        )
    return lines


def _takes(c: Candidate) -> str:
    r = c.resources
    columns = f", {r.tensor_columns} columns of tensor memory" if r.tensor_columns else ""
    return f"{r.shared_bytes:,} bytes shared, about {r.registers:.0f} of {r.register_limit} registers{columns}"


def ruled_out(table: Table) -> list[RuledOut]:
    """What rules tiles out, in the order of the constraints; a tile counts for the first that it breaks."""
    found: dict[str, RuledOut] = {}
    for part in (table, table.before):
        if part is None:
            continue
        seen = np.zeros(len(part), dtype=bool)
        for constraint, broken in part.broken.items():
            new = np.flatnonzero(broken & ~seen)
            seen |= broken
            if len(new):
                at = _nearest(part, constraint, new)
                more = found[constraint.name].tiles if constraint.name in found else 0
                words = constraint.explain(part.values, at)
                found[constraint.name] = RuledOut(constraint.name, len(new) + more, part.knobs_of(at), words)
    return [found[c.name] for c in table.constraints if c.name in found]


def _ruled_out_lines(table: Table) -> list[str]:
    return [f"ruled out by {r.constraint}: {r.tiles:,} tiles, the nearest: {r.words}" for r in ruled_out(table)]


def _nearest(table: Table, constraint: Constraint, rows: np.ndarray) -> int:
    """The row that breaks a constraint by least."""
    return int(rows[np.argmin(constraint.excess(table.values, len(table))[rows])])


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


def _clash(table: Table) -> str:
    return "; ".join(f"{c.name}: {c.explain(table.values, row)}" for c, row in core_of(table))


def nothing_fits(table: Table) -> str:
    """Why no tile satisfies all constraints: the ones that clash, in words, with their numbers."""
    asked = f" with {tile_text(table.given)}" if table.given else ""
    return f"no tile{asked} fits {table.target.name}: {_clash(table)}"
