"""Index expressions against plain arithmetic on every point of small loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from tessel.ir.types import Dim, contiguous_strides, substitute, symbol, unbacked
from tessel.tiles import index as ix
from tessel.tiles.index import Atom, Cond, Index, constant, delinearize, exact_div, linearize, nonnegative, var
from tessel.tiles.places import reshape_coords

S, T = symbol("s"), symbol("t")
VALUES = {"s": 3, "t": 4}
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(1, 6)
dims = st.one_of(sizes, st.sampled_from([S, T, 2 * S, S * T, S + 1, 4 * T]))


@cache
def number(d: Dim) -> int:
    return substitute(d, VALUES)


def value_of(a: Index, point: dict[str, int]) -> int:
    """The index at a point, by definition."""
    total = number(a.const)
    for atom, c in a.terms:
        if atom.arg is None:
            got = point[atom.name]
        else:
            inner, n = value_of(atom.arg, point), number(atom.n)
            got = inner // n if atom.kind == "div" else inner % n
        total += number(c) * got
    return total


def points(extents: dict[str, Dim]) -> Iterator[dict[str, int]]:
    for at in itertools.product(*(range(number(e)) for e in extents.values())):
        yield dict(zip(extents, at, strict=True))


def variables(extents: dict[str, Dim]) -> list[Index]:
    return [var(n, e) for n, e in extents.items()]


def same(a: Index, b: object, extents: dict[str, Dim]) -> None:
    for p in points(extents):
        want = b(p) if callable(b) else value_of(b, p)  # type: ignore[arg-type]
        assert value_of(a, p) == want, f"{a} at {p} is {value_of(a, p)}, should be {want}"


@st.composite
def affine(draw: st.DrawFn, extents: dict[str, Dim]) -> Index:
    total = constant(draw(st.integers(-7, 7)))
    for v in variables(extents):
        total = total + v * draw(st.one_of(st.integers(-4, 8), st.sampled_from([S, 2 * S, S * T, -S])))
    return total


@st.composite
def extents(draw: st.DrawFn) -> dict[str, Dim]:
    return {n: draw(dims) for n in "ijk"[: draw(st.integers(1, 3))]}


@QUICK
@given(st.data())
def test_floordiv_and_mod_are_floors(data: st.DataObject) -> None:
    ext = data.draw(extents())
    a = data.draw(affine(ext))
    for _ in range(3):  # of what came out, too
        n = data.draw(st.one_of(st.integers(1, 12), st.sampled_from([S, T, 2 * S, S * T])))
        q, r = ix.floordiv(a, n), ix.mod(a, n)
        same(q, lambda p, a=a, n=n: value_of(a, p) // number(n), ext)
        same(r, lambda p, a=a, n=n: value_of(a, p) % number(n), ext)
        same(q * n + r, a, ext)
        a = data.draw(st.sampled_from([q, r, q + r, q * 2 + 1, r * -1 + 3]))


@QUICK
@given(st.data())
def test_bounds_hold(data: st.DataObject) -> None:
    ext = data.draw(extents())
    a = ix.floordiv(data.draw(affine(ext)), data.draw(sizes)) + ix.mod(data.draw(affine(ext)), data.draw(sizes))
    got = ix.bounds(a)
    cond = Cond(a, data.draw(st.integers(-3, 0)), data.draw(st.integers(1, 40)))
    n = data.draw(dims)
    for p in points(ext):
        x = value_of(a, p)
        assert got is None or number(got[0]) <= x <= number(got[1])
        assert not cond.always() or cond.low <= x < cond.high  # type: ignore[operator]
        assert not ix.less(a, n) or 0 <= x < number(n)


@QUICK
@given(st.lists(dims, min_size=1, max_size=4))
def test_coordinates_of_a_flat_index_come_back(shape: Sequence[Dim]) -> None:
    total = sympy.expand(math.prod(shape))
    x = var("x", int(total) if total.is_Integer else total)
    coords = delinearize(x, shape)
    ext = {"x": total}
    strides = contiguous_strides(shape)
    plain = [number(s) for s in strides]
    for p in points(ext):
        at = [value_of(c, p) for c in coords]
        assert all(0 <= c < number(n) for c, n in zip(at, shape, strict=True))
        assert sum(c * s for c, s in zip(at, plain, strict=True)) == value_of(x, p)
    assert linearize(coords, strides) == x, "a row-major layout is one index again"


@QUICK
@given(st.data())
def test_any_layout_of_coordinates(data: st.DataObject) -> None:
    ext = data.draw(extents())
    shape = list(ext.values())
    flat = linearize(variables(ext), contiguous_strides(shape))
    back = delinearize(flat, shape)
    assert list(back) == variables(ext)
    strides = [data.draw(st.one_of(st.integers(-3, 9), st.sampled_from([S, T]))) for _ in shape]
    total = linearize(back, strides)
    same(total, lambda p: sum(p[n] * number(s) for n, s in zip(ext, strides, strict=True)), ext)


@QUICK
@given(st.data())
def test_substitution_evaluates_and_simplifies(data: st.DataObject) -> None:
    ext = data.draw(extents())
    a = ix.floordiv(data.draw(affine(ext)), 4) * 3 + ix.mod(data.draw(affine(ext)), data.draw(st.sampled_from([2, S])))
    (n, e), *_ = ext.items()
    new = var("z", e) * -1 + (e - 1)  # a flip
    got = ix.substitute(a, lambda atom: new if atom.name == n else None)
    for p in points(ext):
        assert value_of(got, {**p, "z": number(e) - 1 - p[n]}) == value_of(a, p)
    fixed = ix.substitute(a, lambda atom: constant(0))
    assert fixed.terms == () or not fixed.variables()


@QUICK
@given(st.data())
def test_reshapes_there_and_back(data: st.DataObject) -> None:
    parts = [data.draw(dims) for _ in range(data.draw(st.integers(1, 4)))]

    def grouped(label: str) -> list[Dim]:
        cuts = [data.draw(st.booleans(), label=label) for _ in parts[1:]]
        shape: list[Dim] = [parts[0]]
        for p, cut in zip(parts[1:], cuts, strict=True):
            if cut:
                shape.append(p)
            else:
                got = sympy.expand(shape[-1] * p)
                shape[-1] = int(got) if got.is_Integer else got
        return shape

    old, new = grouped("old"), grouped("new")
    ext = {f"x{i}": n for i, n in enumerate(new)}
    coords = [var(n, e) for n, e in ext.items()]
    inner = reshape_coords(old, new, tuple(coords))
    flat_old, flat_new = ([number(s) for s in contiguous_strides(sh)] for sh in (old, new))
    for p in points(ext):
        where = sum(value_of(c, p) * s for c, s in zip(inner, flat_old, strict=True))
        assert where == sum(value_of(c, p) * s for c, s in zip(coords, flat_new, strict=True))
    assert list(reshape_coords(new, old, inner)) == coords


@QUICK
@given(st.data())
def test_text_evaluates_to_the_index(data: st.DataObject) -> None:
    ext = data.draw(extents())
    a = ix.mod(ix.floordiv(data.draw(affine(ext)), data.draw(sizes)), data.draw(sizes)) + data.draw(affine(ext))
    for p in points(ext):
        assert eval(ix.render(a), {**p, **VALUES}) == value_of(a, p), ix.render(a)


def test_what_recombines() -> None:
    x = var("x", 4 * S)
    for whole in (x, x + 3, x * 5):
        q, r = ix.floordiv(whole, S), ix.mod(whole, S)
        assert q * S + r == whole
        assert (q * S + r) * 7 == whole * 7
    q, r = ix.floordiv(x, 4), ix.mod(x, 4)
    assert q * 8 + r * 2 + 5 == x * 2 + 5
    assert q + r != x and q * 5 + r != x
    middle = ix.mod(ix.floordiv(x, 2), 4) * 2 + ix.mod(x, 2)
    assert middle == ix.mod(x, 8)


def test_padding_keeps_negatives_right() -> None:
    x = var("x", 10)
    same(ix.floordiv(x + -3, 4), lambda p: (p["x"] - 3) // 4, {"x": 10})
    same(ix.mod(x + -3, 4), lambda p: (p["x"] - 3) % 4, {"x": 10})
    assert not ix.less(x + -3, 10) and ix.less(x * -1 + 9, 10)
    assert ix.floordiv(x * 4 + -4, 4) == x + -1


def test_values_read_from_memory_are_kept_in_their_range() -> None:
    v = ix.value(3, 8)
    assert ix.bounds(v) == (0, 7) and ix.floordiv(v, 8) == constant(0) and v.variables() == set()
    assert ix.substitute(v, lambda a: constant(2) if a.kind == "value" else None) == constant(2)
    assert v.atoms() == {Atom("value", "3", None, 8)}


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        (12, 4, 3), (12, 5, None), (0, 7, 0), (5, 0, None), (8 * S, 4, 2 * S), (8 * S, 3, None),
        (S * S, S, S), (S, S * S, None), (S * T + S, S, T + 1), (S, T, None), (S + 1, 2, None),
        (S * (S + 1), 2, None), (4 * sympy.floor((S + 1) / 2), 2, 2 * sympy.floor((S + 1) / 2)),
        (sympy.floor(S / 2), sympy.floor(S / 2), 1), (0, S, 0), (5, S, None), (-6 * S, 3, -2 * S),
    ],
)  # fmt: skip
def test_exact_div(a: Dim, b: Dim, want: Dim | None) -> None:
    assert exact_div(a, b) == want


@pytest.mark.parametrize(
    ("d", "want"),
    [
        (0, True), (-1, False), (S - 1, True), (S - 2, False), (S * T - S, True), (S * T - 2, False),
        (2 * S - T, False), (-S, False), (S * S - 2 * S + 1, True), (sympy.floor(S / 2), True),
        (sympy.floor(S / 2) - 1, False), (unbacked("u0"), False), (unbacked("u0") ** 2, True),
        (S - unbacked("u0"), False),
    ],
)  # fmt: skip
def test_nonnegative_never_claims_too_much(d: Dim, want: bool) -> None:
    assert nonnegative(d) is want
