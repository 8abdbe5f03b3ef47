"""Spread the shardings of a few values over the whole graph.

    %0: f32[8,64]{dp,·}                      %0: f32[8,64]{dp,·}
    %1: f32[64,32]{·,tp}          becomes    %1: f32[64,32]{·,tp}
    %2 = matmul(%0, %1)                      %2 = matmul(%0, %1)   {dp,tp}
    %3 = relu(%2)                            %3 = relu(%2)         {dp,tp}

The graph stays as it is; the result says how each value lies on the mesh, and for every axis of every
value which annotation brought it and through which node. Mesh axes flow along the factors of the dims
strings, from operands to results and back, until nothing changes: first those of the user's first
priority; among these first through pointwise operators and views, then through the axes that a product
keeps, last along those that it folds (the order of Shardy). Where two axes lists of a factor differ, their
common beginning counts; where a mesh axis could split two factors, the one of a parameter that the user split
gets it (computation follows parameters that stay where they are), else that of the larger tensor.
The result does not depend on anything but graph, mesh and seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from ..errors import check
from ..ir.node import INPUT, Graph, Node, Value
from ..ir.sharding import Sharding
from ..ir.types import TensorType
from ._factors import Axes, Rule, project, rule_of
from ._layouts import Layouts, Seed, Why

# Classes of factors, in the order in which they may be propagated.
PASS_THROUGH, KEPT, FOLDED = range(3)
_THROUGH = frozenset({"pointwise", "view", "composite"})
# Sweeps that one class may take; a graph settles in a few.
MOST_SWEEPS = 1000
# What makes a parameter that the user split outweigh any activation.
ANCHOR = 1 << 60


def propagate(graph: Graph, mesh: Mapping[str, int], seeds: Iterable[Seed]) -> Layouts:
    """The sharding of every tensor of the graph.

    Args:
        graph: of known sizes.
        mesh: axis to size, a ``Mesh`` for example.
        seeds: what is known before; everything else starts whole on each device and open.

    Raises:
        TesselError: a seed names an axis that the mesh lacks, does not fit its tensor or does not divide it.
    """
    run = _Propagation(graph, mesh)
    todo = sorted(seeds, key=lambda s: s.priority)
    for s in todo:
        for sharding in (s.sharding, *(() if s.stored is None else (s.stored,))):
            check(not sharding.partial, lambda s=s: f"{s.why}: a value cannot be asked to stay partial")  # type: ignore[misc]
            sharding.check(s.value.shape, mesh, s.why)
    for priority in dict.fromkeys(s.priority for s in todo):
        for s in todo:
            if s.priority == priority:
                run.plant(s)
        run.anchor_views()
        for level in (PASS_THROUGH, KEPT, FOLDED):
            run.settle(level)
    return run.layouts()


class _Propagation:
    """One run: ``axes`` is the state, dimension by dimension."""

    def __init__(self, graph: Graph, mesh: Mapping[str, int]) -> None:
        self.graph, self.mesh = graph, mesh
        self.axes: dict[Value, list[Axes]] = {}
        for node in (*graph.inputs, *graph.nodes):
            for v in node.outs:
                if isinstance(v.type, TensorType):
                    self.axes[v] = [()] * v.type.rank
        self.shut: dict[Value, frozenset[int]] = {}
        self.found = Layouts(mesh)
        self.rules = {node: rule_of(node) for node in graph.nodes if node.operands or node.types}
        self.anchors: set[Value] = set()  # parameters that the user split, and views of them
        self.levels = {node: _levels(node, rule) for node, rule in self.rules.items()}

    def plant(self, seed: Seed) -> None:
        v = seed.value
        self.axes[v] = list(seed.sharding.dims)
        self.shut[v] = frozenset(range(seed.sharding.rank)) - seed.sharding.open
        self.found.fixed.add(v)
        for d, axes in enumerate(seed.sharding.dims):
            for axis in axes:
                self.found.why[v, d, axis] = Why(seed.why)
        if v.op is INPUT and v.node.attrs["role"] == "param" and seed.sharding.axes:
            self.anchors.add(v)
        if seed.stored is not None:
            self.found.stored[v] = seed.stored.closed()

    def anchor_views(self) -> None:
        """A view of a parameter that the user split counts as the parameter."""
        for node in self.graph.nodes:
            if node.op.kind == "view" and node.operands[0] in self.anchors:
                self.anchors.update(node.outs)

    def settle(self, level: int) -> None:
        """Forward and backward sweeps until one changes nothing."""
        order = [n for n in self.graph.nodes if n in self.rules]
        for sweep in range(MOST_SWEEPS):
            nodes: Sequence[Node] = order if sweep % 2 == 0 else order[::-1]
            changed = [n for n in nodes if self.node(n, level)]
            if not changed and sweep > 0:
                return
        raise AssertionError("propagation only ever adds axes, so it ends")

    def node(self, node: Node, level: int) -> bool:
        """Bring a node's tensors together; whether anything changed."""
        rule = self.rules[node]
        tensors = list(zip((*rule.operands, *rule.results), (*rule.dims.operands, *rule.dims.results), strict=True))
        if not any(axes for v, _ in tensors for axes in self.axes[v]):
            return False
        changed = False
        for factor, axes, source in self.wishes(rule, tensors):
            if self.levels[node][factor] > level:
                continue
            for v, shape in tensors:
                for d, term in enumerate(shape):
                    if any(f.name == factor for f in term):
                        changed |= self.extend(node, rule, v, d, term, factor, axes, source)
        return changed

    def wishes(self, rule: Rule, tensors: list[tuple[Value, tuple]]) -> Iterator[tuple[str, Axes, tuple[Value, int]]]:
        """The axes that each factor should be split by and where they come from, the largest tensor's first."""
        offers: dict[str, list[tuple[int, Axes, tuple[Value, int]]]] = {}
        for v, shape in tensors:
            weight = prod(v.shape) + (ANCHOR if v in self.anchors else 0)
            for d, term in enumerate(shape):
                if self.axes[v][d]:
                    for name, axes in project(term, self.axes[v][d], rule.sizes, self.mesh)[0].items():
                        offers.setdefault(name, []).append((weight, axes, (v, d)))
        found = []
        for name, given in offers.items():
            if not rule.may_split(name):
                continue
            longest = max(given, key=lambda g: len(g[1]))
            axes = longest[1]
            while not all(axes[: len(g[1])] == g[1][: len(axes)] for g in given):
                axes = axes[:-1]
            if axes:
                found.append((max(g[0] for g in given), name, axes, longest[2]))
        found.sort(key=lambda f: -f[0])
        for _, name, axes, source in found:
            yield name, axes, source

    def extend(
        self, node: Node, rule: Rule, v: Value, d: int, term: tuple, factor: str, axes: Axes, source: tuple[Value, int]
    ) -> bool:
        """Split dimension ``d`` of a value further, so far as it may be."""
        have = self.axes[v][d]
        before, used = project(term, have, rule.sizes, self.mesh)
        if d in self.shut.get(v, ()) or used < len(have):
            return False
        at = [f.name for f in term].index(factor)
        outer_done = all(prod(self.mesh[a] for a in before.get(f.name, ())) == rule.sizes[f.name] for f in term[:at])
        mine = before.get(factor, ())
        if not outer_done or any(f.name in before for f in term[at + 1 :]) or axes[: len(mine)] != mine:
            return False
        taken = {a for other in self.axes[v] for a in other}
        left = rule.sizes[factor] // prod(self.mesh[a] for a in mine)
        more: list[str] = []
        for axis in axes[len(mine) :]:
            if axis in taken or left % self.mesh[axis]:
                break
            left //= self.mesh[axis]
            more.append(axis)
        for axis in more:
            self.found.why[v, d, axis] = Why("", node, *source)
        self.axes[v][d] = have + tuple(more)
        return bool(more)

    def layouts(self) -> Layouts:
        self.found.of = {v: Sharding(tuple(dims)) for v, dims in self.axes.items()}
        return self.found


def _levels(node: Node, rule: Rule) -> dict[str, int]:
    """When each factor of a node may be propagated."""
    found: dict[str, int] = {}
    for name, f in rule.dims.factors.items():
        read, made = rule.dims.where(name)
        everywhere = bool(read) and bool(made)
        through = node.op.kind in _THROUGH and everywhere
        found[name] = PASS_THROUGH if through else KEPT if f.kind == "map" and everywhere else FOLDED
    return found


__all__ = ["Layouts", "Seed", "Why", "propagate"]
