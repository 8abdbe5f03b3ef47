"""Operators that read an operand at computed places: cat, pad, gather, embedding and their like.

``gather``, ``embedding`` and ``index_select`` take ``offset``: the operand is then a piece of a
longer one that starts there, places outside the piece give zero, and the sum over the pieces
is the whole (the masked partial of a split vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, dim_equal, simplify_dim
from .common import (
    arg_types,
    axis,
    broadcast,
    equal_shapes,
    is_one,
    letters,
    need_tensor,
    operand_types,
    result,
    same_dtype,
    table,
    words,
)
from .dims import Piece
from .view import check_slice, concrete

INDEX_DTYPES = (torch.int64, torch.int32)


def _need_index(op: str, index: Any) -> None:
    need_tensor(op, index)
    check(index.dtype in INDEX_DTYPES, lambda: f"{op}: the index is {index}, it must be i64 or i32")


# ---------------------------------------------------------------- cat and pad


def _cat_infer(xs: tuple[Any, ...], dim: int) -> tuple[TensorType, ...]:
    need_tensor("cat", *xs)
    dtype = same_dtype("cat", xs)
    d = axis("cat", dim, xs[0].rank)
    for x in xs:
        equal_shapes("cat", x, xs[0], skip=d)
    total = simplify_dim(sum((x.shape[d] for x in xs[1:]), xs[0].shape[d]))
    return (result((*xs[0].shape[:d], total, *xs[0].shape[d + 1 :]), dtype, xs),)


def _cat_dims(node: Node) -> str:
    types = operand_types(node)
    d = axis("cat", node.attrs["dim"], node.type.rank)
    names = letters(node.type.rank)

    def one(suffix: str) -> list[str]:
        return [f"{w}{suffix}*" if i == d else w for i, w in enumerate(names)]

    return words([one(f"_{i}") for i in range(len(types))], [one("")])


def _pad_infer(x: Any, low: Sequence[int], high: Sequence[int], value: float = 0) -> tuple[TensorType, ...]:
    need_tensor("pad", x)
    check(
        len(low) == len(high) == x.rank,
        lambda: f"pad: low {tuple(low)} and high {tuple(high)} need one number for each dim of {x}",
    )
    check(
        all(not isinstance(n, int) or n >= 0 for n in (*low, *high)),
        lambda: f"pad: low {tuple(low)} and high {tuple(high)} must not be negative; slice instead",
    )
    shape = [simplify_dim(n + a + b) for n, a, b in zip(x.shape, low, high, strict=True)]
    return (result(shape, x.dtype, x),)


def _pad_ref(x: torch.Tensor, low: Sequence[int], high: Sequence[int], value: float = 0) -> torch.Tensor:
    widths = [w for pair in zip(reversed(concrete(low)), reversed(concrete(high)), strict=True) for w in pair]
    return torch.nn.functional.pad(x, widths, value=value)


def _pad_dims(node: Node) -> str:
    names = letters(node.type.rank)
    padded = [a != 0 or b != 0 for a, b in zip(node.attrs["low"], node.attrs["high"], strict=True)]
    return words(
        [[w + "*" if p else w for w, p in zip(names, padded, strict=True)]],
        [[w + "_*" if p else w for w, p in zip(names, padded, strict=True)]],
    )


# ---------------------------------------------------------------- gather and its like


def masked(index: torch.Tensor, offset: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The index into a piece of ``size`` starting at ``offset`` (clamped), and where it is inside."""
    local = index - offset
    inside = (local >= 0) & (local < size)
    return local.clamp(0, max(size - 1, 0)), inside


def _gather_infer(x: Any, index: Any, dim: int, offset: Any = None) -> tuple[TensorType, ...]:
    need_tensor("gather", x)
    _need_index("gather", index)
    check(x.rank == index.rank, lambda: f"gather: {x} and index {index} must have the same rank")
    axis("gather", dim, x.rank)
    return (result(index.shape, x.dtype, x),)


def _gather_ref(x: torch.Tensor, index: torch.Tensor, dim: int, offset: int | None = None) -> torch.Tensor:
    if offset is None:
        return torch.gather(x, dim, index.long())
    local, inside = masked(index.long(), offset, x.shape[dim])
    return torch.gather(x, dim, local).where(inside, 0) if x.shape[dim] else x.new_zeros(index.shape)


