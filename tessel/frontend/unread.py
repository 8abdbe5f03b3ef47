"""Remove from a captured graph what a rewrite has left without readers, and nothing else.

``fx``'s own removal of dead code takes methods that write in place for dead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from .compat import OpOverload

_WRITES = ("setitem", "add_")
# Results in memory of their own: what writes into one that nothing else reads can go.
_FRESH = ("empty_like", "zeros_like", "grouped_mm_fallback", "_grouped_mm", "squeeze")


def call_name(node: fx.Node) -> str:
    """The bare name of the function or method that a node calls."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.rsplit("::", 1)[-1]
    return str(getattr(node.target, "__name__", node.target)).rsplit(".", 1)[-1]


def _writes_into(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node only writes into another, and its own result is not read."""
    return call_name(user) in _WRITES and bool(user.args) and user.args[0] is node and not user.users


def _changes_others(node: fx.Node) -> bool:
    """Whether a node writes in place into something that may be read elsewhere."""
    name = call_name(node)
    if not name.endswith("_") or name.endswith("__") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    into = node.args[0]
    fresh = into.op in ("call_function", "call_method") and call_name(into) in _FRESH
    return not (fresh and all(u is node for u in into.users))


def erase_unread(graph: fx.Graph, start: Iterable[Any]) -> None:
    """Erase those of ``start`` that nothing reads, then what only they read, and so on.

    What only writes into such a node goes with it.
    """
    todo = [n for n in start if isinstance(n, fx.Node)]
    gone: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in gone or node.op not in ("call_function", "call_method"):
            continue
        if _changes_others(node) or not all(_writes_into(u, node) for u in node.users):
            continue
        for user in list(node.users):
            todo += user.all_input_nodes
            graph.erase_node(user)
            gone.add(user)
        todo += node.all_input_nodes
        graph.erase_node(node)
        gone.add(node)


__all__ = ["call_name", "erase_unread"]
