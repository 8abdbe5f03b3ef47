"""fx graph to IR: every node becomes IR operators, or an opaque call whose reason is kept.

The graph comes from AOTAutograd or ``torch.export``: functional, with fake tensors in ``meta["val"]``.
Those say what eager would give: the importer keeps their strides and devices, and compares their
shapes and dtypes with what the IR operators infer.

    imported = import_graph(gm)
    imported.graph        # the IR
    imported.constants    # tensors the graph holds, by input name
    imported.fallbacks    # nodes that became opaque calls, each with the reason
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import TesselError, check
from ..ir.nested import leaves
from ..ir.node import Builder, Graph, Node, Value, make_input, map_values
from ..ir.types import Dim, SymType, TensorType, dim_equal
from .compat import HigherOrderOperator, OpOverload, size_hints, unbacked_bindings
from .locs import Locations
from .lower import PLAIN, VIEWS, Lowering, Opaque, nest, target_name
from .opaque import Fallback, Foreign, opaque_call
from .sizes import equalities, symbolic_example, to_ir
from .special import SPECIAL, escaping


@dataclass(frozen=True)
class Imported:
    """An imported graph with what it needs beside its inputs.

    Attributes:
        graph: the IR.
        constants: the tensor of each constant input, by input name.
        fallbacks: fx nodes that became opaque calls.
        hints: what each symbolic size was in the example inputs, by the symbol's name.
        device: the device that a type without one stands for, as text (``"cuda:0"``).
    """

    graph: Graph
    constants: dict[str, torch.Tensor]
    fallbacks: tuple[Fallback, ...] = ()
    hints: dict[str, int] = field(default_factory=dict)
    device: str = "cpu"


def import_graph(
    gm: fx.GraphModule,
    *,
    name: str = "graph",
    roles: Mapping[int, tuple[str, str]] | None = None,
) -> Imported:
    """The IR of an fx graph.

    Args:
        gm: functional ATen graph with ``meta["val"]`` on its nodes.
        name: for messages and text.
        roles: name and role (``param``, ``buffer``, ``input``) of placeholders, by position.

    Raises:
        TesselError: metadata is missing, or an operator's shape or dtype differs from eager's
            (a fault of Tessel; the message names node and line).
    """
    return Importer(gm, name, roles or {}).run()


def graph_device(gm: fx.GraphModule) -> str:
    """The device most of a graph works on: the first that is not the CPU, else the CPU."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        for x in val if isinstance(val, tuple | list) else (val,):
            if isinstance(x, torch.Tensor) and x.device.type != "cpu":
                return str(x.device)
    return "cpu"


