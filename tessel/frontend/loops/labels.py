"""Dimensions of tensors named by the axes of a recurrence, through the views and products of a Dynamo graph.

A label is the number of an axis; a dimension of size one has none. ``seen_through`` goes from the labels of a view to
those of what it is a view of, so that a product is known by its tensors, however they were brought into shape.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..fx_words import call_name, value_of
from .written import filled

__all__ = ["Factor", "Labels", "arranged", "expanded", "ones", "seen_through", "turned"]

Labels = tuple[int | None, ...]  # which axis each dimension is; None for one of size one


@dataclass(frozen=True)
class Factor:
    """A tensor of a product, and the axis that each of its dimensions is."""

    node: fx.Node
    labels: Labels

    @property
    def axes(self) -> set[int]:
        return {x for x in self.labels if x is not None}


# What the graph calls; AOTAutograd traces through.


def arranged(x: torch.Tensor, labels: Sequence[int | None], order: Sequence[int | None]) -> torch.Tensor:
    """Dimensions put in order by label; those of size one come and go."""
    kept = [i for i, label in enumerate(labels) if label is not None]
    x = x.permute(*kept, *(i for i in range(x.dim()) if i not in kept)).reshape([x.shape[i] for i in kept])
    have = [labels[i] for i in kept]
    wanted = [w for w in order if w in have]
    x = x.permute([have.index(w) for w in wanted])
    sizes = iter(x.shape)
    return x.reshape([next(sizes) if w in have else 1 for w in order])


def expanded(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return x.expand(shape)


# ---------------------------------------------------------------- views, backwards and forwards


def seen_through(node: fx.Node, labels: Labels) -> tuple[fx.Node, Labels] | None:
    """What a view or a cast to the same type is of, and the labels of that."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(value_of(source), torch.Tensor):
        return (source, labels) if _is_filled(node) and isinstance(source, fx.Node) else None
    x, made = value_of(source), value_of(node)
    name = call_name(node)
    if node.target is operator.getitem:
        return _index(source, x, node.args[1], labels)
    if name in ("float", "to", "type", "double", "contiguous", "clone"):
        same = isinstance(made, torch.Tensor) and made.dtype == x.dtype and made.device == x.device
        return (source, labels) if same else None
    if _is_filled(node):
        shape = node.args[1]
        assert isinstance(shape, tuple)
        kept = labels[len(shape) - x.dim() :] if not node.args[3] else (labels[0], *labels[len(shape) - x.dim() + 1 :])
        return source, ones(kept, x)
    if name == "unsqueeze":
        at = int(node.args[1]) % (x.dim() + 1)  # type: ignore[arg-type]
        return source, labels[:at] + labels[at + 1 :]
    order = turned(node, name, x.dim())
    if order is not None:
        back: list[int | None] = [None] * x.dim()
        for to, frm in enumerate(order):
            back[frm] = labels[to]
        return source, tuple(back)
    if name in ("squeeze", "view", "reshape") and isinstance(made, torch.Tensor):
        names = iter([label for n, label in zip(made.shape, labels, strict=True) if n != 1])
        if [n for n in made.shape if n != 1] != [n for n in x.shape if n != 1]:
            return None
        return source, tuple(None if n == 1 else next(names) for n in x.shape)
    if name in ("expand", "expand_as") and isinstance(made, torch.Tensor) and made.dim() >= x.dim():
        return source, ones(labels[made.dim() - x.dim() :], x)
    return None


def _is_filled(node: fx.Node) -> bool:
    return node.target is filled


def ones(labels: Labels, x: torch.Tensor) -> Labels:
    return tuple(None if n == 1 else label for label, n in zip(labels, x.shape, strict=True))


def _index(source: fx.Node, x: torch.Tensor, index: Any, labels: Labels) -> tuple[fx.Node, Labels] | None:
    """An index that only adds dimensions, or takes away those of size one."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        rest = x.dim() - sum(p is not None for p in parts) + 1
        parts[at : at + 1] = [slice(None)] * rest
    parts += [slice(None)] * (x.dim() - sum(p is not None for p in parts))
    given, found = iter(labels), list[int | None]()
    sizes = iter(x.shape)
    for p in parts:
        if p is None:
            next(given)
        elif p == slice(None):
            found.append(next(given))
            next(sizes)
        elif type(p) is int and next(sizes) == 1:
            found.append(None)
        else:
            return None
    return source, tuple(found)


def turned(node: fx.Node, name: str, rank: int) -> tuple[int, ...] | None:
    """For each dimension of the result the operand's, of a permutation."""
    order = list(range(rank))
    args = node.args[1:]
    if name in ("transpose", "swapaxes") and len(args) == 2:
        i, j = (int(a) % rank for a in args)  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
        return tuple(order)
    if name == "movedim" and len(args) == 2 and all(isinstance(a, int) for a in args):
        i, j = (int(a) % rank for a in args)  # type: ignore[arg-type]
        order.insert(j, order.pop(i))
        return tuple(order)
    if name == "permute":
        dims = args[0] if isinstance(args[0], tuple | list) else args
        return tuple(int(d) % rank for d in dims)  # type: ignore[union-attr,arg-type]
    return None
