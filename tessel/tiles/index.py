"""Integer index expressions over loop variables, kept in one simple normal form.

An ``Index`` is affine in atoms: loop variables, values loaded from memory, and floor
divisions and remainders of other indices. Every atom has a known range, so that
``(128*i + j) // 128`` is ``i`` when ``j < 128``, and a flat index that was taken apart
into coordinates comes back together when the layout is contiguous.

    >>> x = var("x", 8 * 128)
    >>> i, j = delinearize(x, (8, 128))
    >>> print(i, "|", j)
    x // 128 | x % 128
    >>> print(linearize((i, j), (128, 1)))
    x
    >>> print(linearize((j, i), (8, 1)))
    x // 128 + (x % 128) * 8
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy

from ..ir.types import Dim, simplify_dim


@dataclass(frozen=True, slots=True)
class Atom:
    """One non-affine piece.

    Attributes:
        kind: ``var`` (a loop variable), ``value`` (a value of the kernel body used as an
            index), ``div`` or ``mod``.
        name: of a ``var``; of a ``value`` its statement number as text.
        arg: the divided index of ``div`` and ``mod``.
        n: the extent of ``var`` and ``value`` (values are 0 .. n-1), else the divisor.
    """

    kind: str
    name: str
    arg: Index | None
    n: Dim


@dataclass(frozen=True, slots=True)
class Index:
    """``sum(coefficient * atom) + const``; build with the functions below."""

    terms: tuple[tuple[Atom, Dim], ...] = ()
    const: Dim = 0

    def __str__(self) -> str:
        return render(self)

    def __add__(self, other: Index | Dim) -> Index:
        return add(self, other if isinstance(other, Index) else constant(other))

    def __mul__(self, factor: Dim) -> Index:
        return scale(self, factor)

    def atoms(self) -> set[Atom]:
        """All atoms, those inside divisions and remainders too."""
        found: set[Atom] = set()
        stack = [self]
        while stack:
            for atom, _ in stack.pop().terms:
                if atom not in found:
                    found.add(atom)
                    if atom.arg is not None:
                        stack.append(atom.arg)
        return found

    def variables(self) -> set[str]:
        """Names of the loop variables it depends on (values loaded are not followed)."""
        return {a.name for a in self.atoms() if a.kind == "var"}


def constant(value: Dim) -> Index:
    return Index((), simplify_dim(value))


def var(name: str, extent: Dim) -> Index:
    """A loop variable running over ``0 .. extent-1`` (a variable of extent 1 is 0)."""
    return constant(0) if extent == 1 else Index(((Atom("var", name, None, extent), 1),))


def value(number: int, extent: Dim) -> Index:
    """The body's value ``number`` used as an index, known to lie in ``0 .. extent-1``."""
    return Index(((Atom("value", str(number), None, extent), 1),))


def _make(terms: dict[Atom, Dim], const: Dim) -> Index:
    kept = tuple((a, c) for a, c in terms.items() if c != 0)
    return Index(kept, const) if len(kept) < 2 else _recombine(dict(kept), const)


def add(a: Index, b: Index) -> Index:
    """``a + b`` in normal form; quotients and remainders of one thing by one number are put together again."""
    terms = dict(a.terms)
    for atom, c in b.terms:
        terms[atom] = simplify_dim(terms.get(atom, 0) + c)
    return _make(terms, simplify_dim(a.const + b.const))


def scale(a: Index, factor: Dim) -> Index:
    """``a * factor``; the factor may be a symbolic size."""
    if isinstance(factor, int) and factor == 0:
        return constant(0)
    return Index(tuple((t, simplify_dim(c * factor)) for t, c in a.terms), simplify_dim(a.const * factor))


@lru_cache(maxsize=65536)
def exact_div(a: Dim, b: Dim) -> Dim | None:
    """``a / b`` if that is an integer for all values of the symbols, else ``None``.

    >>> s = sympy.Symbol("s", integer=True, positive=True)
    >>> exact_div(12, 4), exact_div(12, 5), exact_div(8 * s, 4), exact_div(s * s, s)
    (3, None, 2*s, s)
    """
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if b == 0:
        return None
    quotient = sympy.cancel(sympy.sympify(a) / b)
    if sympy.fraction(sympy.together(quotient))[1] != 1:
        return None
    return simplify_dim(quotient)


@lru_cache(maxsize=65536)
def nonnegative(d: Dim) -> bool:
    """Whether a size expression is provably >= 0, its symbols being >= 1 (>= 0 is not assumed for less)."""
    if isinstance(d, int):
        return d >= 0
    free = d.free_symbols
    if not all(s.is_positive for s in free):
        return bool(d.is_nonnegative)
    shifted = sympy.expand(d.subs({s: s + 1 for s in free}))
    return all(c.is_nonnegative for c in shifted.as_coefficients_dict().values()) and (
        shifted.is_polynomial(*free) or bool(d.is_nonnegative)
    )


