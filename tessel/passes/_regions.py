"""A group becomes a ``kernel`` node: its region, and the axes that code generation follows.

Attributes of a kernel node:

    name      a readable identifier
    family    pointwise, reduction, scan, matmul, attention or attention_backward
    axes      ((name, extent), ...): the loops, parallel ones (``x0``) before reduced ones (``r1``)
    layouts   for each node of the region the loops of each dim of its (first) result, written as
              in a dims string: ``"x0 (x1 x2) 1"``; for one that folds ``"x0 r1 -> x0"``, operand
              and result; ``None`` for what is computed where it is read
    why       what was joined, and what was not and why
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..ir.node import Graph, Node, Value, make_input, map_values
from ..ir.types import Dim, TensorType, substitute, symbols_of
from ..ops import OPS
from ..tiles.axes import Axes, Layout, layout_text
from ._groups import ATTENTION, Group

KERNEL = OPS["kernel"]


def make_kernel(
    group: Group, outs: list[Value], place: Mapping[Node, int], number: int, refused: Mapping[Node, str]
) -> Node:
    """The kernel node of a group; its arguments are values of the old graph."""
    reads = [v for v in group.reads if isinstance(v.type, TensorType)]
    inputs = tuple(make_input(f"a{i}", v.type, "input", v.node.loc) for i, v in enumerate(reads))
    new: dict[Value, Value] = dict(zip(reads, (n.out for n in inputs), strict=True))
    nodes: list[Node] = []
    sources: list[Node] = []
    for old in sorted({*group.nodes, *group.free}, key=place.__getitem__):
        node = old.replace(args=map_values(old.args, new.__getitem__))
        new.update(zip(old.outs, node.outs, strict=True))
        nodes.append(node)
        sources.append(old)
    region = Graph(inputs, tuple(nodes), tuple(new[v] for v in outs), (), "region")
    axes, layouts = _axes(group, sources, outs)
    main = [n for n in group.nodes if n.op.kind in ("contract", *ATTENTION, "scan", "reduce")] or group.nodes
    used = list(dict.fromkeys(n.op.name for n in main))
    why = [*group.joined, *(f"not more: {refused[n]}" for n in group.nodes if n in refused)]
    return Node(
        KERNEL,
        tuple(reads),
        {
            "name": f"{group.family}_{number}_{'_'.join(used[:3])}",
            "family": group.family,
            "axes": axes,
            "layouts": layouts,
            "why": tuple(dict.fromkeys(why)),
        },
        tuple(v.type for v in outs),
        (region,),
        main[0].loc,
    )


def _axes(group: Group, sources: Iterable[Node], outs: Iterable[Value]) -> tuple[Any, Any]:
    axes = group.axes
    assert axes is not None
    order = _loop_order(axes, outs)
    names = {a: f"{'r' if a in axes.reduced else 'x'}{i}" for i, a in enumerate(order)}
    computed = set(axes.computed)

    def text(node: Node) -> str | None:
        if node.out not in computed or node.op.kind in ATTENTION:
            return None
        place = layout_text(axes.layouts[node.out], names)
        folded = axes.operand_layouts.get(node)
        return place if folded is None else f"{layout_text(folded, names)} -> {place}"

    return tuple((names[a], axes.extent[a]) for a in order), tuple(map(text, sources))


def _loop_order(axes: Axes, outs: Iterable[Value]) -> list[int]:
    """Parallel axes in the order of the largest result's memory, then the reduced ones as they lie in the operand."""
    order: dict[int, None] = {}
    ranked = sorted((v for v in outs if v in set(axes.computed)), key=lambda v: -len(_flat(axes.layouts[v])))
    for v in [*ranked, *axes.computed]:
        by_stride = sorted(zip(v.type.strides, axes.layouts[v], strict=True), key=lambda item: -_about(item[0]))
        order.update((a, None) for _, dim in by_stride for a in dim if a not in axes.reduced)
    for folded in axes.fold_orders():
        order.update((a, None) for a in folded)
    order.update((a, None) for n in axes.folded.values() for a in n)
    return list(order)


def _about(d: Dim) -> int:
    """A size that depends on others as if they were large."""
    return substitute(d, dict.fromkeys(symbols_of([d]), 4096))


def _flat(layout: Layout) -> list[int]:
    return [a for dim in layout for a in dim]
