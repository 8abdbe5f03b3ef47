"""Which memory a value lives in, and when it is free again.

Liveness is counted per storage: a view keeps its base alive, and so does a torch call that may
return its argument. Memory that generated kernels wrote and nobody reads any more is taken over by
a later kernel's result of the same size, unless keeping it until then would raise the peak: what is
alive at once is never more than if every value had memory of its own, freed at its last use.
Inputs are never written to (effects aside), and what leaves the graph never shares memory that is
used again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from ..codegen.steps import Storage
from ..ir.exprs import evaluate
from ..ir.node import Graph, Node, Value
from ..ir.types import Dim, TensorType, simplify_dim, symbols_of
from ..ir.verify import bound_symbols
from ..ops.inplace import INPLACE

__all__ = ["Buffers", "plan_buffers", "span_bytes"]

# A dead buffer serves a smaller value if at most this part of it is left over.
_WASTE = 0.25
_ALIGN = 64
_PART = 64 * 2**10  # bytes: smaller values get memory of their own


@dataclass(frozen=True)
class Buffers(Storage):
    """Reuse and frees (see ``Storage``), and what they come to.

    Attributes:
        peak_bytes: the most bytes of intermediate values alive at once (inputs not counted), at the
            sizes in ``hints``; what a library call uses inside is not known.
        reused_bytes: bytes of values that took over memory.
    """

    peak_bytes: int = 0
    reused_bytes: int = 0
    hints: Mapping[str, int] = field(default_factory=dict)


def span_bytes(t: TensorType) -> Dim:
    """Bytes from the first to the last element of a tensor: what an allocation holds."""
    if any(isinstance(n, int) and n == 0 for n in t.shape):
        return 0
    last: Dim = 1
    for n, s in zip(t.shape, t.strides, strict=True):
        last = last + (n - 1) * s
    return simplify_dim(last * t.dtype.itemsize)


def plan_buffers(
    graph: Graph,
    allocates: Callable[[Node], bool],
    owned: Callable[[Node], bool],
    hints: Mapping[str, int] | None = None,
    reuse: bool = True,
    places: Mapping[Value, int] | None = None,
    block: int = 0,
    runs: Mapping[int, int] | None = None,
    keep: int | None = None,
) -> Buffers:
    """Plan the memory of a graph's values.

    Args:
        graph: the final graph.
        allocates: whether the host program allocates a node's results (generated kernels).
        owned: whether a node's results are new memory; views are never asked.
        hints: typical sizes, for ``peak_bytes`` only.
        reuse: False keeps every value in memory of its own.
        places: values that have a place in a block of memory, see ``sequence.plan_places``; not planned here.
        block: the bytes of that block, which is there during the whole call.
        runs: as in ``Storage``.
        keep: results of at least so many bytes are made when the call begins, so that their memory can be that of
            an earlier call; until they are written, other values live there. Only where that raises no peak.
    """
    places = places or {}
    hints = dict(hints or {})
    roots = _roots(graph, allocates, owned)
    death = _last_uses(graph, roots)
    made = {v: at for at, n in enumerate(graph.nodes) if allocates(n) for v in n.outs}
    leaving = set(graph.results())
    taken: dict[Value, Value] = {}
    level = _Level(graph, roots, death, hints, places)
    kept: tuple[Value, ...] = ()
    parts: dict[Value, tuple[Value, int]] = {}
    if keep is not None:
        for some in _worth_keeping(graph, made, death, keep, hints):
            inside = _parts(graph, some, made, death)
            then = _Level(graph, roots, death, hints, inside, some)
            if then.peak <= level.peak:
                kept, parts, level = some, inside, then
                break
    elsewhere = {*places, *parts, *kept}
    ends: dict[int, list[Value]] = {}
    for v, at in death.items():
        if v in made and v not in elsewhere:
            ends.setdefault(at, []).append(v)
    free: list[Value] = []  # allocated values whose memory is dead, oldest first
    for at, node in enumerate(graph.nodes):
        if allocates(node) and reuse:
            for v in node.outs:
                # what leaves the graph gets memory of exactly its size
                if not isinstance(v.type, TensorType) or v in leaving or v in elsewhere:
                    continue
                while (old := _best(v.type, free)) is not None:
                    free.remove(old)
                    if level.keep(old, death[old], v, at, death.get(v)):
                        taken[v] = old
                        break
        free.extend(ends.get(at, ()))
    frees: dict[int, tuple[Value, ...]] = {}
    uses = _name_uses(graph)
    for new, old in taken.items():
        uses[old] = max(uses.get(old, -1), made[new])
    staying = {v for i in graph.inputs for v in i.outs if _stays(graph, i)}
    staying.update(n.operands[0] for n in graph.nodes if n.op.name in INPLACE)  # its name is the result's too
    for v, at in uses.items():
        if v not in leaving and v not in staying and v not in places and v.op.name not in INPLACE:
            frees[at] = (*frees.get(at, ()), v)
    saved = sum(_bytes(v.type, hints) for v in taken)
    return Buffers(taken, frees, places, block, runs or {}, kept, parts, level.peak + block, saved, hints)


def _stays(graph: Graph, node: Node) -> bool:
    """Whether the name of an input is kept to the end: its memory is not ours to free, or it is written."""
    role = node.attrs.get("role", "input")
    return role != "input" or any(node is target for target, _ in graph.effects)


def _roots(
    graph: Graph, allocates: Callable[[Node], bool], owned: Callable[[Node], bool]
) -> dict[Value, frozenset[Value]]:
    """The values whose memory each value may lie in."""
    roots: dict[Value, frozenset[Value]] = {v: frozenset({v}) for i in graph.inputs for v in i.outs}
    for node in graph.nodes:
        if node.op.name in INPLACE:
            roots[node.out] = roots[node.operands[0]]
            continue
        new = node.op.kind != "view" and (allocates(node) or owned(node))
        shared = frozenset().union(*(roots[v] for v in node.operands)) if not new else frozenset()
        for v in node.outs:
            # a call that may return its argument may also return new memory
            roots[v] = shared if node.op.kind == "view" else shared | {v}
    return roots


def _last_uses(graph: Graph, roots: Mapping[Value, frozenset[Value]]) -> dict[Value, int]:
    """Storage -> position of the last node that touches it; storages that leave the graph are absent."""
    death: dict[Value, int] = {}
    for at, node in enumerate(graph.nodes):
        for v in (*node.operands, *node.outs):
            for r in roots[v]:
                death[r] = at
    for v in graph.results():
        for r in roots[v]:
            death.pop(r, None)
    return death


def _name_uses(graph: Graph) -> dict[Value, int]:
    """Value -> position of the last node that names it."""
    last: dict[Value, int] = {}
    for at, node in enumerate(graph.nodes):
        for v in (*node.outs, *node.operands):
            last[v] = at
    return last


def _best(t: TensorType, free: list[Value]) -> Value | None:
    """The dead buffer that fits best: the same size expression, else the smallest that is not too large."""
    want = span_bytes(t)
    same = [v for v in free if span_bytes(v.type) == want and v.type.device == t.device]
    if same:
        return same[-1]
    if not isinstance(want, int) or want == 0:
        return None
    fits = []
    for v in free:
        have = span_bytes(v.type)
        fit = isinstance(have, int) and want <= have <= want / (1 - _WASTE) and v.type.device == t.device
        if fit and have % t.dtype.itemsize == 0:  # type: ignore[operator]
            fits.append((have, v))
    return min(fits, key=lambda p: p[0])[1] if fits else None  # type: ignore[arg-type, return-value]


def _bytes(t: object, hints: Mapping[str, int]) -> int:
    if not isinstance(t, TensorType):
        return 0
    size = span_bytes(t)
    return int(evaluate(size, {n: hints.get(n, 1) for n in symbols_of([size])}))


def _worth_keeping(
    graph: Graph, made: Mapping[Value, int], death: Mapping[Value, int], least: int, hints: Mapping[str, int]
) -> list[tuple[Value, ...]]:
    """Large values that leave the graph: all of them, and the largest alone. Sizes must be known when a call begins."""
    late = {name for node in graph.nodes for name in bound_symbols(node)}
    sizes = {
        v: _bytes(v.type, hints)
        for v in made
        if v not in death and isinstance(v.type, TensorType) and late.isdisjoint(symbols_of([span_bytes(v.type)]))
    }
    large = [v for v, n in sizes.items() if n >= least]
    if not large:
        return []
    most = max(large, key=lambda v: sizes[v])
    return [tuple(large), (most,)] if len(large) > 1 else [(most,)]


def _parts(
    graph: Graph, kept: tuple[Value, ...], made: Mapping[Value, int], death: Mapping[Value, int]
) -> dict[Value, tuple[Value, int]]:
    """Values that are dead before a kept result is written -> that result, and where in its memory they live."""
    spans = {h: span_bytes(h.type) for h in kept if isinstance(h.type, TensorType)}
    room = {h: n for h, n in spans.items() if isinstance(n, int)}
    alive: dict[Value, list[tuple[int, int, int]]] = {h: [] for h in room}  # offset, end, death
    found: dict[Value, tuple[Value, int]] = {}
    for at, node in enumerate(graph.nodes):
        for v in node.outs:
            size = span_bytes(v.type) if v in made and v in death and isinstance(v.type, TensorType) else 0
            if not isinstance(size, int) or size < _PART:
                continue
            for h in room:
                if death[v] >= made[h]:
                    continue
                alive[h] = [a for a in alive[h] if a[2] >= at]
                offset = first_fit([a[:2] for a in alive[h]], size)
                if offset + size <= room[h]:
                    alive[h].append((offset, offset + size, death[v]))
                    found[v] = h, offset
                    break
    return found


def first_fit(taken: Iterable[tuple[int, int]], size: int) -> int:
    """The lowest offset, a multiple of 64, where ``size`` bytes lie beside all intervals ``taken``.

    >>> first_fit([(0, 100), (192, 300)], 64), first_fit([(0, 100), (192, 300)], 65)
    (128, 320)
    """
    offset = 0
    for begin, end in sorted(taken):
        if begin - offset >= size:
            break
        offset = max(offset, -(-end // _ALIGN) * _ALIGN)
    return offset


class _Level:
    """Bytes alive at every node; memory is kept for a later value only where that does not raise the peak.

    Attributes:
        at: bytes alive while node i runs: its operands, its results and all that is read later.
        peak: the most of them, before and after.
    """

    def __init__(
        self,
        graph: Graph,
        roots: Mapping[Value, frozenset[Value]],
        death: Mapping[Value, int],
        hints: Mapping[str, int],
        elsewhere: Collection[Value],
        early: Collection[Value] = (),
    ) -> None:
        steps = [0] * (len(graph.nodes) + 1)
        self.size: dict[Value, int] = {}
        for i, node in enumerate(graph.nodes):
            for v in node.outs:
                if v in roots[v] and v not in elsewhere:
                    self.size[v] = _bytes(v.type, hints)
                    steps[0 if v in early else i] += self.size[v]
                    if v in death:
                        steps[death[v] + 1] -= self.size[v]
        self.at = list(accumulate(steps[:-1]))
        self.peak = max(self.at, default=0)

    def keep(self, old: Value, died: int, new: Value, made: int, dies: int | None) -> bool:
        """Whether ``new`` may take over the memory of ``old``; if so, it is counted."""
        have, want = self.size[old], self.size[new]
        idle = range(died + 1, made)
        last = len(self.at) - 1 if dies is None else dies
        over = range(made, last + 1) if have > want else range(0)
        if any(self.at[i] + have > self.peak for i in idle) or any(self.at[i] + have - want > self.peak for i in over):
            return False
        for i in idle:
            self.at[i] += have
        for i in over:
            self.at[i] += have - want
        self.size[new] = have
        return True
