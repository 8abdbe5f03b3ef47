"""Nodes, values and graphs of the tensor IR.

A ``Node`` applies an ``Op`` to values and literals. It is frozen and compared by
identity. A ``Value`` is one result of a node. A ``Graph`` is an ordered tuple of
nodes; changing a graph means building a new one (``Graph.rewrite``).

Effects are written down: ``Graph.effects`` says which input is overwritten by
which value after all nodes have run (``input.copy_(value)``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import sympy

from ..errors import TesselError, check
from .nested import leaves
from .types import NOWHERE, Loc, SymType, TensorType, Type, symbols_of


@dataclass(frozen=True, eq=False)
class Op:
    """All that the compiler knows of one operator, in one entry.

    Attributes:
        name: unique, lower case; the name in IR text.
        kind: decides how passes treat it, one of ``KINDS``.
        dims: the axes of operands and results, as a string (see ``tessel/ops/dims.py``)
            or a function from a node to that string where rank or attributes decide.
        ref: the plain torch reference, ``ref(*args, **attrs)`` with tensors for values;
            a tensor, or a tuple if the op has several results. It must accept float64.
        infer: result types from arguments (types for values) and attributes.
            ``None``: the importer's types are trusted (opaque calls).
        flops: floating-point operations of a node, ``None`` means none worth counting.
        code: for pointwise ops, one expression per language with ``{0}``, ``{1}`` for the
            operands, e.g. ``{"triton": "tl.exp({0})", "cpp": "exp({0})"}``.
        decompose: ``decompose(builder, node) -> tuple[Value, ...]`` in simpler ops, for composites.
        combine: how partial results of a split ``+`` axis are put together, by name.
        cost: relative cost per element: 1 for an add, 10 for an exp; above ``CHEAP`` it is
            never computed twice.
        split: ``split(node, factor, start, size) -> tessel.ops.dims.Piece``: what one piece of a
            split factor needs beside its share of the operands (an offset, a local shape, a
            window); ``None`` means nothing, for any factor.
        random: draws from the generator, so that order matters and nothing may be merged.
        doc: one line for people.
    """

    name: str
    kind: str
    dims: str | Callable[[Node], str]
    ref: Callable[..., Any]
    infer: Callable[..., tuple[TensorType, ...]] | None = None
    flops: Callable[[Node], Any] | None = None
    code: Mapping[str, str] = field(default_factory=dict)
    decompose: Callable[[Any, Node], tuple[Value, ...]] | None = None
    combine: str = "sum"
    cost: int = 1
    split: Callable[[Node, str, Any, Any], Any] | None = None
    random: bool = False
    doc: str = ""

    def __post_init__(self) -> None:
        check(self.kind in KINDS, lambda: f"op {self.name}: kind {self.kind!r} is none of {sorted(KINDS)}")

    def __repr__(self) -> str:
        return f"Op({self.name})"


KINDS = frozenset(
    {
        "input",  # a graph input; attrs: name, role
        "pointwise",  # one result element from the elements at the same place (broadcasting)
        "view",  # no arithmetic: the result is an index map of the one operand
        "index",  # like pointwise, but reads an operand at computed places (gather, cat, pad)
        "generate",  # no tensor operands: iota, full
        "reduce",  # folds axes away with a named combine
        "scan",  # a recurrence along one axis, every other axis apart
        "contract",  # matmul
        "attention",  # scaled dot-product attention
        "attention_backward",  # its gradients
        "composite",  # kept whole, opened by the decompose pass
        "library",  # a call to torch, opaque to code generation
        "kernel",  # a fused group; its region says what it computes
        "effect",  # asserts and scalar reads: kept in order
    }
)
CHEAP = 4


@dataclass(frozen=True, slots=True)
class Value:
    """The ``index``-th result of ``node``."""

    node: Node
    index: int = 0

    @property
    def type(self) -> TensorType:
        return self.node.types[self.index]  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.type.shape

    @property
    def dtype(self) -> Any:
        return self.type.dtype

    @property
    def op(self) -> Op:
        return self.node.op

    def __repr__(self) -> str:
        return f"Value({self.node.op.name}:{self.index} {self.node.types[self.index]})"


# An argument: a value, a literal, an expression over symbols, nothing, or a (nested) tuple of these.
Arg: TypeAlias = Any


def values_in(arg: Arg) -> Iterator[Value]:
    """The values inside an argument, left to right."""
    return leaves(arg, Value)


def map_values(arg: Arg, fn: Callable[[Value], Any]) -> Arg:
    """The argument with every value replaced by ``fn(value)``; lists become tuples."""
    if isinstance(arg, Value):
        return fn(arg)
    if isinstance(arg, tuple | list):
        return tuple(map_values(a, fn) for a in arg)
    return arg


def freeze(x: Any) -> Any:
    """Lists become tuples and dicts sorted tuples of pairs, so that attributes are values."""
    if isinstance(x, list | tuple):
        return tuple(freeze(v) for v in x)
    if isinstance(x, Mapping):
        return tuple(sorted((k, freeze(v)) for k, v in x.items()))
    return x


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One application of an operator. Compared by identity; never changed."""

    op: Op
    args: tuple[Arg, ...]
    attrs: Mapping[str, Any]
    types: tuple[Type, ...]
    regions: tuple[Graph, ...] = ()
    loc: Loc = NOWHERE

    def __post_init__(self) -> None:
        if not isinstance(self.attrs, MappingProxyType):
            object.__setattr__(self, "attrs", MappingProxyType({k: freeze(v) for k, v in self.attrs.items()}))

    @property
    def out(self) -> Value:
        """The first result."""
        return Value(self, 0)

    @property
    def outs(self) -> tuple[Value, ...]:
        return tuple(Value(self, i) for i in range(len(self.types)))

    @property
    def type(self) -> TensorType:
        return self.types[0]  # type: ignore[return-value]

    @property
    def operands(self) -> tuple[Value, ...]:
        """All values among the arguments, left to right (with repeats)."""
        return tuple(values_in(self.args))

    def replace(self, **changes: Any) -> Node:
        """A new node with some fields changed."""
        names = ("op", "args", "attrs", "types", "regions", "loc")
        return Node(**{n: changes.get(n, getattr(self, n)) for n in names})

    def symbols(self) -> set[str]:
        """Names of the symbols in its attributes, literals and types."""
        found: list[Any] = []
        stack: list[Any] = [*self.args, *self.attrs.values()]
        while stack:
            x = stack.pop()
            if isinstance(x, tuple):
                stack.extend(x)
            elif isinstance(x, sympy.Basic):
                found.append(x)
        for t in self.types:
            found.extend((*t.shape, *t.strides) if isinstance(t, TensorType) else (t.expr,))
        return symbols_of(found)

    def __repr__(self) -> str:
        return f"Node({self.op.name} -> {', '.join(map(str, self.types))})"


