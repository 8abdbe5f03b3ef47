"""Write a changed part of an input into the input itself, instead of into a copy that is copied back whole.

    %3 = index_put(%0, (%1,), %2)         becomes      %3 = index_put_(%0, (%1,), %2)
    effect %0 := %3                                    effect %0 := %3

The effect stays written down; where its value lies in the input's own memory nothing is left to do. That is done
only where no order of the nodes can show the difference:

* the value is made from the input by a chain of such writes, of the input's type, in memory without overlaps;
* nothing that leaves the graph shares that memory;
* whatever else reads a value of the chain is needed to make the next one, so it has run before the write;
* what is written, and where, is no view of the same memory.

``notes`` says why an input was left to be copied.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..ir.node import Graph, Node, Value, map_values
from ..ir.types import TensorType, dim_equal
from ..ops.inplace import INPLACE, WRITES

__all__ = ["notes", "run"]

# Besides views and opaque calls: operators that torch may answer with (a view of) their argument.
_SHARING = frozenset({"cast", "clamp", "pad", "cat", "where", "as_strided", "view_as_real", "view_as_complex"})


def run(graph: Graph) -> Graph:
    """The graph with all such writes done in place."""
    found = _find(graph)
    links = {w.node for chain in found.values() if not isinstance(chain, str) for w in chain}
    if not links:
        return graph

    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    nodes: list[Node] = []
    for old in graph.nodes:
        args = map_values(old.args, new.__getitem__)
        if old in links:
            node = old.replace(op=INPLACE[old.op.name + "_"], args=args)
        else:
            node = old if args == old.args else old.replace(args=args)
        nodes.append(node)
        new.update(zip(old.outs, node.outs, strict=True))
    return graph.replace(
        nodes=tuple(nodes),
        outputs=map_values(graph.outputs, new.__getitem__),
        effects=tuple((i, new[v]) for i, v in graph.effects),
    )


def notes(graph: Graph) -> list[str]:
    """Inputs that are changed in part but copied whole, each with the reason, of the graph before the pass."""
    return [
        f"{i.attrs['name']} is changed in part but copied whole: {why}"
        for i, why in _find(graph).items()
        if isinstance(why, str)
    ]


def _find(graph: Graph) -> dict[Node, list[Value] | str]:
    """For each input that is changed in part: the writes, first to last, or why they cannot be done in place."""
    found: dict[Node, list[Value] | str] = {}
    users = graph.users()
    results = list(graph.results())
    for target, value in graph.effects:
        chain: list[Value] = []
        v = value
        while v.op.name in WRITES:
            chain.append(v)
            v = v.node.operands[0]
        if chain and v == target.out:
            chain.reverse()
            found[target] = _refusal(target, chain, users, results) or chain
    return found


def _refusal(target: Node, chain: list[Value], users: dict[Value, list[Node]], results: list[Value]) -> str | None:
    t = target.types[0]
    assert isinstance(t, TensorType)
    if any(w.type != t for w in chain):
        return "the new value has another type or layout"
    if not _dense(t):
        return "its elements may overlap in memory"
    for base, written in zip([target.out, *chain[:-1]], chain, strict=True):
        shared = _shared(base, users)
        if any(r in shared for r in results):
            return "the old value leaves the graph"
        if sum(v in shared for v in written.node.operands) > 1:
            return "what is written is a view of the same memory"
        needed = _needed(written.node)
        late = [n for v in shared for n in users.get(v, ()) if n not in needed and n is not written.node]
        late = [n for n in late if not any(v in shared for v in n.outs)]  # views are looked through
        if late:
            return f"the old value is read by {late[0].op.name} at {late[0].loc.short}, perhaps after the write"
    shared = _shared(chain[-1], users)
    if sum(r in shared for r in results) > 1:
        return "the new value leaves the graph in another way too"
    return None


def _dense(t: TensorType) -> bool:
    """Whether distinct places are distinct elements: the layout is a permutation of row-major order."""
    if t.contiguous:
        return True
    dims = [(s, n) for s, n in zip(t.strides, t.shape, strict=True) if not dim_equal(n, 1)]
    if not all(isinstance(x, int) for d in dims for x in d):
        return False
    step = 1
    for s, n in sorted(dims):  # type: ignore[type-var]
        if s != step:
            return False
        step = s * n  # type: ignore[assignment, operator]
    return True


def _shared(base: Value, users: dict[Value, list[Node]]) -> set[Value]:
    """A value and all that may be its memory under another name."""
    found = {base}
    stack = [base]
    while stack:
        v = stack.pop()
        for node in users.get(v, ()):
            for out in node.outs:
                if out not in found and _may_share(node, v, out):
                    found.add(out)
                    stack.append(out)
    return found


def _may_share(node: Node, v: Value, out: Value) -> bool:
    if node.op.kind == "view" or "target" in node.attrs or node.op.name in INPLACE:
        return True
    same = isinstance(out.type, TensorType) and out.type.dtype == v.type.dtype
    return node.op.name in _SHARING and same


def _needed(node: Node) -> set[Node]:
    """The nodes whose results a node depends on."""
    found: set[Node] = set()
    stack: list[Iterable[Value]] = [node.operands]
    while stack:
        for v in stack.pop():
            if v.node not in found:
                found.add(v.node)
                stack.append(v.node.operands)
    return found
