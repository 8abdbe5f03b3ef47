"""Runs a graph node by node with the operators' plain torch references: the oracle of all tests.

>>> import torch
>>> from tessel.ir.node import Graph, Node, Op, make_input
>>> from tessel.ir.types import TensorType, symbol
>>> x = make_input("x", TensorType((symbol("s0"), 2), torch.float32))
>>> double = Op("double", "pointwise", "", lambda x: x + x)
>>> y = Node(double, (x.out,), {}, (x.type,))
>>> interpret(Graph((x,), (y,), (y.out, symbol("s0") * 2)), [torch.ones(3, 2)])[1]
6
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from ..errors import TesselError, check
from .exprs import evaluate, evaluate_size, expr_text
from .lexer import quote
from .node import Graph, Node, Value
from .text import describe, dtype_text, type_text, value_names
from .types import SymType, Type
from .verify import bound_symbols


def interpret(
    graph: Graph,
    inputs: Sequence[Any],
    *,
    precise: bool = False,
    symbols: Mapping[str, int] | None = None,
) -> list[Any]:
    """The graph's outputs, then the new contents of each overwritten input in the order of ``graph.effects``.

    The inputs themselves are never written to. Every result's shape and dtype is compared with
    its type, so a wrong type rule fails here too.

    Args:
        inputs: one tensor a tensor input (int a host integer), in the order of ``graph.inputs``.
        precise: compute every float in float64 (complex in complex128): inputs and dtype attributes
            are widened and casts between floats round nothing, which makes the mathematical oracle.
        symbols: values of symbols that no input's shape tells.

    Raises:
        TesselError: an input does not fit its type, a symbol has no value, an operator's reference
            raised, or its result is not of the node's type. The message has the node's text and location.
    """
    return _Run(graph, dict(symbols or {}), precise).run(list(inputs))


def bind_symbols(
    graph: Graph, inputs: Sequence[Any], symbols: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The values of the symbols in the inputs' types, found from actual inputs.

    Sizes that are expressions are solved where they are linear in one unknown symbol; strides
    tell symbols that no size does.

    Raises:
        TesselError: sizes contradict one another or the type, or a size has no solution.
    """
    values = dict(symbols or {})
    sizes: list[tuple[Any, int, str]] = []
    strides: list[tuple[Any, int, str]] = []
    for node, x in zip(graph.inputs, inputs, strict=True):
        name = f"input {quote(node.attrs['name'])}"
        t = node.types[0]
        if isinstance(t, SymType):
            sizes.append((t.expr, x, name))
            continue
        sizes += [(d, n, f"{name}, dim {i}") for i, (d, n) in enumerate(zip(t.shape, x.shape, strict=True))]
        strides += [
            (d, n, f"{name}, stride {i}")
            for i, (d, n) in enumerate(zip(t.strides, x.stride(), strict=True))
            if isinstance(d, sympy.Symbol) and x.shape[i] > 1
        ]
    _solve(sizes, values)
    # A stride only ever tells a symbol that is still unknown: layouts are not checked here.
    _solve([s for s in strides if s[0].name not in values], values)
    return values


def _solve(equations: list[tuple[Any, int, str]], values: dict[str, int]) -> None:
    """Give symbols values, easiest equations first; equations with several unknowns are left."""
    todo = equations
    while todo:
        rest = []
        for expr, have, where in todo:
            unknown = (
                [s for s in expr.free_symbols if s.name not in values]
                if isinstance(expr, sympy.Basic)
                else []
            )
            if not unknown:
                want = evaluate(expr, values)
                check(want == have, lambda e=expr, w=want, h=have, at=where: _clash(at, e, w, h))  # type: ignore[misc]
            elif len(unknown) == 1 and (got := _solve_one(expr, unknown[0], have, values)) is not None:
                check(
                    evaluate(expr, {**values, unknown[0].name: got}) == have,
                    lambda e=expr, h=have, at=where: (
                        f"{at}: no whole number makes {expr_text(e)} equal to {h}"
                    ),  # type: ignore[misc]
                )
                values[unknown[0].name] = got
            else:
                rest.append((expr, have, where))
        if len(rest) == len(todo):
            return
        todo = rest


def _clash(where: str, expr: Any, want: Any, have: int) -> str:
    said = f"{expr_text(expr)} = {want}" if isinstance(expr, sympy.Basic) else f"{want}"
    return f"{where}: expected size {said}, got {have}"


