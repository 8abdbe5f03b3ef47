"""Find selective scans in a Dynamo graph: a linear recurrence whose states are folded at once.

    a = exp(dt[.., None] * A);  b = u * dt[.., None] * B[:, None]
    h = tessel::linear_scan(a, b)                   becomes      y = tessel::selective_scan(u * dt, dt, A, B, C)
    y = (h @ C[.., None])[.., 0]

Views and products are looked through, whatever their order: each operand of the recurrence is a product of tensors,
each with some of the recurrence's axes. That of time, of the folded axis (n), and one that only A has beside it (d)
say which is which. It is done for graphs that are differentiated, because its backward keeps no states; without a
gradient, the fuse pass makes one kernel of the same operators, together with what stands around them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..fx_effects import erase_unread
from ..fx_words import call_name, value_of
from ..scan_op import linear_scan, selective_scan
from .labels import Factor, Labels, arranged, expanded, ones, seen_through, turned

__all__ = ["fold_states"]


def fold_states(gm: fx.GraphModule) -> int:
    """Rewrite ``gm`` in place; how many were found."""
    count = 0
    if not any(getattr(value_of(n), "requires_grad", False) for n in gm.graph.nodes if n.op == "placeholder"):
        return 0
    for node in list(gm.graph.nodes):
        if node.target is linear_scan and not node.args[3]:
            found = _Found.of(node)
            if found is not None:
                found.rewrite()
                count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


@dataclass(frozen=True)
class _Found:
    """A selective scan: its operands, each with its axes, and the product that folds the states."""

    scan: fx.Node
    fold: fx.Node
    fold_labels: Labels  # of the result
    order: tuple[int, int, int, int]  # batch, time, d, n
    sizes: tuple[int, ...]
    w: list[Factor]
    dt: list[Factor]
    A: list[Factor]
    B: list[Factor]
    C: Factor

    @staticmethod
    def of(scan: fx.Node) -> _Found | None:
        states = scan.meta.get("example_value")
        first, second, dim = scan.args[:3]
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or dim != 0:
            return None
        fold = _folded(scan, (0, 1, 2, 3))
        if fold is None:
            return None
        node, labels, C = fold
        n = next(iter({0, 1, 2, 3} - {x for x in labels if x is not None}), None)
        powers = _exponents(first, (0, 1, 2, 3))
        added = _factors(second, (0, 1, 2, 3))
        if n is None or powers is None or added is None or n == 0:
            return None
        A, dt = ([f for f in powers if (n in f.axes) == inside] for inside in (True, False))
        B, w = ([f for f in added if (n in f.axes) == inside] for inside in (True, False))
        if not A or not dt or not B or not w:
            return None
        own = set.union(*(f.axes for f in A)) - {n}
        if len(own) != 1 or 0 in own:
            return None
        (d,) = own
        (batch,) = {1, 2, 3} - {d, n}
        if d in set.union(C.axes, *(f.axes for f in B)):
            return None
        sizes = _sizes([*A, *dt, *B, *w, C])
        if sizes is None or (states is not None and states.dim() != 4):
            return None
        dtypes = {value_of(f.node).dtype for f in (*A, *dt, *B, *w, C)}
        if len(dtypes) != 1 or dtypes - {torch.float32, torch.float64}:
            return None
        return _Found(scan, node, labels, (batch, 0, d, n), sizes, w, dt, A, B, C)

    def rewrite(self) -> None:
        graph = self.fold.graph
        batch, time, d, n = self.order
        sizes = self.sizes

        def operand(factors: Sequence[Factor], *order: int) -> fx.Node:
            """The product of some tensors, with these axes in this order, each in full."""
            made: fx.Node | None = None
            for f in factors:
                known = tuple(x if x is not None and sizes[x] > 1 else None for x in f.labels)
                one = graph.call_function(arranged, (f.node, known, order))
                made = one if made is None else graph.call_function(operator.mul, (made, one))
            return graph.call_function(expanded, (made, tuple(sizes[x] for x in order)))

        with graph.inserting_before(self.fold):
            three = ((self.w, batch, time, d), (self.dt, batch, time, d), (self.A, d, n))
            given = [operand(*x) for x in (*three, (self.B, batch, time, n), ([self.C], batch, time, n))]
            y = graph.call_function(selective_scan, tuple(given))
            out = graph.call_function(arranged, (y, (batch, time, d), self.fold_labels))
        where = {k: v for k, v in self.fold.meta.items() if k != "example_value"}
        for new in (*given, y):
            new.meta.update(where)
        out.meta.update(self.fold.meta)
        self.fold.replace_all_uses_with(out)
        erase_unread([self.fold])


def _sizes(factors: Sequence[Factor]) -> tuple[int, ...] | None:
    sizes = [1, 1, 1, 1]
    for f in factors:
        for label, size in zip(f.labels, value_of(f.node).shape, strict=True):
            if label is not None:
                if not isinstance(size, int) or (sizes[label] != 1 and size not in (1, sizes[label])):
                    return None
                sizes[label] = max(sizes[label], size)
    return tuple(sizes)


def _factors(node: fx.Node, labels: Labels) -> list[Factor] | None:
    """A value as a product of tensors."""
    found: list[Factor] = []
    stack: list[tuple[fx.Node, Labels]] = [(node, labels)]
    while stack:
        node, labels = stack.pop()
        below = seen_through(node, labels) if node.op in ("call_function", "call_method") else None
        product = node.target in (operator.mul, torch.mul, "mul") and all(isinstance(a, fx.Node) for a in node.args)
        if below is not None:
            stack.append(below)
        elif product and len(labels) > 2 and all(isinstance(value_of(a), torch.Tensor) for a in node.args):
            for a in node.args:
                x = value_of(a)
                stack.append((a, ones(labels[len(labels) - x.dim() :], x)))  # type: ignore[arg-type]
        elif not isinstance(value_of(node), torch.Tensor):
            return None
        else:
            found.append(Factor(node, ones(labels, value_of(node))))
    return found


def _exponents(node: fx.Node, labels: Labels) -> list[Factor] | None:
    """The factors of what a value is the exponential of."""
    while (below := seen_through(node, labels)) is not None:
        node, labels = below
    if node.target not in (torch.exp, "exp") or not isinstance(node.args[0], fx.Node):
        return None
    return _factors(node.args[0], labels)


def _folded(scan: fx.Node, labels: Labels) -> tuple[fx.Node, Labels, Factor] | None:
    """The one product that reads all states and sums an axis away, its result's labels, and what they are times."""
    node = scan
    while True:
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if user.target in (torch.matmul, operator.matmul, "matmul"):
            return _product(node, user, labels)
        made = _after(user, node, labels)
        if made is None:
            return None
        node, labels = user, made


