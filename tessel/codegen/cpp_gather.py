"""Rows of a table asked for before their turn.

Where a row lies is read from memory, so that the CPU cannot foresee it: each row would begin with a wait for memory,
and for the page tables. Its place is computed some rows early, and its lines are asked for beside those of the row
that is worked on, four at a time, so that the loads of four lines follow one another. Its first line and its last are
asked for earlier still, so that the page tables have been read by then.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..tiles.index import Index, substitute
from ..tiles.kernel import Axis, Kernel, Load
from .cpp_expr import Emitter

__all__ = ["asked_early"]

_EARLY = 6144  # bytes of rows between what is read and what is asked for
_LEAST = 512  # bytes of a row that are worth it


def asked_early(
    kernel: Kernel, e: Emitter, lane: Axis, coordinates: Sequence[str], row: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Lines that find the place of a later row, and lines for the loop along the row that ask for it.

    Args:
        kernel: the tile program, all of whose statements are written.
        e: what wrote them, with vectors along ``lane``.
        lane: the loop along a row.
        coordinates: lines that give the loops of a piece of work, ``item``, their places.
        row: lines that stand before the loop along the row.
    """
    known = [line for line in row if line.startswith("const ")]  # no store, and no error, before its time
    places: list[str] = []
    requests: list[str] = []
    for stmt in kernel.body:
        if not isinstance(stmt, Load) or stmt.access.mask:
            continue
        param = kernel.params[stmt.access.param]
        index = e.space.at(stmt.access.address(param))
        steps = {a.name: c for a, c in index.terms if a.kind == "var"}
        nbytes = (lane.extent if isinstance(lane.extent, int) else _EARLY) * param.type.dtype.itemsize
        if steps.get(lane.name) != 1 or all(a.kind == "var" for a, _ in index.terms) or nbytes < _LEAST:
            continue
        start, dims = e.affine(substitute(index, lambda a: Index((), 0) if a.name == lane.name else None))
        if lane.name in dims:
            continue
        at = len(requests)
        find = " ".join([*coordinates, *known, f"return {param.name} + {start} + begin;"])
        rows = -(-_EARLY // nbytes)
        for name, later in ((f"soon{at}", rows), (f"far{at}", 2 * rows)):
            item = f"min(item + {later}, last - 1)"
            places.append(
                f"const auto* const {name} = [&](i64 item) __attribute__((always_inline)) {{ {find} }}({item});"
            )
        places.append(f"__builtin_prefetch(far{at}); __builtin_prefetch(far{at} + (end - begin) - 1);")
        requests.append(f"__builtin_prefetch(soon{at} + {lane.name} - begin);")
    return places, requests
