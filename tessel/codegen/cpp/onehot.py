"""Sums of which one element counts: ``sum over r of where(r == t, f(r), 0)`` is ``f(t)``.

So is the loss of a class, and a row taken by its number: no loop over the row is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...tiles.index import var
from ...tiles.kernel import Axis, Compute, IndexOf, Reduce, Ref, Stmt, refs
from .space import Space

__all__ = ["only_place"]


def only_place(space: Space, stmts: Sequence[Stmt], lane: Axis) -> int | None:
    """The number of the whole number that says which point of the loop ``lane`` counts, if one alone does.

    Every sink of the loop must be a sum of ``where(r == t & ..., value, 0)`` with the same ``t``, and ``t`` must be
    known before the loop. Where ``t`` is no point of the loop, none counts.

    Args:
        space: the loops of the kernel.
        stmts: what the loop computes, with the reductions it ends in.
        lane: its only variable.
    """
    if any(not hasattr(s, "out") for s in stmts):  # something is stored or checked at every point
        return None
    made = {s.out: s for s in stmts}  # type: ignore[union-attr]
    places = {_place(space, s, lane, made) for s in stmts if isinstance(s, Reduce)}
    return places.pop() if len(places) == 1 else None


def _place(space: Space, fold: Reduce, lane: Axis, made: dict[int, Stmt]) -> int | None:
    picked = made.get(fold.arg.number)
    zero = isinstance(picked, Compute) and not isinstance(picked.args[-1], Ref) and picked.args[-1] == 0
    if fold.op != "sum" or not zero or picked.op != "where":  # type: ignore[union-attr]
        return None
    todo = [picked.args[0]]  # type: ignore[union-attr]
    while todo:
        arg = todo.pop()
        test = made.get(arg.number) if isinstance(arg, Ref) else None
        if not isinstance(test, Compute):
            continue
        if test.op == "logical_and" or (test.op in ("mul", "bitwise_and") and test.arg_dtype == torch.bool):
            todo.extend(test.args)
        elif test.op == "eq" and test.arg_dtype == torch.int64:
            for a, b in (test.args, test.args[::-1]):
                index = made.get(a.number) if isinstance(a, Ref) else None
                here = isinstance(index, IndexOf) and space.at(index.index) == var(lane.name, lane.extent)
                if here and isinstance(b, Ref) and not _varies(space, b.number, lane, made):
                    return b.number
    return None


def _varies(space: Space, number: int, lane: Axis, made: dict[int, Stmt]) -> bool:
    """Whether a value is computed from anything that varies along the loop, as far as its statements tell."""
    stmt = made.get(number)
    if stmt is None:  # made before this loop, or outside of all
        return False
    if not isinstance(stmt, Compute):  # an element of memory, a number of a point
        return True
    return any(_varies(space, n, lane, made) for n in refs(stmt))
