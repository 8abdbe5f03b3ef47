"""Writes of a few rows into an input become kernels, with the views that they read through.

    %4 = reshape(%3, shape=(1, 6, 1, 64))
    %5 = index_put_(%0, (None, None, %1), %4)     becomes     %5 = write(%0, %1, %3) { reshape, index_put_ }

A call to torch costs more than a few rows do, and it stands between kernels that one call could run: a decoding step
writes two rows a layer into its cache. Rows are written one after the other, so that the last of equal indices wins,
as in eager; large writes, which are worth all threads, stay with torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..ir.node import Graph, Node, Value, make_input, map_values, values_in
from ..ir.types import TensorType
from ..ops import OPS
from ..ops.index import INDEX_DTYPES, index_layout
from ..ops.inplace import written_shape
from ..ops.library import arg
from ._groups import FREE, KERNEL_DTYPES

__all__ = ["refusal", "run"]

MOST = 2**20  # bytes written


def run(graph: Graph) -> Graph:
    """The graph with all such writes as ``write`` nodes; views that nothing else reads are gone."""
    if not any(refusal(n) is None for n in graph.nodes):
        return graph
    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    nodes: list[Node] = []
    for old in graph.nodes:
        node = old.replace(args=map_values(old.args, new.__getitem__))
        if refusal(node) is None:
            node = _write(node, len(nodes))
        nodes.append(node)
        new.update(zip(old.outs, node.outs, strict=True))
    outputs = map_values(graph.outputs, new.__getitem__)
    effects = tuple((i, new[v]) for i, v in graph.effects)
    results = (*values_in(outputs), *(v for _, v in effects))
    return graph.replace(nodes=_used(nodes, results), outputs=outputs, effects=effects)


def refusal(node: Node) -> str | None:
    """Why a node stays what it is, or ``None`` if a kernel writes its rows.

    >>> import torch
    >>> from tessel.ir.node import Builder
    >>> x = make_input("x", TensorType((8, 4), torch.float32))
    >>> i, rows = make_input("i", TensorType((2,), torch.int64)), make_input("rows", TensorType((2, 4), torch.float32))
    >>> b = Builder((x, i, rows))
    >>> put, args = OPS["index_put_"], (x.out, (i.out,), rows.out)
    >>> refusal(b.node(put, *args, types=x.types)) is None
    True
    >>> refusal(b.node(put, *args, True, types=x.types))
    'what is there is added to'
    """
    if node.op.name not in ("index_put_", "slice_scatter_"):
        return f"{node.op.name} writes no rows"
    types = [v.type for v in node.operands]
    if any(not isinstance(t, TensorType) or t.device is not None or t.dtype not in KERNEL_DTYPES for t in types):
        return "a tensor of another device, or of a type without kernels"
    x = types[0]
    if node.op.name == "index_put_":
        indices = [None if i is None else i.type for i in node.args[1]]
        if arg(node, 3, "accumulate", False):
            return "what is there is added to"
        if any(i is not None and i.dtype not in INDEX_DTYPES for i in indices):
            return "the index is a mask"
        if x.rank - 1 in index_layout("index_put_", x, indices)[0]:
            return "single elements are written, not rows"
    elif node.attrs["dim"] % x.rank == x.rank - 1 or not isinstance(node.attrs["start"], int):
        return "parts of rows are written, or where they start is not known"
    shape = written_shape(node)
    if not all(isinstance(n, int) for n in shape):
        return "how much is written is not known"
    if not 0 < math.prod(shape) * x.dtype.itemsize <= MOST:
        return f"more than {MOST} bytes are written, or none"
    return None


def _write(node: Node, number: int) -> Node:
    """The ``write`` node of an operator in place; views between it and what is in memory move into its region."""
    target = node.operands[0]
    free: dict[Node, None] = {}
    reads: dict[Value, None] = {target: None}
    for v in node.operands[1:]:
        _look_through(v, free, reads)
    inputs = tuple(make_input(f"a{i}", v.type, "input", v.node.loc) for i, v in enumerate(reads))
    inner: dict[Value, Value] = dict(zip(reads, (n.out for n in inputs), strict=True))
    nodes: list[Node] = []
    for old in (*free, node):
        made = old.replace(args=map_values(old.args, inner.__getitem__))
        inner.update(zip(old.outs, made.outs, strict=True))
        nodes.append(made)
    region = Graph(inputs, tuple(nodes), (inner[node.out],), (), "region")
    attrs = {
        "name": f"write_{number}_{node.op.name.removesuffix('_')}",
        "family": "pointwise",
        "axes": tuple((f"x{i}", n) for i, n in enumerate(written_shape(node))),
        "layouts": (None,) * len(nodes),
        "why": ("few rows, into the memory of an input",),
    }
    return Node(OPS["write"], tuple(reads), attrs, node.types, (region,), node.loc)


def _look_through(v: Value, free: dict[Node, None], reads: dict[Value, None]) -> None:
    """Add the views and generated values that a value is made by, each after its operands, and what they read."""
    stack = [(v, False)]
    while stack:
        v, ready = stack.pop()
        if v.node.op.kind not in FREE:
            reads[v] = None
        elif ready:
            free[v.node] = None
        elif v.node not in free:
            stack.append((v, True))
            stack.extend((u, False) for u in v.node.operands)


def _used(nodes: list[Node], results: Iterable[Value]) -> tuple[Node, ...]:
    """The nodes without the views that nothing reads any more."""
    wanted = {v.node for v in results}
    kept: list[Node] = []
    for node in reversed(nodes):
        if node.op.kind not in FREE or node in wanted:
            kept.append(node)
            wanted.update(v.node for v in node.operands)
    return tuple(reversed(kept))
