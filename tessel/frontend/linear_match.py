"""Find linear attention in the step of a loop: a state of keys times values, decayed, corrected, read by a query.

    S = S * g;  known = (S * k[.., None]).sum(-2)
    S = S + k[.., None] * ((v - known) * beta)[.., None, :]         becomes      o = tessel::linear_attention(q, k, v,
    o = (S * q[.., None]).sum(-2)                                                    g, beta, S before the first step)

However the step is written: what depends on the state is multiplied out into terms, each a product of tensors whose
dimensions are named by the axes of the state, some of them summed over (products, sums, einsum, matmul, views, adds).
The new state must be

    a S  +  k v   [ -  k beta k' a S ]

with the k' of the last summed over the key axis, and equal to k but for that; the state is read in one product with a
query, and nowhere else. What is done with the result, and what comes before, is applied to all steps at once.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..ops.emit import wide_dtype
from .labels import Factor, Labels, arranged, expanded, ones, seen_through
from .linear_attention_op import operator as linear_attention
from .loops import NotAffine, Step, Written, affine_plan, example, has_side_effects

__all__ = ["emit_linear_attention", "is_known"]

_TIME = -1  # the label of time, which a step's own tensors have not
_MOST_TERMS = 16
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SUMS = {torch.sum, "sum", torch.Tensor.sum}
_PRODUCTS = {torch.matmul, operator.matmul, "matmul", torch.Tensor.matmul, torch.bmm, "bmm", torch.mm, "mm"}
_MUL = {operator.mul, torch.mul, "mul", torch.multiply, "multiply"}
_ADD = {operator.add, torch.add, "add"}
_SUB = {operator.sub, torch.sub, "sub"}
_NEG = {operator.neg, torch.neg, "neg"}
_COPIES = {"clone", "contiguous", torch.clone}


def emit_linear_attention(step: Step, graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Write the loop at the host graph's insertion point, as ``loops.emit`` does.

    Raises:
        NotAffine: it is no linear attention; the graph is as it was.
    """
    return _Found(step).write(graph)


def is_known(step: Step) -> bool:
    """Whether a step is linear attention or a linear recurrence, which ``emit`` writes without a loop."""
    for look in (_Found, affine_plan):
        try:
            look(step)
            return True
        except NotAffine:
            continue
    return False


@dataclass(frozen=True)
class _Term:
    """A number times a product of tensors; axes that the value has not are summed over."""

    number: float
    factors: tuple[Factor, ...]

    def times(self, other: _Term) -> _Term:
        return _Term(self.number * other.number, self.factors + other.factors)


