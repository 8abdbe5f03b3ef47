"""Results of pointwise work lie in memory as their operands do.

    %1: f32[8,64]<1,8> = permute(%0)
    %2: f32[8,64] = exp(%1)             becomes      %2: f32[8,64]<1,8> = exp(%1)

Eager keeps the order of its operands' dimensions in memory, but what a decomposition or an opened product puts in its
place may not say so; a kernel would then read along one dimension and write along another. Where all operands of the
whole shape agree on an order, the result takes it, and views of it are seen anew. Results of the graph keep their
layout, and so do values that a reshape could then not be a view of, and those whose memory a call reads as it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..ir.node import Builder, Graph, Node, Value, map_values
from ..ir.types import Dim, TensorType
from ..ops.view import view_strides

__all__ = ["run"]

_FIXED = frozenset({"copy"})  # made for the sake of their layout
_FOLLOWS = frozenset({"pad"})
_READS_MEMORY = frozenset({"as_strided", "call"})  # by strides of its own; or who knows


def run(graph: Graph) -> Graph:
    """The graph with such layouts."""
    pinned = _pinned(graph)
    users = graph.users()
    builder = Builder(graph.inputs)
    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    for old in graph.nodes:
        args = map_values(old.args, new.__getitem__)
        node = old if args == old.args else old.replace(args=args)
        if old.op.kind == "view" and _strides(node.operands) != _strides(old.operands):
            builder.loc = old.loc
            node = builder.node(old.op, *args, **old.attrs)
        else:
            if _may_follow(node) and old.out not in pinned:
                found = _followed(node)
                if found is not None and not _reshaped(old.out, found, users):
                    node = node.replace(types=(found,))
            builder.append(node)
        new.update(zip(old.outs, node.outs, strict=True))
    return builder.finish(
        map_values(graph.outputs, new.__getitem__), tuple((i, new[v]) for i, v in graph.effects), graph.name
    )


def _strides(values: Iterable[Value]) -> list[object]:
    return [v.type.strides if isinstance(v.type, TensorType) else None for v in values]


def _pinned(graph: Graph) -> set[Value]:
    """Values that leave the graph, and those of which a view does."""
    found: set[Value] = set()
    stack = list(graph.results())
    while stack:
        v = stack.pop()
        if v not in found:
            found.add(v)
            if v.op.kind == "view":
                stack.extend(v.node.operands)
    return found


def _may_follow(node: Node) -> bool:
    return (node.op.kind == "pointwise" and node.op.name not in _FIXED) or node.op.name in _FOLLOWS


def _followed(node: Node) -> TensorType | None:
    """The type that follows the operands, ``None`` where they disagree or it is the node's already."""
    t = node.type
    if len(node.types) != 1 or t.rank < 2 or not all(isinstance(n, int) for n in t.shape):
        return None
    whole = [
        v.type
        for v in node.operands
        if isinstance(v.type, TensorType) and (v.shape == t.shape or node.op.name in _FOLLOWS)
    ]
    orders = {order for x in whole if (order := _order(x.shape, x.strides)) is not None}
    if len(orders) != 1 or None in (_order(x.shape, x.strides) for x in whole):
        return None
    (order,) = orders
    if order == _order(t.shape, t.strides):
        return None
    return in_order(t, order)


def _order(shape: Sequence[Dim], strides: Sequence[Dim]) -> tuple[int, ...] | None:
    """Dims longer than one, outermost in memory first; ``None`` where one repeats or strides are not known."""
    if not all(isinstance(s, int) for s in (*strides, *shape)):
        return None
    long = [d for d, n in enumerate(shape) if n != 1]
    if any(strides[d] == 0 for d in long):
        return None
    return tuple(sorted(long, key=lambda d: (-strides[d], d)))  # type: ignore[operator]


def in_order(t: TensorType, order: Sequence[int]) -> TensorType:
    """The type with dims lying densely in this order, outermost first; dims of size one are left out of it.

    >>> import torch
    >>> in_order(TensorType((2, 1, 3), torch.float32), (2, 0)).strides
    (1, 6, 2)
    """
    strides: dict[int, Dim] = {}
    step: Dim = 1
    for d in reversed(order):
        strides[d] = step
        step = step * t.shape[d]
    return TensorType(t.shape, t.dtype, tuple(strides.get(d, step) for d in range(t.rank)), t.device)


def _reshaped(v: Value, t: TensorType, users: dict[Value, list[Node]]) -> bool:
    """Whether a reshape that is a view of the value now would have to copy it then, or memory is read as it lies."""
    stack = [(v, t)]
    while stack:
        v, t = stack.pop()
        for node in users.get(v, ()):
            if node.op.name in _READS_MEMORY:
                return True
            if node.op.kind != "view":
                continue
            if node.op.name == "reshape":
                now, then = (x.contiguous or view_strides(x, node.type.shape) is not None for x in (v.type, t))
                if now and not then:
                    return True
            assert node.op.infer is not None
            (seen,) = node.op.infer(t, *node.args[1:], **node.attrs)  # a view has one operand, its first argument
            stack.append((node.out, seen))
    return False
