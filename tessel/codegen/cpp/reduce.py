"""What the reduction template is given. Three forms, by where memory lies and how many results there are:

rows    a thread takes a row and folds it with vectors along it, one loop after another; what several
        loops need and is dear to compute again is kept in a buffer of the row.
few     like rows, but there are few rows and they are long: threads share each row, and their partial
        results are combined in order.
across  memory lies along the results: vectors hold neighbouring results and go down the rows; see ``across``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ir.types import product
from ...ops import OPS
from ...tiles.kernel import Axis, Check, Compute, Kernel, Load, Reduce, Segment, Stmt, Store, refs
from .across import Across
from .fold import Fold, Writer, indented
from .onehot import only_place
from .space import Space
from .text import BLOCK, coordinates, items, points, simd, steps
from .vector import FOLDS, KINDS, PAGE, Along, fold_step, foresees_little, from_memory, unroll
from .words import size_text, value_type

__all__ = ["reduction"]

_FEW = 16
_LONG = 32768
_STACK = 8192  # elements of a row buffer that may lie on the stack
_KEEP = 4  # a value that costs more than this to compute again is kept
_CLAUSES = {"sum": "+", "prod": "*", "any": "|", "all": "&", "amax": "amax", "amin": "amin"}


@dataclass
class Part:
    """A piece of a kernel as the template writes it: lines, or a loop shared by threads."""

    lines: list[str]
    folds: list[Fold] = field(default_factory=list)
    shared: bool = False


def reduction(kernel: Kernel, space: Space) -> dict[str, Any]:
    """Context of ``reduction.cpp.j2``."""
    writer = Across(kernel, space) if space.across else _Rows(kernel, space)
    return writer.context()


# ---------------------------------------------------------------- vectors along the rows


class _Rows(Writer):
    """Folds along the row, kept values in row buffers."""

    def context(self) -> dict[str, Any]:
        rows = product(a.extent for a in self.outer)
        length = product(a.extent for a in self.space.rs)
        few = isinstance(rows, int) and rows <= _FEW and not (isinstance(length, int) and length <= _LONG)
        self.loops, self.kept = self._plan()
        self.buffer: dict[int, str] = {}
        known = [a.name for a in self.outer]
        parts: list[Part] = []
        for number, segment in enumerate(self.segments):
            if not segment.loop:
                self.e.nest(known, [])
                for stmt in segment.stmts:
                    self.e.emit(stmt)
                parts.append(Part(self.e.blocks[0]))
            else:
                parts.append(self._loop(number, segment, few))
        buffers = [(value_type(self.e.values[n][2]), name) for n, name in self.buffer.items()]
        on_stack = isinstance(length, int) and length <= _STACK
        lane = self.space.rs[-1] if self.space.rs else None
        return {
            "form": "few" if few else "rows",
            "items": items(self.outer, None),
            "coordinates": points(self.outer, "item"),
            "parts": parts,
            "buffers": [("u8" if t == "bool" else t, n) for t, n in buffers],
            "length": size_text(length),
            "on_stack": on_stack,
            "shares": items(self.space.rs[:-1], lane),
            "share": coordinates(self.space.rs[:-1], lane, "share"),
        }

    def _plan(self) -> tuple[dict[int, list[Stmt]], set[int]]:
        """What each loop computes (by segment), and the values that later loops find in a row buffer."""
        made: dict[int, Stmt] = {
            s.out: s
            for seg in self.segments
            if seg.loop
            for s in seg.stmts
            if not isinstance(s, Store | Check | Reduce)
        }
        costs: dict[int, int] = {}

        def cost(n: int) -> int:
            if n not in costs:
                s = made[n]
                below = sum(cost(m) for m in set(refs(s)) if m in made)
                own = OPS[s.op].cost if isinstance(s, Compute) else 2 if isinstance(s, Load) else 1
                if isinstance(s, Load) and (s.access.mask or any(True for _ in refs(s))):
                    own += 4
                costs[n] = min(own + below, 1000)
            return costs[n]

        loops: dict[int, list[Stmt]] = {}
        kept: set[int] = set()
        before: set[int] = set()
        for number, seg in enumerate(self.segments):
            if not seg.loop:
                continue
            sinks = [s for s in seg.stmts if isinstance(s, Store | Check | Reduce)]
            mine: set[int] = set()
            stack = [n for s in sinks for n in refs(s)]
            while stack:
                n = stack.pop()
                if n not in made or n in mine:
                    continue
                if n in before and cost(n) > _KEEP:
                    kept.add(n)
                    continue
                mine.add(n)
                stack.extend(refs(made[n]))
            loops[number] = [s for s in seg.stmts if isinstance(s, Store | Check | Reduce) or s.out in mine]
            before |= mine
        return loops, kept

    def _wide(self, number: int, lane: Axis | None) -> tuple[bool, bool]:
        """Whether a loop is written with vectors, and whether with two at a time.

        Also what earlier loops left in buffers must lie along it.
        """
        if lane is None:
            return False, False
        e = self.e
        along = Along(self.kernel, self.space, lane.name, {n: d for n, (_, d, _) in e.values.items()})
        for n in self.buffer:
            along.dims[n] = frozenset({lane.name})
        if (self.buffer or self.kept) and along.step(self.flat) != 1:
            return False, False
        mine = self.loops[number]
        held = [n for n in {*self.buffer, *self.kept} if any(n in refs(s) or getattr(s, "out", -1) == n for s in mine)]
        wide = along.all_wide(mine, lane.extent) and all(self._dtype(n) in KINDS for n in held)
        return wide, wide and not held and along.in_pairs(mine)

    def _dtype(self, number: int) -> torch.dtype:
        return next(s.dtype for s in self.kernel.body if getattr(s, "out", -1) == number)  # type: ignore[union-attr]

    def _only(self, number: int) -> int | None:
        """The value that says which point of a loop counts, known before the loop; see ``only_place``."""
        rs, mine = self.space.rs, self.loops[number]
        if len(rs) != 1 or any(getattr(s, "out", -1) in self.kept - set(self.buffer) for s in mine):
            return None
        found = only_place(self.space, mine, rs[0])
        outside = {a.name for a in self.outer}
        return found if found in self.e.values and self.e.values[found][1] <= outside else None

    def _loop(self, number: int, segment: Segment, few: bool) -> Part:
        e, rs = self.e, self.space.rs
        lane = rs[-1] if rs else None
        known = [a.name for a in self.outer]
        only = None if few else self._only(number)
        wide, pairs = self._wide(number, lane) if only is None else (False, False)
        e.nest(known, [a.name for a in rs], wide, pairs)
        inner = frozenset(e.known[-1])
        place = e.index(self.flat)[0]
        for n, name in self.buffer.items():
            dtype = e.values[n][2]
            text = f"get_{_kept_kind(dtype)}({name} + {place}, n)" if wide else f"{name}[{place}]"
            e.values[n] = text, inner, dtype
        folds: list[Fold] = []
        clauses: dict[str, list[str]] = {}
        plain = True
        short = lane is None or (isinstance(lane.extent, int) and lane.extent <= 2 * BLOCK)
        partial = few or not (short or only is not None)
        copies = unroll(self.loops[number]) if wide and any(isinstance(s, Reduce) for s in self.loops[number]) else 1
        for stmt in self.loops[number]:
            if isinstance(stmt, Reduce):
                f, text, dims = self.fold(stmt)
                if partial and f.op == "sum" and f.type == "float":
                    f.type, f.part = "double", "float"
                folds.append(f)
                if f.at is not None:
                    plain = False
                    e.line(self.better(f, f.name, f.at, text), inner)
                    continue
                if wide:
                    text = text if e.wide(dims) else f"all({text})"
                    text = f"{f.op}_of({text})" if pairs else text
                    e.line(fold_step(f.op, f"{f.name}_v{'[u]' if copies > 1 else ''}", text), inner)
                    continue
                acc = f"{f.name}_part" if partial and f.op == "sum" else f.name
                e.line(f.step(acc, text), inner)
                clauses.setdefault(_CLAUSES[f.op], []).append(acc)
                continue
            e.emit(stmt)
            if not isinstance(stmt, Store | Check) and stmt.out in self.kept and stmt.out not in self.buffer:
                name = f"kept{len(self.buffer)}"
                text, dims, dtype = e.values[stmt.out]
                if wide:
                    text = text if e.wide(dims) else f"all({text})"
                    e.line(f"put_{_kept_kind(dtype)}({name} + {place}, {text}, n);", inner)
                else:
                    e.line(f"{name}[{place}] = {text};", inner)
                self.buffer[stmt.out] = name
        if wide and only is None:
            for line in self._ahead(number, lane, copies, pairs):
                e.line(line, inner)
        if e.flags:
            clauses.setdefault("|", []).append("bad")
        sums = [f for f in folds if f.op == "sum" and partial]
        starts = [f"{f.type} {f.name} = {f.start};" for f in folds]
        starts += [f"i64 {f.at} = -1;" for f in folds if f.at]
        if only is not None:
            assert lane is not None
            place, extent = e.values[only][0], size_text(lane.extent)
            lines = [f"const i64 {lane.name} = {place};  // no other point counts", *e.blocks[1]]
            body = [*e.blocks[0], f"if ((u64){place} < (u64){extent}) {{", *indented(lines, 1), "}"]
        elif wide:
            assert lane is not None
            body = self._around(self._vectors(e.blocks[-1], lane, folds, copies, pairs), e.blocks, lane, few, partial)
        else:
            body = self._nest(e.blocks, lane, sums, simd(clauses) if plain else "", few, partial)
        dims = frozenset(known)
        for f in folds:
            self.result(f, f.name, f.at, dims)
        if few:
            return Part(body, folds, shared=True)
        return Part([*starts, "{", *indented(body, 1), "}"])

    def _ahead(self, number: int, lane: Axis | None, copies: int, pairs: bool) -> list[str]:
        """Lines that ask for what is read later.

        In the last of several passes over a row, what the first pass reads of a later row: the CPU's own prefetching
        ends at a page, which is as long as many a row, and each row would begin with a wait for memory. In a single
        pass, what lies a page further, where the last cache holds it or where conversions leave few loads on their
        way, if the first cache has room for it; floats from memory come as fast without. On CPUs that foresee little,
        always, a page ahead: one half of a row in its first pass and one in its last, so that reading goes on while
        the row is written (rms_norm of bf16 on a Granite Rapids: 29.7 and 32.5 GB/s).
        """
        first, last = min(self.loops), max(self.loops)
        if lane is None or number not in ((first, last) if foresees_little() else (last,)):
            return []
        loads = [s for s in self.loops[first] if isinstance(s, Load)]
        if first == last:
            near = foresees_little() or not from_memory(self.kernel)
            loads = [s for s in loads if near or self.kernel.params[s.access.param].type.dtype.itemsize < 4]
            asked = [(s, self.along(s, lane)) for s in loads]
            lines = [self.once_a_line(s, t, pairs) if copies > 1 else t for s, t in asked if t is not None]
        elif self.outer and from_memory(self.kernel):
            how = {"ahead": PAGE} if foresees_little() else {"again": True}
            half = ""
            if foresees_little():
                half = f"if ({lane.name} {'<' if number == first else '>='} {size_text(lane.extent)} / 2) "
            asks = [self.early(s, self.outer[-1], lane, **how) for s in loads]
            lines = [half + t for t in asks if t is not None]
        else:
            lines = []
        return list(dict.fromkeys(lines))

    def _vectors(self, block: list[str], lane: Axis, folds: Sequence[Fold], copies: int, pairs: bool) -> list[str]:
        """The innermost loop in steps of a vector, from ``begin`` to ``end``."""
        lines: list[str] = []
        for f in folds:
            first = ", ".join([f"all({f.start})"] * copies)
            lines.append(f"vf {f.name}_v[] = {{{first}}};" if copies > 1 else f"vf {f.name}_v = {first};")
        lines += steps(lane, block, copies, pairs)
        for f in folds:
            if copies > 1:
                step = fold_step(f.op, f"{f.name}_v[0]", f"{f.name}_v[u]").replace("(n,", "(Full{},")
                lines.append(f"for (int u = 1; u < {copies}; ++u) {step}")
            text = f"{FOLDS[f.op]}({f.name}_v{'[0]' if copies > 1 else ''})"
            lines.append(f.step(f.name, text))
        return lines

    def _nest(
        self, blocks: list[list[str]], lane: Axis | None, sums: list[Fold], pragma: str, few: bool, partial: bool
    ) -> list[str]:
        """The loops over r, the innermost left to the compiler's vectorizer."""
        if lane is None:
            return [*(f"{f.part or f.type} {f.name}_part = 0;" for f in sums), *blocks[0], *_joins(sums)]
        body = [f"{f.part or f.type} {f.name}_part = 0;" for f in sums]
        body += [pragma] if pragma else []
        body.append(f"for (i64 {lane.name} = begin; {lane.name} < end; ++{lane.name}) {{")
        body += [*indented(blocks[-1], 1), "}", *_joins(sums)]
        return self._around(body, blocks, lane, few, partial)

    def _around(self, body: list[str], blocks: list[list[str]], lane: Axis, few: bool, partial: bool) -> list[str]:
        """Blocks of the innermost loop, and the loops around it; in the form ``few`` the caller deals them out."""
        if few:
            return [*(line for block in blocks[:-1] for line in block), *body]
        extent = size_text(lane.extent)
        if partial:
            head = f"for (i64 begin = 0; begin < {extent}; begin += {BLOCK}) {{"
            body = [head, f"  const i64 end = min(begin + {BLOCK}, {extent});", *indented(body, 1), "}"]
        else:
            body = ["{", f"  const i64 begin = 0, end = {extent};", *indented(body, 1), "}"]
        for axis, block in zip(reversed(self.space.rs[:-1]), reversed(blocks[1:-1]), strict=True):
            name = axis.name
            head = f"for (i64 {name} = 0; {name} < {size_text(axis.extent)}; ++{name}) {{"
            body = [head, *indented([*block, *body], 1), "}"]
        return [*blocks[0], *body]


def _kept_kind(dtype: torch.dtype) -> str:
    """Row buffers hold values as they are computed."""
    return "bool" if dtype == torch.bool else "float"


def _joins(sums: Sequence[Fold]) -> list[str]:
    return [f"{f.name} += {f.name}_part;" for f in sums]
