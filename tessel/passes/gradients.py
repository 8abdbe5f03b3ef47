"""Attention's gradients in two passes, as a GPU computes them, and ordinary nodes for what is left.

    %1 = attention_backward(%grad, %q, %k, %v, %mask, %sink, %out, %lse)
becomes
    %delta = sum(%grad * %out)
    %dq = attention_backward_queries(%grad, %q, %k, %v, %mask, %delta, %lse)
    %dk, %dv = attention_backward_keys(%grad, %q, %k, %v, %mask, %delta, %lse)
    %dsink = -sum(exp(%sink - %lse) * %delta)

Each pass adds up inside one program, so the bits are the same in every run. The gradient of a mask is the sum over
what the mask repeats of the gradients of the scores, which the pass over queries then stores.
"""

from __future__ import annotations

import math
from typing import Any

from ..config import Options
from ..ir.node import Builder, Graph, Node, Value
from ..ops import OPS
from ..ops.emit import Emit

__all__ = ["run"]

_SCORES = ("causal", "scale", "offset", "window", "softcap")


def run(graph: Graph, options: Options) -> Graph:
    """The graph with attention's gradients opened; as it is where a library computes them."""
    if options.attention == "library":
        return graph
    return graph.rewrite(lambda builder, node: _open(builder, node) if node.op.name == "attention_backward" else None)


def _open(builder: Builder, node: Node) -> tuple[Value, ...]:
    e = Emit(builder)
    grad, q, k, v, mask, sink, out, lse = node.args
    attrs: dict[str, Any] = {n: x for n, x in node.attrs.items() if n in _SCORES}
    wide = lse.dtype
    delta = e("sum", e("mul", e.cast(grad, wide), e.cast(out, wide)), dims=(3,), keepdim=False)
    operands = (grad, q, k, v, mask, delta, lse)
    own: dict[str, Any] = {"mask_grad": True} if node.attrs.get("mask_grad") else {}
    dq, *scores = builder.node(OPS["attention_backward_queries"], *operands, **attrs, **own).outs
    dk, dv = builder.node(OPS["attention_backward_keys"], *operands, **attrs).outs
    grads = [dq, dk, dv]
    if scores:
        grads.append(_summed(e, scores[0], mask))
    if sink is not None:
        column = e("reshape", e.cast(sink, wide), shape=(1, sink.shape[0], 1))
        shown = e("where", e("eq", lse, -math.inf), 0.0, lse)
        share = e("mul", e("exp", e("sub", column, shown)), delta)
        grads.append(e.cast(e("neg", e("sum", share, dims=(0, 2), keepdim=False)), sink.dtype))
    return tuple(grads)


def _summed(e: Emit, scores: Value, mask: Value) -> Value:
    """The gradient of every score, added up over what the mask repeats."""
    lead = len(scores.shape) - len(mask.shape)
    one = [d < lead or (isinstance(mask.shape[d - lead], int) and mask.shape[d - lead] == 1) for d in range(4)]
    dims = tuple(d for d in range(4) if one[d])
    total = e("sum", scores, dims=dims, keepdim=True) if dims else scores
    return e.cast(e.reshape(total, tuple(mask.shape)), mask.dtype)
