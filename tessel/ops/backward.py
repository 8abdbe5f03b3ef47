"""Operators of the backward pass and of experts that have their own reference."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, product
from .attention import split_attention
from .common import arg_types, is_one, need_tensor, operand_types, result, table, words

# ---------------------------------------------------------------- attention


def _attention_infer(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    out: Any,
    lse: Any,
    causal: bool = False,
    scale: float | None = None,
    offset: Any = 0,
) -> tuple[TensorType, ...]:
    need_tensor("attention_backward", grad, q, k, v, out, lse)
    return tuple(result(t.shape, t.dtype, t) for t in (q, k, v))


def attention_backward_ref(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v from the saved result and log-sum-exp (no gradient of the mask)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = max(k.shape[1], 1)
    repeat = q.shape[1] // groups
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    gw, qw, ow = (t.to(wide) for t in (grad, q, out))
    kw, vw = (t.to(wide).repeat_interleave(repeat, 1) for t in (k, v))
    scores = (qw @ kw.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + offset
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > rows, -math.inf)
    top = lse.to(wide)[..., None]
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
    delta = (gw * ow).sum(-1, keepdim=True)
    inner = weights * (gw @ vw.transpose(-1, -2) - delta)
    dq = inner @ kw * scale
    dk = inner.transpose(-1, -2) @ qw * scale
    dv = weights.transpose(-1, -2) @ gw
    # Query heads that share a key head add up.
    dk, dv = (t.unflatten(1, (groups, repeat)).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _attention_dims(node: Node) -> str:
    q, k, _, mask = arg_types(node)[1:5]
    shared = not is_one(k.shape[1]) and q.shape[1] != k.shape[1]
    alone = is_one(k.shape[1]) and not is_one(q.shape[1])
    heads, kv = ("(g r+)", "g") if shared else ("r+", "1") if alone else ("g", "g")
    queries = [["b", heads, "s+", "d*"], ["b", kv, "t+", "d*"], ["b", kv, "t+", "e*"]]
    wide = ["b", heads, "s+", "e*"]
    masks = []
    if mask is not None:
        names = ["b", heads, "s+", "t+"][4 - mask.rank :]
        masks = [["1" if is_one(n) else w for w, n in zip(names, mask.shape, strict=True)]]
    return words([wide, *queries, *masks, wide, ["b", heads, "s+"]], queries)


def _attention_flops(node: Node) -> Dim:
    b, h, sq, d = node.type.shape
    k, v = arg_types(node)[2:4]
    return product((2, b, h, sq, k.shape[2], 3 * d + 2 * v.shape[3]))


# ---------------------------------------------------------------- grouped matrix product


def grouped_mm_ref(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> torch.Tensor:
    """Products of groups of rows (``a`` 2-d), of columns (``b`` 2-d) or of inner dims (both 2-d).

    ``offs`` has the end of each group. Rows and columns past the last end give zeros.
    """
    ends = [] if offs is None else [0, *offs.tolist()]
    spans = list(pairwise(ends))
    if a.dim() == b.dim() == 2:
        got = torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
    elif a.dim() == 2:
        got = a.new_empty(a.shape[0], b.shape[2])
        got[ends[-1] :].zero_()
        for g, (i, j) in enumerate(spans):  # each product where it belongs: no copy, no second block of memory
            torch.mm(a[i:j], b[g], out=got[i:j])
    elif b.dim() == 2:
        got = a.new_zeros(a.shape[1], b.shape[1])
        for g, (i, j) in enumerate(spans):
            got[:, i:j] = a[g] @ b[:, i:j]
    else:
        got = torch.matmul(a, b)
    got = got if bias is None else got + bias
    return got if out_dtype is None else got.to(out_dtype)


def _grouped_infer(
    a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> tuple[TensorType, ...]:
    need_tensor("grouped_mm", a, b)
    ok = {a.rank, b.rank} <= {2, 3} and (offs is not None) == (a.rank == 2 or b.rank == 2)
    check(ok, lambda: f"grouped_mm: {a} and {b} must be 2-d (with offsets) or 3-d")
    lead: tuple[Dim, ...] = (a.shape[0],) if a.rank == b.rank == 3 else ()
    if a.rank == b.rank == 2:
        lead = (offs.shape[0],)
    return (result((*lead, a.shape[-2], b.shape[-1]), out_dtype or a.dtype, a),)


def _grouped_dims(node: Node) -> str:
    a, b = operand_types(node)[:2]
    table = {
        (2, 2): ("m k*", "k* n", "g* m n"),
        (2, 3): ("m* k+", "g* k+ n", "m* n"),
        (3, 2): ("g* m k+", "k+ n*", "m n*"),
        (3, 3): ("g m k+", "g k+ n", "g m n"),
    }
    left, right, out = table[a.rank, b.rank]
    given = [left, right]
    names = arg_types(node)
    if len(names) > 2 and names[2] is not None:
        given.append("g*")
    if len(names) > 3 and names[3] is not None:
        given = [w.replace("+", "*") for w in given]  # each piece would add the bias
        given.append(" ".join(out.split()[-names[3].rank :]))
    return f"{', '.join(given)} -> {out}"


def _grouped_flops(node: Node) -> Dim:
    a, b = operand_types(node)[:2]
    return product((2, *a.shape, b.shape[-1]))


BACKWARD = table(
    Op(
        "attention_backward",
        "library",
        dims=_attention_dims,
        ref=attention_backward_ref,
        infer=_attention_infer,
        flops=_attention_flops,
        split=split_attention,
        cost=1000,
        doc="attention_backward(grad, q, k, v, mask|None, out, lse, causal=, scale=) -> (dq, dk, dv)",
    ),
    Op(
        "grouped_mm",
        "library",
        dims=_grouped_dims,
        ref=grouped_mm_ref,
        infer=_grouped_infer,
        flops=_grouped_flops,
        cost=1000,
        doc="grouped_mm(a, b, offs|None, bias|None, out_dtype|None): one product a group (experts)",
    ),
)
