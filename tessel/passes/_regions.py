"""A group becomes a ``kernel`` node: its region, and the axes that code generation follows.

Attributes of a kernel node:

    name      a readable identifier
    family    pointwise, reduction, matmul or attention
    axes      ((name, extent, "x" or "r"), ...): the loops, parallel ones first
    layouts   for each node of the region the loops of each dim of its (first) result, as
              positions in ``axes``; ``None`` for values computed where they are read
    folds     for each node of the region that reduces, the layout of its operand; else ``None``
    why       what was joined, and what was not and why
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..ir.node import Graph, Node, Value, make_input, map_values
from ..ir.types import TensorType
from ..ops import OPS
from ..tiles.axes import Axes, Layout
from ._groups import Group

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
    axes, layouts, folds = _axes(group, sources, outs)
    main = [n for n in group.nodes if n.op.kind in ("contract", "attention", "reduce")] or group.nodes
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
            "folds": folds,
            "why": tuple(dict.fromkeys(why)),
        },
        tuple(v.type for v in outs),
        (region,),
        main[0].loc,
    )


def _axes(group: Group, sources: Iterable[Node], outs: Iterable[Value]) -> tuple[Any, Any, Any]:
    axes = group.axes
    assert axes is not None
    order = _loop_order(axes, outs)
    number = {a: i for i, a in enumerate(order)}
    reduced = axes.reduced
    names = iter(range(len(order)))
    table = tuple(
        (
            f"r{next(names)}" if a in reduced else f"x{next(names)}",
            axes.extent[a],
            "r" if a in reduced else "x",
        )
        for a in order
    )

    def place(layout: Layout) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(number[a] for a in dim) for dim in layout)

    computed = set(axes.computed)
    layouts = tuple(
        place(axes.layouts[n.out]) if n.out in computed and n.op.kind != "attention" else None for n in sources
    )
    folds = tuple(place(axes.operand_layouts[n]) if n in axes.operand_layouts else None for n in sources)
    return table, layouts, folds


def _loop_order(axes: Axes, outs: Iterable[Value]) -> list[int]:
    """Parallel axes in the order of the largest result's memory, then the reduced ones as they lie in the operand."""
    order: dict[int, None] = {}
    ranked = sorted((v for v in outs if v in set(axes.computed)), key=lambda v: -len(_flat(axes.layouts[v])))
    for v in [*ranked, *axes.computed]:
        by_stride = sorted(
            zip(v.type.strides, axes.layouts[v], strict=True),
            key=lambda item: -item[0] if isinstance(item[0], int) else 0,
        )
        if any(not isinstance(s, int) for s, _ in by_stride):
            by_stride = list(zip(v.type.strides, axes.layouts[v], strict=True))
        order.update((a, None) for _, dim in by_stride for a in dim if a not in axes.reduced)
    for layout in axes.operand_layouts.values():
        order.update((a, None) for a in _flat(layout) if a in axes.reduced)
    order.update((a, None) for n in axes.folded.values() for a in n)
    return list(order)


def _flat(layout: Layout) -> list[int]:
    return [a for dim in layout for a in dim]
