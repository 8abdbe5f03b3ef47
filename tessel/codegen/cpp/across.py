"""Reductions whose memory lies along the results: vectors hold neighbouring results and go down the rows.

The sums of a block of rows are added up in float, those of the blocks in double, or a column of thousands would lose
digits. Where the results are too few for all threads, threads share the rows, and their sums are combined in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ...ir.types import product
from ...tiles.kernel import Axis, Check, Load, Reduce, Segment, Stmt, Store, refs
from .fold import Fold, Writer, indented
from .text import items, points, simd, steps
from .vector import Along, fold_step, unroll
from .words import size_text, value_type

__all__ = ["Across"]

LANES = 1024  # results side by side that a thread works on: 4 KiB of floats
CHUNK = 128  # rows whose sums are added up in float
_SHARED = 4096  # results up to which threads may share the rows: each thread has sums of all of them


class Across(Writer):
    """Accumulators are rows of neighbouring results."""

    def context(self) -> dict[str, Any]:
        """Context of ``reduction.cpp.j2``."""
        self.lane = lane = self.space.xs[-1]
        self.outer = self.space.xs[:-1]
        self.at = f"[{lane.name} - begin]"
        self.arrays: dict[int, str] = {}  # values that lie in a local array of floats, one a lane
        self.shared = self._shared()
        most = _SHARED if self.shared else LANES
        width = lane.extent if isinstance(lane.extent, int) and lane.extent < most else most
        self.width = -(-int(width) // 16) * 16
        before: list[str] = []
        body: list[str] = []
        lines: list[str] = []
        folds: list[Fold] = []
        for number, segment in enumerate(self.segments):
            later = {n for seg in self.segments[number + 1 :] for s in seg.stmts for n in refs(s)}
            wide = self._wide(segment, later)
            got, found = self._segment(segment, wide, later)
            if self.shared and segment.loop:
                body, folds = got, found
            else:
                (lines if body or not self.shared else before).extend(got)
        return {
            "form": "shared across" if self.shared else "across",
            "rows": items(self.outer, None),
            "lanes": size_text(lane.extent),
            "most": LANES,
            "width": self.width,
            "coordinates": points(self.outer, "row"),
            "before": before,
            "body": body,
            "folds": folds,
            "shares": f"ceil_div({size_text(self.space.rs[-1].extent)}, {CHUNK})" if self.shared else "",
            "lines": lines,
        }

    def _shared(self) -> bool:
        """Whether threads share the rows: one loop over many rows, its results few and wide."""
        lane, rs = self.lane, self.space.rs
        loops = [s for s in self.segments if s.loop]
        if self.outer or len(rs) != 1 or len(loops) != 1 or not self._wide(loops[0], set()):
            return False
        long = not isinstance(rs[0].extent, int) or rs[0].extent >= 4 * CHUNK
        first = self.segments.index(loops[0])
        made = {s.out for seg in self.segments[:first] for s in seg.stmts if not isinstance(s, Store | Check)}
        folds = any(isinstance(s, Reduce) for s in loops[0].stmts)
        return folds and long and isinstance(lane.extent, int) and lane.extent <= _SHARED and not made

    def _wide(self, segment: Segment, later: set[int]) -> bool:
        """Whether a segment is written with vectors.

        What it finds of earlier segments, and leaves for later ones, must be one number or an array of floats.
        """
        along = Along(self.kernel, self.space, self.lane.name, {n: d for n, (_, d, _) in self.e.values.items()})
        if not segment.loop and any(
            getattr(s, "dtype", None) == torch.bool for s in segment.stmts if getattr(s, "out", -1) in later
        ):
            return False
        known = {n for s in segment.stmts for n in refs(s)} & set(self.e.values)
        if any(self.lane.name in self.e.values[n][1] and n not in self.arrays for n in known):
            return False
        return along.all_wide(segment.stmts, self.lane.extent)

    def _segment(self, segment: Segment, wide: bool, later: set[int]) -> tuple[list[str], list[Fold]]:
        """The lines of a segment, and its accumulators."""
        e, lane = self.e, self.lane
        known = [a.name for a in self.outer]
        rs = self.space.rs if segment.loop else ()
        e.nest(known, [*(a.name for a in rs), lane.name], wide)
        inner = e.known[-1]
        for n, name in self.arrays.items():
            text = f"get<vf>({name} + {lane.name} - begin, Full{{}})" if wide else name + self.at
            e.values[n] = text, e.values[n][1], e.values[n][2]
        copies = 2 * unroll(segment.stmts) if wide else 1
        folds: list[Fold] = []
        starts: list[str] = []
        kept: list[tuple[int, str]] = []
        for stmt in segment.stmts:
            if isinstance(stmt, Reduce):
                folds.append(self._fold(stmt, wide))
                continue
            e.emit(stmt)
            if not segment.loop and not isinstance(stmt, Store | Check) and stmt.out in later:
                kept += self._keep(stmt, wide, [name for _, name in kept], starts)
        if wide and segment.loop:
            for line in self._ahead(segment.stmts):
                e.line(line, inner)
        if wide:
            body = _down(lane, e.blocks[-1], folds, copies) if folds else steps(lane, e.blocks[-1])
        elif e.blocks[-1]:
            head = f"for (i64 {lane.name} = begin; {lane.name} < end; ++{lane.name}) {{"
            body = [simd({"|": ["bad"]} if e.flags else {}), head, *indented(e.blocks[-1], 1), "}"]
        else:
            body = []
        got = self._rows(rs, body, folds, wide, starts)
        for n, name in kept:
            e.values[n] = name + self.at, inner, e.values[n][2]
        dims = frozenset({*known, lane.name})
        for f in folds:
            self.result(f, f.name + self.at, f.at + self.at if f.at else None, dims)
            if f.type == "float" and not f.at:
                self.arrays[f.stmt.out] = f.name
        return got, folds

    def _fold(self, stmt: Reduce, wide: bool) -> Fold:
        """The step of a fold, put where its operand is known."""
        f, text, dims = self.fold(stmt)
        inner = self.e.known[-1]
        if wide:
            text = text if self.e.wide(dims) else f"all({text})"
            self.e.line(fold_step(f.op, f"{f.name}_v[u]", text), inner)
        elif f.at is not None:
            self.e.line(self.better(f, f.name + self.at, f.at + self.at, text), inner)
        else:
            self.e.line(f.step(f.name + self.at, text), inner)
        return f

    def _keep(self, stmt: Stmt, wide: bool, names: list[str], starts: list[str]) -> list[tuple[int, str]]:
        """A value that later segments want, written to an array."""
        number: int = stmt.out  # type: ignore[union-attr]
        text, dims, dtype = self.e.values[number]
        if self.lane.name not in dims or text.endswith(self.at) or number in self.arrays:
            return []
        name = f"{text}_all"
        if name not in names:  # a cast may be its operand under another number
            type_ = value_type(dtype)
            starts.append(f"alignas(64) {type_} {name}[{self.width}];")
            store = f"put({name} + {self.lane.name} - begin, {text}, Full{{}});"
            self.e.line(store if wide else f"{name}{self.at} = {text};", self.e.known[-1])
        if value_type(dtype) == "float":
            self.arrays[number] = name
        return [(number, name)]

    def _rows(
        self, rs: tuple[Axis, ...], body: list[str], folds: list[Fold], wide: bool, starts: list[str]
    ) -> list[str]:
        """The loops over the rows around the loop over the lanes, and the arrays they need."""
        e = self.e
        lane, name = self.lane.name, rs[-1].name if rs else ""
        terms = product(a.extent for a in rs)
        chunks = wide and bool(folds) and (self.shared or not isinstance(terms, int) or terms > 2 * CHUNK)
        each = f"for (i64 {lane} = begin; {lane} < end; ++{lane})"
        starts = [*starts, *(f"alignas(64) {f.type} {f.name}[{self.width}];" for f in folds)]
        starts += [f"i64 {f.at}[{self.width}];" for f in folds if f.at]
        first = [f"{f.name}{self.at} = {f.start};" for f in folds] + [f"{f.at}{self.at} = -1;" for f in folds if f.at]
        fill = [f"{each} {{ {' '.join(first)} }}"] if folds else []
        if not rs:
            return [*starts, *fill, *e.blocks[0], *body]
        last = rs[-1]
        low, high = (f"{name}_begin", f"{name}_end") if chunks else ("0", size_text(last.extent))
        body = [f"for (i64 {name} = {low}; {name} < {high}; ++{name}) {{", *indented([*e.blocks[-2], *body], 1), "}"]
        if chunks:
            joins = [f.step(f"{f.name}_all{self.at}", f.name + self.at) for f in folds]
            body = [*fill, *body, f"{each} {{ {' '.join(joins)} }}"]
        if self.shared:
            ends = f"const i64 {low} = share * {CHUNK}, {high} = min({low} + {CHUNK}, {size_text(last.extent)});"
            return [*starts, ends, *e.blocks[0], *body]
        if chunks:
            ends = f"const i64 {high} = min({low} + {CHUNK}, {size_text(last.extent)});"
            head = f"for (i64 {low} = 0; {low} < {size_text(last.extent)}; {low} += {CHUNK}) {{"
            body = [head, *indented([ends, *body], 1), "}"]
            starts += [f"alignas(64) {f.whole} {f.name}_all[{self.width}];" for f in folds]
            starts.append(f"{each} {{ {' '.join(f'{f.name}_all{self.at} = {f.start};' for f in folds)} }}")
            done = [f"{each} {{ {' '.join(f'{f.name}{self.at} = (float){f.name}_all{self.at};' for f in folds)} }}"]
        else:
            starts, done = [*starts, *fill], []
        for axis, block in zip(reversed(rs[:-1]), reversed(e.blocks[1:-2]), strict=True):
            head = f"for (i64 {axis.name} = 0; {axis.name} < {size_text(axis.extent)}; ++{axis.name}) {{"
            body = [head, *indented([*block, *body], 1), "}"]
        return [*starts, "{", *indented([*e.blocks[0], *body], 1), "}", *done]

    def _ahead(self, stmts: Iterable[Stmt]) -> list[str]:
        """Lines that ask for later rows early: a row of a few pages is too short for the CPU's own prefetching."""
        asked = [(s, self.early(s, self.space.rs[-1], self.lane)) for s in stmts if isinstance(s, Load)]
        lines = [self.once_a_line(s, text) for s, text in asked if text is not None]
        return list(dict.fromkeys(lines))


