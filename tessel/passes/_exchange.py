"""Operations whose ranks need more of each other than shares and sums: rings, merged softmaxes, tokens that travel.

    attention, queries and keys split over sp        each rank's keys and values go once round the ring, what a rank
                                                     has seen of them is merged (Liu et al., Ring Attention, 2023);
                                                     of a causal window only as far as it reaches: a halo
    attention, keys split, queries whole             every rank attends to its keys, the results are merged
    linear_cross_entropy, classes split over tp      every rank sums up its classes' exponentials, the sums are merged
    experts, tokens and experts split over ep        every token goes once to each rank that has experts of its own,
                                                     what they make of it comes back and is added up (GShard, 2020)
    convolution, places split over sp                the edges of each share go to the ranks beside it
    linear_attention, tokens split over sp           the states that each share makes are gathered (``_states.py``)

The merges are those of ``ops/combine.py`` written in operators: with ``m`` the largest log-sum-exp, the sums of
``exp(lse - m)`` add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.node import Builder, Node, Value, make_input, map_values
from ..ir.sharding import Sharding
from ..ir.types import Dim, TensorType, simplify_dim
from ..ops import OPS
from ..ops.attention import ring_steps
from ..ops.collective import call_attrs, units
from ..ops.experts import room
from ..targets.mesh import Mesh
from ._factors import MERGED, Axes, Rule, rule_of
from ._places import Places
from ._states import STATES, write_states

RINGS = frozenset({"attention", "attention_backward"})
SENDING = frozenset({"experts", "experts_backward"})
EXCHANGING = RINGS | {"linear_cross_entropy"}


@dataclass(frozen=True)
class Exchange:
    """``kind``: ``ring``, ``sent``, ``halo``, ``states`` or the name of a merge; over ``axes``, major to minor.

    ``capacity`` is that of ``ops.experts.room``; ``halos`` are window axes with the mesh axes that split each.
    """

    kind: str
    axes: Axes
    capacity: float = math.inf
    halos: tuple[tuple[str, Axes], ...] = ()

    def hides(self, factor: str) -> Axes:
        """The axes that split a factor and leave results neither split nor partial: what they apart is exchanged."""
        return self.axes if factor in {"ring": "st", "sent": "te"}.get(self.kind, "") else ()


def exchange_of(rule: Rule, split: Mapping[str, Axes], capacity: float = math.inf) -> Exchange | None:
    """What the ranks of a split operation have to exchange while they compute it."""
    if split.get("s") and split.get("s") == split.get("t"):
        return Exchange("ring", split["s"])
    name = rule.results[0].op.name if rule.results else ""
    if name in SENDING and split.get("e") and set(split["e"]) <= set(split.get("t", ())):
        return Exchange("sent", split["e"], capacity)
    if name in STATES and split.get("t"):
        return Exchange("states", split["t"])
    for factor, axes in split.items():
        f = rule.dims.factors[factor]
        if axes and f.kind == "reduce" and f.combine in MERGED:
            return Exchange(f.combine, axes)
    halos = tuple((f, axes) for f, axes in split.items() if axes and rule.dims.factors[f].kind == "window")
    return Exchange("halo", halos[0][1], halos=halos) if halos else None


def can_ring(node: Node) -> bool:
    """Whether keys may go round: a sink counts once, and the gradient of a mask is not put together."""
    sink = node.args[4 if node.op.name == "attention" else 5 :][:1]
    return node.op.name in RINGS and not any(isinstance(s, Value) for s in sink) and not node.attrs.get("mask_grad")


def write_exchange(
    b: Builder, ex: Exchange, node: Node, args: Sequence[Any], attrs: Mapping[str, Any], places: Places
) -> tuple[Value, ...]:
    """A rank's part of an operation, with what it sends.

    Args:
        b: takes the nodes.
        node: of whole tensors.
        args: with this rank's shares.
        attrs: of the share, but for what a ring changes from step to step.

    Returns:
        The results: this rank's queries' for a ring (and its keys' gradients), else the merged ones.
    """
    parts = math.prod(places.mesh[a] for a in ex.axes)
    index = places.mesh.index(places.rank, ex.axes)
    if ex.kind == "states":
        return write_states(b, ex.axes, parts, index, node.op.name, args)
    if ex.kind == "halo":
        return _with_edges(b, ex, node, args, attrs, places)
    if ex.kind == "sent":
        return _Sending(b, ex, parts, attrs).run(node.op.name, args)
    if ex.kind == "ring":
        ring = _Ring(b, ex.axes, parts, places, node, attrs)
        return ring.forward(*args[:4]) if node.op.name == "attention" else ring.backward(*args[:9])
    made = b.node(node.op, *args, **attrs).outs
    both = {"axes": ex.axes, "parts": parts}
    out, lse = made
    top = _finite(b, b.add(OPS["all_reduce"], lse, **both, combine="max"))
    part = b.add(OPS["exp"], b.add(OPS["sub"], lse, top))
    total = b.add(OPS["all_reduce"], part, **both, combine="sum")
    merged = b.add(OPS["add"], top, b.add(OPS["log"], total))
    if ex.kind == "nll-merge":
        own = b.add(OPS["all_reduce"], b.add(OPS["sub"], lse, out), **both, combine="sum")
        target = args[3]
        counted = b.add(OPS["ne"], target, attrs.get("ignore_index", -100))
        return b.add(OPS["where"], counted, b.add(OPS["sub"], merged, own), 0.0), merged
    weight = b.add(OPS["div"], part, b.add(OPS["where"], b.add(OPS["eq"], total, 0.0), 1.0, total))
    mine = b.add(OPS["mul"], _cast(b, out, lse.dtype), _last(b, weight))
    return _cast(b, b.add(OPS["all_reduce"], mine, **both, combine="sum"), out.dtype), merged


def dry_run(
    ex: Exchange, node: Node, reads: Sequence[Sharding], attrs: Mapping[str, Any], mesh: Mesh
) -> list[tuple[Node, int]]:
    """The collectives that every rank runs for an operation, each with how many nodes are computed while it goes on."""
    b = Builder()
    given = iter(reads)

    def share(a: Any) -> Any:
        if not isinstance(a, Value):
            return a
        t = a.type
        shape = next(given).local_shape(t.shape, mesh)
        return make_input("x", TensorType(shape, t.dtype, None, t.device)).out

    write_exchange(b, ex, node, [share(a) for a in node.args], attrs, Places(mesh, 0))
    waits = {n.args[0].node: i for i, n in enumerate(b.nodes) if n.op.name == "collective_wait"}
    computes = [n.op.kind not in ("view", "generate", "library") for n in b.nodes]
    return [(n, sum(computes[i : waits.get(n, i)])) for i, n in enumerate(b.nodes) if units(n)]


def _with_edges(
    b: Builder, ex: Exchange, node: Node, args: Sequence[Any], attrs: Mapping[str, Any], places: Places
) -> tuple[Value, ...]:
    """The operation on a share with the edges of its neighbours; what lies outside of the whole is filled."""
    rule, args = rule_of(node), list(args)
    operands = [i for i, a in enumerate(node.args) if isinstance(a, Value)]
    for factor, axes in ex.halos:  # one after the other, so that corners come along
        halo, parts, here = rule.halo(factor), math.prod(places.mesh[a] for a in axes), places.at(axes)
        assert halo is not None
        x: Value = args[operands[halo.operand]]
        n = x.shape[halo.dim]
        pieces = [x]
        for size, by, start in ((halo.before, 1, n - halo.before), (halo.after, -1, 0)):
            if not size:
                continue
            edge = b.add(OPS["slice"], x, dim=halo.dim, start=start, size=size, step=1)
            sources = tuple((i - by) % parts for i in range(parts))
            edge = b.add(OPS["collective_permute"], edge, axes=axes, parts=parts, sources=sources)
            edge = _filled(b, edge, here, 0 if by > 0 else parts - 1, halo.fill)
            pieces = [edge, *pieces] if by > 0 else [*pieces, edge]
        args[operands[halo.operand]] = b.add(OPS["cat"], tuple(pieces), dim=halo.dim) if len(pieces) > 1 else x
        for place, literal in halo.args.items():
            given = args[place]
            both = isinstance(literal, tuple) and isinstance(given, tuple)  # of two axes each has its own part changed
            args[place] = tuple(map(min, literal, given)) if both else literal
    with torch.device("meta"):
        shapes = node.op.ref(*(map_values(a, lambda v: torch.empty(v.shape, dtype=v.dtype)) for a in args), **attrs)
    made = shapes if isinstance(shapes, tuple) else (shapes,)
    device = node.type.device
    types = tuple(TensorType(tuple(m.shape), m.dtype, None, device) for m in made)
    return b.node(node.op, *args, types=types, **attrs).outs


def _filled(b: Builder, edge: Value, here: Dim, end: int, fill: Any) -> Value:
    """The edge that a share is given, or what lies outside of the whole if the share is the one at its end."""
    if isinstance(here, int):
        return b.add(OPS["full"], shape=edge.shape, value=fill, dtype=edge.dtype) if here == end else edge
    place = b.add(OPS["full"], shape=(1,) * edge.type.rank, value=here, dtype=torch.int64)
    return b.add(OPS["where"], b.add(OPS["eq"], place, end), fill, edge)


def _cast(b: Builder, x: Value, dtype: torch.dtype) -> Value:
    return x if x.dtype == dtype else b.add(OPS["cast"], x, dtype=dtype)


def _last(b: Builder, x: Value) -> Value:
    """With a last dimension of one."""
    return b.add(OPS["reshape"], x, shape=(*x.shape, 1))


def _finite(b: Builder, x: Value) -> Value:
    """Zero instead of -inf, so that what saw nothing takes part in differences."""
    return b.add(OPS["where"], b.add(OPS["eq"], x, -math.inf), 0.0, x)


@dataclass
class _Ring:
    """Keys and values that go from each rank to the next, and what is computed with them on the way."""

    b: Builder
    axes: Axes
    parts: int
    places: Places
    node: Node
    attrs: Mapping[str, Any]

    def send(self, *xs: Value, by: int = 1) -> Node:
        """Begin to send values to the rank ``by`` places on, as one call."""
        sources = tuple((i - by) % self.parts for i in range(self.parts))
        own = {"axes": self.axes, "parts": self.parts, "sources": sources}
        call = call_attrs("collective_permute", [own] * len(xs))
        return self.b.node(OPS["collective_start"], *xs, **call)

    def receive(self, sent: Node) -> tuple[Value, ...]:
        """What came instead of what was sent."""
        return self.b.node(OPS["collective_wait"], sent.out, *sent.args, **sent.attrs).outs

    def steps(self, k: Value) -> int:
        return ring_steps(k.shape[2], self.parts, self.node.attrs)

    def step(self, q: Value, k: Value, mask: Value | None, i: int) -> tuple[dict[str, Any], Value | None]:
        """Attributes and mask for the keys at hand in step ``i``: those of the rank ``i`` places before."""
        mine, theirs = self.places.at(self.axes), self.places.at(self.axes, i)
        attrs = dict(self.attrs)
        queries, keys = q.shape[2], k.shape[2]
        if attrs.get("causal") or attrs.get("window") is not None:
            attrs["offset"] = simplify_dim(attrs.get("offset", 0) + mine * queries - theirs * keys)
        if mask is None or mask.shape[-1] == 1:
            return attrs, mask
        start = simplify_dim(theirs * keys)
        return attrs, self.b.add(OPS["slice"], mask, dim=mask.type.rank - 1, start=start, size=keys, step=1)

    def forward(self, q: Value, k: Value, v: Value, mask: Value | None = None) -> tuple[Value, Value]:
        b = self.b
        out, lse = None, None
        steps = self.steps(k)
        for i in range(steps):
            attrs, some = self.step(q, k, mask, i)
            sent = self.send(k, v) if i < steps - 1 else None  # on their way while this piece is computed
            o, seen = b.node(self.node.op, q, k, v, some, **attrs).outs
            o = _cast(b, o, seen.dtype)
            out, lse = (o, seen) if out is None or lse is None else self.merge(out, lse, o, seen)
            if sent is not None:
                k, v = self.receive(sent)
        assert out is not None and lse is not None
        return _cast(b, out, self.node.outs[0].dtype), lse

    def merge(self, o1: Value, l1: Value, o2: Value, l2: Value) -> tuple[Value, Value]:
        """Attention to both pieces of keys; nothing where neither saw any."""
        b = self.b
        top = _finite(b, b.add(OPS["maximum"], l1, l2))
        e1, e2 = (b.add(OPS["exp"], b.add(OPS["sub"], x, top)) for x in (l1, l2))
        total = b.add(OPS["add"], e1, e2)
        by = b.add(OPS["where"], b.add(OPS["eq"], total, 0.0), 1.0, total)
        w1, w2 = (_last(b, b.add(OPS["div"], e, by)) for e in (e1, e2))
        out = b.add(OPS["add"], b.add(OPS["mul"], o1, w1), b.add(OPS["mul"], o2, w2))
        return out, b.add(OPS["add"], top, b.add(OPS["log"], total))

    def backward(
        self, grad: Value, q: Value, k: Value, v: Value, mask: Value | None, sink: None, out: Value, lse: Value
    ) -> tuple[Value, ...]:
        """The gradients of keys and values go round with them, and then home."""
        b = self.b
        wide = lse.dtype
        total: Value | None = None
        sums: Sequence[Value] = ()
        coming: Node | None = None  # sums of the ranks before
        steps = self.steps(k)
        for i in range(steps):
            attrs, some = self.step(q, k, mask, i)
            sent = self.send(k, v) if i < steps - 1 else None
            dq, *sums = b.node(self.node.op, grad, q, k, v, some, sink, out, lse, **attrs).outs
            dq = _cast(b, dq, wide)
            total = dq if total is None else b.add(OPS["add"], total, dq)
            if coming is not None:
                sums = [b.add(OPS["add"], s, d) for s, d in zip(self.receive(coming), sums, strict=True)]
            if steps > 1:
                coming = self.send(*sums, by=1 if i < steps - 1 else self.parts - i)
            if sent is not None:
                k, v = self.receive(sent)
        if coming is not None:
            sums = self.receive(coming)
        assert total is not None
        return _cast(b, total, q.dtype), *sums


@dataclass
class _Sending:
    """Tokens that go to the ranks of their experts, and what comes back of them."""

    b: Builder
    ex: Exchange
    parts: int
    attrs: Mapping[str, Any]
    to: Value = field(init=False)  # ``dispatch`` of the experts' numbers
    places: Value = field(init=False)

    def run(self, name: str, args: Sequence[Any]) -> tuple[Value, ...]:
        b, attrs = self.b, dict(self.attrs)
        back = name == "experts_backward"
        x, *weights, index, scale = args[1:8] if back else args[:7]
        space = room(x.shape[0], index.shape[1], self.parts, self.ex.capacity)
        here = {"experts": weights[0].shape[0], "parts": self.parts, "room": space}
        self.to, self.places = b.node(OPS["dispatch"], index, **here).outs
        wanted = attrs.pop("wanted", (True,) * 3)
        if not back:
            rows, numbers, factors = self.send(x), self.numbers(index), self.send(scale)
            out, pre = b.node(OPS["experts"], rows, *weights, numbers, factors, **{**attrs, "keep": False}).outs
            if attrs.get("keep"):  # the backward computes what is before the gates again, on the tokens sent again
                shape = (index.shape[0] * index.shape[1], weights[0].shape[2 if attrs.get("turned") else 1])
                pre = b.add(OPS["full"], shape=shape, value=0, dtype=x.dtype)
            return self.collect(out), pre
        grads, rows, numbers, factors = self.send(args[0]), self.send(x), self.numbers(index), self.send(scale)
        _, pre = b.node(OPS["experts"], rows, *weights, numbers, factors, **{**attrs, "keep": True}).outs
        given = (grads, rows, *weights, numbers, factors, pre)
        dx, *own, dscale = b.node(OPS["experts_backward"], *given, **attrs, wanted=wanted).outs
        return self.collect(dx) if wanted[0] else dx, *own, self.collect(dscale) if wanted[2] else dscale

    def send(self, x: Value) -> Value:
        """What other ranks have for this one: a row for each place, zeros where none was sent."""
        rows = self.b.add(OPS["index_select"], x, self.to, dim=0, offset=0)
        return self.exchange(rows)

    def exchange(self, rows: Value) -> Value:
        return self.b.add(OPS["all_to_all"], rows, axes=self.ex.axes, parts=self.parts, split=0, join=0)

    def numbers(self, index: Value) -> Value:
        """The numbers of experts, -1 where no token was sent."""
        return self.b.add(OPS["sub"], self.send(self.b.add(OPS["add"], index, 1)), 1)

    def collect(self, x: Value) -> Value:
        """For each token the sum of what came back for it."""
        b, tokens = self.b, self.places.shape[0]
        flat = b.add(OPS["reshape"], self.places, shape=(tokens * self.parts,))
        rows = b.add(OPS["index_select"], self.exchange(x), flat, dim=0, offset=0)
        apart = b.add(OPS["reshape"], rows, shape=(tokens, self.parts, x.shape[1]))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return _cast(b, b.add(OPS["sum"], _cast(b, apart, wide), dims=(1,), keepdim=False), x.dtype)


__all__ = ["EXCHANGING", "SENDING", "Exchange", "can_ring", "dry_run", "exchange_of", "write_exchange"]