@lru_cache(maxsize=65536)
def bounds(a: Index) -> tuple[Dim, Dim] | None:
    """Smallest and largest value, or ``None`` where a coefficient has no provable sign."""
    lo: Dim = a.const
    hi: Dim = a.const
    for atom, c in a.terms:
        got = _atom_bounds(atom)
        if got is None:
            return None
        low, high = got
        if nonnegative(c):
            lo, hi = lo + c * low, hi + c * high
        elif nonnegative(-c):
            lo, hi = lo + c * high, hi + c * low
        else:
            return None
    return simplify_dim(lo), simplify_dim(hi)


def _atom_bounds(atom: Atom) -> tuple[Dim, Dim] | None:
    if atom.kind != "div":
        return 0, simplify_dim(atom.n - 1)
    assert atom.arg is not None
    inner = bounds(atom.arg)
    if inner is None or not nonnegative(inner[0]):
        return None
    lo, hi = inner
    if isinstance(atom.n, int) and isinstance(lo, int) and isinstance(hi, int):
        return lo // atom.n, hi // atom.n
    top = exact_div(simplify_dim(hi + 1), atom.n)
    return 0, simplify_dim(top - 1) if top is not None else hi


def less(a: Index, n: Dim) -> bool:
    """Whether ``0 <= a < n`` is provable."""
    got = bounds(a)
    return got is not None and nonnegative(got[0]) and nonnegative(simplify_dim(n - 1 - got[1]))


def _split(a: Index, n: Dim) -> tuple[Index, Index]:
    """``(q, r)`` with ``a == n*q + r``: the terms that ``n`` divides, and the rest."""
    q: dict[Atom, Dim] = {}
    r: dict[Atom, Dim] = {}
    for atom, c in a.terms:
        d = exact_div(c, n)
        if d is None:
            r[atom] = c
        else:
            q[atom] = d
    rest = _make(r, a.const)
    moved = _multiples(rest, n)
    return _make(q, moved), rest + simplify_dim(-moved * n)


def _multiples(rest: Index, n: Dim) -> Dim:
    """How many ``n`` to take off so that what stays is >= 0 and small.

    Generated code divides as C does, which is floor division only from zero up.
    """
    got = bounds(rest)
    if got is None:
        return 0
    low = got[0]
    if isinstance(low, int) and isinstance(n, int):
        return low // n
    whole = sympy.div(low, n)[0] if sympy.sympify(n).is_polynomial() and sympy.sympify(low).is_polynomial() else 0
    for q in (whole, whole - 1):
        q = simplify_dim(sympy.sympify(q))
        if (isinstance(q, int) or q.is_integer) and nonnegative(simplify_dim(low - q * n)):
            return q
    return 0


@lru_cache(maxsize=65536)
def floordiv(a: Index, n: Dim) -> Index:
    """``a // n`` (floor) for ``n >= 1``."""
    if n == 1:
        return a
    q, r = _split(a, n)
    if less(r, n):
        return q
    if q.terms or q.const != 0:
        return q + floordiv(r, n)
    if len(a.terms) == 1 and a.const == 0 and a.terms[0][1] == 1:
        atom = a.terms[0][0]
        if atom.kind == "div":
            assert atom.arg is not None
            return floordiv(atom.arg, simplify_dim(atom.n * n))
        if atom.kind == "mod" and (outer := exact_div(atom.n, n)) is not None:
            assert atom.arg is not None
            return mod(floordiv(atom.arg, n), outer)
    return Index(((Atom("div", "", a, n), 1),))


@lru_cache(maxsize=65536)
def mod(a: Index, n: Dim) -> Index:
    """``a % n`` (sign of ``n``) for ``n >= 1``."""
    if n == 1:
        return constant(0)
    _, r = _split(a, n)
    if less(r, n):
        return r
    if len(r.terms) == 1 and r.const == 0 and r.terms[0][1] == 1:
        atom = r.terms[0][0]
        if atom.kind == "mod" and exact_div(atom.n, n) is not None:
            assert atom.arg is not None
            return mod(atom.arg, n)
    return Index(((Atom("mod", "", r, n), 1),))


def _recombine(terms: dict[Atom, Dim], const: Dim) -> Index:
    """Undo a division and its remainder: ``n*c*(e // n) + c*(e % n)`` is ``c*e``."""
    changed = True
    while changed:
        changed = False
        for low, c in list(terms.items()):
            if low.kind != "mod":
                continue
            assert low.arg is not None
            want = simplify_dim(c * low.n)
            for high, ch in list(terms.items()):
                if high is low or simplify_dim(ch - want) != 0:
                    continue
                whole = _whole(high, low)
                if whole is None:
                    continue
                del terms[low], terms[high]
                for atom, k in whole.terms:
                    terms[atom] = simplify_dim(terms.get(atom, 0) + k * c)
                const = simplify_dim(const + whole.const * c)
                terms = {a: k for a, k in terms.items() if k != 0}
                changed = True
                break
            if changed:
                break
    return Index(tuple(sorted(terms.items(), key=_order)), const)


