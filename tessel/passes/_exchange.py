"""Operations whose ranks need more of each other than shares and sums: rings of keys, merged pieces of a softmax.

    attention, queries and keys split over sp        each rank's keys and values go once round the ring, what a rank
                                                     has seen of them is merged (Liu et al., Ring Attention, 2023)
    attention, keys split, queries whole             every rank attends to its keys, the results are merged
    linear_cross_entropy, classes split over tp      every rank sums up its classes' exponentials, the sums are merged

The merges are those of ``ops/combine.py`` written in operators: with ``m`` the largest log-sum-exp, the sums of
``exp(lse - m)`` add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.node import Builder, Node, Value, make_input
from ..ir.sharding import Sharding
from ..ir.types import TensorType
from ..ops import OPS
from ..ops.collective import COLLECTIVE
from ..targets.mesh import Mesh
from ._factors import MERGED, Axes, Rule

RINGS = frozenset({"attention", "attention_backward"})
EXCHANGING = RINGS | {"linear_cross_entropy"}


@dataclass(frozen=True)
class Exchange:
    """``kind``: ``ring``, or the name of a merge; over ``axes``, major to minor."""

    kind: str
    axes: Axes


def exchange_of(rule: Rule, split: Mapping[str, Axes]) -> Exchange | None:
    """What the ranks of a split operation have to exchange while they compute it."""
    if split.get("s") and split.get("s") == split.get("t"):
        return Exchange("ring", split["s"])
    for factor, axes in split.items():
        f = rule.dims.factors[factor]
        if axes and f.kind == "reduce" and f.combine in MERGED:
            return Exchange(f.combine, axes)
    return None


def can_ring(node: Node) -> bool:
    """Whether keys may go round: a sink counts once, and the gradient of a mask is not put together."""
    sink = node.args[4 if node.op.name == "attention" else 5 :][:1]
    return node.op.name in RINGS and not any(isinstance(s, Value) for s in sink) and not node.attrs.get("mask_grad")


def write_exchange(
    b: Builder, ex: Exchange, node: Node, args: Sequence[Any], attrs: Mapping[str, Any], mesh: Mesh, rank: int
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
    parts = math.prod(mesh[a] for a in ex.axes)
    index = mesh.index(rank, ex.axes)
    if ex.kind == "ring":
        ring = _Ring(b, ex.axes, parts, index, node, attrs)
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


def dry_run(ex: Exchange, node: Node, reads: Sequence[Sharding], attrs: Mapping[str, Any], mesh: Mesh) -> list[Node]:
    """The collectives that every rank runs for an operation."""
    b = Builder()
    given = iter(reads)

    def share(a: Any) -> Any:
        if not isinstance(a, Value):
            return a
        t = a.type
        shape = next(given).local_shape(t.shape, mesh)
        return make_input("x", TensorType(shape, t.dtype, None, t.device)).out

    write_exchange(b, ex, node, [share(a) for a in node.args], attrs, mesh, 0)
    return [n for n in b.nodes if n.op.name in COLLECTIVE]


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
    index: int
    node: Node
    attrs: Mapping[str, Any]

    def next(self, x: Value) -> Value:
        """What the rank before holds."""
        sources = tuple((i - 1) % self.parts for i in range(self.parts))
        return self.b.add(OPS["collective_permute"], x, axes=self.axes, parts=self.parts, sources=sources)

    def step(self, q: Value, k: Value, mask: Value | None, i: int) -> tuple[dict[str, Any], Value | None]:
        """Attributes and mask for the keys at hand in step ``i``: those of the rank ``i`` places before."""
        j = (self.index - i) % self.parts
        attrs = dict(self.attrs)
        queries, keys = q.shape[2], k.shape[2]
        if attrs.get("causal") or attrs.get("window") is not None:
            attrs["offset"] = attrs.get("offset", 0) + self.index * queries - j * keys
        if mask is None or mask.shape[-1] == 1:
            return attrs, mask
        return attrs, self.b.add(OPS["slice"], mask, dim=mask.type.rank - 1, start=j * keys, size=keys, step=1)

    def forward(self, q: Value, k: Value, v: Value, mask: Value | None = None) -> tuple[Value, Value]:
        b = self.b
        out, lse = None, None
        for i in range(self.parts):
            attrs, some = self.step(q, k, mask, i)
            o, seen = b.node(self.node.op, q, k, v, some, **attrs).outs
            if i < self.parts - 1:
                k, v = self.next(k), self.next(v)
            o = _cast(b, o, seen.dtype)
            out, lse = (o, seen) if out is None or lse is None else self.merge(out, lse, o, seen)
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
        """The gradients of keys and values go round with them, and one place further: home."""
        b = self.b
        wide = lse.dtype
        total: Value | None = None
        sums: list[Value] = []
        for i in range(self.parts):
            attrs, some = self.step(q, k, mask, i)
            dq, *others = b.node(self.node.op, grad, q, k, v, some, sink, out, lse, **attrs).outs
            if i < self.parts - 1:
                k, v = self.next(k), self.next(v)
            dq = _cast(b, dq, wide)
            total = dq if total is None else b.add(OPS["add"], total, dq)
            sums = [self.next(b.add(OPS["add"], s, d)) for s, d in zip(sums, others, strict=True)] if sums else [
                self.next(d) for d in others]  # fmt: skip
        assert total is not None
        return _cast(b, total, q.dtype), *sums


__all__ = ["EXCHANGING", "Exchange", "can_ring", "dry_run", "exchange_of", "write_exchange"]
