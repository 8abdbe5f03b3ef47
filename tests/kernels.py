"""Hand-built tile programs, and running them in Triton's interpreter, for the tests of code generation."""

from __future__ import annotations

import importlib.util
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tessel.codegen import cpp
from tessel.codegen.source import Source
from tessel.codegen.triton import render
from tessel.config import Options
from tessel.frontend.capture import export_program, import_program
from tessel.ir.types import Dim, TensorType
from tessel.ops import OPS
from tessel.passes.pipeline import CPU_ONLY, PASSES, run_pipeline
from tessel.runtime.native import NativeKernel, build
from tessel.targets import get_target
from tessel.tiles.index import Cond, Index, floordiv, value, var
from tessel.tiles.kernel import (
    ACC,
    LSE,
    Access,
    Axis,
    Check,
    Compute,
    IndexOf,
    Kernel,
    Load,
    Param,
    Reduce,
    Ref,
    Stmt,
    Store,
    Test,
)
from tessel.tiles.lower import lower

INTERPRET = get_target("triton-interpret")
BOOLS = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "isnan", "isinf"}
_numbers = itertools.count()
_folder = tempfile.TemporaryDirectory(prefix="tessel-test-")


class Program:
    """Builds a ``Kernel``: ``p.load(...)`` and ``p.op(...)`` append to the list being written."""

    def __init__(self, family: str, **axes: Dim) -> None:
        """Axes by name; those that start with ``r`` are reduced, the others parallel."""
        self.family = family
        self.params: list[Param] = []
        self.axes = {n: var(n, e) for n, e in axes.items()}
        self._axes = tuple(Axis(n, e, "r" if n[0] == "r" else "x") for n, e in axes.items())
        self.lists: dict[str, list[Stmt]] = {"body": []}
        self.provides: dict[str, Any] = {}
        self.at = "body"
        self.count = 0
        self.dtypes: dict[int, torch.dtype] = {}

    def part(self, name: str) -> None:
        """Write to another statement list from now on."""
        self.at = name
        self.lists.setdefault(name, [])

    def param(self, shape: Sequence[Dim], dtype: torch.dtype, strides: Any = None, out: bool = False) -> int:
        slot = sum(p.out == out for p in self.params)
        name = f"{'out' if out else 'in'}{slot}"
        self.params.append(Param(name, TensorType(shape, dtype, strides), out, slot))
        return len(self.params) - 1

    def like(self, x: torch.Tensor) -> int:
        return self.param(tuple(x.shape), x.dtype, x.stride())

    def _put(self, make: Any, dtype: torch.dtype) -> Ref:
        number = self.count
        self.count += 1
        self.dtypes[number] = dtype
        self.lists[self.at].append(make(number))
        return Ref(number)

    def load(self, param: int, *coords: Any, mask: Sequence[Cond] = (), other: Any = 0) -> Ref:
        dtype = self.params[param].type.dtype
        access = Access(param, tuple(self.index(c) for c in coords), tuple(mask), other)
        return self._put(lambda n: Load(n, access, dtype), dtype)

    def index(self, c: Any) -> Index:
        return self.axes[c] if isinstance(c, str) else c

    def iota(self, index: Any, dtype: torch.dtype) -> Ref:
        return self._put(lambda n: IndexOf(n, self.index(index), dtype), dtype)

    def test(self, *conds: Cond) -> Ref:
        return self._put(lambda n: Test(n, conds), torch.bool)

    def dtype(self, x: Any) -> torch.dtype:
        return self.dtypes[x.number]

    def op(self, name: str, *args: Any, dtype: torch.dtype | None = None) -> Ref:
        refs = [a for a in (args[1:] if name == "where" else args) if isinstance(a, Ref)]
        arg_dtype = self.dtype(refs[0]) if refs else dtype
        assert arg_dtype is not None and name in OPS
        result = dtype or (torch.bool if name in BOOLS else arg_dtype)
        return self._put(lambda n: Compute(n, name, args, result, arg_dtype), result)

    def cast(self, x: Ref, dtype: torch.dtype) -> Ref:
        return self.op("cast", x, dtype=dtype)

    def fold(self, name: str, x: Ref, dtype: torch.dtype | None = None) -> Ref:
        result = dtype or (torch.int64 if name.startswith("arg") else self.dtype(x))
        return self._put(lambda n: Reduce(n, name, x, result, self.dtype(x)), result)

    def store(self, param: int, coords: Sequence[Any], x: Any, mask: Sequence[Cond] = ()) -> None:
        dtype = self.dtype(x) if isinstance(x, Ref) and x.number in self.dtypes else self.params[param].type.dtype
        access = Access(param, tuple(self.index(c) for c in coords), tuple(mask))
        self.lists[self.at].append(Store(access, x, dtype))

    def kernel(self, name: str = "kernel", **attrs: Any) -> Kernel:
        parts = {n: tuple(s) for n, s in self.lists.items() if n != "body"}
        ins = [p for p in self.params if not p.out]
        assert self.params == ins + [p for p in self.params if p.out], "declare inputs first"
        return Kernel(
            name,
            self.family,
            tuple(self.params),
            self._axes,
            tuple(self.lists["body"]),
            parts=parts,
            provides=self.provides,
            attrs=attrs,
            notes=("%1 = made by a test   test.py:1",),
        )


