"""Matrix products that the vendor's library runs: they become calls, which add a bias for nothing.

    %2 = matmul(%0, %1)         becomes      %2 = mm(%0, %1)

    %2 = matmul(%0, %1)         becomes      %2 = addmm(%b, %0, %1)
    %3 = add(%2, %b)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ..ir.node import Builder, Graph, Node, Value, map_values
from ..ir.types import TensorType, dim_equal
from ..ops import OPS


def to_library(graph: Graph, why: Callable[[Node], str | None]) -> Graph:
    """The graph with library calls for the products that have a reason, with their biases."""
    chosen = {n for n in graph.nodes if n.op.name == "matmul" and why(n)}
    if not chosen:
        return graph
    builder = Builder(graph.inputs)
    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    for old in graph.nodes:
        args = map_values(old.args, new.__getitem__)
        node = old.replace(op=OPS["mm"], args=args) if old in chosen else old.replace(args=args)
        new.update(zip(old.outs, builder.append(node).outs, strict=True))
    made = builder.finish(
        map_values(graph.outputs, new.__getitem__), tuple((i, new[v]) for i, v in graph.effects), graph.name
    )
    return with_bias(made, "mm")


def with_bias(graph: Graph, name: str = "matmul") -> Graph:
    """The graph with each bias inside the library call that makes the product, where nothing else reads that.

    Args:
        name: the operator of the products that are library calls.
    """
    uses = Counter(v for n in graph.nodes for v in n.operands) + Counter(graph.results())
    builder = Builder(graph.inputs)
    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    for old in graph.nodes:
        found = _product_and_bias(old, uses, name)
        if found is None:
            args = map_values(old.args, new.__getitem__)
            node = builder.append(old if args == old.args else old.replace(args=args))
        else:
            product, bias = found
            builder.loc = old.loc
            operands = (bias, *product.operands)
            node = builder.node(OPS["addmm"], *map_values(operands, new.__getitem__), types=old.types)
        new.update(zip(old.outs, node.outs, strict=True))
    return builder.finish(
        map_values(graph.outputs, new.__getitem__), tuple((i, new[v]) for i, v in graph.effects), graph.name
    ).live()


def _product_and_bias(node: Node, uses: Counter[Value], name: str) -> tuple[Node, Value] | None:
    if node.op.name != "add" or not all(isinstance(v, Value) for v in node.args):
        return None
    for product, bias in (node.args, node.args[::-1]):
        t, b = product.type, bias.type
        if (
            product.op.name == name
            and uses[product] == 1
            and t.rank == 2
            and t.dtype.is_floating_point
            and isinstance(b, TensorType)
            and b.rank == 1
            and dim_equal(b.shape[0], t.shape[1])
            and node.type.contiguous
            and (b.device, node.type.device) == (t.device, t.device)
        ):
            return product.node, bias
    return None


__all__ = ["to_library", "with_bias"]
