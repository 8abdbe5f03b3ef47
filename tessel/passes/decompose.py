"""Open composite operators into the simple ones that their table entries name.

    %1 = silu(%0)               becomes      %1 = sigmoid(%0)
                                             %2 = mul(%0, %1)

What a composite becomes may hold composites again: it is opened too. New nodes keep the
location of the composite they come from, and its results keep their strides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ..ir.node import Builder, Graph, Node, Value, map_values
from ..ir.rewrite import Rule, apply_rules, own_storage
from ..ops import OPS

COMPOSITES: tuple[str, ...] = tuple(name for name, op in OPS.items() if op.decompose is not None)


def run(graph: Graph, keep: Collection[str] = (), stats: Counter[str] | None = None) -> Graph:
    """The graph without composites.

    Args:
        keep: names of composites that stay whole.
        stats: counts the opened composites, by name.
    """
    rules = tuple(Rule(name, (name,), _open) for name in COMPOSITES if name not in keep)
    return own_storage(graph, apply_rules(graph, rules, stats), OPS["copy"]).live()


def _open(builder: Builder, node: Node) -> tuple[Value, ...]:
    assert node.op.decompose is not None
    got = node.op.decompose(builder, node)
    return _with_strides(builder, node, got)


def _with_strides(builder: Builder, node: Node, got: tuple[Value, ...]) -> tuple[Value, ...]:
    """The values with the strides of the node's results, where a computed value may choose its own."""
    made = {id(n): i for i, n in enumerate(builder.nodes)}
    want = {
        v: t.strides
        for v, t in zip(got, (v.type for v in node.outs), strict=True)
        if id(v.node) in made and v.op.kind != "view" and v.type.strides != t.strides
    }
    if not want:
        return got
    new: dict[Value, Value] = {}
    for i, old in enumerate(builder.nodes):
        types = tuple(v.type.with_(shape=v.shape, strides=want.get(v, v.type.strides)) for v in old.outs)
        args = map_values(old.args, lambda v: new.get(v, v))
        builder.nodes[i] = old.replace(args=args, types=types)
        new.update(zip(old.outs, builder.nodes[i].outs, strict=True))
    return tuple(new.get(v, v) for v in got)
