"""The tile program: what one generated kernel does, before any language is chosen.

A ``Kernel`` is a frozen record. Its axes are either parallel (``x``: split over programs
and lanes) or reduced (``r``). Its body is a list of statements in SSA form over numbered
scalar values; every statement says what happens at one point of the iteration space, and a
template turns that into tiles. Memory is touched only by ``Load`` and ``Store``, and each
access states coordinates, mask and ``other``, so that it can be proved as well as printed.

Families:
    ``pointwise``  every value at one x point.
    ``scan``       like pointwise or reduction, with one axis of kind ``s`` that is gone through in order: ``Scan``
                   at a point reads what it gave at the point before. Reductions read scans, not the other way round.
                   A loop of any other kind has ``Carry`` and ``Next`` instead (``loops.py``), and may fold at will.
    ``reduction``  values at (x, r) points, folded over r by ``Reduce`` into values at x points;
                   ``segments()`` says what a looped form has to repeat.
    ``matmul``     ``parts["a"]`` computes the left operand at (x.., m, k), ``parts["b"]`` the right
                   one at (x.., k, n), ``body`` is the epilogue at (x.., m, n), where value ``ACC`` is
                   the accumulated product. Axes named ``m``, ``n`` and ``k``; ``x`` axes are the batch.
    ``attention``  ``parts["q"]`` at (x.., m, d), ``parts["k"]`` at (x.., n, d), ``parts["v"]`` at
                   (x.., n, e), ``parts["score"]`` edits the scaled score ``ACC`` at (x.., m, n), ``parts["sink"]``
                   is a score at (x..) without a key; ``body`` stores value ``ACC`` (output at (x.., m, e)) and
                   ``LSE`` (at (x.., m)).
    ``attention_backward``  the same parts and ``grad``, ``out``, ``lse``; see ``tiles/attention.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from ..ir.types import Dim, TensorType, symbols_of
from .index import Cond, Index, linearize

ACC = -1  # the accumulated product in a matmul's epilogue, a score or an output in attention
LSE = -2  # the log-sum-exp row of attention
DQ, DK, DV, DSCORE, DSINK = -3, -4, -5, -6, -7  # what attention's backward stores


@dataclass(frozen=True, slots=True)
class Axis:
    """A loop of the kernel; ``kind`` is ``x`` (parallel), ``r`` (reduced) or ``s`` (one after the other)."""

    name: str
    extent: Dim
    kind: str


@dataclass(frozen=True, slots=True)
class Param:
    """A tensor argument. ``slot`` is the operand (inputs) or result (outputs) number of the kernel node."""

    name: str
    type: TensorType
    out: bool
    slot: int


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an earlier statement."""

    number: int


# An operand of a statement: an earlier value or a literal (number or size expression).
Operand: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Access:
    """Where memory is touched: coordinates into the shape of parameter ``param``.

    Every coordinate lies inside its dim wherever all ``mask`` conditions and the kernel's own
    axis bounds hold; a masked-off load gives ``other``.
    """

    param: int
    coords: tuple[Index, ...]
    mask: tuple[Cond, ...] = ()
    other: Any = 0

    def address(self, param: Param) -> Index:
        """Offset in elements from the parameter's first element."""
        return linearize(self.coords, param.type.strides)


@dataclass(frozen=True, slots=True)
class Load:
    """The element at a place of a parameter, as value number ``out`` of type ``dtype``."""

    out: int
    access: Access
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class IndexOf:
    """An index expression as an integer value (arange)."""

    out: int
    index: Index
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Test:
    """Whether all conditions hold, as a boolean value (padding, concatenation)."""

    out: int
    conds: tuple[Cond, ...]
    dtype: torch.dtype = torch.bool


@dataclass(frozen=True, slots=True)
class Compute:
    """A pointwise operator of the op table on earlier values and literals.

    ``op`` names it, ``args`` are ``Ref``s and literals; ``dtype`` is that of the result,
    ``arg_dtype`` that of the operands.
    """

    out: int
    op: str
    args: tuple[Operand, ...]
    dtype: torch.dtype
    arg_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Reduce:
    """Fold ``arg`` over all r axes. ``op`` is sum, prod, amax, amin, any, all, argmax or argmin;
    the arg forms give the flat position along r."""

    out: int
    op: str
    arg: Ref
    dtype: torch.dtype
    arg_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Scan:
    """``out = a * (out of the step before) + b`` along the axis of kind ``s``; the first step gives ``b``.

    With a ``fold`` (``sum``, ``prod``, ``amax``, ``amin``, ``logsumexp``) it is that of ``b`` and the step before, and
    ``a`` is ``b``. With ``reverse`` the steps go from the axis' end to its beginning; all scans of a kernel go the same
    way.
    """

    out: int
    a: Ref
    b: Ref
    dtype: torch.dtype
    reverse: bool = False
    fold: str = ""


