"""What the scan template is given: independent recurrences are dealt out to threads, each goes through its steps.

rows    the state of a recurrence is a row along the reduced loops; every step makes the new row with vectors along
        it, folds it, and goes on with what was folded.
across  vectors hold neighbouring recurrences, whose states are rows of vectors: nothing is folded across the lanes
        of a vector, and what comes before and after the fold is as wide. For memory that lies along the recurrences;
        what does not, but is the same at every step, is turned first.
apart   there is nothing to fold: vectors hold neighbouring recurrences.
"""

from __future__ import annotations

from typing import Any

from ...errors import check
from ...ir.types import contiguous_strides, product
from ...tiles.index import linearize, var
from ...tiles.kernel import Axis, Check, Kernel, Load, Reduce, Ref, Scan, Stmt, refs
from ..dialect import compute_dtype
from .expr import Dims, Emitter
from .running import along_steps, running, state_names, states
from .space import Space
from .text import points, simd, steps
from .vector import FOLDS, KINDS, Along, fold_step
from .words import cast, identity, loaded, size_text, value_type

__all__ = ["scan"]

LANES = 256  # recurrences side by side that a thread works on, at most
_STATE = 2048  # elements of the states of those
_STEPS = {
    "sum": "{acc} += {v};",
    "amax": "{acc} = maximum({acc}, {v});",
    "amin": "{acc} = minimum({acc}, {v});",
}
_WIDE_STEPS = {**_STEPS, "sum": "{acc} = {acc} + {v};"}
_CLAUSES = {"sum": "+", "amax": "amax", "amin": "amin"}


def scan(kernel: Kernel, space: Space) -> dict[str, Any]:
    """Context of ``scan.cpp.j2``, or of ``running.cpp.j2`` where running folds go along memory."""
    if along_steps(kernel, space):
        return running(kernel, space)
    across = _Across(kernel, space)
    return across.context() if across.fits() else _Writer(kernel, space).context()


