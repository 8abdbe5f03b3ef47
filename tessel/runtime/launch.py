"""Kernels made callable: ``launcher(grid, *args)`` on a GPU, or through Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from ..codegen.sizes import HELPERS, size_text
from ..codegen.source import INT32_LIMIT, Source
from ..errors import TesselError
from .modules import execute, place

__all__ = ["Interpreted", "Launcher", "interpreting", "load"]

OUT_OF_RANGE = "index out of range in self"


def load(source: Source, directory: Path) -> Launcher | Interpreted:
    """Write a rendered kernel to ``directory`` and make it callable.

    The result is called with the grid, a tensor for every parameter and then the kernel's sizes.
    """
    path = place(source.name, source.text, directory)
    fn = execute(source.text, path)[source.name]
    if source.interpret:
        return Interpreted(source, path, fn)
    twin = load(source.twin, directory) if source.twin is not None else None
    return Launcher(source, path, fn, twin)


class Launcher:
    """Launches on a GPU.

    Triton finds out at every launch which variant of the kernel the arguments need. Here the compiled
    variant is kept by what that depends on: alignment of the pointers, size and divisibility of the integers.
    A kernel with descriptors gives a call whose tensors do not start at a multiple of 16 bytes to its ``twin``.
    """

    def __init__(self, source: Source, path: Path, fn: Any, twin: Callable[..., None] | None = None) -> None:
        self.source, self.path, self.fn, self.twin = source, path, fn, twin
        self.tensors = len(source.args) - len(source.sizes)
        self.wide = _wide_rule(source)
        self.options = dict(source.constexprs)
        self.tiles = [source.constexprs.get(n) for n in fn.arg_names[len(source.args) :]]
        self.index_at = fn.arg_names[len(source.args) :].index("INDEX")
        if source.checks:
            self.options |= {"debug": True, "sanitize_overflow": False}
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        if 0 in grid:
            return
        tensors, sizes = args[: self.tensors], args[self.tensors :]
        if self.source.described:
            if self.twin is not None and any(tensors[i].data_ptr() & 15 for i in self.source.described):
                self.twin(grid, *args)
                return
            triton.set_allocator(_scratch)  # descriptors lie in memory; the setting is the calling thread's
        if torch.version.hip:  # there variants depend on more than this
            index = tl.int64 if self.wide(*sizes) else tl.int32
            self.fn[grid](*args, INDEX=index, **self.options)
            return
        key = (
            *[t.data_ptr() & 15 == 0 for t in tensors],
            *[(n == 1, n & 15 == 0, n > INT32_LIMIT) for n in sizes],
            self.wide(*sizes),
            tensors[0].device.index,
        )
        variant = self.compiled.get(key)
        if variant is None:
            index = tl.int64 if self.wide(*sizes) else tl.int32
            # compiles, or finds in Triton's cache, and launches
            kernel = self.fn[grid](*args, INDEX=index, **self.options)
            tail = list(self.tiles)
            tail[self.index_at] = index
            self.compiled[key] = (kernel, tail)
            return
        kernel, tail = variant
        kernel[(*grid, 1, 1)[:3]](*args, *tail)


def _scratch(size: int, align: int, stream: int | None) -> torch.Tensor:
    """Memory in which a kernel makes its descriptors. Torch's allocator aligns to 512 bytes, ``align`` is 128."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Interpreted:
    """Runs a kernel through Triton's interpreter; tensors are on the CPU."""

    def __init__(self, source: Source, path: Path, fn: Any) -> None:
        self.source, self.path = source, path
        self.tensors = len(source.args) - len(source.sizes)
        self.wide = _wide_rule(source)
        self.fn = InterpretedFunction(fn.fn)
        # These configure a compiler; the interpreter has none.
        self.options = {k: v for k, v in source.constexprs.items() if k not in ("num_warps", "num_stages")}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        if 0 in grid:
            return
        index = tl.int64 if self.wide(*args[self.tensors :]) else tl.int32
        try:
            self.fn[grid](*args, INDEX=index, **self.options)
        except triton.runtime.errors.InterpreterError as e:
            cause: BaseException | None = e
            while cause is not None:
                if isinstance(cause, IndexError | AssertionError):
                    raise IndexError(OUT_OF_RANGE) from None
                if isinstance(cause, TypeError) and "0-dimensional arrays" in str(cause):
                    raise TesselError(
                        f"the interpreter of Triton {triton.__version__} does not work with numpy {np.__version__}: "
                        "install Triton 3.7 or numpy 2.3"
                    ) from e
                cause = cause.__cause__
            raise


def interpreting() -> AbstractContextManager[Any]:
    """Around calls of interpreted kernels: numpy says nothing about what eager is silent about."""
    return np.errstate(all="ignore")


def _wide_rule(source: Source) -> Callable[..., bool]:
    """Whether offsets need 64 bits, as a function of the sizes handed to the kernel."""
    if source.always_wide or not source.extents:
        return lambda *sizes: source.always_wide
    tests = " or ".join(f"{size_text(e, whole=True)} > {INT32_LIMIT}" for e in source.extents)
    return eval(f"lambda {', '.join(source.sizes)}: {tests}", dict(HELPERS))  # type: ignore[no-any-return]
