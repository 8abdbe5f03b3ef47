"""What a node of a captured graph does beside giving a result, and the removal of what nothing reads.

``fx``'s own removal of dead code takes methods that write in place for dead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ..ir.nested import leaves
from .fx_words import call_name

__all__ = ["SETTINGS", "draws", "erase_unread", "has_effects", "written"]

# Functions and methods that draw random numbers, beside all with "rand" or "dropout" in their names.
_DRAWS = frozenset("normal bernoulli multinomial poisson binomial rrelu gumbel_softmax _standard_gamma".split())
# operators of the module ``operator`` that write to their first operand
_INTO = frozenset("iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem".split())
SETTINGS = frozenset({"_set_grad_enabled", "_enter_autocast", "_exit_autocast"})  # what holds until the next of them
# Results in memory of their own: what writes into one that nothing else reads can go.
_FRESH = ("empty_like", "zeros_like", "grouped_mm_fallback", "_grouped_mm", "squeeze")


def written(node: fx.Node) -> list[fx.Node]:
    """What a node writes to: ``x += y``, ``x.add_(y)``, ``x[i] = y``, ``relu(x, inplace=True)``, ``out=x``.

    >>> import operator, torch
    >>> g = fx.Graph()
    >>> x, y = g.placeholder("x"), g.placeholder("y")
    >>> [written(g.call_function(f, (x, y))) for f in (operator.iand, operator.and_)]
    [[x], []]
    """
    if node.op not in ("call_function", "call_method"):
        return []
    if node.kwargs.get("out") is not None:
        return list(leaves(node.kwargs["out"], fx.Node))
    name = call_name(node)
    if getattr(node.target, "__module__", "") == "_operator":  # where ``and_`` is no method in place
        into = name in _INTO
    else:
        into = (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True
    first = node.args[0] if node.args else node.kwargs.get("input")
    return list(leaves(first, fx.Node)) if into else []


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers.

    >>> import operator, torch
    >>> g = fx.Graph()
    >>> draws(g.call_function(torch.normal, (0.0, 1.0, (3,)))), draws(g.call_function(torch.nn.functional.normalize))
    (True, False)
    """
    if node.op not in ("call_function", "call_method"):
        return False
    name = call_name(node)
    return "rand" in name or "dropout" in name or name.rstrip("_") in _DRAWS


def has_effects(node: fx.Node) -> bool:
    """Whether computing a node twice, or not at all, changes more than its result."""
    return bool(written(node)) or draws(node) or call_name(node) in SETTINGS


def erase_unread(start: Iterable[Any]) -> None:
    """Erase those of ``start`` that nothing reads, then what only they read, and so on.

    What only writes into such a node goes with it where the node is new memory; what has effects elsewhere stays.
    """
    todo = [n for n in start if isinstance(n, fx.Node)]
    gone: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in gone or node.op not in ("call_function", "call_method", "get_attr") or not _may_go(node):
            continue
        for dead in (*node.users, node):
            todo += dead.all_input_nodes
            dead.graph.erase_node(dead)
            gone.add(dead)


def _may_go(node: fx.Node) -> bool:
    if draws(node) or call_name(node) in SETTINGS:
        return False
    if any(not _fresh(x) or any(u is not node for u in x.users) for x in written(node)):
        return False
    return not node.users or (_fresh(node) and all(written(u) == [node] and not u.users for u in node.users))


def _fresh(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and call_name(node) in _FRESH