INPUT = Op("input", "input", dims="", ref=lambda **_: None, doc="a graph input")


def make_input(name: str, type: Type, role: str = "input", loc: Loc = NOWHERE) -> Node:
    """A graph input. ``role`` is ``input``, ``param``, ``buffer`` or ``constant``."""
    return Node(INPUT, (), {"name": name, "role": role}, (type,), (), loc)


@dataclass(frozen=True, eq=False)
class Graph:
    """Inputs, nodes in execution order, outputs and effects.

    Attributes:
        inputs: ``input`` nodes, in call order.
        nodes: all other nodes; every operand is an input or an earlier node.
        outputs: values, ``None`` or literals (ints and expressions), in return order.
        effects: pairs (input node, value): after the nodes have run the input's tensor is
            overwritten by the value.
        name: for messages.
    """

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Arg, ...]
    effects: tuple[tuple[Node, Value], ...] = ()
    name: str = "graph"

    def results(self) -> Iterator[Value]:
        """Every value that leaves the graph: outputs, then effects."""
        yield from values_in(self.outputs)
        for _, v in self.effects:
            yield v

    def uses(self) -> Counter[Value]:
        """How often each value is read, leaving the graph counted as one read each."""
        count: Counter[Value] = Counter()
        for node in self.nodes:
            count.update(node.operands)
        count.update(self.results())
        return count

    def users(self) -> dict[Value, list[Node]]:
        """The nodes that read each value (each node once)."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for v in dict.fromkeys(node.operands):
                found.setdefault(v, []).append(node)
        return found

    def replace(self, **changes: Any) -> Graph:
        names = ("inputs", "nodes", "outputs", "effects", "name")
        return Graph(**{n: changes.get(n, getattr(self, n)) for n in names})

    def rewrite(self, fn: Callable[[Builder, Node], Value | tuple[Value, ...] | None]) -> Graph:
        """Rebuild the graph in order.

        ``fn(builder, node)`` sees each node with its operands already rewritten. It returns
        the replacing value(s), having added nodes through ``builder``, or ``None`` to keep
        the node as it is.
        """
        builder = Builder(self.inputs)
        new: dict[Value, Value] = {v: v for i in self.inputs for v in i.outs}
        for old in self.nodes:
            args = map_values(old.args, new.__getitem__)
            node = old if args == old.args else old.replace(args=args)
            builder.loc = old.loc
            got = fn(builder, node)
            if got is None:
                builder.append(node)
                got = node.outs
            elif isinstance(got, Value):
                got = (got,)
            if len(got) != len(old.types):
                raise TesselError(f"a rule gave {len(got)} values for {old.op.name}, which has {len(old.types)}")
            new.update(zip(old.outs, got, strict=True))
        return builder.finish(
            map_values(self.outputs, new.__getitem__),
            tuple((i, new[v]) for i, v in self.effects),
            self.name,
        )

    def live(self) -> Graph:
        """Without the nodes that nothing needs. Effects and random draws are kept."""
        needed: set[int] = {id(v.node) for v in self.results()}
        kept: list[Node] = []
        binds = {n.attrs["symbol"]: n for n in self.nodes if "symbol" in n.attrs}
        for node in reversed(self.nodes):
            if id(node) in needed or node.op.kind == "effect" or node.op.random:
                kept.append(node)
                needed.update(id(v.node) for v in node.operands)
                needed.update(id(binds[s]) for s in node.symbols() if s in binds)
        return self.replace(nodes=tuple(reversed(kept)))

    def __str__(self) -> str:
        from .text import print_graph

        return print_graph(self)


class Builder:
    """Appends nodes in order and infers their types.

    >>> import torch
    >>> from tessel.ops import OPS
    >>> x = make_input("x", TensorType((2, 3), torch.float32))
    >>> b = Builder((x,))
    >>> y = b.add(OPS["exp"], x.out)
    >>> str(b.finish((y,)).nodes[0].type)
    'f32[2,3]'
    """

    def __init__(self, inputs: Iterable[Node] = (), loc: Loc = NOWHERE) -> None:
        self.inputs = list(inputs)
        self.nodes: list[Node] = []
        self.loc = loc

    def append(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def node(self, op: Op, *args: Arg, types: tuple[Type, ...] | None = None, **attrs: Any) -> Node:
        """Append ``op(*args, **attrs)``; types come from ``op.infer`` unless given."""
        if types is None:
            check(op.infer is not None, lambda: f"op {op.name} cannot infer its types: give them")
            assert op.infer is not None
            types = op.infer(*map_values(args, lambda v: v.type), **{k: freeze(v) for k, v in attrs.items()})
        return self.append(Node(op, args, attrs, types, (), self.loc))

    def add(self, op: Op, *args: Arg, **attrs: Any) -> Value:
        """Append a node and return its first result."""
        return self.node(op, *args, **attrs).out

    def finish(
        self, outputs: Iterable[Arg], effects: tuple[tuple[Node, Value], ...] = (), name: str = "graph"
    ) -> Graph:
        return Graph(tuple(self.inputs), tuple(self.nodes), tuple(outputs), effects, name)


__all__ = [
    "CHEAP",
    "INPUT",
    "KINDS",
    "Arg",
    "Builder",
    "Graph",
    "Node",
    "Op",
    "SymType",
    "Value",
    "freeze",
    "make_input",
    "map_values",
    "values_in",
]
