"""Hand-built tile programs, and running them in Triton's interpreter, for the tests of code generation."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tessel.codegen.source import Source
from tessel.codegen.triton import render
from tessel.ir.types import Dim, TensorType
from tessel.ops import OPS
from tessel.targets import get_target
from tessel.tiles.index import Cond, Index, var
from tessel.tiles.kernel import (
    Access,
    Axis,
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


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An output nobody has written yet."""
    out = torch.empty(tuple(shape), dtype=dtype)
    return out.fill_(float("nan")) if dtype.is_floating_point else out.fill_(dtype == torch.bool or 77)
