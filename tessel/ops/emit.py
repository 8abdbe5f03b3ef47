"""How composites write their decomposition: ``e("add", x, y)`` appends a simpler op."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.node import Builder, Op, Value
from ..ir.types import Dim
from .common import HALVES
from .elementwise import ELEMENTWISE
from .generate import GENERATE
from .index import INDEX
from .matmul import MATMUL
from .reduce import REDUCE
from .view import VIEW

SIMPLE: dict[str, Op] = {**ELEMENTWISE, **REDUCE, **VIEW, **INDEX, **GENERATE, **MATMUL}


class Emit:
    """Appends simple ops to a builder by name; ``e.b`` is the builder."""

    def __init__(self, builder: Builder) -> None:
        self.b = builder

    def __call__(self, op: str, *args: Any, **attrs: Any) -> Value:
        return self.b.add(SIMPLE[op], *args, **attrs)

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        """``x`` in a dtype; nothing is added if it has it."""
        return x if x.dtype == dtype else self("cast", x, dtype=dtype)

    def wide(self, x: Value) -> Value:
        """Halves as f32: statistics and normalizations are computed in it."""
        return self.cast(x, wide_dtype(x.dtype))

    def reshape(self, x: Value, shape: tuple[Dim, ...]) -> Value:
        return x if x.shape == tuple(shape) else self("reshape", x, shape=shape)

    def mean(self, x: Value, dims: tuple[int, ...], count: Dim) -> Value:
        """The mean with kept dims."""
        return self("div", self("sum", x, dims=dims, keepdim=True), count)

    def drop(self, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
        """Kept dims of size 1 taken away if they are not asked for."""
        return x if keepdim else self.reshape(x, tuple(n for d, n in enumerate(x.shape) if d not in dims))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """f32 for halves, else the dtype itself."""
    return torch.float32 if dtype in HALVES else dtype


def widen(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide_dtype(x.dtype))


__all__ = ["SIMPLE", "Emit", "wide_dtype", "widen"]
