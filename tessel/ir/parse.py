"""Reads the text form of graphs (described in ``tessel/ir/text.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import TesselError, nearest
from .lexer import Line, Token
from .node import INPUT, Graph, Node, Op, Value, freeze, map_values
from .reader import Reader
from .types import Type


@dataclass
class _Scope:
    """A graph being read."""

    name: str
    line: Line
    values: dict[str, Value] = field(default_factory=dict)
    inputs: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    effects: list[tuple[Node, Value]] = field(default_factory=list)
    # The node whose regions may still follow: its fields, the names of its results.
    pending: tuple[dict[str, Any], list[str]] | None = None
    regions: list[Graph] = field(default_factory=list)

    def flush(self) -> None:
        """Make the pending node, now that its regions are known."""
        if self.pending is None:
            return
        fields, names = self.pending
        node = Node(**fields, regions=tuple(self.regions))
        (self.inputs if node.op is INPUT else self.nodes).append(node)
        self.values.update(zip(names, node.outs, strict=True))
        self.pending, self.regions = None, []


def parse_graph(text: str, ops: Mapping[str, Op]) -> Graph:
    """The graph that a text describes.

    Args:
        text: what ``print_graph`` wrote, or the same by hand.
        ops: the operators that the text may name.

    Raises:
        TesselError: the text is wrong; the message has the line, the column and the line's text.
    """
    stack: list[_Scope] = []
    done: Graph | None = None
    for number, raw in enumerate(text.split("\n"), 1):
        line = Line(number, raw.rstrip("\r"))
        reader = Reader(line, stack[-1].values if stack else {})
        if reader.next.kind == "end":
            continue
        if done is not None:
            raise reader.error("text after the end of the graph")
        head = reader.next.text
        if head == "graph" and reader.tokens[1].kind == "string":
            reader.take()
            if stack and stack[-1].pending is None:
                raise reader.error("a region needs the node it belongs to on the line above")
            stack.append(_Scope(reader.string(), line))
        elif not stack:
            raise reader.error("expected 'graph \"name\"' first")
        elif head == "return":
            stack[-1].flush()
            reader.take()
            graph = _finish(stack.pop(), reader)
            if stack:
                stack[-1].regions.append(graph)
            else:
                done = graph
        else:
            stack[-1].flush()
            _statement(stack[-1], reader, ops)
        reader.end()
    if stack:
        raise stack[-1].line.error(1, "this graph has no 'return' line")
    if done is None:
        raise Line(1, text.split("\n")[0]).error(1, "no graph in the text")
    return done


def _finish(scope: _Scope, reader: Reader) -> Graph:
    outputs: list[Any] = []
    while reader.next.kind != "end":
        outputs.append(reader.arg())
        if not reader.skip(","):
            break
    return Graph(tuple(scope.inputs), tuple(scope.nodes), tuple(outputs), tuple(scope.effects), scope.name)


def _statement(scope: _Scope, reader: Reader, ops: Mapping[str, Op]) -> None:
    """A node or effect line."""
    if reader.next.text == "effect" and reader.tokens[1].text == "%":
        reader.take()
        token = reader.next
        target = reader.value().node
        if target.op is not INPUT:
            raise reader.error("an effect overwrites an input, and this is none", token)
        reader.expect(":=")
        scope.effects.append((target, reader.value()))
        return
    names: list[str] = []
    types: list[Type | None] = []
    while reader.sees("%"):
        token = reader.next
        names.append(reader.value_name())
        if names[-1] in scope.values or names[-1] in names[:-1]:
            raise reader.error(f"%{names[-1]} is defined twice", token)
        types.append(reader.type() if reader.skip(":") else None)
        if not reader.skip(","):
            reader.expect("=")
            break
    token = reader.next
    name = reader.word("an operator")
    attrs: dict[str, Any] = {}
    if reader.next.kind == "string" and names:
        attrs = {"name": reader.string(), "role": name}
        if reader.skip("("):
            attrs.update(reader.attrs(positional=False)[1])
        op, args = INPUT, ()
        if len(names) != 1 or types[0] is None:
            raise reader.error("an input has one result, with a type", token)
    else:
        if name not in ops:
            # the whole table would drown the line that is shown
            close = nearest(name, ops)
            hint = f"; did you mean {close!r}?" if close else ""
            raise reader.error(f"unknown operator {name!r}{hint}", token)
        op = ops[name]
        reader.expect("(")
        args, attrs = reader.attrs(positional=True)
    loc = reader.loc()
    fields = {"op": op, "args": args, "attrs": attrs, "types": tuple(types), "loc": loc}
    if None in types:
        fields["types"] = _inferred(reader, token, op, args, attrs, types)
    scope.pending = (fields, names)


def _inferred(
    reader: Reader, token: Token, op: Op, args: Any, attrs: dict[str, Any], given: list[Type | None]
) -> tuple[Type, ...]:
    if op.infer is None:
        raise reader.error(f"{op.name} cannot infer types: write them", token)
    frozen = {k: freeze(v) for k, v in attrs.items()}
    try:
        got = op.infer(*map_values(args, lambda v: v.node.types[v.index]), **frozen)
    except (TesselError, TypeError) as e:
        raise reader.error(str(e), token) from e
    if len(got) != len(given):
        raise reader.error(f"{op.name} has {len(got)} results, {len(given)} are named", token)
    return tuple(want or have for want, have in zip(given, got, strict=True))
