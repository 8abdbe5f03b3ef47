"""The text form of graphs. ``parse_graph(print_graph(g))`` prints as the same text again.

    graph "forward"
      %0: f32[s0,64] = input "x"
      %1: f32[64,64] = param "layers.0.weight"
      %2: f32[s0,64] = matmul(%0, %1)  @ "model.py":12 "layers.0"
      %3: f32[s0,64] = kernel(%2, name="k0", family="pointwise")
        graph "k0"
          %0: f32[s0,64] = input "a"
          %1: f32[s0,64] = gelu(%0, approximate="tanh")
          return %1
      effect %0 := %3
      return %3, s0, None

- A value is named by its place: inputs first, then every result in order, from ``%0`` in each graph.
- A type is ``dtype[sizes]``, then ``<strides>`` unless row-major, then ``@device`` unless the
  graph's own. ``sym[s0]`` is a host integer.
- Arguments are values, numbers, strings, ``None``, dtypes, size expressions and tuples of these;
  attributes follow as ``name=``. See ``tessel/ir/exprs.py`` for expressions.
- ``@ "file":line "module"`` is where the node comes from. Regions follow their node, indented.
  ``#`` starts a comment. Indentation is for people: each graph ends at its ``return``.
- A result's type may be left out by hand (``%2 = exp(%0)``): it is then inferred.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from ..errors import TesselError, check
from .exprs import expr_text
from .lexer import quote
from .node import Graph, Node, Value
from .parse import parse_graph
from .types import DTYPE_NAMES, NOWHERE, Loc, SymType, Type, contiguous_strides

_DEVICE = re.compile(r"[a-z]+(:\d+)?$")


def value_names(graph: Graph) -> dict[Value, str]:
    """The name in text (``%5``) of every value of a graph."""
    names: dict[Value, str] = {}
    for node in (*graph.inputs, *graph.nodes):
        for v in node.outs:
            names[v] = f"%{len(names)}"
    return names


def dtype_text(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype) or str(dtype)


def type_text(t: Type) -> str:
    """``f32[s0,64]<1,s0>@cpu``; strides are left out where row-major."""
    if isinstance(t, SymType):
        return f"sym[{expr_text(t.expr)}]"
    shape = [expr_text(d) for d in t.shape]
    text = f"{dtype_text(t.dtype)}[{','.join(shape)}]"
    if t.strides != contiguous_strides(t.shape):
        strides = [expr_text(d) for d in t.strides]
        if strides != [expr_text(d) for d in contiguous_strides(t.shape)]:
            text += f"<{','.join(strides)}>"
    if t.device is not None:
        text += f"@{t.device if _DEVICE.match(t.device) else quote(t.device)}"
    return text


def arg_text(x: Any, names: Mapping[Value, str]) -> str:
    """The text of an argument or attribute. Raises ``TesselError`` for things that text has no form for."""
    if isinstance(x, Value):
        return names.get(x, "%?")
    if isinstance(x, tuple):
        inner = ", ".join(arg_text(a, names) for a in x)
        return f"({inner},)" if len(x) == 1 else f"({inner})"
    if isinstance(x, str):
        return quote(x)
    if x is None or isinstance(x, bool):
        return str(x)
    if isinstance(x, int | float):
        return repr(x)
    if isinstance(x, sympy.Basic):
        return expr_text(x)
    if isinstance(x, complex):
        return f"complex({x.real!r}, {x.imag!r})"
    if isinstance(x, torch.dtype):
        return dtype_text(x)
    if isinstance(x, torch.layout | torch.memory_format):
        return str(x)
    if isinstance(x, torch.device):
        return f"torch.device({quote(str(x))})"
    kind = type(x).__name__
    raise TesselError(f"a value of type {kind} has no text form: {x!r}; give a number, text or tuple")


def _attr_texts(attrs: Mapping[str, Any], names: Mapping[Value, str]) -> list[str]:
    for key in attrs:
        check(key.isidentifier(), lambda key=key: f"an attribute named {key!r} has no text form")  # type: ignore[misc]
    return [f"{k}={arg_text(v, names)}" for k, v in attrs.items()]


def loc_text(loc: Loc) -> str:
    """``  @ "model.py":12 "layers.0"``, empty for no location."""
    if loc == NOWHERE:
        return ""
    file = f"{quote(loc.file)}:{loc.line}" if loc.file or loc.line else ""
    return "  @ " + " ".join(p for p in (file, quote(loc.module) if loc.module else "") if p)


def node_text(node: Node, names: Mapping[Value, str]) -> str:
    """The node's line, without its regions; a value that ``names`` lacks is ``%?``."""
    attrs = dict(node.attrs)
    if node.op.kind == "input":
        call = f"{attrs.pop('role')} {quote(attrs.pop('name'))}"
        if attrs:
            call += f"({', '.join(_attr_texts(attrs, names))})"
    else:
        parts = [arg_text(a, names) for a in node.args]
        parts += _attr_texts(attrs, names)
        call = f"{node.op.name}({', '.join(parts)})"
    results = ", ".join(f"{names.get(v, '%?')}: {type_text(node.types[v.index])}" for v in node.outs)
    return f"{results} = {call}{loc_text(node.loc)}" if results else call + loc_text(node.loc)


def describe(node: Node, names: Mapping[Value, str]) -> str:
    """The node's line for messages: what has no text form does not get in the way."""
    try:
        return node_text(node, names)
    except TesselError:
        return f"{', '.join(names.get(v, '%?') for v in node.outs)} = {node.op.name}(...){loc_text(node.loc)}"


def print_graph(graph: Graph) -> str:
    """The graph as text, ending in a newline.

    Raises:
        TesselError: an attribute or a symbol's name has no text form.
    """
    lines: list[str] = []
    _print(graph, "", lines)
    return "\n".join(lines) + "\n"


def _print(graph: Graph, indent: str, lines: list[str]) -> None:
    names = value_names(graph)
    lines.append(f"{indent}graph {quote(graph.name)}")
    indent += "  "
    for node in (*graph.inputs, *graph.nodes):
        lines.append(indent + node_text(node, names))
        for region in node.regions:
            _print(region, indent + "  ", lines)
    for target, v in graph.effects:
        lines.append(f"{indent}effect {names.get(target.out, '%?')} := {arg_text(v, names)}")
    outputs = ", ".join(arg_text(v, names) for v in graph.outputs)
    lines.append(f"{indent}return {outputs}".rstrip())


__all__ = [
    "arg_text",
    "describe",
    "dtype_text",
    "loc_text",
    "node_text",
    "parse_graph",
    "print_graph",
    "type_text",
    "value_names",
]
