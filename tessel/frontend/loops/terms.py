"""Values of a loop's step multiplied out: sums of products of tensors whose dimensions are named by axes.

However a step is written (products, sums, einsum, matmul, views, adds), what depends on its state comes out as terms;
some of a product's axes may be summed over. ``linear_match`` reads the rule of a state off them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..fx_words import value_of
from .affine import ADD, MUL, NEG, SUB, NotAffine
from .labels import Factor, Labels, ones, seen_through

__all__ = ["Term", "Terms"]

_MOST_TERMS = 16
_SUMS = {torch.sum, "sum", torch.Tensor.sum}
_PRODUCTS = {torch.matmul, operator.matmul, "matmul", torch.Tensor.matmul, torch.bmm, "bmm", torch.mm, "mm"}


@dataclass(frozen=True)
class Term:
    """A number times a product of tensors; axes that the value has not are summed over."""

    number: float
    factors: tuple[Factor, ...]

    def times(self, other: Term) -> Term:
        return Term(self.number * other.number, self.factors + other.factors)


class Terms:
    """Values of a step multiplied out as far as they depend on some of its nodes."""

    def __init__(self, gm: fx.GraphModule, states: Sequence[fx.Node]) -> None:
        self.states = set(states)
        self.tied = set(states)
        for node in gm.graph.nodes:
            if any(n in self.tied for n in node.all_input_nodes):
                self.tied.add(node)
        self.fresh = itertools.count(100)

    def of(self, node: Any, labels: Labels) -> list[Term]:
        """Terms of a value with these axes.

        Raises:
            NotAffine: an operator that is no sum of products.
        """
        if not isinstance(node, fx.Node):
            if isinstance(node, int | float) and not isinstance(node, bool):
                return [Term(float(node), ())]
            raise NotAffine
        x = value_of(node)
        if not isinstance(x, torch.Tensor):
            raise NotAffine
        labels = ones(labels, x)
        if node in self.states:
            return [Term(1.0, (Factor(node, labels),))]
        below = seen_through(node, labels) if node.op in ("call_function", "call_method") else None
        if below is not None:
            return self.of(*below)
        if node.op in ("call_function", "call_method"):
            got = self.arithmetic(node, labels)
            if got is not None:
                return got
        if node in self.tied:
            raise NotAffine
        return [Term(1.0, (Factor(node, labels),))]

    def arithmetic(self, node: fx.Node, labels: Labels) -> list[Term] | None:
        target, args, tied = node.target, node.args, node in self.tied
        if target in _SUMS and tied:
            return self.summed(node, labels)
        if node.kwargs:
            return None
        if target in MUL and len(args) == 2:
            return self.product([(a, _last(labels, a)) for a in args])
        if target in (operator.truediv, torch.div, "div") and isinstance(args[1], int | float) and args[1]:
            return [replace(t, number=t.number / args[1]) for t in self.of(args[0], labels)]
        if target in NEG:
            return [replace(t, number=-t.number) for t in self.of(args[0], labels)]
        if not tied and not _outer(node):
            return None  # what the state has no part in stays in one piece, unless it is keys times values
        if target in ADD | SUB and len(args) == 2:
            left, right = (self.of(a, _last(labels, a)) for a in args)
            sign = -1.0 if target in SUB else 1.0
            return _few([*left, *(replace(t, number=sign * t.number) for t in right)])
        if target is torch.einsum and isinstance(args[0], str):
            listed = args[1]
            return self.einsum(args[0], listed if isinstance(listed, list | tuple) else args[1:], labels)
        if target in _PRODUCTS and len(args) == 2:
            return self.matmul(args[0], args[1], labels)
        return None

    def product(self, parts: Sequence[tuple[Any, Labels]]) -> list[Term]:
        terms = [Term(1.0, ())]
        for node, labels in parts:
            terms = _few([a.times(b) for a, b in itertools.product(terms, self.of(node, labels))])
        return terms

    def summed(self, node: fx.Node, labels: Labels) -> list[Term]:
        x: Any = value_of(node.args[0])
        given: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
        dims, keep = given.get("dim"), given.get("keepdim", False)
        if dims is None or set(given) - {"input", "dim", "keepdim"}:
            raise NotAffine
        gone = {d % x.dim() for d in ((dims,) if isinstance(dims, int) else dims)}
        kept = iter(labels)
        inner: list[int | None] = []
        for d in range(x.dim()):
            if d not in gone:
                inner.append(next(kept))
                continue
            if keep:
                next(kept)
            inner.append(next(self.fresh))
        return self.all_summed(self.of(node.args[0], tuple(inner)), ones(tuple(inner), x), gone)

    @staticmethod
    def all_summed(terms: list[Term], labels: Labels, gone: set[int]) -> list[Term]:
        """A term that has not an axis that is summed over would count once for each of its places."""
        axes = {labels[d] for d in gone} - {None}
        if any(axes - set().union(*(f.axes for f in t.factors)) for t in terms):
            raise NotAffine
        return terms

    def einsum(self, text: str, operands: Sequence[Any], labels: Labels) -> list[Term]:
        sides = text.replace(" ", "").split("->")
        words = sides[0].split(",")
        fits = len(sides) == 2 and "." not in text and len(words) == len(operands) and len(sides[1]) == len(labels)
        if not fits or any(len(set(w)) != len(w) for w in (*words, sides[1])):
            raise NotAffine
        axis: dict[str, int | None] = dict(zip(sides[1], labels, strict=True))
        for letter in set("".join(words)) - set(axis):
            axis[letter] = next(self.fresh)
        parts = [(x, tuple(axis[c] for c in w)) for x, w in zip(operands, words, strict=True)]
        if any(not isinstance(x, fx.Node) or value_of(x).dim() != len(w) for x, w in parts):
            raise NotAffine
        found = self.product(parts)
        inner = {a for _, w in parts for a in w if a is not None and a >= 100} - set(labels)
        held = {a for x, w in parts for a in ones(w, value_of(x)) if a is not None}
        return self.all_summed(found, tuple(inner & held), set(range(len(inner & held))))

    def matmul(self, left: Any, right: Any, labels: Labels) -> list[Term]:
        ranks = [value_of(x).dim() for x in (left, right) if isinstance(x, fx.Node)]
        if len(ranks) != 2 or min(ranks) < 2:
            raise NotAffine
        inner, batch = next(self.fresh), labels[:-2]
        parts = [
            (left, (*batch[len(batch) - (ranks[0] - 2) :], labels[-2], inner)),
            (right, (*batch[len(batch) - (ranks[1] - 2) :], inner, labels[-1])),
        ]
        size = value_of(left).shape[-1]
        return self.all_summed(self.product(parts), (inner if size != 1 else None,), {0})


def _outer(node: fx.Node) -> bool:
    """Whether an einsum or a matrix product sums over nothing."""
    if node.target is torch.einsum and isinstance(node.args[0], str):
        before, _, after = node.args[0].replace(" ", "").partition("->")
        return set(before) - {","} == set(after)
    left = value_of(node.args[0]) if node.target in _PRODUCTS else None
    return isinstance(left, torch.Tensor) and left.shape[-1] == 1


def _few(terms: list[Term]) -> list[Term]:
    """Terms, unless they are so many that it is something else: each multiplication may double them."""
    if len(terms) > _MOST_TERMS or any(len(t.factors) > _MOST_TERMS for t in terms):
        raise NotAffine
    return terms


def _last(labels: Labels, a: Any) -> Labels:
    """The labels of an operand that is broadcast."""
    x = value_of(a)
    return labels[len(labels) - x.dim() :] if isinstance(x, torch.Tensor) else ()
