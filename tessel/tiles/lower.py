"""A fused region becomes a tile program.

The region's tensors disappear: each stored value is asked for at the coordinates its layout
gives it, and asks its operands at theirs. Views change coordinates, pointwise operators
compute, inputs load. A value asked for twice at the same place is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch

from ..errors import TesselError, check
from ..ir.node import Graph, Node, Value
from ..ir.types import Dim, TensorType, product, simplify_dim
from . import attention
from .axes import Layout, parse_layout
from .index import Cond, Index, constant, delinearize, scale, var
from .kernel import (
    ACC,
    Access,
    Axis,
    Compute,
    IndexOf,
    Kernel,
    Load,
    Operand,
    Param,
    Reduce,
    Ref,
    Scan,
    Stmt,
    Store,
    Test,
)
from .places import INDEXED, Coords, Mask, Want, Wants, broadcast, indexed_place, reshape_coords, through_view

T = TypeVar("T")


def lower(node: Node) -> Kernel:
    """The tile program of a ``kernel`` node.

    Raises:
        TesselError: the region holds something that no tile program can say (an internal error:
            the fuse pass lets only such regions through).
    """
    check(node.op.kind == "kernel", lambda: f"{node.op.name} is not a kernel node")
    if node.op.name == "write":
        return _write(Lowering(node))
    family = node.attrs["family"]
    makers = {"matmul": _matmul, "attention": attention.forward, "attention_backward": attention.backward}
    maker = makers.get(family, _plain)
    return maker(Lowering(node))


class Lowering:
    """One kernel being written down."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.region: Graph = node.regions[0]
        self.axes = tuple(Axis(name, extent, name[0]) for name, extent in node.attrs["axes"])
        number = {a.name: i for i, a in enumerate(self.axes)}
        self.layout: dict[Node, Layout] = {}  # where each node's result lives
        self.folds: dict[Node, Layout] = {}  # and the operand of a reduction
        for n, text in zip(self.region.nodes, node.attrs["layouts"], strict=True):
            if text is not None:
                *folded, place = (parse_layout(t, number) for t in text.split("->"))
                self.layout[n] = place
                self.folds.update((n, f) for f in folded)
        self.place: list[Index] = [var(a.name, a.extent) for a in self.axes]
        read = [(i, n) for i, n in enumerate(self.region.inputs) if i or node.op.name != "write"]
        inputs = [Param(f"in{i}", _tensor(n.types[0]), False, i) for i, n in read]
        outputs = [Param(f"out{i}", _tensor(t), True, i) for i, t in enumerate(node.types)]
        self.params = (*inputs, *outputs)
        self.input_number = {n: number for number, (_, n) in enumerate(read)}
        self.stmts: list[Stmt] = []
        self.memo: dict[Any, Operand] = {}
        self.known: dict[tuple[Value, Coords], Operand] = {}  # values given from outside: the accumulator
        self.count = 0

    # ------------------------------------------------------------------ statements

    def new(self, make: Callable[[int], Stmt]) -> Ref:
        out = self.count
        self.count += 1
        self.stmts.append(make(out))
        return Ref(out)

    def compute(self, op: str, args: Sequence[Operand], dtype: torch.dtype, arg_dtype: torch.dtype) -> Operand:
        return self.new(lambda out: Compute(out, op, tuple(args), dtype, arg_dtype))

    def test(self, *conds: Cond) -> Ref:
        return self.new(lambda out: Test(out, conds))

    def take(self) -> tuple[Stmt, ...]:
        """The statements so far; the next part starts empty and remembers no value."""
        stmts = tuple(self.stmts)
        self.stmts = []
        self.memo = {}
        return stmts

    def coords(self, layout: Sequence[Sequence[int]]) -> Coords:
        """The coordinates of a value whose dims run over these loops."""
        out: list[Index] = []
        for dim in layout:
            total = constant(0)
            step: Dim = 1
            for a in reversed(dim):
                total = total + scale(self.place[a], step)
                step = simplify_dim(step * self.axes[a].extent)
            out.append(total)
        return tuple(out)

    # ------------------------------------------------------------------ values

    def at(self, v: Value, coords: Coords, mask: Mask = ()) -> Operand:
        """The value at a place, as an earlier statement or a literal."""
        return self.drive(self.evaluate(v, coords, mask))

    def drive(self, wants: Generator[Want, Operand, T]) -> T:
        """What a generator of ``places`` comes to. Deep chains use an explicit stack."""
        stack: list[Generator[Want, Operand, Any]] = [wants]
        send: Any = None
        while stack:
            try:
                want = stack[-1].send(send)
            except StopIteration as done:
                stack.pop()
                send = done.value
                continue
            key = want
            if key in self.memo:
                send = self.memo[key]
            else:
                stack.append(self.evaluate(*want))
                send = None
        return send  # type: ignore[no-any-return]

    def evaluate(self, v: Value, coords: Coords, mask: Mask) -> Wants:
        """A generator: yields (value, coords, mask) it needs and is sent the operand."""
        key = (v, coords, mask)
        if key in self.memo:
            return self.memo[key]
        if (v, coords) in self.known:
            return self.known[v, coords]
        node = v.node
        kind = node.op.kind
        if kind == "input":
            got: Operand = self.new(lambda out: Load(out, Access(self.input_number[node], coords, mask), v.dtype))
        elif kind == "view":
            got = yield (node.operands[0], through_view(node, coords), mask)
        elif kind == "generate":
            got = self._generate(node, coords)
        elif kind == "pointwise":
            args: list[Operand] = []
            for a in node.args:
                args.append((yield (a, broadcast(a.type, coords), mask)) if isinstance(a, Value) else a)
            tensors = [a for a in node.args if isinstance(a, Value)]
            operand = tensors[-1] if node.op.name == "where" else tensors[0] if tensors else v
            if node.op.name == "where" and operand is node.args[0]:
                operand = v
            attrs = {k: x for k, x in node.attrs.items() if k != "dtype"}
            check(not attrs, lambda: f"{node.op.name}: attributes {attrs} have no place in a kernel")
            got = self.compute(node.op.name, args, v.dtype, operand.dtype)
        elif kind == "index":
            got = yield from INDEXED[node.op.name](self, node, coords, mask)
        elif kind == "reduce":
            got = yield from self._reduce(node, coords, mask)
        elif kind == "scan":
            got = yield from self._scan(node, coords, mask)
        else:
            raise TesselError(f"{self.node.attrs['name']}: no tile program for {node.op.name} at {node.loc}")
        self.memo[key] = got
        return got

    def _generate(self, node: Node, coords: Coords) -> Operand:
        dtype = node.type.dtype
        if node.op.name == "full":
            return self.new(lambda out: Compute(out, "copy", (node.attrs["value"],), dtype, dtype))
        check(node.op.name == "iota", lambda: f"no tile program for {node.op.name} at {node.loc}")
        start, step = node.attrs["start"], node.attrs["step"]
        whole = not dtype.is_floating_point and not isinstance(start, float) and not isinstance(step, float)
        if whole:
            index = scale(coords[0], step) + start
            return self.new(lambda out: IndexOf(out, index, dtype))
        place = self.new(lambda out: IndexOf(out, coords[0], dtype))
        scaled = self.compute("mul", (place, step), dtype, dtype)
        return self.compute("add", (scaled, start), dtype, dtype)

    def _reduce(self, node: Node, coords: Coords, mask: Mask) -> Wants:
        x = node.operands[0]
        mine = self.coords(self.layout[node])
        check(
            mine == coords and not mask,
            lambda: (
                f"{self.node.attrs['name']}: {node.op.name} at {node.loc} is read away from its loop "
                f"({', '.join(map(str, coords))} is not {', '.join(map(str, mine))})"
            ),
        )
        arg = yield (x, self.coords(self.folds[node]), ())
        if not isinstance(arg, Ref):
            arg = self.compute("copy", (arg,), x.dtype, x.dtype)
        return self.new(lambda out: Reduce(out, node.op.name, arg, node.type.dtype, x.dtype))

    def _scan(self, node: Node, coords: Coords, mask: Mask) -> Wants:
        mine = self.coords(self.layout[node])
        check(
            mine == coords and not mask,
            lambda: (
                f"{self.node.attrs['name']}: {node.op.name} at {node.loc} is read at another step than its own "
                f"({', '.join(map(str, coords))} is not {', '.join(map(str, mine))})"
            ),
        )
        args: list[Operand] = []
        for x in node.operands:
            arg = yield (x, mine, ())
            args.append(arg if isinstance(arg, Ref) else self.compute("copy", (arg,), x.dtype, x.dtype))
        a, b = args[0], args[-1]
        reverse, fold = bool(node.attrs.get("reverse", False)), node.attrs.get("fold", "")
        return self.new(lambda out: Scan(out, a, b, node.type.dtype, reverse, fold))

    # ------------------------------------------------------------------ results

    def store(self, number: int, v: Value, coords: Coords) -> None:
        """Store a region output at its coordinates."""
        arg = self.at(v, coords)
        access = Access(len(self.input_number) + number, coords)
        self.stmts.append(Store(access, arg, v.dtype))

    def notes(self) -> tuple[str, ...]:
        """The header: operators computed and where the user wrote them."""
        lines: dict[str, list[str]] = {}
        for n in self.region.nodes:
            if n.op.kind not in ("view", "generate"):
                lines.setdefault(n.loc.short, []).append(n.op.name)
        return tuple(f"{where}: {', '.join(ops)}" for where, ops in lines.items())

    def kernel(self, axes: tuple[Axis, ...], body: tuple[Stmt, ...], **more: Any) -> Kernel:
        return Kernel(
            self.node.attrs["name"],
            self.node.attrs["family"],
            self.params,
            axes,
            body,
            notes=self.notes(),
            **more,
        )


