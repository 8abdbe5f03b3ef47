"""Reads one line of IR text: arguments, expressions, types, locations. Nothing is evaluated as Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from ..errors import TesselError, did_you_mean
from . import exprs
from .lexer import Line, Token, unquote
from .node import Value
from .types import DTYPES, NOWHERE, Loc, SymType, TensorType, Type, symbol, unbacked

_DEEPEST = 100  # nested brackets
_WORDS: dict[str, Any] = {"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan}
_RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": sympy.Lt,
    "<=": sympy.Le,
    ">": sympy.Gt,
    ">=": sympy.Ge,
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: sympy.sympify(a) / b,
    "//": lambda a, b: exprs.call("FloorDiv", a, b),
    "%": lambda a, b: exprs.call("Mod", a, b),
    "**": lambda a, b: sympy.Pow(a, b),
}


class Reader:
    """One line, read left to right."""

    def __init__(self, line: Line, values: Mapping[str, Value]) -> None:
        self.line = line
        self.tokens = line.tokens()
        self.at = 0
        self.values = values
        self.depth = 0

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def error(self, message: str, token: Token | None = None) -> TesselError:
        return self.line.error((token or self.next).column, message)

    def take(self) -> Token:
        token = self.next
        if token.kind != "end":
            self.at += 1
        return token

    def sees(self, sign: str) -> bool:
        return self.next.kind == "sign" and self.next.text == sign

    def skip(self, sign: str) -> bool:
        if self.sees(sign):
            self.at += 1
            return True
        return False

    def expect(self, sign: str) -> None:
        if not self.skip(sign):
            raise self.error(f"expected {sign!r}, found {self.next.text or 'the end of the line'!r}")

    def word(self, what: str) -> str:
        if self.next.kind != "name":
            raise self.error(f"expected {what}, found {self.next.text or 'the end of the line'!r}")
        return self.take().text

    def string(self) -> str:
        if self.next.kind != "string":
            raise self.error(f"expected a quoted string, found {self.next.text or 'the end of the line'!r}")
        token = self.take()
        try:
            return unquote(token.text)
        except ValueError as e:
            raise self.error(str(e), token) from None

    def integer(self) -> int:
        token = self.take()
        if token.kind != "number" or not token.text.isdecimal():
            raise self.error(f"expected a whole number, found {token.text!r}", token)
        return int(token.text)

    def end(self) -> None:
        if self.next.kind != "end":
            raise self.error(f"unexpected {self.next.text!r} after the end of the statement")

    # ------------------------------------------------------------ values and expressions

    def value_name(self) -> str:
        self.expect("%")
        if self.next.kind not in ("name", "number"):
            raise self.error("expected a value's name after '%'")
        return self.take().text

    def value(self) -> Value:
        token = self.next
        name = self.value_name()
        if name not in self.values:
            raise self.error(f"%{name} is not defined above this line", token)
        return self.values[name]

    def list(self, close: str, one: Callable[[], Any]) -> list[Any]:
        """``one`` separated by commas, up to and with ``close``."""
        got: list[Any] = []
        while not self.skip(close):
            got.append(one())
            if not self.skip(","):
                self.expect(close)
                break
        return got

    def arg(self) -> Any:
        """A literal, value, tuple or expression."""
        left = self.sum()
        while self.next.kind == "sign" and self.next.text in _RELATIONS:
            left = self.apply(_RELATIONS[self.next.text], self.take(), left, self.sum())
        return left

    def sum(self) -> Any:
        left = self.term()
        while self.sees("+") or self.sees("-"):
            token = self.take()
            left = self.apply(_ARITHMETIC[token.text], token, left, self.term())
        return left

    def term(self) -> Any:
        left = self.unary()
        while self.next.kind == "sign" and self.next.text in ("*", "/", "//", "%"):
            token = self.take()
            left = self.apply(_ARITHMETIC[token.text], token, left, self.unary())
        return left

    def unary(self) -> Any:
        token = self.next
        if not self.skip("-"):
            return self.power()
        x = self.nested(self.unary)
        if isinstance(x, int | float) and not isinstance(x, bool):
            return -x  # keeps -0.0
        return self.apply(lambda a, b: a * b, token, -1, x)

    def power(self) -> Any:
        base = self.atom()
        if not self.sees("**"):
            return base
        token = self.take()
        exponent = self.nested(self.unary)
        if not isinstance(base, sympy.Symbol) and isinstance(exponent, int) and abs(exponent) > 1000:
            raise self.error("the exponent is too large", token)
        return self.apply(_ARITHMETIC["**"], token, base, exponent)

    def apply(self, fn: Callable[..., Any], token: Token, *args: Any) -> Any:
        """Sympy's answer, its exceptions told with their place."""
        for a in args:
            if not isinstance(a, int | float | sympy.Basic):
                raise self.error(f"{token.text!r} needs numbers or symbols, not {type(a).__name__}", token)
        return self.sympy(lambda: exprs.plain(fn(*args)), token)

    def sympy(self, make: Callable[[], Any], token: Token) -> Any:
        try:
            got = make()
        except (ArithmeticError, TypeError, ValueError, AttributeError) as e:
            raise self.error(f"{token.text!r} cannot be worked out: {e}", token) from e
        if got is sympy.zoo:
            raise self.error("division by zero", token)
        return got

    def nested(self, read: Callable[[], Any]) -> Any:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.error(f"nested more than {_DEEPEST} deep")
        got = read()
        self.depth -= 1
        return got

    def atom(self) -> Any:
        token = self.next
        if token.kind == "number":
            self.take()
            # longer integers are refused by Python itself
            if token.text.isdecimal():
                return self.sympy(lambda: int(token.text), token)
            return float(token.text)
        if token.kind == "string":
            return self.string()
        if token.kind == "name":
            return self.named()
        if self.sees("%"):
            return self.value()
        if self.skip("("):
            return self.nested(self.bracket)
        if self.skip("?"):
            return unbacked(self.word("a symbol's name"))
        if self.skip("!"):
            return symbol(self.word("a symbol's name"))
        raise self.error(f"expected an argument, found {token.text or 'the end of the line'!r}")

    def bracket(self) -> Any:
        """After ``(``: a tuple, or one argument in brackets."""
        if self.skip(")"):
            return ()
        first = self.arg()
        if self.skip(")"):
            return first
        self.expect(",")
        return (first, *self.list(")", self.arg))

    def named(self) -> Any:
        token = self.take()
        name = token.text
        if name in _WORDS:
            return _WORDS[name]
        if name in DTYPES:
            return DTYPES[name]
        if name == "torch":
            return self.torch_name()
        if not self.skip("("):
            return unbacked(name) if exprs.is_unbacked_name(name) else symbol(name)
        args = self.nested(lambda: self.list(")", self.arg))
        if name == "complex":
            return self.sympy(lambda: complex(*args), token)
        return self.sympy(lambda: exprs.call(name, *args), token)

    def torch_name(self) -> Any:
        self.expect(".")
        token = self.next
        name = self.word("a name of torch")
        if name == "device":
            self.expect("(")
            text = self.string()
            self.expect(")")
            try:
                return torch.device(text)
            except RuntimeError as e:
                raise self.error(f"{text!r} is no torch device: {e}", token) from None
        got = getattr(torch, name, None)
        if not isinstance(got, torch.dtype | torch.layout | torch.memory_format):
            raise self.error(f"torch.{name} is no dtype, layout or memory format", token)
        return got

    # ------------------------------------------------------------ types and lines

    def size(self) -> Any:
        token = self.next
        got = self.sum()
        if not isinstance(got, int | sympy.Expr) or isinstance(got, bool):
            raise self.error(f"expected a size, found {got!r}", token)
        return got

    def type(self) -> Type:
        token = self.next
        name = self.word("a type")
        if name == "torch":
            dtype = self.torch_name()
        elif name == "sym":
            self.expect("[")
            got = self.size()
            self.expect("]")
            return SymType(got)
        else:
            dtype = DTYPES.get(name)
        if not isinstance(dtype, torch.dtype):
            raise self.error(f"unknown dtype {name!r}; {did_you_mean(name, DTYPES)}", token)
        self.expect("[")
        shape = self.list("]", self.size)
        strides = self.list(">", self.size) if self.skip("<") else None
        if strides is not None and len(strides) != len(shape):
            raise self.error(f"{len(shape)} sizes but {len(strides)} strides", token)
        return TensorType(shape, dtype, strides, self.device() if self.skip("@") else None)

    def device(self) -> str:
        if self.next.kind == "string":
            return self.string()
        name = self.word("a device")
        # "cuda:0" joins; "cpu: ..." does not occur, a type ends its line's left side
        if self.sees(":") and self.tokens[self.at + 1].kind == "number":
            self.take()
            name += f":{self.integer()}"
        return name

    def loc(self) -> Loc:
        if not self.skip("@"):
            return NOWHERE
        text = self.string()
        if not self.skip(":"):
            return Loc(module=text)
        return Loc(text, self.integer(), self.string() if self.next.kind == "string" else "")

    def attrs(self, positional: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and attributes, after ``(``."""
        args: list[Any] = []
        attrs: dict[str, Any] = {}

        def one() -> None:
            token = self.next
            if token.kind == "name" and self.tokens[self.at + 1].text == "=":
                self.take()
                self.take()
                if token.text in attrs:
                    raise self.error(f"attribute {token.text!r} is given twice", token)
                attrs[token.text] = self.arg()
            elif attrs or not positional:
                raise self.error("expected an attribute: name=value", token)
            else:
                args.append(self.arg())

        self.list(")", one)
        return tuple(args), attrs
