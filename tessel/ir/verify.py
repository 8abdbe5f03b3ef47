"""Checks that a graph is well formed, and says everything that is wrong with it at once.

>>> import torch
>>> from tessel.ir.node import Graph, Node, Op, make_input
>>> from tessel.ir.types import TensorType
>>> x = make_input("x", TensorType((2,), torch.float32))
>>> exp = Op("exp", "pointwise", "", torch.exp, infer=lambda x: (x,))
>>> bad = Node(exp, (x.out,), {}, (TensorType((3,), torch.float32),))
>>> verify(Graph((x,), (bad,), (bad.out,)))
Traceback (most recent call last):
    ...
tessel.errors.TesselError: graph "graph" is not well formed, 1 problem:
  %1: f32[3] = exp(%0)
    result 0 is f32[3], but exp gives f32[2] here
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy

from ..errors import TesselError
from .lexer import quote
from .node import INPUT, Arg, Graph, Node, Op, Value, map_values, values_in
from .text import arg_text, describe, dtype_text, type_text, value_names
from .types import SymType, TensorType, Type, dim_equal, symbols_of

# What a wrong table entry or wrong arguments make a type rule raise.
_RULE_ERRORS = (TesselError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


def verify(graph: Graph, ops: Mapping[str, Op] | None = None) -> None:
    """Raise one ``TesselError`` listing every problem of the graph, each with its node's text and location.

    Args:
        ops: if given, every node's operator must be the one of that name in this table.
    """
    found = problems(graph, ops)
    if found:
        count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise TesselError(f"graph {quote(graph.name)} is not well formed, {count}:\n" + "\n".join(found))


def problems(graph: Graph, ops: Mapping[str, Op] | None = None) -> list[str]:
    """What ``verify`` would say: two lines a problem, the node and what is wrong with it."""
    return _Check(graph, ops, set(), "", None).run()


def bound_symbols(node: Node) -> tuple[str, ...]:
    """Names of the unbacked symbols that a node gives a value to."""
    names = node.attrs.get("symbol") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def type_symbols(types: Iterable[Type]) -> set[str]:
    """Names of the symbols in types."""
    return symbols_of(
        d for t in types for d in ((*t.shape, *t.strides) if isinstance(t, TensorType) else (t.expr,))
    )


def same_type(a: Type, b: Type) -> bool:
    """The same but for strides, which may differ, and for a device that is not said."""
    if isinstance(a, SymType) or isinstance(b, SymType):
        return isinstance(a, SymType) and isinstance(b, SymType) and dim_equal(a.expr, b.expr)
    same_device = a.device == b.device or a.device is None or b.device is None
    return (
        a.dtype == b.dtype
        and same_device
        and a.rank == b.rank
        and (a.shape == b.shape or all(map(dim_equal, a.shape, b.shape)))
    )


def _expressions(args: Iterable[Arg]) -> Iterable[Any]:
    stack = list(args)
    while stack:
        x = stack.pop()
        if isinstance(x, tuple):
            stack.extend(x)
        elif isinstance(x, sympy.Basic):
            yield x


class _Check:
    """One graph being checked; ``owner`` is the node whose region it is."""

    def __init__(
        self, graph: Graph, ops: Mapping[str, Op] | None, symbols: set[str], indent: str, owner: Node | None
    ) -> None:
        self.graph = graph
        self.ops = ops
        self.symbols = set(symbols)  # those with a value so far
        self.indent = indent
        self.owner = owner
        self.names = value_names(graph)
        self.seen: set[int] = set()
        self.found: list[str] = []

    def say(self, where: str, message: str) -> None:
        self.found.append(f"{self.indent}  {where}\n{self.indent}    {message}")

    def run(self) -> list[str]:
        self.inputs()
        for node in self.graph.nodes:
            self.node(node)
        self.effects()
        self.results(
            "return " + ", ".join(arg_text(o, self.names) for o in self.graph.outputs), self.graph.outputs
        )
        return self.found

    # ------------------------------------------------------------ inputs

    def inputs(self) -> None:
        taken: set[str] = set()
        for node in self.graph.inputs:
            text = describe(node, self.names)
            if node.op is not INPUT:
                self.say(text, "is listed as an input but is none; make it with make_input")
                continue
            if id(node) in self.seen:
                self.say(text, "is listed twice as an input")
            if node.attrs["name"] in taken:
                self.say(text, f"another input is named {quote(node.attrs['name'])} too")
            taken.add(node.attrs["name"])
            self.seen.add(id(node))
        given = type_symbols(t for node in self.graph.inputs for t in node.types)
        if self.owner is None:
            self.symbols |= given
        elif given - self.symbols:
            where = f"region {quote(self.graph.name)}"
            self.say(where, f"{_list(given - self.symbols)}: no value is known outside the region")

    # ------------------------------------------------------------ nodes

    def node(self, node: Node) -> None:
        found: list[str] = []
        if id(node) in self.seen:
            found.append("is listed twice")
        found += self.operands(node)
        found += self.operator(node)
        found += self.bindings(node)
        self.seen.add(id(node))
        if found:
            text = describe(node, self.names)
            for message in found:
                self.say(text, message)
        for region in node.regions:
            self.region(node, region)

    def operands(self, node: Node) -> list[str]:
        found = []
        for v in dict.fromkeys(node.operands):
            if not 0 <= v.index < len(v.node.types):
                found.append(f"reads result {v.index} of {v.op.name}, which has {len(v.node.types)}")
            elif id(v.node) not in self.seen:
                place = self.names.get(v)
                found.append(
                    f"reads {place}, which is defined below it"
                    if place
                    else f"reads a value of {v.op.name} that is not in this graph"
                )
        return found

    def operator(self, node: Node) -> list[str]:
        op = node.op
        if op.kind == "input":
            return ["an input stands among the nodes; list it in Graph.inputs"]
        found = []
        if self.ops is not None and self.ops.get(op.name) is not op:
            known = "another one" if op.name in self.ops else "none"
            found.append(f"operator {op.name}: the table of operators has {known} of that name")
        if self.owner is not None and (op.random or op.kind == "effect"):
            found.append("random draws and effects keep their order, so they cannot stand in a region")
        for key, value in node.attrs.items():
            try:
                arg_text(value, self.names)
            except TesselError as e:
                found.append(f"attribute {key}: {e}")
        return found + self.types(node)

    def types(self, node: Node) -> list[str]:
        op = node.op
        if any(not 0 <= v.index < len(v.node.types) for v in node.operands):
            return []  # said already
        if op.infer is not None:
            try:
                want = op.infer(*map_values(node.args, lambda v: v.node.types[v.index]), **node.attrs)
            except _RULE_ERRORS as e:
                return [str(e) if isinstance(e, TesselError) else f"{op.name} refuses it: {e!r}"]
            if len(want) != len(node.types):
                return [f"has {len(node.types)} results, but {op.name} gives {len(want)}"]
            return [
                f"result {i} is {type_text(have)}, but {op.name} gives {type_text(w)} here"
                for i, (have, w) in enumerate(zip(node.types, want, strict=True))
                if not same_type(have, w)
            ]
        if op.kind == "pointwise":
            tensors = [v.type for v in node.operands if isinstance(v.type, TensorType)]
            if len({t.dtype for t in tensors}) > 1:
                return [f"operands are {_list(dtype_text(t.dtype) for t in tensors)}; cast them to one dtype"]
        return []

    def bindings(self, node: Node) -> list[str]:
        found = []
        missing = symbols_of(_expressions((*node.args, *node.attrs.values()))) - self.symbols
        if missing:
            found.append(f"{_list(missing)} used before anything gives a value")
        for name in bound_symbols(node):
            if name in self.symbols:
                found.append(f"symbol {name} has a value already")
            self.symbols.add(name)
        missing = type_symbols(node.types) - self.symbols - missing
        if missing:
            found.append(f"{_list(missing)} in the result's type, but nothing gives a value")
        return found

    def region(self, node: Node, region: Graph) -> None:
        def say(message: str) -> None:
            self.say(describe(node, self.names), f"region {quote(region.name)}: {message}")

        if len(region.inputs) != len(node.args):
            say(f"{len(region.inputs)} inputs for {len(node.args)} arguments")
        for i, (inner, arg) in enumerate(zip(region.inputs, node.args, strict=False)):
            given = arg.node.types[arg.index] if isinstance(arg, Value) else None
            if given is None and not isinstance(inner.types[0], SymType):
                say(f"input {i} is {type_text(inner.types[0])}, the argument is {arg_text(arg, self.names)}")
            elif given is not None and not same_type(inner.types[0], given):
                say(f"input {i} is {type_text(inner.types[0])}, the argument is {type_text(given)}")
        if region.effects:
            say("a region cannot have effects; return the value and write the effect outside")
        if node.op.kind == "kernel":
            got = [v.node.types[v.index] if isinstance(v, Value) else None for v in region.outputs]
            if len(got) != len(node.types):
                say(f"returns {len(got)} values for {len(node.types)} results")
            for i, (have, want) in enumerate(zip(got, node.types, strict=False)):
                if have is None or not same_type(have, want):
                    say(f"result {i} is {type_text(want)}, the region returns {have and type_text(have)}")
        self.found += _Check(region, self.ops, self.symbols, self.indent + "  ", node).run()

    # ------------------------------------------------------------ what leaves

    def effects(self) -> None:
        inputs = {id(i) for i in self.graph.inputs}
        written: set[int] = set()
        for target, v in self.graph.effects:
            text = f"effect {self.names.get(target.out, '%?')} := {arg_text(v, self.names)}"
            if id(target) not in inputs:
                self.say(text, "overwrites something that is no input of this graph")
            if id(target) in written:
                self.say(text, "this input is overwritten twice; keep the last effect")
            written.add(id(target))
            before = len(self.found)
            self.results(text, (v,))
            if len(self.found) == before and not same_type(target.types[0], v.node.types[v.index]):
                types = [type_text(t) for t in (target.types[0], v.node.types[v.index])]
                self.say(text, f"the input is {types[0]}, the value {types[1]}")

    def results(self, text: str, outputs: Sequence[Arg]) -> None:
        for v in values_in(tuple(outputs)):
            if id(v.node) not in self.seen or not 0 <= v.index < len(v.node.types):
                self.say(
                    text, f"{self.names.get(v) or f'a value of {v.op.name}'} is not computed in this graph"
                )
        missing = symbols_of(_expressions(outputs)) - self.symbols
        if missing:
            self.say(text, f"{_list(missing)}: nothing gives a value")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


__all__ = ["bound_symbols", "problems", "same_type", "type_symbols", "verify"]
