"""Running folds in C++: the state of each, and the form for memory that lies along the steps.

Where it lies along recurrences side by side, ``scan`` gives each lane of a vector a state of its own. A row of memory
is gone through in stretches instead, which stay in the first cache:

    run3[i] = what the fold takes at step i              with vectors along the steps
    run_sum(run3, n, state3)                             from step to step: see running.hpp
    out[i] = what is made of run3[i]                     with vectors again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...errors import check
from ...ir.types import product
from ...tiles.kernel import Axis, Check, Kernel, Load, Scan, Stmt, Store, refs
from .expr import Emitter
from .space import Space
from .text import points, simd, steps
from .vector import Along
from .words import identity, size_text, value_type

__all__ = ["along_steps", "has_folds", "running", "state_names", "states"]


def has_folds(kernel: Kernel) -> bool:
    """Whether there is a running fold in a kernel."""
    return kernel.family == "scan" and any(isinstance(s, Scan) and s.fold for s in kernel.body)


def state_names(stmt: Scan) -> tuple[str, ...]:
    """The variables that go on from one step to the next, as the functions of running.hpp take them."""
    return (f"state{stmt.out}", *((f"peak{stmt.out}",) if stmt.fold == "logsumexp" else ()))


def states(stmt: Scan, size: str | None = None) -> list[str]:
    """Lines that make the state of a running fold before its first step; ``size`` of them side by side, if given."""
    type_ = value_type(stmt.dtype)
    extreme = stmt.fold in ("amax", "amin")
    types = (type_ if extreme else f"kept<{type_}>", type_)
    starts = ("0" if stmt.fold == "logsumexp" else identity(stmt.fold, stmt.dtype), identity("amax", stmt.dtype))
    lines: list[str] = []
    for name, kind, start in zip(state_names(stmt), types, starts, strict=False):
        if size is None:
            lines.append(f"{kind} {name} = {start};")
        else:
            lines += [
                f"alignas(64) {kind} {name}[{size}];",
                f"for (i64 i = 0; i < {size}; ++i) {name}[i] = {start};",
            ]
    return lines


def along_steps(kernel: Kernel, space: Space) -> bool:
    """Whether more memory lies along the steps of a kernel's running folds than along rows side by side."""
    step = _step(kernel)
    if step is None or space.rs or not has_folds(kernel):
        return False
    bytes_along: Counter[str] = Counter()
    for s in kernel.body:
        if isinstance(s, Load | Store):
            param = kernel.params[s.access.param]
            for atom, c in space.at(s.access.address(param)).terms:
                if atom.kind == "var" and c in (1, -1):
                    bytes_along[atom.name] += param.type.dtype.itemsize
    return not space.xs or bytes_along[step.name] > bytes_along[space.xs[-1].name]


def running(kernel: Kernel, space: Space) -> dict[str, Any]:
    """Context of ``running.cpp.j2``, for a kernel of which ``along_steps`` holds."""
    return _Rows(kernel, space).context()


def _step(kernel: Kernel) -> Axis | None:
    return next((a for a in kernel.axes if a.kind == "s"), None)


