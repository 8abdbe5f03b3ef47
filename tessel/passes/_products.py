"""Matrix products that the vendor's library runs: it adds a bias for nothing.

    %2 = matmul(%0, %1)         becomes      %2 = addmm(%b, %0, %1)
    %3 = add(%2, %b)
"""

from __future__ import annotations

from collections import Counter

from ..ir.node import Builder, Graph, Node, Value, map_values
from ..ir.types import TensorType, dim_equal
from ..ops import OPS


def with_bias(graph: Graph) -> Graph:
    """The graph with each bias inside the library call that makes the product, where nothing else reads that."""
    uses = Counter(v for n in graph.nodes for v in n.operands) + Counter(graph.results())
    builder = Builder(graph.inputs)
    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    for old in graph.nodes:
        found = _product_and_bias(old, uses)
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


def _product_and_bias(node: Node, uses: Counter[Value]) -> tuple[Node, Value] | None:
    if node.op.name != "add" or not all(isinstance(v, Value) for v in node.args):
        return None
    for product, bias in (node.args, node.args[::-1]):
        t, b = product.type, bias.type
        if (
            product.op.name == "matmul"
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


__all__ = ["with_bias"]
