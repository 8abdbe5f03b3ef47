"""Views: the result is an index map of the one operand; types carry the view's strides where it is one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from ..errors import TesselError, check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, dim_equal, product, simplify_dim
from .common import axes, axis, is_one, letters, need_tensor, operand_types, plain, result, table, words
from .dims import Piece, piece_shape, try_divide


def concrete(shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape attribute with sympy constants made ints, for torch."""
    return tuple(plain(n) for n in shape)


# ---------------------------------------------------------------- reshape


def _reshape_infer(x: Any, shape: Sequence[Dim]) -> tuple[TensorType, ...]:
    need_tensor("reshape", x)
    check(
        all(not isinstance(n, int) or n >= 0 for n in shape),
        lambda: f"reshape: {tuple(shape)} has a negative size; work out the -1 first",
    )
    check(
        dim_equal(product(x.shape), product(shape)),
        lambda: f"reshape: {x} has {x.numel} elements, shape {tuple(shape)} has {product(shape)}",
    )
    return (result(shape, x.dtype, x, strides=view_strides(x, shape)),)


def view_strides(x: TensorType, shape: Sequence[Dim]) -> tuple[Dim, ...] | None:
    """The strides of ``x`` seen in another shape, ``None`` (row-major) where it must be copied."""
    if x.contiguous:
        return None
    strides: list[Dim] = []
    for old, new in groups(x.shape, shape):
        # Within a group the old dimensions must lie in memory as one row-major block.
        old = [d for d in old if not is_one(x.shape[d])]
        for outer, inner in pairwise(old):
            if not dim_equal(x.strides[outer], simplify_dim(x.strides[inner] * x.shape[inner])):
                return None
        step: Dim = x.strides[old[-1]] if old else 1
        block: list[Dim] = []
        for d in reversed(new):
            block.append(step)
            step = simplify_dim(step * shape[d])
        strides.extend(reversed(block))
    return tuple(strides)


def groups(old: Sequence[Dim], new: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions with equal products on both sides.

    >>> groups((2, 3, 4), (6, 2, 2))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i], [j]) if i < len(old) and j < len(new) else ([], [])
        if not left:  # what is left over on one side has size 1
            found.append((list(range(i, len(old))), list(range(j, len(new)))))
            break
        a, b = old[i], new[j]
        i, j = i + 1, j + 1
        while not dim_equal(a, b):
            if i < len(old) and (j == len(new) or try_divide(b, a) is not None):
                a, i = simplify_dim(a * old[i]), i + 1
                left.append(i - 1)
            elif j < len(new) and (i == len(old) or try_divide(a, b) is not None):
                b, j = simplify_dim(b * new[j]), j + 1
                right.append(j - 1)
            elif i < len(old):
                a, i = simplify_dim(a * old[i]), i + 1
                left.append(i - 1)
            else:
                return [(list(range(len(old))), list(range(len(new))))]
        found.append((left, right))
    return found


def _reshape_dims(node: Node) -> str:
    (x,) = operand_types(node)
    before: list[list[str]] = [[] for _ in x.shape]
    after: list[list[str]] = [[] for _ in node.type.shape]
    count = 0
    for old, new in groups(x.shape, node.type.shape):
        factors = _shared_factors([x.shape[d] for d in old], [node.type.shape[d] for d in new])
        if factors is None:
            # No common refinement: the dimensions of this group stay whole, each under its own name.
            for places, word in ((old, before), (new, after)):
                for d in places:
                    shape = x.shape if word is before else node.type.shape
                    if not is_one(shape[d]):
                        word[d].append(letters(1, count)[0] + "*")
                        count += 1
            continue
        for i, j in factors:
            (name,) = letters(1, count)
            before[old[i]].append(name)
            after[new[j]].append(name)
            count += 1
    return words([list(map(_word, before))], [list(map(_word, after))])


def _word(names: list[str]) -> str:
    return "1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})"


def _shared_factors(old: list[Dim], new: list[Dim]) -> list[tuple[int, int]] | None:
    """Pairs (old dim, new dim) for each factor of the common refinement, outermost first."""
    pairs: list[tuple[int, int]] = []
    i = j = 0
    a: Dim = 1
    b: Dim = 1
    while True:
        while is_one(a) and i < len(old):
            a, i = old[i], i + 1
        while is_one(b) and j < len(new):
            b, j = new[j], j + 1
        if is_one(a) and is_one(b):
            return pairs
        pairs.append((i - 1, j - 1))
        if (rest := try_divide(a, b)) is not None:
            a, b = rest, 1
        elif (rest := try_divide(b, a)) is not None:
            a, b = 1, rest
        else:
            return None


def _shape_split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """The piece's own result shape."""
    return Piece({"shape": piece_shape(node, factor, size)})


# ---------------------------------------------------------------- permute, expand, slice, flip


def _permute_infer(x: Any, dims: Sequence[int]) -> tuple[TensorType, ...]:
    need_tensor("permute", x)
    check(
        len(dims) == x.rank and sorted(dims) == list(range(x.rank)),
        lambda: f"permute: dims {tuple(dims)} are no order of the {x.rank} dims of {x}",
    )
    return (result([x.shape[d] for d in dims], x.dtype, x, strides=[x.strides[d] for d in dims]),)