def _gather_dims(node: Node) -> str:
    x, index = operand_types(node)
    d = axis("gather", node.attrs["dim"], x.rank)
    read, at = [], []
    for i, (n, m, w) in enumerate(zip(x.shape, index.shape, letters(x.rank), strict=True)):
        if i == d:
            read.append(w + "_v+")
            at.append(w)
        elif dim_equal(n, m):
            read.append(w)
            at.append(w)
        else:  # the index is shorter here: rows beyond it are not read
            read.append(w + "_x*")
            at.append(w + "*")
    return words([read, at], [at])


def _table_split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """A piece of the table that is read takes the place where it starts; it gives a masked partial."""
    if factor.endswith("_v") or factor == "v":
        return Piece({"offset": (node.attrs.get("offset") or 0) + start})
    return Piece()


def _embedding_infer(weight: Any, index: Any, offset: Any = None) -> tuple[TensorType, ...]:
    need_tensor("embedding", weight)
    _need_index("embedding", index)
    check(weight.rank == 2, lambda: f"embedding: the weight is {weight}, it must be [rows, width]")
    return (result((*index.shape, weight.shape[1]), weight.dtype, weight),)


def _embedding_ref(weight: torch.Tensor, index: torch.Tensor, offset: int | None = None) -> torch.Tensor:
    if offset is None:
        return torch.nn.functional.embedding(index, weight)
    local, inside = masked(index, offset, weight.shape[0])
    if not weight.shape[0]:
        return weight.new_zeros((*index.shape, weight.shape[1]))
    return torch.nn.functional.embedding(local, weight).where(inside[..., None], 0)


def _embedding_dims(node: Node) -> str:
    names = [w.upper() for w in letters(operand_types(node)[1].rank)]
    return words([["v+", "d"], names], [[*names, "d"]])


def _select_infer(x: Any, index: Any, dim: int, offset: Any = None) -> tuple[TensorType, ...]:
    need_tensor("index_select", x)
    _need_index("index_select", index)
    d = axis("index_select", dim, x.rank)
    check(index.rank == 1, lambda: f"index_select: the index is {index}, it must have one dim")
    return (result((*x.shape[:d], index.shape[0], *x.shape[d + 1 :]), x.dtype, x),)


def _select_ref(x: torch.Tensor, index: torch.Tensor, dim: int, offset: int | None = None) -> torch.Tensor:
    if offset is None:
        return torch.index_select(x, dim, index)
    local, inside = masked(index, offset, x.shape[dim])
    shape = [1] * x.dim()
    shape[dim] = -1
    if not x.shape[dim]:
        return x.new_zeros((*x.shape[:dim], len(index), *x.shape[dim:][1:]))
    return torch.index_select(x, dim, local).where(inside.reshape(shape), 0)


def _select_dims(node: Node) -> str:
    x, _ = operand_types(node)
    d = axis("index_select", node.attrs["dim"], x.rank)
    names = letters(x.rank)
    return words(
        [[w + "_v+" if i == d else w for i, w in enumerate(names)], [names[d]]],
        [names],
    )


# ---------------------------------------------------------------- index (x[i, :, j])


def index_layout(
    op: str, x: TensorType, indices: Sequence[Any]
) -> tuple[tuple[int, ...], int, tuple[Dim, ...]]:
    """Which dims are indexed, where the index dims go in the result, and the index tensors' common shape."""
    check(len(indices) <= x.rank, lambda: f"{op}: {len(indices)} indices for {x}")
    held = tuple(d for d, i in enumerate(indices) if i is not None)
    check(bool(held), lambda: f"{op}: no index given")
    given = [indices[d] for d in held]
    for i in given:
        _need_index(op, i)
    # Indices side by side put their dims in their place, others put them first.
    place = held[0] if held[-1] - held[0] == len(held) - 1 else 0
    return held, place, broadcast(op, given)


def _index_infer(x: Any, indices: tuple[Any, ...]) -> tuple[TensorType, ...]:
    need_tensor("index", x)
    held, place, shape = index_layout("index", x, indices)
    kept = [n for d, n in enumerate(x.shape) if d not in held]
    return (result((*kept[:place], *shape, *kept[place:]), x.dtype, x),)


