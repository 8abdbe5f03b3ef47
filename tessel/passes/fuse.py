"""Join nodes into kernels.

    %1 = exp(%0)
    %2 = sum(%1, dims=(1,))         becomes    %4 = kernel(%0) reduction { exp, sum, expand, div }
    %3 = expand(%2, shape=(8, 64))
    %4 = div(%1, %3)

Two groups are joined when their axes can be made one iteration space on which every value is
computed once (``tiles/axes.py``), when no other kernel would have to run between them, and
when the joint kernel stays of a sensible size. So pointwise chains join, reductions join with
what feeds them and what they feed, matmuls take the pointwise work after them as epilogue,
and kernels that read one tensor at the same places become one. Views and generated values are
repeated inside every kernel that reads them. A value read at other places than it is written
(a slice, a matmul's operand) is computed where it is read only if that is cheap and nothing
else reads it.

Nodes without a template stay calls to torch. Each kernel node says in ``why`` what was joined.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from ..config import Options
from ..ir.node import Builder, Graph, Node, Value, map_values
from ..ir.types import TensorType
from ..tiles.axes import Axes, join
from ._copies import own_copies, torch_runs
from ._groups import (
    ATTENTION,
    FREE,
    MAX_NODES,
    MAX_TENSORS,
    Group,
    inline_problem,
    only_mask,
    outside_reads,
    pages,
    start,
    unpacks,
)
from ._products import with_bias
from ._regions import KERNEL, make_kernel
from ._scans import scan_problem

ORDER = {"pointwise": 0, "reduction": 1, "scan": 2, "matmul": 3, "attention": 4, "attention_backward": 5}
LOOPS = ("pointwise", "reduction", "scan")  # families that join along their loops


def run(graph: Graph, options: Options | None = None) -> Graph:
    """The graph with its computing nodes grouped into ``kernel`` nodes, in an order that respects all uses."""
    options = Options() if options is None else options
    if options.matmul == "library":
        graph = with_bias(graph)
    return _Fuser(own_copies(graph, options), options).run()


class _Fuser:
    """One run of the pass."""

    def __init__(self, graph: Graph, options: Options) -> None:
        self.graph = graph
        self.options = options
        self.place = {n: i for i, n in enumerate(graph.nodes)}
        self.group_of: dict[Node, Group] = {}
        self.groups: dict[Group, None] = {}
        self.users = self._users()
        self.followers: dict[Node, list[Node]] = {}  # nodes that must run later without reading a value
        self.refused: dict[Node, str] = {}

    def run(self) -> Graph:
        ordered: Node | None = None
        binds: dict[str, Node] = {}
        for node in self.graph.nodes:
            if node.op.kind in FREE:
                continue
            group = start(node, self.place[node], torch_runs(node, self.options))
            group.after.update((binds[s], None) for s in node.symbols() if s in binds)
            if "symbol" in node.attrs:
                binds[node.attrs["symbol"]] = node
            if node.op.random or node.op.kind == "effect":
                if ordered is not None:
                    group.after[ordered] = None
                ordered = node
            for earlier in group.after:
                self.followers.setdefault(earlier, []).append(node)
            self._add(group)
        if self.options.fusion:
            computing = [n for n in self.graph.nodes if n in self.group_of]
            for node in computing:
                if node.op.kind == "contract":
                    self._grow_epilogue(node)
            for node in computing:
                self._join_producers(node)
            for node in computing:
                self._join_epilogue(node)
            self._join_siblings()
        return self._emit()

    # ------------------------------------------------------------------ joining

    def _users(self) -> dict[Value, set[Node | None]]:
        """The computing nodes that read a value, views looked through; ``None`` stands for an output."""
        users: dict[Value, set[Node | None]] = {}
        for v in self.graph.results():
            users.setdefault(v, set()).add(None)
        for node in reversed(self.graph.nodes):
            if node.op.kind in FREE:
                mine: set[Node | None] = set().union(*(users.get(v, set()) for v in node.outs))
            else:
                mine = {node}
            for v in node.operands:
                if v.node.op.kind != "input":
                    users.setdefault(v, set()).update(mine)
        return users

    def _add(self, group: Group) -> None:
        self.groups[group] = None
        for n in group.nodes:
            self.group_of[n] = group

    def _before(self, group: Group) -> dict[Group, None]:
        """The groups that must run before a group."""
        found: dict[Group, None] = {}
        stack = list(group.reads)
        while stack:
            v = stack.pop()
            if v.node in self.group_of:
                found[self.group_of[v.node]] = None
            elif v.node.op.kind in FREE:
                stack.extend(v.node.operands)
        for n in group.after:
            found[self.group_of[n]] = None
        found.pop(group, None)
        return found

    def _path_between(self, early: Group, late: Group) -> bool:
        """Whether a third group must run after ``early`` and before ``late``."""
        seen: set[Group] = {early}
        stack = [g for g in self._before(late) if g is not early]
        while stack:
            g = stack.pop()
            if g in seen or g.reach < early.last:
                continue
            seen.add(g)
            before = self._before(g)
            if early in before:
                return True
            stack.extend(before)
        return False

    def _raise(self, group: Group) -> None:
        """All that must run after a group reaches at least as far."""
        stack = [group]
        while stack:
            g = stack.pop()
            users = {u for v in g.values for u in self.users.get(v, ()) if u is not None}
            for u in users.union(*(self.followers.get(n, ()) for n in g.nodes)):
                later = self.group_of[u]
                if later.reach < g.reach:
                    later.reach = g.reach
                    stack.append(later)

    def _grow_epilogue(self, node: Node) -> None:
        """Take pointwise work into the matmul that feeds it, as long as what it reads is then never stored."""
        work = list(node.outs)
        while work:
            v = work.pop()
            mine = self.group_of[v.node]
            if mine.axes is None:
                return
            readers = self.users.get(v, set()) - set(mine.nodes)
            groups = {self.group_of[n] for n in readers if n is not None}
            if not readers or None in readers or any(g.family != "pointwise" for g in groups):
                continue
            saved = dict(self.groups), dict(self.group_of)
            ordered = sorted(groups, key=lambda g: g.first)
            if all(self._try(self.group_of[v.node], g) is None for g in ordered):
                work.extend(w for g in ordered for w in g.values)
            else:
                self.groups, self.group_of = saved

    def _join_epilogue(self, node: Node) -> None:
        """A whole pointwise kernel moves into the matmul whose (also stored) result it reads."""
        mine = self.group_of[node]
        if mine.axes is None or mine.family != "pointwise" or mine.nodes[-1] is not node:
            return
        for g in self._before(mine):
            if g.family == "matmul" and any(v in g.values for v in mine.reads) and self._try(g, mine) is None:
                return

    def _join_producers(self, node: Node) -> None:
        """Join a node's group with the pointwise and reduction kernels that make its operands, nearest first;
        cheap producers of a matmul's operands are computed where the matmul reads them."""
        if self.group_of[node].axes is None:
            return
        tried: set[Group] = set()
        while True:
            mine = self.group_of[node]
            producers = [
                g
                for g in self._before(mine)
                if g.axes is not None
                and g not in tried
                and g.family in LOOPS
                and any(v in g.values for v in mine.reads)
            ]
            if not producers:
                return
            producer = max(producers, key=lambda g: g.last)
            tried.add(producer)
            why = self._try(producer, mine)
            if why:
                self.refused.setdefault(node, why)

    def _try(self, a: Group, b: Group) -> str | None:
        """Join ``a`` (the producer) and ``b``; the reason where that is refused."""
        assert a.axes is not None and b.axes is not None
        through = [v for v in b.reads if v in a.values]
        if len(a.nodes) + len(b.nodes) > MAX_NODES:
            return f"the kernel would have more than {MAX_NODES} nodes"
        if self._path_between(a, b) or self._path_between(b, a):
            return "another kernel must run between them"
        moved = [v for v in through if v in b.axes.moved]
        operands = [v for v in through if v in b.operand_bases]
        if moved or operands or b.family in ATTENTION:
            return self._inline(a, b, through)
        if a.family in ATTENTION:
            return "attention has no epilogue"
        if a.family != b.family and "matmul" in (a.family, b.family) and "reduction" in (a.family, b.family):
            return "a matmul and a reduction fold different axes"
        if a.family != b.family and "matmul" in (a.family, b.family) and "scan" in (a.family, b.family):
            return "a matmul has no steps that follow each other"
        shared = [v for v in b.reads if v in a.reads and v in a.axes.reads and v in b.axes.reads]
        axes = join(a.axes, b.axes, through, shared=shared)
        if isinstance(axes, str):
            # cheap work on fewer axes is repeated rather than stored
            return axes if not through or self._inline(a, b, through) else None
        if "matmul" in (a.family, b.family) and (why := _not_an_epilogue(axes)):
            return why
        if "scan" in (a.family, b.family) and (why := scan_problem((*a.nodes, *b.nodes), axes)):
            return why
        return self._replace(a, b, axes, f"{_name(a)} with {_name(b)}")

    def _inline(self, a: Group, b: Group, through: list[Value]) -> str | None:
        outside = [u for v in a.values for u in self.users.get(v, ()) if u not in a.nodes and u not in b.nodes]
        if outside:
            return "its value is read at other places, and something else needs it stored"
        own = a.family == "pointwise" and b.family in ATTENTION and not only_mask(b, through)
        if own and not pages(a, b, through) and (why := unpacks(a, b, through)):
            return why
        why = inline_problem(a, b)
        if why:
            return why
        assert a.axes is not None and b.axes is not None
        axes = join(a.axes, b.axes, through, inline=True)
        assert isinstance(axes, Axes)
        return self._replace(a, b, axes, f"{_name(a)} computed where {_name(b)} reads it", inline=True)

    def _replace(self, a: Group, b: Group, axes: Axes, how: str, inline: bool = False) -> str | None:
        group = Group(
            sorted({*a.nodes, *b.nodes}, key=self.place.__getitem__),
            {**a.free, **b.free},
            {},
            axes,
            min(a.first, b.first),
            max(a.last, b.last),
            b.family if inline else max(a.family, b.family, key=ORDER.__getitem__),
            a.inlined | b.inlined | (frozenset(a.values) if inline else frozenset()),
            a.operand_bases | b.operand_bases,
            joined=[*a.joined, *b.joined, how],
            after={**a.after, **b.after},
            reach=max(a.reach, b.reach),
        )
        group.reads = outside_reads(group)
        if inline and b.family == "matmul" and any(v in b.operand_bases for v in a.values):
            group.operand_bases |= frozenset(a.reads)
        if len(group.reads) + sum(1 for v in group.values if self._stored(v, group)) > MAX_TENSORS:
            return f"the kernel would touch more than {MAX_TENSORS} tensors"
        if any(v in group.operand_bases for v in group.values - group.inlined):
            return "it feeds the matmul itself"
        del self.groups[a], self.groups[b]
        self._add(group)
        self._raise(group)
        return None

    def _stored(self, v: Value, group: Group) -> bool:
        return any(
            u is None or (self.group_of.get(u) is not group and u not in group.nodes) for u in self.users.get(v, ())
        )

    def _join_siblings(self) -> None:
        """Join kernels that read one tensor at the same places, where nothing runs between them."""
        readers: dict[Value, list[Node]] = {}
        for g in self.groups:
            if g.axes is not None and g.family in ("pointwise", "reduction"):
                for v in g.reads:
                    if v not in g.axes.moved and isinstance(v.type, TensorType) and v.type.rank > 0:
                        readers.setdefault(v, []).append(g.nodes[0])
        for v, nodes in readers.items():
            if not 2 <= len(nodes) <= 16:
                continue
            for left, right in itertools.combinations(nodes, 2):
                a, b = self.group_of[left], self.group_of[right]
                if a is b or not self._worth_sharing(v, a, b):
                    continue
                if b.last < a.first or any(u in b.values for u in a.reads):
                    a, b = b, a
                if not any(u in a.values for u in b.reads):
                    self._try(a, b)

    @staticmethod
    def _worth_sharing(v: Value, a: Group, b: Group) -> bool:
        """The shared tensor has all loops of both: reading it once is what the join is for."""
        assert a.axes is not None and b.axes is not None
        return all(
            {x for lay in g.axes.reads.get(v, ()) for d in lay for x in d} >= g.axes.domain for g in (a, b) if g.axes
        )

    # ------------------------------------------------------------------ the new graph

    def _emit(self) -> Graph:
        builder = Builder(self.graph.inputs)
        new: dict[Value, Value] = {v: v for i in self.graph.inputs for v in i.outs}
        counter = 0

        def want(v: Value) -> Value:
            """The value in the new graph; views and generated values are made when first asked for."""
            stack = [v]
            while stack:
                u = stack[-1]
                if u in new:
                    stack.pop()
                    continue
                missing = [w for w in u.node.operands if w not in new]
                if missing:
                    stack.extend(missing)
                    continue
                node = builder.append(u.node.replace(args=map_values(u.node.args, new.__getitem__)))
                new.update(zip(u.node.outs, node.outs, strict=True))
            return new[v]

        stored = self._needed()
        for group in self._schedule():
            if group.axes is None:
                (old,) = group.nodes
                made = builder.append(old.replace(args=map_values(old.args, want)))
                new.update(zip(old.outs, made.outs, strict=True))
                continue
            outs = [v for n in group.nodes for v in n.outs if v in stored]
            node = make_kernel(group, outs, self.place, counter, self.refused)
            counter += 1
            made = builder.append(node.replace(args=tuple(want(v) for v in node.args)))
            new.update(zip(outs, made.outs, strict=True))
        return builder.finish(
            map_values(self.graph.outputs, want),
            tuple((i, want(v)) for i, v in self.graph.effects),
            self.graph.name,
        )

    def _needed(self) -> set[Value]:
        """Computed values that something outside their group reads, directly or through views."""
        found: set[Value] = set()
        stack = [v for g in self.groups for v in g.reads] + list(self.graph.results())
        while stack:
            v = stack.pop()
            if v in found:
                continue
            found.add(v)
            if v.node.op.kind in FREE:
                stack.extend(v.node.operands)
        for g in self.groups:  # a kernel whose values nobody reads still has a result
            if g.axes is not None and not any(v in found for v in g.values):
                found.add(g.nodes[-1].out)
        return found

    def _schedule(self) -> Iterable[Group]:
        """Groups in dependency order, otherwise as near to the program's order as can be."""
        import heapq

        before = {g: self._before(g) for g in self.groups}
        waiting = {g: len(b) for g, b in before.items()}
        after: dict[Group, list[Group]] = {}
        for g, bs in before.items():
            for b in bs:
                after.setdefault(b, []).append(g)
        ready = [(g.last, id(g), g) for g, n in waiting.items() if n == 0]
        heapq.heapify(ready)
        done = 0
        while ready:
            _, _, g = heapq.heappop(ready)
            done += 1
            yield g
            for later in after.get(g, ()):
                waiting[later] -= 1
                if waiting[later] == 0:
                    heapq.heappush(ready, (later.last, id(later), later))
        assert done == len(self.groups), "the fused kernels have a cycle"


def _not_an_epilogue(axes: Axes) -> str | None:
    """A matmul's epilogue computes on the product's own axes."""
    for v in axes.computed:
        if frozenset(a for d in axes.layouts[v] for a in d) != axes.parallel:
            return f"{v.node.op.name} is not on the matmul's result axes"
    if len(axes.folded) > 1:
        return "one kernel holds one matmul"
    return None


def _name(group: Group) -> str:
    names = [n.op.name for n in group.nodes]
    return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"


__all__ = ["KERNEL", "run"]
