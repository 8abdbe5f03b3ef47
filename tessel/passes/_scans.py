"""Which groups of nodes one kernel can go through step by step: what the fuse pass asks of groups with a recurrence."""

from __future__ import annotations

from collections.abc import Iterable

from ..ir.node import Node, Value
from ..ir.types import product
from ..tiles.axes import Axes

__all__ = ["scan_axis", "scan_problem"]

_FOLDS = frozenset({"sum", "amax", "amin"})
MOST_ROW = 4096  # results along the reduced axes, whose state is kept between two steps
LEAST_CHAINS = 16  # independent recurrences, or threads have nothing to share


def scan_axis(node: Node, axes: Axes) -> int | None:
    """The loop that a recurrence goes along; ``None`` where that is several loops."""
    found = axes.layouts[node.out][node.attrs["dim"] % node.type.rank]
    return found[0] if len(found) == 1 else None


def scan_problem(nodes: Iterable[Node], axes: Axes) -> str | None:
    """Why these nodes cannot be one kernel with the recurrences among them, ``None`` where they can.

    At every step a kernel makes the new state on all loops but the scanned one, folds it, and goes on with the
    folded values: what is folded is never needed at every place of the row again.
    """
    nodes = list(nodes)
    scans = [n for n in nodes if n.op.kind == "scan"]
    along = {scan_axis(n, axes) for n in scans}
    if len(along) != 1 or None in along:
        return "recurrences along different loops"
    if len({bool(n.attrs.get("reverse", False)) for n in scans}) != 1:
        return "recurrences in opposite directions"
    (step,) = along
    if step in axes.reduced:
        return "the steps of a recurrence would be folded"
    row = product(axes.extent[a] for a in axes.reduced)
    if not isinstance(row, int) or row > MOST_ROW:
        return f"the state of a recurrence over {row} places is not kept between steps"
    chains = product(axes.extent[a] for a in axes.parallel if a != step)
    if axes.reduced and isinstance(chains, int) and chains < LEAST_CHAINS:
        return f"only {chains} recurrences would run side by side"
    folded: set[Value] = set()  # what depends on a fold
    for node in sorted(nodes, key=_depth(nodes).__getitem__):
        after = any(v in folded for v in _operands(node))
        whole = axes.reduced and {a for d in axes.layouts[node.out] for a in d} >= axes.reduced
        if node.op.kind == "reduce":
            if after or node.op.name not in _FOLDS or not node.type.dtype.is_floating_point:
                return f"{node.op.name} is not folded beside a recurrence"
            after = True
        elif after and (node.op.kind == "scan" or whole):
            return f"{node.op.name} needs a folded value before the next step"
        if node.op.kind == "scan" and axes.reduced and not whole:
            return "a recurrence on fewer loops than the fold after it"
        if after:
            folded.update(node.outs)
    return None


def _operands(node: Node) -> list[Value]:
    """What a node reads, views looked through."""
    found: list[Value] = []
    stack = list(node.operands)
    while stack:
        v = stack.pop()
        if v.op.kind == "view":
            stack.extend(v.node.operands)
        else:
            found.append(v)
    return found


def _depth(nodes: list[Node]) -> dict[Node, int]:
    """How many nodes of the group stand before each on the longest way; an order in which operands come first."""
    inside = set(nodes)
    depth: dict[Node, int] = {}
    stack = list(nodes)
    while stack:
        node = stack[-1]
        before = [v.node for v in _operands(node) if v.node in inside]
        missing = [n for n in before if n not in depth]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        depth[node] = 1 + max((depth[n] for n in before), default=0)
    return depth