def _whole(high: Atom, low: Atom) -> Index | None:
    """The index whose quotient by ``low.n`` is ``high`` and whose remainder is ``low``, if there is one."""
    e, n = low.arg, low.n
    assert e is not None
    quotient = floordiv(e, n)
    if quotient.terms == ((high, 1),) and quotient.const == 0:
        return e
    if high.kind == "mod":
        assert high.arg is not None
        rest = high.arg + scale(quotient, -1)
        if len(rest.terms) == len(high.arg.terms) - len(quotient.terms):
            # n*((rest + e//n) % m) + e % n is (n*rest + e) % (n*m)
            return mod(scale(rest, n) + e, simplify_dim(n * high.n))
    return None


def _order(item: tuple[Atom, Dim]) -> tuple[int, str]:
    return ({"var": 0, "value": 1, "div": 2, "mod": 3}[item[0].kind], str(item[0]))


def delinearize(flat: Index, shape: Sequence[Dim]) -> tuple[Index, ...]:
    """The row-major coordinates of a flat index below the product of ``shape``."""
    coords: list[Index] = []
    step: Dim = 1
    for axis in range(len(shape) - 1, -1, -1):
        c = floordiv(flat, step)
        step = simplify_dim(step * shape[axis])
        outermost = all(isinstance(n, int) and n == 1 for n in shape[:axis])
        coords.append(c if outermost or less(c, shape[axis]) else mod(c, shape[axis]))
    return tuple(reversed(coords))


def linearize(coords: Sequence[Index], strides: Sequence[Dim]) -> Index:
    """``sum(coordinate * stride)``."""
    total = constant(0)
    for c, s in zip(coords, strides, strict=True):
        total = total + scale(c, s)
    return total


def substitute(a: Index, replace: Callable[[Atom], Index | None]) -> Index:
    """The index with some ``var`` and ``value`` atoms replaced, simplified again."""
    total = constant(a.const)
    for atom, c in a.terms:
        if atom.arg is None:
            new = replace(atom) or Index(((atom, 1),))
        else:
            inner = substitute(atom.arg, replace)
            new = (floordiv if atom.kind == "div" else mod)(inner, atom.n)
        total = total + scale(new, c)
    return total


def render(a: Index, name: Callable[[Atom], str] = lambda atom: atom.name, div: str = "//") -> str:
    """Source text, valid in Python, Triton (``div='//'``) and C++ (``div='/'``, indices being >= 0)."""
    parts: list[str] = []
    for atom, c in a.terms:
        if atom.arg is None:
            text = name(atom)
        else:
            inner = render(atom.arg, name, div)
            if len(atom.arg.terms) != 1 or atom.arg.const != 0 or atom.arg.terms[0][1] != 1 or "%" in inner:
                inner = f"({inner})"
            text = f"{inner} {div if atom.kind == 'div' else '%'} {factor_text(atom.n)}"
        if c == 1:
            parts.append(f"({text})" if atom.arg is not None and len(a.terms) > 1 and atom.kind == "mod" else text)
        else:
            parts.append(f"({text}) * {factor_text(c)}" if atom.arg is not None else f"{text} * {factor_text(c)}")
    if a.const != 0 or not parts:
        parts.append(factor_text(a.const))
    return " + ".join(parts)


def factor_text(d: Dim) -> str:
    """A size as a factor: bracketed where it is a sum, a product or negative."""
    text = str(d)
    return text if (isinstance(d, int) and d >= 0) or text.isidentifier() else f"({text})"


@dataclass(frozen=True, slots=True)
class Cond:
    """``low <= index < high``; a missing bound is not tested."""

    index: Index
    low: Dim | None
    high: Dim | None

    def always(self) -> bool:
        """Whether it is provably true."""
        got = bounds(self.index)
        if got is None:
            return self.low is None and self.high is None
        return (self.low is None or nonnegative(simplify_dim(got[0] - self.low))) and (
            self.high is None or nonnegative(simplify_dim(self.high - 1 - got[1]))
        )


__all__ = [
    "Atom",
    "Cond",
    "Index",
    "bounds",
    "constant",
    "delinearize",
    "exact_div",
    "floordiv",
    "less",
    "linearize",
    "mod",
    "nonnegative",
    "render",
    "scale",
    "substitute",
    "value",
    "var",
]
