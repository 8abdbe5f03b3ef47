"""The axes of a group of nodes: which loops one kernel over all of them would have.

Every node's dims string names its axes. Joining two nodes identifies the axes of the value
that passes between them, splitting axes where a reshape has taken them apart. What comes out
is the group's iteration space: parallel axes (``x``), the axes folded by its reductions
(``r``), and for every value the axes of each of its dims. A group is legal when every value
it computes lives on all parallel axes, with or without all reduced ones: then one kernel
computes each value once, at one place of the iteration space.

The same strings decide sharding, so a legal group can be split along its parallel axes by a
mesh exactly as a grid of programs splits it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import TypeAlias

from ..ir.node import Node, Value
from ..ir.types import Dim, TensorType, dim_equal, simplify_dim
from ..ops.dims import Shape, dims_of, factor_sizes
from .index import exact_div

Layout: TypeAlias = "tuple[tuple[int, ...], ...]"  # for each dim its axes, outermost first
PLACES = frozenset({"argmax", "argmin"})  # folds whose result says where along the axes
_ids = count()


def layout_text(layout: Layout, names: Mapping[int, str]) -> str:
    """A layout with named axes, in the notation of dims strings.

    >>> layout_text(((0,), (1, 2), ()), {0: "x0", 1: "x1", 2: "r2"})
    'x0 (x1 r2) 1'
    """
    words = [" ".join(names[a] for a in dim) or "1" for dim in layout]
    return " ".join(f"({w})" if " " in w else w for w in words) or "."


def parse_layout(text: str, number: Mapping[str, int]) -> Layout:
    """The layout that ``layout_text`` wrote, its axes by number.

    >>> parse_layout("x0 (x1 r2) 1", {"x0": 0, "x1": 1, "r2": 2})
    ((0,), (1, 2), ())
    """
    dims = re.findall(r"\(([^)]*)\)|(\w+)", text)
    return tuple(tuple(number[w] for w in (many or one).split() if w != "1") for many, one in dims)


class Mismatch(Exception):
    """Two layouts cannot be the same; the text says why."""


@dataclass(frozen=True, eq=False)
class Axes:
    """The iteration space of a group.

    Attributes:
        extent: size of each axis.
        layouts: axes of the dims of each value computed or read, by value.
        reads: layouts under which each value from outside is read, where sharing a read can join two groups.
        moved: values from outside that are read at other places than they were written
            (through a slice, a concatenation, a gather).
        computed: values that must live on the whole iteration space.
        folded: per reduction (or contraction) node, the axes it folds.
        operand_layouts: per reducing node, the layout of its (first) operand.
    """

    extent: Mapping[int, Dim] = field(default_factory=dict)
    layouts: Mapping[Value, Layout] = field(default_factory=dict)
    reads: Mapping[Value, tuple[Layout, ...]] = field(default_factory=dict)
    moved: frozenset[Value] = frozenset()
    computed: tuple[Value, ...] = ()
    folded: Mapping[Node, tuple[int, ...]] = field(default_factory=dict)
    operand_layouts: Mapping[Node, Layout] = field(default_factory=dict)

    @cached_property
    def reduced(self) -> frozenset[int]:
        return frozenset(a for axes in self.folded.values() for a in axes)

    @cached_property
    def domain(self) -> frozenset[int]:
        """All axes of values that must be computed."""
        found = {a for v in self.computed for dim in self.layouts[v] for a in dim}
        return frozenset(found | self.reduced)

    @cached_property
    def parallel(self) -> frozenset[int]:
        return self.domain - self.reduced

    def fold_orders(self) -> list[tuple[int, ...]]:
        """The reduced axes as they lie in each folded operand, those first whose result is a place."""
        ranked = sorted(self.operand_layouts.items(), key=lambda item: item[0].op.name not in PLACES)
        return [tuple(a for dim in layout for a in dim if a in self.reduced) for _, layout in ranked]

    def problem(self) -> str | None:
        """Why this is no legal group, or ``None`` if it is one."""
        reduced, parallel = self.reduced, self.parallel
        whole = reduced | parallel
        for node, axes in self.folded.items():
            if frozenset(axes) != reduced:
                return f"{node.op.name} folds other axes than the rest of the group"
            if node in self.operand_layouts and _axes(self.operand_layouts[node]) != whole:
                return f"{node.op.name} folds a value that does not have all the axes"
        if len(set(self.fold_orders()[: sum(n.op.name in PLACES for n in self.operand_layouts)])) > 1:
            return "places are counted in different orders"
        for v in self.computed:
            mine = _axes(self.layouts[v])
            if sum(map(len, self.layouts[v])) != len(mine):
                return f"two dims of {v.node.op.name} would be one loop"
            if v.node in self.folded:
                if mine != parallel:
                    return f"{v.node.op.name} does not have all parallel axes"
            elif mine not in (whole, parallel):
                return f"{v.node.op.name} has only some of the axes, it would be computed again and again"
        return None


def _axes(layout: Layout) -> frozenset[int]:
    return frozenset(a for dim in layout for a in dim)


def axes_of(node: Node) -> Axes:
    """The axes of a single node, from its dims string.

    A factor that is not a plain map axis means different places in operand and result for
    views and gathers (a slice, a concatenation), so it gets an axis on each side. A recurrence is
    at the same place of operand and result; that its steps come in order is the kernel's business.
    """
    dims = dims_of(node)
    sizes = factor_sizes(node, dims) if _composite(dims.operands + dims.results) else {}
    extent: dict[int, Dim] = {}
    shared: dict[str, int] = {}
    folds = node.op.kind in ("reduce", "contract")
    kept = {"map", "reduce"} if folds else {"map", "whole"} if node.op.kind == "scan" else {"map"}

    def layout(shape: Shape, type_: TensorType, side: str) -> Layout:
        out: list[tuple[int, ...]] = []
        for term, size in zip(shape, type_.shape, strict=True):
            axes: list[int] = []
            for f in term:
                n = size if len(term) == 1 else sizes[f.name]
                if isinstance(n, int) and n == 1:
                    continue
                key = f.name if f.kind in kept else f"{f.name} {side}"
                if key not in shared:
                    shared[key] = next(_ids)
                    extent[shared[key]] = n
                axes.append(shared[key])
            out.append(tuple(axes))
        return tuple(out)

    results = [layout(s, t, "result") for s, t in zip(dims.results, node.types, strict=True)]  # type: ignore[arg-type]
    operands = [v for v in node.operands if isinstance(v.type, TensorType)]
    layouts: dict[Value, Layout] = {}
    reads: dict[Value, tuple[Layout, ...]] = {}
    moved: set[Value] = set()
    operand_layouts: dict[Node, Layout] = {}
    for i, (v, s) in enumerate(zip(operands, dims.operands, strict=True)):
        got = layout(s, v.type, f"operand {i}")
        if got not in reads.get(v, ()):
            reads[v] = (*reads.get(v, ()), got)
        if not folds and any(f.kind not in kept for term in s for f in term):
            moved.add(v)
        if node.op.kind == "reduce" and i == 0:
            operand_layouts[node] = got
    for v, got in zip(node.outs, results, strict=True):
        layouts[v] = got
    free = node.op.kind in ("view", "generate")
    layouts = {**{v: lays[0] for v, lays in reads.items()}, **layouts}
    folded = {node: tuple(shared[f] for f, x in dims.factors.items() if x.kind == "reduce" and f in shared)}
    return Axes(
        extent,
        layouts,
        reads,
        frozenset(moved),
        () if free else node.outs,
        folded if folds else {},
        operand_layouts,
    )


def _composite(shapes: Iterable[Shape]) -> bool:
    return any(len(term) > 1 for shape in shapes for term in shape)


class _Joiner:
    """Identifies axes; an axis stands for itself, another axis, or several finer ones."""

    def __init__(self, extent: dict[int, Dim]) -> None:
        self.extent = extent
        self.means: dict[int, tuple[int, ...]] = {}

    def find(self, axes: Iterable[int]) -> list[int]:
        out: list[int] = []
        stack = list(axes)[::-1]
        while stack:
            a = stack.pop()
            if a in self.means:
                stack.extend(reversed(self.means[a]))
            else:
                out.append(a)
        return out

    def equate(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Make two runs of axes the same, from the innermost outwards. Raises ``Mismatch``."""
        a, b = self.find(left), self.find(right)
        while a and b:
            x, y = a.pop(), b.pop()
            if x == y:
                continue
            ex, ey = self.extent[x], self.extent[y]
            if dim_equal(ex, ey):
                self.means[y] = (x,)
            elif (q := exact_div(ex, ey)) is not None:
                outer = self._new(q)
                self.means[x] = (outer, y)
                a.append(outer)
            elif (q := exact_div(ey, ex)) is not None:
                outer = self._new(q)
                self.means[y] = (outer, x)
                b.append(outer)
            else:
                raise Mismatch(f"axes of {ex} and {ey} have no common refinement")
            a, b = self.find(a), self.find(b)
        if a or b:
            raise Mismatch("one dim has axes that the other has not")

    def _new(self, extent: Dim) -> int:
        axis = next(_ids)
        self.extent[axis] = extent
        return axis

    def layout(self, layout: Layout) -> Layout:
        return tuple(tuple(self.find(dim)) for dim in layout)


