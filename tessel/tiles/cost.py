"""What a graph costs by simple counting rules.

Bytes moved: for every kernel, library call or single operator of the graph, its distinct inputs and its
outputs. Views cost nothing by themselves; several views of one tensor count at most as that tensor;
a dimension repeated by ``expand`` counts once. A copy into an input counts as a read and a write.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.exprs import evaluate
from ..ir.node import Graph, Node, Value
from ..ir.types import Dim, TensorType, product

__all__ = ["bytes_moved", "node_bytes", "stored_bytes"]

# No memory is touched: asserts and reads of single numbers.
_FREE = frozenset({"input", "view"})


def bytes_moved(graph: Graph, hints: Mapping[str, int] | None = None) -> int:
    """Bytes that one call reads and writes, at the sizes in ``hints`` (1 for a size without one).

    >>> import torch
    >>> from tessel.ir.node import Builder, make_input
    >>> from tessel.ops import OPS
    >>> x = make_input("x", TensorType((100,), torch.float32))
    >>> b = Builder((x,))
    >>> y = b.add(OPS["mul"], x.out, x.out)
    >>> bytes_moved(b.finish((y,)))
    800
    """
    roots = base_values(graph)
    total = sum(node_bytes(node, roots, hints) for node in graph.nodes if node.op.kind not in _FREE)
    return total + sum(2 * _count(target.type, hints) for target, _ in graph.effects)


def base_values(graph: Graph) -> dict[Value, Value]:
    """For every view the value it is a view of, through views of views; other values map to themselves."""
    roots: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    for node in graph.nodes:
        view = node.op.kind == "view" and node.op.name != "flip"
        for v in node.outs:
            roots[v] = roots[node.operands[0]] if view else v
    return roots


def node_bytes(node: Node, roots: Mapping[Value, Value], hints: Mapping[str, int] | None = None) -> int:
    """Bytes of the distinct inputs and the outputs of one node."""
    read: dict[Value, int] = {}
    for v in dict.fromkeys(node.operands):
        if isinstance(v.type, TensorType):
            root = roots[v]
            read[root] = min(read.get(root, 0) + _count(v.type, hints), _count(root.type, hints))
    return sum(read.values()) + sum(_count(t, hints) for t in node.types if isinstance(t, TensorType))


def stored_bytes(t: TensorType) -> Dim:
    """Bytes of the distinct elements: repeated dimensions (stride 0) count once."""
    sizes = [n for n, s in zip(t.shape, t.strides, strict=True) if not (isinstance(s, int) and s == 0)]
    return product((*sizes, t.dtype.itemsize))


def _count(t: object, hints: Mapping[str, int] | None) -> int:
    if not isinstance(t, TensorType):
        return 0
    n = stored_bytes(t)
    if isinstance(n, int):
        return n
    return int(evaluate(n, {s.name: (hints or {}).get(s.name, 1) for s in n.free_symbols}))
