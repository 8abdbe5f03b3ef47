"""Writes down the program of one rank: the graph of its shares, from what ``partition`` decided for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import sympy
import torch

from ..errors import TesselError
from ..ir.node import Builder, Graph, Node, Value, make_input, map_values
from ..ir.sharding import Sharding
from ..ir.types import NOWHERE, Dim, Loc, SymType, TensorType, Type, simplify_dim, symbol
from ..ir.verify import same_type
from ..ops import OPS, Piece
from ..ops.collective import call_attrs
from ._exchange import Exchange, write_exchange
from ._factors import Axes, Rule, rule_of
from ._places import Places
from ._reshard import Step, sources


@dataclass(frozen=True)
class Move:
    """A value brought from one sharding to another, why, and for which line (its reader's)."""

    value: Value
    steps: tuple[Step, ...]
    why: str
    loc: Loc = NOWHERE

    @property
    def before(self) -> Sharding:
        return self.steps[0].before

    @property
    def after(self) -> Sharding:
        return self.steps[-1].after


@dataclass(frozen=True)
class Local:
    """A node computed on each device's share.

    Attributes:
        node: of the whole graph.
        split: its factors and the mesh axes that split each.
        reads: the sharding in which each tensor operand is read, in order.
        results: the sharding of each tensor result.
        once: operands that only the first device along the axes counts that the result is partial over.
        exchange: what the ranks send each other while they compute it.
    """

    node: Node
    split: Mapping[str, Axes]
    reads: tuple[Sharding, ...]
    results: tuple[Sharding, ...]
    once: tuple[int, ...] = ()
    exchange: Exchange | None = None


@dataclass(frozen=True)
class Start:
    """Collectives of one kind over the same ranks that begin here, as one call; each move is one step.

    Attributes:
        number: of the call in its program.
        moves: what it carries.
        beside: how many nodes are computed between it and its ``Wait``.
    """

    number: int
    moves: tuple[Move, ...]
    beside: int = 0


@dataclass(frozen=True)
class Wait:
    """What a call brings is there from here on."""

    number: int
    moves: tuple[Move, ...]


Action: TypeAlias = "Move | Local | Start | Wait"


def write_rank(
    graph: Graph,
    places: Places,
    actions: Sequence[Action],
    inputs: Sequence[Sharding | None],
    outputs: Sequence[Sharding | None],
    effects: Sequence[Sharding],
) -> Graph:
    """The graph that a rank runs, with its own offsets: the same collectives in the same order on every rank.

    Symbols of ``places`` are inputs behind the others.
    """
    return _Writer(graph, places).write(actions, inputs, outputs, effects)


class _Writer:
    def __init__(self, graph: Graph, places: Places) -> None:
        self.graph, self.mesh, self.places = graph, places.mesh, places
        self.builder = Builder()
        self.env: dict[tuple[Value, Sharding], Value] = {}
        self.plain: dict[Value, Value] = {}  # host numbers
        self.begun: dict[int, Node] = {}  # calls by their number

    def write(
        self,
        actions: Sequence[Action],
        inputs: Sequence[Sharding | None],
        outputs: Sequence[Sharding | None],
        effects: Sequence[Sharding],
    ) -> Graph:
        graph = self.graph
        made: dict[Node, Node] = {}
        for node, sharding in zip(graph.inputs, inputs, strict=True):
            t: Type = node.types[0]
            if sharding is not None and isinstance(t, TensorType):
                t = TensorType(sharding.local_shape(t.shape, self.mesh), t.dtype, None, t.device)
            new = make_input(node.attrs["name"], t, node.attrs["role"], node.loc)
            self.builder.inputs.append(new)
            made[node] = new
            if sharding is None:
                self.plain[node.out] = new.out
            else:
                self.env[node.out, sharding] = new.out
        for action in actions:
            if isinstance(action, Move):
                self.move(action)
            elif isinstance(action, Start):
                self.start(action)
            elif isinstance(action, Wait):
                self.wait(action)
            else:
                self.local(action)

        def leaving(out: Any, sharding: Sharding | None) -> Any:
            return self.env[out, sharding] if sharding is not None else map_values(out, self.plain.__getitem__)

        for name in self.places.values:
            self.builder.inputs.append(make_input(name, SymType(symbol(name))))
        return self.builder.finish(
            [leaving(o, s) for o, s in zip(graph.outputs, outputs, strict=True)],
            tuple((made[n], self.env[v, s]) for (n, v), s in zip(graph.effects, effects, strict=True)),
            graph.name,
        )

    # ------------------------------------------------------------ moves

    def move(self, move: Move) -> None:
        x = self.env[move.value, move.before]
        self.builder.loc = move.loc
        for step in move.steps:
            x = self.step(x, step)
        self.env[move.value, move.after] = x

    def step(self, x: Value, step: Step) -> Value:
        if step.kind == "slice":
            size = x.shape[step.dim] // prod(self.mesh[a] for a in step.axes)
            start = simplify_dim(self.places.at(step.axes) * size)
            return self.builder.add(OPS["slice"], x, dim=step.dim, start=start, size=size, step=1)
        return self.builder.add(OPS[step.kind], x, **self.step_attrs(step))

    def step_attrs(self, step: Step) -> dict[str, Any]:
        """The attributes of a collective."""
        attrs: dict[str, Any] = {"axes": step.axes, "parts": prod(self.mesh[a] for a in step.axes)}
        if step.kind == "all_to_all":
            attrs |= {"split": step.split, "join": step.dim}
        elif step.kind == "collective_permute":
            attrs["sources"] = sources(step.before, step.after, step.axes, self.mesh)
        elif step.kind != "all_reduce":
            attrs["dim"] = step.dim
        if step.combine:
            attrs["combine"] = step.combine
        return attrs

    def start(self, start: Start) -> None:
        self.builder.loc = start.moves[0].loc
        xs = [self.env[m.value, m.before] for m in start.moves]
        attrs = call_attrs(start.moves[0].steps[0].kind, [self.step_attrs(m.steps[0]) for m in start.moves])
        self.begun[start.number] = self.builder.node(OPS["collective_start"], *xs, **attrs)

    def wait(self, wait: Wait) -> None:
        begun = self.begun.pop(wait.number)
        self.builder.loc = begun.loc
        made = self.builder.node(OPS["collective_wait"], begun.out, *begun.args, **begun.attrs).outs
        for move, x in zip(wait.moves, made, strict=True):
            self.env[move.value, move.after] = x

    # ------------------------------------------------------------ nodes

    def local(self, action: Local) -> None:
        node, rule = action.node, rule_of(action.node)
        self.builder.loc = node.loc
        reads = iter(action.reads)
        # factors of which the exchange itself says what a piece is
        own = {"ring": ("s", "t"), "halo": tuple(f for f, _ in action.exchange.halos)} if action.exchange else {}
        inside = own.get(action.exchange.kind, ()) if action.exchange else ()
        pieces = [self.piece(node, rule, f, axes) for f, axes in action.split.items() if f not in inside]
        # zeros where only the first piece of a factor may count an operand
        once: dict[int, list[Axes]] = {}
        for axes, p in pieces:
            for i in p.once:
                once.setdefault(i, []).append(axes)
        for i in action.once:
            once.setdefault(i, []).append(tuple(a for a, _ in action.results[0].partial))
        count = iter(range(len(rule.operands)))

        def share(v: Value) -> Value:
            if not isinstance(v.type, TensorType):
                return self.plain[v]
            x = self.env[v, next(reads)]
            i = next(count)
            return self.counted(x, once[i]) if i in once else x

        args = [map_values(a, share) for a in node.args]
        for _, p in pieces:
            for place, literal in p.args.items():
                args[place] = literal
        local = [s.local_shape(v.shape, self.mesh) for v, s in zip(rule.results, action.results, strict=True)]
        attrs = self.attrs(node, [p for _, p in pieces], local)
        if action.exchange is not None:
            made = write_exchange(self.builder, action.exchange, node, args, attrs, self.places)
            for old, got, lies in zip(node.outs, made, action.results, strict=True):
                self.env[old, lies] = got
            return
        types = self.types(node, rule, local)
        if node.op.infer is not None:
            inferred = node.op.infer(*(map_values(a, lambda v: v.type) for a in args), **attrs)
            if not all(map(same_type, inferred, types)) or len(inferred) != len(types):
                raise TesselError(
                    f"{node.op.name} at {node.loc}: split as {dict(action.split)} its share would be "
                    f"{', '.join(map(str, types))}, its types say {', '.join(map(str, inferred))}"
                )
            types = inferred
        new = self.builder.append(Node(node.op, tuple(args), attrs, types, node.regions, node.loc))
        mine = iter(action.results)
        for old, got in zip(node.outs, new.outs, strict=True):
            if isinstance(old.type, TensorType):
                self.env[old, next(mine)] = got
            else:
                self.plain[old] = got

    def counted(self, x: Value, sets: Sequence[Axes]) -> Value:
        """An operand on the rank that is the first along each set of axes, zeros on the others."""
        b, first = self.builder, self.places.first(sets)
        if first is True:
            return x
        zero = False if x.dtype == torch.bool else 0
        if first is False:
            return b.add(OPS["full"], shape=x.shape, value=zero, dtype=x.dtype)
        which = b.add(OPS["full"], shape=(1,) * x.type.rank, value=first, dtype=torch.int64)
        return b.add(OPS["where"], b.add(OPS["eq"], which, 1), x, zero)

    def piece(self, node: Node, rule: Rule, factor: str, axes: Axes) -> tuple[Axes, Piece]:
        """What this rank's piece of a factor needs, with the axes that split it."""
        size = rule.sizes[factor] // prod(self.mesh[a] for a in axes)
        start = simplify_dim(self.places.at(axes) * size)
        return axes, node.op.split(node, factor, start, size) if node.op.split else Piece()

    def attrs(self, node: Node, pieces: list[Piece], local: list[tuple[Any, ...]]) -> dict[str, Any]:
        """The attributes of the share: each piece's changes, added up where several change one."""
        attrs = dict(node.attrs)
        for key in dict.fromkeys(k for p in pieces for k in p.attrs):
            if key == "shape":
                attrs[key] = local[0]
                continue
            old = node.attrs.get(key)
            changed = [p.attrs[key] for p in pieces if key in p.attrs and p.attrs[key] != old]
            if len(changed) > 1 and not all(isinstance(c, int | sympy.Expr) for c in changed):
                raise TesselError(f"{node.op.name} at {node.loc}: two split axes change {key}; split one of them")
            both: Dim = (old or 0) + sum(c - (old or 0) for c in changed) if len(changed) > 1 else 0
            attrs[key] = changed[0] if len(changed) == 1 else simplify_dim(both)
            if not changed:
                attrs[key] = pieces[0].attrs.get(key, old)
        return attrs

    def types(self, node: Node, rule: Rule, local: list[tuple[Any, ...]]) -> tuple[Type, ...]:
        shapes = iter(local)
        return tuple(
            TensorType(next(shapes), t.dtype, None, t.device) if isinstance(t, TensorType) else t for t in node.types
        )


__all__ = ["Action", "Local", "Move", "Start", "Wait", "write_rank"]
