"""Size expressions: one normal form, exact text, and their value once the symbols are known.

The normal form is plain sympy (``floor``, ``Mod``, ``Max`` ...). Expressions that arrive in
torch's own classes (``FloorDiv``, ``ModularIndexing`` ...) are brought to it by ``normal``, so
that equal sizes from different sources compare equal.

    >>> s, u = sympy.Symbol("s0", integer=True, positive=True), sympy.Symbol("u0", integer=True)
    >>> expr_text((s + 1) // 2 * u - 8)
    'u0*((s0+1)//2)-8'
    >>> evaluate((s + 1) // 2, {"s0": 7})
    4
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

from ..errors import TesselError, check
from .types import DTYPES

Plain: TypeAlias = "int | float | bool | sympy.Basic"


def _floor(x: Any) -> Any:
    """floor of one fraction: sympy keeps ``floor(s/2 + 1/2)``, people read ``(s+1)//2``."""
    top, bottom = sympy.fraction(sympy.together(sympy.sympify(x)))
    return sympy.floor(top / bottom)


def _trunc(x: Any) -> Any:
    return sympy.Piecewise((_floor(x), sympy.Ge(x, 0)), (sympy.ceiling(x), True))


# Every function that text may name, and how it is made. The second half are torch's classes.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floor": _floor,
    "ceiling": sympy.ceiling,
    "Mod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Abs": sympy.Abs,
    "sign": sympy.sign,
    "exp": sympy.exp,
    "log": sympy.log,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "Eq": sympy.Eq,
    "Ne": sympy.Ne,
    "And": sympy.And,
    "Or": sympy.Or,
    "Not": sympy.Not,
    "Piecewise": sympy.Piecewise,
    "FloorDiv": lambda a, b: _floor(sympy.sympify(a) / b),
    "CleanDiv": lambda a, b: _floor(sympy.sympify(a) / b),
    "CeilDiv": lambda a, b: -_floor(-sympy.sympify(a) / b),
    "ModularIndexing": lambda a, d, m: sympy.Mod(_floor(sympy.sympify(a) / d), m),
    "PythonMod": sympy.Mod,
    "IntTrueDiv": lambda a, b: sympy.sympify(a) / b,
    "FloatTrueDiv": lambda a, b: sympy.sympify(a) / b,
    "ToFloat": lambda x: sympy.Float(1.0) * x,
    "FloorToInt": _floor,
    "CeilToInt": sympy.ceiling,
    "TruncToInt": _trunc,
    "TruncToFloat": _trunc,
    "FloatPow": sympy.Pow,
    "PowByNatural": sympy.Pow,
    "LShift": lambda a, n: a * sympy.Pow(2, n),
    "RShift": lambda a, n: _floor(sympy.sympify(a) / sympy.Pow(2, n)),
    "Where": lambda c, a, b: sympy.Piecewise((a, c), (b, True)),
    "Identity": lambda x: x,
    "OpaqueUnaryFn_sqrt": sympy.sqrt,
    "OpaqueUnaryFn_exp": sympy.exp,
    "OpaqueUnaryFn_log": sympy.log,
    "OpaqueUnaryFn_sin": sympy.sin,
    "OpaqueUnaryFn_cos": sympy.cos,
    "OpaqueUnaryFn_tan": sympy.tan,
}


def call(name: str, *args: Any) -> Plain:
    """The function of that name applied; an unknown one stays a name that cannot be evaluated."""
    made = FUNCTIONS.get(name)
    return plain(made(*args) if made else sympy.Function(name)(*args))


def plain(x: Any) -> Plain:
    """A Python number where the expression is one; rationals stay exact."""
    if not isinstance(x, sympy.Basic):
        return x
    if x.is_Integer:
        return int(x)  # type: ignore[call-overload]
    if x.is_Float or x in (sympy.oo, -sympy.oo, sympy.nan):
        return float(x)  # type: ignore[arg-type]
    if x in (sympy.true, sympy.false):
        return bool(x)
    return x


@lru_cache(maxsize=100_000, typed=True)
def normal(x: Any) -> Plain:
    """The expression in plain sympy, rebuilt from its leaves; a constant becomes a Python number.

    What is printed is this form, and parsing builds it again.
    """
    if not isinstance(x, sympy.Basic) or not x.args:
        return plain(x)
    args = [normal(a) for a in x.args]
    name = type(x).__name__
    if name in FUNCTIONS:
        return call(name, *args)
    return plain(x.func(*args))


# ---------------------------------------------------------------- text

_UNBACKED = re.compile(r"u\d+$")
_NAME = re.compile(r"[A-Za-z_]\w*$")
RESERVED = frozenset({"None", "True", "False", "inf", "nan", "complex", "torch", *DTYPES})
_RELATIONS = {"StrictLessThan": "<", "LessThan": "<=", "StrictGreaterThan": ">", "GreaterThan": ">="}
# How tightly text binds: a relation, a sum, a product, a power, a name.
_REL, _SUM, _MUL, _POW, _ATOM = range(5)


def is_unbacked_name(name: str) -> bool:
    """Whether a bare name in text is an unbacked symbol (``u0``); ``?n`` and ``!u0`` say otherwise."""
    return _UNBACKED.match(name) is not None


@lru_cache(maxsize=100_000, typed=True)
def expr_text(x: Any) -> str:
    """The text of a size or condition, without spaces; ``parse_graph`` reads it back.

    Symbols are positive sizes, save names such as ``u0``, which are unbacked. ``?n`` is an
    unbacked symbol and ``!u0`` a positive one where the name alone would say otherwise.

    Raises:
        TesselError: the expression holds something that text has no form for.
    """
    return _text(normal(x))[0]