class _Rows:
    def __init__(self, kernel: Kernel, space: Space) -> None:
        step = _step(kernel)
        assert step is not None
        backwards = any(s.reverse for s in kernel.body if isinstance(s, Scan))
        check(not backwards, lambda: f"{kernel.name}: running folds go from the first step on")
        self.kernel, self.space, self.step = kernel, space, step
        self.e = Emitter(kernel, space)
        self.outer = [a.name for a in space.xs]
        self.place = f"{step.name} - begin"
        self.states: list[str] = []
        self.before: list[str] = []
        self.body: list[str] = []
        self.done: set[int] = set()  # scans whose results lie in their buffers

    def context(self) -> dict[str, Any]:
        for stmts in _passes(self.kernel.body):
            self._pass(stmts)
        return {
            "template": "running",
            "rows": size_text(product(a.extent for a in self.space.xs)),
            "coordinates": points(self.space.xs, "item"),
            "states": self.states,
            "before": self.before,
            "steps": size_text(self.step.extent),
            "body": self.body,
        }

    def _pass(self, stmts: Sequence[Stmt]) -> None:
        """One pass over a stretch, and the scans whose operands it leaves behind."""
        e, wide = self.e, self._wide(stmts)
        e.nest(self.outer, [self.step.name], wide)
        scans: list[Scan] = []
        for s in stmts:
            if not isinstance(s, Scan):
                if self._varies(s):
                    e.emit(s)
            elif s.out in self.done:
                text = f"get_float(run{s.out} + {self.place}, n)" if wide else f"run{s.out}[{self.place}]"
                e.define(s.out, "scan", text, e.known[-1], s.dtype)
            else:
                scans.append(s)
                self._leave(s, wide)
        self.before += e.blocks[0]
        name, lines = self.step.name, e.blocks[1]
        if wide:
            self.body += steps(self.step, lines)
        elif lines:
            head = f"for (i64 {name} = begin; {name} < end; ++{name}) {{"
            self.body += [simd({"|": ["bad"]} if e.flags else {}), head, *("  " + line for line in lines), "}"]
        for s in scans:
            self.body.append(_run(s))
            self.done.add(s.out)

    def _varies(self, s: Stmt) -> bool:
        """Whether a statement is still to be written: what is the same at every step is so only once."""
        known = self.e.values.get(getattr(s, "out", -1))
        return known is None or self.step.name in known[1]

    def _wide(self, stmts: Sequence[Stmt]) -> bool:
        """Whether a pass is written with vectors."""
        scans = {s.out: s for s in stmts if isinstance(s, Scan)}
        dims = {n: d for n, (_, d, _) in self.e.values.items()} | dict.fromkeys(scans, frozenset({self.step.name}))
        along = Along(self.kernel, self.space, self.step.name, dims)
        rest = [s for s in stmts if not isinstance(s, Scan)]
        return along.all_wide(rest, self.step.extent) and all(value_type(s.dtype) == "float" for s in scans.values())

    def _leave(self, stmt: Scan, wide: bool) -> None:
        """What a scan takes at this step, where its function finds it."""
        type_ = value_type(stmt.dtype)
        self.states += states(stmt) if stmt.fold else [f"{type_} state{stmt.out} = 0;"]
        operands = {"run": stmt.b} if stmt.fold else {"factor": stmt.a, "run": stmt.b}
        for name, ref in operands.items():
            text, dims, _ = self.e.values[ref.number]
            self.states.append(f"alignas(64) {type_} {name}{stmt.out}[STRETCH];")
            if wide:
                text = text if self.e.wide(dims) else f"all({text})"
                line = f"put_float({name}{stmt.out} + {self.place}, {text}, n);"
            else:
                line = f"{name}{stmt.out}[{self.place}] = {text};"
            self.e.line(line, self.e.known[-1])


def _run(stmt: Scan) -> str:
    """The call that goes through a stretch."""
    if not stmt.fold:
        return f"run_line(factor{stmt.out}, run{stmt.out}, end - begin, state{stmt.out}, begin > 0);"
    return f"run_{stmt.fold}(run{stmt.out}, end - begin, {', '.join(state_names(stmt))});"


def _passes(body: Sequence[Stmt]) -> list[list[Stmt]]:
    """The statements of each pass over a stretch; scans that an earlier pass fed are read there."""
    made = {s.out: s for s in body if not isinstance(s, Store | Check)}  # type: ignore[union-attr]
    level: dict[int, int] = {}  # how many passes come before a value is known
    roots: dict[int, list[Stmt]] = {}
    for s in body:
        at = max((level[n] for n in refs(s)), default=0)
        if isinstance(s, Store | Check | Scan):
            roots.setdefault(at, []).append(s)
        if not isinstance(s, Store | Check):
            level[s.out] = at + isinstance(s, Scan)  # type: ignore[union-attr]
    found: list[list[Stmt]] = []
    for at in sorted(roots):
        wanted: set[int] = set()
        stack = [n for s in roots[at] for n in refs(s)]
        while stack:
            n = stack.pop()
            if n not in wanted:
                wanted.add(n)
                stack += [] if isinstance(made[n], Scan) else refs(made[n])
        mine = {id(s) for s in roots[at]} | {id(made[n]) for n in wanted}
        found.append([s for s in body if id(s) in mine])
    return found
