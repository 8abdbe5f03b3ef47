"""Words of the Triton language: dtypes, literals, size expressions, and what the interpreter lacks.

Values of f16 and bf16 are held in f32 (``compute_dtype``); they are widened as they are loaded and
rounded where they are stored or cast. Triton's interpreter truncates instead of rounding to bf16
and cannot call ``@triton.jit`` functions, so for it the same names stand for plain functions
(``templates/folds.triton.j2``).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import sympy
import torch

from ..errors import TesselError
from ..ir.types import Dim

# Triton's name of a dtype, and its name in a kernel's signature.
_NAMES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("tl.float64", "fp64"),
    torch.float32: ("tl.float32", "fp32"),
    torch.float16: ("tl.float16", "fp16"),
    torch.bfloat16: ("tl.bfloat16", "bf16"),
    torch.float8_e4m3fn: ("tl.float8e4nv", "fp8e4nv"),
    torch.float8_e5m2: ("tl.float8e5", "fp8e5"),
    torch.int64: ("tl.int64", "i64"),
    torch.int32: ("tl.int32", "i32"),
    torch.int16: ("tl.int16", "i16"),
    torch.int8: ("tl.int8", "i8"),
    torch.uint64: ("tl.uint64", "u64"),
    torch.uint32: ("tl.uint32", "u32"),
    torch.uint16: ("tl.uint16", "u16"),
    torch.uint8: ("tl.uint8", "u8"),
    torch.bool: ("tl.int1", "i1"),
}
_F32_MAX = float(torch.finfo(torch.float32).max)
_F32_TINY = float(torch.finfo(torch.float32).tiny)


def triton_dtype(dtype: torch.dtype) -> str:
    """Triton's name, for example ``tl.float32``.

    Raises:
        TesselError: Triton has no such type.
    """
    if dtype not in _NAMES:
        raise TesselError(f"{dtype} has no Triton type; keep the operator as a library call")
    return _NAMES[dtype][0]


def pointer_type(dtype: torch.dtype) -> str:
    """The type of a pointer argument in a signature, for example ``*bf16``."""
    triton_dtype(dtype)
    return "*" + _NAMES[dtype][1]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a value of ``dtype`` is held in: f32 for every narrower float."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def widen(text: str, dtype: torch.dtype, interpret: bool) -> str:
    """A loaded ``dtype`` value as its compute dtype."""
    wide = compute_dtype(dtype)
    if wide == dtype:
        return text
    if interpret and dtype == torch.bfloat16:
        return f"from_bf16({text})"
    return f"{text}.to({triton_dtype(wide)})"


def narrow(text: str, dtype: torch.dtype, interpret: bool) -> str:
    """A compute value rounded to what memory holds."""
    if compute_dtype(dtype) == dtype:
        return text
    if interpret and dtype == torch.bfloat16:
        return f"to_bf16({text})"
    return f"{text}.to({triton_dtype(dtype)})"


def rounded(text: str, dtype: torch.dtype, interpret: bool) -> str:
    """A compute value rounded to ``dtype`` and widened again: what an explicit cast means."""
    if compute_dtype(dtype) == dtype:
        return text
    return widen(narrow(text, dtype, interpret), dtype, interpret)


def cast(text: str, source: torch.dtype, to: torch.dtype, interpret: bool) -> str:
    """``text`` (a tensor) of dtype ``source`` converted as ``Tensor.to`` does."""
    if source == to:
        return text
    held, wide = compute_dtype(source), compute_dtype(to)
    if held != wide:
        text = f"{text}.to({triton_dtype(wide)})"
    return rounded(text, to, interpret)


def literal(value: Any, dtype: torch.dtype, typed: bool, shape: str = "") -> str:
    """A number as an operand beside values of ``dtype``.

    A bare number adopts the dtype of the other operand of an infix operator; ``typed`` makes
    a tensor of the compute dtype, for functions and where there is no other operand (``shape``
    says which, a scalar if empty). Size expressions are always typed.

    >>> literal(0.5, torch.bfloat16, False), literal(float("-inf"), torch.float64, False)
    ('0.5', 'float("-inf")')
    >>> literal(2, torch.float16, True)
    'tl.full([], 2.0, tl.float32)'
    """
    wide = compute_dtype(dtype)
    if isinstance(value, sympy.Basic):
        if value.is_number:
            value = int(value) if value.is_integer else float(value)
        else:
            text = _expression(value)[0]
            return f"tl.full([{shape}], {text}, {triton_dtype(wide)})"
    if wide == torch.bool:
        text = str(bool(value))
    elif wide.is_floating_point:
        value = float(value)
        if wide == torch.float32 and math.isfinite(value) and abs(value) > _F32_MAX:
            value = float(torch.tensor(value, dtype=torch.float32))
        text = repr(value) if math.isfinite(value) else f'float("{value}")'
        # Triton takes a bare number for f32 where it fits; be exact where it would not be.
        plain = not math.isfinite(value) or value == 0 or _F32_TINY <= abs(value) <= _F32_MAX
        exact = wide == torch.float32 or not math.isfinite(value) or _as_f32(value) == value
        typed = typed or not plain or not exact
    else:
        info = torch.iinfo(wide)
        number = int(value)
        if not info.min <= number <= info.max:  # wraps, as a cast to the dtype does
            number = (number - info.min) % (info.max - info.min + 1) + info.min
        text = str(number)
    return f"tl.full([{shape}], {text}, {triton_dtype(wide)})" if typed else text


def _as_f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def identity(op: str, dtype: torch.dtype) -> Any:
    """What a masked-off element counts as in a reduction over values of ``dtype``."""
    if op == "sum":
        return 0
    if op == "prod":
        return 1
    if op in ("any", "all"):
        return op == "all"
    low = op in ("amax", "argmax")
    if dtype == torch.bool:
        return not low
    if dtype.is_floating_point:
        return -math.inf if low else math.inf
    return torch.iinfo(dtype).min if low else torch.iinfo(dtype).max


# ---------------------------------------------------------------- sizes


@lru_cache(maxsize=20000)
def size_text(d: Dim) -> str:
    """An integer size expression as source text, the same in Python and in a kernel.

    >>> s = sympy.Symbol("s0", integer=True, positive=True)
    >>> size_text(2 * s + 1), size_text(s * (s + 1) / 2), size_text(sympy.floor(s / 4))
    ('(1 + 2 * s0)', '((s0 * (1 + s0)) // 2)', '(s0 // 4)')

    Raises:
        TesselError: the expression has no integer form in a kernel.
    """
    if isinstance(d, int):
        return str(d) if d >= 0 else f"({d})"
    text, whole = _expression(d)
    if not whole:
        raise TesselError(f"the size {d} is not provably a whole number: it cannot be used as an index")
    return text


def _expression(x: sympy.Basic) -> tuple[str, bool]:
    """Text of an expression, bracketed, and whether it is an integer; the others are in f64."""
    if x.is_Integer:
        return size_text(int(x)), True  # type: ignore[call-overload]
    if x.is_number and x.is_real:
        return f"tl.full([], {float(x)!r}, tl.float64)", False  # type: ignore[arg-type]
    if isinstance(x, sympy.Symbol):
        return x.name, True
    if isinstance(x, sympy.floor | sympy.ceiling):
        top, bottom = sympy.fraction(sympy.together(x.args[0]))
        (a, whole), (b, divisor_whole) = _expression(top), _expression(bottom)
        if whole and divisor_whole:
            if isinstance(x, sympy.ceiling):
                a = f"({a} + {b} - 1)"
            if not (top.is_nonnegative and bottom.is_positive):
                a = f"({a} - {_floor_mod(a, b)})"  # in a kernel // truncates: make it exact
            return f"({a} // {b})", True
        fn = "tl.floor" if isinstance(x, sympy.floor) else "tl.ceil"
        return f"{fn}({_real(x.args[0])}).to(tl.int64)", True
    if isinstance(x, sympy.Mod):
        a, b = x.args
        p, q = _expression(a)[0], _expression(b)[0]
        return (f"({p} % {q})" if a.is_nonnegative and b.is_positive else _floor_mod(p, q)), True
    if isinstance(x, sympy.Max | sympy.Min):
        fn = "max" if isinstance(x, sympy.Max) else "min"
        texts = [_expression(a) for a in x.args]
        text = texts[0][0]
        for t, _ in texts[1:]:
            text = f"{fn}({text}, {t})"
        return text, all(w for _, w in texts)
    if isinstance(x, sympy.Add):
        parts = [_expression(a) for a in x.args]
        whole = all(w for _, w in parts)
        if not whole and x.is_integer:
            top, bottom = sympy.fraction(sympy.together(x))
            return f"({_expression(top)[0]} // {_expression(bottom)[0]})", True
        terms = [(t[1:-1] if whole and a.is_Mul and "//" not in t else t) for (t, _), a in zip(parts, x.args)]
        return "(" + " + ".join(terms if whole else [_real(a) for a in x.args]) + ")", whole
    if isinstance(x, sympy.Mul):
        top, bottom = sympy.fraction(x)
        if bottom != 1:
            if x.is_integer or _even_product(top, bottom):
                return f"({_expression(top)[0]} // {_expression(bottom)[0]})", True
            return f"({_real(top)} / {_real(bottom)})", False
        parts = [_expression(a) for a in x.args]
        whole = all(w for _, w in parts)
        return "(" + " * ".join(t if whole else _real(a) for (t, _), a in zip(parts, x.args)) + ")", whole
    if isinstance(x, sympy.Pow):
        base, exp = x.args
        if exp.is_Integer and 0 < int(exp) <= 8 and (base_text := _expression(base))[1]:  # type: ignore[call-overload]
            return "(" + " * ".join([base_text[0]] * int(exp)) + ")", True  # type: ignore[call-overload]
        if exp == -1:
            return f"(1.0 / {_real(base)})", False
        if exp in (sympy.Rational(1, 2), sympy.Rational(-1, 2)):
            root = f"tl.sqrt({_real(base)})"
            return (root if exp > 0 else f"(1.0 / {root})"), False
        return f"tl.exp2({_real(exp)} * tl.log2({_real(base)}))", False
    for fn, name in ((sympy.exp, "tl.exp"), (sympy.log, "tl.log"), (sympy.Abs, "tl.abs")):
        if isinstance(x, fn):
            return f"{name}({_real(x.args[0])})", False
    raise TesselError(f"the expression {x} ({type(x).__name__}) has no form in a kernel")


def _even_product(top: sympy.Expr, bottom: sympy.Expr) -> bool:
    """``s * (s + 1) / 2`` is whole, which sympy does not see."""
    if bottom != 2:
        return False
    factors = list(top.args) if isinstance(top, sympy.Mul) else [top]
    return any(sympy.expand(a - b) in (1, -1) for a in factors for b in factors)


def _floor_mod(a: str, b: str) -> str:
    """The remainder with the sign of ``b``, whether ``%`` truncates (a kernel) or floors (Python)."""
    return f"(({a} % {b} + {b}) % {b})"


def _real(x: sympy.Basic) -> str:
    text, whole = _expression(x)
    return f"tl.cast({text}, tl.float64)" if whole else text


__all__ = [
    "cast",
    "compute_dtype",
    "identity",
    "literal",
    "narrow",
    "pointer_type",
    "rounded",
    "size_text",
    "triton_dtype",
    "widen",
]