class _Writer:
    def __init__(self, kernel: Kernel, space: Space) -> None:
        self.kernel, self.space = kernel, space
        self.e = Emitter(kernel, space)
        self.step = next((a for a in kernel.axes if a.kind == "s"), Axis("s", 1, "s"))
        self.reverse = any(s.reverse for s in kernel.body if isinstance(s, Scan))
        self.folds = bool(space.rs)
        self.loops: tuple[Axis, ...] = space.rs if self.folds else space.xs[-1:]
        self.outer: tuple[Axis, ...] = space.xs if self.folds else space.xs[:-1]
        self.states: list[str] = []
        self.before: list[str] = []
        self.body: list[str] = []

    def context(self) -> dict[str, Any]:
        if self.folds:
            for segment in self.kernel.segments():
                self._segment(segment.stmts, segment.loop)
        else:
            self._segment(self.kernel.body, True)
        lane = self.loops[-1] if self.loops else None
        apart = lane is not None and not self.folds
        return self.given(lane if apart else None, LANES)

    def given(self, lane: Axis | None, width: int) -> dict[str, Any]:
        """What the template is told; the recurrences along ``lane`` are dealt out in blocks of ``width``."""
        return {
            "rows": size_text(product(a.extent for a in self.outer)),
            "lanes": size_text(lane.extent) if lane is not None else "",
            "width": width,
            "coordinates": points(self.outer, "row" if lane is not None else "item"),
            "states": self.states,
            "before": self.before,
            "step": self.step.name,
            "steps": size_text(self.step.extent),
            "reverse": self.reverse,
            "body": self.body,
        }

    def _segment(self, stmts: tuple[Stmt, ...], loop: bool) -> None:
        e = self.e
        loops = self.loops if loop else ()
        lane = loops[-1] if loops else None
        wide = False
        if lane is not None:
            along = Along(self.kernel, self.space, lane.name, {n: d for n, (_, d, _) in e.values.items()})
            wide = along.all_wide(stmts, lane.extent)
        e.nest([a.name for a in self.outer], [self.step.name, *(a.name for a in loops)], wide)
        folds: list[Reduce] = []
        clauses: dict[str, list[str]] = {}
        for stmt in stmts:
            if isinstance(stmt, Scan):
                self._scan(stmt, wide)
            elif isinstance(stmt, Reduce):
                folds.append(stmt)
                clauses.setdefault(_CLAUSES[stmt.op], []).append(_name(stmt))
                self._fold(stmt, wide)
            else:
                e.emit(stmt)
        if e.flags:
            clauses.setdefault("|", []).append("bad")
        self.before += e.blocks[0]
        self.body += e.blocks[1]
        if lane is not None:
            self.body += [f"{_type(f)} {_name(f)} = {_start(f)};" for f in folds]
            self.body += self._nest(lane, folds, wide, simd(clauses))
        for f in folds:
            e.values[f.out] = _name(f), frozenset({*(a.name for a in self.outer), self.step.name}), f.dtype

    def _nest(self, lane: Axis, folds: list[Reduce], wide: bool, pragma: str) -> list[str]:
        """The loops of one step."""
        blocks = self.e.blocks[2:]
        if wide:
            body = [f"vf {_name(f)}_v = all({_start(f)});" for f in folds]
            body += steps(lane, blocks[-1])
            body += [_STEPS[f.op].format(acc=_name(f), v=f"{FOLDS[f.op]}({_name(f)}_v)") for f in folds]
        else:
            head = f"for (i64 {lane.name} = begin; {lane.name} < end; ++{lane.name}) {{"
            body = [pragma, head, *("  " + line for line in blocks[-1]), "}"]
        if not self.folds:
            return body  # the template says where a block of lanes begins and ends
        body = ["{", f"  const i64 begin = 0, end = {size_text(lane.extent)};", *("  " + line for line in body), "}"]
        for axis, block in zip(reversed(self.loops[:-1]), reversed(blocks[:-1]), strict=True):
            name = axis.name
            head = f"for (i64 {name} = 0; {name} < {size_text(axis.extent)}; ++{name}) {{"
            body = [head, *("  " + line for line in (*block, *body)), "}"]
        return body

    def _inner(self) -> Dims:
        return self.e.known[-1]

    def _scan(self, stmt: Scan, wide: bool) -> None:
        """The new state, which the next step finds where the old one was."""
        e = self.e
        check(
            not self.folds or len(e.blocks) > 2,
            lambda: f"{self.kernel.name}: a recurrence on fewer loops than the fold after it",
        )
        if stmt.fold:
            return self._running(stmt, wide)
        state, name, type_ = f"state{stmt.out}", f"scan{stmt.out}", value_type(stmt.dtype)
        place, size = self.state_at()
        self.states.append(f"alignas(64) {type_} {state}[{size}];")
        a, b = (self._operand(x, wide) for x in (stmt.a, stmt.b))
        inner = self._inner()
        old = f"get_float({state} + {place}, n)" if wide else f"{state}[{place}]"
        new = f"fma({a}, {old}, {b})" if type_ == "float" else f"{a} * {old} + {b}"
        e.line(f"const {'vf' if wide else type_} {name} = {self.later()} ? {new} : {b};", inner)
        e.line(f"put_float({state} + {place}, {name}, n);" if wide else f"{state}[{place}] = {name};", inner)
        e.values[stmt.out] = name, inner, stmt.dtype

    def _running(self, stmt: Scan, wide: bool) -> None:
        """The fold of all that came before and this step."""
        e, name, type_ = self.e, f"scan{stmt.out}", value_type(stmt.dtype)
        place, size = self.state_at()
        self.states += states(stmt, size)
        inner, b = self._inner(), self._operand(stmt.b, wide)
        if wide:
            place = f"state{stmt.out} + {place}"
            fold = {"amax": "maximum", "amin": "minimum"}[stmt.fold]
            e.line(f"const vf {name} = {fold}(get_float({place}, n), {b});", inner)
            e.line(f"put_float({place}, {name}, n);", inner)
        else:
            kept = ", ".join(f"{state}[{place}]" for state in state_names(stmt))
            e.line(f"const {type_} {name} = {stmt.fold}_on({b}, {kept});", inner)
        e.values[stmt.out] = name, inner, stmt.dtype

    def later(self) -> str:
        """Whether there was a step before this one, as C++."""
        name = self.step.name
        return f"{name} != {size_text(self.step.extent)} - 1" if self.reverse else name

    def row(self) -> tuple[str, str]:
        """The place in the row along the reduced axes, and its length."""
        folded = [a for a in self.kernel.axes if a.kind == "r"]
        sizes = [a.extent for a in folded]
        flat = linearize([var(a.name, a.extent) for a in folded], contiguous_strides(sizes))
        return self.e.index(flat)[0], size_text(product(sizes))

    def state_at(self) -> tuple[str, str]:
        """The place of a recurrence's state among those that a thread keeps, and how many that are."""
        if self.folds:
            return self.row()
        return (f"{self.loops[-1].name} - begin", str(LANES)) if self.loops else ("0", "1")

    def _operand(self, ref: Ref, wide: bool) -> str:
        text, dims, _ = self.e.values[ref.number]
        return text if not wide or self.e.wide(dims) else f"all({text})"

    def _fold(self, stmt: Reduce, wide: bool) -> None:
        name = _name(stmt)
        text = self._operand(stmt.arg, wide)
        line = fold_step(stmt.op, f"{name}_v", text) if wide else _STEPS[stmt.op].format(acc=name, v=text)
        self.e.line(line, self._inner())


