"""Rows of keys and values that are not in memory as attention wants them: concatenated, or packed in few bits.

A concatenation along the rows is taken apart, so that a row asks once where it comes from: recent tokens of a cache are
then read where they lie. Packed ones (``ops/cache.py``) are unpacked row by row; where they lie in their blocks as
``templates/attention_packed.hpp`` takes them, a few queries are multiplied with the codes themselves.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir.types import Dim, dim_equal
from ...tiles.hidden import closure
from ...tiles.index import Cond, Index, constant, scale, substitute, var
from ...tiles.kernel import Axis, Compute, IndexOf, Kernel, Load, Ref, Stmt, Test, indices_of
from .expr import Emitter
from .space import Space, cut
from .text import simd
from .words import cast, size_text

__all__ = ["Rows", "computed_row", "packs", "rows_apart"]

_LANES = 16  # of the vectors that pairs of bf16 are multiplied in
_SAMPLES = 48  # places at which a packed operand's addresses are compared with its layout


@dataclass(frozen=True)
class Rows:
    """Some rows of an operand.

    Attributes:
        when: what tells them from the rows of later pieces; empty for the last piece.
        stmts: what computes them, and no others.
        value: of an element.
    """

    when: tuple[Cond, ...]
    stmts: tuple[Stmt, ...]
    value: Ref


def rows_apart(stmts: Iterable[Stmt], value: Ref, lane: str) -> list[Rows]:
    """The pieces of a concatenation, first to last; one piece of anything else."""
    stmts = tuple(closure(stmts, [value.number])[0])
    made = {s.out: s for s in stmts if hasattr(s, "out")}
    last = made[value.number]
    if not isinstance(last, Compute) or last.op != "where":
        return [Rows((), stmts, value)]
    chosen, first, rest = last.args
    test = made[chosen.number] if isinstance(chosen, Ref) else None
    if not isinstance(test, Test) or len(test.conds) != 1 or not isinstance(first, Ref) or not isinstance(rest, Ref):
        return [Rows((), stmts, value)]
    (cond,) = test.conds
    if cond.low is not None or lane in cond.index.variables():
        return [Rows((), stmts, value)]
    inside = tuple(_known(s, cond, True) for s in closure(stmts, [first.number])[0])
    beyond = tuple(_known(s, cond, False) for s in closure(stmts, [rest.number])[0])
    return [Rows((cond,), inside, first), *rows_apart(beyond, rest, lane)]


def _known(stmt: Stmt, cond: Cond, holds: bool) -> Stmt:
    """A load without the conditions that this one, which holds or does not, decides."""
    if not isinstance(stmt, Load):
        return stmt
    mask = []
    for c in stmt.access.mask:
        if c.index == cond.index and holds and c.high is not None and dim_equal(c.high, cond.high):
            c = replace(c, high=None)
        if c.index == cond.index and not holds and c.low is not None and dim_equal(c.low, cond.high):
            c = replace(c, low=None)
        if not c.always():
            mask.append(c)
    return replace(stmt, access=replace(stmt.access, mask=tuple(mask)))


def computed_row(
    kernel: Kernel, space: Space, rows: Rows, lane: Axis, known: Iterable[str]
) -> tuple[list[str], list[str], Emitter]:
    """Lines before the loop over a row's elements, the loop, which writes them to ``to``, and what wrote the lines."""
    stmts, value = rows.stmts, rows.value
    last = next(s for s in stmts if getattr(s, "out", None) == value.number)
    if isinstance(last, Compute) and last.op == "cast" and last.arg_dtype == torch.float32:
        assert isinstance(last.args[0], Ref)
        stmts, value = tuple(s for s in stmts if s is not last), last.args[0]  # what writes an element rounds it
    axes, place = cut(lane, [space.at(i) for s in stmts for i in indices_of(s)])
    e = Emitter(kernel, replace(space, place={**space.place, lane.name: place}))
    e.nest(known, [a.name for a in axes])
    for s in stmts:
        e.emit(s)
    text, dims, dtype = e.values[value.number]
    at, more = e.affine(place)
    e.line(f"put(to + {at}, {cast(text, dtype, torch.float32)});", dims | more | {a.name for a in axes})
    lines: list[str] = []
    for axis, block in zip(reversed(axes), reversed(e.blocks[1:]), strict=True):
        head = f"for (i64 {axis.name} = 0; {axis.name} < {size_text(axis.extent)}; ++{axis.name}) {{"
        pragma = [] if lines else [simd({})]
        lines = [*pragma, head, *("  " + line for line in [*block, *lines]), "}"]
    return list(e.blocks[0]), lines, e


# ---------------------------------------------------------------- codes that are multiplied as they are


