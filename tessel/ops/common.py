"""What the operator tables share: the table maker, shape and dtype rules, dims writers."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch

from ..errors import TesselError, check
from ..ir.nested import leaves
from ..ir.node import Node, Op, Value
from ..ir.types import Dim, TensorType, dim_equal

HALVES = (torch.float16, torch.bfloat16)


def table(*entries: Op | Iterable[Op]) -> dict[str, Op]:
    """Operators by name. Raises ``TesselError`` if a name comes twice.

    >>> a = Op("a", "pointwise", "a -> a", ref=abs)
    >>> table(a)
    {'a': Op(a)}
    """
    ops: dict[str, Op] = {}
    for entry in entries:
        for op in (entry,) if isinstance(entry, Op) else entry:
            if op.name in ops:
                raise TesselError(f"operator {op.name} is in the table twice")
            ops[op.name] = op
    return ops


# ---------------------------------------------------------------- arguments


def operand_types(node: Node) -> list[TensorType]:
    """The types of a node's tensor operands, the order that dims strings use."""
    return [v.type for v in node.operands if isinstance(v.type, TensorType)]


def arg_types(node: Node) -> list[Any]:
    """The node's arguments with values replaced by their types."""
    return [a.type if isinstance(a, Value) else a for a in node.args]


def need_tensor(op: str, *args: Any) -> None:
    for i, a in enumerate(args):
        if not isinstance(a, TensorType):
            raise TesselError(f"{op}: argument {i} must be a tensor, got {a!r}")


def device_of(types: Sequence[TensorType]) -> str | None:
    """The device of a result: that of the operands; 0-d host scalars do not decide."""
    for t in types:
        if t.rank > 0:
            return t.device
    return next((t.device for t in types if t.device is None), types[0].device if types else None)


def result(
    shape: Sequence[Dim], dtype: torch.dtype, *like: Any, strides: Sequence[Dim] | None = None
) -> TensorType:
    """The type of a result on the device of ``like``."""
    return TensorType(shape, dtype, strides, device_of(list(leaves(like, TensorType))))


def plain(x: Any) -> Any:
    """A sympy constant as an int or a float; anything else as it is."""
    if isinstance(x, sympy.Basic) and x.is_number:
        return int(x) if x.is_integer else float(x)
    return x


# ---------------------------------------------------------------- rules


def broadcast(op: str, types: Sequence[TensorType]) -> tuple[Dim, ...]:
    """The common shape under numpy's rule. Raises ``TesselError`` with the shapes that clash."""
    if types and all(t.shape == types[0].shape for t in types):
        return types[0].shape
    shape: list[Dim] = []
    for place in range(1, max((t.rank for t in types), default=0) + 1):
        sizes = [t.shape[-place] for t in types if t.rank >= place]
        wide = [s for s in sizes if not (isinstance(s, int) and s == 1)]
        shape.append(wide[0] if wide else 1)
        for s in wide:
            if not dim_equal(s, wide[0]):
                given = " and ".join(map(str, types))
                raise TesselError(f"{op}: shapes {given} do not broadcast, {wide[0]} against {s}")
    return tuple(reversed(shape))


def same_dtype(op: str, types: Sequence[TensorType]) -> torch.dtype:
    """The one dtype of the operands. Raises ``TesselError`` if they differ."""
    check(bool(types), lambda: f"{op}: no tensor operand; make one with full")
    for t in types:
        if t.dtype != types[0].dtype:
            raise TesselError(f"{op}: operands are {types[0]} and {t}; cast them to one dtype first")
    return types[0].dtype


def axis(op: str, dim: int, rank: int) -> int:
    """A dimension number as a non-negative one. Raises ``TesselError`` if there is no such dimension."""
    size = max(rank, 1)  # torch allows dim 0 and -1 of a 0-d tensor
    check(isinstance(dim, int) and -size <= dim < size, lambda: f"{op}: no dim {dim} in rank {rank}")
    return dim % size


def axes(op: str, dims: Sequence[int], rank: int) -> tuple[int, ...]:
    """Dimension numbers as non-negative ones, as ``axis`` does.

    Raises:
        TesselError: there is no such dimension, or one is named twice.
    """
    got = tuple(axis(op, d, rank) for d in dims)
    check(len(set(got)) == len(got), lambda: f"{op}: dims {tuple(dims)} name a dim twice")
    return got


def equal_shapes(op: str, a: TensorType, b: TensorType, skip: int | None = None) -> None:
    """Raise ``TesselError`` unless two tensors have the same shape, dimension ``skip`` aside."""
    ok = a.rank == b.rank and all(
        d == skip or dim_equal(x, y) for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=True))
    )
    check(ok, lambda: f"{op}: shapes of {a} and {b} differ")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What torch sums in: integers and bools in i64, floats in themselves."""
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.int64


def is_one(d: Dim) -> bool:
    return isinstance(d, int) and d == 1


# ---------------------------------------------------------------- dims writers


def letters(n: int, first: int = 0) -> list[str]:
    """``n`` axis names: a, b, ... z, a1, b1, ...

    >>> letters(3), letters(2, 25)
    (['a', 'b', 'c'], ['z', 'a1'])
    """
    names = string.ascii_lowercase
    return [names[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(first, first + n)]


def words(operands: Iterable[Sequence[str]], results: Iterable[Sequence[str]]) -> str:
    """A dims string from words, one list of words a tensor.

    >>> words([["a", "b+"], []], [["a"]])
    'a b+, . -> a'
    """

    def side(lists: Iterable[Sequence[str]]) -> str:
        return ", ".join(" ".join(w) or "." for w in lists)

    return f"{side(operands)} -> {side(results)}".strip()


def aligned(t: TensorType, names: Sequence[str], shape: Sequence[Dim]) -> list[str]:
    """The names of a broadcast operand's dimensions: those of the result, ``1`` where it is broadcast."""
    if not t.rank:
        return []
    return ["1" if is_one(n) else w for w, n in zip(names[-t.rank :], t.shape, strict=True)]


def pointwise_dims(node: Node) -> str:
    """Every axis maps; operands are aligned to the right."""
    shape = node.type.shape
    names = ["1" if is_one(n) else w for w, n in zip(letters(len(shape)), shape, strict=True)]
    return words([aligned(t, names, shape) for t in operand_types(node)], [names] * len(node.types))


def along(node: Node, held: Iterable[int], mark: str = "*") -> str:
    """One operand and results of its shape: every axis maps but those in ``held``."""
    held = set(held)
    types = operand_types(node)
    names = [w + mark if d in held else w for d, w in enumerate(letters(types[0].rank))]
    return words([names] * len(types), [names] * len(node.types))


def whole_dims(node: Node) -> str:
    """Nothing may be split: what is said of opaque calls."""
    count = 0
    sides: list[list[list[str]]] = []
    for types in (operand_types(node), [t for t in node.types if isinstance(t, TensorType)]):
        side = []
        for t in types:
            side.append([w + "*" for w in letters(t.rank, count)])
            count += t.rank
        sides.append(side)
    return words(*sides)


__all__ = [
    "HALVES",
    "TesselError",
    "aligned",
    "along",
    "arg_types",
    "axes",
    "axis",
    "broadcast",
    "device_of",
    "equal_shapes",
    "is_one",
    "letters",
    "need_tensor",
    "operand_types",
    "plain",
    "pointwise_dims",
    "result",
    "same_dtype",
    "sum_dtype",
    "table",
    "whole_dims",
    "words",
]
