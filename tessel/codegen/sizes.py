"""Size expressions as Python text for the host program.

Symbols become variables of the same name; ``Max``, ``Min`` and the like become the functions in
``HELPERS``, which the runtime puts in the program's namespace.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import sympy

from ..ir.exprs import expr_text, normal

HELPERS: dict[str, Any] = {
    "Max": max,
    "Min": min,
    "Abs": abs,
    "floor": math.floor,
    "ceiling": math.ceil,
    "sign": lambda x: (x > 0) - (x < 0),
    "exp": math.exp,
    "log": math.log,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "sqrt": math.sqrt,
    "Eq": lambda a, b: a == b,
    "Ne": lambda a, b: a != b,
    "And": lambda *xs: all(xs),
    "Or": lambda *xs: any(xs),
    "Not": lambda x: not x,
    "Piecewise": lambda *cases: next(value for value, holds in cases if holds),
    "oo": math.inf,
}


@lru_cache(maxsize=100_000, typed=True)
def size_text(x: Any, whole: bool = False) -> str:
    """A Python expression for a number known as an expression over sizes.

    Args:
        x: an expression, or a plain number.
        whole: it is a size, a stride or an offset: a whole number, even where the expression alone does
            not tell.

    >>> s = sympy.Symbol("s0", integer=True, positive=True)
    >>> size_text(2 * s + 1), size_text(s * (s + 1) / 2, whole=True), size_text(s / 2), size_text(7)
    ('2*s0+1', '(s0*(s0+1))//(2)', 's0/2', '7')
    """
    x = normal(x)
    if not isinstance(x, sympy.Basic):
        return repr(x)
    if whole or x.is_integer:
        top, bottom = sympy.fraction(sympy.together(x))
        if bottom != 1:
            return _plain_names(f"({expr_text(top)})//({expr_text(bottom)})")
    text = _plain_names(expr_text(x))
    if (whole or x.is_integer) and "/" in text.replace("//", ""):
        return f"int({text})"
    return text


def _plain_names(text: str) -> str:
    """Without the marks that IR text puts before a symbol's name (``!u0``, ``?n``)."""
    return text.replace("!", "").replace("?", "")


__all__ = ["HELPERS", "size_text"]
