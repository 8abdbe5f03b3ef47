"""Words of the IR text: tokens with their columns, quoted strings, errors that show the line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import TesselError

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r]+ | \#.*)
  | (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<number>(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)? | \d+)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<sign>\*\*|//|<=|>=|:=|[-+*/%()\[\]<>,:=@.?!])
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:u\{([0-9a-fA-F]{1,6})\}|(.))", re.DOTALL)
_SHORT = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
_LONG = {v: f"\\{k}" for k, v in _SHORT.items()}


@dataclass(frozen=True, slots=True)
class Token:
    """``kind`` is string, number, name, sign or end; ``column`` counts from 1."""

    kind: str
    text: str
    column: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the text and its number, counted from 1."""

    number: int
    text: str

    def error(self, column: int, message: str) -> TesselError:
        """The exception that names the place and shows it."""
        return TesselError(
            f"line {self.number}, column {column}: {message}\n    {self.text}\n    {' ' * (column - 1)}^"
        )

    def tokens(self) -> list[Token]:
        """The line in tokens, ``end`` last. Raises ``TesselError`` at a character that starts none."""
        found: list[Token] = []
        at = 0
        while at < len(self.text):
            m = _TOKEN.match(self.text, at)
            if m is None:
                what = "a string without its end" if self.text[at] == '"' else f"unexpected {self.text[at]!r}"
                raise self.error(at + 1, what)
            if m.lastgroup != "space":
                found.append(Token(m.lastgroup or "", m.group(), at + 1))
            at = m.end()
        found.append(Token("end", "", at + 1))
        return found


def quote(s: str) -> str:
    r"""The string in double quotes, on one line whatever it holds.

    >>> print(quote('a "b"\u2028'))
    "a \"b\"\u{2028}"
    """
    return '"' + "".join(_LONG.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in s) + '"'


def unquote(text: str) -> str:
    """The string that ``quote`` wrote. Raises ``ValueError`` at an escape that it does not know."""

    def one(m: re.Match[str]) -> str:
        if m.group(1):
            return chr(int(m.group(1), 16))
        if m.group(2) not in _SHORT:
            raise ValueError(f"unknown escape \\{m.group(2)}")
        return _SHORT[m.group(2)]

    return _ESCAPE.sub(one, text[1:-1])
