"""What a graph costs by simple counting rules.

Bytes moved: for every kernel, library call or single operator of the graph, its distinct inputs and its
outputs. Views cost nothing by themselves; several views of one tensor count at most as that tensor;
a dimension repeated by ``expand`` counts once. A copy into an input counts as a read and a write; a write in place
reads and writes what it changes, and what its effect says is then done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..ir.exprs import evaluate
from ..ir.node import Graph, Node, Value
from ..ir.types import Dim, TensorType, product
from ..ops.inplace import INPLACE, rows_written, written_memory
from ..ops.view import view_strides

__all__ = ["base_values", "bytes_moved", "node_bytes", "stored_bytes", "touches_memory"]

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
    total = sum(node_bytes(node, roots, hints) for node in graph.nodes if touches_memory(node))
    return total + sum(2 * _count(t.type, hints) for t, v in graph.effects if written_memory(v) != t.out)


def touches_memory(node: Node) -> bool:
    """Whether a node outside a kernel reads and writes: a flip and some reshapes are copies, other views are not."""
    if node.op.name == "reshape":
        x = node.operands[0].type
        return not x.contiguous and view_strides(x, node.type.shape) is None
    return node.op.kind not in _FREE or node.op.name == "flip"


def base_values(graph: Graph, inside: bool = False) -> dict[Value, Value]:
    """For every view the value it is a view of, through views of views; other values map to themselves.

    Args:
        inside: the graph is the region of a kernel, where every view is free; else copies are values of their own.
    """
    roots: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    for node in graph.nodes:
        view = node.op.kind == "view" and (inside or not touches_memory(node))
        for v in node.outs:
            roots[v] = roots[node.operands[0]] if view else v
    return roots


def node_bytes(node: Node, roots: Mapping[Value, Value], hints: Mapping[str, int] | None = None) -> int:
    """Bytes of the distinct inputs and the outputs of one node; a kernel reads what its region's nodes read."""
    read: dict[Value, int] = {}
    if node.op.name in INPLACE:
        rows = rows_written(node)
        return sum(_count(v.type, hints) for v in dict.fromkeys(node.operands[1:])) + (
            _count(rows.type, hints) if rows is not None and rows.type.rank else _count(node.type, hints)
        )
    for v, seen in _reads(node, hints):
        root = roots[v]
        read[root] = min(read.get(root, 0) + seen, _count(root.type, hints))
    return sum(read.values()) + sum(_count(t, hints) for t in node.types if isinstance(t, TensorType))


def _reads(node: Node, hints: Mapping[str, int] | None) -> Iterator[tuple[Value, int]]:
    """The tensors a node reads and how many bytes of each."""
    operands = dict.fromkeys(v for v in node.operands if isinstance(v.type, TensorType))
    if node.op.kind != "kernel":
        yield from ((v, _count(v.type, hints)) for v in operands)
        return
    (region,) = node.regions
    inside = base_values(region, inside=True)
    outer = {i.out: v for i, v in zip(region.inputs, node.operands, strict=True)}
    used = dict.fromkeys(v for n in region.nodes if n.op.kind not in _FREE for v in n.operands)
    yield from ((outer[inside[v]], _count(v.type, hints)) for v in used if inside[v] in outer)


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
