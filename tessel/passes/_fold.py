"""Arithmetic on constants, bit for bit what torch computes.

Only operations whose result IEEE 754 or modular arithmetic fixes are here: ``exp`` of a
constant may differ in the last bit between a vector and a scalar routine, so it is not folded.
Python numbers are used, not tensors: a compiler may run where tensors are fake.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

Number: TypeAlias = "int | float | bool"

_BITS = {torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FOLDED = frozenset((*FLOATS, *_BITS, torch.uint8, torch.bool))
_MOST_EXACT = 2**53  # larger integers are not all doubles


def rounded(x: Number, dtype: torch.dtype) -> Number | None:
    """The number as that dtype holds it, ``None`` where that is not defined or not known here.

    >>> rounded(0.1, torch.bfloat16), rounded(300, torch.uint8), rounded(-0.0, torch.float16)
    (0.10009765625, 44, -0.0)
    """
    if dtype == torch.bool:
        return x != 0
    if dtype in FLOATS:
        if isinstance(x, int) and abs(x) > _MOST_EXACT:
            return None
        return _float(float(x), dtype)
    if isinstance(x, float):
        if not math.isfinite(x) or abs(x) >= 2**31:
            return None
        x = math.trunc(x)
        if dtype == torch.uint8 and x < 0:
            return None
    if dtype == torch.uint8:
        return int(x) % 256
    if dtype not in _BITS:
        return None
    half = 1 << (_BITS[dtype] - 1)
    return (int(x) + half) % (2 * half) - half


def _float(x: float, dtype: torch.dtype) -> float:
    if dtype == torch.float64 or not math.isfinite(x):
        return x
    # torch goes from double to half through single
    with np.errstate(over="ignore", under="ignore"):
        single = np.float32(x)
        if dtype == torch.float16:
            return float(np.float16(single))
    if dtype == torch.float32 or not np.isfinite(single):
        return float(single)
    (bits,) = struct.unpack("<I", struct.pack("<f", single))
    bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


def _extreme(pick: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def fn(a: Any, b: Any) -> Any:
        if a != a or b != b:
            return math.nan
        # which zero wins is not fixed
        return None if a == b == 0 and isinstance(a, float) else pick(a, b)

    return fn


def _div(a: float, b: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float64(a) / np.float64(b))


def _logic(fn: Callable[[bool, bool], bool]) -> Callable[[Any, Any], bool]:
    return lambda a, b: fn(a != 0, b != 0)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _div,
    "neg": operator.neg,
    "abs": abs,
    "maximum": _extreme(max),
    "minimum": _extreme(min),
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "logical_and": _logic(operator.and_),
    "logical_or": _logic(operator.or_),
    "logical_xor": _logic(operator.ne),
    "logical_not": lambda a: a == 0,
    "isnan": lambda a: a != a,
    "isinf": lambda a: a in (math.inf, -math.inf),
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
    "cast": lambda a: a,
}
FOLDABLE = tuple(_FUNCTIONS)
# A bool is no number to torch here, and its arithmetic is torch's own.
_NOT_ON_BOOL = frozenset({"add", "sub", "mul", "div", "neg", "abs", "maximum", "minimum"})


def fold(op: str, args: tuple[Number, ...], operand: torch.dtype, result: torch.dtype) -> Number | None:
    """``op`` of constants of dtype ``operand``, as ``result`` holds it; ``None`` where it is not folded.

    >>> fold("add", (1.0, 2**-30), torch.float32, torch.float32)
    1.0
    """
    if operand not in FOLDED or result not in FOLDED or (operand == torch.bool and op in _NOT_ON_BOOL):
        return None
    numbers = [rounded(a, operand) for a in args]
    if any(n is None for n in numbers):
        return None
    # Whether a literal beside halves is rounded to them differs from operator to operator in torch.
    if operand in (torch.float16, torch.bfloat16) and any(a != n and a == a for a, n in zip(args, numbers)):
        return None
    try:
        got = _FUNCTIONS[op](*numbers)
    except OverflowError:
        return None
    return None if got is None else rounded(got, result)


__all__ = ["FLOATS", "FOLDABLE", "FOLDED", "Number", "fold", "rounded"]