def _wrap(x: Any, least: int) -> str:
    text, binds = _text(x)
    return text if binds >= least else f"({text})"


def _text(x: Any) -> tuple[str, int]:
    """The text and how tightly it binds."""
    x = plain(x)
    if isinstance(x, bool):
        return str(x), _ATOM
    if isinstance(x, int | float):
        text = repr(x)
        # -0.0 and -inf start with a sign too
        return text, _MUL if text.startswith("-") else _ATOM
    if isinstance(x, sympy.Symbol):
        return _symbol_text(x), _ATOM
    if isinstance(x, sympy.Rational):
        return f"{x.p}/{x.q}", _MUL
    if isinstance(x, sympy.Add):
        terms = [_wrap(t, _MUL) for t in x.as_ordered_terms()]
        return "".join(t if i == 0 or t.startswith("-") else f"+{t}" for i, t in enumerate(terms)), _SUM
    if isinstance(x, sympy.Mul | sympy.Pow):
        return _product_text(x)
    return _function_text(x)


def _symbol_text(x: sympy.Symbol) -> str:
    name = x.name
    check(_NAME.match(name), lambda: f"the symbol {name!r} cannot be written: its name is not an identifier")
    backed = bool(x.is_positive)
    if name in RESERVED or backed == is_unbacked_name(name):
        return f"!{name}" if backed else f"?{name}"
    return name


def _product_text(x: sympy.Expr) -> tuple[str, int]:
    sign = ""
    over: list[str] = []
    under: list[str] = []
    for f in x.as_ordered_factors():
        if f.is_Rational and not f.is_Integer:
            sign = "-" if f.p < 0 else sign
            if abs(f.p) != 1:
                over.insert(0, str(abs(f.p)))
            under.append(str(f.q))
        elif f.is_Integer or f.is_Float:
            text = repr(plain(f))
            if text.startswith("-"):
                sign, text = "-", text[1:]
            if text != "1":
                over.insert(0, text)
        elif f.is_Pow and f.exp.is_Integer and f.exp < 0:
            under.append(_wrap(f.base if f.exp == -1 else sympy.Pow(f.base, -f.exp), _POW))
        elif f.is_Pow:
            over.append(f"{_wrap(f.base, _ATOM)}**{_wrap(f.exp, _ATOM)}")
        else:
            over.append(_wrap(f, _POW))
    text = sign + "*".join(over or ["1"]) + "".join(f"/{d}" for d in under)
    return text, _MUL if sign or under or len(over) > 1 else _POW


def _function_text(x: sympy.Basic) -> tuple[str, int]:
    name = type(x).__name__
    if name == "floor":
        top, bottom = sympy.fraction(sympy.together(x.args[0]))
        if bottom != 1:
            return f"{_wrap(top, _POW)}//{_wrap(bottom, _POW)}", _MUL
    if name == "Mod":
        return f"{_wrap(x.args[0], _POW)}%{_wrap(x.args[1], _POW)}", _MUL
    if name in _RELATIONS:
        return f"{_wrap(x.args[0], _SUM)}{_RELATIONS[name]}{_wrap(x.args[1], _SUM)}", _REL
    if name == "Piecewise":
        return f"Piecewise({','.join(f'({_text(e)[0]},{_text(c)[0]})' for e, c in x.args)})", _ATOM
    name = {"Equality": "Eq", "Unequality": "Ne"}.get(name, name)
    known = name in FUNCTIONS or isinstance(x, sympy.Function)
    check(known and x.args, lambda: f"the expression {x} cannot be written: no text form for {name}")
    args = [_text(a)[0] for a in x.args]
    if name in ("Max", "Min", "And", "Or"):
        args.sort()  # sympy keeps these as sets
    return f"{name}({','.join(args)})", _ATOM


# ---------------------------------------------------------------- values


def evaluate(x: Any, values: Mapping[str, Any]) -> int | float | bool:
    """The number (or truth) of an expression under values of its symbols.

    Raises:
        TesselError: a symbol has no value, or the expression has none.
    """
    if not isinstance(x, sympy.Basic):
        return x
    missing = sorted(s.name for s in x.free_symbols if s.name not in values)
    check(not missing, lambda: f"{expr_text(x)}: no value is known for {', '.join(missing)}")
    return _evaluate(x, tuple(sorted((s.name, values[s.name]) for s in x.free_symbols)))


@lru_cache(maxsize=100_000)
def _evaluate(x: sympy.Basic, values: tuple[tuple[str, Any], ...]) -> int | float | bool:
    table = dict(values)
    got = normal(x.xreplace({s: sympy.sympify(table[s.name]) for s in x.free_symbols}))
    if isinstance(got, sympy.Expr) and got.is_number and got.is_real:
        got = float(got)
    if isinstance(got, sympy.Basic):
        raise TesselError(f"{expr_text(x)} has no value at {table}")
    return got


def evaluate_size(x: Any, values: Mapping[str, Any]) -> int:
    """Like ``evaluate``, for a size: the value must be a whole number."""
    got = evaluate(x, values)
    check(isinstance(got, int), lambda: f"{expr_text(x)} is {got}, which is not a whole number")
    return int(got)


__all__ = [
    "FUNCTIONS",
    "RESERVED",
    "call",
    "evaluate",
    "evaluate_size",
    "expr_text",
    "is_unbacked_name",
    "normal",
    "plain",
]
