"""Random graphs for the fuse pass, and running each fused kernel in Triton's interpreter.

Floats hold small whole numbers, so that sums are exact in any order and a difference is a bug.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tessel.codegen.triton import grid_of, render
from tessel.errors import TesselError
from tessel.ir.exprs import evaluate_size
from tessel.ir.interp import bind_symbols, interpret
from tessel.ir.node import Builder, Graph, Node, Value, make_input
from tessel.ir.types import Dim, TensorType, symbol
from tessel.ops import OPS
from tessel.runtime.launch import interpreting, load
from tessel.targets import get_target
from tessel.tiles.lower import lower

S0 = symbol("s0")
F, B16, I, P = torch.float32, torch.bfloat16, torch.int64, torch.bool
SHAPES: tuple[tuple[Dim, ...], ...] = (
    (4, 4), (4, 6), (S0, 4), (S0, 4, 6), (6,), (4,), (24,), (4, 6, 4), (1, 4), (4, 1, 6), (S0,), (S0, S0), (6, 4)
)  # fmt: skip
SQUARE: tuple[tuple[Dim, ...], ...] = ((4, 4), (4, 4), (4,), (16,), (4, 4, 4), (1, 4), (4, 1))  # all sizes coincide
SIZES = {"s0": 5}
INTERPRET = get_target("triton-interpret")
_folder = tempfile.TemporaryDirectory(prefix="tessel-test-")

EXACT = ("neg", "abs", "relu", "copy", "floor")  # also what bf16 computes without rounding
UNARY = (*EXACT, "sign", "double", "step", "cast")
BINARY = ("add", "sub", "add", "mul", "maximum", "minimum", "lt", "eq", "where", "where")
REDUCE = ("sum", "sum", "amax", "amin", "argmax", "argmin", "any", "all")


class _Maker:
    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.shapes = SQUARE if seed % 3 == 0 else SHAPES
        inputs = []
        for i in range(rng.randint(2, 4)):
            shape = rng.choice(self.shapes)
            t = TensorType(shape, rng.choice((F, F, F, F, B16, I, P)))
            if len(shape) == 2 and rng.random() < 0.3:
                t = t.with_(shape=shape, strides=(1, shape[0]))
            inputs.append(make_input(f"x{i}", t))
        inputs.append(make_input("ids", TensorType(rng.choice(((4,), (S0,), (4, 6))), I)))
        inputs.append(make_input("sized", TensorType((S0,), F)))
        self.ids = inputs[-2].out
        self.b = Builder(inputs)
        self.values = [i.out for i in inputs]
        self.mild = set(self.values)  # small enough to be multiplied

    def add(self, op: str, *args: Any, **attrs: Any) -> Value | None:
        with contextlib.suppress(TesselError):  # these types do not go together; another node is tried
            v = self.b.add(OPS[op], *args, **attrs)
            if v.type.rank <= 4:
                self.values.append(v)
                if op in (*EXACT, "cast", "maximum", "minimum", "lt", "eq", "where", "cat", "pad", "sign") or (
                    v.node.op.kind in ("view", "index")
                ):
                    tensors = [a for a in v.node.operands if a.dtype != I or v.dtype == I]
                    if all(a in self.mild for a in tensors):
                        self.mild.add(v)
                return v
        return None

    def pick(self) -> Value:
        if self.rng.random() < 0.7:
            return self.rng.choice(self.values[-4:])
        return self.rng.choice(self.values)

    def step(self) -> None:
        rng, x = self.rng, self.pick()
        kind = rng.choice(("unary", "binary", "binary", "binary", "view", "view", "view", "reduce", "reduce", "index",
                           "index", "matmul", "norm", "make", "library"))  # fmt: skip
        getattr(self, kind)(x)

    def unary(self, x: Value) -> None:
        op = self.rng.choice(UNARY)
        if op == "cast":
            to = self.rng.choice((F, F, F, I, P) if x in self.mild else (F,))
            self.add("cast", x, dtype=to if x.dtype != B16 else F)
        elif x.dtype == P:
            self.add("logical_not", x)
        elif op == "double":
            if x.dtype != B16:
                self.add("mul", x, 2)
        elif op == "step":
            self.add("lt", x, 1)
        elif op != "floor" or x.dtype != I:
            self.add(op, x)

    def same(self, x: Value) -> Value | None:
        found = [v for v in self.values if v.dtype == x.dtype and _broadcasts(v.shape, x.shape)]
        return self.rng.choice(found) if found else None

    def binary(self, x: Value) -> None:
        op = self.rng.choice(BINARY)
        y = self.same(x)
        if y is None:
            return
        if x.dtype == P and op in ("add", "sub", "mul", "maximum", "minimum", "lt"):
            op = "logical_and"
        if x.dtype == B16 and op in ("add", "sub", "mul"):
            op = "maximum"
        if op == "mul" and not {x, y} <= self.mild:
            op = "add"
        if op == "where":
            conds = [v for v in self.values if v.dtype == P and _broadcasts(v.shape, x.shape)]
            if conds:
                self.add("where", self.rng.choice(conds), *self.rng.sample((x, self.rng.choice((y, 1))), 2))
        else:
            self.add(op, *self.rng.sample((x, y), 2))

    def view(self, x: Value) -> None:
        rng, rank, shape = self.rng, x.type.rank, x.shape
        op = rng.choice(("reshape", "reshape", "permute", "permute", "expand", "slice", "flip", "one"))
        if op == "reshape":
            d = rng.randrange(max(rank - 1, 1))
            choices: list[Any] = [(x.type.numel,), *self.shapes]
            if rank > 1:
                choices += [(*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :])] * 8
            d = rng.randrange(rank) if rank else 0
            if rank and isinstance(shape[d], int) and shape[d] in (4, 6, 16, 24):
                choices += [(*shape[:d], 2, shape[d] // 2, *shape[d + 1 :])] * 4
                choices += [(*shape[:d], shape[d] // 2, 2, *shape[d + 1 :])] * 2
            self.add("reshape", x, shape=rng.choice(choices))
        elif op == "permute" and rank > 1:
            self.add("permute", x, dims=tuple(rng.sample(range(rank), rank)))
        elif op == "expand":
            self.add("expand", x, shape=rng.choice(((2, *shape), (S0, *shape), *self.shapes)))
        elif op == "slice" and rank:
            dim = rng.randrange(rank)
            start, step = rng.choice(((0, 1), (1, 1), (0, 2), (2, 1)))
            n = shape[dim]
            if isinstance(n, int) and n > start:
                most = (n - start + step - 1) // step
                self.add("slice", x, dim=dim, start=start, size=rng.randint(1, most), step=step)
            elif n == S0:
                self.add("slice", x, dim=dim, start=1, size=S0 - 1, step=1)
        elif op == "flip" and rank:
            self.add("flip", x, dims=tuple(d for d in range(rank) if rng.random() < 0.5))
        elif op == "one":
            d = rng.randint(0, rank)
            self.add("reshape", x, shape=(*shape[:d], 1, *shape[d:]))

    def reduce(self, x: Value) -> None:
        rng, rank = self.rng, x.type.rank
        op = rng.choice(REDUCE)
        if not rank or (op in ("any", "all")) != (x.dtype == P) or (x.dtype == B16 and op == "sum"):
            return
        dims = sorted(rng.sample(range(rank), rng.randint(1, 1 if op.startswith("arg") else rank)))
        self.add(op, x, dims=tuple(dims), keepdim=rng.random() < 0.6)

    def norm(self, x: Value) -> None:
        """x - max(x): what softmax and the norms are made of."""
        if x.type.rank and x.dtype in (F, I):
            dim = self.rng.randrange(x.type.rank)
            m = self.add(self.rng.choice(("amax", "sum")), x, dims=(dim,), keepdim=True)
            if m is not None and (d := self.add("sub", x, m)) is not None and self.rng.random() < 0.7:
                s = self.add("sum", d, dims=(dim,), keepdim=True)
                self.add("add", d, s)

    def index(self, x: Value) -> None:
        rng, rank = self.rng, x.type.rank
        op = rng.choice(("cat", "cat", "pad", "gather", "embedding", "index_select", "index", "slice_scatter"))
        if not rank or x.dtype == P:
            return
        dim = rng.randrange(rank)
        n = x.shape[dim]
        zero = False if x.dtype == P else 0
        if op == "cat":
            same = [v for v in self.values if v.dtype == x.dtype and v.type.rank == rank]
            same = [v for v in same if v.shape[:dim] + v.shape[dim + 1 :] == x.shape[:dim] + x.shape[dim + 1 :]]
            self.add("cat", (x, *rng.choices(same, k=rng.randint(1, 2))), dim=dim)
        elif op == "pad":
            low, high = ([rng.choice((0, 0, 1, 2)) for _ in range(rank)] for _ in range(2))
            self.add("pad", x, low=tuple(low), high=tuple(high), value=zero)
        elif op == "slice_scatter":
            step = rng.choice((1, 1, 2))
            for v in self.values:
                same = v.shape[:dim] + v.shape[dim + 1 :] == x.shape[:dim] + x.shape[dim + 1 :]
                if v.type.rank == rank and v.dtype == x.dtype and same and isinstance(n, int):
                    size = v.shape[dim]
                    if isinstance(size, int) and (size - 1) * step < n:
                        start = rng.randint(0, n - 1 - (size - 1) * step)
                        self.add("slice_scatter", x, v, dim=dim, start=start, size=size, step=step)
                        return
        elif not isinstance(n, int) or n < 4:
            return
        elif op == "gather":
            found = [v for v in self.values if v.node.op.kind == "input" and v.dtype == I and v.type.rank == rank]
            for v in found:
                if all(k == m for i, (k, m) in enumerate(zip(v.shape, x.shape)) if i != dim):
                    self.add("gather", x, v, dim=dim)
                    return
        elif op == "embedding":
            if rank == 2 and dim == 0:
                self.add("embedding", x, self.ids)
        elif op == "index_select":
            if self.ids.type.rank == 1:
                self.add("index_select", x, self.ids, dim=dim)
        elif op == "index":
            where = [None] * rank
            where[dim] = self.ids  # type: ignore[call-overload]
            if rng.random() < 0.3:
                for d in range(rank):
                    if isinstance(x.shape[d], int) and x.shape[d] >= 4 and rng.random() < 0.5:
                        where[d] = self.ids  # type: ignore[call-overload]
            self.add("index", x, tuple(where))

    def matmul(self, x: Value) -> None:
        rng = self.rng
        if x.type.rank < 2 or x.dtype != F or x not in self.mild:
            return
        found = []
        for v in self.values:
            if v.dtype == F and v in self.mild and v.type.rank == x.type.rank and v.shape[:-2] == x.shape[:-2]:
                if v.shape[-2] == x.shape[-1]:
                    found.append((v, None))
                if v.shape[-1] == x.shape[-1]:
                    found.append((v, (*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2)))
        if found:
            v, dims = rng.choice(found)
            y = v if dims is None else self.add("permute", v, dims=dims)
            out = self.add("matmul", x, y) if y is not None else None
            if out is not None and rng.random() < 0.7:
                self.add("relu", out)

    def make(self, x: Value) -> None:
        rng = self.rng
        if rng.random() < 0.5:
            self.add(
                "iota", shape=(rng.choice((4, 6, S0)),), start=rng.choice((0, 2)), step=1, dtype=rng.choice((I, F))
            )
        else:
            dtype = rng.choice((F, I, P))
            self.add("full", shape=rng.choice(self.shapes), value=dtype == P or 2, dtype=dtype)

    def library(self, x: Value) -> None:
        if self.rng.random() < 0.5 and x.dtype in (F, I) and x.type.rank:
            with contextlib.suppress(TesselError):
                t = x.type.with_(shape=x.shape)
                self.values.append(self.b.node(OPS["call"], x, types=(t,), target="aten.neg.default").out)


def _broadcasts(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> bool:
    return all(x == y or x == 1 or y == 1 for x, y in zip(reversed(a), reversed(b)))


def random_graph(seed: int) -> Graph:
    """A graph of all kinds of nodes over a few sizes that often coincide."""
    made = _Maker(seed)
    size = made.rng.choice((12, 20, 36))
    for _ in range(20 * size):
        if len(made.b.nodes) < size:
            made.step()
    computed = [v for v in made.values if v.node.op.kind != "input"]
    read = {v for n in made.b.nodes for v in n.operands}
    unread = [v for v in computed if v not in read]
    outputs = made.rng.sample(computed, min(len(computed), made.rng.randint(1, 4)))
    return made.b.finish((*(unread if seed % 2 else unread[-1:]), *outputs)).live()


def inputs_of(graph: Graph, seed: int, sizes: Mapping[str, int] = SIZES) -> list[torch.Tensor]:
    """Small whole numbers; indices lie in 0 .. 3."""
    gen = torch.Generator().manual_seed(seed)
    got = []
    for node in graph.inputs:
        t = node.type
        shape, strides = ([evaluate_size(d, sizes) for d in ds] for ds in (t.shape, t.strides))
        low = 0 if t.dtype in (I, P) else -3
        high = 2 if t.dtype == P else 4
        data = torch.randint(low, high, shape, generator=gen)
        got.append(torch.empty_strided(shape, strides, dtype=t.dtype).copy_(data))
    return got


def run_kernel(node: Node, args: list[torch.Tensor], sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """A kernel node through lowering, rendering and Triton's interpreter, into poisoned outputs."""
    source = render(lower(node), INTERPRET)
    launch = load(source, Path(_folder.name))
    outs = []
    for t in node.types:
        assert isinstance(t, TensorType)
        shape, strides = ([evaluate_size(d, sizes) for d in ds] for ds in (t.shape, t.strides))
        out = torch.empty_strided(shape, strides, dtype=t.dtype)
        raw = torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())  # type: ignore[call-overload]
        raw.fill_(1 if t.dtype == P else 0xC7)
        outs.append(out)
    grid = tuple(evaluate_size(g, sizes) for g in grid_of(source.kernel, source.knobs, INTERPRET))
    with interpreting():
        launch(grid, *_in_order(source.kernel, args, outs), *(sizes[s] for s in source.sizes))
    return outs