@dataclass(frozen=True, slots=True)
class Carry:
    """What the step before left (``Next``); before the first step, what ``access`` loads."""

    out: int
    access: Access
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Next:
    """What the next step finds in the ``Carry`` of the number ``out``; after the last step it is stored."""

    out: int
    arg: Operand
    access: Access
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Check:
    """Stop the program unless ``0 <= arg < high``: the bound eager checks for an index."""

    arg: Ref
    high: Dim
    mask: tuple[Cond, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Store:
    """Write a value or a literal, converted to ``dtype``, where the mask of ``access`` holds."""

    access: Access
    arg: Operand
    dtype: torch.dtype


_Sink = Store | Check | Next  # statements without a value
Stmt: TypeAlias = Load | IndexOf | Test | Compute | Reduce | Scan | Carry | Next | Check | Store


def refs(stmt: Stmt) -> Iterator[int]:
    """Numbers of the values a statement reads, those inside its indices too."""
    indices: list[Index] = []
    if isinstance(stmt, Load | Store | Carry | Next):
        indices += [*stmt.access.coords, *(c.index for c in stmt.access.mask)]
    if isinstance(stmt, IndexOf):
        indices.append(stmt.index)
    if isinstance(stmt, Test):
        indices += [c.index for c in stmt.conds]
    if isinstance(stmt, Check):
        indices += [c.index for c in stmt.mask]
        yield stmt.arg.number
    for index in indices:
        for atom in index.atoms():
            if atom.kind == "value":
                yield int(atom.name)
    if isinstance(stmt, Compute):
        yield from (a.number for a in stmt.args if isinstance(a, Ref))
    if isinstance(stmt, Reduce):
        yield stmt.arg.number
    if isinstance(stmt, Scan):
        yield from (stmt.a.number, stmt.b.number)
    if isinstance(stmt, Store | Next) and isinstance(stmt.arg, Ref):
        yield stmt.arg.number


def conds_of(stmt: Stmt) -> tuple[Cond, ...]:
    """Every condition inside a statement."""
    if isinstance(stmt, Load | Store | Carry | Next):
        return stmt.access.mask
    if isinstance(stmt, Test):
        return stmt.conds
    return stmt.mask if isinstance(stmt, Check) else ()


def indices_of(stmt: Stmt) -> Iterator[Index]:
    """Every index expression inside a statement."""
    if isinstance(stmt, Load | Store | Carry | Next):
        yield from stmt.access.coords
    elif isinstance(stmt, IndexOf):
        yield stmt.index
    yield from (c.index for c in conds_of(stmt))


def axes_read(stmt: Stmt) -> set[str]:
    """Names of the axes that a statement's own indices mention."""
    return {name for index in indices_of(stmt) for name in index.variables()}


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive statements run once per x point (``loop`` false) or at every r point."""

    loop: bool
    stmts: tuple[Stmt, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel, language-neutral.

    Attributes:
        name: a readable, legal identifier made by the compiler (never a user's name).
        family: which template renders it.
        params: inputs, then outputs.
        axes: parallel axes in iteration order (last fastest), then reduced ones.
        body: statements in SSA order.
        parts: named statement lists of matmul and attention; each ends with the value it provides.
        provides: per part, the number of the value it computes.
        attrs: family options (``causal``, ``scale`` ...).
        notes: header lines: nodes computed, the user's source lines.
        flops: operations of the contraction, 0 for others.
    """

    name: str
    family: str
    params: tuple[Param, ...]
    axes: tuple[Axis, ...]
    body: tuple[Stmt, ...]
    parts: Mapping[str, tuple[Stmt, ...]] = field(default_factory=dict)
    provides: Mapping[str, Operand] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    flops: Dim = 0

    def __post_init__(self) -> None:
        for name in ("parts", "provides", "attrs"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def extent(self, kind: str) -> Dim:
        """The product of the extents of one kind of axis."""
        total: Dim = 1
        for a in self.axes:
            if a.kind == kind:
                total = total * a.extent
        return total

    def content(self) -> Any:
        """What it computes, hashable: equal for kernels that differ only in name and notes."""
        maps = (tuple(m.items()) for m in (self.parts, self.provides, self.attrs))
        return (self.family, self.params, self.axes, self.body, *maps)

    def axis(self, name: str) -> Axis:
        return next(a for a in self.axes if a.name == name)

    def statements(self) -> Iterator[Stmt]:
        for part in self.parts.values():
            yield from part
        yield from self.body

    def symbols(self) -> tuple[str, ...]:
        """Names of the sizes the kernel must be told, sorted."""
        dims: list[Any] = [*(a.extent for a in self.axes), *self.attrs.values()]
        for p in self.params:
            dims += [*p.type.shape, *p.type.strides]
        for stmt in self.statements():
            for index in indices_of(stmt):
                stack = [index]
                while stack:
                    i = stack.pop()
                    dims.append(i.const)
                    for atom, c in i.terms:
                        dims += [c, atom.n]
                        if atom.arg is not None:
                            stack.append(atom.arg)
            if isinstance(stmt, Check):
                dims.append(stmt.high)
            for cond in conds_of(stmt):
                dims += [cond.low, cond.high]
            if isinstance(stmt, Compute):
                dims.extend(stmt.args)
        return tuple(sorted(symbols_of(dims)))

    def segments(self) -> tuple[Segment, ...]:
        """The body cut at its reductions, for a template that loops over r.

        Statements at (x, r) points are repeated in each loop that needs them: a loop computes
        every ``Reduce`` whose operands are ready, the last loop stores. Statements at x points
        run once, before the loop that first needs them.
        """
        reduced = {a.name for a in self.axes if a.kind == "r"}
        by_out = {s.out: s for s in self.body if not isinstance(s, _Sink)}
        level: dict[int, int] = {}  # how many loops must have run before a value is known
        in_loop: dict[int, bool] = {}
        for s in self.body:
            if isinstance(s, _Sink):
                continue
            needs = [n for n in refs(s) if n in level]
            lv = max((level[n] for n in needs), default=0)
            if isinstance(s, Reduce):
                level[s.out], in_loop[s.out] = lv + 1, False
            else:
                level[s.out] = lv
                in_loop[s.out] = bool(axes_read(s) & reduced) or any(in_loop[n] for n in needs)
        sinks: dict[tuple[int, bool], list[Stmt]] = {}
        for s in self.body:
            if isinstance(s, _Sink):
                needs = [n for n in refs(s) if n in level]
                lv = max((level[n] for n in needs), default=0)
                looped = bool(axes_read(s) & reduced) or any(in_loop[n] for n in needs)
                sinks.setdefault((lv, looped), []).append(s)
            elif isinstance(s, Reduce):
                sinks.setdefault((level[s.out] - 1, True), []).append(s)
        out: list[Segment] = []
        done: set[int] = set()  # x-level values already computed
        last = max((lv for lv, _ in sinks), default=0)
        for lv in range(last + 1):
            for looped in (False, True):
                roots = sinks.get((lv, looped), [])
                if not roots:
                    continue
                wanted = self._closure(roots, by_out)
                ready = [
                    s
                    for s in self.body
                    if not isinstance(s, _Sink | Reduce)
                    and s.out in wanted
                    and not in_loop[s.out]
                    and s.out not in done
                ]
                done.update(s.out for s in ready if not isinstance(s, _Sink))
                sink_ids = {id(s) for s in roots}
                if ready:
                    out.append(Segment(False, tuple(ready)))
                stmts = [
                    s
                    for s in self.body
                    if id(s) in sink_ids
                    or (looped and not isinstance(s, _Sink | Reduce) and s.out in wanted and in_loop[s.out])
                ]
                out.append(Segment(looped, tuple(stmts)))
        return tuple(out)

    @staticmethod
    def _closure(roots: list[Stmt], by_out: Mapping[int, Stmt]) -> set[int]:
        wanted: set[int] = set()
        stack = [n for s in roots for n in refs(s)]
        while stack:
            n = stack.pop()
            if n in wanted or n not in by_out:
                continue
            wanted.add(n)
            if not isinstance(by_out[n], Reduce):
                stack.extend(refs(by_out[n]))
        return wanted
