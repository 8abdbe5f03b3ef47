"""Which operators may take operands that are still to be summed, and give a result that is.

``f(a + b) = f(a) + f(b)``: views, negation, products with something that is not partial, sums of two partial
values, sums over dimensions. Only where the result is not larger than what would be combined before it, so
that waiting never costs bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.node import Node, Value
from ..ir.sharding import Sharding
from ..ir.types import TensorType

Partial = tuple[tuple[str, str], ...]

_VIEWS = frozenset({"reshape", "permute", "slice", "flip", "copy"})


def carries(node: Node, operands: Sequence[Sharding | None]) -> tuple[list[Partial], Partial]:
    """What each operand may keep of being partial, and what the result then is.

    Args:
        operands: the sharding of each tensor operand, ``None`` for one that other nodes read too: they will
            have it combined, so that nothing is won by waiting.
    """
    given: list[Partial] = [() if s is None else s.partial for s in operands]
    nothing: list[Partial] = [()] * len(given)
    if not any(given) or len(node.types) != 1 or not isinstance(node.types[0], TensorType):
        return nothing, ()
    found = _keeps(node, given)
    return found, next((p for p in found if p), ())


def _keeps(node: Node, given: list[Partial]) -> list[Partial]:
    values = [v for v in node.operands if isinstance(v.type, TensorType)]
    name = node.op.name
    nothing: list[Partial] = [()] * len(given)
    sums = [tuple(p for p in g if p[1] == "sum") for g in given]
    if name in _VIEWS:
        return given if _no_larger(node, values[0]) else nothing
    if name in ("neg", "sum"):
        return sums if _no_larger(node, values[0]) else nothing
    if name in ("add", "sub") and len(values) == 2 == len(node.args):
        # a literal, or an operand that is broadcast, would be counted once a device
        same = tuple(p for p in sums[0] if p in sums[1])
        return [same, same] if all(v.shape == node.type.shape for v in values) else nothing
    if name == "mul" and sum(map(bool, given)) == 1:
        at = next(i for i, g in enumerate(given) if g)
        return sums if _no_larger(node, values[at]) else nothing
    if name == "div" and given[0] and not any(given[1:]) and node.args[0] == values[0]:
        return sums if _no_larger(node, values[0]) else nothing
    return nothing


def _no_larger(node: Node, v: Value) -> bool:
    return bool(node.type.nbytes <= v.type.nbytes)


__all__ = ["Partial", "carries"]
