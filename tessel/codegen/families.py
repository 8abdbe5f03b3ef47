"""What the pointwise and reduction templates are given: lines of code, made from a tile program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.types import Dim, product
from ..tiles.default import of_kind
from ..tiles.index import Index, delinearize, exact_div, var
from ..tiles.kernel import Axis, Kernel, Reduce, Segment
from .dialect import cast, compute_dtype, identity, literal, size_text, triton_dtype
from .expr import Emitter
from .names import Dims, Lane, Names, used_indices

X: Dims = frozenset({0})
R: Dims = frozenset({1})
BOTH: Dims = frozenset({0, 1})


@dataclass
class SegmentText:
    """Lines before a loop, in it (empty: no loop) and after it."""

    before: list[str] = field(default_factory=list)
    loop: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


def flat_axes(axes: Sequence[Axis], name: str) -> dict[str, Index]:
    """Axes as coordinates of one flat variable ``name``, the last fastest."""
    flat = var(name, product(a.extent for a in axes))
    return dict(zip((a.name for a in axes), delinearize(flat, [a.extent for a in axes]), strict=True))


def divides(block: int, extent: Dim) -> bool:
    """Whether blocks never overhang."""
    return exact_div(extent, block) is not None


def names_for(kernel: Kernel, *taken: str) -> Names:
    """Names with those the template itself uses taken."""
    words = {"x", "r", "x_ok", "r_ok", "r_start", "tl", "triton", "INDEX", "min", "max", *taken, *kernel.symbols()}
    words |= {f"{p.name}_ptr" for p in kernel.params}
    return Names(used=words)


def arguments(kernel: Kernel) -> list[str]:
    """Runtime arguments: pointers in parameter order, then sizes."""
    return [f"{p.name}_ptr" for p in kernel.params] + list(kernel.symbols())


def pointwise(kernel: Kernel, knobs: Mapping[str, int], vendor: str) -> dict[str, Any]:
    """Context of ``pointwise.triton.j2``."""
    interpret = vendor == "interpret"
    extent = product(a.extent for a in of_kind(kernel, "x"))
    masked = not divides(knobs["XB"], extent)
    lanes = {"x": Lane("x", X, "x_ok" if masked else None)}
    e = Emitter(kernel, names_for(kernel, "XB"), flat_axes(of_kind(kernel, "x"), "x"), lanes, ("XB",), interpret)
    for stmt in kernel.body:
        e.emit(stmt)
    return {"x_extent": size_text(extent), "x_masked": masked, "body": e.take()}


def reduction(kernel: Kernel, knobs: Mapping[str, int], vendor: str) -> dict[str, Any]:
    """Context of ``reduction.triton.j2``: one block where RB holds all of r, else loops."""
    interpret = vendor == "interpret"
    x_extent, r_extent = (product(a.extent for a in of_kind(kernel, kind)) for kind in "xr")
    x_masked = not divides(knobs["XB"], x_extent)
    looped = not (isinstance(r_extent, int) and knobs["RB"] >= r_extent)
    r_masked = not divides(knobs["RB"], r_extent)
    lanes = {"x": Lane("x", X, "x_ok" if x_masked else None), "r": Lane("r", R, "r_ok" if r_masked else None)}
    axes = {**flat_axes(of_kind(kernel, "x"), "x"), **flat_axes(of_kind(kernel, "r"), "r")}
    e = Emitter(kernel, names_for(kernel, "XB", "RB"), axes, lanes, ("XB", "RB"), interpret)
    folds = Folds(e, "r_ok" if r_masked else None, size_text(r_extent))
    segments: list[SegmentText] = []
    if looped:
        segments = [_segment(e, folds, s) for s in kernel.segments()]
    else:
        for stmt in kernel.body:
            if isinstance(stmt, Reduce):
                folds.whole(stmt)
            else:
                e.emit(stmt)
        segments = [SegmentText(before=e.take())]
    return {
        "x_extent": size_text(x_extent),
        "x_masked": x_masked,
        "r_extent": size_text(r_extent),
        "r_masked": r_masked,
        "looped": looped,
        "segments": segments,
    }


def _segment(e: Emitter, folds: Folds, segment: Segment) -> SegmentText:
    text = SegmentText()
    if not segment.loop:
        for stmt in segment.stmts:
            e.emit(stmt)
        text.before = e.take()
        return text
    for stmt in segment.stmts:
        e.hoist(used_indices(e.kernel, stmt), X)
    text.before = e.take()
    scope = e.scope()
    for stmt in segment.stmts:
        if isinstance(stmt, Reduce):
            folds.step(stmt)
        else:
            e.emit(stmt)
    text.loop = e.take()
    text.before += folds.starts
    e.restore(scope)
    for stmt in segment.stmts:
        if isinstance(stmt, Reduce):
            folds.finish(stmt)
    text.after = e.take()
    folds.starts = []
    return text


_STEPS = {
    "sum": "{acc} + {v}",
    "prod": "{acc} * {v}",
    "any": "{acc} | {v}",
    "all": "{acc} & {v}",
}


class Folds:
    """Writes reductions: whole in one block, or as an accumulator tile that a loop updates."""

    def __init__(self, e: Emitter, r_ok: str | None, r_extent: str) -> None:
        self.e, self.r_ok, self.r_extent = e, r_ok, r_extent
        self.starts: list[str] = []  # accumulators of the loop being written
        self.tile = ", ".join(e.shape)

    def _operand(self, stmt: Reduce) -> tuple[str, Dims, str, torch.dtype]:
        """The operand in the dtype it is folded in, that dtype, and the fold's name."""
        text, dims, _ = self.e.values[stmt.arg.number]
        op, dtype = _fold_name(stmt), stmt.arg_dtype
        if op in ("sum", "prod"):
            text, dtype = cast(text, dtype, compute_dtype(stmt.dtype), self.e.interpret), stmt.dtype
        elif dtype != torch.bool and op in ("any", "all"):
            text, dtype = f"({text} != 0)", torch.bool
        return text, dims, op, compute_dtype(dtype)

    def _masked(self, text: str, dims: Dims, op: str, dtype: torch.dtype) -> tuple[str, Dims]:
        """The operand with what overhangs r replaced by the fold's identity."""
        if self.r_ok is None:
            return text, dims
        fill = literal(identity(op, dtype), dtype, False)
        return f"tl.where({self.r_ok}, {text}, {fill})", dims | R

    def _spread(self, text: str, dims: Dims) -> str:
        return text if dims == BOTH else f"tl.broadcast_to({text}, [{self.tile}])"

    def whole(self, stmt: Reduce) -> None:
        """One statement that folds a tile which holds all of r."""
        text, dims, op, dtype = self._operand(stmt)
        text = self._spread(*self._masked(text, dims, op, dtype))
        if op in ("argmax", "argmin"):
            text = f"fold_{op}({text}, r, {self.r_extent}).to({triton_dtype(stmt.dtype)})"
        else:
            text = f"fold_{op}({text})"
        self.e.assign(stmt.out, stmt.op, text, X, stmt.dtype)

    def step(self, stmt: Reduce) -> None:
        """The accumulator's start and its update in the loop."""
        text, dims, op, dtype = self._operand(stmt)
        acc = self.e.value_name(stmt.out, stmt.op) + "_acc"
        start = literal(identity(op, dtype), dtype, False)
        self.starts.append(f"{acc} = tl.full([{self.tile}], {start}, {triton_dtype(dtype)})")
        if op in _STEPS:
            text, _ = self._masked(text, dims, op, dtype)
            self.e.lines.append(f"{acc} = " + _STEPS[op].format(acc=acc, v=text))
        elif op in ("amax", "amin"):
            text, _ = self._masked(text, dims, op, dtype)
            fn = "maximum" if op == "amax" else "minimum"
            nan = ", propagate_nan=tl.PropagateNan.ALL" if dtype.is_floating_point else ""
            self.e.lines.append(f"{acc} = tl.{fn}({acc}, {text}{nan})")
        else:
            at = f"{acc}_at"
            lane = f"tl.arange(0, {self.e.shape[1]}).to(INDEX)[None, :]"
            self.starts.append(f"{at} = tl.broadcast_to({lane}, [{self.tile}])")
            sign = ">" if op == "argmax" else "<"
            v = self.e.names.fresh(f"{stmt.op}_v")
            better = f"({v} {sign} {acc})"
            if dtype.is_floating_point:
                better += f" | (({v} != {v}) & ({acc} == {acc}))"
            if self.r_ok is not None:
                better = f"({better}) & {self.r_ok}"
            self.e.lines += [
                f"{v} = {self._spread(text, dims)}",
                f"{v}_better = {better}",
                f"{at} = tl.where({v}_better, r, {at})",
                f"{acc} = tl.where({v}_better, {v}, {acc})",
            ]

    def finish(self, stmt: Reduce) -> None:
        """The fold of the accumulator after the loop."""
        op = _fold_name(stmt)
        acc = self.e.value_name(stmt.out, stmt.op) + "_acc"
        if op in ("argmax", "argmin"):
            text = f"fold_{op}({acc}, {acc}_at, {self.r_extent}).to({triton_dtype(stmt.dtype)})"
        else:
            text = f"fold_{op}({acc})"
        self.e.assign(stmt.out, stmt.op, text, X, stmt.dtype)


def _fold_name(stmt: Reduce) -> str:
    """Which fold helper; the greatest of booleans is whether any holds."""
    return {"amax": "any", "amin": "all"}.get(stmt.op, stmt.op) if stmt.arg_dtype == torch.bool else stmt.op
