"""Symbolic sizes: from torch's expressions to the IR's."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from ..ir.exprs import normal
from ..ir.types import simplify_dim, symbol, unbacked
from .compat import guarded_equalities


def to_ir(expr: Any) -> Any:
    """A torch size expression in the IR's symbols: positive sizes, or integers of any sign."""
    if not isinstance(expr, sympy.Basic):
        return expr
    names = {}
    for s in expr.free_symbols:
        if s.is_integer:
            names[s] = symbol(s.name) if s.is_positive else unbacked(s.name)
    found = normal(expr.xreplace(names))
    return simplify_dim(found) if isinstance(found, sympy.Expr) and found.is_integer else found


def symbolic_example(gm: fx.GraphModule) -> torch.SymInt | None:
    """A symbolic size of the graph, which knows all that torch knows of the sizes."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            return val
        if isinstance(val, torch.Tensor):
            for n in val.shape:
                if isinstance(n, torch.SymInt):
                    return n
    return None


def equalities(example: torch.SymInt | None) -> dict[Any, Any]:
    """The simpler side of each guarded equality of sizes, by the other side."""
    simpler: dict[Any, Any] = {}
    for pair in guarded_equalities(example):
        a, b = sorted(map(to_ir, pair), key=lambda e: (sympy.sympify(e).count_ops(), str(e)))
        if a != b and not isinstance(b, int):
            simpler[b] = a
    return simpler
