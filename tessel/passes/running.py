"""Running sums, products, extremes and log-sums as recurrences, which the scan templates go through.

    %1 = cumsum(%0, 1)                       becomes      %1 = running(%0, dim=1, fold="sum")

A running extreme whose places are read as well stays a call: the template carries one value a recurrence.
"""

from __future__ import annotations

from ..ir.node import Builder, Graph, Node, Value
from ..ops import OPS
from ..ops.emit import Emit

__all__ = ["run"]

_FOLDS = {"cumsum": "sum", "cumprod": "prod", "logcumsumexp": "logsumexp"}
_EXTREMES = {"aten.cummax.default": "amax", "aten.cummin.default": "amin"}


def run(graph: Graph) -> Graph:
    """The graph with every running fold that the template can hold as a recurrence."""
    if not any(map(_fold, graph.nodes)):
        return graph
    read = {v for node in graph.nodes for v in node.operands} | set(graph.results())
    olds = iter(graph.nodes)

    def opened(builder: Builder, node: Node) -> tuple[Value, ...] | None:
        old = next(olds)  # with the results that others read
        return None if any(v in read for v in old.outs[1:]) else _opened(builder, node)

    return graph.rewrite(opened).live()


def _fold(node: Node) -> str | None:
    """What a node folds; ``None`` for any other."""
    if node.op.name == "call":
        return _EXTREMES.get(str(node.attrs["target"]))
    return _FOLDS.get(node.op.name)


def _opened(builder: Builder, node: Node) -> tuple[Value, ...] | None:
    fold = _fold(node)
    if fold is None:
        return None
    x, dim = (*node.args, -1)[:2]
    fits = isinstance(x, Value) and x.type.rank > 0 and isinstance(dim, int)
    if not fits or node.outs[0].dtype.is_complex or node.outs[0].dtype.itemsize == 1:
        return None
    wide = Emit(builder).cast(x, node.outs[0].dtype)
    got = builder.add(OPS["running"], wide, dim=dim % x.type.rank, fold=fold)
    unread = (builder.add(OPS["full"], shape=v.shape, value=0, dtype=v.dtype) for v in node.outs[1:])
    return got, *unread
