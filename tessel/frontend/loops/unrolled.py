"""A stretch of a graph that repeats itself, read as the step of a loop.

It is one if every argument in it is one of

* the same in every repetition,
* a value of the same repetition, or of the one before it (a carry),
* a slice of one tensor whose indices count up or down from repetition to repetition.

What is written step after step into a new tensor (``out[:, t] = y``) is a result of the loop. A stretch that draws
random numbers or writes to anything else is none.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ir.nested import leaves
from ..fx_effects import has_effects
from ..fx_words import fixed, value_of
from .counting import Counting, NoLoop, Slices, counts, slices_of
from .emit import is_known, scan_takes
from .repeats import Stretch
from .step import Step

__all__ = ["Unrolled"]

_FACTORIES = {torch.zeros, torch.zeros_like, torch.empty, torch.empty_like, torch.full, torch.full_like, torch.clone}
_FACTORY_METHODS = {"new_zeros", "new_empty", "new_full", "clone"}


class Unrolled:
    """A stretch of a graph as a step with carries, slices and extras.

    Attributes:
        nodes: all of the graph.
        stretch: where the repetitions are.
        carries: where each carry starts, and the node of the first repetition that gives its next value.
        slices: nodes of the first repetition that take a part of a tensor.
        stores: nodes of the first repetition that write into one.
        rows: the nodes of each repetition; ``first`` is the first row.
        place: repetition and place in it, of every node of the stretch.

    Raises:
        NoLoop: the stretch is no loop.
    """

    def __init__(self, nodes: Sequence[fx.Node], stretch: Stretch) -> None:
        self.nodes, self.stretch = nodes, stretch
        self.carries: dict[fx.Node, fx.Node] = {}
        self.slices: dict[fx.Node, Slices] = {}
        self.stores: dict[fx.Node, Slices] = {}
        s = stretch
        self.rows = [self.nodes[s.start + j * s.period : s.start + (j + 1) * s.period] for j in range(s.repeats)]
        self.place = {n: (j, q) for j, row in enumerate(self.rows) for q, n in enumerate(row)}
        self.first = self.rows[0]
        for q, node in enumerate(self.first):
            self._look_at(q, node)
        rest = [n for n in self.first if n not in self.stores]
        if any(map(has_effects, rest)) or not self.slices or not (self.carries or self.stores):
            raise NoLoop
        self._check_stores()
        read = [*self.first, *(a for n in self.first for a in n.all_input_nodes)]
        if any(not fixed(value_of(n)) for n in read) and not self._is_written():
            raise NoLoop  # sizes that no number stands for yet

    def _is_written(self) -> bool:
        """Whether the loop is written where sizes are symbols: without one, or as a loop that has no use for them."""
        inputs: dict[Any, fx.Node] = {}  # stand for what is sliced
        xs = [inputs.setdefault((s.source, repr(s.index)), fx.Graph().placeholder("x")) for s in self.slices.values()]
        step = self.step(xs)
        return is_known(step) or scan_takes(self.first[0].graph, step, [value_of(n) for n in self.slices])

    # ------------------------------------------------------------ what each argument is

    def _look_at(self, q: int, node: fx.Node) -> None:
        versions = [row[q] for row in self.rows]
        if node.target is operator.setitem:
            where = slices_of([n.args[0] for n in versions], [n.args[1] for n in versions])
            if where is None or not any(counts(p) for p in where.index):
                raise NoLoop
            self.stores[node] = where
            self._argument(q, [n.args[2] for n in versions])
            return
        indexed = node.target is operator.getitem
        if indexed and not self._inside(node.args[0]):
            got = slices_of([n.args[0] for n in versions], [n.args[1] for n in versions])
            if got is not None and any(map(counts, got.index)):
                if not isinstance(value_of(got.source), torch.Tensor):
                    got = self._of_parts(got)
                self.slices[node] = got
                return
        if node.target in ("select", torch.select) and not node.kwargs and len(node.args) == 3:
            got = self._selected(versions)
            if got is not None:
                self.slices[node] = got
                return
        flat = [list(leaves((n.args, tuple(sorted(n.kwargs.items()))))) for n in versions]
        for arguments in zip(*flat, strict=True):
            self._argument(q, arguments)

    def _selected(self, versions: Sequence[fx.Node]) -> Slices | None:
        source, dim, _ = versions[0].args
        val = value_of(source)
        if not isinstance(source, fx.Node) or self._inside(source) or not isinstance(val, torch.Tensor):
            return None
        if any(n.args[:2] != (source, dim) for n in versions) or not isinstance(dim, int):
            return None
        before = (slice(None),) * (dim % val.dim())
        got = slices_of([source] * len(versions), [(*before, n.args[2]) for n in versions])
        return got if got is not None and any(map(counts, got.index)) else None

    def _of_parts(self, got: Slices) -> Slices:
        """A slice of what ``unbind`` was applied to, for a part that it gave."""
        made = got.source
        x = made.args[0] if made.args else None
        if made.target not in (torch.unbind, "unbind", torch.Tensor.unbind) or not isinstance(x, fx.Node):
            raise NoLoop
        dim = made.args[1] if len(made.args) > 1 else made.kwargs.get("dim", 0)
        val = value_of(x)
        if not isinstance(val, torch.Tensor) or not isinstance(dim, int) or len(got.index) != 1:
            raise NoLoop
        return Slices(x, (*(slice(None),) * (dim % val.dim()), *got.index), val)

    def _inside(self, a: Any) -> bool:
        return isinstance(a, fx.Node) and a in self.place

    def _argument(self, q: int, versions: Sequence[Any]) -> None:
        """One argument in every repetition: the same, of its own repetition, or a carry."""
        first = versions[0]
        if not isinstance(first, fx.Node) and not any(isinstance(v, fx.Node) for v in versions):
            if any(type(v) is not type(first) or v != first for v in versions):
                raise NoLoop
            return
        if any(not isinstance(v, fx.Node) for v in versions):
            raise NoLoop
        if not self._inside(first) and all(v is first for v in versions):
            if not isinstance(value_of(first), torch.Tensor | torch.SymInt):
                raise NoLoop
            return
        if not any(map(self._inside, versions)):
            self._part(versions)
            return
        places = [self.place.get(v) for v in versions]
        own = [p is not None and p[0] == j for j, p in enumerate(places)]
        if all(own) and len({p[1] for p in places if p is not None}) == 1:
            return
        carried = [p is not None and p[0] == j - 1 for j, p in enumerate(places)][1:]
        if self._inside(first) or not all(carried) or len({p[1] for p in places[1:] if p is not None}) != 1:
            raise NoLoop
        source = self.first[places[1][1]]  # type: ignore[index]
        start, after = value_of(first), value_of(source)
        fits = isinstance(start, torch.Tensor) and isinstance(after, torch.Tensor)
        if not fits or start.shape != after.shape or start.dtype != after.dtype or start.device != after.device:
            raise NoLoop
        if self.carries.setdefault(first, source) is not source:
            raise NoLoop

    def _part(self, versions: Sequence[fx.Node]) -> None:
        """One part after the other of what ``unbind`` gave, taken out before the loop."""
        if any(n.target is not operator.getitem for n in versions):
            raise NoLoop
        got = slices_of([n.args[0] for n in versions], [n.args[1] for n in versions])
        if got is None or isinstance(got.example, torch.Tensor) or not any(map(counts, got.index)):
            raise NoLoop
        got = self._of_parts(got)
        if self.slices.setdefault(versions[0], got) != got:
            raise NoLoop

    def _check_stores(self) -> None:
        """What is written to must be new, read by nobody before the loop is over, and filled step after step."""
        end = self.stretch.start + self.stretch.period * self.stretch.repeats
        order = {n: i for i, n in enumerate(self.nodes)}
        targets = [w.source for w in self.stores.values()]
        if len(set(targets)) != len(targets):
            raise NoLoop
        for target in targets:
            made = target.target in (_FACTORIES if target.op == "call_function" else _FACTORY_METHODS)
            if target.op not in ("call_function", "call_method") or not made:
                raise NoLoop
            for user in target.users:
                ours = user.target is operator.setitem and user in self.place
                if not ours and order[user] < end and user.target not in (torch.zeros_like, torch.empty_like):
                    raise NoLoop
        for node, where in self.stores.items():
            if not isinstance(node.args[2], fx.Node):
                raise NoLoop
            val, into = value_of(node.args[2]), where.example
            counting = [p for p in where.index if isinstance(p, Counting)]
            if not isinstance(val, torch.Tensor) or len(counting) != 1 or counting[0].step != 1:
                raise NoLoop
            plain = all(isinstance(p, Counting) or p == slice(None) or p is Ellipsis for p in where.index)
            dim = where.dim
            if not plain or tuple(val.shape) != (*into.shape[:dim], *into.shape[dim + 1 :]):
                raise NoLoop

    # ------------------------------------------------------------ as a step

    def results(self) -> list[fx.Node]:
        """Nodes of the first repetition of which some version is read outside, and what is stored.

        Of what is carried on the last version does not count: the loop gives it anyway.
        """
        found = []
        for q, node in enumerate(self.first):
            rows = self.rows[:-1] if node in self.carries.values() else self.rows
            outside = any(u not in self.place for row in rows for u in row[q].users)
            if node in self.stores or outside:
                found.append(node)
        return found

    def step(self, xs: Sequence[fx.Node]) -> Step:
        """The step; it gives the next carries, then ``results``.

        Args:
            xs: for each of ``slices`` what the node is at every step, time first.
        """
        results = self.results()
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}

        def placeholder(name: str, node: fx.Node) -> None:
            made[node] = graph.placeholder(name)
            made[node].meta["example_value"] = value_of(node)

        for i, start in enumerate(self.carries):
            placeholder(f"carry{i}", start)
        for i, node in enumerate(self.slices):
            placeholder(f"x{i}", node)
        kept = [n for n in self.first if n not in self.slices and n not in self.stores]
        read = [a for n in kept for a in n.all_input_nodes]
        read += [n.args[2] for n in self.stores]  # type: ignore[misc]
        known = {*self.place, *self.carries, *self.slices}
        extras = list(dict.fromkeys(a for a in read if a not in known))
        for i, node in enumerate(extras):
            placeholder(f"w{i}", node)
        for node in kept:
            made[node] = graph.node_copy(node, made.__getitem__)
        outs = [made[n] for n in self.carries.values()]
        outs += [made[n.args[2] if n in self.stores else n] for n in results]  # type: ignore[index]
        graph.output(tuple(outs))
        module = fx.GraphModule({}, graph)
        return Step(module, tuple(self.carries), tuple(xs), tuple(extras), self.stretch.repeats)