def _tensor(t: object) -> TensorType:
    assert isinstance(t, TensorType)
    return t


# ---------------------------------------------------------------------- families


def _plain(low: Lowering) -> Kernel:
    """Pointwise, reduction and scan kernels."""
    for i, v in enumerate(low.region.outputs):
        low.store(i, v, low.coords(low.layout[v.node]))
    steps = {
        low.axes[a].name
        for n in low.region.nodes
        if n.op.kind == "scan"
        for a in low.layout[n][n.attrs["dim"] % n.type.rank]
    }
    axes = tuple(Axis(a.name, a.extent, "s") if a.name in steps else a for a in low.axes)
    return low.kernel(axes, low.take())


def _write(low: Lowering) -> Kernel:
    """Rows that are written into the memory of the node's first operand, one after the other."""
    node = low.region.nodes[-1]
    x, coords = node.operands[0], tuple(low.place)
    if node.op.name == "slice_scatter_":
        source = node.args[1]
        d, start, step = node.attrs["dim"] % x.type.rank, node.attrs["start"], node.attrs.get("step", 1)
        place = (*coords[:d], scale(coords[d], step) + start, *coords[d + 1 :])
    else:
        source = node.args[2]
        place = low.drive(indexed_place(low, node, x, node.args[1], coords, ()))
    arg = low.at(source, broadcast(source.type, coords)) if isinstance(source, Value) else source
    low.stmts.append(Store(Access(len(low.input_number), place), arg, x.dtype))
    return low.kernel(low.axes, low.take(), attrs={"in_order": True})