def _permute_dims(node: Node) -> str:
    names = letters(node.type.rank)
    return words([names], [[names[d] for d in node.attrs["dims"]]])


def _expand_infer(x: Any, shape: Sequence[Dim]) -> tuple[TensorType, ...]:
    need_tensor("expand", x)
    new = len(shape) - x.rank
    check(new >= 0, lambda: f"expand: {x} has more dims than {tuple(shape)}")
    strides: list[Dim] = [0] * new
    for n, want, step in zip(x.shape, shape[new:], x.strides, strict=True):
        if not is_one(n) and not dim_equal(n, want):
            raise TesselError(f"expand: {x} to {tuple(shape)}: size {n} cannot become {want}")
        strides.append(step if dim_equal(n, want) else 0)
    return (result(shape, x.dtype, x, strides=strides),)


def _expand_dims(node: Node) -> str:
    (x,) = operand_types(node)
    shape = node.type.shape
    names = ["1" if is_one(n) else w for w, n in zip(letters(len(shape)), shape, strict=True)]
    new = len(shape) - x.rank
    return words([["1" if is_one(n) else w for w, n in zip(names[new:], x.shape, strict=True)]], [names])


def _slice_infer(x: Any, dim: int, start: Dim, size: Dim, step: Dim = 1) -> tuple[TensorType, ...]:
    need_tensor("slice", x)
    d = axis("slice", dim, x.rank)
    check(x.rank > 0, lambda: f"slice: {x} has no dims")
    check_slice("slice", x, d, start, size, step)
    shape = (*x.shape[:d], size, *x.shape[d + 1 :])
    strides = (*x.strides[:d], simplify_dim(x.strides[d] * step), *x.strides[d + 1 :])
    return (result(shape, x.dtype, x, strides=strides),)


def check_slice(op: str, x: TensorType, d: int, start: Dim, size: Dim, step: Dim) -> None:
    """Raise ``TesselError`` if a slice of known numbers leaves the tensor."""
    n = x.shape[d]
    check(not isinstance(step, int) or step > 0, lambda: f"{op}: step {step} must be positive")
    if all(isinstance(v, int) for v in (start, size, step, n)):
        inside = start >= 0 and size >= 0 and (size == 0 or start + (size - 1) * step < n)
        check(inside, lambda: f"{op}: start {start}, size {size}, step {step} leave dim {d} of {x}")


def _slice_dims(node: Node) -> str:
    (x,) = operand_types(node)
    d = axis("slice", node.attrs["dim"], x.rank)
    names = letters(x.rank)
    if dim_equal(x.shape[d], node.type.shape[d]):  # the whole dimension
        return words([names], [names])
    return words(
        [[w + "*" if i == d else w for i, w in enumerate(names)]],
        [[w + "2*" if i == d else w for i, w in enumerate(names)]],
    )


def _slice_ref(x: torch.Tensor, dim: int, start: int, size: int, step: int = 1) -> torch.Tensor:
    start, size, step = concrete((start, size, step))
    # The stop is clipped so that a size of zero gives an empty slice at any start.
    index = [slice(None)] * x.dim()
    index[dim] = slice(start, start + max(size - 1, 0) * step + 1 if size else start, step)
    return x[tuple(index)]


def _flip_infer(x: Any, dims: Sequence[int]) -> tuple[TensorType, ...]:
    need_tensor("flip", x)
    axes("flip", dims, x.rank)
    return (result(x.shape, x.dtype, x),)  # negative strides do not exist in torch


def _flip_dims(node: Node) -> str:
    (x,) = operand_types(node)
    held = axes("flip", node.attrs["dims"], x.rank)
    names = [w + "*" if d in held else w for d, w in enumerate(letters(x.rank))]
    return words([names], [names])


VIEW = table(
    Op(
        "reshape",
        "view",
        dims=_reshape_dims,
        ref=lambda x, shape: x.reshape(concrete(shape)),
        infer=_reshape_infer,
        split=_shape_split,
        doc="reshape(x, shape=), row-major order of elements",
    ),
    Op("permute", "view", dims=_permute_dims, ref=lambda x, dims: x.permute(dims), infer=_permute_infer),
    Op(
        "expand",
        "view",
        dims=_expand_dims,
        ref=lambda x, shape: x.expand(concrete(shape)),
        infer=_expand_infer,
        split=_shape_split,
        doc="expand(x, shape=): dims of size 1, or new leading ones, are repeated",
    ),
    Op(
        "slice",
        "view",
        dims=_slice_dims,
        ref=_slice_ref,
        infer=_slice_infer,
        split=lambda node, factor, start, size: Piece(
            {"size": piece_shape(node, factor, size)[node.attrs["dim"] % node.type.rank]}
        ),
        doc="slice(x, dim=, start=, size=, step=): elements start, start + step, ...",
    ),
    Op("flip", "view", dims=_flip_dims, ref=torch.flip, infer=_flip_infer),
)

__all__ = ["VIEW", "check_slice", "concrete", "groups", "view_strides"]
