"""What the forms of a reduction in C++ share: accumulators, and the text that folds a value into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ir.types import contiguous_strides
from ...tiles.index import Index, linearize, var
from ...tiles.kernel import Axis, Kernel, Load, Reduce
from ..dialect import compute_dtype
from .expr import Dims, Emitter
from .gather import asked_a_page_on
from .space import Space
from .vector import asked_into, first_cache, foresees_little, too_large
from .words import cast, identity, size_text, value_type

__all__ = ["Fold", "Writer", "indented"]

_LINE = 64  # bytes of a line of the caches
_EARLY = 16384  # bytes from what is read to what is asked for: some hundred lines on their way hide the latency
_NEAR = 2048  # the same for a row that is read again, where the first cache is too small for as much

_STEPS = {
    "sum": "{acc} += {v};",
    "prod": "{acc} *= {v};",
    "any": "{acc} |= {v};",
    "all": "{acc} &= {v};",
    "amax": "{acc} = maximum({acc}, {v});",
    "amin": "{acc} = minimum({acc}, {v});",
}


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
    def whole(self) -> str:
        """The type that the results of blocks are put together in."""
        return "double" if self.op == "sum" and self.type == "float" else self.type

    @property
    def at(self) -> str | None:
        return f"{self.name}_at" if self.op in ("argmax", "argmin") else None

    def step(self, acc: str, value: str) -> str:
        """The line that takes in one more value, of the folds that do not ask where it was."""
        return _STEPS[self.op].format(acc=acc, v=value)

    def joined(self, part: str) -> str:
        """The line that takes in a thread's partial result; threads come in the order of the row."""
        acc, v = self.name, f"{part}.{self.name}"
        if self.at is None:
            return self.step(acc, v)
        found = f"{part}.{self.at}"
        return f"if ({found} >= 0 && ({_better(self, acc, self.at, v, found)})) {{ {acc} = {v}; {self.at} = {found}; }}"


def _better(f: Fold, acc: str, at: str, v: str, place: str) -> str:
    """Whether a value replaces the best so far: the first of the best wins, NaN before all."""
    tests = [f"({v} {'>' if f.op == 'argmax' else '<'} {acc})", f"(({v} == {acc}) & ({place} < {at}))", f"({at} < 0)"]
    if f.type in ("float", "double"):
        tests.append(f"(({v} != {v}) & (({acc} == {acc}) | ({place} < {at})))")
    return " | ".join(tests)


def _fold_name(stmt: Reduce) -> str:
    """The greatest of booleans is whether any holds."""
    return {"amax": "any", "amin": "all"}.get(stmt.op, stmt.op) if stmt.arg_dtype == torch.bool else stmt.op


class Writer:
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

    def early(self, load: Load, rows: Axis, lane: Axis, again: bool = False, ahead: int = _EARLY) -> str | None:
        """The line that asks for the element of a load some rows later; None where rows do not lie in a line.

        Args:
            load: what is read at this point.
            rows: the loop that goes from row to row.
            lane: the loop along a row.
            again: the row is read more than once. A first cache too small for what is asked for far ahead is asked to
                hold the next row then, beside this one: on a Zen 4, rms_norm of bf16 took 0.7 to 0.85 of the time.
            ahead: bytes.
        """
        param = self.kernel.params[load.access.param]
        index = self.space.at(load.access.address(param))
        steps = {atom.name: c for atom, c in index.terms if atom.kind == "var"}
        row = steps.get(rows.name)
        if load.access.mask or len(steps) < len(index.terms) or steps.get(lane.name) != 1 or not isinstance(row, int):
            return None
        nbytes = row * param.type.dtype.itemsize
        if nbytes < _LINE:
            return None
        into = asked_into(ahead)
        if again and into and 4 * nbytes <= first_cache():
            ahead, into = _NEAR, ""
        later = size_text(row * -(-ahead // nbytes))
        return f"__builtin_prefetch({param.name} + {self.e.affine(index)[0]} + {later}{into});"

    def along(self, load: Load, lane: Axis) -> str | None:
        """The line that asks for what a load reads a page further along ``lane``; None where that is no line, or where
        it would come into the second cache: the CPU's own prefetching brings it there, and asking beside it made sums
        along rows that the last cache of a Zen 4 holds take 1.2 times as long."""
        into = asked_into(_EARLY)
        if into and not foresees_little():
            return None
        return asked_a_page_on(self.kernel, self.e, lane, load, into)

    def once_a_line(self, load: Load, text: str, pairs: bool = False) -> str:
        """A request made by the first only of the vectors, or pairs of them, ``u`` that lie in one line."""
        size = self.kernel.params[load.access.param].type.dtype.itemsize * (2 if pairs else 1)
        return f"if (W * {size} >= {_LINE} || u % ({_LINE} / (W * {size})) == 0) {text}"

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


def indented(lines: Sequence[str], depth: int) -> list[str]:
    return ["  " * depth + line for line in lines]