def _after(user: fx.Node, node: fx.Node, labels: Labels) -> Labels | None:
    """The labels of a view of something labelled."""
    if not user.args or user.args[0] is not node:
        return None
    name = call_name(user)
    if name in ("float", "to", "type", "double", "contiguous"):
        made = value_of(user)
        asked = [a for a in (*user.args[1:], *user.kwargs.values()) if isinstance(a, torch.dtype)]
        same = made is None or made.dtype in (torch.float32, torch.float64)
        return labels if same and all(a in (torch.float32, torch.float64) for a in asked) else None
    order = turned(user, name, len(labels))
    return None if order is None else tuple(labels[i] for i in order)


def _product(node: fx.Node, user: fx.Node, labels: Labels) -> tuple[fx.Node, Labels, Factor] | None:
    """``h [.., d, n] @ C [.., n, 1]``."""
    left, right = user.args
    x = value_of(right)
    if left is not node or not isinstance(right, fx.Node) or not isinstance(x, torch.Tensor) or x.dim() != 4:
        return None
    if x.shape[-1] != 1 or len(labels) != 4:
        return None
    factors = _factors(right, ones((*labels[:2], labels[3], None), x))
    if factors is None or len(factors) != 1:
        return None
    return user, (*labels[:3], None), factors[0]