def _matmul(low: Lowering) -> Kernel:
    """The loops of the product's rows and columns become one m and one n."""
    (product_node,) = (n for n in low.region.nodes if n.op.kind == "contract")
    a, b = product_node.operands
    layout = low.layout[product_node]
    rank = len(layout)
    m_size, n_size, k_size = a.shape[-2], b.shape[-1], a.shape[-1]
    m, n, k = var("m", m_size), var("n", n_size), var("k", k_size)
    for dims, flat in ((layout[-2], m), (layout[-1], n)):
        for axis, c in zip(dims, delinearize(flat, [low.axes[i].extent for i in dims]), strict=True):
            low.place[axis] = c
    batch_axes = [i for dim in layout[: rank - 2] for i in dim]
    batch = low.coords(layout[: rank - 2])
    parts: dict[str, tuple[Stmt, ...]] = {}
    provides: dict[str, Operand] = {}
    for name, v, coords in (("a", a, (*batch, m, k)), ("b", b, (*batch, k, n))):
        provides[name] = low.at(v, coords)
        parts[name] = low.take()
    low.known[product_node.out, low.coords(layout)] = Ref(ACC)
    low.known[product_node.out, (*batch, m, n)] = Ref(ACC)
    for i, v in enumerate(low.region.outputs):
        low.store(i, v, low.coords(low.layout[v.node]))
    axes = (
        *(Axis(low.axes[i].name, low.axes[i].extent, "x") for i in batch_axes),
        Axis("m", m_size, "x"),
        Axis("n", n_size, "x"),
        Axis("k", k_size, "r"),
    )
    flops = 2 * product((*(low.axes[i].extent for i in batch_axes), m_size, n_size, k_size))
    return low.kernel(axes, low.take(), parts=parts, provides=provides, flops=flops)


__all__ = ["lower", "reshape_coords"]
