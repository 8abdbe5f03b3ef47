"""Attention on the CPU: the rows of a tile program as C++, which ``templates/attention.hpp`` works through.

    softmax(edit(q k^T * scale)) v    scores never leave a block of a few rows and keys

The kernel gives small functions: where a row of queries, keys or values lies (or how it is computed, once, when it is
packed), which keys a row may see, how scores are edited, the sink of a row, how a row of the result is stored. What
hides keys, a condition around the scores or -inf in what is added to them (``tiles/hidden.py``), is asked before other
edits, so that blocks of keys that no row of a block sees are skipped before their scores are computed; keys that
``causal`` and ``window`` hide are not even looked at. Two forms:

    tiled   blocks of queries against packed blocks of keys and values
    few     a handful of queries a key head: keys and values are read where they lie

Where there is too little work otherwise, the keys are worked on in parts, whose results are merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ...errors import TesselError, check
from ...ir.types import Dim, product
from ...targets import get_target
from ...tiles.default import batch_axes
from ...tiles.header import environment
from ...tiles.hidden import closure, hidden
from ...tiles.index import Index, exact_div, linearize, var
from ...tiles.kernel import ACC, LSE, Axis, Check, Kernel, Load, Ref, Stmt, Store, indices_of
from .expr import Dims, Emitter
from .gemm import has_matrix_unit
from .rows import Rows, computed_row, packs, rows_apart
from .space import Space
from .text import points, simd
from .words import cast, literal, size_text, value_type

__all__ = ["Writer", "attention", "refusal", "tiles_header"]

_ELEMENTS = {torch.float32: "float", torch.float16: "float", torch.bfloat16: "bf16_word"}

_BOUNDS = (("causal", False), ("window", None), ("offset", 0))
_VECTORS = 32  # a multiple of the lanes of any CPU, twice
_FEW = 8  # query rows a key head up to which keys and values are read where they lie


def refusal(dtype: torch.dtype, features: Iterable[str]) -> str | None:
    """Why there is no attention kernel for a dtype on a CPU with these features, ``None`` where there is one.

    >>> refusal(torch.float32, ("avx2", "fma")) is None
    True
    >>> refusal(torch.float64, ("avx2", "fma"))
    'attention of float64: torch has the kernel for it'
    >>> refusal(torch.float32, ("sse4_2",))
    'attention needs AVX-512, or AVX2 with FMA: torch has the kernel for this CPU'
    """
    have = set(features)
    if dtype not in _ELEMENTS:
        return f"attention of {str(dtype).removeprefix('torch.')}: torch has the kernel for it"
    if "avx512f" not in have and not {"avx2", "fma"} <= have:
        return "attention needs AVX-512, or AVX2 with FMA: torch has the kernel for this CPU"
    return None


@cache
def tiles_header() -> str:
    """The text of ``attention_tiles.hpp`` for this machine's CPU."""
    amx = has_matrix_unit(get_target("cpu").features)
    return str(environment().get_template("attention_tiles.hpp.j2").render(amx=amx))


def attention(kernel: Kernel) -> dict[str, Any]:
    """Context of ``attention.cpp.j2``.

    Raises:
        TesselError: a dtype or a head width that the kernel does not take, or an operand that reads indices.
    """
    return Writer(kernel).context()


@dataclass(frozen=True)
class _Rows:
    """How (x, row, n) of the C++ functions become coordinates of the tile program."""

    space: Space
    batches: tuple[Axis, ...]
    member: Axis  # which of the heads that share keys
    group: Dim


def _rows(kernel: Kernel) -> _Rows:
    axes = batch_axes(kernel)
    place: dict[str, Index] = {a.name: var(a.name, a.extent) for a in kernel.axes}
    group: Dim = 1
    if axes:
        head = axes[-1]
        group = _group(kernel, head)
        if group != 1:
            heads = exact_div(head.extent, group)
            assert heads is not None
            outer = Axis(f"{head.name}h", heads, "x")
            place[head.name] = linearize((var(outer.name, heads), var("member", group)), (group, 1))
            axes = [*axes[:-1], outer]
    return _Rows(Space(tuple(axes), (), place), tuple(axes), Axis("member", group, "x"), group)


