"""Symbolic sizes: from torch's expressions to the IR's."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from ..ir.exprs import normal
from ..ir.types import simplify_dim, symbol, unbacked
from .compat import FakeTensor, guarded_equalities


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


def settle(gm: fx.GraphModule) -> None:
    """Make numbers of sizes that torch took for numbers while it traced, in what is known of a Dynamo graph's nodes.

    A loop over ``range(x.shape[1])`` has as many steps as there were in the call that is traced: what was a symbol for
    that size is a number from there on, but tensors made before still have the symbol.
    """
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if "example_value" in node.meta:
                node.meta["example_value"] = _settled(node.meta["example_value"])


def _settled(x: Any) -> Any:
    if type(x) in (tuple, list):
        return type(x)(map(_settled, x))
    if not isinstance(x, FakeTensor) or x.layout is not torch.strided:
        return x
    before = (*x.shape, *x.stride())
    after = list(map(_number, before))
    if list(map(type, before)) == list(map(type, after)):
        return x
    shape, strides = after[: x.dim()], after[x.dim() :]
    with x.fake_mode:
        return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)


def _number(n: Any) -> Any:
    found = n if isinstance(n, int) else n.node.maybe_as_int()
    return n if found is None else found