def join(
    producer: Axes,
    consumer: Axes,
    through: Iterable[Value],
    *,
    inline: bool = False,
    shared: Iterable[Value] = (),
) -> Axes | str:
    """The axes of two groups made one, or the reason why they cannot be.

    Args:
        producer, consumer: the groups; the consumer reads ``through``.
        through: values computed (or passed on) by the producer and read by the consumer.
        inline: the consumer reads them at other places (a slice, a matmul's operand), so the
            producer's values are computed where they are read and need not span the loops.
        shared: values from outside that both read: the same place where that is possible.
    """
    through = tuple(through)
    if not inline and producer.computed and any(v in consumer.moved for v in through):
        return "its value is read at other places than it is computed at"
    moved = producer.moved | consumer.moved
    if inline or any(v in consumer.moved for v in through):
        moved |= frozenset(producer.reads)
    if inline:
        return Axes(
            {**producer.extent, **consumer.extent},
            {**producer.layouts, **consumer.layouts},
            _union(producer.reads, consumer.reads),
            moved,
            consumer.computed,
            consumer.folded,
            consumer.operand_layouts,
        )
    j = _Joiner({**producer.extent, **consumer.extent})
    try:
        for v in through:
            for read in consumer.reads[v]:
                for p, c in zip(producer.layouts[v], read, strict=True):
                    j.equate(p, c)
        for v in shared:
            _try_equate(j, producer.reads[v][0], consumer.reads[v][0])
        _close(j, producer, consumer)
    except Mismatch as why:
        return str(why)
    for group in (producer, consumer):
        spread = [a for d in group.domain for a in j.find((d,))]
        if len(spread) != len(set(spread)):
            return "two loops of one group would become one"
    reads = _union(producer.reads, consumer.reads)
    merged = Axes(
        j.extent,
        {v: j.layout(lay) for v, lay in {**consumer.layouts, **producer.layouts}.items()},
        {v: tuple(dict.fromkeys(map(j.layout, lays))) for v, lays in reads.items()},
        moved,
        (*producer.computed, *consumer.computed),
        {n: tuple(j.find(a)) for n, a in {**producer.folded, **consumer.folded}.items()},
        {n: j.layout(lay) for n, lay in {**producer.operand_layouts, **consumer.operand_layouts}.items()},
    )
    return merged.problem() or merged