def packs(kernel: Kernel, space: Space, rows: Rows, lane: Axis, batch: list[str], known: list[str]) -> dict[str, Any]:
    """What ``attention_packed.hpp`` is told of packed keys (``lane`` d) or values (e); empty where it has no form.

    Args:
        batch: lines that give the coordinates of a head, ``known``.
    """
    found, n = _parts(kernel, rows), kernel.axis("n")
    if found is None or (rows.when and rows.when[0].index != var("n", n.extent)):
        return {}
    words, by, low, bits, shift = found
    shape = kernel.params[words.access.param].type.shape
    scales = [kernel.params[x.access.param].type for x in (by, low)]
    width, keys = lane.extent, lane.name == "d"
    per = 32 // bits
    sizes = (width, *shape[3:], *scales[0].shape[3:])
    if not all(isinstance(n, int) for n in sizes) or scales[0] != scales[1] or scales[0].dtype != torch.float16:
        return {}
    length, group = (shape[4], 1) if keys else (shape[3] * per, width // scales[0].shape[3])
    fits = width % (per if keys else 32) == 0 and width % _LANES == 0 and length % _LANES == 0
    if not fits or (not keys and group % 32):
        return {}
    tokens = rows.when[0].high if rows.when else n.extent
    assert tokens is not None

    def expected(row: int, c: int) -> tuple[int, int, int]:
        """Offsets of the word and the scale in their block, and the shift."""
        t, code = row % length, c if keys else row % length
        place = code % per // 2 * bits + code % 2 * 16
        if keys:
            return c // per * length + t, c, place
        return t // per * width + c, c // group * length + t, place

    draw = random.Random(0)
    most = tokens if isinstance(tokens, int) else 3 * length
    for _ in range(_SAMPLES):
        row, c = draw.randrange(most), draw.randrange(width)  # type: ignore[arg-type]
        here, start = {"n": row, lane.name: c}, {"n": row // length * length, lane.name: 0}
        offsets = [_offset(kernel, x, here, start) for x in (words, by, low)]
        word, scaled, place = expected(row, c)
        if offsets != [word, scaled, scaled] or _value(rows.stmts, shift, here) != place:
            return {}
    e = Emitter(kernel, space)
    e.nest([*known, "block"], [])
    block = scale(var("block", n.extent), length)
    at = {"n": block, lane.name: constant(0)}
    texts = {}
    for name, x in (("words", words), ("scale", by), ("low", low)):
        param = kernel.params[x.access.param]
        index = substitute(x.access.address(param), lambda a: at.get(a.name) if a.kind == "var" else None)
        texts[name] = f"{param.name} + {e.index(index)[0]}"
    return {"bits": bits, "length": length, "group": group, "tokens": size_text(tokens), "lines": batch, **texts}


def _parts(kernel: Kernel, rows: Rows) -> tuple[Load, Load, Load, int, Ref] | None:
    """Of ``cast(cast(words >> shift & mask) * scale + low)``: the three loads, the bits of the mask, the shift."""
    made = {s.out: s for s in rows.stmts if hasattr(s, "out")}

    def take(arg: object, op: str) -> tuple[Any, ...]:
        s = made.get(arg.number) if isinstance(arg, Ref) else None
        return s.args if isinstance(s, Compute) and s.op == op else (None, None)

    def load(arg: object) -> Load | None:
        s = made.get(arg.number) if isinstance(arg, Ref) else None
        return s if isinstance(s, Load) and not s.access.mask else None

    scaled, low = take(take(rows.value, "cast")[0], "add")
    number, by = take(scaled, "mul")
    apart, mask = take(take(number, "cast")[0], "bitwise_and")
    word, shift = take(apart, "shift_right")
    loads = load(word), load(take(by, "cast")[0]), load(take(low, "cast")[0])
    bits = mask.bit_length() if isinstance(mask, int) else 0
    if None in loads or mask != 2**bits - 1 or bits not in (2, 4, 8) or not isinstance(shift, Ref):
        return None
    blocked = all(kernel.params[x.access.param].type.rank == 5 for x in loads if x is not None)
    return (*loads, bits, shift) if blocked else None  # type: ignore[return-value]


def _at(index: Index, place: Mapping[str, int]) -> Dim:
    """An index at a place, everything else zero."""
    got = substitute(index, lambda a: constant(place.get(a.name, 0)) if a.kind == "var" else None)
    return got.const if not got.terms else -1


def _offset(kernel: Kernel, load: Load, here: Mapping[str, int], start: Mapping[str, int]) -> Dim:
    address = load.access.address(kernel.params[load.access.param])
    return _at(address, here) - _at(address, start)


def _value(stmts: Iterable[Stmt], wanted: Ref, place: Mapping[str, int]) -> object:
    """A whole number that statements compute from places alone; None where they need more."""
    known: dict[int, Any] = {}
    for s in stmts:
        if isinstance(s, IndexOf):
            known[s.out] = _at(s.index, place)
        elif isinstance(s, Compute) and s.op in ("add", "mul", "cast"):
            args: list[Any] = [known.get(a.number) if isinstance(a, Ref) else a for a in s.args]
            if None not in args:
                known[s.out] = args[0] if s.op == "cast" else sum(args) if s.op == "add" else args[0] * args[1]
    return known.get(wanted.number)
