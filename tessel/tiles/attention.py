"""Attention and its gradients as tile programs: rows m of the queries, columns n of the keys, head widths d and e.

What edits a score is ordinary statements in ``parts["score"]``: the soft cap, then the mask with whatever computes it.
Which keys the attributes hide (``causal``, ``window``, ``offset``) stays an attribute, so that blocks can be skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..ir.node import Node, Value
from ..ir.types import Dim, dim_equal, product
from .index import Index, exact_div, floordiv, var
from .kernel import ACC, DK, DQ, DSCORE, DSINK, DV, LSE, Access, Axis, Kernel, Operand, Ref, Stmt, Store
from .places import broadcast

if TYPE_CHECKING:
    from .lower import Lowering


class _Place:
    """The coordinates of one attention node: batch dims, the key head that a query head reads, m, n, d and e."""

    def __init__(self, low: Lowering, node: Node, q: Value, k: Value, v: Value) -> None:
        self.low, self.node = low, node
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        heads, kv_heads = q.shape[-3], k.shape[-3]
        self.batch = tuple(var(f"x{i}", size) for i, size in enumerate(q.shape[:-2]))
        self.m, self.n = var("m", q.shape[-2]), var("n", k.shape[-2])
        self.d, self.e = var("d", q.shape[-1]), var("e", v.shape[-1])
        group = heads if dim_equal(heads, kv_heads) else exact_div(heads, kv_heads)
        head = self.batch[-1] if dim_equal(heads, kv_heads) else floordiv(self.batch[-1], group)
        self.kv = (*self.batch[:-1], head)
        self.axes = (
            *(Axis(f"x{i}", size, "x") for i, size in enumerate(q.shape[:-2])),
            Axis("m", q.shape[-2], "x"),
            Axis("n", k.shape[-2], "r"),
            Axis("d", q.shape[-1], "r"),
            Axis("e", v.shape[-1], "x"),
        )
        self.parts: dict[str, tuple[Stmt, ...]] = {}
        self.provides: dict[str, Operand] = {}

    def part(self, name: str, value: Value, coords: Sequence[Index]) -> None:
        """``value`` at ``coords`` is what the part computes."""
        self.provides[name] = self.low.at(value, tuple(coords))
        self.parts[name] = self.low.take()

    def operands(self, q: Value, k: Value, v: Value) -> None:
        self.part("q", q, (*self.batch, self.m, self.d))
        self.part("k", k, (*self.kv, self.n, self.d))
        self.part("v", v, (*self.kv, self.n, self.e))

    def score(self, mask: Value | None) -> None:
        """The edits of a scaled score, in the dtype that scores are computed in."""
        low, wide, score = self.low, self.wide, Ref(ACC)
        cap = self.node.attrs.get("softcap")
        if cap is not None:
            small = low.compute("mul", (score, 1.0 / cap), wide, wide)
            score = low.compute("mul", (low.compute("tanh", (small,), wide, wide), float(cap)), wide, wide)
        if mask is not None:
            got = low.at(mask, broadcast(mask.type, (*self.batch, self.m, self.n)))
            if mask.dtype == torch.bool:
                score = low.compute("where", (got, score, float("-inf")), wide, wide)
            else:
                score = low.compute("add", (score, low.compute("cast", (got,), wide, mask.dtype)), wide, wide)
        self.provides["score"] = score
        self.parts["score"] = low.take()

    def row(self, name: str, value: Value) -> None:
        """A number of each row of queries."""
        self.part(name, value, (*self.batch, self.m))

    def kernel(self, flops: Dim, **own: Any) -> Kernel:
        given = self.node.attrs
        scale = given.get("scale")
        attrs: dict[str, Any] = {
            "causal": given.get("causal", False),
            "scale": scale if scale is not None else float(self.axes[-2].extent) ** -0.5,
            "offset": given.get("offset", 0),
        }
        attrs |= {name: given[name] for name in ("window", "softcap") if given.get(name) is not None}
        attrs |= own
        body = self.low.take()
        more: dict[str, Any] = {"parts": self.parts, "provides": self.provides, "attrs": attrs, "flops": flops}
        return self.low.kernel(self.axes, body, **more)


def forward(low: Lowering) -> Kernel:
    """The ``attention`` operator. ``parts["sink"]``, where there is one, is a score at (x..)."""
    (node,) = (n for n in low.region.nodes if n.op.kind == "attention")
    q, k, v, mask, sink, *_ = (*node.args, None, None)
    at = _Place(low, node, q, k, v)
    at.operands(q, k, v)
    if sink is not None:
        at.part("sink", sink, at.batch[-1:])
    at.score(mask)
    first = len(low.region.inputs)
    for i, out in enumerate(low.region.outputs):
        is_lse = out.index == 1
        where = (*at.batch, at.m) if is_lse else (*at.batch, at.m, at.e)
        low.stmts.append(Store(Access(first + i, where), Ref(LSE if is_lse else ACC), out.dtype))
    flops = 2 * product((*q.shape[:-1], k.shape[-2])) * (q.shape[-1] + v.shape[-1])
    return at.kernel(flops)


def backward(low: Lowering) -> Kernel:
    """``attention_backward``, the whole operator, or one of its two passes (``attrs["wrt"]`` says which).

    Parts beside those of the forward: ``grad`` at (x.., m, e), ``lse`` at (x.., m), and ``out`` at (x.., m, e) of the
    whole operator or ``delta`` at (x.., m) of a pass. The body stores ``DQ`` at (x.., m, d), ``DK`` and ``DV`` at (x..
    of the key heads, n, d or e), ``DSCORE``, the gradient of the edited score, where the mask's is wanted, and
    ``DSINK`` at (x of the heads). What several rows or heads share gets the sum over them.
    """
    (node,) = (n for n in low.region.nodes if n.op.kind == "attention_backward")
    whole = node.op.name == "attention_backward"
    grad, q, k, v, mask, *rest, lse = node.args
    sink = rest[0] if whole else None
    at = _Place(low, node, q, k, v)
    at.operands(q, k, v)
    at.part("grad", grad, (*at.batch, at.m, at.e))
    if whole:
        at.part("out", rest[1], (*at.batch, at.m, at.e))
    else:
        at.row("delta", rest[0])
    at.row("lse", lse)
    if sink is not None:
        at.part("sink", sink, at.batch[-1:])
    at.score(mask)
    rows, scores = (*at.batch, at.m, at.d), (*at.batch, at.m, at.n)
    # The whole operator goes through key heads; a pass knows the first query head of each.
    kv = tuple(var(f"x{i}", size) for i, size in enumerate(k.shape[:-2])) if whole else at.kv
    keys = [(DK, (*kv, at.n, at.d)), (DV, (*kv, at.n, at.e))]
    of_mask = [(DSCORE, scores if not whole else broadcast(mask.type, scores))] if node.attrs.get("mask_grad") else []
    results = {
        "attention_backward": [(DQ, rows), *keys, *of_mask, *([(DSINK, at.batch[-1:])] if sink is not None else [])],
        "attention_backward_keys": keys,
        "attention_backward_queries": [(DQ, rows), *of_mask],
    }[node.op.name]
    first = len(low.region.inputs)
    for i, out in enumerate(low.region.outputs):
        value, where = results[out.index]
        low.stmts.append(Store(Access(first + i, where), Ref(value), out.dtype))
    flops = 2 * product((*q.shape[:-1], k.shape[-2])) * (3 * q.shape[-1] + 2 * v.shape[-1])
    own = {"wrt": node.op.name.removeprefix("attention_backward_"), "heads": (q.shape[-3], k.shape[-3])}
    return at.kernel(flops, **({} if whole else own))


__all__ = ["backward", "forward"]
