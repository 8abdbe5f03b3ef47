"""The program of one rank: local shapes, and the collectives between them.

    %0: f32[8,64]{·,tp}                      %0: f32[8,16]
    %1: f32[64,32]{tp,·}          becomes    %1: f32[16,32]
    %2 = matmul(%0, %1)                      %2 = matmul(%0, %1)
    %3 = relu(%2)                            %3 = all_reduce(%2, axes=("tp",), combine="sum")
                                             %4 = relu(%3)

``partition`` decides, once for all ranks: how each node's factors are split, in which sharding it reads its
operands, and what moves in between. ``Program.rank(r)`` writes that down as the graph of rank ``r``. A node
takes the split over most devices, of these the one that costs least: the bytes that bring its operands there and
its results to the shardings that propagation gave. Sums that are still partial go on through operators that are
linear in them, until something needs them finished.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from math import prod
from typing import Any

from ..errors import TesselError, check
from ..ir.node import INPUT, Graph, Node, Value, values_in
from ..ir.sharding import Sharding
from ..ir.types import TensorType
from ..ops.collective import units
from ..targets.mesh import Mesh
from ._exchange import SENDING, can_ring, dry_run, exchange_of
from ._factors import Rule, Split, follow, layout, project, rule_of
from ._layouts import Layouts
from ._linear import Carried, carries
from ._program import Collective, Program
from ._rank import Action, Local, Move
from ._reshard import Price, Step, by_bytes, rematerializes, reshard
from ._states import adds_up

# What work costs beside bytes sent, on an H100: 794 TFLOP/s reached in bf16 and 3.35 TB/s of memory against
# 394 GB/s of an all-gather over 8 (the figures of NVIDIA's and NCCL's authors).
FLOPS_PER_BYTE = 2015.0
MEMORY_PER_BYTE = 8.5


def partition(
    graph: Graph,
    mesh: Mesh,
    layouts: Layouts,
    *,
    outputs: Mapping[int, Sharding] | None = None,
    unfinished: Collection[int] = (),
    splits: Mapping[Node, Split] | None = None,
    limits: Mapping[str, frozenset[str]] | None = None,
    held: Mapping[Value, Sharding] | None = None,
    price: Price | None = None,
    ring: Collection[str] = (),
    travels: Mapping[str, frozenset[str]] | None = None,
    capacity: float = math.inf,
) -> Program:
    """Decide what each device computes and what moves.

    Args:
        graph: of whole tensors, with composites opened.
        mesh: the devices.
        layouts: from ``propagate``.
        outputs: how outputs are to leave, by position; the others leave as propagation gave them.
        unfinished: outputs that leave as sums which are still partial, where they are.
        splits: the split of nodes that a plan has decided; a node's own cheapest otherwise. With such splits a view
            is cut as its operand lies, and moves nothing.
        held: how a plan wants values to leave of which there is a copy lying so.
        limits: for the lines of a module (by its path) the only mesh axes that may split them.
        price: what a step of communication costs, in bytes of the machine in this file's head.
        ring: mesh axes over which attention with split sequences sends keys and values round, a share at a time,
            where it would gather them: as many bytes, of which a rank never holds more than a share.
        travels: for the lines of a module mesh axes that do so too, or over which tokens are sent to their experts.
        capacity: how many tokens a rank may send to another one, see ``ops.experts.room``.

    Raises:
        TesselError: an output's sharding does not fit it, or a split does not fit its node.
    """
    run = _Partition(graph, mesh, layouts, dict(outputs or {}), dict(splits or {}), dict(limits or {}), price)
    run.held, run.ring = dict(held or {}), frozenset(ring)
    run.travels, run.capacity = dict(travels or {}), capacity
    run.unfinished = frozenset(unfinished)
    run.inputs()
    for node in graph.nodes:
        run.node(node)
    run.leave()
    return run.program


class _Partition:
    def __init__(
        self,
        graph: Graph,
        mesh: Mesh,
        layouts: Layouts,
        outputs: dict[int, Sharding],
        splits: dict[Node, Split],
        limits: dict[str, frozenset[str]],
        price: Price | None,
    ) -> None:
        self.graph, self.mesh, self.layouts, self.wanted, self.splits = graph, mesh, layouts, outputs, splits
        self.limits, self.price = limits, price
        self.held: dict[Value, Sharding] = {}
        self.ring: frozenset[str] = frozenset()
        self.travels: dict[str, frozenset[str]] = {}
        self.capacity = math.inf
        self.unfinished: frozenset[int] = frozenset()
        self.program = Program(graph, mesh, layouts)
        self.have: dict[Value, list[Sharding]] = {}  # the shardings in which a value is at hand
        self.unread: dict[Value, Sharding] = {}  # inputs to be brought to how they are used, at their first use
        self.uses, self.users = graph.uses(), graph.users()
        self.known: dict[Any, Split] = {}
        self.weights = {n.out for n in graph.inputs if n.attrs["role"] == "param"}
        for node in graph.nodes:
            if node.op.kind == "view" and node.operands[0] in self.weights:
                self.weights.update(node.outs)

    # ------------------------------------------------------------ inputs and outputs

    def inputs(self) -> None:
        arrive: list[Sharding | None] = []
        for node in self.graph.inputs:
            v = node.out
            if not isinstance(v.type, TensorType):
                arrive.append(None)
                continue
            arrive.append(self.layouts.arrives(v))
            self.have[v] = [self.layouts.arrives(v)]
            if v in self.layouts.stored:
                self.unread[v] = self.layouts.of[v]
        self.program.inputs = tuple(arrive)

    def leave(self) -> None:
        left: list[Sharding | None] = []
        for i, out in enumerate(self.graph.outputs):
            if not isinstance(out, Value) or not isinstance(out.type, TensorType):
                for v in values_in(out):
                    check(not isinstance(v.type, TensorType), lambda: f"output {i} is a tuple of tensors; flatten it")  # noqa: B023
                left.append(None)
                continue
            target = self.wanted.get(i) or self.leaves(out)
            if i in self.unfinished:
                target = self.partial(out, target)
            target.check(out.shape, self.mesh, f"output {i}")
            if out.op is not INPUT or target != self.layouts.arrives(out):
                self.bring(out, target, f"output {i} leaves as {target}")
            left.append(target)
        self.program.outputs = tuple(left)
        news = []
        for target_node, v in self.graph.effects:
            home = self.layouts.arrives(target_node.out)
            self.bring(v, home, f"it overwrites {target_node.attrs['name']}, which lies as {home}")
            news.append(home)
        self.program.effects = tuple(news)

    def leaves(self, out: Value) -> Sharding:
        """How an output leaves that nobody said more of: an input as it came, a result in its smallest share."""
        if out.op is INPUT:
            return self.layouts.arrives(out)
        if self.held.get(out) in self.have[out]:
            return self.held[out]
        done = [s for s in self.have[out] if not s.partial]
        if not done or out in self.layouts.fixed:
            return self.layouts.of[out]
        return min(done, key=lambda s: prod(s.local_shape(out.shape, self.mesh)))  # type: ignore[arg-type]

    def partial(self, out: Value, target: Sharding) -> Sharding:
        """A sum that is still partial and lies apart no further than ``target``; that, where there is none."""
        sums = [s for s in self.have[out] if s.partial and all(how == "sum" for _, how in s.partial)]
        fits = (s for s in sums if all(t[: len(d)] == d for d, t in zip(s.dims, target.dims, strict=True)))
        return next(fits, target)

    # ------------------------------------------------------------ moves

    def cost(self, v: Value, before: Sharding, after: Sharding) -> float:
        steps = self.steps(v, before, after)
        price = self.price or by_bytes(self.mesh)
        shape = v.shape
        return sum(
            price(s.kind, s.axes, v.dtype.itemsize * prod(s.before.local_shape(shape, self.mesh))) for s in steps
        )  # type: ignore[arg-type]

    def steps(self, v: Value, before: Sharding, after: Sharding) -> tuple[Step, ...]:
        return reshard(v.shape, v.dtype.itemsize, before, after, self.mesh, self.price)

    def nearest(self, v: Value, after: Sharding) -> tuple[float, Sharding]:
        """The sharding at hand from which ``after`` is reached at least cost."""
        at_hand = [s for s in self.have[v] if set(after.partial) <= set(s.partial)]
        return min(((self.cost(v, s, after), s) for s in at_hand), key=lambda c: c[0])

    def bring(self, v: Value, after: Sharding, why: str, reader: Node | None = None) -> None:
        """Have a value in a sharding, for a node that reads it so or because it is to lie so."""
        if after in self.have[v]:
            return
        _, before = self.nearest(v, after)
        steps = self.steps(v, before, after)
        if rematerializes(steps):
            self.program.warnings.append(
                f"{v.op.name} {v.type} at {v.node.loc} goes from {before} to {after} through a whole copy on every "
                f"device: {why}"
            )
        # what a partial sum is made of is said by the line that computes it, all else by the line that reads it
        loc = v.node.loc if before.partial or reader is None else reader.loc
        self.program.actions.append(Move(v, steps, f"{why}; {self.layouts.because(v)}", loc))
        self.have[v].append(after)

    # ------------------------------------------------------------ nodes

    def node(self, node: Node) -> None:
        rule = rule_of(node)
        for v in rule.operands:
            if v in self.unread:
                target = self.unread.pop(v)
                self.bring(v, target, f"{node.op.name} at {node.loc} is its first use", node)
                self.have[v] = [target]
        lying = [self.have[v][-1] if self.uses[v] == 1 or not self.have[v][-1].partial else None for v in rule.operands]
        alone = len(node.types) == 1 and self.uses[node.out] == 1
        carried = carries(node, lying, self.users.get(node.out, []) if alone else [])
        split = self.splits.get(node)
        if split is None and self.splits and node.op.kind == "view":
            found = (follow(rule, s, self.mesh) for s in reversed(self.have[rule.operands[0]]))
            split = next((f for f in found if f is not None), None)
        if split is None:
            split = self.choose(node, rule, carried)
        elif carried.axes & {a for axes in split.values() for a in axes}:
            carried = Carried(((),) * len(rule.operands))  # the plan splits what it is made of: the sum comes first
        if "target" in node.attrs and any(s.axes for v in rule.operands for s in self.have[v]):
            self.program.warnings.append(
                f"{node.attrs['target']} at {node.loc} is computed whole on every device: no dims string says how a "
                "custom operator may be split"
            )
        reads, results = self.shardings(node, rule, split, carried)
        for v, want in zip(rule.operands, reads, strict=True):
            self.bring(v, want, f"{node.op.name} at {node.loc} reads it as {want}", node)
        exchange = exchange_of(rule, split, self.capacity)
        self.program.actions.append(Local(node, split, tuple(reads), tuple(results), carried.once, exchange))
        for v, got in zip(rule.results, results, strict=True):
            self.have[v] = [got]
            settled = self.layouts.of[v]
            if got == settled or got.partial:
                continue
            only_slices = not self.splits and all(s.kind == "slice" for s in self.steps(v, got, settled))
            if v in self.layouts.fixed or only_slices:
                self.bring(v, settled, f"{node.op.name} at {node.loc} gives it as {got}")
                self.have[v] = [settled]

    def shardings(
        self, node: Node, rule: Rule, split: Split, carried: Carried
    ) -> tuple[list[Sharding], list[Sharding]]:
        """How a node reads its operands and gives its results, if its factors are split so."""
        found = self.try_shardings(rule, split, carried)
        if found is None:
            raise TesselError(f"{node.op.name} at {node.loc}: dims '{rule.dims}' cannot be split as {split}")
        return found

    def try_shardings(self, rule: Rule, split: Split, carried: Carried) -> tuple[list[Sharding], list[Sharding]] | None:
        if not rule.halos_fit(split, self.mesh):
            return None
        reads: list[Sharding] = []
        exchange = exchange_of(rule, split)
        ring = exchange is not None and exchange.kind == "ring"
        hides = exchange.hides if exchange is not None else lambda factor: ()
        for shape, partial in zip(rule.dims.operands, carried.operands, strict=True):
            names = {f.name for term in shape for f in term}
            # a mask is cut step by step, its keys stay whole
            own = {f: a for f, a in split.items() if f != "t"} if ring and not names & {"d", "e"} else split
            lies = layout(shape, own, rule, self.mesh)
            if lies is None:
                return None
            reads.append(Sharding(lies.dims, partial))
        results: list[Sharding] = []
        for shape in rule.dims.results:
            lies = layout(shape, split, rule, self.mesh)
            if lies is None:
                return None
            kept = {f.name for term in shape for f in term}
            summed = {f: [a for a in axes if a not in hides(f)] for f, axes in split.items() if f not in kept}
            left = ((a, rule.combine(f)) for f, axes in summed.items() for a in axes)
            results.append(Sharding(lies.dims, (*carried.result, *((a, how) for a, how in left if how is not None))))
        return reads, results

    def choose(self, node: Node, rule: Rule, carried: Carried) -> Split:
        """The cheapest split of a node's factors."""
        if node.op.random or node.op.kind == "effect" or "target" in node.attrs:
            return {}
        key = (
            node.op.name,
            str(rule.dims),
            tuple(rule.sizes.items()),
            tuple(tuple(self.have[v]) for v in rule.operands),
            tuple(self.layouts.of[v] for v in rule.results),
            tuple(v.dtype for v in (*rule.operands, *rule.results)),
            tuple((self.uses[v], v in self.weights) for v in rule.operands),
            carried,
            self.limits.get(node.loc.module),
            self.travels.get(node.loc.module),
        )
        known = self.known.get(key)
        if known is not None:
            return known
        best: tuple[tuple[int, float], Split] | None = None
        for split in self.candidates(node, rule, carried):
            found = self.try_shardings(rule, split, carried)
            if found is None:
                continue
            parts = prod(self.mesh[a] for axes in split.values() for a in axes)
            cost = self.work(node, rule, parts)
            for v, want in zip(rule.operands, found[0], strict=True):
                # several readers share what is brought for one; a parameter is brought in the backward again, and
                # its gradient back: three times against the two of an activation (Rajbhandari et al. 2020)
                cost += self.nearest(v, want)[0] * (1.5 if v in self.weights else 1.0 / max(self.uses[v], 1))
            for v, got in zip(rule.results, found[1], strict=True):
                dims = tuple(tuple(a for a in axes if a not in carried.axes) for axes in self.layouts.of[v].dims)
                goal = Sharding(dims, carried.result)
                cost += self.cost(v, got, goal)
            exchange = exchange_of(rule, split, self.capacity)
            if exchange is not None:
                for n, _ in dry_run(exchange, node, found[0], node.attrs, self.mesh):
                    price = self.price or by_bytes(self.mesh)
                    cost += sum(price(kind, attrs["axes"], x.type.nbytes) for kind, x, attrs in units(n))
            # no device repeats work that another could do: what is gathered to be computed twice has to pay
            # off at every size, and whether it does is for a plan to decide
            rank = (0 if node.op.kind == "view" else -parts, cost)
            if best is None or rank < best[0]:
                best = (rank, split)
        assert best is not None  # the empty split always fits
        self.known[key] = best[1]
        return best[1]

    def candidates(self, node: Node, rule: Rule, carried: Carried) -> Iterator[Split]:
        """Every way to give each mesh axis that is in sight to one factor, or to none."""
        sight: dict[str, dict[str, int]] = {}
        orders: dict[str, list[str]] = {}
        held = carried.axes
        sides: list[tuple[Value, Any, list[Sharding]]] = [
            *((v, s, self.have[v]) for v, s in zip(rule.operands, rule.dims.operands, strict=True)),
            *((v, s, [self.layouts.of[v]]) for v, s in zip(rule.results, rule.dims.results, strict=True)),
        ]
        for v, shape, lying in sides:
            for sharding in lying:
                for term, axes in zip(shape, sharding.dims, strict=True):
                    for factor, some in project(term, axes, rule.sizes, self.mesh)[0].items():
                        for a in some:
                            if a not in held and rule.may_split(factor):
                                at = sight.setdefault(a, {})
                                at[factor] = max(at.get(factor, 0), prod(v.shape))
                        order = orders.setdefault(factor, [])
                        order += [a for a in some if a not in order]
        if node.op.name in ("attention", "attention_backward"):
            # heads may be split though nothing is: a sequence that is changes places with them (Ulysses)
            for a in sight:
                for factor, f in rule.dims.factors.items():
                    if f.kind == "map" and rule.sizes[factor] % self.mesh[a] == 0 and rule.may_split(factor):
                        sight[a].setdefault(factor, 0)
                        orders.setdefault(factor, []).append(a)
        limit = self.limits.get(node.loc.module)
        axes_in_sight = [a for a in self.mesh if a in sight and (limit is None or a in limit)]
        choices: list[list[str | None]] = [
            [*sorted(sight[a], key=lambda f, a=a: -sight[a][f]), None]  # type: ignore[misc]
            for a in axes_in_sight
        ]
        for pick in product(*choices):
            split: Split = {}
            for factor in dict.fromkeys(f for f in pick if f is not None):
                mine = {a for a, f in zip(axes_in_sight, pick, strict=True) if f == factor}
                split[factor] = tuple(dict.fromkeys(a for a in orders[factor] if a in mine))
            travelling = self.ring | self.travels.get(node.loc.module, frozenset())
            if travelling and adds_up(node):
                tokens = tuple(a for a in self.mesh if a in travelling)
                apart = {f: left for f, axes in split.items() if (left := tuple(a for a in axes if a not in tokens))}
                if rule.sizes["t"] % prod(self.mesh[a] for a in tokens) == 0:
                    yield {**apart, "t": tokens}
            if travelling and node.op.name in SENDING:
                both = tuple(a for a in split.get("t", ()) if a in travelling and "e" in sight.get(a, ()))
                if both and not split.get("e"):
                    yield {**split, "e": both}
            if travelling and can_ring(node):
                rings = travelling & {a for f, axes in split.items() if f in ("s", "t") for a in axes}
                if rings and set(split.get("s", ())) == rings and rule.sizes["s"] == rule.sizes["t"]:
                    yield {**split, "t": split["s"]}
                if rings:
                    continue
            if split.get("s") and set(split["s"]) & set(split.get("t", ())):
                continue
            yield split

    def work(self, node: Node, rule: Rule, parts: int) -> float:
        """What a device computes, in bytes of communication of the same time."""
        flops = node.op.flops(node) if node.op.flops is not None else 0
        nbytes = 0 if node.op.kind == "view" else sum(v.type.nbytes for v in (*rule.operands, *rule.results))
        return float(flops / FLOPS_PER_BYTE + nbytes / MEMORY_PER_BYTE) / parts


__all__ = ["Action", "Collective", "Local", "Move", "Program", "partition"]