def _group(kernel: Kernel, head: Axis) -> Dim:
    """How many neighbouring heads read the same keys and values."""
    found: set[Dim] = set()
    for part in ("k", "v"):
        stack = [i for s in kernel.parts[part] for i in indices_of(s)]
        while stack:
            for atom, _ in stack.pop().terms:
                if atom.kind == "var" and atom.name == head.name:
                    return 1
                if atom.kind == "div" and atom.arg == var(head.name, head.extent):
                    found.add(atom.n)
                elif atom.arg is not None:
                    stack.append(atom.arg)
    if not found:
        return head.extent
    (group,) = found if len(found) == 1 else (1,)
    return group if exact_div(head.extent, group) is not None else 1


class Writer:
    """Writes the parts of one kernel."""

    few_rows = True  # whether a handful of queries has a form of its own

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.at = _rows(kernel)
        self.heads = batch_axes(kernel)[-1].name if self.at.batches else ""  # the axis of the query heads
        self.m = kernel.axis("m").extent
        self.batch = points(self.at.batches, "x")
        self.known = [a.name for a in self.at.batches]
        self.row = [f"const i64 member = row / {size_text(self.m)}, m = row % {size_text(self.m)};"]
        rows = product((self.at.group, self.m))
        self.hidden = hidden(kernel)
        check(isinstance(self.hidden.value, Ref), lambda: f"{kernel.name}: the scores are a constant")
        self.few = rows if self.few_rows and isinstance(rows, int) and rows <= _FEW else None
        provided = kernel.provides["q"]
        assert isinstance(provided, Ref)
        self.dtype = self._dtype_of("q", provided)

    def _dtype_of(self, part: str, provided: Ref) -> torch.dtype:
        for s in self.kernel.parts[part]:
            if getattr(s, "out", None) == provided.number:
                return s.dtype  # type: ignore[union-attr]
        raise TesselError(f"{self.kernel.name}: part {part!r} provides a value that it does not compute")

    def context(self) -> dict[str, Any]:
        """The words of the template."""
        words = self.common()
        if words["edit"] is None and not self.scale > 0:  # the greatest product is not the greatest score
            words |= {"edit": {"where": [], "row": [], "pragma": "", "body": []}, "has_edit": "true"}
        return {
            **words,
            "store": self.stored((Ref(ACC), Ref(LSE)), "e", "member", "m"),
            "few": self.few,
            "form": f"few<Element, {self.few}, " if self.few else "tiled<Element, ",
        }

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        scale = self.kernel.attrs.get("scale")
        return 1 / math.sqrt(int(self.kernel.axis("d").extent)) if scale is None else scale  # type: ignore[arg-type]

    def common(self) -> dict[str, Any]:
        """What forward and backward kernels are both told."""
        kernel = self.kernel
        check(self.dtype in _ELEMENTS, lambda: f"{kernel.name}: no C++ attention of {self.dtype}")
        widths = [kernel.axis(n).extent for n in "de"]
        check(all(isinstance(n, int) for n in widths), lambda: f"{kernel.name}: a head width is not a known number")
        seen, edit, seen_rows = self._scores()
        sink = self.number("sink") if "sink" in kernel.parts else None
        causal, window, offset = (kernel.attrs.get(n, default) for n, default in _BOUNDS)
        wide = 0 if causal or window is None else window - 1  # without causal a window reaches to both sides
        return {
            "element": _ELEMENTS[self.dtype],
            "q": self._operand("q", "d", [*self.batch, *self.row], [*self.known, "member", "m"]),
            "k": self._operand("k", "d", self.batch, [*self.known, "n"]),
            "v": self._operand("v", "e", self.batch, [*self.known, "n"]),
            "seen": seen,
            "edit": edit,
            "sink": sink,
            "batches": size_text(product(a.extent for a in self.at.batches)),
            "group": size_text(self.at.group),
            "m": size_text(self.m),
            "n": size_text(kernel.axis("n").extent),
            "d": widths[0],
            "e": widths[1],
            "left": size_text(offset - window + 1) if window is not None else "0",
            "right": size_text(offset + wide),
            "scale": literal(self.scale, torch.float32),
            "has_right": _flag(causal or window is not None),
            "has_left": _flag(window is not None),
            "has_seen": _flag(seen),
            "seen_rows": _flag(seen_rows),
            "has_edit": _flag(edit),
            "has_sink": _flag(sink),
        }

    def number(self, part: str) -> dict[str, Any]:
        """One float of a row: lines that compute it, and its name."""
        provided = self.kernel.provides[part]
        e = Emitter(self.kernel, self.at.space)
        e.nest([*self.known, "member", "m"], [])
        for s in self.kernel.parts[part]:
            e.emit(s)
        check(not e.flags, lambda: f"{self.kernel.name}: part {part!r} reads indices that must be checked")
        text, _, dtype = e.values[provided.number]
        return {"lines": [*self.batch, *self.row, *e.blocks[0]], "value": cast(text, dtype, torch.float32)}

    def whole_rows(self, lane: str) -> str:
        """When a row of an operand can be read where it lies, past its own elements: a condition in C++."""
        extent = size_text(self.kernel.axis(lane).extent)
        if lane == "d":  # rows are read by whole vectors of words
            return f"words<Element>({extent}) % LANES == 0"
        return f"{extent} % {'(2 * LANES)' if self.few else 'LANES'} == 0"

    def _operand(self, part: str, lane: str, where: list[str], known: list[str]) -> dict[str, Any]:
        """How a row of queries, keys or values is found or computed."""
        kernel = self.kernel
        provided = kernel.provides[part]
        assert isinstance(provided, Ref)
        stmts = [s for s in kernel.parts[part] if not isinstance(s, Check)]
        checks = [s for s in kernel.parts[part] if isinstance(s, Check)]
        dtype = self._dtype_of(part, provided)
        check(dtype == self.dtype, lambda: f"{kernel.name}: attention of {self.dtype} and {dtype}; cast one operand")
        check(not checks or part in "kv", lambda: f"{kernel.name}: part {part!r} reads indices that must be checked")
        pieces = rows_apart(stmts, provided, lane)
        plain = part not in "kv" or checks or dtype != torch.bfloat16
        return {
            "where": where,
            "pieces": [self._piece(part, p, lane, known) for p in pieces],
            "packs": {} if plain else packs(kernel, self.at.space, pieces[0], kernel.axis(lane), where, self.known),
            "looked_up": self._looked_up(closure(kernel.parts[part], [s.arg.number for s in checks])[0])
            if checks
            else None,
            "itemsize": dtype.itemsize,
            "whole": self.whole_rows(lane),
        }

    def _piece(self, part: str, piece: Rows, lane: str, known: list[str]) -> dict[str, Any]:
        """Rows that are all made alike: which they are, and where one lies or what writes it."""
        kernel, axis = self.kernel, self.kernel.axis(lane)
        if not any(isinstance(s, Load) and s.out == piece.value.number for s in piece.stmts):
            row, loop, e = computed_row(kernel, self.at.space, piece, axis, known)
            direct = ""
        else:  # ``looked_up`` has checked the indices of all rows before
            e = Emitter(kernel, self.at.space)
            e.nest(known, [lane])
            for s in piece.stmts:
                e.emit(s)
            direct = self._direct(e, piece.stmts, piece.value, lane)
            row = list(e.blocks[0])
            text, dims, _ = e.values[piece.value.number]
            e.line(f"put(to + {lane}, {text});", dims | {lane})
            body = ["  " + line for line in e.blocks[1]]
            loop = [simd({}), f"for (i64 {lane} = 0; {lane} < {size_text(axis.extent)}; ++{lane}) {{", *body, "}"]
        check(not e.flags, lambda: f"{kernel.name}: part {part!r} divides by what may be zero")
        return {
            "when": e.conds(piece.when)[0],
            "row": row,
            "loop": loop,
            "direct": direct,
            "always": direct and self.dtype == torch.float32 and int(axis.extent) % _VECTORS == 0,  # type: ignore[arg-type]
        }

    def _looked_up(self, stmts: Iterable[Stmt]) -> dict[str, Any]:
        """The check of every index by which rows of keys or values are looked up."""
        e = Emitter(self.kernel, self.at.space)
        e.nest(self.known, ["n"])
        for s in stmts:
            e.emit(s)
        return {**self._loop(e), "where": self.batch}

    def _direct(self, e: Emitter, stmts: Iterable[Stmt], provided: Ref, lane: str) -> str:
        """The first element of a row that lies in memory as it is wanted, else nothing."""
        stmt = next(s for s in stmts if getattr(s, "out", None) == provided.number)
        if not isinstance(stmt, Load) or stmt.access.mask:
            return ""
        param = self.kernel.params[stmt.access.param]
        if param.type.dtype != stmt.dtype or stmt.dtype == torch.float16:
            return ""
        index = self.at.space.at(stmt.access.address(param))
        plain = [(a, c) for a, c in index.terms if a.kind == "var"]
        inside = [n for a, _ in index.terms if a.arg is not None for n in a.arg.variables()]
        if [c for a, c in plain if a.name == lane] != [1] or lane in inside:
            return ""
        rest = tuple((a, c) for a, c in index.terms if a.kind != "var" or a.name != lane)
        text, dims = e.affine(Index(rest, index.const))
        return "" if lane in dims else f"{param.name}[{text}]"

    # ------------------------------------------------------------ scores

    def edits(self) -> tuple[list[Stmt], Any]:
        """The statements that edit a score, conditions around it left out, and the edited score."""
        value = self.hidden.value
        return closure(self.kernel.parts.get("score", ()), [value.number])[0], value

    def _scores(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None, bool]:
        """What says which keys are seen, what else edits the scores, and whether the first varies along the rows."""
        seen, rows = self._seen() if self.hidden.conds else (None, False)
        if self.hidden.value == Ref(ACC):
            return seen, None, rows
        e = self._score_emitter()
        e.values[ACC] = "to[n - n0]", frozenset({"n"}), torch.float32
        text, dims = self._written(e, *self.edits())
        e.line(f"to[n - n0] = {text};", dims | {"n"})
        return seen, self._loop(e), rows

    def _written(self, e: Emitter, stmts: Iterable[Stmt], value: Ref) -> tuple[str, Dims]:
        """Write statements; a value among them as a float."""
        for s in stmts:
            e.emit(s)
        text, dims, dtype = e.values[value.number]
        return (text if value_type(dtype) == "float" else cast(text, dtype, torch.float32)), dims

    def _seen(self) -> tuple[dict[str, Any], bool]:
        e = self._score_emitter()
        for s in self.hidden.stmts:
            e.emit(s)
        texts: list[str] = []
        varies: Dims = frozenset()
        for n, wanted in self.hidden.conds:
            text, dims, _ = e.values[n]
            texts.append(text if wanted else f"!{text}")
            varies |= dims
        e.line(f"to[n - n0] = {' & '.join(texts)};", varies | {"n"})
        return self._loop(e), bool(varies & {"m", "member"})

    def _score_emitter(self) -> Emitter:
        e = Emitter(self.kernel, self.at.space)
        e.nest([*self.known, "member", "m"], ["n"])
        return e

    def _loop(self, e: Emitter) -> dict[str, Any]:
        return {
            "where": [*self.batch, *self.row],
            "row": e.blocks[0],
            "body": e.blocks[1],
            "pragma": simd({"|": ["bad"]} if e.flags else {}),
        }

    def stored(self, values: tuple[Ref, ...], lane: str, *known: str) -> dict[str, Any]:
        """How a row of a result is stored: those statements of the body that store ``values``."""
        e = Emitter(self.kernel, self.at.space)
        e.nest([*self.known, *known], [lane])
        e.define(0, "acc", f"out[{lane}] * inv", frozenset({lane}), torch.float32)
        e.values = {**dict.fromkeys((v.number for v in values), e.values[0]), LSE: ("lse", frozenset(), torch.float32)}
        for s in self.kernel.body:
            if not isinstance(s, Store) or s.arg in values:
                e.emit(s)
        return {**self._loop(e), "where": [*self.batch, *(self.row if "m" in known else ())]}


def _flag(x: object) -> str:
    return "true" if x else "false"
