"""A backward graph cut in two for zero-bubble schedules: what another stage waits for, and what nobody waits for.

The gradients of what a part was handed depend on one piece of its backward; the rest, above all the products that give
the gradients of parameters, may run whenever a stage would wait (zero bubble, arXiv 2401.10241).

    halves = halve(graph, wanted={0})        # output 0 is the gradient of what came in
    halves.first                             # output 0, then the values that the second half reads
    halves.second                            # every other output

Views and constants of the first half are made again in the second, not handed to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ..errors import check
from ..ir.node import INPUT, Graph, Node, Value, make_input, map_values
from ..ops.collective import CALLS, COLLECTIVE, units

__all__ = ["Halves", "halve"]

_AGAIN = ("view", "generate")


@dataclass(frozen=True)
class Halves:
    """Two graphs that give what one gave.

    Attributes:
        first: gives the outputs ``wanted``, then what ``second`` takes as its last ``handed`` inputs.
        second: gives the outputs ``later``.
        wanted, later: outputs of the graph that was cut, by number; neither has those that are no values.
        takes: of each half, which inputs of the graph it takes, constants not counted.
        handed: how many values the second half takes from the first.
        collectives: of each half, which of the graph's collectives it has, in order.
    """

    first: Graph
    second: Graph
    wanted: tuple[int, ...]
    later: tuple[int, ...]
    takes: tuple[tuple[int, ...], tuple[int, ...]]
    handed: int
    collectives: tuple[tuple[int, ...], tuple[int, ...]]


def halve(graph: Graph, wanted: Collection[int]) -> Halves:
    """Cut a graph by what its outputs depend on.

    Args:
        graph: without effects and random draws, whose order a cut would change.
        wanted: the outputs, by number, of the first half.

    Raises:
        TesselError: the graph has effects or random draws.
    """
    others = (n for n in graph.nodes if n.op.name not in (*CALLS, *COLLECTIVE))  # all ranks cut those alike
    ordered = [n for n in others if n.op.random or n.op.kind == "effect"]
    check(
        not ordered and not graph.effects,
        lambda: (
            f"{graph.name}: {ordered[0].op.name + ' at ' + str(ordered[0].loc) if ordered else 'an effect'} has its "
            "place in the order of the backward, which a zero-bubble schedule cuts in two; take 1f1b or interleaved"
        ),
    )
    results = [i for i, v in enumerate(graph.outputs) if isinstance(v, Value)]
    early, late = ([i for i in results if (i in wanted) == yes] for yes in (True, False))
    nodes, _ = _needed([graph.outputs[i] for i in early], frozenset())
    done = frozenset(n for n in nodes if n.op is not INPUT)
    rest, handed = _needed([graph.outputs[i] for i in late], done)
    crossing = sorted(handed, key=_places(graph).__getitem__)
    new = {v: make_input(f"handed_{k}", v.type).out for k, v in enumerate(crossing)}
    first = _part(graph, nodes, [*(graph.outputs[i] for i in early), *crossing], {})
    second = _part(graph, rest, [graph.outputs[i] for i in late], new)
    every = [n for n in graph.nodes for _ in units(n)]
    given = [n for n in graph.inputs if n.attrs["role"] != "constant"]
    return Halves(
        first, second, tuple(early), tuple(late),
        (_numbers(given, first.inputs), _numbers(given, second.inputs)), len(crossing),
        (_numbers(every, nodes), _numbers(every, rest)),
    )  # fmt: skip


def _needed(results: Iterable[Value], done: frozenset[Node]) -> tuple[set[Node], set[Value]]:
    """The nodes that compute results, as far as ``done`` has not computed them, and the values taken from there."""
    stack, nodes, taken = list(results), set[Node](), set[Value]()
    while stack:
        v = stack.pop()
        if v.node in nodes:
            continue
        if v.node in done and v.op.kind not in _AGAIN:
            taken.add(v)
            continue
        nodes.add(v.node)
        stack += v.node.operands
    return nodes, taken


def _places(graph: Graph) -> dict[Value, int]:
    return {v: i for i, v in enumerate(v for n in graph.nodes for v in n.outs)}


def _part(graph: Graph, nodes: set[Node], results: Sequence[Value], handed: dict[Value, Value]) -> Graph:
    """Some nodes of a graph, in order, with some values as inputs behind the graph's own."""
    inputs = [n for n in graph.inputs if n in nodes or any(v in n.outs for v in results)]
    new = {v: v for n in inputs for v in n.outs} | handed
    kept = []
    for old in graph.nodes:
        if old in nodes:
            args = map_values(old.args, new.__getitem__)
            node = old if args == old.args else old.replace(args=args)
            new.update(zip(old.outs, node.outs, strict=True))
            kept.append(node)
    outputs = tuple(new[v] for v in results)
    return Graph((*inputs, *(v.node for v in handed.values())), tuple(kept), outputs, (), graph.name)


def _numbers(whole: Sequence[Node], some: Collection[Node]) -> tuple[int, ...]:
    return tuple(i for i, n in enumerate(whole) if n in some)
