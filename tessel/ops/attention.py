"""Scaled dot-product attention, kept whole: its axes say how heads, queries and keys may be split."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, dim_equal, product
from .common import arg_types, is_one, need_tensor, operand_types, result, table, words
from .dims import Piece, try_divide


def _infer(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    causal: bool = False,
    scale: float | None = None,
    offset: Any = 0,
) -> tuple[TensorType, ...]:
    need_tensor("attention", q, k, v)
    check(
        q.rank == k.rank == v.rank == 4,
        lambda: f"attention: {q}, {k} and {v} must be [batch, heads, length, width]",
    )
    check(q.dtype == k.dtype == v.dtype, lambda: f"attention: dtypes of {q}, {k} and {v} differ; cast them")
    b, heads, sq, width = q.shape
    same = [(k.shape[0], b), (k.shape[3], width), *((v.shape[d], k.shape[d]) for d in range(3))]
    check(
        all(dim_equal(*p) for p in same), lambda: f"attention: shapes of {q}, {k} and {v} do not fit together"
    )
    check(
        try_divide(heads, k.shape[1]) is not None,
        lambda: f"attention: {heads} query heads are not a multiple of {k.shape[1]} key heads",
    )
    if mask is not None:
        need_tensor("attention", mask)
        want = (b, heads, sq, k.shape[2])
        fits = mask.rank <= 4 and all(
            is_one(m) or dim_equal(m, w) for m, w in zip(reversed(mask.shape), reversed(want), strict=False)
        )
        check(fits, lambda: f"attention: mask {mask} does not broadcast to [{', '.join(map(str, want))}]")
        check(
            mask.dtype == torch.bool or mask.dtype.is_floating_point,
            lambda: f"attention: mask {mask} must be b1 (true: attend) or floating (added)",
        )
    # The log-sum-exp of halves is kept in f32; a float64 oracle keeps its own.
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return result((b, heads, sq, v.shape[3]), q.dtype, q), result((b, heads, sq), lse, q)


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition; halves are computed in f32.

    Query ``i`` sees key ``j`` of a causal attention if ``j <= i + offset``. Rows that see no key
    give zeros and a log-sum-exp of -inf.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // max(k.shape[1], 1)
    kw, vw = (t.to(wide).repeat_interleave(repeat, 1) for t in (k, v))
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    scores = (q.to(wide) @ kw.transpose(-1, -2)) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(wide)
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + offset
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > rows, -math.inf)
    if k.shape[2] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3])), scores.new_full(q.shape[:3], -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    out = (weights @ vw) / total.masked_fill(total == 0, 1)
    return out.to(q.dtype), (top + total.log()).squeeze(-1)


def _dims(node: Node) -> str:
    q, k, *rest = operand_types(node)
    if dim_equal(q.shape[1], k.shape[1]):
        heads, kv = "h", "h"
    elif is_one(k.shape[1]):
        heads, kv = "h", "1"
    else:
        heads, kv = "(g r)", "g"
    keys = "t+softmax-merge"
    operands = [["b", heads, "s", "d*"], ["b", kv, keys, "d*"], ["b", kv, keys, "e"]]
    if len(rest) > 1:
        names = ["b", heads, "s", keys][4 - rest[1].rank :]
        operands.append(["1" if is_one(n) else w for w, n in zip(names, rest[1].shape, strict=True)])
    # A mask dimension of size 1 stays the same for every piece, whatever the axis' own size is.
    return words(operands, [["b", heads, "s", "e"], ["b", heads, "s"]])


def split_attention(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """A piece of the queries sees keys further right, a piece of the keys sees queries further left."""
    scale = node.attrs.get("scale")
    attrs: dict[str, Any] = {}
    if node.attrs.get("causal") and factor in "st":
        attrs["offset"] = node.attrs.get("offset", 0) + (start if factor == "s" else -start)
    return Piece(attrs | ({} if scale is None else {"scale": scale}))


def _flops(node: Node) -> Dim:
    q, k, v = arg_types(node)[:3]
    b, h, sq, d = q.shape
    full = product((2, b, h, sq, k.shape[2], d + v.shape[3]))
    return full  # causal attention does about half of it; what is skipped depends on the tile


ATTENTION = table(
    Op(
        "attention",
        "attention",
        dims=_dims,
        ref=attention_ref,
        infer=_infer,
        flops=_flops,
        split=split_attention,
        cost=1000,
        doc="attention(q, k, v, mask|None, causal=, scale=, offset=0) -> (out, lse f32)",
    )
)