def run(source: Source, tensors: Sequence[torch.Tensor], sizes: dict[str, int] | None = None) -> None:
    """Run a source rendered for the interpreter on CPU tensors, in parameter order."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    sizes = sizes or {}
    path = Path(_folder.name) / f"k{next(_numbers)}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fn = InterpretedFunction(getattr(module, source.name).fn)
    index = tl.int64 if source.wide(sizes) else tl.int32
    grid = source.grid_for(sizes)
    with np.errstate(all="ignore"):
        fn[grid](*tensors, *(sizes[s] for s in source.sizes), INDEX=index, **source.constexprs)


def compiled(kernels: Sequence[Kernel]) -> list[NativeKernel]:
    """Several kernels in C++, from one file; their names must differ."""
    sources = [cpp.render(k) for k in kernels]
    library, path = build(cpp.translation_unit(sources))
    return [NativeKernel(s, library, path) for s in sources]


def interpret(
    kernel: Kernel,
    tensors: Sequence[torch.Tensor],
    sizes: dict[str, int] | None = None,
    knobs: dict[str, int] | None = None,
) -> Source:
    """Render for the interpreter and run; the source, to look at."""
    source = render(kernel, INTERPRET, knobs)
    run(source, tensors, sizes)
    return source


def gpu_kernels(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> list[Kernel]:
    """The tile programs that a GPU's passes make of a function, attention by template too."""
    graph = import_program(export_program(fn, args)).graph
    passes = [p for p in PASSES if p[0] not in CPU_ONLY]
    made = run_pipeline(graph, Options(attention="template"), passes=passes)
    return [lower(n) for n in made.nodes if n.op.name == "kernel"]


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An output nobody has written yet."""
    out = torch.empty(tuple(shape), dtype=dtype)
    return out.fill_(float("nan")) if dtype.is_floating_point else out.fill_(dtype == torch.bool or 77)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(0 if dtype == torch.uint8 else -9, 9, shape, dtype=dtype)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def check(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor | None = None, steps: int = 1) -> None:
    """Elementwise: ``steps`` roundings of terms whose magnitudes add up to ``size``, then one on store."""
    if not got.dtype.is_floating_point:
        assert torch.equal(got, want.to(got.dtype))
        return
    want = want.double()
    size = want.abs() if size is None else size.double().abs()
    unit = torch.finfo(got.dtype).eps / 2
    inner = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps / 2
    gamma = steps * inner / (1 - steps * inner)
    bound = gamma * size * (1 + unit) + unit * (1 + gamma) * want.abs() + torch.finfo(got.dtype).tiny
    wrong = (got.double() - want).abs()
    exact = (got.double() == want) | (got.isnan() & want.isnan())  # infinities, NaN
    assert bool((exact | (wrong <= bound)).all()), f"off by {(wrong / bound).nan_to_num(0).max()} bounds"


# ---------------------------------------------------------------- kernels that several tests use


def fused_kernel(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Kernel:
    """a * b + c in one kernel; b is a row, c has a's shape in any layout."""
    m, n = a.shape
    p = Program("pointwise", x0=m, x1=n)
    ins = [p.like(t) for t in (a, b, c)]
    o = p.param((m, n), a.dtype, out=True)
    prod = p.op("mul", p.load(ins[0], "x0", "x1"), p.load(ins[1], "x1"))
    p.store(o, ("x0", "x1"), p.op("add", prod, p.load(ins[2], "x0", "x1")))
    return p.kernel()


def gather_kernel(rows: int, n: int, name: str = "kernel") -> Kernel:
    """out[i, j] = table[index[i], j], with eager's bound check."""
    p = Program("pointwise", x0=n, x1=3)
    t, i = p.param((rows, 3), torch.bfloat16), p.param((n,), torch.int64)
    o = p.param((n, 3), torch.bfloat16, out=True)
    at = p.load(i, "x0")
    p.lists["body"].append(Check(at, rows, (), 'index "out" of range'))
    p.store(o, ("x0", "x1"), p.load(t, value(at.number, rows), "x1"))
    return p.kernel(name)