class _Across(_Writer):
    """Vectors across the recurrences."""

    def __init__(self, kernel: Kernel, space: Space) -> None:
        super().__init__(kernel, space)
        self.lane = space.xs[-1] if space.xs else None
        self.outer = space.xs[:-1]
        self.loops = space.rs
        self.turned: dict[int, Load] = {}

    def fits(self) -> bool:
        """Whether every value can be a vector, or be turned into one before the first step."""
        if not self.folds or self.lane is None:
            return False
        lane = self.lane.name
        along = Along(self.kernel, self.space, lane, {})
        for s in self.kernel.body:
            if isinstance(s, Load) and not s.access.mask and not any(True for _ in refs(s)):
                index = s.access.address(self.kernel.params[s.access.param])
                loops = self.space.at(index).variables()
                if lane in loops and self.step.name not in loops and along.step(index) is None:
                    self.turned[s.out] = s
                    along.dims[s.out] = frozenset(loops)
        for s in self.turned.values():
            if self.kernel.params[s.access.param].type.dtype not in KINDS or s.dtype not in KINDS:
                return False
        rest = [s for s in self.kernel.body if getattr(s, "out", None) not in self.turned]
        return not any(isinstance(s, Check) for s in rest) and along.all_wide(rest, self.lane.extent)

    def context(self) -> dict[str, Any]:
        lane = self.lane
        assert lane is not None
        row = product(a.extent for a in self.loops)
        assert isinstance(row, int)
        self.width = max(16, min(LANES, _STATE // row // 16 * 16))
        self._turn(lane)
        lines: list[str] = []
        for segment in self.kernel.segments():
            lines += self._lines(segment.stmts, segment.loop, lane)
        self.body += steps(lane, lines)
        return self.given(lane, self.width)

    def _turn(self, lane: Axis) -> None:
        """What lies otherwise in memory and is the same at every step, copied so that lanes are side by side."""
        e = self.e
        for number, stmt in self.turned.items():
            e.nest([a.name for a in self.outer], [*(a.name for a in self.loops), lane.name])
            text, dims = e.element(stmt.access)
            dtype = self.kernel.params[stmt.access.param].type.dtype
            text = cast(f"({loaded(text, dtype)})", dtype, stmt.dtype)
            varies = {a.name for a in self.loops} & dims
            place = f"({self.row()[0]}) * {self.width} + " if varies else ""
            place += f"{lane.name} - begin"
            length = self.row()[1] if varies else "1"
            self.states.append(f"alignas(64) float turned{number}[{length} * {self.width}];")
            lines = [
                f"for (i64 {lane.name} = begin; {lane.name} < end; ++{lane.name})",
                f"  turned{number}[{place}] = {text};",
            ]
            for axis in reversed(self.loops if varies else ()):
                head = f"for (i64 {axis.name} = 0; {axis.name} < {size_text(axis.extent)}; ++{axis.name})"
                lines = [head, *("  " + line for line in lines)]
            self.before += lines
            e.values[number] = f"get_float(turned{number} + {place}, n)", dims | {lane.name}, stmt.dtype

    def _lines(self, stmts: tuple[Stmt, ...], loop: bool, lane: Axis) -> list[str]:
        """One segment of a step, for the lanes of a vector."""
        e = self.e
        loops = self.loops if loop else ()
        e.nest([a.name for a in self.outer], [self.step.name, lane.name, *(a.name for a in loops)])
        e.lane = lane.name
        folds: list[Reduce] = []
        for stmt in stmts:
            if isinstance(stmt, Scan):
                self._scan(stmt, True)
            elif isinstance(stmt, Reduce):
                folds.append(stmt)
                acc = f"{_name(stmt)}_v"
                e.line(_WIDE_STEPS[stmt.op].format(acc=acc, v=self._operand(stmt.arg, True)), self._inner())
            elif getattr(stmt, "out", None) not in self.turned:
                e.emit(stmt)
        self.before += e.blocks[0]
        self.body += e.blocks[1]
        lines = [*e.blocks[2], *(f"vf {_name(f)}_v = all({_start(f)});" for f in folds)]
        body: list[str] = []
        for axis, block in zip(reversed(loops), reversed(e.blocks[3:]), strict=True):
            head = f"for (i64 {axis.name} = 0; {axis.name} < {size_text(axis.extent)}; ++{axis.name}) {{"
            body = [head, *("  " + line for line in (*block, *body)), "}"]
        dims = frozenset({*(a.name for a in self.outer), self.step.name, lane.name})
        for f in folds:
            e.values[f.out] = f"{_name(f)}_v", dims, f.dtype
        return lines + body

    def state_at(self) -> tuple[str, str]:
        assert self.lane is not None
        place, length = self.row()
        return f"({place}) * {self.width} + {self.lane.name} - begin", f"{length} * {self.width}"


def _name(stmt: Reduce) -> str:
    return f"{stmt.op}{stmt.out}"


def _type(stmt: Reduce) -> str:
    return value_type(compute_dtype(stmt.dtype))


def _start(stmt: Reduce) -> str:
    return identity(stmt.op, compute_dtype(stmt.dtype))