class _Terms:
    """Values of a step multiplied out as far as they depend on some of its nodes."""

    def __init__(self, gm: fx.GraphModule, states: Sequence[fx.Node]) -> None:
        self.states = set(states)
        self.tied = set(states)
        for node in gm.graph.nodes:
            if any(n in self.tied for n in node.all_input_nodes):
                self.tied.add(node)
        self.fresh = itertools.count(100)

    def of(self, node: Any, labels: Labels) -> list[_Term]:
        """Terms of a value with these axes.

        Raises:
            NotAffine: an operator that is no sum of products.
        """
        if not isinstance(node, fx.Node):
            if isinstance(node, int | float) and not isinstance(node, bool):
                return [_Term(float(node), ())]
            raise NotAffine
        x = example(node)
        if not isinstance(x, torch.Tensor):
            raise NotAffine
        labels = ones(labels, x)
        if node in self.states:
            return [_Term(1.0, (Factor(node, labels),))]
        below = seen_through(node, labels) if node.op in ("call_function", "call_method") else None
        if below is not None:
            return self.of(*below)
        if node.op in ("call_function", "call_method"):
            got = self.arithmetic(node, labels)
            if got is not None:
                return got
        if node in self.tied:
            raise NotAffine
        return [_Term(1.0, (Factor(node, labels),))]

    def arithmetic(self, node: fx.Node, labels: Labels) -> list[_Term] | None:
        target, args, tied = node.target, node.args, node in self.tied
        if target in _SUMS and tied:
            return self.summed(node, labels)
        if node.kwargs:
            return None
        if target in _MUL and len(args) == 2:
            return self.product([(a, _last(labels, a)) for a in args])
        if target in (operator.truediv, torch.div, "div") and isinstance(args[1], int | float) and args[1]:
            return [replace(t, number=t.number / args[1]) for t in self.of(args[0], labels)]
        if target in _NEG:
            return [replace(t, number=-t.number) for t in self.of(args[0], labels)]
        if not tied and not _outer(node):
            return None  # what the state has no part in stays in one piece, unless it is keys times values
        if target in _ADD | _SUB and len(args) == 2:
            left, right = (self.of(a, _last(labels, a)) for a in args)
            sign = -1.0 if target in _SUB else 1.0
            return _few([*left, *(replace(t, number=sign * t.number) for t in right)])
        if target is torch.einsum and isinstance(args[0], str):
            listed = args[1]
            return self.einsum(args[0], listed if isinstance(listed, list | tuple) else args[1:], labels)
        if target in _PRODUCTS and len(args) == 2:
            return self.matmul(args[0], args[1], labels)
        return None

    def product(self, parts: Sequence[tuple[Any, Labels]]) -> list[_Term]:
        terms = [_Term(1.0, ())]
        for node, labels in parts:
            terms = _few([a.times(b) for a, b in itertools.product(terms, self.of(node, labels))])
        return terms

    def summed(self, node: fx.Node, labels: Labels) -> list[_Term]:
        x: Any = example(node.args[0])
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
    def all_summed(terms: list[_Term], labels: Labels, gone: set[int]) -> list[_Term]:
        """A term that has not an axis that is summed over would count once for each of its places."""
        axes = {labels[d] for d in gone} - {None}
        if any(axes - set().union(*(f.axes for f in t.factors)) for t in terms):
            raise NotAffine
        return terms

    def einsum(self, text: str, operands: Sequence[Any], labels: Labels) -> list[_Term]:
        sides = text.replace(" ", "").split("->")
        words = sides[0].split(",")
        fits = len(sides) == 2 and "." not in text and len(words) == len(operands) and len(sides[1]) == len(labels)
        if not fits or any(len(set(w)) != len(w) for w in (*words, sides[1])):
            raise NotAffine
        axis: dict[str, int | None] = dict(zip(sides[1], labels, strict=True))
        for letter in set("".join(words)) - set(axis):
            axis[letter] = next(self.fresh)
        parts = [(x, tuple(axis[c] for c in w)) for x, w in zip(operands, words, strict=True)]
        if any(not isinstance(x, fx.Node) or example(x).dim() != len(w) for x, w in parts):
            raise NotAffine
        found = self.product(parts)
        inner = {a for _, w in parts for a in w if a is not None and a >= 100} - set(labels)
        held = {a for x, w in parts for a in ones(w, example(x)) if a is not None}
        return self.all_summed(found, tuple(inner & held), set(range(len(inner & held))))

    def matmul(self, left: Any, right: Any, labels: Labels) -> list[_Term]:
        ranks = [example(x).dim() for x in (left, right) if isinstance(x, fx.Node)]
        if len(ranks) != 2 or min(ranks) < 2:
            raise NotAffine
        inner, batch = next(self.fresh), labels[:-2]
        parts = [
            (left, (*batch[len(batch) - (ranks[0] - 2) :], labels[-2], inner)),
            (right, (*batch[len(batch) - (ranks[1] - 2) :], inner, labels[-1])),
        ]
        size = example(left).shape[-1]
        return self.all_summed(self.product(parts), (inner if size != 1 else None,), {0})


