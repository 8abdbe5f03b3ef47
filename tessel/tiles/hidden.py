"""Which keys the edits of attention's scores hide: conditions that can be asked before a score is computed.

    where(c, score, -inf)               hidden unless c
    score + mask                        hidden where the mask, a load, is -inf
    score + (bias + where(c, 0, -inf))  hidden unless c

So that a kernel skips blocks of keys that no row of a block sees. Of a mask whose gradient is wanted nothing is
asked: it is a bias that is learned. A key that a mask hides stays hidden where its score is NaN or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .kernel import ACC, DSCORE, Compute, Kernel, Load, Operand, Ref, Stmt, axes_read, refs

__all__ = ["Hidden", "closure", "hidden"]


@dataclass(frozen=True)
class Hidden:
    """What hides the keys of a kernel's scores.

    Attributes:
        stmts: statements that compute the conditions, in order.
        conds: numbers of their values and what each must be for a key to be seen.
        value: the edited score where the conditions around it hold; those of what is added stay in it.
    """

    stmts: tuple[Stmt, ...]
    conds: tuple[tuple[int, bool], ...]
    value: Operand


def closure(stmts: Iterable[Stmt], roots: Iterable[int]) -> tuple[list[Stmt], bool]:
    """The statements that values need, in order, and whether the score is among what they read."""
    stmts = tuple(stmts)
    made = {s.out: s for s in stmts if hasattr(s, "out")}
    wanted: set[int] = set()
    stack = list(roots)
    while stack:
        n = stack.pop()
        if n not in wanted:
            wanted.add(n)
            stack += refs(made[n]) if n in made else []
    checks = [s for s in stmts if not hasattr(s, "out") and any(n in wanted for n in refs(s))]
    return [s for s in stmts if getattr(s, "out", None) in wanted or s in checks], ACC in wanted


def hidden(kernel: Kernel, biases: bool = True) -> Hidden:
    """The conditions of an attention kernel, forward or backward.

    Args:
        biases: ask floating masks with numbers of their own for every head too, which most often hide nothing.
    """
    stmts = kernel.parts.get("score", ())
    made = {s.out: s for s in stmts if hasattr(s, "out")}
    value: Operand = kernel.provides.get("score", Ref(ACC))
    conds: list[tuple[int, bool]] = []
    while isinstance(value, Ref) and (choice := _choice(made.get(value.number))) is not None:
        cond, wanted, inner = choice
        if closure(stmts, [cond])[1]:
            break
        conds.append((cond, wanted))
        value = inner
    learned = any(DSCORE in refs(s) for s in kernel.body)
    head = "" if biases else next((a.name for a in reversed(kernel.axes) if a.name.startswith("x")), "")
    more, tests = ([], []) if learned or not isinstance(value, Ref) else _added(stmts, value.number, head)
    conds += more
    needed, _ = closure((*stmts, *tests), [n for n, _ in conds])
    return Hidden(tuple(needed), tuple(conds), value)


def _added(stmts: tuple[Stmt, ...], number: int, head: str) -> tuple[list[tuple[int, bool]], list[Stmt]]:
    """The conditions in what is added to a score, and the comparisons that ask a loaded mask; none along ``head``."""
    made = {s.out: s for s in stmts if hasattr(s, "out")}
    free = 1 + max(made, default=0)
    conds: list[tuple[int, bool]] = []
    tests: list[Stmt] = []
    stack = [number]
    while stack:
        at = stack.pop()
        stmt = made.get(at)
        if isinstance(stmt, Load) and stmt.dtype.is_floating_point:
            if "n" not in axes_read(stmt) or head in axes_read(stmt):
                continue
            tests.append(Compute(free, "ne", (Ref(at), -math.inf), torch.bool, stmt.dtype))
            conds.append((free, True))
            free += 1
        elif isinstance(stmt, Compute) and (stmt.op == "add" or (stmt.op == "cast" and _floats(stmt))):
            stack += [a.number for a in stmt.args if isinstance(a, Ref)]
        elif (choice := _choice(stmt)) is not None and not closure(stmts, [choice[0]])[1]:
            conds.append(choice[:2])
            stack += [choice[2].number] if isinstance(choice[2], Ref) else []
    return conds, tests


def _floats(stmt: Compute) -> bool:
    return stmt.dtype.is_floating_point and stmt.arg_dtype.is_floating_point


def _choice(stmt: Stmt | None) -> tuple[int, bool, Operand] | None:
    """A value that is -inf where a condition fails: the condition, what it must be, and the value where it holds."""
    if not isinstance(stmt, Compute) or stmt.op != "where" or not isinstance(stmt.args[0], Ref):
        return None
    test, yes, no = stmt.args
    if no == -math.inf and yes != -math.inf:
        return test.number, True, yes
    if yes == -math.inf and no != -math.inf:
        return test.number, False, no
    return None
