"""Writes into a part of a tensor that is not read again: the functional operator, with leave to reuse its memory.

``index_put_(x, indices, values)`` has the value of ``index_put``; the name's last letter says that the result lies
in the memory of ``x``, of which nothing else is read any more. The pass ``inplace`` proves that and puts them in.
``write`` is such an operator that became a kernel, see the pass ``writes``.
"""

from __future__ import annotations

import dataclasses

from ..ir.node import Node, Op, Value
from ..ir.types import Dim
from .common import operand_types, table
from .effect import EFFECT
from .index import INDEX, index_layout
from .library import LIBRARY

__all__ = ["INPLACE", "WRITES", "rows_written", "written_memory", "written_shape"]

# Operators that change a part of their first operand -> the argument that holds what is written.
WRITES = {
    "index_put": 2,
    "index_copy": 3,
    "index_add": 3,
    "scatter": 3,
    "scatter_add": 3,
    "scatter_reduce": 3,
    "slice_scatter": 1,
}


def _in_place(op: Op) -> Op:
    more = {"kind": "library", "cost": 1000, "doc": f"{op.name} into the memory of its first operand"}
    return dataclasses.replace(op, name=op.name + "_", **more)  # type: ignore[arg-type]


_WRITE = dataclasses.replace(
    EFFECT["kernel"], name="write", doc="write(x, args..., name=, ...) with a region: a kernel into the memory of x"
)
INPLACE = table(*(_in_place({**LIBRARY, **INDEX}[name]) for name in WRITES), _WRITE)


def written_memory(v: Value) -> Value:
    """The value whose memory ``v`` was written into, through a chain of writes; ``v`` itself if it was not.

    >>> import torch
    >>> from tessel.ir.node import Builder, make_input
    >>> from tessel.ir.types import TensorType
    >>> x, y = (make_input(n, TensorType((4,), torch.float32)) for n in "xy")
    >>> v = Builder((x, y)).add(INPLACE["slice_scatter_"], x.out, y.out, dim=0, start=0, size=4)
    >>> written_memory(v) == x.out, written_memory(x.out) == x.out
    (True, True)
    """
    while v.op.name in INPLACE:
        v = v.node.operands[0]
    return v


def rows_written(node: Node) -> Value | None:
    """What an operator in place writes; None for a number."""
    if node.op.name == "write":
        node = node.regions[0].nodes[-1]
    held = node.args[WRITES[node.op.name.removesuffix("_")]]
    return held if isinstance(held, Value) else None


def written_shape(node: Node) -> tuple[Dim, ...]:
    """The shape of what ``index_put_`` or ``slice_scatter_`` writes, the values broadcast to it."""
    if node.op.name == "slice_scatter_":
        return operand_types(node)[1].shape
    x = operand_types(node)[0]
    held, place, shape = index_layout(node.op.name, x, [None if i is None else i.type for i in node.args[1]])
    kept = [n for d, n in enumerate(x.shape) if d not in held]
    return (*kept[:place], *shape, *kept[place:])
