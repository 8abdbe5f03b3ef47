"""The dims notation: which axes an operator has, and how each may be split.

One string says it, operands before ``->``, results after it, separated by commas:

    m k+, k+ n -> m n

Each word is one dimension of one tensor:

====== ==================================================================================
``a``    a map axis: split it anywhere, the pieces' results are joined along it; a result
         that has not the axis is the same for every piece
``a+``   a reduced axis: split it, then combine the pieces' results as the op's ``combine``
         says (``a+max`` names another one; what each means is in ``combine.py``). A result
         that has the axis is joined along it (gradients: some results sum, some keep it)
``a*``   must stay whole
``a^``   a window axis: pieces of the result read overlapping pieces of the operand
``1``    a dimension of size one (a broadcast)
``(a b)`` several axes in one dimension, the first the outermost (reshape)
``.``    alone: a 0-d tensor
====== ==================================================================================

Only tensor operands count: ``None`` and literals are skipped, a tuple of values counts each.

What a plain split cannot say is in the record ``Piece`` that ``Op.split`` gives: an offset
or a local shape (as changed attributes), a window, operands that count once.

    >>> d = parse("b m k+, b k+ n -> b m n")
    >>> str(d)
    'b m k+, b k+ n -> b m n'
    >>> d.factors["k"]
    Factor(name='k', kind='reduce', combine='sum')
    >>> d.where("n")
    (((1, 2),), ((0, 2),))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, TypeAlias

from ..errors import TesselError, check
from ..ir.node import Node
from ..ir.types import Dim, TensorType, dim_equal, product, try_divide

KIND_MARKS = {"map": "", "reduce": "+", "whole": "*", "window": "^"}
MARK_KINDS = {mark: kind for kind, mark in KIND_MARKS.items()}
COMBINE_NAMES = frozenset("sum prod max min any all mean logsumexp softmax-merge nll-merge argmax argmin scan".split())


@dataclass(frozen=True, slots=True)
class Factor:
    """One named axis. ``kind``: ``map``, ``reduce`` (then with a ``combine``), ``whole`` or ``window``."""

    name: str
    kind: str = "map"
    combine: str = ""

    def text(self, default_combine: str) -> str:
        mark = KIND_MARKS[self.kind]
        return self.name + mark + (self.combine if self.combine not in ("", default_combine) else "")


Term: TypeAlias = "tuple[Factor, ...]"
Shape: TypeAlias = "tuple[Term, ...]"


@dataclass(frozen=True)
class Dims:
    """A parsed string: for each operand and each result, for each dimension, its factors (none: size one)."""

    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    combine: str = "sum"

    @cached_property
    def factors(self) -> Mapping[str, Factor]:
        """Every factor by name, in order of appearance."""
        found = {f.name: f for shape in (*self.operands, *self.results) for term in shape for f in term}
        return MappingProxyType(found)

    def where(self, name: str) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """The places (tensor, dimension) of a factor among the operands and among the results."""

        def places(shapes: tuple[Shape, ...]) -> tuple[tuple[int, int], ...]:
            return tuple(
                (i, d)
                for i, shape in enumerate(shapes)
                for d, term in enumerate(shape)
                if any(f.name == name for f in term)
            )

        return places(self.operands), places(self.results)

    def __str__(self) -> str:
        def side(shapes: tuple[Shape, ...]) -> str:
            return ", ".join(" ".join(map(word, shape)) or "." for shape in shapes)

        def word(term: Term) -> str:
            words = [f.text(self.combine) for f in term]
            return "1" if not words else words[0] if len(words) == 1 else f"({' '.join(words)})"

        return f"{side(self.operands)} -> {side(self.results)}".strip()


@dataclass(frozen=True, slots=True)
class Window:
    """Output place ``o`` reads input places ``o*stride - low`` to ``o*stride + high``.

    Places outside the operand read as ``fill``; the piece's attributes ask for no padding.
    """

    stride: int
    low: int
    high: int
    fill: float = 0.0


@dataclass(frozen=True)
class Piece:
    """What one piece of a split factor needs beside its share of the operands.

    Attributes:
        attrs: attributes that change (an offset, a local shape).
        args: literal arguments that change, by position.
        once: operands (by number among the tensor operands) that only the first piece
            may read; the others take zeros, or they would be counted again.
        window: for ``^`` factors, what the piece reads of the operand.
    """

    attrs: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[int, Any] = field(default_factory=dict)
    once: tuple[int, ...] = ()
    window: Window | None = None


FACTOR = re.compile(r"([A-Za-z_]\w*)(\+[a-z\-]*|[*^])?\Z")
TOKEN = re.compile(r"\(([^()]*)\)|([^\s()]+)|([()])")


@lru_cache(maxsize=4096)
def parse(text: str, combine: str = "sum") -> Dims:
    """Parse a dims string; ``combine`` is what a bare ``+`` means.

    Raises ``TesselError`` naming the word that is wrong.
    """
    check(text.count("->") == 1, lambda: f"dims {text!r}: one '->' between operands and results is needed")
    left, right = text.split("->")
    dims = Dims(_side(left, text, combine), _side(right, text, combine), combine)
    _check_consistent(dims, text)
    return dims


def _side(side: str, text: str, combine: str) -> tuple[Shape, ...]:
    return tuple(_shape(words, text, combine) for words in side.split(",")) if side.strip() else ()


def _shape(words: str, text: str, combine: str) -> Shape:
    if words.strip() == ".":
        return ()
    shape: list[Term] = []
    for match in TOKEN.finditer(words):
        group, word, stray = match.groups()
        if stray is not None:
            raise TesselError(f"dims {text!r}: unbalanced parenthesis in {words.strip()!r}")
        if group is not None:
            shape.append(tuple(_factor(w, text, combine) for w in group.split()))
        elif word == "1":
            shape.append(())
        else:
            shape.append((_factor(word, text, combine),))
    check(bool(shape), lambda: f"dims {text!r}: an empty entry; write '.' for a 0-d tensor")
    return tuple(shape)


def _factor(word: str, text: str, combine: str) -> Factor:
    match = FACTOR.match(word)
    if match is None:
        raise TesselError(
            f"dims {text!r}: cannot read {word!r}; a factor is a name, then nothing, '+', "
            "'+<combine>', '*' or '^'"
        )
    name, mark = match.group(1), match.group(2) or ""
    if not mark.startswith("+"):
        return Factor(name, MARK_KINDS[mark])
    named = mark[1:] or combine
    check(
        named in COMBINE_NAMES,
        lambda: f"dims {text!r}: {word!r} names no combine; there are {', '.join(sorted(COMBINE_NAMES))}",
    )
    return Factor(name, "reduce", named)


def _check_consistent(dims: Dims, text: str) -> None:
    seen: dict[str, Factor] = {}
    for shape in (*dims.operands, *dims.results):
        for factor in (f for term in shape for f in term):
            known = seen.setdefault(factor.name, factor)
            if known != factor:
                raise TesselError(
                    f"dims {text!r}: {known.text('')!r} and {factor.text('')!r}; say the same everywhere"
                )
    for name, factor in seen.items():
        read, made = dims.where(name)
        if factor.kind == "reduce":
            if not read:
                raise TesselError(f"dims {text!r}: {name} is reduced but no operand has it")
            if factor.combine == "scan" and not made:
                raise TesselError(f"dims {text!r}: {name} is scanned, so a result must have it")
        if factor.kind == "window" and not (read and made):
            raise TesselError(f"dims {text!r}: the window axis {name} must be in an operand and in a result")


def dims_of(node: Node) -> Dims:
    """The parsed dims of a node; the number of operands and ranks are checked against its types."""
    op = node.op
    text = op.dims if isinstance(op.dims, str) else op.dims(node)
    dims = parse(text, op.combine)
    operands = [v.type for v in node.operands if isinstance(v.type, TensorType)]
    results = [t for t in node.types if isinstance(t, TensorType)]
    for what, shapes, types in (("operand", dims.operands, operands), ("result", dims.results, results)):
        if len(shapes) != len(types):
            raise TesselError(
                f"{op.name}: dims {text!r} have {len(shapes)} {what}s, the node has {len(types)}"
            )
        for i, (shape, type_) in enumerate(zip(shapes, types, strict=True)):
            if len(shape) != type_.rank:
                raise TesselError(
                    f"{op.name}: dims {text!r} give {what} {i} rank {len(shape)}, its type is {type_}"
                )
    return dims


def factor_sizes(node: Node, dims: Dims | None = None) -> dict[str, Dim]:
    """The size of every factor of a node (of a window factor: its size in the result).

    Raises ``TesselError`` if two places give one factor two sizes.
    """
    dims = dims_of(node) if dims is None else dims
    results = [t for t in node.types if isinstance(t, TensorType)]
    operands = [v.type for v in node.operands if isinstance(v.type, TensorType)]
    open_terms = [
        (term, size, i < len(results))
        for i, (shape, t) in enumerate(
            zip((*dims.results, *dims.operands), (*results, *operands), strict=True)
        )
        for term, size in zip(shape, t.shape, strict=True)
        if term
    ]
    sizes: dict[str, Dim] = {}
    while open_terms:
        later = []
        for term, size, is_result in open_terms:
            unknown = [f for f in term if f.name not in sizes]
            if len(unknown) == 1 and (unknown[0].kind != "window" or is_result):
                known = product(sizes[f.name] for f in term if f.name in sizes)
                sizes[unknown[0].name] = divide(size, known, node)
            elif len(unknown) > 0:
                later.append((term, size, is_result))
            elif not any(f.kind == "window" for f in term):
                got = product(sizes[f.name] for f in term)
                if not dim_equal(got, size):
                    name = " ".join(f.name for f in term)
                    raise TesselError(f"{node.op.name}: {name} has size {got} here and {size} there")
        check(len(later) < len(open_terms), lambda: f"{node.op.name}: cannot tell the sizes of '{dims}'")
        open_terms = later
    return sizes


@dataclass(frozen=True)
class Halo:
    """A window axis that may be split: pieces begin where pieces of the operand do.

    Attributes:
        operand, dim: where it lies.
        size: of that dimension.
        before, after: places of its neighbours that a piece reads.
        fill: what is read outside of the operand.
        args: literal arguments of a piece that has them at hand, by position.
    """

    operand: int
    dim: int
    size: int
    before: int
    after: int
    fill: float
    args: Mapping[int, Any]

    def fits(self, parts: int) -> bool:
        """Whether ``parts`` equal pieces have all they need from the pieces beside them."""
        return self.size % parts == 0 and max(self.before, self.after) <= self.size // parts


def window_of(node: Node, dims: Dims, factor: str) -> Halo | None:
    """How a window axis of a node may be split; None if it is none, or its pieces begin somewhere inside others."""
    if dims.factors[factor].kind != "window" or node.op.split is None:
        return None
    places = dims.where(factor)[0]
    sizes = factor_sizes(node, dims)
    piece = node.op.split(node, factor, 0, sizes[factor])
    if len(places) != 1 or piece.window is None:
        return None
    operand, dim = places[0]
    size = [v.type for v in node.operands if isinstance(v.type, TensorType)][operand].shape[dim]
    w = piece.window
    numbers = (size, sizes[factor], w.stride, w.low, w.high)
    if not all(isinstance(n, int) for n in numbers) or size != w.stride * sizes[factor] or w.low < 0 or w.high < 0:
        return None
    return Halo(operand, dim, size, w.low, max(0, w.high - w.stride + 1), w.fill, piece.args)  # type: ignore[arg-type]


def divide(a: Dim, b: Dim, node: Node | None = None) -> Dim:
    """``a / b`` where it is exact; raises ``TesselError`` where it cannot be."""
    got = try_divide(a, b)
    if got is None:
        raise TesselError(f"{node.op.name if node else 'dims'}: size {a} is not a multiple of {b}")
    return got


def piece_shape(node: Node, factor: str, size: Dim, result: int = 0) -> tuple[Dim, ...]:
    """The shape of a result when ``factor`` has only ``size`` elements."""
    dims = dims_of(node)
    sizes = factor_sizes(node, dims) | {factor: size}
    return tuple(product(sizes[f.name] for f in term) if term else 1 for term in dims.results[result])


__all__ = [
    "COMBINE_NAMES",
    "Dims",
    "Factor",
    "Halo",
    "Piece",
    "Window",
    "dims_of",
    "divide",
    "factor_sizes",
    "parse",
    "piece_shape",
    "try_divide",
    "window_of",
]