def _outer(node: fx.Node) -> bool:
    """Whether an einsum or a matrix product sums over nothing."""
    if node.target is torch.einsum and isinstance(node.args[0], str):
        before, _, after = node.args[0].replace(" ", "").partition("->")
        return set(before) - {","} == set(after)
    left = example(node.args[0]) if node.target in _PRODUCTS else None
    return isinstance(left, torch.Tensor) and left.shape[-1] == 1


def _few(terms: list[_Term]) -> list[_Term]:
    """Terms, unless they are so many that it is something else: each multiplication may double them."""
    if len(terms) > _MOST_TERMS or any(len(t.factors) > _MOST_TERMS for t in terms):
        raise NotAffine
    return terms


def _last(labels: Labels, a: Any) -> Labels:
    """The labels of an operand that is broadcast."""
    x = example(a)
    return labels[len(labels) - x.dim() :] if isinstance(x, torch.Tensor) else ()


_VIEWS = {operator.getitem, torch.movedim, torch.select, "select", "movedim", "transpose", "permute", "unflatten"}


class _Names:
    """Equal for factors that are the same values, read or computed more than once."""

    def __init__(self, step: Step) -> None:
        inputs = step.placeholders()
        n = len(step.init)
        self.host = dict(zip(inputs[n:], (*step.xs, *step.extras), strict=True))
        self.timed = set(inputs[n : n + len(step.xs)])
        self.own = step.gm.graph

    def bag(self, factors: Sequence[Factor]) -> Counter[Any]:
        """Factors of a product, which has no order."""
        return Counter(map(self.of, factors))

    def of(self, f: Factor) -> Any:
        node, labels = self.host.get(f.node), f.labels
        if node is None:
            return self.made(f.node), labels
        labels = (_TIME, *labels) if f.node in self.timed else labels
        while node.op in ("call_function", "call_method") and (below := seen_through(node, labels)) is not None:
            node, labels = below
        return self.made(node), labels

    def made(self, a: Any) -> Any:
        """How a value is made, from values that are what they are."""
        if isinstance(a, fx.Node):
            if a in self.host:
                return a in self.timed, self.made(self.host[a])
            computed = a.op in ("call_function", "call_method") and not has_side_effects([a])
            if computed and (a.graph is self.own or a.target in _VIEWS):
                return a.op, str(a.target), self.made(a.args), self.made(tuple(sorted(a.kwargs.items())))
            return a
        if isinstance(a, tuple | list):
            return tuple(map(self.made, a))
        return repr(a)


def _renamed(factors: Iterator[Factor] | Sequence[Factor], old: int, new: int) -> list[Factor]:
    return [Factor(f.node, tuple(new if x == old else x for x in f.labels)) for f in factors]


