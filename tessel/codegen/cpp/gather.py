"""What is read asked for before its turn: rows of a table, and on CPUs that foresee little, streams.

Where a row lies is read from memory, so that the CPU cannot foresee it: each row would begin with a wait for memory,
and for the page tables. Its place is computed some rows early, and its lines are asked for beside those of the row that
is worked on, from both ends of the row. The number that tells the place is asked for earlier still: where rows are
taken some at a time these lie far apart, and waiting for them took up to a tenth. Where the lines come into the first
cache, a row's first line and its last are asked for earlier too, so that the page tables have been read by then; lines
in the second wait long enough for them, and two more for every row took 10% there. Where no cache holds the result, the
rows need not stay in one either. On CPUs that foresee little the next rows, up to sixteen, are asked for together, a
line of each in turn: with rows of 2 KiB a Granite Rapids read and wrote 33.5 GB/s so, 28.5 with one row after the
other, 31 with four at once, 26 with 32. Where the last cache holds all that a kernel reads and writes, nothing is asked
for: that is near, and asking took 3 to 5%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...tiles.index import Index, substitute
from ...tiles.kernel import Axis, Kernel, Load, Param
from .expr import Emitter
from .text import coordinates, parts_of
from .vector import PAGE, asked_into, first_cache, foresees_little, from_memory

__all__ = ["asked_a_page_on", "asked_early", "asked_in_line", "places_of_rows"]

_EARLY = 8192  # bytes of rows between what is read and what is asked for
_LEAST = 512  # bytes of a row that are worth it
_TOGETHER = 16  # rows that are asked for at once
_ROOM = 2**17  # bytes that these may fill


def places_of_rows(kernel: Kernel, e: Emitter, outer: Sequence[Axis], lane: Axis) -> list[str]:
    """Lines that give the loops of a piece of work, ``item``, their places: as they lie, or some rows at a time.

    Rows of a table that pass by drive all else out of the caches. So where rows of another operand serve the outermost
    loops again and again, as positions serve all sequences of a batch, as many of these rows as fill a third of the
    first cache serve all loops before the next come.
    """
    far = any(isinstance(s, Load) and _in_row(kernel, e, lane, s) for s in kernel.body)
    again = [
        kernel.params[s.access.param].type.dtype.itemsize
        for s in kernel.body
        if isinstance(s, Load) and len(outer) > 1 and _kept(kernel, e, outer, lane, s)
    ]
    extents = [a.extent for a in (*outer, lane)]
    if not (far and again and e.past and parts_of(lane) == "1" and all(isinstance(n, int) for n in extents)):
        return coordinates(outer, lane)
    *above, last, _ = extents
    room = first_cache() // 3 // (sum(again) * extents[-1])
    rows = max((n for n in range(1, room + 1) if last % n == 0), default=1)
    rest = math.prod(above)
    order = f"const i64 place = item / {rows} % {rest} * {last} + item / {rows * rest} * {rows} + item % {rows};"
    return [order, *coordinates(outer, lane, "place")]


def asked_early(
    kernel: Kernel, e: Emitter, lane: Axis, where: Sequence[str], row: Sequence[str], pairs: bool
) -> tuple[list[str], list[str], list[str]]:
    """Lines before the loop over rows, lines that find the place of later ones, and lines for the loop along a row that
    ask for these.

    Args:
        kernel: the tile program, all of whose statements are written.
        e: what wrote them, with vectors along ``lane``.
        lane: the loop along a row.
        where: lines that give the loops of a piece of work, ``item``, their places.
        row: lines that stand before the loop along the row.
        pairs: whether that goes in steps of two vectors.
    """
    if not from_memory(kernel):
        return [], [], []
    # up to two rows are under way, one early and one earlier; what passes by the caches is not needed again
    into_second = asked_into(2 * _EARLY)
    into = into_second or (", 0, 0" if e.past else "")
    known = [line for line in row if line.startswith("const ")]  # no store, and no error, before its time
    before: list[str] = []
    places: list[str] = []
    requests: list[str] = []
    numbers = [e.pointer(s.access)[0] for s in kernel.body if isinstance(s, Load) and _once_a_row(kernel, e, lane, s)]
    for stmt in kernel.body:
        if not isinstance(stmt, Load) or not _in_row(kernel, e, lane, stmt):
            continue
        param = kernel.params[stmt.access.param]
        nbytes = _row_bytes(lane, param)
        index, _ = _terms(kernel, e, stmt)
        start, dims = e.affine(substitute(index, lambda a: Index((), 0) if a.name == lane.name else None))
        if lane.name in dims:
            continue
        at = len(requests)
        find = " ".join([*where, *known, f"return {param.name} + {start} + begin;"])
        together = max(2, min(_TOGETHER, _ROOM // nbytes))
        rows = together if foresees_little() else -(-_EARLY // nbytes)
        at_item = "[&](i64 item) __attribute__((always_inline))"
        if not at and numbers:
            asked = (f"__builtin_prefetch({number});" for number in dict.fromkeys(numbers))
            places.append(f"{at_item} {{ {' '.join([*where, *asked])} }}(min(item + {4 * rows}, last - 1));")
        found = f"{at_item} {{ {find} }}"
        if foresees_little():
            before.append(f"RowsAhead<{together}> soon{at};")
            places.append(f"soon{at}.renew(item, first, last, {found});")
            step = f"W * {param.type.dtype.itemsize * (2 if pairs else 1)}"
            requests.append(f"soon{at}.ask({step});")
            continue
        places.append(f"const auto* const soon{at} = {found}(min(item + {rows}, last - 1));")
        if not into_second:
            places.append(f"const auto* const far{at} = {found}(min(item + {2 * rows}, last - 1));")
            places += [f"__builtin_prefetch(far{at}{place}{into});" for place in ("", " + (end - begin) - 1")]
        requests.append(f"__builtin_prefetch(soon{at} + {lane.name} - begin{into});")
    return before, places, requests


def asked_in_line(kernel: Kernel, e: Emitter, lane: Axis) -> list[str]:
    """Lines for the loop along ``lane`` that ask for what is read once, and in that order, a page early."""
    if not from_memory(kernel):
        return []
    points = math.prod(a.extent for a in kernel.axes)
    loads = [s for s in kernel.body if isinstance(s, Load)]
    once = [s for s in loads if math.prod(kernel.params[s.access.param].type.shape) == points]
    lines = [asked_a_page_on(kernel, e, lane, s) for s in once]
    return list(dict.fromkeys(line for line in lines if line is not None))


def asked_a_page_on(kernel: Kernel, e: Emitter, lane: Axis, load: Load, into: str = "") -> str | None:
    """The line that asks for what a load reads a page further along ``lane``; None where that is no line."""
    index, steps = _terms(kernel, e, load)
    if load.access.mask or len(steps) < len(index.terms) or steps.get(lane.name) != 1:
        return None
    elements = PAGE // kernel.params[load.access.param].type.dtype.itemsize
    return f"__builtin_prefetch({e.pointer(load.access)[0]} + {elements}{into});"


def _terms(kernel: Kernel, e: Emitter, load: Load) -> tuple[Index, dict[str, int]]:
    """Where a load reads, and by how much a step of each loop moves that."""
    index = e.space.at(load.access.address(kernel.params[load.access.param]))
    return index, {a.name: c for a, c in index.terms if a.kind == "var"}


def _row_bytes(lane: Axis, param: Param) -> int:
    return (lane.extent if isinstance(lane.extent, int) else _EARLY) * param.type.dtype.itemsize


def _in_row(kernel: Kernel, e: Emitter, lane: Axis, load: Load) -> bool:
    """Whether a load reads along a row whose place is read from memory."""
    index, steps = _terms(kernel, e, load)
    if load.access.mask or steps.get(lane.name) != 1 or all(a.kind == "var" for a, _ in index.terms):
        return False
    return _row_bytes(lane, kernel.params[load.access.param]) >= _LEAST


def _once_a_row(kernel: Kernel, e: Emitter, lane: Axis, load: Load) -> bool:
    """Whether a load reads one whole number for a row, which may tell a place, and lies at a place that is known."""
    index, steps = _terms(kernel, e, load)
    whole = not kernel.params[load.access.param].type.dtype.is_floating_point
    return whole and not load.access.mask and lane.name not in steps and len(steps) == len(index.terms)


def _kept(kernel: Kernel, e: Emitter, outer: Sequence[Axis], lane: Axis, load: Load) -> bool:
    """Whether a load reads rows of the loop outside the innermost, the same ones for all loops outside that."""
    index, steps = _terms(kernel, e, load)
    plain = all(a.kind == "var" for a, _ in index.terms)
    return plain and steps.keys() == {outer[-1].name, lane.name} and steps[lane.name] == 1
