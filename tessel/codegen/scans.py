"""What the Triton template of scans is given: steps in order, the state in registers.

    state3 = tl.full([XB, RB], 0.0, tl.float32)
    for t in range(0, 2048, 4):                   # STEPS = 4: what four steps load is on its way together
        ...
        state3_1 = tl.where(t0 > 0, exp1 * state3 + mul2, mul2)
        state3 = state3_1
        ...                                       # and so on for t + 1, t + 2 and t + 3

Statements are written once for each of the steps before the next statement, so that no load waits for a step's result.
Sums come in the order of steps, as in eager. With SIDE > 1 that many steps are a dimension of the tile, scanned by
``tl.associative_scan`` and continued from the tile before: for few recurrences of many steps. Its sums come in another
order, and a product of factors that overflows gives NaN where one step after the other would not. A running fold
(``Scan.fold``) goes either way too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import check
from ..ir.types import Dim, product
from ..tiles.default import of_kind
from ..tiles.index import scale, var
from ..tiles.kernel import Axis, Carry, Check, Kernel, Load, Next, Reduce, Ref, Scan, Stmt, Store, axes_read, refs
from .dialect import cast, compute_dtype, literal, rounded, size_text, triton_dtype
from .expr import Emitter
from .families import BOTH, Folds, R, X, divides, flat_axes, names_for
from .names import NONE, Dims, Lane, used_indices

__all__ = ["scan"]

# The state and the value of a step as one, by the fold; of a recurrence that has none, a line.
_JOINED = {
    "": "{a} * {state} + {b}",
    "sum": "{state} + {b}",
    "prod": "{state} * {b}",
    "amax": "tessel_maximum({state}, {b})",
    "amin": "tessel_minimum({state}, {b})",
    "logsumexp": "log_add({state}, {b})",
}
# The same of all steps of a tile up to each.
_ASIDE = {"sum": "sums_on", "prod": "products_on", "amax": "maxima_on", "amin": "minima_on", "logsumexp": "log_sums_on"}


@dataclass
class Block:
    """A loop over steps: its bounds as text, and its lines."""

    start: str
    stop: str
    step: str
    lines: list[str] = field(default_factory=list)


def scan(kernel: Kernel, knobs: Mapping[str, int], vendor: str) -> dict[str, Any]:
    """Context of ``scan.triton.j2``."""
    return _Writer(kernel, knobs, vendor == "interpret").context()


class _Writer:
    def __init__(self, kernel: Kernel, knobs: Mapping[str, int], interpret: bool) -> None:
        self.kernel, self.knobs, self.interpret = kernel, knobs, interpret
        self.step = next((a for a in kernel.axes if a.kind == "s"), Axis("s", 1, "s"))
        self.reverse = any(s.reverse for s in kernel.body if isinstance(s, Scan))
        self.x_extent, self.r_extent = (product(a.extent for a in of_kind(kernel, kind)) for kind in "xr")
        self.folds = bool(of_kind(kernel, "r"))
        self.side = knobs["SIDE"]
        loop = any(isinstance(s, Carry) for s in kernel.body)
        check(
            not (self.side > 1 and (self.folds or loop or knobs["STEPS"] > 1)),
            lambda: f"{kernel.name}: SIDE={self.side} is for linear recurrences without a fold, and STEPS=1",
        )
        check(
            not self.folds or (isinstance(self.r_extent, int) and knobs["RB"] >= self.r_extent),
            lambda: f"{kernel.name}: RB={knobs['RB']} must hold all {self.r_extent} places of a state",
        )
        self.names = names_for(kernel, "XB", "RB", "SIDE", "t", "place", "s_ok", "lane")
        self.shape = ("XB", "RB") if self.folds else ("XB", "SIDE") if self.side > 1 else ("XB",)
        self.whole: Dims = X if len(self.shape) == 1 else BOTH
        self.x_ok = None if divides(knobs["XB"], self.x_extent) else "x_ok"
        self.carried: dict[int, Dims] = {}  # of a loop of any kind: the dimensions of its carries
        self.r_ok = None if not self.folds or divides(knobs["RB"], self.r_extent) else "r_ok"

    def context(self) -> dict[str, Any]:
        body = self.kernel.body
        moving = _moving(body, self.step.name)
        first = self._emitter({self.step.name: Lane("", frozenset({2}))})  # a dimension that no tile has
        for s in (s for s, moves in zip(body, moving) if not moves):
            self._emit(first, s)
        for s in body:
            if isinstance(s, Carry):
                first.emit(Load(s.out, s.access, s.dtype))
                text, dims, _ = first.values[s.out]
                self.carried[s.out] = dims
                first.lines.append(f"{self._state(s)} = {text}")
            elif isinstance(s, Scan):
                shape = "XB, 1" if self.side > 1 else ", ".join(self.shape)
                dtype = compute_dtype(s.dtype)
                start = f"tl.full([{shape}], {literal(0, dtype, False)}, {triton_dtype(dtype)})"
                first.lines.append(f"{self._state(s)} = {start}")
        for s in (s for s, moves in zip(body, moving) if moves):
            first.hoist(used_indices(self.kernel, s), BOTH)
        before = first.take()
        after = self._last_carries(first)
        # What is loaded, wherever it is read, is on its way before the first step waits for anything.
        steps = sorted((s for s, moves in zip(body, moving) if moves), key=lambda s: not _plain_load(s))
        write = self._aside if self.side > 1 else self._in_order
        blocks = write(first, steps)
        return {
            "x_extent": size_text(self.x_extent),
            "x_masked": self.x_ok is not None,
            "r_extent": size_text(self.r_extent),
            "r_masked": self.r_ok is not None,
            "flat": len(self.shape) == 1,
            "folds": self.folds,
            "side": self.side,
            "before": before,
            "blocks": blocks,
            "after": after,
        }

    def _emitter(self, steps: Mapping[str, Lane], after: Emitter | None = None) -> Emitter:
        """For statements of one step, or of none; what ``after`` knows is known."""
        axes = {**flat_axes(of_kind(self.kernel, "x"), "x"), **flat_axes(of_kind(self.kernel, "r"), "r")}
        lanes = {"x": Lane("x", X, self.x_ok), **({"r": Lane("r", R, self.r_ok)} if self.folds else {}), **steps}
        if "s" in steps:
            at = var("s", self.step.extent)
            axes[self.step.name] = scale(at, -1) + (self.step.extent - 1) if self.reverse else at
        e = Emitter(self.kernel, self.names, axes, lanes, self.shape, self.interpret)
        if after is not None:
            e.restore(after.scope())
        return e

    def _state(self, stmt: Scan | Carry) -> str:
        key = ("state", stmt.out)
        if key not in self.names.known:
            self.names.known[key] = self.names.fresh(f"state{stmt.out}")
        return self.names.known[key]

    def _emit(self, e: Emitter, stmt: Stmt) -> None:
        if isinstance(stmt, Reduce):
            Folds(e, self.r_ok, size_text(self.r_extent)).whole(stmt)
        else:
            e.emit(stmt)

    # ------------------------------------------------------------ one step after the other

    def _in_order(self, first: Emitter, stmts: Sequence[Stmt]) -> list[Block]:
        count, total = self.knobs["STEPS"], self.step.extent
        if divides(count, total):
            return [self._loop(first, stmts, 0, total, count)]
        most: Dim = total // count * count
        main = [] if most == 0 else [self._loop(first, stmts, 0, most, count)]
        return [*main, self._loop(first, stmts, most, total, 1)]

    def _loop(self, first: Emitter, stmts: Sequence[Stmt], start: Dim, stop: Dim, count: int) -> Block:
        """A loop that goes ``count`` steps a turn."""
        lines: list[str] = []
        each: list[tuple[Emitter, str]] = []
        for i in range(count):
            at = self.names.fresh(f"t{i}")
            more = f" + {i}" if i else ""
            lines.append(
                f"{at} = "
                + (f"tl.full([{first.unit}], t{more}, INDEX)" if self.interpret else f"tl.cast(t{more}, INDEX)")
            )
            each.append((self._emitter({"s": Lane(at, NONE)}, first), at))
        begins = not (isinstance(start, int) and start > 0)
        if self.carried:
            return Block(size_text(start), size_text(stop), str(count), lines + self._whole_steps(stmts, each))
        for stmt in stmts:
            for i, (e, at) in enumerate(each):
                if isinstance(stmt, Scan):
                    self._advance(e, stmt, f"{at} > 0" if begins and not i else "")
                else:
                    self._emit(e, stmt)
                lines += e.take()
        return Block(size_text(start), size_text(stop), str(count), lines)

    def _advance(self, e: Emitter, stmt: Scan, later: str) -> None:
        """The next state; ``later`` tells whether there was one before, if that is not known."""
        (a, _, _), (b, _, _), state = e.values[stmt.a.number], e.values[stmt.b.number], self._state(stmt)
        new = _JOINED[stmt.fold].format(a=a, b=b, state=state)
        e.assign(stmt.out, "scan", f"tl.where({later}, {new}, {b})" if later else new, self.whole, stmt.dtype)
        e.lines.append(f"{state} = {e.values[stmt.out][0]}")

    # ------------------------------------------------------------ steps of any kind

    def _whole_steps(self, stmts: Sequence[Stmt], each: Sequence[tuple[Emitter, str]]) -> list[str]:
        """All that is loaded for the steps, then one step after the other; carries change when a step is over."""
        lines: list[str] = []
        for stmt in (s for s in stmts if _plain_load(s)):
            for e, _ in each:
                e.emit(stmt)
                lines += e.take()
        rest = [s for s in stmts if not _plain_load(s) and not isinstance(s, Next)]
        ends = [s for s in stmts if isinstance(s, Next)]
        for e, _ in each:
            for stmt in rest:
                if isinstance(stmt, Carry):
                    e.define(stmt.out, self._state(stmt), self.carried[stmt.out], stmt.dtype)
                else:
                    self._emit(e, stmt)
            for i, end in enumerate(ends):
                self._end(e, end, f"next{i}")
            e.lines += [f"{self._state_of(end)} = next{i}" for i, end in enumerate(ends)]
            lines += e.take()
        return lines

    def _end(self, e: Emitter, stmt: Next, name: str) -> None:
        """The next value of a carry under a name of its own, rounded as memory would."""
        dtype = self.kernel.params[stmt.access.param].type.dtype
        text, dims = e.operand(stmt.arg, stmt.dtype, True)
        want = self.carried[stmt.out]
        check(dims <= want, lambda: f"{self.kernel.name}: a carry's next value has dimensions that the carry has not")
        text = rounded(cast(text, stmt.dtype, dtype, self.interpret), dtype, self.interpret)
        e.lines.append(f"{name} = {e.spread(text, dims, want)}")

    def _state_of(self, stmt: Next) -> str:
        return self._state(next(s for s in self.kernel.body if isinstance(s, Carry) and s.out == stmt.out))

    def _last_carries(self, first: Emitter) -> list[str]:
        """Stores of what the last step left."""
        for s in self.kernel.body:
            if isinstance(s, Next):
                dtype = self.kernel.params[s.access.param].type.dtype
                first.define(s.out, self._state_of(s), self.carried[s.out], dtype)
                first.emit(Store(s.access, Ref(s.out), dtype))
        return first.take()

    # ------------------------------------------------------------ steps side by side

    def _aside(self, first: Emitter, stmts: Sequence[Stmt]) -> list[Block]:
        masked = not divides(self.side, self.step.extent)
        lines = ["lane = tl.arange(0, SIDE).to(INDEX)[None, :]", "place = t + lane"]
        if masked:
            lines.append(f"s_ok = place < {size_text(self.step.extent)}")
        e = self._emitter({"s": Lane("place", R, "s_ok" if masked else None)}, first)
        for stmt in stmts:
            if not isinstance(stmt, Scan):
                self._emit(e, stmt)
                continue
            dtype, state = triton_dtype(compute_dtype(stmt.dtype)), self._state(stmt)
            text = self._up_to_each(e, stmt, masked)
            e.assign(stmt.out, "scan", text, BOTH, stmt.dtype)
            none = f"tl.full([1, 1], {literal(0, compute_dtype(stmt.dtype), False)}, {dtype})"
            e.lines.append(f"{state} = fold_sum(tl.where(lane == SIDE - 1, {e.values[stmt.out][0]}, {none}))")
        return [Block("0", size_text(self.step.extent), "SIDE", lines + e.take())]

    def _up_to_each(self, e: Emitter, stmt: Scan, masked: bool) -> str:
        """The steps of a tile scanned, and continued from the state before."""
        state, here = self._state(stmt), self.names.fresh(f"here{stmt.out}")
        if stmt.fold:  # what lies past the end comes after all that is there
            text, dims, _ = e.values[stmt.b.number]
            e.lines.append(f"{here} = {_ASIDE[stmt.fold]}({e.spread(text, dims, BOTH)})")
            joined = _JOINED[stmt.fold].format(a="", b=here, state=state)
        else:
            operands = []
            for ref, neutral in ((stmt.a, "1.0"), (stmt.b, "0.0")):
                text, dims, _ = e.values[ref.number]
                if masked:
                    text, dims = f"tl.where(s_ok, {text}, {neutral})", dims | R
                operands.append(e.spread(text, dims, BOTH))
            factor = self.names.fresh(f"factor{stmt.out}")
            e.lines.append(f"{factor}, {here} = scan_linear({', '.join(operands)})")
            joined = _JOINED[""].format(a=factor, b=here, state=state)
        return f"tl.where(tl.full([1, 1], t, INDEX) > 0, {joined}, {here})"


def _plain_load(s: Stmt) -> bool:
    return isinstance(s, Load) and not any(True for _ in refs(s))


def _moving(body: Sequence[Stmt], step: str) -> list[bool]:
    """Which statements differ from step to step."""
    numbers: set[int] = set()
    found = []
    for s in body:
        moves = isinstance(s, Scan | Carry | Next) or step in axes_read(s) or any(n in numbers for n in refs(s))
        found.append(moves)
        if moves and not isinstance(s, Store | Check | Next):
            numbers.add(s.out)
    return found