def fold_kernel(op: str, x: torch.Tensor, dtype: torch.dtype) -> Kernel:
    """One fold of the last dimension of a matrix."""
    m, n = x.shape
    p = Program("reduction", x0=m, r0=n)
    a, o = p.like(x), p.param((m,), dtype, out=True)
    p.store(o, ("x0",), p.fold(op, p.load(a, "x0", "r0"), dtype))
    return p.kernel()


def norm_kernel(x: torch.Tensor, w: torch.Tensor) -> Kernel:
    """Layer norm over the last dimension, and the mean: two folds, one depending on the other."""
    m, n = x.shape
    p = Program("reduction", x0=m, r0=n)
    a, b = p.like(x), p.like(w)
    o, mean_out = p.param((m, n), x.dtype, out=True), p.param((m,), torch.float32, out=True)
    v = p.cast(p.load(a, "x0", "r0"), torch.float32)
    mean = p.op("div", p.fold("sum", v), float(n))
    d = p.op("sub", v, mean)
    variance = p.op("div", p.fold("sum", p.op("mul", d, d)), float(n))
    y = p.op("mul", d, p.op("rsqrt", p.op("add", variance, 1e-5)))
    p.store(mean_out, ("x0",), mean)
    y = p.op("mul", p.cast(y, x.dtype), p.load(b, "r0"))
    p.store(o, ("x0", "r0"), y)
    return p.kernel()


def product_kernel(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, relu: bool = False) -> Kernel:
    """a @ b, batched or not, with an optional bias row and relu."""
    *batch, m, k = a.shape
    n = b.shape[-1]
    p = Program("matmul", **{f"x{i}": s for i, s in enumerate(batch)}, m=m, n=n, k=k)
    ins = [p.like(t) for t in (a, b) + ((bias,) if bias is not None else ())]
    o = p.param((*batch, m, n), a.dtype, out=True)
    xs = [f"x{i}" for i in range(len(batch))]
    p.part("a")
    p.provides["a"] = p.load(ins[0], *xs, "m", "k")
    p.part("b")
    p.provides["b"] = p.load(ins[1], *xs, "k", "n")
    p.part("body")
    p.dtypes[ACC] = a.dtype
    acc = Ref(ACC)
    if bias is not None:
        acc = p.op("add", acc, p.load(ins[2], "n"))
    if relu:
        acc = p.op("relu", acc)
    p.store(o, (*xs, "m", "n"), acc)
    return p.kernel()


def attention_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    lse: bool = True,
    **attrs: Any,
) -> Kernel:
    """Output and lse; k and v may have fewer heads than q, mask broadcasts."""
    batch, heads, m, d = q.shape
    n, e = v.shape[-2:]
    p = Program("attention", x0=batch, x1=heads, m=m, n=n, d=d, e=e)
    ins = [p.like(t) for t in (q, k, v)]
    bias = p.like(mask) if mask is not None else None
    o = p.param((batch, heads, m, e), q.dtype, out=True)
    row = p.param((batch, heads, m), torch.float32, out=True)
    group = floordiv(p.axes["x1"], heads // k.shape[1]) if heads > 1 else p.axes["x1"]
    p.part("q")
    p.provides["q"] = p.load(ins[0], "x0", "x1", "m", "d")
    p.part("k")
    p.provides["k"] = p.load(ins[1], "x0", group, "n", "d")
    p.part("v")
    p.provides["v"] = p.load(ins[2], "x0", group, "n", "e")
    p.part("score")
    p.provides["score"] = Ref(ACC)
    if bias is not None and mask is not None:
        zero = p.axes["m"] * 0
        names = ("x0", "x1", "m", "n")
        got = p.load(bias, *(zero if s == 1 else w for w, s in zip(names, mask.shape)))
        p.dtypes[ACC] = torch.float32
        if mask.dtype == torch.bool:
            p.provides["score"] = p.op("where", got, Ref(ACC), float("-inf"))
        else:
            p.provides["score"] = p.op("add", Ref(ACC), p.cast(got, torch.float32))
    p.part("body")
    p.dtypes[ACC], p.dtypes[LSE] = q.dtype, torch.float32
    p.store(o, ("x0", "x1", "m", "e"), Ref(ACC))
    if lse:
        p.store(row, ("x0", "x1", "m"), Ref(LSE))
    return p.kernel(**{"scale": 1 / math.sqrt(d), **attrs})
