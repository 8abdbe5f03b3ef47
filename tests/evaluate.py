"""Runs an imported graph with plain torch, one node after another (for tests of the importer alone)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from tessel.frontend.importer import Imported
from tessel.ir.exprs import evaluate
from tessel.ir.node import Value
from tessel.ir.types import Dim, TensorType


def run(imported: Imported, inputs: Sequence[Any], strides: bool = False) -> list[Any]:
    """The outputs of the graph; its effects are carried out. Types are compared with what the nodes give.

    Args:
        imported: what to run.
        inputs: one for each graph input that is not a constant.
        strides: also compare the strides of the outputs with their types.
    """
    env: dict[Value, Any] = {}
    sizes: dict[str, Any] = {}
    given = iter(inputs)

    def bind(expr: Dim, value: int) -> None:
        if isinstance(expr, sympy.Symbol):
            assert sizes.setdefault(expr.name, value) == value, (expr, sizes, value)

    def hold(v: Value, x: Any) -> None:
        t = v.type
        if isinstance(t, TensorType):
            for d, n in zip(t.shape, x.shape, strict=True):
                bind(d, n)
            assert [evaluate(d, sizes) for d in t.shape] == list(x.shape), (v, x.shape)
            assert x.dtype == t.dtype, (v, x.dtype)
        else:
            bind(t.expr, x)
        env[v] = x

    def look(a: Any) -> Any:
        if isinstance(a, Value):
            return env[a]
        if isinstance(a, tuple):
            return tuple(map(look, a))
        return evaluate(a, sizes) if isinstance(a, sympy.Basic) else a

    values = []
    for node in imported.graph.inputs:
        name = node.attrs["name"]
        values.append(imported.constants[name] if name in imported.constants else next(given))
        if isinstance(values[-1], torch.Tensor):
            for d, n in zip(node.type.shape, values[-1].shape, strict=True):
                bind(d, n)
    for node, x in zip(imported.graph.inputs, values, strict=True):
        hold(node.out, x)
    for node in imported.graph.nodes:
        got = node.op.ref(*map(look, node.args), **{k: look(a) for k, a in node.attrs.items()})
        if node.op.name == "item":
            sizes[node.attrs["symbol"]] = got
        for v, x in zip(node.outs, got if isinstance(got, tuple) else (got,), strict=True):
            hold(v, x)
    outputs = [look(a) for a in imported.graph.outputs]
    if strides:
        outputs = [laid_out(a, x, sizes) for a, x in zip(imported.graph.outputs, outputs, strict=True)]
    for target, v in imported.graph.effects:
        env[target.out].copy_(env[v])
    return outputs


def laid_out(a: Any, x: Any, sizes: dict[str, Any]) -> Any:
    """The output in the layout that its type asks for, as a compiled graph would give it."""
    if not isinstance(a, Value):
        return x
    want = [evaluate(d, sizes) for d in a.type.strides]
    if list(x.stride()) == want:
        return x
    return torch.empty_strided(x.shape, want, dtype=x.dtype).copy_(x)
