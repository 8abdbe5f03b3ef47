"""A fused region becomes a tile program.

The region's tensors disappear: each stored value is asked for at the coordinates its layout
gives it, and asks its operands at theirs. Views change coordinates, pointwise operators
compute, inputs load. A value asked for twice at the same place is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import TesselError, check
from ..ir.node import Graph, Node, Value
from ..ir.types import Dim, TensorType, dim_equal, product, simplify_dim
from .axes import Layout, parse_layout
from .index import Cond, Index, constant, delinearize, exact_div, scale, var
from .index import floordiv as index_div
from .kernel import (
    ACC,
    LSE,
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
from .places import INDEXED, Coords, Mask, Wants, broadcast, reshape_coords, through_view


def lower(node: Node) -> Kernel:
    """The tile program of a ``kernel`` node.

    Raises:
        TesselError: the region holds something that no tile program can say (an internal error:
            the fuse pass lets only such regions through).
    """
    check(node.op.name == "kernel", lambda: f"{node.op.name} is not a kernel node")
    family = node.attrs["family"]
    maker = {"matmul": _matmul, "attention": _attention}.get(family, _plain)
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
        inputs = [Param(f"in{i}", _tensor(n.types[0]), False, i) for i, n in enumerate(self.region.inputs)]
        outputs = [Param(f"out{i}", _tensor(t), True, i) for i, t in enumerate(node.types)]
        self.params = (*inputs, *outputs)
        self.input_number = {n: i for i, n in enumerate(self.region.inputs)}
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
        """The value at a place, as an earlier statement or a literal. Deep chains use an explicit stack."""
        stack = [self.evaluate(v, coords, mask)]
        send: Operand = None
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
        return send

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
        a, b = args
        return self.new(lambda out: Scan(out, a, b, node.type.dtype, bool(node.attrs.get("reverse", False))))

    # ------------------------------------------------------------------ results

    def store(self, number: int, v: Value, coords: Coords) -> None:
        """Store a region output at its coordinates."""
        arg = self.at(v, coords)
        access = Access(len(self.region.inputs) + number, coords)
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


def _attention(low: Lowering) -> Kernel:
    """Rows m of the queries, columns n of the keys, head widths d and e; a mask edits the score."""
    (node,) = (n for n in low.region.nodes if n.op.kind == "attention")
    q, k, v, mask, *_ = (*node.args, None)
    heads, kv_heads = q.shape[-3], k.shape[-3]
    group = heads if dim_equal(heads, kv_heads) else exact_div(heads, kv_heads)
    batch = [var(f"x{i}", size) for i, size in enumerate(q.shape[:-2])]
    m, n = var("m", q.shape[-2]), var("n", k.shape[-2])
    d, e = var("d", q.shape[-1]), var("e", v.shape[-1])
    shared = batch[-1] if dim_equal(heads, kv_heads) else index_div(batch[-1], group)
    parts: dict[str, tuple[Stmt, ...]] = {}
    provides: dict[str, Operand] = {}
    kv = (*batch[:-1], shared)
    for name, x, coords in (("q", q, (*batch, m, d)), ("k", k, (*kv, n, d)), ("v", v, (*kv, n, e))):
        provides[name] = low.at(x, coords)
        parts[name] = low.take()
    score: Operand = Ref(ACC)
    if mask is not None:
        got = low.at(mask, broadcast(mask.type, (*batch, m, n)))
        if mask.dtype == torch.bool:
            score = low.compute("where", (got, Ref(ACC), float("-inf")), torch.float32, torch.float32)
        else:
            wide = low.compute("cast", (got,), torch.float32, mask.dtype)
            score = low.compute("add", (Ref(ACC), wide), torch.float32, torch.float32)
    provides["score"] = score
    parts["score"] = low.take()
    scale_ = node.attrs["scale"]
    first = len(low.region.inputs)
    for i, out in enumerate(low.region.outputs):
        is_lse = out.index == 1
        where = (*batch, m) if is_lse else (*batch, m, e)
        low.stmts.append(Store(Access(first + i, where), Ref(LSE if is_lse else ACC), out.dtype))
    axes = (
        *(Axis(f"x{i}", size, "x") for i, size in enumerate(q.shape[:-2])),
        Axis("m", q.shape[-2], "x"),
        Axis("n", k.shape[-2], "r"),
        Axis("d", q.shape[-1], "r"),
        Axis("e", v.shape[-1], "x"),
    )
    flops = 2 * product((*q.shape[:-1], k.shape[-2])) * (q.shape[-1] + v.shape[-1])
    attrs = {
        "causal": node.attrs["causal"],
        "scale": scale_ if scale_ is not None else float(q.shape[-1]) ** -0.5,
        "offset": node.attrs.get("offset", 0),
    }
    return low.kernel(axes, low.take(), parts=parts, provides=provides, attrs=attrs, flops=flops)


__all__ = ["lower", "reshape_coords"]
