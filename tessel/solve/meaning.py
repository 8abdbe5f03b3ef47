"""What an operation computes, element by element, as terms for z3.

    matmul, m k, k n -> m n:     y[0,0] = x00 w00 + x01 w10 + x02 w20 + x03 w30

Sums, products, maxima and views are exact. All else is an uninterpreted function of what the operator's dims string
says that an element of its result depends on (the dims strings themselves are tested against the references).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any

import torch
import z3

from ..ir.node import Node, Value
from ..ir.types import TensorType
from ..ops.dims import Dims, Piece, Term

__all__ = ["Meaning", "Terms", "interpreted"]

_FOLDS = {"sum": "sum", "max": "max", "min": "min", "any": "max", "all": "min"}
_REDUCE = {"sum": "sum", "mean": "mean", "amax": "max", "amin": "min", "any": "max", "all": "min"}
_EXACT = frozenset({"add", "sub", "mul", "div", "neg", "copy"})


@dataclass
class Terms:
    """The elements of tensors: a tensor of numbers of terms, so that views and collectives move the numbers."""

    known: list[Any] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)

    def place(self, term: Any) -> int:
        """The number of a term."""
        key = term.get_id()
        if key not in self.places:
            self.places[key] = len(self.known)
            self.known.append(term)  # keeps it alive, and so its id its own
        return self.places[key]

    def leaves(self, shape: Sequence[int], name: str) -> torch.Tensor:
        """A tensor of new variables."""
        ids = [self.place(z3.Real(f"{name}[{i}]")) for i in range(prod(shape))]
        return torch.tensor(ids, dtype=torch.int64).reshape(tuple(shape))

    def filled(self, shape: Sequence[int], value: float) -> torch.Tensor:
        """A tensor of one number."""
        return torch.full(tuple(shape), self.place(_number(value)), dtype=torch.int64)

    def fold(self, xs: Sequence[torch.Tensor], how: str) -> torch.Tensor:
        """The tensors combined element by element."""
        if len(xs) == 1:
            return xs[0]
        flat = [x.reshape(-1).tolist() for x in xs]
        ids = [self.place(_fold([self.known[i] for i in some], how)) for some in zip(*flat, strict=True)]
        return torch.tensor(ids, dtype=torch.int64).reshape(xs[0].shape)


def _number(x: Any) -> Any:
    if isinstance(x, bool | int):
        return z3.RealVal(int(x))
    return z3.RealVal(str(Fraction(x))) if math.isfinite(x) else z3.Real(f"number {x}")


def _fold(xs: list[Any], how: str) -> Any:
    if how in ("sum", "mean"):
        total = z3.Sum(xs) if len(xs) > 1 else xs[0]
        return total if how == "sum" else total / len(xs)
    best = xs[0]
    for x in xs[1:]:
        best = z3.If(x >= best if how == "max" else x <= best, x, best)
    return best


def interpreted(node: Node) -> bool:
    """Whether an operation is computed exactly, not an uninterpreted function."""
    return node.op.kind == "view" or node.op.name in _EXACT or node.op.name in _REDUCE or _is_product(node)


def _is_product(node: Node) -> bool:
    return node.op.name in ("matmul", "linear", "linear_weight") and len(node.operands) == 2


# ---------------------------------------------------------------- an operation, element by element


class Meaning:
    """An operation on tensors of terms, in the space of its factors."""

    def __init__(self, node: Node, whole: Node, dims: Dims, terms: Terms) -> None:
        self.node, self.whole, self.dims, self.terms = node, whole, dims, terms

    def run(
        self, xs: Sequence[torch.Tensor], sizes: Mapping[str, int], starts: Mapping[str, int]
    ) -> list[torch.Tensor]:
        """The results; ``starts`` are the places of the first elements in the whole."""
        self.xs, self.sizes, self.starts = xs, sizes, starts
        return [self.result(i, shape) for i, shape in enumerate(self.dims.results)]

    def result(self, i: int, shape: tuple[Term, ...]) -> torch.Tensor:
        rule = self.element(i, {f.name for term in shape for f in term})
        lengths = [prod(self.sizes[f.name] for f in term) for term in shape]
        found = [self.terms.place(rule(self.factors(shape, at))) for at in product(*map(range, lengths))]
        return torch.tensor(found, dtype=torch.int64).reshape(lengths)

    def factors(self, shape: tuple[Term, ...], at: Sequence[int]) -> dict[str, int]:
        """Where a place of a tensor lies along each factor."""
        found: dict[str, int] = {}
        for term, n in zip(shape, at, strict=True):
            for f in reversed(term):
                found[f.name] = n % self.sizes[f.name]
                n //= self.sizes[f.name]
        return found

    def read(self, i: int, at: Mapping[str, int]) -> Any:
        """The element of an operand at a place of the factors."""
        place = []
        for term in self.dims.operands[i]:
            n = 0
            for f in term:
                n = n * self.sizes[f.name] + at[f.name]
            place.append(n)
        return self.terms.known[int(self.xs[i][tuple(place)])]

    def over(self, names: Sequence[str]) -> Iterator[dict[str, int]]:
        for at in product(*(range(self.sizes[n]) for n in names)):
            yield dict(zip(names, at, strict=True))

    def element(self, i: int, kept: set[str]) -> Callable[[dict[str, int]], Any]:
        """What computes one element of a result."""
        name, factors = self.node.op.name, self.dims.factors
        folded = [n for n, f in factors.items() if n not in kept and f.kind == "reduce"]
        if self.node.op.kind == "view":
            return self.viewed(kept)
        if name in _EXACT and self.node.op.kind == "pointwise":
            return lambda at: self.arithmetic([self.arg(a, at) for a in self.numbered()])
        if name in _REDUCE and len(self.xs) == 1:
            return lambda at: _fold([self.read(0, at | r) for r in self.over(folded)], _REDUCE[name])
        if _is_product(self.node):
            both = lambda at: self.read(0, at) * self.read(1, at)  # noqa: E731
            return lambda at: _fold([both(at | r) for r in self.over(folded)], "sum")
        return self.unknown(i, kept, folded)

    def viewed(self, kept: set[str]) -> Callable[[dict[str, int]], Any]:
        """A view takes elements over; which ones of a dimension that stays whole is the same for all shares."""
        own = {f.name for term in self.dims.operands[0] for f in term}

        def read(at: dict[str, int]) -> Any:
            chosen = sum(n for f, n in at.items() if f not in own)
            return self.read(0, at | {f: chosen % self.sizes[f] for f in own - kept})

        return read

    def numbered(self) -> list[Any]:
        """The arguments with each tensor replaced by its number among the operands, as a one-element list."""
        count = iter(range(len(self.xs)))
        return [[next(count)] if isinstance(a, Value) and isinstance(a.type, TensorType) else a for a in self.node.args]

    def arg(self, a: Any, at: dict[str, int]) -> Any:
        return self.read(a[0], at) if isinstance(a, list) else _number(a)

    def arithmetic(self, args: list[Any]) -> Any:
        name = self.node.op.name
        if name in ("neg", "copy"):
            return -args[0] if name == "neg" else args[0]
        a, b = args
        if name == "div":
            return a * z3.Function("1/", z3.RealSort(), z3.RealSort())(b)
        return a + b if name == "add" else a - b if name == "sub" else a * b

    def unknown(self, i: int, kept: set[str], folded: list[str]) -> Callable[[dict[str, int]], Any]:
        """An uninterpreted function of what the dims string says that an element depends on."""
        factors = self.dims.factors
        summed = [f for f in folded if factors[f].combine in _FOLDS]
        hows = {_FOLDS[factors[f].combine] for f in summed}
        how = hows.pop() if len(hows) == 1 else ""
        if not how:
            summed = []
        placed = [f for f in (*summed, *sorted(kept)) if self.apart(f) and self.placed(f)]
        once = {j for f in summed for j in self.once(f)}
        # literals of the whole: those of a share may differ as the operator's record of splits says
        words = [repr(a) for a in self.whole.args if not isinstance(a, Value | tuple)]
        title = f"{self.node.op.name}.{i} {words} {sorted((k, str(v)) for k, v in self.whole.attrs.items())}"

        def call(name: str, operands: Sequence[int], at: dict[str, int], places: Sequence[str]) -> Any:
            given = [z3.RealVal(at[f] + self.starts.get(f, 0)) for f in places]
            for j in operands:
                open_ = [f.name for term in self.dims.operands[j] for f in term if f.name not in at]
                given += [self.read(j, at | r) for r in self.over(list(dict.fromkeys(open_)))]
            sorts = [z3.RealSort()] * (len(given) + 1)
            return z3.Function(name, *sorts)(*given) if given else z3.Real(name)

        rest = [j for j in range(len(self.xs)) if j not in once]

        def element(at: dict[str, int]) -> Any:
            # a whole dimension of the result tells its elements apart, and says nothing about the operands
            mine = {f: n for f, n in at.items() if self.apart(f)}
            which = [n for f, n in at.items() if f not in mine]
            made = [call(f"{title} {which}", rest, mine | r, placed) for r in self.over(summed)]
            total = _fold(made, how) if how else made[0]
            for j in sorted(once):
                zero = all(z3.is_rational_value(self.terms.known[n]) for n in set(self.xs[j].reshape(-1).tolist()))
                if not zero:
                    total = total + call(f"{title} {which} once {j}", [j], mine, [])
            return total

        return element

    def piece(self, factor: str) -> Piece:
        size = self.sizes[factor]
        return self.whole.op.split(self.whole, factor, 0, size) if self.whole.op.split else Piece()

    def apart(self, factor: str) -> bool:
        """Whether elements along a factor are computed each from its own place of it."""
        f = self.dims.factors[factor]
        return f.kind == "map" or (f.kind == "reduce" and f.combine != "scan")

    def placed(self, factor: str) -> bool:
        """Whether a share has to know where along a factor it begins."""
        return any(k not in ("shape", "size", "dims") for k in self.piece(factor).attrs)

    def once(self, factor: str) -> tuple[int, ...]:
        return self.piece(factor).once