class _Found:
    """A step that is linear attention: its operands as products.

    Raises:
        NotAffine: it is not.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        inputs = step.placeholders()
        outs = step.outputs()
        if len(step.init) != 1 or not isinstance(outs[0], fx.Node):
            raise NotAffine
        self.carry, self.new = inputs[0], _stripped(outs[0])
        self.like = example(self.carry)
        rank = self.like.dim()
        if not 2 <= rank <= 4 or self.like.dtype not in _FLOATS or self.new is self.carry:
            raise NotAffine
        self.axes = ones(tuple(range(rank)), self.like)
        self._read(outs)
        self._rule(_Terms(step.gm, [self.carry]).of(self.new, self.axes))
        self._axes()
        for factor in (*self.q, *self.k, *self.v, *self.decay, *self.beta):
            x = example(factor.node)
            if torch.promote_types(x.dtype, self.like.dtype) != self.like.dtype or x.device != self.like.device:
                raise NotAffine
        by_channel = any(self.key in f.axes for f in self.decay)
        if (
            by_channel
            and self.like.device.type == "cuda"
            and any(getattr(example(n), "requires_grad", False) for n in inputs)
        ):
            raise NotAffine  # its gradient has no kernel there, a recurrence has

    # ------------------------------------------------------------ how the state is read

    def _read(self, outs: Sequence[Any]) -> None:
        """The one product of the new state with a query."""
        terms = _Terms(self.step.gm, [self.new, self.carry])
        after = self._after_new()
        self.readout: fx.Node | None = None
        for node in self.step.gm.graph.nodes:
            x = example(node)
            if node not in after or not isinstance(x, torch.Tensor) or x.dtype != self.like.dtype:
                continue
            try:
                got = terms.of(node, tuple(range(50, 50 + x.dim())))
            except NotAffine:
                continue
            if len(got) == 1 and self._is_readout(node, got[0]):
                self.readout = node
                break
        if self.readout is None:
            raise NotAffine
        # everything else that comes after the state comes after the readout
        seen, stack = set(), [o for o in outs[1:] if isinstance(o, fx.Node)]
        while stack:
            node = stack.pop()
            if node in (self.new, self.carry):
                raise NotAffine
            if node not in seen and node is not self.readout:
                seen.add(node)
                stack += node.all_input_nodes

    def _after_new(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack = list(self.new.users)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += node.users
        return found

    def _is_readout(self, node: fx.Node, term: _Term) -> bool:
        mine = [f for f in term.factors if f.node is self.new]
        if len(mine) != 1 or any(f.node is self.carry for f in term.factors) or len(term.factors) < 2:
            return False
        labels = mine[0].labels
        out = set(ones(tuple(range(50, 50 + example(node).dim())), example(node))) - {None}
        summed = [d for d, x in enumerate(labels) if x is not None and x not in out]
        if len(summed) != 1 or len({x for x in labels if x is not None}) != sum(x is not None for x in labels):
            return False
        back = {x: self.axes[d] for d, x in enumerate(labels) if x is not None}
        rest = [f for f in term.factors if f is not mine[0]]
        if any(x not in back for f in rest for x in f.axes):
            return False
        self.key = summed[0]
        self.number = term.number
        self.q = [Factor(f.node, tuple(None if x is None else back[x] for x in f.labels)) for f in rest]
        self.out_labels = tuple(back.get(x) for x in range(50, 50 + example(node).dim()))
        return any(self.key in f.axes for f in self.q)

    # ------------------------------------------------------------ how the state goes on

    def _rule(self, terms: Sequence[_Term]) -> None:
        kept, added, corrected = [], [], []
        for t in terms:
            mine = [f for f in t.factors if f.node is self.carry]
            rest = [f for f in t.factors if f.node is not self.carry]
            if len(mine) > 1:
                raise NotAffine
            if not mine:
                added.append((t.number, rest))
            elif mine[0].labels == self.axes:
                kept.append((t.number, rest))
            else:
                corrected.append((t.number, rest, mine[0].labels))
        if len(kept) != 1 or len(added) != 1 or len(corrected) > 1:
            raise NotAffine
        (self.decay_number, self.decay), (number, factors) = kept[0], added[0]
        own = {x for x in self.axes if x is not None}
        if any(f.axes - own for f in (*self.decay, *factors)):
            raise NotAffine
        self.k = [f for f in factors if self.key in f.axes]
        self.v = [f for f in factors if self.key not in f.axes]
        if not self.k or not self.v:
            raise NotAffine
        self.beta: list[Factor] = []
        self.beta_number, self.v_number = 1.0, number
        self.delta = bool(corrected)
        if corrected:
            self._correction(*corrected[0], number)

    def _correction(self, number: float, factors: list[Factor], labels: Labels, added: float) -> None:
        """-beta k k' a, of which the first three are also those of what is added, but for v."""
        other = labels[self.key]
        same = all(x == y for d, (x, y) in enumerate(zip(labels, self.axes, strict=True)) if d != self.key)
        if other is None or not same:
            raise NotAffine
        names = _Names(self.step)
        rest = names.bag(factors)
        expected = names.bag([*self.k, *_renamed(self.k, self.key, other), *_renamed(self.decay, self.key, other)])
        beta, values = rest - expected, names.bag(self.v)
        found = rest == expected + beta and values == (values - beta) + beta and values != beta
        if not found or number != -added * self.decay_number:
            raise NotAffine
        left = Counter(beta)
        for f in list(self.v):
            name = names.of(f)
            if left[name]:
                left[name] -= 1
                self.beta.append(f)
        self.v = [f for f in self.v if f not in self.beta]
        if any(len(f.axes) > 2 for f in self.beta):
            raise NotAffine
        self.beta_number, self.v_number = added, 1.0

    def _axes(self) -> None:
        """Which axis is that of values: one that neither keys nor factors have; the others are batches and heads."""
        held = set().union(*(f.axes for f in (*self.q, *self.k, *self.decay, *self.beta)))
        free = [d for d, x in enumerate(self.axes) if x is not None and x not in held and d != self.key]
        if not free or any(not any(d in f.axes for f in self.v) for d in free):
            raise NotAffine
        self.value = max(free, key=lambda d: (self.like.shape[d], d))
        self.batch = [d for d in range(self.like.dim()) if d not in (self.key, self.value)]

    # ------------------------------------------------------------ writing

    def write(self, graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
        writer = Written(graph, self.step, [])
        shape, dtype = writer.sizes(self.step.init[0]), self.like.dtype
        batch: list[int | None] = [*self.batch, *[None] * (2 - len(self.batch))]
        wide = wide_dtype(dtype)

        def operand(factors: Sequence[Factor], number: float, to: torch.dtype, *last: int) -> fx.Node:
            """The product of some tensors at all steps: [batch, head, time, ..]."""
            order = (*batch, _TIME, *last)
            sizes = [self.step.length if x == _TIME else 1 if x is None else shape[x] for x in order]
            made: Any = None
            for f in factors:
                node, timed = writer.of(f.node)
                one = writer.call(arranged, node, (_TIME, *f.labels) if timed else f.labels, order)
                one = writer.call(torch.Tensor.to, one, to)
                made = one if made is None else writer.call(operator.mul, made, one)
            if made is None:
                return writer.call(_constant, self._some(writer), number, sizes, to)
            if number != 1:
                made = writer.call(operator.mul, made, number)
            return writer.call(expanded, made, sizes)

        q = operand(self.q, self.number, dtype, self.key)
        k = operand(self.k, 1.0, dtype, self.key)
        v = operand(self.v, self.v_number, dtype, self.value)
        decay = beta = None
        if self.decay or self.decay_number != 1:
            last = [self.key] if any(self.key in f.axes for f in self.decay) else []
            decay = operand(self.decay, self.decay_number, wide, *last)
        if self.delta:
            beta = operand(self.beta, self.beta_number, wide)
        order = (*batch, self.key, self.value)
        start = writer.call(arranged, self.step.init[0], tuple(range(len(shape))), order)
        start = writer.call(torch.Tensor.to, start, wide)
        got = writer.call(linear_attention, q, k, v, decay, beta, start)
        o, end = (writer.call(operator.getitem, got, i) for i in range(2))
        assert self.readout is not None
        named = [None if x is None or shape[x] == 1 else x for x in batch]  # as in out_labels
        writer.batched[self.readout] = writer.call(arranged, o, (*named, _TIME, self.value), (_TIME, *self.out_labels))
        results = [writer.everywhere(x) for x in self.step.outputs()[1:]]
        end = writer.call(arranged, end, order, tuple(range(len(shape))))
        return [writer.call(torch.Tensor.to, end, dtype)], results

    def _some(self, writer: Written) -> fx.Node:
        """A tensor of the device that all are on."""
        return writer.of(self.k[0].node)[0]


def _stripped(node: fx.Node) -> fx.Node:
    while node.target in _COPIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _constant(like: torch.Tensor, value: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), value, dtype=dtype, device=like.device).expand(shape)
