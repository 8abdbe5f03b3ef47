"""Rewriting graphs by tables of rules, and sharing equal nodes.

>>> import torch
>>> from tessel.ir.node import Graph, Node, Op, make_input
>>> from tessel.ir.types import TensorType
>>> neg = Op("neg", "pointwise", "", torch.neg, infer=lambda x: (x,))
>>> x = make_input("x", TensorType((2,), torch.float32))
>>> a = Node(neg, (x.out,), {}, x.types)
>>> b = Node(neg, (a.out,), {}, x.types)
>>> twice = Rule("double negation", ("neg",), lambda _, n: n.args[0].node.args[0]
...              if n.args[0].op.name == "neg" else None)
>>> stats = Counter()
>>> apply_rules(Graph((x,), (a, b), (b.out,)), (twice,), stats).outputs[0].node is x
True
>>> dict(stats)
{'double negation': 1}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import TesselError, check
from .node import Builder, Graph, Node, Op, Value, map_values, values_in
from .text import describe
from .types import TensorType

Rewrite: TypeAlias = "Callable[[Builder, Node], Value | tuple[Value, ...] | None]"

# Rewrites that one node of the input graph may set off, those of the nodes it becomes included.
MOST_REWRITES = 1000


@dataclass(frozen=True)
class Rule:
    """One named rewrite.

    Attributes:
        name: a few words, unique in its table; counted in statistics.
        ops: names of the operators it looks at.
        fn: ``fn(builder, node)`` gives what replaces the node's results, having added nodes
            through ``builder``, or ``None`` where it does not apply. It sees the node with its
            operands already rewritten and may look through them at what made them.
    """

    name: str
    ops: tuple[str, ...]
    fn: Rewrite


def apply_rules(
    graph: Graph,
    rules: Sequence[Rule],
    stats: Counter[str] | None = None,
    share: Callable[[Node], Hashable | None] | None = None,
) -> Graph:
    """The graph with rules applied, each node's and each new node's, until none applies.

    One sweep in order. Rules look at operands, which are settled by then, so that what the sweep
    leaves is a fixed point. Nodes that nothing reads any more stay (see ``Graph.live``).
    Regions are left alone.

    Args:
        rules: of several that apply the first in the table wins.
        stats: counts how often each rule applied, by name.
        share: a key; nodes of equal keys become one. ``None`` for nodes that must stay apart.

    Raises:
        TesselError: the rules do not settle, or one gave the wrong number of values.
    """
    table: dict[str, list[Rule]] = {}
    for entry in rules:
        for op in entry.ops:
            table.setdefault(op, []).append(entry)
    stats = Counter() if stats is None else stats
    builder = Builder(graph.inputs)
    new: dict[Value, Value] = {}
    firsts: dict[Hashable, Node] = {}

    def resolve(v: Value) -> Value:
        while (w := new.get(v)) is not None:
            v = w
        return v

    for old in graph.nodes:
        todo, count = [old], 0
        while todo:
            given = todo.pop()
            args = map_values(given.args, resolve)
            node = given if args == given.args else given.replace(args=args)
            scratch = Builder((), node.loc)
            rule, got = _first(table.get(node.op.name, ()), scratch, node)
            if rule is None:
                key = share(node) if share else None
                kept = node if key is None else firsts.setdefault(key, node)
                if kept is node:
                    builder.append(node)
                elif key is not None:
                    stats["shared"] += 1
                got = kept.outs
            else:
                stats[rule.name] += 1
                count += 1
                check(count <= MOST_REWRITES, lambda n=old, r=rule: _unsettled(n, r))  # type: ignore[misc]
                todo.extend(reversed(scratch.nodes))
            for outs in (given.outs, node.outs):
                new.update((a, b) for a, b in zip(outs, got, strict=True) if a != b)
    return builder.finish(
        map_values(graph.outputs, resolve), tuple((i, resolve(v)) for i, v in graph.effects), graph.name
    )


def _first(rules: Sequence[Rule], builder: Builder, node: Node) -> tuple[Rule | None, tuple[Value, ...]]:
    """The first rule that applies and what it gives."""
    for rule in rules:
        got = rule.fn(builder, node)
        if got is not None:
            got = (got,) if isinstance(got, Value) else got
            if len(got) != len(node.types) or any(v.node is node for v in got):
                raise TesselError(
                    f"{describe(node, {})}: rule {rule.name!r} gave {got}; "
                    f"it must give {len(node.types)} values of other nodes"
                )
            return rule, got
    return None, ()


def _unsettled(node: Node, rule: Rule) -> str:
    return f"{describe(node, {})}: rules do not settle after {MOST_REWRITES} rewrites, the last {rule.name!r}"


# ---------------------------------------------------------------- sharing

# What an opaque call does besides its result is not known; a copy is there to be storage of its own.
APART = frozenset({"call", "copy"})


def share_key(node: Node) -> Hashable | None:
    """Equal for nodes that compute the same; ``None`` for those whose order or number matters."""
    op = node.op
    if op.random or op.kind == "effect" or op.name in APART or node.regions or "symbol" in node.attrs:
        return None
    attrs = tuple(sorted((k, typed(v)) for k, v in node.attrs.items()))
    return op.name, typed(node.args), attrs, node.types


def typed(x: Any) -> Hashable:
    """A key under which 1, 1.0 and True differ, 0.0 and -0.0 differ, and NaN equals itself."""
    if isinstance(x, tuple):
        return ("tuple", *map(typed, x))
    if isinstance(x, float):
        return "float", x.hex()
    if isinstance(x, complex):
        return "complex", x.real.hex(), x.imag.hex()
    return type(x).__name__, x


# ---------------------------------------------------------------- storage


def storage_root(v: Value) -> Value:
    """The value whose elements a view shows; the value itself if it is none."""
    while v.op.kind == "view" and v.op.name != "flip":  # flip copies
        v = v.node.args[0]
    return v


def own_storage(before: Graph, after: Graph, copy: Op) -> Graph:
    """``after`` with copies where a rewrite made outputs alias that did not.

    ``x * 1`` returns a new tensor and ``x`` does not: callers may write into what they were given.
    An output must not become (a view of) an input or of another output, and a value written to an
    input must not become another input that is overwritten too.
    """
    old, new = tuple(before.results()), tuple(after.results())
    count = len(tuple(values_in(before.outputs)))
    overwritten = {target.out for target, _ in after.effects}
    seen: dict[Value, Value] = {}
    copies: dict[tuple[Value, Value], Value] = {}
    nodes = list(after.nodes)

    def copied(root: Value, was_root: Value) -> Value:
        """One copy for all outputs that shared the storage of ``was_root``."""
        if (root, was_root) not in copies:
            t = root.type if 0 not in root.type.strides else root.type.with_(shape=root.shape)
            nodes.append(Node(copy, (root,), {}, (t,), (), was_root.node.loc))
            copies[root, was_root] = nodes[-1].out
        return copies[root, was_root]

    def one(i: int) -> Value:
        was, now = old[i], new[i]
        was_root, root = storage_root(was), storage_root(now)
        if not isinstance(now.type, TensorType):
            return now
        if i < count:
            clash = seen.setdefault(root, was_root) != was_root or (
                root.op.kind == "input" and root != was_root
            )
        else:
            clash = root in overwritten and root != was_root
        if not clash:
            return now
        views: list[Node] = []
        v = now
        while v != root:
            views.append(v.node)
            v = v.node.args[0]
        v = copied(root, was_root)
        for view in reversed(views):
            nodes.append(view.replace(args=(v, *view.args[1:])))
            v = nodes[-1].out
        return v

    results: Iterator[Value] = iter([one(i) for i in range(len(new))])
    if not copies:
        return after
    outputs = map_values(after.outputs, lambda v: next(results))
    effects = tuple((target, next(results)) for target, _ in after.effects)
    return after.replace(nodes=tuple(nodes), outputs=outputs, effects=effects)


__all__ = ["Rewrite", "Rule", "apply_rules", "own_storage", "share_key", "storage_root", "typed"]
