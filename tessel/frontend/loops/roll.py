"""Roll a loop that Dynamo unrolled back up.

    for t in range(n):                         a[:, 0], a[:, 1], ... ; h = a[:, t] * h + b[:, t] n times over;
        h = a[:, t] * h + b[:, t]              torch.stack of n values
        ys.append(h @ c[t])          becomes   one step, applied to all slices
    y = torch.stack(ys, 1)

``repeats`` finds stretches of the graph that repeat themselves, ``unrolled`` says which of them are loops. Values that
are collected (stack, cat, ``out[:, t] = y``) become the loop's results.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ..fx_effects import erase_unread, has_effects
from ..fx_words import complete_examples, value_of
from .counting import Counting, NoLoop, Slices, counts
from .emit import emit
from .repeats import LEAST, Stretch, letters, repeated
from .unrolled import Unrolled
from .written import WITH_START

__all__ = ["roll"]


def roll(gm: fx.GraphModule) -> int:
    """Rewrite ``gm`` in place; how many loops were found."""
    count, start = 0, 0
    _read_where_used(gm.graph)
    while (loop := _next_loop(list(gm.graph.nodes), start)) is not None:
        _Rewriting(gm, loop).run()
        count += 1
        start = loop.stretch.start
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def _read_where_used(graph: fx.Graph) -> None:
    """Move parts taken of a tensor ahead of a loop (``for x in xs`` takes all of them first) into its steps."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    effects = [i for n, i in order.items() if n.target is operator.setitem or has_effects(n)]
    for node in order:
        if node.target is not operator.getitem or type(node.args[1]) is not int or len(node.users) != 1:
            continue
        (user,) = node.users
        crossed = bisect.bisect(effects, order[node]) != bisect.bisect_left(effects, order[user])
        if user.op in ("call_function", "call_method") and not crossed:
            user.prepend(node)


def _next_loop(nodes: Sequence[fx.Node], start: int) -> Unrolled | None:
    """The first loop that begins at the ``start``-th node or later."""
    for found in repeated(letters(nodes), start):
        for peeled in range(2):  # the first repetition may differ in what it starts from
            stretch = Stretch(found.start + peeled * found.period, found.period, found.repeats - peeled)
            if stretch.repeats >= LEAST:
                try:
                    return Unrolled(nodes, stretch)
                except NoLoop:
                    continue
    return None


class _Rewriting:
    """One loop put in place of an unrolled one."""

    def __init__(self, gm: fx.GraphModule, loop: Unrolled) -> None:
        self.gm, self.graph, self.loop = gm, gm.graph, loop

    def run(self) -> None:
        graph, loop = self.graph, self.loop
        results = loop.results()
        known = set(graph.nodes)
        with graph.inserting_before(loop.rows[-1][-1].next):
            xs = [self._all_steps(s) for s in loop.slices.values()]
            complete_examples(self.gm, [n for n in graph.nodes if n not in known])
            lasts, ys = emit(self.gm, loop.step(xs))
            everything = dict(zip(results, ys, strict=True))
            for node, where in loop.stores.items():
                self._fill(node, where, everything[node])
        last_of = dict(zip(loop.carries.values(), lasts, strict=True))
        for q, node in enumerate(loop.first):
            if node in everything and node not in loop.stores:
                self._hand_out([row[q] for row in loop.rows], everything[node])
            elif node in last_of:
                self._hand_out_last(loop.rows[-1][q], last_of[node])
        for row in reversed(loop.rows):
            for node in reversed(row):
                graph.erase_node(node)
        erase_unread(lasts)
        found = {k: v for k, v in loop.first[-1].meta.items() if k in ("stack_trace", "nn_module_stack")}
        for node in graph.nodes:
            if node not in known:
                node.meta = {**found, **node.meta}

    def _all_steps(self, s: Slices) -> fx.Node:
        """What every step takes, time first."""
        graph, n = self.graph, self.loop.stretch.repeats
        dim = s.dim
        at = next(i for i, p in enumerate(s.index) if counts(p))
        part = s.index[at]
        wide = isinstance(part, slice)
        c = part.start if wide else part
        width = part.stop.first - part.start.first if wide else 1
        first, last = sorted((c.first, c.first + c.step * (n - 1)))
        step = abs(c.step)
        stop = last + width
        if first == 0 and _is(s.example.shape[s.own_dim(at)], stop) and (step == 1 or wide):
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

    def _fill(self, store: fx.Node, where: Slices, ys: fx.Node) -> None:
        """The tensor that was written to step by step, with all results in it."""
        graph = self.graph
        dim = where.dim
        counting = next(p for p in where.index if isinstance(p, Counting))
        target, n = where.source, self.loop.stretch.repeats
        users = [
            u for u in target.users if u not in self.loop.place and u.target not in (torch.zeros_like, torch.empty_like)
        ]
        new = graph.call_function(torch.movedim, (ys, 0, dim)) if dim else ys
        if where.example.dtype != value_of(store.args[2]).dtype:
            new = graph.call_method("to", (new, where.example.dtype))
        if counting.first or not _is(where.example.shape[dim], n):
            new = graph.call_function(torch.slice_scatter, (target, new, dim, counting.first, counting.first + n))
        else:
            new = graph.call_method("contiguous", (new,))
        new.meta["example_value"] = value_of(target)
        for user in users:
            user.replace_input_with(target, new)

    def _hand_out(self, versions: Sequence[fx.Node], ys: fx.Node) -> None:
        """Give every reader outside what it read."""
        graph = self.graph
        for user in dict.fromkeys(u for v in versions for u in v.users if u not in self.loop.place):
            order = next((o for o in (versions, versions[::-1]) if _gathers(user, o)), None)
            if order is not None:
                with graph.inserting_before(user):
                    all_steps = ys if order is versions else graph.call_function(torch.flip, (ys, (0,)))
                    new = self._gathered(user, order, all_steps)
                new.meta.update(user.meta)
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        for j, version in enumerate(versions):
            users = [u for u in version.users if u not in self.loop.place]
            if users:
                with graph.inserting_after(ys):
                    one = graph.call_function(operator.getitem, (ys, j))
                one.meta["example_value"] = value_of(version)
                for user in users:
                    user.replace_input_with(version, one)

    def _hand_out_last(self, version: fx.Node, last: fx.Node) -> None:
        """Give every reader outside the carry as the last step left it."""
        users = [u for u in version.users if u not in self.loop.place]
        if users:
            last.meta["example_value"] = value_of(version)
        for user in users:
            user.replace_input_with(version, last)

    def _gathered(self, user: fx.Node, versions: Sequence[fx.Node], ys: fx.Node) -> fx.Node:
        graph = self.graph
        given = list(user.args[0])  # type: ignore[arg-type]
        at, n = given.index(versions[0]), len(versions)
        dim = _gather_dim(user)
        stacks = _is_stack(user)
        rank = value_of(versions[0]).dim()
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
