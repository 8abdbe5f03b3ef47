"""Roll a loop that Dynamo unrolled back up.

    for t in range(n):                         a[:, 0], a[:, 1], ... ; h = a[:, t] * h + b[:, t] n times over;
        h = a[:, t] * h + b[:, t]              torch.stack of n values
        ys.append(h @ c[t])          becomes   one step, applied to all slices (see ``loops``)
    y = torch.stack(ys, 1)

The graph is read as text: each node's operator, the places of its arguments and its result's type are one letter,
numbers that index a tensor left out. A stretch that repeats itself is a loop if every argument in it is one of

* the same in every repetition,
* a value of the same repetition, or of the one before it (a carry),
* a slice of one tensor whose indices count up or down from repetition to repetition.

Values that are collected (stack, cat, ``out[:, t] = y``) become the loop's results. A stretch that draws random numbers
or writes to anything else stays as it is.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from .linear_match import emit_linear_attention, is_known
from .loops import WITH_START, NotAffine, Step, complete_examples, emit, erase_unused, example, fixed, has_side_effects

__all__ = ["roll"]

LEAST = 4  # repetitions of a loop
_LONGEST = 400  # nodes of a step
_FACTORIES = {torch.zeros, torch.zeros_like, torch.empty, torch.empty_like, torch.full, torch.full_like, torch.clone}
_FACTORY_METHODS = {"new_zeros", "new_empty", "new_full", "clone"}
_INDEXED = {operator.getitem, operator.setitem, torch.select, torch.narrow, "select", "narrow"}


def roll(gm: fx.GraphModule) -> int:
    """Rewrite ``gm`` in place; how many loops were found."""
    count, start = 0, 0
    while (loop := _next_loop(gm, start)) is not None:
        loop.rewrite()
        count += 1
        start = loop.stretch.start
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


@dataclass(frozen=True)
class _Stretch:
    """``repeats`` times ``period`` nodes, from the ``start``-th on."""

    start: int
    period: int
    repeats: int


def _next_loop(gm: fx.GraphModule, start: int) -> _Loop | None:
    """The first loop that begins at the ``start``-th node or later."""
    nodes = list(gm.graph.nodes)
    for found in _repeated(_letters(nodes), start):
        for peeled in range(2):  # the first repetition may differ in what it starts from
            stretch = _Stretch(found.start + peeled * found.period, found.period, found.repeats - peeled)
            if stretch.repeats >= LEAST:
                try:
                    return _Loop(gm, nodes, stretch)
                except _NoLoop:
                    continue
    return None


def _letters(nodes: Sequence[fx.Node]) -> np.ndarray:
    """A number for each node, equal where two could be the same node of two repetitions; unique for inputs."""
    numbers: dict[Any, int] = {}
    out = []
    for i, node in enumerate(nodes):
        if node.op in ("call_function", "call_method"):
            loose = node.target in _INDEXED
            args = (_shape_of(node.args, loose), _shape_of(tuple(sorted(node.kwargs.items())), loose))
            key: Any = (node.op, node.target, args, _type_of(node))
        else:
            key = i
        out.append(numbers.setdefault(key, len(numbers)))
    return np.array(out)


def _shape_of(a: Any, loose: bool) -> Any:
    if isinstance(a, fx.Node):
        return fx.Node
    if isinstance(a, tuple | list):
        return (type(a).__name__, *(_shape_of(x, loose) for x in a))
    if isinstance(a, slice):
        return ("slice", *(_shape_of(x, loose) for x in (a.start, a.stop, a.step)))
    if loose and type(a) is int:
        return int
    return (type(a), repr(a))


def _type_of(node: fx.Node) -> Any:
    val = example(node)
    return (tuple(map(str, val.shape)), val.dtype) if isinstance(val, torch.Tensor) else type(val)


def _repeated(letters: np.ndarray, start: int) -> Iterator[_Stretch]:
    """Stretches from ``start`` on that repeat themselves often enough, by where they begin and then by period."""
    places: dict[int, list[int]] = {}
    for i, x in enumerate(letters.tolist()):
        places.setdefault(x, []).append(i)
    for i in range(start, len(letters)):
        where = places[int(letters[i])]
        if len(where) < LEAST:
            continue
        k = bisect.bisect_right(where, i)
        for later in where[k : k + 8]:
            period = later - i
            end = i + LEAST * period
            if period > _LONGEST or end > len(letters):
                break
            if (letters[i : end - period] == letters[later:end]).all():
                differ = np.flatnonzero(letters[i:-period] != letters[later:])
                same = int(differ[0]) if len(differ) else len(letters) - later
                yield _Stretch(i, period, same // period + 1)


class _NoLoop(Exception):
    """A repeated stretch that is no loop."""


@dataclass
class _Slices:
    """What a node takes of a tensor, repetition by repetition."""

    source: fx.Node
    index: tuple[Any, ...]  # numbers that count replaced by ``_Counting``
    example: torch.Tensor


@dataclass(frozen=True)
class _Counting:
    first: int
    step: int


@dataclass
class _Loop:
    """A stretch of a graph as a step with carries, slices and extras."""

    gm: fx.GraphModule
    nodes: list[fx.Node]
    stretch: _Stretch
    carries: dict[fx.Node, fx.Node] = field(default_factory=dict)  # first repetition's start -> carried node
    slices: dict[fx.Node, _Slices] = field(default_factory=dict)
    stores: dict[fx.Node, _Slices] = field(default_factory=dict)  # a setitem and where it writes

    def __post_init__(self) -> None:
        s = self.stretch
        self.rows = [self.nodes[s.start + j * s.period : s.start + (j + 1) * s.period] for j in range(s.repeats)]
        self.place = {n: (j, q) for j, row in enumerate(self.rows) for q, n in enumerate(row)}
        self.first = self.rows[0]
        self.carry_of: dict[tuple[int, fx.Node], fx.Node] = {}
        for q, node in enumerate(self.first):
            self._look_at(q, node)
        rest = [n for n in self.first if n not in self.stores]
        if has_side_effects(rest) or not self.slices or not (self.carries or self.stores):
            raise _NoLoop
        self._check_stores()
        read = [*self.first, *(a for n in self.first for a in n.all_input_nodes)]
        if any(not fixed(example(n)) for n in read) and not self._is_known():
            raise _NoLoop  # sizes that no number stands for yet

    def _is_known(self) -> bool:
        """Whether it will be written without a loop, which needs no number but that of the steps."""
        extras, graph = self._step(self._results())
        inputs: dict[Any, fx.Node] = {}  # stand for what is sliced
        xs = [inputs.setdefault((s.source, repr(s.index)), fx.Graph().placeholder("x")) for s in self.slices.values()]
        made = fx.GraphModule({}, graph)
        return is_known(Step(made, tuple(self.carries), tuple(xs), tuple(extras), self.stretch.repeats))

    # ------------------------------------------------------------ what each argument is

    def _look_at(self, q: int, node: fx.Node) -> None:
        versions = [row[q] for row in self.rows]
        if node.target is operator.setitem:
            where = self._counted([n.args[0] for n in versions], [n.args[1] for n in versions])
            if where is None or not any(_counts(p) for p in where.index):
                raise _NoLoop
            self.stores[node] = where
            self._argument(q, [n.args[2] for n in versions])
            return
        indexed = node.target is operator.getitem
        if indexed and not self._inside(node.args[0]):
            got = self._counted([n.args[0] for n in versions], [n.args[1] for n in versions])
            if got is not None and any(map(_counts, got.index)):
                if not isinstance(example(got.source), torch.Tensor):
                    got = self._of_parts(got)
                self.slices[node] = got
                return
        if node.target in ("select", torch.select) and not node.kwargs and len(node.args) == 3:
            got = self._selected(versions)
            if got is not None:
                self.slices[node] = got
                return
        flat = [_leaves((n.args, tuple(sorted(n.kwargs.items())))) for n in versions]
        for arguments in zip(*flat, strict=True):
            self._argument(q, arguments)

    def _selected(self, versions: Sequence[fx.Node]) -> _Slices | None:
        source, dim, _ = versions[0].args
        val = example(source)
        if not isinstance(source, fx.Node) or self._inside(source) or not isinstance(val, torch.Tensor):
            return None
        if any(n.args[:2] != (source, dim) for n in versions) or not isinstance(dim, int):
            return None
        before = (slice(None),) * (dim % val.dim())
        got = self._counted([source] * len(versions), [(*before, n.args[2]) for n in versions])
        return got if got is not None and any(map(_counts, got.index)) else None

    def _of_parts(self, got: _Slices) -> _Slices:
        """A slice of what ``unbind`` was applied to, for a part that it gave."""
        made = got.source
        x = made.args[0] if made.args else None
        if made.target not in (torch.unbind, "unbind", torch.Tensor.unbind) or not isinstance(x, fx.Node):
            raise _NoLoop
        dim = made.args[1] if len(made.args) > 1 else made.kwargs.get("dim", 0)
        val = example(x)
        if not isinstance(val, torch.Tensor) or not isinstance(dim, int) or len(got.index) != 1:
            raise _NoLoop
        return _Slices(x, (*(slice(None),) * (dim % val.dim()), *got.index), val)

    def _inside(self, a: Any) -> bool:
        return isinstance(a, fx.Node) and a in self.place

    def _argument(self, q: int, versions: Sequence[Any]) -> None:
        """One argument in every repetition: the same, of its own repetition, or a carry."""
        first = versions[0]
        if not isinstance(first, fx.Node) and not any(isinstance(v, fx.Node) for v in versions):
            if any(type(v) is not type(first) or v != first for v in versions):
                raise _NoLoop
            return
        if any(not isinstance(v, fx.Node) for v in versions):
            raise _NoLoop
        if not self._inside(first) and all(v is first for v in versions):
            if not isinstance(example(first), torch.Tensor):
                raise _NoLoop
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
            raise _NoLoop
        source = self.first[places[1][1]]  # type: ignore[index]
        start, after = example(first), example(source)
        fits = isinstance(start, torch.Tensor) and isinstance(after, torch.Tensor)
        if not fits or start.shape != after.shape or start.dtype != after.dtype or start.device != after.device:
            raise _NoLoop
        if self.carries.setdefault(first, source) is not source:
            raise _NoLoop

    def _part(self, versions: Sequence[fx.Node]) -> None:
        """One part after the other of what ``unbind`` gave, taken out before the loop."""
        if any(n.target is not operator.getitem for n in versions):
            raise _NoLoop
        got = self._counted([n.args[0] for n in versions], [n.args[1] for n in versions])
        if got is None or isinstance(got.example, torch.Tensor) or not any(map(_counts, got.index)):
            raise _NoLoop
        got = self._of_parts(got)
        if self.slices.setdefault(versions[0], got) != got:
            raise _NoLoop

    def _counted(self, sources: Sequence[Any], indices: Sequence[Any]) -> _Slices | None:
        """An index whose numbers stay or count evenly, into one tensor."""
        source = sources[0]
        if not isinstance(source, fx.Node) or any(s is not source for s in sources):
            return None
        parts = [i if isinstance(i, tuple) else (i,) for i in indices]
        if len({len(p) for p in parts}) != 1:
            return None
        out: list[Any] = []
        for versions in zip(*parts, strict=True):
            got = _counting(versions)
            if got is None:
                return None
            out.append(got[0])
        if sum(map(_counts, out)) > 1:
            return None
        return _Slices(source, tuple(out), example(source))

    def _check_stores(self) -> None:
        """What is written to must be new, read by nobody before the loop is over, and filled step after step."""
        end = self.stretch.start + self.stretch.period * self.stretch.repeats
        order = {n: i for i, n in enumerate(self.nodes)}
        targets = [w.source for w in self.stores.values()]
        if len(set(targets)) != len(targets):
            raise _NoLoop
        for target in targets:
            made = target.target in (_FACTORIES if target.op == "call_function" else _FACTORY_METHODS)
            if target.op not in ("call_function", "call_method") or not made:
                raise _NoLoop
            for user in target.users:
                ours = user.target is operator.setitem and user in self.place
                if not ours and order[user] < end and user.target not in (torch.zeros_like, torch.empty_like):
                    raise _NoLoop
        for node, where in self.stores.items():
            if not isinstance(node.args[2], fx.Node):
                raise _NoLoop
            val, into = example(node.args[2]), where.example
            counting = [p for p in where.index if isinstance(p, _Counting)]
            if not isinstance(val, torch.Tensor) or len(counting) != 1 or counting[0].step != 1:
                raise _NoLoop
            plain = all(isinstance(p, _Counting) or p == slice(None) or p is Ellipsis for p in where.index)
            dim = _dim_of(where)
            if not plain or tuple(val.shape) != (*into.shape[:dim], *into.shape[dim + 1 :]):
                raise _NoLoop

    # ------------------------------------------------------------ rewriting

    def rewrite(self) -> None:
        graph = self.gm.graph
        results = self._results()
        extras, step_graph = self._step(results)
        after = self.rows[-1][-1].next
        known = set(graph.nodes)
        with graph.inserting_before(after):
            xs = [self._all_steps(s) for s in self.slices.values()]
            complete_examples(self.gm, [n for n in graph.nodes if n not in known])
            step = Step(
                fx.GraphModule({}, step_graph), tuple(self.carries), tuple(xs), tuple(extras), self.stretch.repeats
            )
            try:
                lasts, ys = emit_linear_attention(step, graph)
            except NotAffine:
                lasts, ys = emit(self.gm, step)
            everything = dict(zip(results, ys, strict=True))
            for node, where in self.stores.items():
                self._fill(where, everything[node])
        last_of = dict(zip(self.carries.values(), lasts, strict=True))
        for q, node in enumerate(self.first):
            if node in everything and node not in self.stores:
                self._hand_out([row[q] for row in self.rows], everything[node])
            elif node in last_of:
                self._hand_out_last(self.rows[-1][q], last_of[node])
        for row in reversed(self.rows):
            for node in reversed(row):
                graph.erase_node(node)
        erase_unused(lasts)
        found = {k: v for k, v in self.first[-1].meta.items() if k in ("stack_trace", "nn_module_stack")}
        for node in graph.nodes:
            if node not in known:
                node.meta = {**found, **node.meta}

    def _results(self) -> list[fx.Node]:
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

    def _step(self, results: Sequence[fx.Node]) -> tuple[list[fx.Node], fx.Graph]:
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}

        def placeholder(name: str, node: fx.Node) -> None:
            made[node] = graph.placeholder(name)
            made[node].meta["example_value"] = example(node)

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
        return extras, graph

    def _all_steps(self, s: _Slices) -> fx.Node:
        """What every step takes, time first."""
        graph, n = self.gm.graph, self.stretch.repeats
        dim = _dim_of(s)
        at = next(i for i, p in enumerate(s.index) if _counts(p))
        part = s.index[at]
        wide = isinstance(part, slice)
        c = part.start if wide else part
        width = part.stop.first - part.start.first if wide else 1
        first, last = sorted((c.first, c.first + c.step * (n - 1)))
        step = abs(c.step)
        stop = last + width
        if first == 0 and _is(s.example.shape[_own_dim(s, at)], stop) and (step == 1 or wide):
            taken = slice(None)
        else:
            taken = slice(first, stop, None if wide else step)
        index = tuple(taken if i == at else p for i, p in enumerate(s.index))
        x = s.source
        if any(p != slice(None) for p in index):
            x = graph.call_function(operator.getitem, (x, index))
        if wide and width == step:
            x = graph.call_method("unflatten", (x, dim, (n, width)))
        elif wide:
            x = graph.call_method("unfold", (x, dim, width, step))
        if c.step < 0:
            x = graph.call_function(torch.flip, (x, (dim,)))
        if dim:
            x = graph.call_function(torch.movedim, (x, dim, 0))
        if wide and width != step:
            x = graph.call_function(torch.movedim, (x, -1, dim + 1))
        return x

    def _fill(self, where: _Slices, ys: fx.Node) -> None:
        """The tensor that was written to step by step, with all results in it."""
        graph = self.gm.graph
        dim = _dim_of(where)
        counting = next(p for p in where.index if isinstance(p, _Counting))
        target, n = where.source, self.stretch.repeats
        users = [
            u for u in target.users if u not in self.place and u.target not in (torch.zeros_like, torch.empty_like)
        ]
        new = graph.call_function(torch.movedim, (ys, 0, dim)) if dim else ys
        if where.example.dtype != example(next(iter(self.stores)).args[2]).dtype:
            new = graph.call_method("to", (new, where.example.dtype))
        if counting.first or not _is(where.example.shape[dim], n):
            new = graph.call_function(torch.slice_scatter, (target, new, dim, counting.first, counting.first + n))
        else:
            new = graph.call_method("contiguous", (new,))
        new.meta["example_value"] = example(target)
        for user in users:
            user.replace_input_with(target, new)

    def _hand_out(self, versions: Sequence[fx.Node], ys: fx.Node) -> None:
        """Give every reader outside what it read."""
        graph = self.gm.graph
        for user in dict.fromkeys(u for v in versions for u in v.users if u not in self.place):
            order = next((o for o in (versions, versions[::-1]) if _gathers(user, o)), None)
            if order is not None:
                with graph.inserting_before(user):
                    all_steps = ys if order is versions else graph.call_function(torch.flip, (ys, (0,)))
                    new = self._gathered(user, order, all_steps)
                new.meta.update(user.meta)
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        for j, version in enumerate(versions):
            users = [u for u in version.users if u not in self.place]
            if users:
                with graph.inserting_after(ys):
                    one = graph.call_function(operator.getitem, (ys, j))
                one.meta["example_value"] = example(version)
                for user in users:
                    user.replace_input_with(version, one)

    def _hand_out_last(self, version: fx.Node, last: fx.Node) -> None:
        """Give every reader outside the carry as the last step left it."""
        users = [u for u in version.users if u not in self.place]
        if users:
            last.meta["example_value"] = example(version)
        for user in users:
            user.replace_input_with(version, last)

    def _gathered(self, user: fx.Node, versions: Sequence[fx.Node], ys: fx.Node) -> fx.Node:
        graph = self.gm.graph
        given = list(user.args[0])  # type: ignore[arg-type]
        at, n = given.index(versions[0]), len(versions)
        dim = _gather_dim(user)
        stacks = _is_stack(user)
        rank = example(versions[0]).dim()
        dim %= rank + stacks
        start, both = ys.meta.get(WITH_START, (None, None))
        if stacks and at and given[at - 1] is start:
            ys, at, n = both, at - 1, n + 1
        whole = graph.call_function(torch.movedim, (ys, 0, dim)) if dim else ys
        if not stacks:
            whole = graph.call_function(torch.flatten, (whole, dim, dim + 1))
        make = torch.stack if stacks else torch.cat
        before, after = ([graph.call_function(make, (p, dim))] if p else [] for p in (given[:at], given[at + n :]))
        pieces = [*before, whole, *after]
        if len(pieces) == 1:
            return graph.call_method("contiguous", (whole,))
        return graph.call_function(torch.cat, (pieces, dim))


def _is(size: Any, n: int) -> bool:
    """Whether a size is a number whatever the call, and this one."""
    return isinstance(size, int) and size == n


def _counts(p: Any) -> bool:
    return isinstance(p, _Counting) or (isinstance(p, slice) and isinstance(p.start, _Counting))


def _counting(versions: Sequence[Any]) -> tuple[Any] | None:
    """One part of an index: as it is if all are the same, ``_Counting`` where it counts."""
    first = versions[0]
    if all(type(v) is type(first) and v == first for v in versions) and not isinstance(first, fx.Node):
        return (first,)
    if all(type(v) is int for v in versions):
        step = versions[1] - first
        even = step != 0 and all(b - a == step for a, b in itertools.pairwise(versions))
        return (_Counting(first, step),) if even and min(versions) >= 0 else None
    if all(isinstance(v, slice) and v.step is None for v in versions):
        starts, stops = [0 if v.start is None else v.start for v in versions], [v.stop for v in versions]
        if not all(type(x) is int for x in (*starts, *stops)) or len({b - a for a, b in zip(starts, stops)}) != 1:
            return None
        a, b = _counting(starts), _counting(stops)
        if a is None or b is None or stops[0] <= starts[0]:
            return None
        return (slice(a[0], b[0]),)
    return None


def _dim_of(s: _Slices) -> int:
    """Which dimension counts after the other parts of the index are applied."""
    rank = s.example.dim()
    taken = sum(p is not None and p is not Ellipsis for p in s.index)
    dim = 0
    for p in s.index:
        if _counts(p):
            return dim
        if p is Ellipsis:
            dim += rank - taken
        elif not isinstance(p, int):
            dim += 1
    raise _NoLoop


def _own_dim(s: _Slices, at: int) -> int:
    """Which dimension of the source a part of the index is for."""
    taken = sum(p is not None and p is not Ellipsis for p in s.index)
    dim = 0
    for p in s.index[:at]:
        dim += s.example.dim() - taken if p is Ellipsis else p is not None
    return dim


def _leaves(a: Any) -> list[Any]:
    if isinstance(a, tuple | list):
        return [x for part in a for x in _leaves(part)]
    if isinstance(a, slice):
        return [a.start, a.stop, a.step]
    return [a]


_STACKS = {torch.stack}
_CATS = {torch.cat, torch.concat, torch.concatenate}


def _is_stack(node: fx.Node) -> bool:
    return node.target in _STACKS


def _gather_dim(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _gathers(user: fx.Node, versions: Sequence[fx.Node]) -> bool:
    """Whether a node stacks or joins all versions, one after the other."""
    if user.target not in _STACKS | _CATS or not user.args or not isinstance(user.args[0], tuple | list):
        return False
    given = list(user.args[0])
    if versions[0] not in given or not isinstance(_gather_dim(user), int) or "out" in user.kwargs:
        return False
    at = given.index(versions[0])
    return given[at : at + len(versions)] == list(versions) and _once(given, versions)


def _once(given: Iterable[Any], versions: Sequence[fx.Node]) -> bool:
    mine = set(versions)
    return sum(g in mine for g in given) == len(mine)
