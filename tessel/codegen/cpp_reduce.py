"""What the reduction template is given. Three forms, by where memory lies and how many results there are:

rows    a thread takes a row and folds it with vectors along it, one loop after another; what several
        loops need and is dear to compute again is kept in a buffer of the row.
few     like rows, but there are few rows and they are long: threads share each row, and their partial
        results are combined in order.
across  memory lies along the results: vectors hold neighbouring results and go down the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.types import contiguous_strides, product
from ..ops import OPS
from ..tiles.index import Index, linearize, var
from ..tiles.kernel import Axis, Check, Compute, Kernel, Load, Reduce, Segment, Stmt, Store, refs
from .cpp_expr import Dims, Emitter
from .cpp_onehot import only_place
from .cpp_space import Space
from .cpp_text import BLOCK, coordinates, items, points, simd, steps
from .cpp_vector import FOLDS, KINDS, Along, fold_step, from_memory, too_large, unroll
from .cpp_words import cast, identity, size_text, value_type
from .dialect import compute_dtype

__all__ = ["reduction"]

LANES = 512  # results side by side that a thread works on, in the form ``across``
_FEW = 16
_LONG = 32768
_STACK = 8192  # elements of a row buffer that may lie on the stack
_PAGE = 4096  # bytes of the pages that memory is mapped in
_EARLY = 3 * _PAGE  # from what is read to what is asked for
_KEEP = 4  # a value that costs more than this to compute again is kept

_STEPS = {
    "sum": "{acc} += {v};",
    "prod": "{acc} *= {v};",
    "any": "{acc} |= {v};",
    "all": "{acc} &= {v};",
    "amax": "{acc} = maximum({acc}, {v});",
    "amin": "{acc} = minimum({acc}, {v});",
}
_CLAUSES = {"sum": "+", "prod": "*", "any": "|", "all": "&", "amax": "amax", "amin": "amin"}


@dataclass
class Fold:
    """One accumulator: its name, type and start, and for the arg forms where the best was found.

    Sums of blocks are added up in double, or a row of millions would lose digits.
    """

    stmt: Reduce
    op: str
    name: str
    type: str
    start: str
    part: str = ""  # the type of a block's sum, where it is another

    @property
    def at(self) -> str | None:
        return f"{self.name}_at" if self.op in ("argmax", "argmin") else None

    def joined(self, part: str) -> str:
        """The line that takes in a thread's partial result; threads come in the order of the row."""
        acc, v = self.name, f"{part}.{self.name}"
        if self.at is None:
            return _STEPS[self.op].format(acc=acc, v=v)
        found = f"{part}.{self.at}"
        return f"if ({found} >= 0 && ({_better(self, acc, self.at, v, found)})) {{ {acc} = {v}; {self.at} = {found}; }}"


def _better(f: Fold, acc: str, at: str, v: str, place: str) -> str:
    """Whether a value replaces the best so far: the first of the best wins, NaN before all."""
    tests = [f"({v} {'>' if f.op == 'argmax' else '<'} {acc})", f"(({v} == {acc}) & ({place} < {at}))", f"({at} < 0)"]
    if f.type in ("float", "double"):
        tests.append(f"(({v} != {v}) & (({acc} == {acc}) | ({place} < {at})))")
    return " | ".join(tests)


@dataclass
class Part:
    """A piece of a kernel as the template writes it: lines, or a loop shared by threads."""

    lines: list[str]
    folds: list[Fold] = field(default_factory=list)
    shared: bool = False


def reduction(kernel: Kernel, space: Space) -> dict[str, Any]:
    """Context of ``reduction.cpp.j2``."""
    writer = _Across(kernel, space) if space.across else _Rows(kernel, space)
    return writer.context()


def _fold_name(stmt: Reduce) -> str:
    """The greatest of booleans is whether any holds."""
    return {"amax": "any", "amin": "all"}.get(stmt.op, stmt.op) if stmt.arg_dtype == torch.bool else stmt.op


class _Writer:
    """What the forms share."""

    def __init__(self, kernel: Kernel, space: Space) -> None:
        self.kernel, self.space = kernel, space
        self.e = Emitter(kernel, space)
        self.e.past = too_large(kernel)
        self.segments = kernel.segments()
        self.outer: tuple[Axis, ...] = space.xs
        folded = [a for a in kernel.axes if a.kind == "r"]
        strides = contiguous_strides([a.extent for a in folded])
        self.flat: Index = linearize([var(a.name, a.extent) for a in folded], strides)

    def fold(self, stmt: Reduce) -> tuple[Fold, str, Dims]:
        """The accumulator of a fold, the text of its operand and the loops that varies along."""
        text, dims, _ = self.e.values[stmt.arg.number]
        op, dtype = _fold_name(stmt), stmt.arg_dtype
        if op in ("sum", "prod"):
            dtype = compute_dtype(stmt.dtype)
            text = cast(text, stmt.arg_dtype, dtype)
        elif op in ("any", "all"):
            text, dtype = (text if dtype == torch.bool else f"({text} != 0)"), torch.bool
        name = f"{stmt.op}{stmt.out}"
        start = identity(op, compute_dtype(dtype))
        type_ = value_type(dtype)
        if type_ == "bool":
            type_, start = "int", "1" if op in ("all", "argmin") else "0"
        return Fold(stmt, op, name, type_, start), text, dims

    def better(self, f: Fold, acc: str, at: str, text: str) -> str:
        """The step of argmax and argmin."""
        v, (place, _) = f"{f.name}_v", self.e.index(self.flat)
        return (
            f"{{ const {f.type} {v} = {text}; const i64 here = {place}; "
            f"const bool better = {_better(f, acc, at, v, 'here')}; "
            f"{at} = better ? here : {at}; {acc} = better ? {v} : {acc}; }}"
        )

    def result(self, f: Fold, acc: str, at: str | None, dims: Dims) -> None:
        """Make the folded value known."""
        stmt = f.stmt
        text = at if at is not None else f"({acc} != 0)" if f.type == "int" and f.op in ("any", "all") else acc
        if f.part:
            text = f"({f.part}){text}"
        if at is not None and stmt.dtype != torch.int64:
            text = cast(text, torch.int64, stmt.dtype)
        self.e.values[stmt.out] = text, dims, stmt.dtype