def _solve_one(expr: Any, unknown: sympy.Symbol, have: int, values: Mapping[str, int]) -> int | None:
    """The unknown of ``expr == have`` if the expression is linear in it."""
    if expr is unknown:
        return int(have)
    rest = expr.xreplace({s: sympy.Integer(values[s.name]) for s in expr.free_symbols if s != unknown})
    if not rest.is_polynomial(unknown) or sympy.degree(rest, unknown) != 1:
        return None
    slope = rest.coeff(unknown, 1)
    return int((have - rest.coeff(unknown, 0)) // slope)


def widened(dtype: torch.dtype) -> torch.dtype:
    """float64 for floats, complex128 for complex, others as they are."""
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


class _Run:
    """One run of a graph (a region is a run of its own)."""

    def __init__(self, graph: Graph, values: dict[str, int], precise: bool) -> None:
        self.graph = graph
        self.values = values
        self.precise = precise
        self.env: dict[Value, Any] = {}
        self.names: dict[Value, str] | None = None

    def text(self, node: Node) -> str:
        if self.names is None:
            self.names = value_names(self.graph)
        return describe(node, self.names)

    def run(self, inputs: list[Any]) -> list[Any]:
        graph = self.graph
        check(
            len(inputs) == len(graph.inputs),
            lambda: f"graph {quote(graph.name)} takes {len(graph.inputs)} inputs, got {len(inputs)}",
        )
        for node, x in zip(graph.inputs, inputs, strict=True):
            self.check_input(node, x)
        self.values.update(bind_symbols(graph, inputs, self.values))
        for node, x in zip(graph.inputs, inputs, strict=True):
            wide = self.precise and isinstance(x, torch.Tensor)
            self.env[node.out] = x.to(widened(x.dtype)) if wide else x
        last = self.last_uses()
        where = next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
        # tensors made from nothing belong where the inputs are
        with where if where.type != "cpu" else contextlib.nullcontext():
            for node in graph.nodes:
                self.node(node)
                for v in last.get(node, ()):
                    self.env.pop(v, None)
        return [self.arg(o) for o in graph.outputs] + [self.env[v] for _, v in graph.effects]

    def check_input(self, node: Node, x: Any) -> None:
        t, name = node.types[0], quote(node.attrs["name"])
        if isinstance(t, SymType):
            check(isinstance(x, int), lambda: f"input {name} is a host integer, got {type(x).__name__}")
            return
        check(isinstance(x, torch.Tensor), lambda: f"input {name} is a tensor, got {type(x).__name__}")
        fits = x.dtype == t.dtype or (self.precise and widened(x.dtype) == widened(t.dtype))
        check(
            x.dim() == t.rank and fits,
            lambda: f"input {name} is {type_text(t)}, got {dtype_text(x.dtype)}{list(x.shape)}",
        )

    def last_uses(self) -> dict[Node, list[Value]]:
        """The values to free after each node."""
        kept = set(self.graph.results())
        reader: dict[Value, Node] = {}
        for node in self.graph.nodes:
            reader.update(dict.fromkeys((*node.outs, *node.operands), node))
        found: dict[Node, list[Value]] = {}
        for v, node in reader.items():
            if v not in kept:
                found.setdefault(node, []).append(v)
        return found

    def arg(self, x: Any) -> Any:
        """An argument with values and symbols replaced by what they stand for."""
        if isinstance(x, Value):
            return self.env[x]
        if isinstance(x, tuple):
            return tuple(self.arg(a) for a in x)
        if isinstance(x, sympy.Basic):
            return evaluate(x, self.values)
        if self.precise and isinstance(x, torch.dtype):
            return widened(x)
        return x

    def node(self, node: Node) -> None:
        late = [v for v in node.operands if v not in self.env]
        check(
            not late, lambda: f"{self.text(node)}: reads a value of {late[0].op.name} before it is computed"
        )
        try:
            got = self.call(node)
        except TesselError as e:
            raise TesselError(f"{self.text(node)}: {e}") from e
        except Exception as e:
            # whatever torch raises; its own message and traceback stay attached
            raise TesselError(f"{self.text(node)}: the reference raised {type(e).__name__}: {e}") from e
        if not isinstance(got, tuple | list):
            got = (got,)
        check(
            len(got) == len(node.types),
            lambda: f"{self.text(node)}: the reference gave {len(got)} results for {len(node.types)}",
        )
        self.bind(node, got)
        for v, t, x in zip(node.outs, node.types, got, strict=True):
            self.check_result(node, t, x)
            self.env[v] = x

    def call(self, node: Node) -> Any:
        args = tuple(self.arg(a) for a in node.args)
        if node.op.kind == "kernel":
            check(len(node.regions) == 1, lambda: f"a kernel has one region, this has {len(node.regions)}")
            return _Run(node.regions[0], dict(self.values), self.precise).run(list(args))
        attrs = {k: self.arg(v) for k, v in node.attrs.items()}
        if node.regions:
            attrs["regions"] = tuple(map(self.region, node.regions))
        return node.op.ref(*args, **attrs)

    def region(self, graph: Graph) -> Callable[..., list[Any]]:
        """A region as a function, for operators that call theirs (scans)."""
        return lambda *args: _Run(graph, dict(self.values), self.precise).run(list(args))

    def bind(self, node: Node, got: Sequence[Any]) -> None:
        """Give the symbols that this node binds their values, from its results."""
        names = bound_symbols(node)
        if not names:
            return
        equations: list[tuple[Any, int, str]] = []
        for t, x in zip(node.types, got, strict=True):
            if isinstance(t, SymType):
                equations.append((t.expr, x, "its result"))
            elif isinstance(x, torch.Tensor) and x.dim() == t.rank:
                equations += [
                    (d, n, f"dim {i}") for i, (d, n) in enumerate(zip(t.shape, x.shape, strict=True))
                ]
        try:
            _solve(equations, self.values)
        except TesselError as e:
            raise TesselError(f"{self.text(node)}: {e}") from e
        if not node.types and got:
            self.values.update(dict(zip(names, got, strict=False)))
        missing = [n for n in names if n not in self.values]
        check(not missing, lambda: f"{self.text(node)}: its results tell no value for {', '.join(missing)}")

    def check_result(self, node: Node, t: Type, x: Any) -> None:
        if isinstance(t, SymType):
            return
        check(
            isinstance(x, torch.Tensor), lambda: f"{self.text(node)}: the reference gave {type(x).__name__}"
        )
        try:
            shape = tuple(evaluate_size(d, self.values) for d in t.shape)
        except TesselError as e:
            raise TesselError(f"{self.text(node)}: {e}") from e
        dtype = widened(t.dtype) if self.precise else t.dtype
        check(
            tuple(x.shape) == shape and x.dtype == dtype,
            lambda: (
                f"{self.text(node)}: the reference gave {dtype_text(x.dtype)}{list(x.shape)}, "
                f"the type says {dtype_text(dtype)}{list(shape)}"
            ),
        )


__all__ = ["bind_symbols", "interpret", "widened"]
