"""Words of generated C++: types, literals, conversions and size expressions.

Values of f16 and bf16 are held in float and rounded where they are stored or cast, as in Triton
kernels; in memory they are 16-bit words, and booleans are bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import sympy
import torch

from ...errors import TesselError, check
from ...ir.types import Dim
from .. import dialect
from ..dialect import compute_dtype

__all__ = ["cast", "identity", "literal", "loaded", "memory_type", "size_text", "stored", "value_type"]

_TYPES: dict[torch.dtype, str] = {
    torch.float64: "double",
    torch.float32: "float",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_HALVES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_WORD = torch.iinfo(torch.int32)


def value_type(dtype: torch.dtype) -> str:
    """The type a value is computed in.

    Raises:
        TesselError: C++ kernels have no such values.
    """
    wide = compute_dtype(dtype)
    if (dtype not in _HALVES and wide not in _TYPES) or (wide != dtype and dtype not in _HALVES):
        raise TesselError(f"{dtype} has no C++ type; keep the operator as a library call")
    return _TYPES[wide]


def memory_type(dtype: torch.dtype) -> str:
    """The type of an element in memory."""
    value_type(dtype)
    return "u16" if dtype in _HALVES else "u8" if dtype == torch.bool else _TYPES[dtype]


def loaded(text: str, dtype: torch.dtype) -> str:
    """An element as a value."""
    if dtype in _HALVES:
        return f"from_{_HALVES[dtype]}({text})"
    return f"({text} != 0)" if dtype == torch.bool else text


def stored(text: str, dtype: torch.dtype) -> str:
    """A value as an element."""
    return f"to_{_HALVES[dtype]}({text})" if dtype in _HALVES else text


def cast(text: str, source: torch.dtype, to: torch.dtype) -> str:
    """A value of dtype ``source`` converted as ``Tensor.to`` does."""
    if source == to:
        return text
    have, want = value_type(source), value_type(to)
    if want == "bool":
        return f"({text} != 0)"
    if have != want:
        text = f"converted<{want}>({text})"
    return f"round_{_HALVES[to]}({text})" if to in _HALVES else text


def literal(value: Any, dtype: torch.dtype) -> str:
    """A number as a value of ``dtype``.

    >>> literal(0.5, torch.bfloat16), literal(float("-inf"), torch.float64), literal(3, torch.int64)
    ('0.5f', '(double)-INF', '(i64)3')
    """
    type_ = value_type(dtype)
    if isinstance(value, sympy.Basic):
        if not value.is_number:
            return f"converted<{type_}>({_number(value)})"
        value = int(value) if value.is_integer else float(value)
    if type_ == "bool":
        return "true" if value else "false"
    if type_ in ("float", "double"):
        return _real(float(value), type_)
    info = torch.iinfo(dtype)
    n = int(value)
    if not info.min <= n <= info.max:  # wraps, as a cast to the dtype does
        n = (n - info.min) % (info.max - info.min + 1) + info.min
    if n == torch.iinfo(torch.int64).min:
        return "(-9223372036854775807 - 1)"
    return f"({type_}){n}" if n >= 0 else f"({type_})({n})"


def _real(value: float, type_: str) -> str:
    if math.isnan(value):
        return f"({type_})NAN_"
    if type_ == "float":
        value = float(torch.tensor(value, dtype=torch.float32))
    if math.isinf(value):
        return f"({type_}){'-' if value < 0 else ''}INF"
    text = repr(value)
    if not any(c in text for c in ".e"):
        text += ".0"
    text += "f" if type_ == "float" else ""
    return text if math.copysign(1.0, value) > 0 else f"({text})"


def identity(op: str, dtype: torch.dtype) -> str:
    """What a fold of no elements is."""
    return literal(dialect.identity(op, dtype), dtype)


@lru_cache(maxsize=20000)
def size_text(d: Dim) -> str:
    """A whole-number size expression as C++.

    >>> s = sympy.Symbol("s0", integer=True, positive=True)
    >>> size_text(2 * s + 1), size_text(s * (s + 1) / 2), size_text(2**40)
    ('(1 + 2 * s0)', '((s0 * (1 + s0)) / 2)', '1099511627776')

    Raises:
        TesselError: the expression has no integer form in a kernel.
    """
    text = dialect.size_text(d).replace(" // ", " / ")
    check("tl." not in text, lambda: f"the size {d} has no whole-number form in C++")
    return text


def _number(x: sympy.Basic) -> str:
    """A size expression as a value: whole where it is whole, else a double."""
    if x.is_integer:
        return size_text(x)
    text = sympy.ccode(x)
    check("Not supported" not in text, lambda: f"the expression {x} has no form in C++")
    for fn in ("sqrt", "exp", "log", "pow", "fabs", "floor", "ceil"):
        text = text.replace(f"{fn}(", f"__builtin_{fn}(")
    return text