def _index_ref(x: torch.Tensor, indices: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    # A None would make a new axis in Python's indexing: it is written as a full slice.
    return x[tuple(slice(None) if i is None else i for i in indices)]


def index_words(
    op: str, x: TensorType, indices: Sequence[Any]
) -> tuple[list[str], list[list[str]], list[str]]:
    """Words of the indexed tensor, of each index tensor, and of what the indexing gives."""
    held, place, shape = index_layout(op, x, indices)
    names = letters(x.rank)
    at = ["1" if is_one(n) else w.upper() for w, n in zip(letters(len(shape)), shape, strict=True)]
    kept = [w for d, w in enumerate(names) if d not in held]
    return (
        [w + "*" if d in held else w for d, w in enumerate(names)],
        [
            ["1" if is_one(n) else w for w, n in zip(at[len(at) - i.rank :], i.shape, strict=True)]
            for i in indices
            if i is not None
        ],
        [*kept[:place], *at, *kept[place:]],
    )


def _index_dims(node: Node) -> str:
    x, indices = arg_types(node)[0], [None if i is None else i.type for i in node.args[1]]
    read, at, made = index_words("index", x, indices)
    return words([read, *at], [made])


# ---------------------------------------------------------------- slice_scatter


def _slice_scatter_infer(
    x: Any, src: Any, dim: int, start: Dim, size: Dim, step: Dim = 1
) -> tuple[TensorType, ...]:
    need_tensor("slice_scatter", x, src)
    dtype = same_dtype("slice_scatter", (x, src))
    d = axis("slice_scatter", dim, x.rank)
    equal_shapes("slice_scatter", x, src, skip=d)
    check(dim_equal(src.shape[d], size), lambda: f"slice_scatter: size {size} but the source is {src}")
    check_slice("slice_scatter", x, d, start, size, step)
    return (result(x.shape, dtype, x, src),)


def _slice_scatter_ref(
    x: torch.Tensor, src: torch.Tensor, dim: int, start: int, size: int, step: int = 1
) -> torch.Tensor:
    start, size, step = concrete((start, size, step))
    index = [slice(None)] * x.dim()
    index[dim] = slice(start, start + max(size - 1, 0) * step + 1 if size else start, step)
    got = x.clone(memory_format=torch.contiguous_format)
    got[tuple(index)] = src
    return got


def _slice_scatter_dims(node: Node) -> str:
    x, _ = operand_types(node)
    d = axis("slice_scatter", node.attrs["dim"], x.rank)
    whole = [w + "*" if i == d else w for i, w in enumerate(letters(x.rank))]
    source = [w + "_s*" if i == d else w for i, w in enumerate(letters(x.rank))]
    return words([whole, source], [whole])


INDEX = table(
    Op(
        "cat",
        "index",
        dims=_cat_dims,
        ref=lambda xs, dim: torch.cat(xs, dim),
        infer=_cat_infer,
        doc="cat((x, y, ...), dim=)",
    ),
    Op(
        "pad",
        "index",
        dims=_pad_dims,
        ref=_pad_ref,
        infer=_pad_infer,
        doc="pad(x, low=, high=, value=): one non-negative number a dim on each side",
    ),
    Op(
        "gather",
        "index",
        dims=_gather_dims,
        ref=_gather_ref,
        infer=_gather_infer,
        split=_table_split,
        doc="gather(x, index, dim=) as torch.gather",
    ),
    Op(
        "embedding",
        "index",
        dims=_embedding_dims,
        ref=_embedding_ref,
        infer=_embedding_infer,
        split=_table_split,
        doc="embedding(weight, index): rows of a table",
    ),
    Op(
        "index_select",
        "index",
        dims=_select_dims,
        ref=_select_ref,
        infer=_select_infer,
        split=_table_split,
        doc="index_select(x, index, dim=) with a 1-d index",
    ),
    Op(
        "index",
        "index",
        dims=_index_dims,
        ref=_index_ref,
        infer=_index_infer,
        doc="index(x, (i | None, ...)): x[i, :, j]; negative places count from the end",
    ),
    Op(
        "slice_scatter",
        "index",
        dims=_slice_scatter_dims,
        ref=_slice_scatter_ref,
        infer=_slice_scatter_infer,
        doc="x with src written over the slice (dim=, start=, size=, step=)",
    ),
)

__all__ = ["INDEX", "INDEX_DTYPES", "index_layout", "index_words", "masked"]
