"""Dropout apart from what it drops, so that splitting a model over devices moves nothing for it.

    %2, %3 = native_dropout(%1, 0.1, True)    becomes    %2 = full(shape=..., value=1.0)
                                                         %3, %4 = native_dropout(%2, 0.1, True)
                                                         %5 = mul(%1, %3)

What is drawn depends on the shape alone. Every rank draws the whole tensor's numbers from the same state, as one
device would, and takes its share: the same bits, as 1 or 0 times the scale is exact.
"""

from __future__ import annotations

from ..ir.node import Builder, Graph, Node, Value
from ..ops import OPS


def draw_apart(graph: Graph) -> Graph:
    """The graph with dropout of ones; it draws what it drew before, in the same order."""

    def apart(b: Builder, node: Node) -> tuple[Value, ...] | None:
        if node.op.name != "native_dropout" or node.args[0].op.name == "full":
            return None
        x, *rest = node.args
        if not x.type.contiguous:
            return None  # numbers are drawn in the order of memory
        ones = b.add(OPS["full"], shape=x.shape, value=1.0, dtype=x.dtype)
        drawn = b.append(node.replace(args=(ones, *rest)))
        return b.add(OPS["mul"], x, drawn.outs[0]), drawn.outs[1]

    return graph.rewrite(apart)


__all__ = ["draw_apart"]
