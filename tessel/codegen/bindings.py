"""Where the sizes of a graph come from: its symbols as expressions over its inputs."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ..errors import check
from ..ir.node import Graph, Value
from ..ir.types import Dim, SymType, TensorType, symbols_of

__all__ = ["bindings"]


def bindings(graph: Graph, names: Mapping[Value, str]) -> list[tuple[str, str]]:
    """How each size symbol of the graph is read from the inputs: ``[("s0", "a1.size(0)"), ...]``.

    Raises:
        TesselError: a symbol stands in no input in a form that can be solved for it.
    """
    wanted = _symbols(graph)
    found: dict[str, str] = {}
    places: list[tuple[Dim, str]] = []
    for node in graph.inputs:
        t, name = node.types[0], names[node.out]
        if isinstance(t, SymType):
            places.append((t.expr, name))
    for node in graph.inputs:
        t, name = node.types[0], names[node.out]
        if isinstance(t, TensorType):
            places += [(d, f"{name}.size({i})") for i, d in enumerate(t.shape)]
    for node in graph.inputs:
        t, name = node.types[0], names[node.out]
        if isinstance(t, TensorType):
            places += [(d, f"{name}.stride({i})") for i, d in enumerate(t.strides)]
    for d, text in places:
        if isinstance(d, sympy.Symbol) and d.name in wanted:
            found.setdefault(d.name, text)
    for d, text in places:  # 2*s0 + 1 = n
        if isinstance(d, sympy.Basic) and len(d.free_symbols) == 1:
            (s,) = d.free_symbols
            slope = d.coeff(s)
            if s.name in wanted and s.name not in found and slope.is_Integer and slope > 0:
                rest = sympy.expand(d - slope * s)
                if rest.is_Integer:
                    found[s.name] = f"({text} - {int(rest)}) // {int(slope)}"
    missing = sorted(wanted - found.keys())
    check(
        not missing,
        lambda: (
            f"graph {graph.name}: the sizes {', '.join(missing)} are used, but no input tells them; "
            "pass them as arguments of the graph"
        ),
    )
    return sorted(found.items())


def _symbols(graph: Graph) -> set[str]:
    used: set[str] = set()
    born: set[str] = set()
    known: set[str] = set()
    for node in graph.inputs:
        known |= node.symbols()
    for node in (*graph.inputs, *graph.nodes):
        used |= node.symbols()
        if "symbol" in node.attrs and node.op.kind != "input":
            born.add(str(node.attrs["symbol"]))
            born |= (
                symbols_of(
                    d for t in node.types if isinstance(t, TensorType) for d in t.shape if isinstance(d, sympy.Symbol)
                )
                - known
            )
    used |= symbols_of(graph.outputs)
    return used - born