def _down(lane: Axis, body: list[str], folds: list[Fold], copies: int) -> list[str]:
    """One row taken into the accumulators, several vectors at a time."""
    x = lane.name

    def turn(vectors: int, n: str) -> str:
        calls = [f"step({x}{f' + {u} * W' if u else ''}, {n}, {u});" for u in range(vectors)]
        got = [f"take<{vectors}>({f.name}_v, {f.name} + {x} - begin);" for f in folds]
        put = [f"leave<{vectors}>({f.name}_v, {f.name} + {x} - begin);" for f in folds]
        return f"{{ {' '.join([*got, *calls, *put])} }}"

    lines = [f"vf {f.name}_v[{copies}];" for f in folds]
    lines.append(f"const auto step = [&](i64 {x}, auto n, int u) __attribute__((always_inline)) {{")
    lines += [*indented(body, 1), "};", f"i64 {x} = begin;"]
    lines.append(f"for (; {x} + {copies} * W <= end; {x} += {copies} * W) {turn(copies, 'Full{}')}")
    lines.append(f"for (; {x} + W <= end; {x} += W) {turn(1, 'Full{}')}")
    if not (isinstance(lane.extent, int) and lane.extent % 16 == 0):
        lines.append(f"if ({x} < end) {turn(1, f'Part{{end - {x}}}')}")
    return ["{", *indented(lines, 1), "}"]