def _union(
    left: Mapping[Value, tuple[Layout, ...]], right: Mapping[Value, tuple[Layout, ...]]
) -> dict[Value, tuple[Layout, ...]]:
    out = dict(left)
    for v, lays in right.items():
        out[v] = tuple(dict.fromkeys((*out.get(v, ()), *lays)))
    return out


def _try_equate(j: _Joiner, left: Layout, right: Layout) -> None:
    """Equate dim by dim what can be; a read at two different places stays two reads."""
    for p, c in zip(left, right, strict=True):
        saved = dict(j.means)
        try:
            j.equate(p, c)
        except Mismatch:
            j.means = saved


def _close(j: _Joiner, producer: Axes, consumer: Axes) -> None:
    """Identify the loops that are left on both sides, by size: ``x - mean(y)`` runs over y's reduced axis."""
    mine = {a for d in producer.domain for a in j.find((d,))}
    theirs = {a for d in consumer.domain for a in j.find((d,))}
    only_mine = sorted(mine - theirs)
    only_theirs = sorted(theirs - mine)
    if not only_mine or not only_theirs:
        return
    whole_mine = simplify_dim(_product(j, only_mine))
    whole_theirs = simplify_dim(_product(j, only_theirs))
    if not dim_equal(whole_mine, whole_theirs):
        raise Mismatch(f"loops of {whole_mine} and {whole_theirs} are left over")
    j.equate(_in_order(j, producer, only_mine), _in_order(j, consumer, only_theirs))


def _product(j: _Joiner, axes: Iterable[int]) -> Dim:
    total: Dim = 1
    for a in axes:
        total = total * j.extent[a]
    return total


def _in_order(j: _Joiner, group: Axes, wanted: Sequence[int]) -> list[int]:
    """Axes in the order in which some value of the group has them, or by number."""
    for lay in (*group.operand_layouts.values(), *group.layouts.values()):
        flat = [a for a in j.find(a for dim in lay for a in dim) if a in wanted]
        if set(flat) == set(wanted):
            return flat
    return list(wanted)


__all__ = ["Axes", "Layout", "Mismatch", "axes_of", "join", "layout_text", "parse_layout"]
