"""Types of the tensor IR: shapes that may be symbolic, dtypes, strides, devices.

A type is a frozen value. Sizes are Python ints where they are known and sympy
expressions over positive integer symbols where they are not.

    >>> import torch
    >>> t = TensorType((symbol("s0"), 128), torch.float32)
    >>> str(t)
    'f32[s0,128]'
    >>> t.numel
    128*s0
    >>> t.strides
    (128, 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TypeAlias

import sympy
import torch

Dim: TypeAlias = "int | sympy.Expr"

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "b1",
    torch.complex32: "c32",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.float8_e4m3fnuz: "f8e4m3fnuz",
    torch.float8_e5m2fnuz: "f8e5m2fnuz",
    torch.float8_e8m0fnu: "f8e8m0",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@cache
def symbol(name: str) -> sympy.Symbol:
    """The IR's symbol of that name: a positive integer, one object per name."""
    return sympy.Symbol(name, integer=True, positive=True)


@cache
def unbacked(name: str) -> sympy.Symbol:
    """A symbol whose value is read from a tensor while the program runs: an integer of any sign."""
    return sympy.Symbol(name, integer=True)


def simplify_dim(d: Dim) -> Dim:
    """An int where the expression is a constant, else the expanded expression."""
    if isinstance(d, int):
        return d
    d = sympy.expand(d)
    return int(d) if d.is_Integer else d


def dim_equal(a: Dim, b: Dim) -> bool:
    """Whether two sizes are provably the same.

    >>> s = symbol("s0")
    >>> dim_equal(2 * s, s + s), dim_equal(s, 2)
    (True, False)
    """
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a is b or a == b or sympy.expand(a - b) == 0


def try_divide(a: Dim, b: Dim) -> Dim | None:
    """The exact quotient of two sizes, ``None`` where ``b`` is not known to divide ``a``."""
    if isinstance(a, int) and isinstance(b, int):
        return (a // b if a % b == 0 else None) if b != 0 else None
    if b == 1:
        return a
    if dim_equal(a, b):
        return 1
    quotient = simplify_dim(sympy.cancel(sympy.sympify(a) / b))
    if isinstance(quotient, int) or quotient.is_integer:
        return quotient
    return None


def product(dims: Iterable[Dim]) -> Dim:
    """The product of sizes, an int where all are ints."""
    return simplify_dim(prod(dims))


def contiguous_strides(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Row-major strides in elements; a size 0 or 1 counts as 1, as in torch.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides: list[Dim] = []
    step: Dim = 1
    for size in reversed(shape):
        strides.append(step)
        if not (isinstance(size, int) and size <= 1):
            step = simplify_dim(step * size)
    return tuple(reversed(strides))


def substitute(d: Dim, values: Mapping[str, int]) -> int:
    """The size with every symbol replaced by its value.

    Raises ``KeyError`` if a symbol has no value.
    """
    if isinstance(d, int):
        return d
    got = d.subs({s: values[s.name] for s in d.free_symbols})
    return int(got)


def symbols_of(dims: Iterable[object]) -> set[str]:
    """Names of all symbols in some sizes (things that are not expressions have none)."""
    return {s.name for d in dims if isinstance(d, sympy.Basic) for s in d.free_symbols}


@dataclass(frozen=True, slots=True, init=False)
class TensorType:
    """Shape, dtype, strides (elements) and device of a tensor.

    Args:
        shape: sizes, each an int or a sympy expression.
        dtype: a torch dtype.
        strides: in elements; row-major if not given.
        device: ``None`` means the graph's own device; anything else (``"cpu"`` for a
            host scalar in a GPU graph) is said.
    """

    shape: tuple[Dim, ...]
    dtype: torch.dtype
    strides: tuple[Dim, ...]
    device: str | None

    def __init__(
        self,
        shape: Sequence[Dim],
        dtype: torch.dtype,
        strides: Sequence[Dim] | None = None,
        device: str | None = None,
    ) -> None:
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "dtype", dtype)
        strides = contiguous_strides(self.shape) if strides is None else tuple(strides)
        object.__setattr__(self, "strides", strides)
        object.__setattr__(self, "device", device)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        return product(self.shape)

    @property
    def nbytes(self) -> Dim:
        """Bytes of the elements (holes of a strided layout not counted)."""
        return simplify_dim(self.numel * self.dtype.itemsize)

    @property
    def contiguous(self) -> bool:
        """Row-major, sizes of 1 ignored."""
        want = contiguous_strides(self.shape)
        return all(
            dim_equal(s, w) or (isinstance(n, int) and n <= 1)
            for n, s, w in zip(self.shape, self.strides, want, strict=True)
        )

    def with_(self, **changes: object) -> TensorType:
        """A copy with some fields replaced; a new shape drops the strides unless they are given too."""
        if "shape" in changes and "strides" not in changes:
            changes["strides"] = None
        fields = {"shape": self.shape, "dtype": self.dtype, "strides": self.strides, "device": self.device}
        return TensorType(**{**fields, **changes})  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = f"{DTYPE_NAMES[self.dtype]}[{','.join(dim_text(d) for d in self.shape)}]"
        if self.strides != contiguous_strides(self.shape):
            text += f"<{','.join(dim_text(d) for d in self.strides)}>"
        if self.device is not None:
            text += f"@{self.device}"
        return text


@dataclass(frozen=True, slots=True)
class SymType:
    """A host integer, known to the graph as a sympy expression (a size that arrives as an argument)."""

    expr: Dim

    def __str__(self) -> str:
        return f"sym[{dim_text(self.expr)}]"


Type: TypeAlias = "TensorType | SymType"


def dim_text(d: Dim) -> str:
    """A size as text without spaces, so that types stay one word."""
    from .exprs import expr_text

    return expr_text(d)


@dataclass(frozen=True, slots=True)
class Loc:
    """Where a node comes from: the user's file and line, and the module path.

    >>> str(Loc("model.py", 12, "layers.0.mlp"))
    'model.py:12 in layers.0.mlp'
    """

    file: str = ""
    line: int = 0
    module: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file and self.line else self.file
        return " in ".join(p for p in (where, self.module) if p) or "(no location)"

    @property
    def short(self) -> str:
        """The same with the file of an installed package named from the package on.

        >>> Loc("/usr/lib/python3/site-packages/pkg/model.py", 3).short
        'pkg/model.py:3'
        """
        return str(Loc(self.file.rpartition("site-packages/")[2], self.line, self.module))


NOWHERE = Loc()

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "NOWHERE",
    "Dim",
    "Loc",
    "SymType",
    "TensorType",
    "Type",
    "contiguous_strides",
    "dim_equal",
    "dim_text",
    "product",
    "simplify_dim",
    "substitute",
    "symbol",
    "symbols_of",
    "try_divide",
    "unbacked",
]