def _in_order(kernel: Any, args: list[torch.Tensor], outs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [(outs if p.out else args)[p.slot] for p in kernel.params]


def check_kernels(after: Graph, inputs: list[torch.Tensor], run: Any = run_kernel) -> int:
    """Compare every kernel node with its region; the number of kernels run."""
    kernels = [n for n in after.nodes if n.op.name == "kernel"]
    values = dict.fromkeys(v for n in kernels for v in (*n.operands, *n.outs))
    sizes = bind_symbols(after, inputs)
    env = dict(zip(values, interpret(after.replace(outputs=tuple(values), effects=()), inputs), strict=True))
    for node in kernels:
        args = [_laid_out(env[v], v.type, sizes) for v in node.operands]
        for v, got in zip(node.outs, run(node, args, sizes), strict=True):
            want = env[v]
            assert torch.allclose(got.double(), want.double(), 1e-4, 1e-4, equal_nan=True), (
                f"{node.attrs['name']}: {got}\nshould be {want}\n{after}"
            )
    return len(kernels)


def _laid_out(x: torch.Tensor, t: TensorType, sizes: Mapping[str, int]) -> torch.Tensor:
    """The argument in its type's layout, as the runtime hands it over."""
    strides = [evaluate_size(d, sizes) for d in t.strides]
    if list(x.stride()) == strides:
        return x
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype)
    if 0 in strides:
        keep = [0 if s == 0 else n for n, s in zip(x.shape, strides)]
        out = torch.empty_strided([n or 1 for n in keep], strides, dtype=x.dtype)
        out.copy_(x[tuple(slice(0, n or 1) for n in keep)])
        return out.expand(x.shape)
    return out.copy_(x)