class Importer:
    """One fx graph on its way into the IR; the entries of the ATen table and ``special`` are handed it.

    Args:
        gm: the graph, functional, with fake tensors in ``meta["val"]``.
        name: of the IR graph.
        roles: name and role (``param``, ``buffer``, ``input``) of placeholders by position; else their own, ``input``.

    Attributes:
        env: what each fx node stands for: a value, a number, a nest of these.
        c: the builder that table entries call.
        fallbacks: nodes that became opaque calls, with reasons.

    Raises:
        TesselError: by ``run``; the graph is none that AOTAutograd or ``torch.export`` makes.
    """

    def __init__(self, gm: fx.GraphModule, name: str, roles: Mapping[int, tuple[str, str]]) -> None:
        # Operators are looked up when a graph is imported, so that importing this module stays cheap.
        from ..ops import OPS
        from .aten import TABLE

        self.gm, self.name, self.roles, self.entries = gm, name, roles, TABLE
        self.device = graph_device(gm)
        example = symbolic_example(gm)
        self.hints = size_hints(example)
        self.builder = Builder()
        self.c = Lowering(self.builder, OPS, self.hints, self.device)
        self.env: dict[fx.Node, Any] = {}
        self.c.env, self.c.offset = self.env, self.offset
        self.escaping = escaping(gm)
        self.exprs: dict[Any, Any] = {}
        self.equal = equalities(example)
        self.locations = Locations()
        self.constants: dict[str, torch.Tensor] = {}
        self.constant_inputs: dict[int, Value] = {}  # by id of the tensor, which the module keeps
        self.fallbacks: list[Fallback] = []
        self.effects: dict[Node, Value] = {}
        self.used_names: set[str] = set()

    # ------------------------------------------------------------ driver

    def run(self) -> Imported:
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        for i, node in enumerate(placeholders):
            self.builder.loc = self.locations.of(node.meta)
            self.env[node] = self.placeholder(node, i)
        outputs = self.outputs(self.block(self.gm))
        graph = self.builder.finish(outputs, tuple(self.effects.items()), self.name)
        return Imported(graph, self.constants, tuple(self.fallbacks), self.hints, self.device)

    def block(self, gm: fx.GraphModule) -> Any:
        """Import a graph's nodes, placeholders aside, and return its output argument."""
        outputs: Any = ()
        for node in gm.graph.nodes:
            self.builder.loc = self.locations.of(node.meta)
            if node.op == "get_attr":
                self.env[node] = self.attribute(gm, node)
            elif node.op == "call_function":
                self.env[node] = self.call(node)
            elif node.op == "output":
                outputs = self.argument(node.args[0])
            elif node.op != "placeholder":
                raise TesselError(
                    f"{self.where(node)}: an fx node of kind {node.op} cannot be imported; "
                    "hand in a graph from AOTAutograd or torch.export"
                )
        return outputs

    def where(self, node: fx.Node) -> str:
        return f"{self.name}: {node.name} = {target_name(node.target)} at {self.builder.loc}"

    # ------------------------------------------------------------ inputs and outputs

    def unique(self, name: str) -> str:
        base, n = name, 1
        while name in self.used_names:
            n += 1
            name = f"{base}_{n}"
        self.used_names.add(name)
        return name

    def placeholder(self, node: fx.Node, position: int) -> Any:
        val = node.meta.get("val")
        name, role = self.roles.get(position, (str(node.target), "input"))
        if isinstance(val, torch.Tensor):
            kind: TensorType | SymType = self.tensor_type(val)
        elif isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            kind = SymType(self.scalar(val))
        else:
            # None, a string, a generator: a literal the graph was specialized on; its slot stays.
            kind = SymType(0)
            self.add_input(name, kind, role)
            return val if val is None or isinstance(val, str) else Foreign(val)
        value = self.add_input(name, kind, role).out
        return value if isinstance(kind, TensorType) else kind.expr

    def add_input(self, name: str, kind: TensorType | SymType, role: str) -> Node:
        node = make_input(self.unique(name), kind, role, self.builder.loc)
        self.builder.inputs.append(node)
        return node

    def attribute(self, gm: fx.GraphModule, node: fx.Node) -> Any:
        target = str(node.target)
        held: Any = gm
        for part in target.split("."):
            held = getattr(held, part)
        if not isinstance(held, torch.Tensor):
            return Foreign(held)
        if id(held) not in self.constant_inputs:
            val = node.meta.get("val")
            kind = self.tensor_type(val if isinstance(val, torch.Tensor) else held)
            made = self.add_input(target, kind, "constant")
            self.constants[made.attrs["name"]] = held
            self.constant_inputs[id(held)] = made.out
        return self.constant_inputs[id(held)]

    def outputs(self, outs: Any) -> tuple[Any, ...]:
        outs = outs if isinstance(outs, tuple) else (outs,)
        bad = [a for a in outs if isinstance(a, Foreign | tuple)]
        check(not bad, lambda: f"{self.name}: the graph returns {bad[0]!r}, neither a tensor nor a number")
        return outs

    # ------------------------------------------------------------ types and scalars

    def scalar(self, x: Any) -> Any:
        """A Python number, or an expression in the IR's symbols."""
        if not isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool):
            return x
        expr = x.node.expr
        found = self.exprs.get(expr)
        if found is None:
            found = to_ir(expr)
            found = self.exprs[expr] = self.equal.get(found, found)
        return found

    def dim(self, x: Any) -> Dim:
        return x if type(x) is int else self.scalar(x)  # type: ignore[no-any-return]

    def tensor_type(self, t: torch.Tensor) -> TensorType:
        shape = tuple(map(self.dim, t.shape))
        strides = tuple(map(self.dim, t.stride())) if t.layout == torch.strided else None
        device = str(t.device)
        return TensorType(shape, t.dtype, strides, None if device == self.device else device)

    def offset(self, node: fx.Node) -> Dim:
        return self.dim(node.meta["val"].storage_offset())

    def argument(self, a: Any) -> Any:
        """An fx argument as an IR one: nodes become what they stand for, lists tuples."""
        if isinstance(a, fx.Node):
            return self.env[a]
        if isinstance(a, tuple | list):
            return tuple(self.argument(x) for x in a)
        if isinstance(a, dict):
            return {k: self.argument(v) for k, v in a.items()}
        if isinstance(a, slice):
            return slice(self.argument(a.start), self.argument(a.stop), self.argument(a.step))
        return self.scalar(a)

    # ------------------------------------------------------------ calls

    def call(self, node: fx.Node) -> Any:
        target = node.target
        val = node.meta.get("val")
        if target is operator.getitem and not isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool):
            box, at = node.args
            held = self.env[box]  # type: ignore[index]
            if isinstance(held, tuple):
                return held[at]  # type: ignore[index]
        name = target_name(target)
        handler = SPECIAL.get(name)
        if handler is not None:
            return handler(self, node)
        if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            # Arithmetic on sizes: what it came to is known as an expression.
            return self.scalar(val)
        return self.tensor_call(node, name, val)

    def tensor_call(self, node: fx.Node, name: str, val: Any) -> Any:
        args, kwargs = self.argument(node.args), self.argument(dict(node.kwargs))
        fakes = list(leaves(val, torch.Tensor))
        types = tuple(map(self.tensor_type, fakes))
        start = len(self.builder.nodes)
        self.c.types, self.c.node = types, node
        entry = self.entries.get(name)
        try:
            if entry is None:
                raise Opaque(_no_entry(node))
            for t in (*types, *(v.type for v in leaves((args, kwargs), Value))):
                if t.dtype not in PLAIN and not hasattr(entry, "any_dtype"):
                    raise Opaque(f"{str(t.dtype).removeprefix('torch.')} tensors")
            got = entry(self.c, *args, **kwargs)
            if node in self.escaping and name not in VIEWS:
                got = self.own_storage(got, start)
            return self.settled(node, got, types, start)
        except Opaque as reason:
            del self.builder.nodes[start:]
            return self.opaque(node, args, kwargs, val, types, str(reason))
        except TesselError as e:
            # What the IR refuses eager may refuse too, with its own words, when it runs; and torch may have
            # guarded on an equality of sizes that their expressions do not show.
            why = "sizes that only a guard makes fit" if self.symbolic((args, kwargs), types) else "refused by the IR"
            del self.builder.nodes[start:]
            return self.opaque(node, args, kwargs, val, types, f"{why}: {e}")

    def own_storage(self, got: Any, start: int) -> Any:
        """Copy what eager would give storage of its own and the IR made a view, or did nothing for."""
        if isinstance(got, tuple | list):
            return tuple(self.own_storage(g, start) for g in got)
        if not isinstance(got, Value):
            return got
        fresh = any(n is got.node for n in self.builder.nodes[start:])
        return got if fresh and got.op.kind != "view" else self.c("copy", got)

    def symbolic(self, args: Any, types: tuple[TensorType, ...]) -> bool:
        shapes = [t.shape for t in types] + [v.shape for v in leaves(args, Value)]
        return any(not isinstance(d, int) for shape in shapes for d in shape)

    def opaque(
        self, node: fx.Node, args: Any, kwargs: Any, val: Any, types: tuple[TensorType, ...], reason: str
    ) -> Any:
        self.fallbacks.append(Fallback(node.name, target_name(node.target), reason, self.builder.loc))
        outs = opaque_call(self.c, node, node.target, args, kwargs, types)
        return nest(val, iter(outs))

    # ------------------------------------------------------------ agreement with eager

    def settled(self, node: fx.Node, got: Any, types: tuple[TensorType, ...], start: int) -> Any:
        """Give the new nodes eager's strides and devices, after comparing shapes and dtypes."""
        if len(types) == 1 and isinstance(got, Value) and got.type == types[0]:
            return got
        values = list(leaves(got, Value))
        check(
            len(values) == len(types),
            lambda: f"internal error: {self.where(node)}: {len(values)} results, eager has {len(types)}",
        )
        fresh = {id(n): i for i, n in enumerate(self.builder.nodes[start:], start)}
        retyped: dict[Value, TensorType] = {}
        for v, want in zip(values, types, strict=True):
            self.compare(node, v.type, want)
            if id(v.node) in fresh and not _same_type(v.type, want):
                retyped[v] = want
        if not retyped:
            return got
        return self.retype(got, retyped, start)

    def compare(self, node: fx.Node, mine: TensorType, want: TensorType) -> None:
        same = mine.dtype == want.dtype and len(mine.shape) == len(want.shape)
        same = same and all(self.agree(a, b) for a, b in zip(mine.shape, want.shape, strict=True))
        check(
            same,
            lambda: f"internal error: {self.where(node)}: the IR gives {mine} where eager gives {want}",
        )

    def agree(self, a: Dim, b: Dim) -> bool:
        if dim_equal(a, b):
            return True
        x, y = self.c.hint(a), self.c.hint(b)
        if x == y or x is None or y is None:
            raise Opaque(f"sizes that only a guard makes equal: {a} and {b}")
        return False

    def retype(self, got: Any, retyped: dict[Value, TensorType], start: int) -> Any:
        """Rebuild the nodes from ``start`` on with some results' types replaced."""
        moved: dict[Value, Value] = {}
        for i in range(start, len(self.builder.nodes)):
            old = self.builder.nodes[i]
            new = old
            if any(v in moved for v in old.operands):
                new = new.replace(args=map_values(new.args, lambda v: moved.get(v, v)))
            types = tuple(retyped.get(v, t) for v, t in zip(old.outs, old.types, strict=True))
            if types != old.types:
                new = new.replace(types=types)
            if new is not old:
                self.builder.nodes[i] = new
                moved.update(zip(old.outs, new.outs, strict=True))
        return map_values(got, lambda v: moved.get(v, v))


def _no_entry(node: fx.Node) -> str:
    target = node.target
    if unbacked_bindings(node):
        return "the result's size depends on data"
    if isinstance(target, HigherOrderOperator):
        return "a higher-order operator"
    if isinstance(target, OpOverload) and target.namespace not in ("aten", "prims"):
        return "a custom operator"
    return "no IR operator"


def _same_type(a: TensorType, b: TensorType) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.device == b.device


__all__ = ["Fallback", "Imported", "graph_device", "import_graph"]
