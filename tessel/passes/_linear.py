"""Which operators may take operands that are still to be summed, and give a result that is.

``f(a + b) = f(a) + f(b)``: views, negation, products with something that is not partial, sums of two partial
values, sums over dimensions. A sum of a partial and a finished value goes on too, the finished one counted on
the first device alone, where another linear operator follows (a bias before a view, a chain of sums). Only
where the result is not larger than what would be combined before it, so that waiting never costs bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.node import Node, Value
from ..ir.sharding import Sharding
from ..ir.types import TensorType

Partial = tuple[tuple[str, str], ...]

_VIEWS = frozenset({"reshape", "permute", "slice", "flip", "copy"})
_SUMS = frozenset({"add", "sub"})


@dataclass(frozen=True)
class Carried:
    """What being partial goes on through a node.

    Attributes:
        operands: for each tensor operand the part of being partial that it keeps.
        result: what the result then is.
        once: operands that only the first device along the axes of ``result`` counts; zeros on the others.
    """

    operands: tuple[Partial, ...]
    result: Partial = ()
    once: tuple[int, ...] = ()

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes that the result is partial over."""
        return frozenset(a for a, _ in self.result)


def carries(node: Node, operands: Sequence[Sharding | None], users: Sequence[Node]) -> Carried:
    """What a node's operands may keep of being partial.

    Args:
        operands: the sharding of each tensor operand, ``None`` for one that other nodes read too: they will
            have it combined, so that nothing is won by waiting.
        users: the nodes that read the result, if nothing else does and there is one read.
    """
    given: list[Partial] = [() if s is None else s.partial for s in operands]
    nothing = Carried(((),) * len(given))
    if not any(given) or len(node.types) != 1 or not isinstance(node.types[0], TensorType):
        return nothing
    values = [v for v in node.operands if isinstance(v.type, TensorType)]
    name = node.op.name
    sums = [tuple(p for p in g if p[1] == "sum") for g in given]
    if name in _VIEWS or name in ("neg", "sum"):
        kept = given[0] if name in _VIEWS else sums[0]
        return Carried((kept,), kept) if _no_larger(node, values[0]) else nothing
    if name in ("add", "sub") and len(values) == 2 == len(node.args):
        same = tuple(p for p in sums[0] if p in sums[1])
        if same:
            # an operand that is broadcast would be combined larger than it is
            return Carried((same, same), same) if all(v.type.nbytes == node.type.nbytes for v in values) else nothing
        at = 0 if sums[0] else 1
        axes = {a for a, _ in sums[at]}
        other = operands[1 - at]
        waits = any(u.op.name in _VIEWS | _SUMS for u in users) and values[at].type.nbytes == node.type.nbytes
        if waits and not given[1 - at] and (other is None or not axes & set(other.axes)):
            return Carried((sums[0], sums[1]), sums[at], (1 - at,))
        return nothing
    if name == "mul" and sum(map(bool, given)) == 1:
        at = next(i for i, g in enumerate(given) if g)
        return Carried(tuple(sums), sums[at]) if _no_larger(node, values[at]) else nothing
    if name == "div" and sums[0] and not any(given[1:]) and node.args[0] == values[0]:
        return Carried(tuple(sums), sums[0]) if _no_larger(node, values[0]) else nothing
    return nothing


def _no_larger(node: Node, v: Value) -> bool:
    return bool(node.type.nbytes <= v.type.nbytes)


__all__ = ["Carried", "Partial", "carries"]
