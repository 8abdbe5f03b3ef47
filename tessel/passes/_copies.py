"""What torch runs beside the kernels, and the copies that such calls and the outputs need."""

from __future__ import annotations

from ..config import Options
from ..ir.node import Builder, Graph, Node, Value, map_values
from ..ir.types import TensorType
from ..ops import OPS
from ..ops.view import view_strides
from ._groups import ATTENTION, FREE, refusal


def torch_runs(node: Node, options: Options) -> str | None:
    """Why torch runs a node, ``None`` where a kernel does."""
    if node.op.kind == "contract" and options.matmul == "library":
        return "matrix products go to the library (options.matmul)"
    if node.op.kind in ATTENTION and options.attention == "library":
        return "attention goes to the library (options.attention)"
    return refusal(node)


def own_copies(graph: Graph, options: Options) -> Graph:
    """Where a call to torch or an output needs a view that memory cannot express, the copy is a node."""
    calls = {n for n in graph.nodes if n.op.kind not in FREE and torch_runs(n, options)}
    host = {v for n in calls for v in n.operands} | set(graph.results())
    builder = Builder(graph.inputs)
    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    copies: dict[Value, Value] = {}

    def copied(v: Value) -> Value:
        return copies.get(v, new[v])

    for old in graph.nodes:
        args = map_values(old.args, copied if old in calls else new.__getitem__)
        node = builder.append(old if args == old.args else old.replace(args=args))
        new.update(zip(old.outs, node.outs, strict=True))
        if old.types and old.out in host:
            x = node.operands[0].type if node.operands else None
            hard = (
                old.op.name == "reshape"
                and isinstance(x, TensorType)
                and not x.contiguous
                and view_strides(x, old.type.shape) is None
            )
            if (hard or old.op.name == "flip") and refusal(node.replace(op=OPS["copy"], args=(node.out,))) is None:
                builder.loc = old.loc
                made = builder.node(OPS["copy"], node.out, types=old.types)
                copies[old.out] = made.out
    return builder.finish(
        map_values(graph.outputs, copied),
        tuple((i, copied(v)) for i, v in graph.effects),
        graph.name,
    )


__all__ = ["own_copies", "torch_runs"]
