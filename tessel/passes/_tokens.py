"""Linear layers with batch and sequence apart, so that a split of the sequence can go through them.

    %1 = reshape(%0, shape=(b·s, k))                         %1 = linear(%0, %w)     # [b, s, k], [k, n] -> [b, s, n]
    %2 = matmul(%1, %w)                          becomes     %2 = relu(%1)
    %3 = relu(%2)
    %4 = reshape(%3, shape=(b, s, n))

Of the flattened rows a share of every sequence is no range, and no sharding says it. ``linear`` and ``linear_weight``
(the gradient of a weight) exist between laying a graph out and running it: ``flattened`` gives a rank its products
back, on the rows of its own share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch

from ..ir.node import INPUT, Builder, Graph, Node, Op, Value, map_values
from ..ir.types import TensorType
from ..ops import OPS
from ..ops.common import letters, result, words
from ._layouts import Seed


def _linear_dims(node: Node) -> str:
    rows = [w.upper() for w in letters(node.type.rank - 1)]
    return words([[*rows, "k+"], ["k+", "n"]], [[*rows, "n"]])


def _weight_dims(node: Node) -> str:
    rows = [f"{w.upper()}+" for w in letters(node.operands[0].type.rank - 1)]
    return words([[*rows, "k"], [*rows, "n"]], [["k", "n"]])


def _flops(node: Node) -> int:
    return 2 * prod(node.operands[0].type.shape) * int(node.type.shape[-1])


LINEAR = Op(
    "linear", "contract", _linear_dims, torch.matmul, flops=_flops, cost=1000,
    infer=lambda x, w: (result((*x.shape[:-1], w.shape[1]), x.dtype, x),),
)  # fmt: skip
LINEAR_WEIGHT = Op(
    "linear_weight", "contract", _weight_dims, lambda x, g: x.flatten(0, -2).t() @ g.flatten(0, -2), flops=_flops,
    cost=1000, infer=lambda x, g: (result((x.shape[-1], g.shape[-1]), x.dtype, x),),
)  # fmt: skip


def splits_inside(seeds: Iterable[Seed], sizes: Mapping[str, int]) -> bool:
    """Whether an axis of the mesh splits a dimension of an activation whose outer ones are not split to the end.

    Axes that split parameters too do not count (tensor and sequence parallelism over one axis): there a linear layer
    reads whole sequences.
    """
    inside: set[str] = set()
    parameters: set[str] = set()
    for seed in seeds:
        v = seed.value
        if v.op is INPUT and v.node.attrs["role"] == "param":
            parameters.update(seed.sharding.axes)
            continue
        outer = 1
        for n, axes in zip(v.shape, seed.sharding.dims, strict=True):
            if outer > 1:
                inside.update(axes)
            outer *= int(n) // prod(sizes.get(a, 1) for a in axes)  # unknown axes are refused later
    return bool(inside - parameters)


def apart(graph: Graph) -> Graph:
    """The graph with products, pointwise work and sums on the dimensions that were flattened for them."""
    run = _Apart(graph)
    return run.graph().live()


class _Apart:
    def __init__(self, graph: Graph) -> None:
        self.old = graph
        self.b = Builder(graph.inputs)
        self.wide: dict[Value, Value] = {}  # a flattened value -> with its dimensions

    def graph(self) -> Graph:
        old, b = self.old, self.b
        new: dict[Value, Value] = {v: v for i in old.inputs for v in i.outs}
        for n in old.nodes:
            b.loc = n.loc
            node = n.replace(args=map_values(n.args, new.__getitem__))
            got = self.node(node)
            new.update(zip(n.outs, (got,) if got is not None else b.append(node).outs, strict=True))
        effects = tuple((i, new[v]) for i, v in old.effects)
        return b.finish(map_values(old.outputs, new.__getitem__), effects, old.name)

    def node(self, node: Node) -> Value | None:
        """What takes a node's place, the node's result flattened; ``None`` to keep it."""
        name, args = node.op.name, node.args
        if len(node.types) != 1 or not isinstance(node.types[0], TensorType):
            return None
        if name == "reshape":
            return self.reshape(node)
        if name == "matmul" and node.type.rank == 2:
            return self.product(*args)
        if node.op.kind == "pointwise" and node.type.rank == 2:
            return self.pointwise(node)
        if name == "sum" and args[0] in self.wide and tuple(node.attrs["dims"]) == (0,):
            x = self.wide[args[0]]
            total = self.b.add(node.op, x, dims=tuple(range(x.type.rank - 1)), keepdim=False)
            return self.b.add(OPS["reshape"], total, shape=node.type.shape) if node.attrs["keepdim"] else total
        if name == "slice" and args[0] in self.wide and node.attrs["dim"] == 1:
            x = self.wide[args[0]]
            return self.flat(self.b.add(node.op, x, **{**node.attrs, "dim": x.type.rank - 1}))
        return None

    def flat(self, x: Value) -> Value:
        """A value flattened to rows; unread it goes away again."""
        made = self.b.add(OPS["reshape"], x, shape=(prod(x.shape[:-1]), x.shape[-1]))
        self.wide[made] = x
        return made

    def reshape(self, node: Node) -> Value | None:
        x, shape = node.args[0], tuple(node.type.shape)
        if x in self.wide:
            x = self.wide[x]
            return x if tuple(x.shape) == shape else self.b.add(OPS["reshape"], x, shape=shape)
        if x.type.rank > 2 and len(shape) == 2:
            for d in range(2, x.type.rank):
                if prod(x.shape[d:]) == shape[1] and prod(x.shape[:d]) == shape[0]:
                    wide = (*x.shape[:d], shape[1])
                    return self.flat(x if d == x.type.rank - 1 else self.b.add(OPS["reshape"], x, shape=wide))
        return None

    def product(self, a: Value, w: Value) -> Value | None:
        if a in self.wide and w not in self.wide:
            return self.flat(self.b.node(LINEAR, self.wide[a], w).out)
        turned = a.node.args[0] if a.op.name == "permute" and tuple(a.node.attrs["dims"]) == (1, 0) else None
        if turned in self.wide and w in self.wide and self.wide[turned].shape[:-1] == self.wide[w].shape[:-1]:
            return self.b.node(LINEAR_WEIGHT, self.wide[turned], self.wide[w]).out
        return None

    def pointwise(self, node: Node) -> Value | None:
        values = list(node.operands)
        rows = {tuple(self.wide[v].shape[:-1]) for v in values if v in self.wide}
        others = [v for v in values if v not in self.wide]
        if len(rows) != 1 or any(v.type.rank > 1 and v.shape[0] != 1 for v in others):
            return None
        args = map_values(node.args, lambda v: self.wide.get(v, v))
        return self.flat(self.b.node(node.op, *args, **node.attrs).out)


def flattened(graph: Graph) -> Graph:
    """A rank's graph with its products on rows again."""

    def rows(b: Builder, x: Value) -> Value:
        return b.add(OPS["reshape"], x, shape=(prod(x.shape[:-1]), x.shape[-1]))

    def back(b: Builder, node: Node) -> Value | None:
        if node.op is LINEAR:
            x, w = node.args
            return b.add(OPS["reshape"], b.add(OPS["matmul"], rows(b, x), w), shape=node.type.shape)
        if node.op is LINEAR_WEIGHT:
            x, g = node.args
            return b.add(OPS["matmul"], b.add(OPS["permute"], rows(b, x), dims=(1, 0)), rows(b, g))
        return None

    return graph.rewrite(back)


__all__ = ["LINEAR", "LINEAR_WEIGHT", "apart", "flattened", "splits_inside"]