def _indented(lines: Sequence[str], depth: int) -> list[str]:
    return ["  " * depth + line for line in lines]


# ---------------------------------------------------------------- vectors along the rows


class _Rows(_Writer):
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

    def _wide(self, number: int, lane: Axis | None) -> bool:
        """Whether a loop is written with vectors: also what earlier loops left in buffers must lie along it."""
        if lane is None:
            return False
        e = self.e
        along = Along(self.kernel, self.space, lane.name, {n: d for n, (_, d, _) in e.values.items()})
        for n in self.buffer:
            along.dims[n] = frozenset({lane.name})
        if (self.buffer or self.kept) and along.step(self.flat) != 1:
            return False
        mine = self.loops[number]
        held = [n for n in {*self.buffer, *self.kept} if any(n in refs(s) or getattr(s, "out", -1) == n for s in mine)]
        return along.all_wide(mine, lane.extent) and all(self._dtype(n) in KINDS for n in held)

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
        wide = only is None and self._wide(number, lane)
        e.nest(known, [a.name for a in rs], wide)
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
                    e.line(fold_step(f.op, f"{f.name}_v{'[u]' if copies > 1 else ''}", text), inner)
                    continue
                acc = f"{f.name}_part" if partial and f.op == "sum" else f.name
                e.line(_STEPS[f.op].format(acc=acc, v=text), inner)
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
            for line in self._ahead(number, lane):
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
            body = [*e.blocks[0], f"if ((u64){place} < (u64){extent}) {{", *_indented(lines, 1), "}"]
        elif wide:
            assert lane is not None
            body = self._around(self._vectors(e.blocks[-1], lane, folds, copies), e.blocks, lane, few, partial)
        else:
            body = self._nest(e.blocks, lane, sums, simd(clauses) if plain else "", few, partial)
        dims = frozenset(known)
        for f in folds:
            self.result(f, f.name, f.at, dims)
        if few:
            return Part(body, folds, shared=True)
        return Part([*starts, "{", *_indented(body, 1), "}"])

    def _ahead(self, number: int, lane: Axis | None) -> list[str]:
        """In the last of several passes over a row, what the first pass reads of a later row is asked for.

        The CPU's own prefetching ends at a page, which is as long as many a row: each row would begin with a wait
        for memory. For the last cache that is too short to be worth an instruction a vector.
        """
        first, last = min(self.loops), max(self.loops)
        if number != last or first == last or lane is None or not self.outer or not from_memory(self.kernel):
            return []
        lines: list[str] = []
        for stmt in self.loops[first]:
            if not isinstance(stmt, Load) or stmt.access.mask:
                continue
            param = self.e.kernel.params[stmt.access.param]
            index = self.space.at(stmt.access.address(param))
            steps = {atom.name: c for atom, c in index.terms if atom.kind == "var"}
            row = steps.get(self.outer[-1].name)
            if len(steps) == len(index.terms) and steps.get(lane.name) == 1 and isinstance(row, int):
                nbytes = row * param.type.dtype.itemsize
                if nbytes >= _PAGE // 4:
                    later = size_text(row * -(-_EARLY // nbytes))
                    lines.append(f"__builtin_prefetch({param.name} + {self.e.affine(index)[0]} + {later});")
        return list(dict.fromkeys(lines))

    def _vectors(self, block: list[str], lane: Axis, folds: Sequence[Fold], copies: int) -> list[str]:
        """The innermost loop in steps of a vector, from ``begin`` to ``end``."""
        lines: list[str] = []
        for f in folds:
            first = ", ".join([f"all({f.start})"] * copies)
            lines.append(f"vf {f.name}_v[] = {{{first}}};" if copies > 1 else f"vf {f.name}_v = {first};")
        lines += steps(lane, block, copies)
        for f in folds:
            if copies > 1:
                step = fold_step(f.op, f"{f.name}_v[0]", f"{f.name}_v[u]").replace("(n,", "(Full{},")
                lines.append(f"for (int u = 1; u < {copies}; ++u) {step}")
            text = f"{FOLDS[f.op]}({f.name}_v{'[0]' if copies > 1 else ''})"
            lines.append(_STEPS[f.op].format(acc=f.name, v=text))
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
        body += [*_indented(blocks[-1], 1), "}", *_joins(sums)]
        return self._around(body, blocks, lane, few, partial)

    def _around(self, body: list[str], blocks: list[list[str]], lane: Axis, few: bool, partial: bool) -> list[str]:
        """Blocks of the innermost loop, and the loops around it; in the form ``few`` the caller deals them out."""
        if few:
            return [*(line for block in blocks[:-1] for line in block), *body]
        extent = size_text(lane.extent)
        if partial:
            head = f"for (i64 begin = 0; begin < {extent}; begin += {BLOCK}) {{"
            body = [head, f"  const i64 end = min(begin + {BLOCK}, {extent});", *_indented(body, 1), "}"]
        else:
            body = ["{", f"  const i64 begin = 0, end = {extent};", *_indented(body, 1), "}"]
        for axis, block in zip(reversed(self.space.rs[:-1]), reversed(blocks[1:-1]), strict=True):
            name = axis.name
            head = f"for (i64 {name} = 0; {name} < {size_text(axis.extent)}; ++{name}) {{"
            body = [head, *_indented([*block, *body], 1), "}"]
        return [*blocks[0], *body]


def _kept_kind(dtype: torch.dtype) -> str:
    """Row buffers hold values as they are computed."""
    return "bool" if dtype == torch.bool else "float"


def _joins(sums: Sequence[Fold]) -> list[str]:
    return [f"{f.name} += {f.name}_part;" for f in sums]


# ---------------------------------------------------------------- vectors across the rows


class _Across(_Writer):
    """Accumulators are rows of neighbouring results."""

    def context(self) -> dict[str, Any]:
        lane = self.space.xs[-1]
        self.outer = self.space.xs[:-1]
        width = lane.extent if isinstance(lane.extent, int) and lane.extent < LANES else LANES
        lines: list[str] = []
        for number, segment in enumerate(self.segments):
            later = {n for seg in self.segments[number + 1 :] for s in seg.stmts for n in refs(s)}
            lines += self._segment(segment, lane, int(width), later)
        return {
            "form": "across",
            "rows": items(self.outer, None),
            "lanes": size_text(lane.extent),
            "width": LANES,
            "coordinates": points(self.outer, "row"),
            "lines": lines,
        }

    def _segment(self, segment: Segment, lane: Axis, width: int, later: set[int]) -> list[str]:
        e = self.e
        known = [a.name for a in self.outer]
        rs = self.space.rs if segment.loop else ()
        e.nest(known, [*(a.name for a in rs), lane.name])
        inner = e.known[-1]
        at = f"[{lane.name} - begin]"
        folds: list[Fold] = []
        starts: list[str] = []
        keep: list[tuple[int, str]] = []
        for stmt in segment.stmts:
            if isinstance(stmt, Reduce):
                f, text, _ = self.fold(stmt)
                folds.append(f)
                starts.append(f"{f.type} {f.name}[{width}];")
                if f.at is not None:
                    starts.append(f"i64 {f.at}[{width}];")
                    e.line(self.better(f, f.name + at, f.at + at, text), inner)
                else:
                    e.line(_STEPS[f.op].format(acc=f.name + at, v=text), inner)
                continue
            e.emit(stmt)
            if not segment.loop and not isinstance(stmt, Store | Check) and stmt.out in later:
                text, dims, dtype = e.values[stmt.out]
                if lane.name in dims and not text.endswith(at):
                    name = f"{text}_all"
                    if all(name + at != kept for _, kept in keep):  # a cast may be its operand under another number
                        starts.append(f"{value_type(dtype)} {name}[{width}];")
                        e.line(f"{name}{at} = {text};", inner)
                    keep.append((stmt.out, name + at))
        clauses = {"|": ["bad"]} if e.flags else {}
        loop = f"for (i64 {lane.name} = begin; {lane.name} < end; ++{lane.name})"
        if folds:
            first = [f"{f.name}{at} = {f.start};" for f in folds] + [f"{f.at}{at} = -1;" for f in folds if f.at]
            starts += [f"{loop} {{ {' '.join(first)} }}"]
        body: list[str] = []
        if e.blocks[-1]:
            body = [simd(clauses), f"{loop} {{", *_indented(e.blocks[-1], 1), "}"]
        for axis, block in zip(reversed(rs), reversed(e.blocks[1:-1]), strict=True):
            name = axis.name
            head = f"for (i64 {name} = 0; {name} < {size_text(axis.extent)}; ++{name}) {{"
            body = [head, *_indented([*block, *body], 1), "}"]
        for n, text in keep:
            e.values[n] = text, inner, e.values[n][2]
        dims = frozenset({*known, lane.name})
        for f in folds:
            self.result(f, f.name + at, f.at + at if f.at else None, dims)
        if segment.loop:
            return [*starts, "{", *_indented([*e.blocks[0], *body], 1), "}"]
        return [*starts, *e.blocks[0], *body]
