"""Pieces of text that C++ kernels share: how loops are dealt out to threads, pragmas, files of functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...ir.types import Dim, product
from ...tiles.kernel import Axis
from .words import size_text

__all__ = ["BLOCK", "coordinates", "items", "parts_of", "points", "simd", "squares", "steps", "unit"]

SQUARE = (64, 64)  # points of the last two loops walked together where memory lies along both: 16 KiB of floats
_FROM_ONE_END = 8  # steps at most, before as many from the other end of a row; an eighth of a row of known length
BLOCK = 2048  # elements of the innermost loop that one thread takes at a time


def unit(header: str, lines: Iterable[str]) -> str:
    """A file of functions around ``<header>.hpp``.

    >>> print(unit("base", ["EXPORT int one() { return 1; }"]))
    #include "base.hpp"
    using namespace tessel;
    EXPORT int one() { return 1; }
    <BLANKLINE>
    """
    return "\n".join([f'#include "{header}.hpp"', "using namespace tessel;", *lines]) + "\n"


def parts_of(lane: Axis | None) -> str:
    """How many blocks the innermost loop is cut into."""
    if lane is None or (isinstance(lane.extent, int) and lane.extent <= BLOCK):
        return "1"
    if isinstance(lane.extent, int):
        return str(-(-lane.extent // BLOCK))
    return f"ceil_div({size_text(lane.extent)}, {BLOCK})"


def items(outer: Sequence[Axis], lane: Axis | None) -> str:
    """How many pieces of work there are: points of the outer loops, times blocks of the innermost."""
    rows: Dim = product(a.extent for a in outer)
    parts = parts_of(lane)
    return size_text(rows) if parts == "1" else f"{size_text(rows)} * {parts}"


def coordinates(outer: Sequence[Axis], lane: Axis | None, item: str = "item") -> list[str]:
    """Lines that give the outer loops their place, and the innermost its ``begin`` and ``end``."""
    lines: list[str] = []
    parts = parts_of(lane)
    rest = item
    if lane is not None:
        extent = size_text(lane.extent)
        if parts == "1":
            lines.append(f"const i64 begin = 0, end = {extent};")
        elif outer:
            lines += [
                f"const i64 begin = {rest} % {parts} * {BLOCK}, end = min(begin + {BLOCK}, {extent});",
                f"const i64 row = {rest} / {parts};",
            ]
            rest = "row"
        else:
            lines.append(f"const i64 begin = {rest} * {BLOCK}, end = min(begin + {BLOCK}, {extent});")
    return lines + points(outer, rest)


def squares(outer: Sequence[Axis], turned: Axis, lane: Axis) -> tuple[str, list[str]]:
    """Items and coordinates of last two loops that are walked in squares; the first goes to ``t_end``."""
    (high, wide), sizes = SQUARE, [size_text(a.extent) for a in (turned, lane)]
    counts = [f"ceil_div({n}, {step})" for n, step in zip(sizes, SQUARE, strict=True)]
    lines = [
        f"const i64 down = {counts[0]}, along = {counts[1]};",
        f"const i64 begin = item % along * {wide}, end = min(begin + {wide}, {sizes[1]});",
        f"const i64 t_begin = item / along % down * {high}, t_end = min(t_begin + {high}, {sizes[0]});",
    ]
    if outer:
        lines.append("const i64 row = item / (along * down);")
    rows = size_text(product(a.extent for a in outer))
    return f"{rows} * {counts[0]} * {counts[1]}", lines + points(outer, "row")


def points(axes: Sequence[Axis], rest: str) -> list[str]:
    """Lines that take a flat place apart."""
    lines: list[str] = []
    below: Dim = 1
    for at, axis in reversed(list(enumerate(axes))):
        text = rest if below == 1 else f"{rest} / {size_text(below)}"
        if at:
            text = f"({text}) % {size_text(axis.extent)}" if below != 1 else f"{text} % {size_text(axis.extent)}"
        lines.append(f"const i64 {axis.name} = {text};")
        below = product((below, axis.extent))
    return lines


def simd(folds: Mapping[str, Sequence[str]]) -> str:
    """The pragma of a vector loop; ``folds`` are the accumulators by operator."""
    clauses = "".join(f" reduction({op}:{', '.join(names)})" for op, names in folds.items() if names)
    return f"#pragma omp simd{clauses}"


def steps(
    lane: Axis, body: Sequence[str], copies: int = 1, pairs: bool = False, requests: Sequence[str] = ()
) -> list[str]:
    """A loop from ``begin`` to ``end`` in steps of a vector; ``copies`` accumulators ``u`` take turns.

    In the body ``n`` tells how many lanes count. With ``pairs`` a step is two vectors, as long as there are so many.
    ``requests`` ask for memory that is needed later, in the same order: see ``_from_both_ends``.
    """
    name = lane.name
    turns = ", int u" if copies > 1 else ""
    lines = [f"const auto step = [&](i64 {name}, auto n{turns}) __attribute__((always_inline)) {{"]
    lines += [*("  " + line for line in body), "};"]
    lines.append(f"i64 {name} = begin;")
    first = ", 0" if copies > 1 else ""
    whole = lane.extent if isinstance(lane.extent, int) else 1
    for size, lanes, most in ((2, "Pair{}", 32), (1, "Full{}", 16)) if pairs else ((1, "Full{}", 16),):
        by = f"{size} * W" if size > 1 else "W"
        if requests:
            turn = _FROM_ONE_END if whole == 1 else min(max(whole // (16 * size) // 8, 2), _FROM_ONE_END)
            lines += _from_both_ends(name, by, lanes, requests, turn)
            requests = ()
        else:
            if copies > 1:
                starts = [f"{name}{f' + {u * size} * W' if u else ''}" for u in range(copies)]
                calls = [f"step({start}, {lanes}, {u});" for u, start in enumerate(starts)]
                some = f"{copies * size} * W"
                lines.append(f"for (; {name} + {some} <= end; {name} += {some}) {{ {' '.join(calls)} }}")
            lines.append(f"for (; {name} + {by} <= end; {name} += {by}) step({name}, {lanes}{first});")
        if whole % most == 0:
            break
    else:
        lines.append(f"if ({name} < end) step({name}, Part{{end - {name}}}{first});")
    return ["{", *("  " + line for line in lines), "}"]


def _from_both_ends(name: str, by: str, lanes: str, requests: Sequence[str], turn: int) -> list[str]:
    """All whole steps of ``by`` elements, ``turn`` from the front and as many from the back in turns, till they meet.

    A CPU that sees lines asked for in order fetches some more on its own. At the end of a row that lies anywhere these
    are of no use, and cost as much as those that are; in the middle they are the other half of the row. Of rows of 64
    lines turns of eight were best (of one: 1.1 to 1.15 times as long), of rows of 32 lines turns of four.
    """
    some = f"for (i64 j = 0; j < {turn}; ++j)"
    front, back = f"{some} {{ step({name}, {lanes}); {name} += {by}; }}", f"{some} step(back -= {by}, {lanes});"
    return [
        f"const auto ask = [&](i64 {name}) __attribute__((always_inline)) {{ {' '.join(requests)} }};",
        f"const i64 steps_end = begin + (end - begin) / ({by}) * ({by});",
        "i64 back = steps_end;",
        f"while ({name} + {2 * turn} * {by} <= back) {{",
        f"  {some} {{ ask({name} + j * {by}); ask(back - (j + 1) * {by}); }}",
        f"  {front}",
        f"  {back}",
        "}",
        f"for (; {name} < back; {name} += {by}) {{ ask({name}); step({name}, {lanes}); }}",
        f"{name} = steps_end;",
    ]
