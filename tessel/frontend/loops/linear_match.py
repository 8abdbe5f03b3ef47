"""Find linear attention in the step of a loop: a state of keys times values, decayed, corrected, read by a query.

    S = S * g;  known = (S * k[.., None]).sum(-2)
    S = S + k[.., None] * ((v - known) * beta)[.., None, :]         becomes      o = tessel::linear_attention(q, k, v,
    o = (S * q[.., None]).sum(-2)                                                    g, beta, S before the first step)

The step is multiplied out first (``terms``), however it is written. The new state must be

    a S  +  k v   [ -  k beta k' a S ]

with the k' of the last summed over the key axis, and equal to k but for that; the state is read in one product with a
query, and nowhere else. What is done with the result, and what comes before, is applied to all steps at once.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ...ops.emit import wide_dtype
from ..fx_effects import has_effects
from ..fx_words import value_of
from ..linear_attention_op import operator as linear_attention
from .affine import NotAffine
from .labels import Factor, Labels, arranged, expanded, ones, seen_through
from .step import Step
from .terms import Term, Terms
from .written import Written

__all__ = ["LinearAttention"]

_TIME = -1  # the label of time, which a step's own tensors have not
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COPIES = {"clone", "contiguous", torch.clone}
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
            computed = a.op in ("call_function", "call_method") and not has_effects(a)
            if computed and (a.graph is self.own or a.target in _VIEWS):
                return a.op, str(a.target), self.made(a.args), self.made(tuple(sorted(a.kwargs.items())))
            return a
        if isinstance(a, tuple | list):
            return tuple(map(self.made, a))
        return repr(a)


def _renamed(factors: Iterator[Factor] | Sequence[Factor], old: int, new: int) -> list[Factor]:
    return [Factor(f.node, tuple(new if x == old else x for x in f.labels)) for f in factors]


class LinearAttention:
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
        self.like = value_of(self.carry)
        rank = self.like.dim()
        if not 2 <= rank <= 4 or self.like.dtype not in _FLOATS or self.new is self.carry:
            raise NotAffine
        self.axes = ones(tuple(range(rank)), self.like)
        self._read(outs)
        self._rule(Terms(step.gm, [self.carry]).of(self.new, self.axes))
        self._axes()
        for factor in (*self.q, *self.k, *self.v, *self.decay, *self.beta):
            x = value_of(factor.node)
            if torch.promote_types(x.dtype, self.like.dtype) != self.like.dtype or x.device != self.like.device:
                raise NotAffine
        by_channel = any(self.key in f.axes for f in self.decay)
        if (
            by_channel
            and self.like.device.type == "cuda"
            and any(getattr(value_of(n), "requires_grad", False) for n in inputs)
        ):
            raise NotAffine  # its gradient has no kernel there, a recurrence has

    # ------------------------------------------------------------ how the state is read

    def _read(self, outs: Sequence[Any]) -> None:
        """The one product of the new state with a query."""
        terms = Terms(self.step.gm, [self.new, self.carry])
        after = self._after_new()
        self.readout: fx.Node | None = None
        for node in self.step.gm.graph.nodes:
            x = value_of(node)
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

    def _is_readout(self, node: fx.Node, term: Term) -> bool:
        mine = [f for f in term.factors if f.node is self.new]
        if len(mine) != 1 or any(f.node is self.carry for f in term.factors) or len(term.factors) < 2:
            return False
        labels = mine[0].labels
        out = set(ones(tuple(range(50, 50 + value_of(node).dim())), value_of(node))) - {None}
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
        self.out_labels = tuple(back.get(x) for x in range(50, 50 + value_of(node).dim()))
        return any(self.key in f.axes for f in self.q)

    # ------------------------------------------------------------ how the state goes on

    def _rule(self, terms: Sequence[Term]) -> None:
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
        """Put it in place of the loop at the graph's insertion point, as ``emit.emit`` does."""
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
