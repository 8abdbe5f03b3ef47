"""The derivative of score edits: what the gradient of an edited score is multiplied by.

    edited = cap * tanh(score / cap)        slope = cap * (1 - tanh(score / cap)^2) * (1 / cap)

Edits are pointwise statements of a tile program on one value; forward-mode differentiation writes their derivative
as more such statements (Wengert, 1964, "A simple automatic derivative evaluation program").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .kernel import ACC, Compute, Operand, Ref, Stmt

__all__ = ["NoSlope", "slope"]

_DTYPE = torch.float32


class NoSlope(Exception):
    """An operator among the edits has no rule; the text names it."""


def slope(stmts: Sequence[Stmt], value: Operand, of: int = ACC) -> tuple[list[Stmt], Operand]:
    """Statements to be added after ``stmts``, and the derivative of ``value`` with respect to value ``of``.

    The derivative is a number where it is the same everywhere: 1 where the edits only add, 0 where ``value`` does
    not depend on ``of``.

    Raises:
        NoSlope: an operator without a rule lies between the two.

    >>> add = Compute(0, "add", (Ref(ACC), 2.0), torch.float32, torch.float32)
    >>> slope([add], Ref(0))
    ([], 1.0)
    >>> double = Compute(0, "mul", (Ref(ACC), 2.0), torch.float32, torch.float32)
    >>> slope([double], Ref(0))
    ([], 2.0)
    """
    writer = _Writer(max([of, *(getattr(s, "out", -1) for s in stmts)]) + 1)
    known: dict[int, Operand] = {of: 1.0}
    for s in stmts:
        if not isinstance(s, Compute):
            continue
        given = [known.get(a.number, 0.0) if isinstance(a, Ref) else 0.0 for a in s.args]
        if any(g != 0.0 for g in given):
            rule = _RULES.get(s.op)
            if rule is None:
                raise NoSlope(f"{s.op} among the score edits has no derivative here")
            known[s.out] = rule(writer, s, given)
    return writer.stmts, known.get(value.number, 0.0) if isinstance(value, Ref) else 0.0


class _Writer:
    """Writes arithmetic, folding numbers."""

    def __init__(self, first: int) -> None:
        self.next = first
        self.stmts: list[Stmt] = []

    def op(self, name: str, *args: Operand) -> Operand:
        out = self.next
        self.next += 1
        self.stmts.append(Compute(out, name, args, _DTYPE, _DTYPE))
        return Ref(out)

    def mul(self, a: Operand, b: Operand) -> Operand:
        if not isinstance(a, Ref) and not isinstance(b, Ref):
            return a * b
        for x, y in ((a, b), (b, a)):
            if not isinstance(x, Ref) and x in (0.0, 1.0):
                return y if x == 1.0 else 0.0
        return self.op("mul", a, b)

    def add(self, a: Operand, b: Operand) -> Operand:
        if not isinstance(a, Ref) and not isinstance(b, Ref):
            return a + b
        for x, y in ((a, b), (b, a)):
            if not isinstance(x, Ref) and x == 0.0:
                return y
        return self.op("add", a, b)


Rule = Callable[[_Writer, Compute, Sequence[Operand]], Operand]


def _mul(w: _Writer, s: Compute, d: Sequence[Operand]) -> Operand:
    return w.add(w.mul(d[0], s.args[1]), w.mul(s.args[0], d[1]))


def _div(w: _Writer, s: Compute, d: Sequence[Operand]) -> Operand:
    y = s.args[1]
    inverse = w.op("div", 1.0, y) if isinstance(y, Ref) else 1.0 / float(y)
    return w.mul(inverse, w.add(d[0], w.mul(-1.0, w.mul(Ref(s.out), d[1]))))


def _tanh(w: _Writer, s: Compute, d: Sequence[Operand]) -> Operand:
    y = Ref(s.out)
    return w.mul(w.op("sub", 1.0, w.op("mul", y, y)), d[0])


def _sigmoid(w: _Writer, s: Compute, d: Sequence[Operand]) -> Operand:
    y = Ref(s.out)
    return w.mul(w.op("mul", y, w.op("sub", 1.0, y)), d[0])


def _where(w: _Writer, s: Compute, d: Sequence[Operand]) -> Operand:
    return d[1] if d[1] is d[2] else w.op("where", s.args[0], d[1], d[2])


_RULES: dict[str, Rule] = {
    "add": lambda w, s, d: w.add(d[0], d[1]),
    "sub": lambda w, s, d: w.add(d[0], w.mul(-1.0, d[1])),
    "neg": lambda w, s, d: w.mul(-1.0, d[0]),
    "cast": lambda w, s, d: d[0],
    "copy": lambda w, s, d: d[0],
    "exp": lambda w, s, d: w.mul(Ref(s.out), d[0]),
    "mul": _mul,
    "div": _div,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "where": _where,
}
