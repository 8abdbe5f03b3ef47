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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ..errors import TesselError, check
from ..ir.exprs import normal
from ..ir.node import Builder, Graph, Node, Value, make_input, map_values
from ..ir.types import (
    Dim,
    Loc,
    SymType,
    TensorType,
    dim_equal,
    simplify_dim,
    symbol,
    unbacked,
)
from .compat import HigherOrderOperator, OpOverload, guarded_equalities, size_hints, unbacked_bindings
from .locs import Locations
from .lower import PLAIN, VIEWS, Lowering, Opaque, nest, target_name
from .opaque import Foreign, opaque_call


@dataclass(frozen=True)
class Fallback:
    """One fx node that became an opaque call to torch."""

    node: str
    target: str
    reason: str
    loc: Loc

    def __iter__(self) -> Iterator[Any]:
        return iter((self.node, self.target, self.reason, self.loc))

    def __str__(self) -> str:
        return f"{self.node} = {self.target} at {self.loc}: {self.reason}"


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
    return _Importer(gm, name, roles or {}).run()


def graph_device(gm: fx.GraphModule) -> str:
    """The device most of a graph works on: the first that is not the CPU, else the CPU."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        for x in val if isinstance(val, tuple | list) else (val,):
            if isinstance(x, torch.Tensor) and x.device.type != "cpu":
                return str(x.device)
    return "cpu"


class _Importer:
    def __init__(self, gm: fx.GraphModule, name: str, roles: Mapping[int, tuple[str, str]]) -> None:
        # Operators are looked up when a graph is imported, so that importing this module stays cheap.
        from ..ops import OPS
        from .aten import TABLE

        self.gm, self.name, self.roles, self.entries = gm, name, roles, TABLE
        self.device = graph_device(gm)
        example = _symbolic_example(gm)
        self.hints = size_hints(example)
        self.builder = Builder()
        self.c = Lowering(self.builder, OPS, self.hints)
        self.env: dict[fx.Node, Any] = {}
        self.c.env, self.c.offset = self.env, self.offset
        self.escaping = _escaping(gm)
        self.exprs: dict[Any, Any] = {}
        self.equal = _equalities(example)
        self.locations = Locations()
        self.constants: dict[str, torch.Tensor] = {}
        self.constant_inputs: dict[str, Value] = {}
        self.fallbacks: list[Fallback] = []
        self.effects: dict[Node, Value] = {}
        self.used_names: set[str] = set()

    # ------------------------------------------------------------ driver

    def run(self) -> Imported:
        outputs: tuple[Any, ...] = ()
        position = 0
        for node in self.gm.graph.nodes:
            self.builder.loc = self.locations.of(node.meta)
            if node.op == "placeholder":
                self.env[node] = self.placeholder(node, position)
                position += 1
            elif node.op == "get_attr":
                self.env[node] = self.attribute(node)
            elif node.op == "call_function":
                self.env[node] = self.call(node)
            elif node.op == "output":
                outputs = self.outputs(node.args[0])
            else:
                raise TesselError(
                    f"{self.where(node)}: an fx node of kind {node.op} cannot be imported; "
                    "hand in a graph from AOTAutograd or torch.export"
                )
        graph = self.builder.finish(outputs, tuple(self.effects.items()), self.name)
        return Imported(graph, self.constants, tuple(self.fallbacks), self.hints, self.device)

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

    def attribute(self, node: fx.Node) -> Any:
        target = str(node.target)
        held: Any = self.gm
        for part in target.split("."):
            held = getattr(held, part)
        if not isinstance(held, torch.Tensor):
            return Foreign(held)
        if target not in self.constant_inputs:
            val = node.meta.get("val")
            kind = self.tensor_type(val if isinstance(val, torch.Tensor) else held)
            made = self.add_input(target, kind, "constant")
            self.constants[made.attrs["name"]] = held
            self.constant_inputs[target] = made.out
        return self.constant_inputs[target]

    def outputs(self, args: Any) -> tuple[Any, ...]:
        if not isinstance(args, tuple | list):
            args = (args,)
        outs = tuple(self.argument(a) for a in args)
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
        handler = _SPECIAL.get(name)
        if handler is not None:
            return handler(self, node)
        if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            # Arithmetic on sizes: what it came to is known as an expression.
            return self.scalar(val)
        return self.tensor_call(node, name, val)

    def tensor_call(self, node: fx.Node, name: str, val: Any) -> Any:
        args, kwargs = self.argument(node.args), self.argument(dict(node.kwargs))
        fakes = list(_tensors(val))
        types = tuple(map(self.tensor_type, fakes))
        start = len(self.builder.nodes)
        self.c.types, self.c.node = types, node
        entry = self.entries.get(name)
        try:
            if entry is None:
                raise Opaque(_no_entry(node))
            for t in (*types, *(v.type for v in _values((args, kwargs)))):
                if t.dtype not in PLAIN and not hasattr(entry, "any_dtype"):
                    raise Opaque(f"{str(t.dtype).removeprefix('torch.')} tensors")
            got = entry(self.c, *args, **kwargs)
        except Opaque as reason:
            del self.builder.nodes[start:]
            return self.opaque(node, args, kwargs, val, types, str(reason))
        except TesselError as e:
            if not self.symbolic((args, kwargs), types):
                raise TesselError(f"{self.where(node)}: {e}") from e
            # torch has guarded on an equality of sizes that their expressions do not show
            del self.builder.nodes[start:]
            return self.opaque(node, args, kwargs, val, types, f"sizes that only a guard makes fit: {e}")
        if node in self.escaping and name not in VIEWS:
            got = self.own_storage(got, start)
        return self.settled(node, got, types, start)

    def own_storage(self, got: Any, start: int) -> Any:
        """Copy what eager would give storage of its own and the IR made a view, or did nothing for."""
        if isinstance(got, tuple | list):
            return tuple(self.own_storage(g, start) for g in got)
        if not isinstance(got, Value):
            return got
        fresh = any(n is got.node for n in self.builder.nodes[start:])
        return got if fresh and got.op.kind != "view" else self.c("copy", got)

    def symbolic(self, args: Any, types: tuple[TensorType, ...]) -> bool:
        shapes = [t.shape for t in types] + [v.shape for v in _values(args)]
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
        values = [v for v in _flat(got) if isinstance(v, Value)]
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
        # Equal sizes may look different; torch has guarded on them being equal.
        x, y = self.c.hint(a), self.c.hint(b)
        return x is None or y is None or (x == y and not (isinstance(a, int) and isinstance(b, int)))

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
        return _mapped(got, moved)


# ---------------------------------------------------------------- special targets


def _drop(self: _Importer, node: fx.Node) -> Any:
    return None


def _item(self: _Importer, node: fx.Node) -> Any:
    """A number read from a tensor: an effect that binds an unbacked symbol."""
    value = self.scalar(node.meta.get("val"))
    names = list(getattr(value, "free_symbols", ()))
    bound = list(unbacked_bindings(node))
    if not bound and not names:
        return value  # known while tracing
    name = str(bound[0]) if bound else names[0].name
    x = self.c.reshape(self.argument(node.args[0]), ())
    self.builder.node(self.c.find("item"), x, symbol=name)
    return value


def _assert_scalar(self: _Importer, node: fx.Node) -> Any:
    cond = self.argument(node.args[0])
    if cond is True:
        return None
    message = str(node.args[1]) if len(node.args) > 1 else "a runtime assertion failed"
    self.builder.node(self.c.find("assert_scalar"), cond, message=message)
    return None


def _assert_tensor(self: _Importer, node: fx.Node) -> Any:
    x = self.argument(node.args[0])
    given = len(node.args) > 1 and isinstance(node.args[1], str)
    message = str(node.args[1]) if given else "Expected Tensor with single nonzero value"
    if x.dtype != torch.bool:
        x = self.c("ne", x, 0)
    self.builder.node(self.c.find("assert_true"), x, message=message)
    if "functional" in target_name(node.target):
        return self.argument(node.args[2])
    return None


def _copy_into(self: _Importer, node: fx.Node) -> Any:
    """``copy_`` into a graph input, which AOTAutograd puts at the end of the graph."""
    owner: Any = node.args[0]
    target, value = self.argument(owner), self.argument(node.args[1])
    self.c.types, self.c.node = (target.type,), node
    value = self.c.expand(self.c.cast(value, target.dtype), target.shape)
    if target.node.op.kind == "input":
        if value != target:
            self.effects[target.node] = value
        return value
    # A tensor that the graph made: from here on it is the new value, unless a view would see it change.
    views = [owner, *owner.users] if owner.op == "call_function" else []
    check(
        not any(n is not node and self.c.is_view(n) for n in views),
        lambda: f"{self.where(node)}: copy_ into a view; functionalize the graph first",
    )
    self.env[owner] = value
    return value


def _with_effects(self: _Importer, node: fx.Node) -> Any:
    """An operator with side effects: a call that keeps its place, which is what the token was for."""
    token, target, *args = (self.env.get(a, a) if isinstance(a, fx.Node) else a for a in node.args)
    given = tuple(map(self.argument, args))
    kwargs = self.argument(dict(node.kwargs))
    _, *val = node.meta["val"]
    types = tuple(map(self.tensor_type, _tensors(val)))
    reason = "an operator with side effects"
    self.fallbacks.append(Fallback(node.name, target_name(target), reason, self.builder.loc))
    outs = opaque_call(self.c, node, target, given, kwargs, types, ordered=True)
    return (token, *nest(val, iter(outs)))


def _token(self: _Importer, node: fx.Node) -> Any:
    self.c.types, self.c.node = (), node
    return self.c.full((0,), 0, torch.float32)


_SPECIAL: dict[str, Callable[[_Importer, fx.Node], Any]] = {
    "aten._local_scalar_dense.default": _item,
    "aten.item.default": _item,
    "aten._assert_scalar.default": _assert_scalar,
    "aten._assert_async.default": _assert_tensor,
    "aten._assert_async.msg": _assert_tensor,
    "aten._functional_assert_async.msg": _assert_tensor,
    "aten._assert_tensor_metadata.default": _drop,
    "aten.sym_constrain_range.default": _drop,
    "aten.sym_constrain_range_for_size.default": _drop,
    "aten.copy_.default": _copy_into,
    "higher_order.with_effects": _with_effects,
    "prims._make_token.default": _token,
    "prims._sink_tokens.default": _drop,
    "aten._make_dep_token.default": _token,
}


# ---------------------------------------------------------------- helpers


def _no_entry(node: fx.Node) -> str:
    target = node.target
    if unbacked_bindings(node):
        return "the result's size depends on data"
    if isinstance(target, HigherOrderOperator):
        return "a higher-order operator"
    if isinstance(target, OpOverload) and target.namespace not in ("aten", "prims"):
        return "a custom operator"
    return "no IR operator"


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


def _symbolic_example(gm: fx.GraphModule) -> torch.SymInt | None:
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


def _equalities(example: torch.SymInt | None) -> dict[Any, Any]:
    """The simpler side of each guarded equality of sizes, by the other side."""
    simpler: dict[Any, Any] = {}
    for pair in guarded_equalities(example):
        a, b = sorted(map(to_ir, pair), key=lambda e: (sympy.sympify(e).count_ops(), str(e)))
        if a != b and not isinstance(b, int):
            simpler[b] = a
    return simpler


def _escaping(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose own storage can be seen outside: they leave the graph, perhaps through views.

    A copy among them must stay a copy: its reader may write to it, or relies on its layout.
    """
    seen: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "output":
            seen.update(node.all_input_nodes)
        elif node.op == "call_function":
            name = target_name(node.target)
            viewed = node in seen and name in VIEWS
            if viewed or name in _LAYOUT_MATTERS:
                seen.update(node.all_input_nodes)
    return seen


_LAYOUT_MATTERS = frozenset({"aten.as_strided.default", "aten.view.dtype", "aten.copy_.default"})


def _tensors(val: Any) -> Iterator[torch.Tensor]:
    if isinstance(val, torch.Tensor):
        yield val
    elif isinstance(val, tuple | list):
        for v in val:
            yield from _tensors(v)


def _values(arg: Any) -> Iterator[Value]:
    if isinstance(arg, Value):
        yield arg
    elif isinstance(arg, tuple | list):
        for a in arg:
            yield from _values(a)
    elif isinstance(arg, dict):
        for a in arg.values():
            yield from _values(a)


def _flat(got: Any) -> Iterator[Any]:
    if isinstance(got, tuple | list):
        for g in got:
            yield from _flat(g)
    else:
        yield got


def _mapped(got: Any, moved: dict[Value, Value]) -> Any:
    if isinstance(got, Value):
        return moved.get(got, got)
    if isinstance(got, tuple | list):
        return tuple(_mapped(g, moved) for g in got)
    return got


def _same_type(a: TensorType, b: TensorType) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.device == b.device


__all__ = ["Fallback", "Imported", "graph_device", "import_graph", "target_name", "to_ir"]
