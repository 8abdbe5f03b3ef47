"""Where a value is read: the index maps of views, and gathers, padding and concatenation.

Each of the latter is a generator like ``Lowering.evaluate``: it yields the (value, coordinates,
mask) it needs and is sent the operand that stands for it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..errors import check
from ..ir.node import Node, Value
from ..ir.types import Dim, TensorType, contiguous_strides, simplify_dim
from ..ops.view import groups
from .index import Cond, Index, constant, delinearize, floordiv, linearize, mod, scale, value
from .kernel import Check, Compute, Operand, Ref

if TYPE_CHECKING:
    from .lower import Lowering

Coords: TypeAlias = "tuple[Index, ...]"
Mask: TypeAlias = "tuple[Cond, ...]"
Want: TypeAlias = "tuple[Value, Coords, Mask]"
Wants: TypeAlias = "Generator[Want, Operand, Operand]"


def broadcast(t: TensorType, coords: Coords) -> Coords:
    """The coordinates in an operand that broadcasts to the result."""
    zero = constant(0)
    mine = coords[len(coords) - t.rank :] if t.rank else ()
    return tuple(zero if n == 1 else c for c, n in zip(mine, t.shape, strict=True))


def through_view(node: Node, coords: Coords) -> Coords:
    """Coordinates in the operand of a view of the element at ``coords`` in its result.

    Raises:
        TesselError: a view that has no index map.
    """
    x = node.operands[0].type
    name = node.op.name
    if name == "permute":
        out: list[Index] = [constant(0)] * x.rank
        for c, d in zip(coords, node.attrs["dims"], strict=True):
            out[d] = c
        return tuple(out)
    if name == "expand":
        return broadcast(x, coords)
    if name == "slice":
        d = node.attrs["dim"] % x.rank
        moved = scale(coords[d], node.attrs.get("step", 1)) + node.attrs["start"]
        return (*coords[:d], moved, *coords[d + 1 :])
    if name == "flip":
        flipped = {d % x.rank for d in node.attrs["dims"]}
        return tuple(
            scale(c, -1) + simplify_dim(n - 1) if d in flipped else c
            for d, (c, n) in enumerate(zip(coords, x.shape, strict=True))
        )
    check(name == "reshape", lambda: f"no index map for the view {name} at {node.loc}")
    return reshape_coords(x.shape, node.type.shape, coords)


def reshape_coords(old: Sequence[Dim], new: Sequence[Dim], coords: Coords) -> Coords:
    """Coordinates in shape ``old`` of the element at ``coords`` in shape ``new``.

    >>> from tessel.tiles.index import var
    >>> x, y = var("x", 4), var("y", 6)
    >>> [str(c) for c in reshape_coords((2, 2, 6), (4, 6), (x, y))]
    ['x // 2', 'x % 2', 'y']
    """
    out: list[Index] = [constant(0)] * len(old)
    for before, after in groups(old, new):
        shape = [new[d] for d in after]
        inner = [constant(0) if new[d] == 1 else coords[d] for d in after]  # also where a mask says outside
        flat = linearize(inner, contiguous_strides(shape))
        for d, c in zip(before, delinearize(flat, [old[d] for d in before]), strict=True):
            out[d] = constant(0) if old[d] == 1 else c
    return tuple(out)


# ---------------------------------------------------------------------- gathers, padding, concatenation


def _cat(low: Lowering, node: Node, coords: Coords, mask: Mask) -> Wants:
    d = node.attrs["dim"] % node.type.rank
    pieces = list(node.operands)
    offset: Dim = 0
    ends: list[Dim] = []
    starts: list[Dim] = []
    for v in pieces:
        starts.append(offset)
        offset = simplify_dim(offset + v.shape[d])
        ends.append(offset)
    got: Operand = None
    # From the last piece to the first: where(place < end of piece, piece, what comes after).
    for v, start, end in reversed(list(zip(pieces, starts, ends, strict=True))):
        cond = Cond(coords[d], start, end)
        inside = (*coords[:d], coords[d] + simplify_dim(-start), *coords[d + 1 :])
        if got is None and len(pieces) == 1:
            return (yield (v, inside, mask))
        one = yield (v, inside, (*mask, cond))
        if got is None:
            got = one
            continue
        test = low.test(Cond(coords[d], None, end))
        got = low.compute("where", (test, one, got), node.type.dtype, node.type.dtype)
    return got


def _pad(low: Lowering, node: Node, coords: Coords, mask: Mask) -> Wants:
    x = node.operands[0]
    conds: list[Cond] = []
    inside: list[Index] = []
    sides = zip(coords, node.attrs["low"], node.attrs["high"], x.shape, strict=True)
    for c, before, after, size in sides:
        inside.append(c + simplify_dim(-before))
        if before != 0 or after != 0:
            conds.append(Cond(c, before if before != 0 else None, simplify_dim(before + size) if after != 0 else None))
    got = yield (x, tuple(inside), (*mask, *conds))
    if not conds:
        return got
    test = low.test(*conds)
    return low.compute("where", (test, got, node.attrs["value"]), node.type.dtype, node.type.dtype)


def _slice_scatter(low: Lowering, node: Node, coords: Coords, mask: Mask) -> Wants:
    x, src = node.operands
    d = node.attrs["dim"] % node.type.rank
    start, size, step = node.attrs["start"], node.attrs["size"], node.attrs.get("step", 1)
    away = coords[d] + simplify_dim(-start)
    conds = [Cond(coords[d], start, simplify_dim(start + size * step))]
    place = away
    if step != 1:
        conds.append(Cond(mod(away, step), 0, 1))
        place = floordiv(away, step)
    new = yield (src, (*coords[:d], place, *coords[d + 1 :]), (*mask, *conds))
    old = yield (x, coords, mask)
    test = low.test(*conds)
    return low.compute("where", (test, new, old), node.type.dtype, node.type.dtype)


def _lookup(low: Lowering, node: Node, index: Operand, v: Value, size: Dim, mask: Mask, wrap: bool) -> Index:
    """An index read from memory as a coordinate, checked as eager checks it."""
    if not isinstance(index, Ref):
        return constant(index)
    dtype = v.dtype
    if wrap:
        negative = low.compute("lt", (index, 0), torch.bool, dtype)
        moved = low.compute("add", (index, size), dtype, dtype)
        index = low.compute("where", (negative, moved, index), dtype, dtype)
    assert isinstance(index, Ref)
    if _masked(low, index, size):
        return value(index.number, size)
    low.stmts.append(Check(index, size, mask, f"index out of range in self ({node.op.name} at {node.loc})"))
    return value(index.number, size)


def _masked(low: Lowering, index: Ref, size: Dim) -> bool:
    """Whether an index is some bits of a word, of which ``size`` has all: nothing is left to check."""
    made = {s.out: s for s in low.stmts if isinstance(s, Compute)}
    at = made.get(index.number)
    while at is not None and at.op == "cast" and isinstance(at.args[0], Ref):
        if at.dtype not in (torch.int32, torch.int64):  # a narrower one could turn bits into a sign
            return False
        at = made.get(at.args[0].number)
    bits = at.args[1] if at is not None and at.op == "bitwise_and" else None
    return isinstance(bits, int) and isinstance(size, int) and 0 <= bits < size


def _embedding(low: Lowering, node: Node, coords: Coords, mask: Mask) -> Wants:
    weight, ids = node.operands
    _whole(node)
    index = yield (ids, coords[: ids.type.rank], mask)
    row = _lookup(low, node, index, ids, weight.shape[0], mask, wrap=False)
    return (yield (weight, (row, *coords[ids.type.rank :]), mask))


def _gather(low: Lowering, node: Node, coords: Coords, mask: Mask) -> Wants:
    x, ids = node.operands
    _whole(node)
    d = node.attrs["dim"] % max(x.type.rank, 1)
    index = yield (ids, coords, mask)
    row = _lookup(low, node, index, ids, x.shape[d], mask, wrap=False)
    return (yield (x, (*coords[:d], row, *coords[d + 1 :]), mask))


def _index_select(low: Lowering, node: Node, coords: Coords, mask: Mask) -> Wants:
    x, ids = node.operands
    _whole(node)
    d = node.attrs["dim"] % max(x.type.rank, 1)
    index = yield (ids, (coords[d],) if ids.type.rank else (), mask)
    row = _lookup(low, node, index, ids, x.shape[d], mask, wrap=False)
    return (yield (x, (*coords[:d], row, *coords[d + 1 :]), mask))


def _index(low: Lowering, node: Node, coords: Coords, mask: Mask) -> Wants:
    x, indices = node.args
    place = yield from indexed_place(low, node, x, indices, coords, mask)
    return (yield (x, place, mask))


def indexed_place(
    low: Lowering, node: Node, x: Value, indices: Sequence[Value | None], coords: Coords, mask: Mask
) -> Generator[Want, Operand, Coords]:
    """Where ``x[i, :, j]`` lies in x: the broadcast index dims come where the indices stand together, else first."""
    used = [d for d, i in enumerate(indices) if i is not None]
    together = used == list(range(used[0], used[-1] + 1))
    rank = max(indices[d].type.rank for d in used)  # type: ignore[union-attr]
    at = used[0] if together else 0
    chosen, rest = coords[at : at + rank], iter((*coords[:at], *coords[at + rank :]))
    place: list[Index] = []
    for d in range(x.type.rank):
        ids = indices[d] if d < len(indices) else None
        if ids is None:
            place.append(next(rest))
            continue
        index = yield (ids, broadcast(ids.type, chosen), mask)
        place.append(_lookup(low, node, index, ids, x.shape[d], mask, wrap=True))
    return tuple(place)


def _whole(node: Node) -> None:
    check(
        node.attrs.get("offset") is None,
        lambda: f"{node.op.name} at {node.loc}: a split table has no kernel yet",
    )


INDEXED: dict[str, Any] = {
    "cat": _cat,
    "pad": _pad,
    "slice_scatter": _slice_scatter,
    "embedding": _embedding,
    "gather": _gather,
    "index_select": _index_select,
    "index": _index,
}


__all__ = ["INDEXED", "Coords", "Mask", "Wants", "broadcast", "indexed_place", "reshape_coords", "through_view"]
