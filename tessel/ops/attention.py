"""Scaled dot-product attention, forward and backward, whole: its axes say how heads, queries and keys may be split.

The score of query ``i`` and key ``j``:

    s = scale * (q[i] . k[j])
    s = softcap * tanh(s / softcap)              where softcap is given
    s = s + mask[i, j]                           a float mask; -inf where a boolean one is false
    s = -inf                                     where the attributes hide the key

``causal`` shows ``j <= i + offset``. ``window`` shows the last ``window`` keys of those, ``j > i + offset - window``;
without ``causal`` it reaches equally far to both sides, ``|i + offset - j| < window``. A ``sink`` is one more score a
head, without a key or a value: it takes part in the sum of exponentials only.

    lse = log(sum_j exp(s[j]) + exp(sink))       out = sum_j exp(s[j] - lse) v[j]

Rows that see nothing and have no sink give zeros and an lse of -inf. Results of parts of the keys are put together
by ``merge_attention`` in ``combine.py``; a sink counts once, so with one the keys stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, dim_equal, product
from .common import arg_types, is_one, need_tensor, result, table, words
from .dims import Piece, try_divide


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What scores and the log-sum-exp are computed in: f32, and f64 for the float64 oracle."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_edits(what: str, window: int | None, softcap: float | None) -> None:
    check(window is None or window >= 1, lambda: f"{what}: window={window} shows no key; give 1 or more, or None")
    check(softcap is None or softcap > 0, lambda: f"{what}: softcap={softcap} must be positive, or None")


def _infer(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    sink: Any = None,
    causal: bool = False,
    scale: float | None = None,
    offset: Any = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[TensorType, ...]:
    _check_edits("attention", window, softcap)
    need_tensor("attention", q, k, v)
    check(
        q.rank == k.rank == v.rank == 4,
        lambda: f"attention: {q}, {k} and {v} must be [batch, heads, length, width]",
    )
    check(q.dtype == k.dtype == v.dtype, lambda: f"attention: dtypes of {q}, {k} and {v} differ; cast them")
    b, heads, sq, width = q.shape
    same = [(k.shape[0], b), (k.shape[3], width), *((v.shape[d], k.shape[d]) for d in range(3))]
    check(all(dim_equal(*p) for p in same), lambda: f"attention: shapes of {q}, {k} and {v} do not fit together")
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
    if sink is not None:
        need_tensor("attention", sink)
        check(
            sink.rank == 1 and dim_equal(sink.shape[0], heads) and sink.dtype.is_floating_point,
            lambda: f"attention: sink {sink} must be one floating score for each of {heads} heads",
        )
    return result((b, heads, sq, v.shape[3]), q.dtype, q), result((b, heads, sq), _wide(q.dtype), q)


def visible(
    queries: int, keys: int, causal: bool, offset: int, window: int | None, device: Any = None
) -> torch.Tensor | None:
    """``[queries, keys]``: which keys the attributes show, None where they hide nothing.

    >>> visible(2, 4, True, 1, 2)
    tensor([[ True,  True, False, False],
            [False,  True,  True, False]])
    """
    last = torch.arange(queries, device=device)[:, None] + offset
    j = torch.arange(keys, device=device)
    if window is None:
        return j <= last if causal else None
    return (j > last - window) & (j <= last if causal else j < last + window)


def ring_steps(keys: int, parts: int, attrs: Mapping[str, Any]) -> int:
    """How many shares of keys a share of queries has to see, its own first, then those before it.

    Args:
        keys: of one share, as many as queries.
        parts: shares.
        attrs: of the attention.

    >>> ring_steps(8, 4, {"causal": True, "window": 9}), ring_steps(8, 4, {"causal": True, "window": 10})
    (2, 3)
    """
    window = attrs.get("window")
    if window is None or not attrs.get("causal") or attrs.get("offset", 0):
        return parts
    return min(parts, 1 + (keys + window - 2) // keys)


def _whole_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values with each head repeated for the query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // max(x.shape[1], 1), 1)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    offset: int,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Edited scores ``[b, h, sq, sk]`` in the wide dtype, and what a soft cap multiplies their gradient by."""
    wide = _wide(q.dtype)
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    scores = (q.to(wide) @ _whole_heads(k, q.shape[1]).to(wide).transpose(-1, -2)) * scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped * capped
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    shown = visible(q.shape[2], k.shape[2], causal, offset, window, q.device)
    return scores if shown is None else scores.masked_fill(~shown, -math.inf), slope


def attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    offset: int = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition (the module's head); halves are computed in f32.

    Returns:
        ``out [b, h, sq, e]`` in q's dtype and ``lse [b, h, sq]`` in f32 (f64 for f64).
    """
    wide = _wide(q.dtype)
    scores, _ = _scores(q, k, mask, causal, scale, offset, window, softcap)
    if sink is not None:
        column = sink.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
        lse = torch.logsumexp(torch.cat([scores, column], -1), -1)
    elif k.shape[2] == 0:
        lse = scores.new_full(q.shape[:3], -math.inf)
    else:
        lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return (weights @ _whole_heads(v, q.shape[1]).to(wide)).to(q.dtype), lse


def _key_axis(sink: Any) -> str:
    """A sink counts once in the sum of exponentials: the keys beside it stay whole."""
    return "t*" if sink is not None else "t+softmax-merge"


def _mask_words(mask: TensorType, names: list[str]) -> list[str]:
    """A mask dimension of size 1 stays the same for every piece, whatever the axis' own size is."""
    return ["1" if is_one(n) else w for w, n in zip(names[4 - mask.rank :], mask.shape, strict=True)]


def _dims(node: Node) -> str:
    q, k, _, mask, sink = _args(node, 5)
    if dim_equal(q.shape[1], k.shape[1]):
        heads, kv = "h", "h"
    elif is_one(k.shape[1]):
        heads, kv = "h", "1"
    else:
        heads, kv = "(g r)", "g"
    keys = _key_axis(sink)
    operands = [["b", heads, "s", "d*"], ["b", kv, keys, "d*"], ["b", kv, keys, "e"]]
    if mask is not None:
        operands.append(_mask_words(mask, ["b", heads, "s", keys]))
    if sink is not None:
        operands.append([heads])
    return words(operands, [["b", heads, "s", "e"], ["b", heads, "s"]])


def _args(node: Node, count: int) -> list[Any]:
    """The types of the first ``count`` arguments, None for what is not given."""
    types = arg_types(node)[:count]
    return [*types, *[None] * (count - len(types))]


def split_attention(node: Node, factor: str, start: Any, size: Any) -> Piece:
    """A piece of the queries sees keys further right, a piece of the keys sees queries further left."""
    scale = node.attrs.get("scale")
    attrs: dict[str, Any] = {}
    placed = node.attrs.get("causal") or node.attrs.get("window") is not None
    if placed and factor in "st":
        attrs["offset"] = node.attrs.get("offset", 0) + (start if factor == "s" else -start)
    return Piece(attrs | ({} if scale is None else {"scale": scale}))


def _flops(node: Node) -> Dim:
    q, k, v = arg_types(node)[:3]
    b, h, sq, d = q.shape
    full = product((2, b, h, sq, k.shape[2], d + v.shape[3]))
    return full  # causal attention does about half of it; what is skipped depends on the tile


# ---------------------------------------------------------------- backward


def _backward_infer(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    sink: Any,
    out: Any,
    lse: Any,
    causal: bool = False,
    scale: float | None = None,
    offset: Any = 0,
    window: int | None = None,
    softcap: float | None = None,
    mask_grad: bool = False,
) -> tuple[TensorType, ...]:
    need_tensor("attention_backward", grad, q, k, v, out, lse)
    _check_edits("attention_backward", window, softcap)
    check(
        not mask_grad or (mask is not None and mask.dtype.is_floating_point),
        lambda: f"attention_backward: mask_grad asks for the gradient of {mask}, which has none",
    )
    given = (q, k, v, *((mask,) if mask_grad else ()), *(() if sink is None else (sink,)))
    return tuple(result(t.shape, t.dtype, t) for t in given)


def attention_backward_ref(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    offset: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    mask_grad: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Gradients ``(dq, dk, dv[, dmask][, dsink])`` from the saved result and log-sum-exp.

    ``p = exp(s - lse)``, ``delta = sum_e grad * out``, ``ds = p * (grad . v - delta)``; then ``dmask = ds`` summed over
    what the mask repeats, ``dsink = -sum exp(sink - lse) * delta``, ``dv = p^T grad``, and through cap and scale
    ``dq = ds k``, ``dk = ds^T q``, summed over the query heads that share a key head. (Dao et al., FlashAttention,
    2022, appendix B.) ``dmask`` is there with ``mask_grad``, ``dsink`` with a sink.
    """
    delta = (grad.to(_wide(q.dtype)) * out.to(_wide(q.dtype))).sum(-1)
    how = {"causal": causal, "scale": scale, "offset": offset, "window": window, "softcap": softcap}
    dq, dk, dv, *scores = _gradients(grad, q, k, v, mask, delta, lse, how, mask_grad)
    grads = [dq, dk, dv]
    if mask_grad:
        assert mask is not None
        grads.append(scores[0].sum_to_size(mask.shape).to(mask.dtype))
    if sink is not None:
        share = torch.exp(sink.to(lse.dtype)[:, None] - lse.masked_fill(lse == -math.inf, 0))
        grads.append(-(share * delta).sum((0, 2)).to(sink.dtype))
    return tuple(grads)


def _gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    delta: torch.Tensor,
    lse: torch.Tensor,
    how: Mapping[str, Any],
    mask_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """``dq``, ``dk``, ``dv`` and, with ``mask_grad``, the gradient of every edited score."""
    wide, scale = _wide(q.dtype), how.get("scale")
    groups, heads = max(k.shape[1], 1), q.shape[1]
    factor = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    gw, qw = (t.to(wide) for t in (grad, q))
    kw, vw = (_whole_heads(t, heads).to(wide) for t in (k, v))
    edits = (how.get("causal", False), scale, how.get("offset", 0), how.get("window"), how.get("softcap"))
    scores, slope = _scores(q, k, mask, *edits)
    row = lse.to(wide)[..., None]
    weights = torch.exp(scores - row.masked_fill(row == -math.inf, 0))
    edited = weights * (gw @ vw.transpose(-1, -2) - delta.to(wide)[..., None])
    inner = edited if slope is None else edited * slope
    dq = inner @ kw * factor
    dk = inner.transpose(-1, -2) @ qw * factor
    dv = weights.transpose(-1, -2) @ gw
    # Query heads that share a key head add up.
    dk, dv = (t.unflatten(1, (groups, -1)).sum(2) if heads else t[:, :groups] for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *((edited,) if mask_grad else ())


def _backward_dims(node: Node) -> str:
    q, k, _, mask, sink = _args(node, 6)[1:]
    shared = not is_one(k.shape[1]) and q.shape[1] != k.shape[1]
    alone = is_one(k.shape[1]) and not is_one(q.shape[1])
    heads, kv = ("(g r+)", "g") if shared else ("r+", "1") if alone else ("g", "g")
    batch, keys = "b", "t+"
    mask_grad = node.attrs.get("mask_grad", False)
    if mask_grad:  # what the mask repeats is summed
        over = [True] * (4 - mask.rank) + [is_one(n) for n in mask.shape]
        batch = "b+" if over[0] else batch
        heads, kv = (heads.replace("g", "g+"), kv.replace("g", "g+")) if over[1] else (heads, kv)
    if sink is not None:
        batch, keys = "b+", "t*"
    queries = [[batch, heads, "s+", "d*"], [batch, kv, keys, "d*"], [batch, kv, keys, "e*"]]
    wide = [batch, heads, "s+", "e*"]
    masks = [] if mask is None else [_mask_words(mask, [batch, heads, "s+", keys])]
    sinks = [] if sink is None else [[heads]]
    operands = [wide, *queries, *masks, *sinks, wide, [batch, heads, "s+"]]
    return words(operands, [*queries, *(masks if mask_grad else []), *sinks])


def _backward_flops(node: Node) -> Dim:
    q, k, v = arg_types(node)[1:4]
    b, h, sq, d = q.shape
    return product((2, b, h, sq, k.shape[2], 3 * d + 2 * v.shape[3]))


# The backward in two passes, as a GPU computes it: each sums along one side only, so no two programs add to one
# element. ``delta`` is the sum of grad * out over the width of values.


def _pass_infer(name: str) -> Any:
    def infer(
        grad: Any, q: Any, k: Any, v: Any, mask: Any, delta: Any, lse: Any, **attrs: Any
    ) -> tuple[TensorType, ...]:
        need_tensor(name, grad, q, k, v, delta, lse)
        if name == "attention_backward_keys":
            return result(k.shape, k.dtype, k), result(v.shape, v.dtype, v)
        scores = (result((*q.shape[:3], k.shape[2]), _wide(q.dtype), q),) if attrs.get("mask_grad") else ()
        return result(q.shape, q.dtype, q), *scores

    return infer


def _pass_ref(name: str) -> Any:
    def ref(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        delta: torch.Tensor,
        lse: torch.Tensor,
        mask_grad: bool = False,
        **how: Any,
    ) -> tuple[torch.Tensor, ...]:
        dq, dk, dv, *scores = _gradients(grad, q, k, v, mask, delta, lse, how, mask_grad)
        return (dk, dv) if name == "attention_backward_keys" else (dq, *scores)

    return ref


def _pass_dims(name: str) -> Any:
    def dims(node: Node) -> str:
        q, k, _, mask = _args(node, 5)[1:]
        shared = not is_one(k.shape[1]) and q.shape[1] != k.shape[1]
        alone = is_one(k.shape[1]) and not is_one(q.shape[1])
        keys = name == "attention_backward_keys"
        r, s, t = ("r+", "s+", "t") if keys else ("r", "s", "t+")
        heads, kv = (f"(g {r})", "g") if shared else (r, "1") if alone else ("g", "g")
        queries, at = ["b", heads, s, "d*"], ["b", kv, t]
        wide, row = ["b", heads, s, "e*"], ["b", heads, s]
        masks = [] if mask is None else [_mask_words(mask, ["b", heads, s, t])]
        operands = [wide, queries, [*at, "d*"], [*at, "e*"], *masks, row, row]
        scores = [["b", heads, s, t]] if node.attrs.get("mask_grad") else []
        return words(operands, [[*at, "d*"], [*at, "e*"]] if keys else [queries, *scores])

    return dims


def _pass(name: str, doc: str) -> Op:
    return Op(
        name,
        "attention_backward",
        dims=_pass_dims(name),
        ref=_pass_ref(name),
        infer=_pass_infer(name),
        flops=_backward_flops,
        split=split_attention,
        cost=1000,
        doc=doc,
    )


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
        doc="attention(q, k, v, mask|None, sink|None, causal=, scale=, offset=0, window=None, softcap=None) "
        "-> (out, lse f32)",
    ),
    Op(
        "attention_backward",
        "attention_backward",
        dims=_backward_dims,
        ref=attention_backward_ref,
        infer=_backward_infer,
        flops=_backward_flops,
        split=split_attention,
        cost=1000,
        doc="attention_backward(grad, q, k, v, mask|None, sink|None, out, lse, ..., mask_grad=False) "
        "-> (dq, dk, dv[, dmask][, dsink])",
    ),
    _pass("attention_backward_keys", "the pass over tiles of keys: (grad, q, k, v, mask|None, delta, lse) -> (dk, dv)"),
    _pass("attention_backward_queries", "the pass over tiles of queries: (the same) -> (dq[, dscores f32])"),
)

__all__ = ["ATTENTION", "attention_backward_ref", "attention_ref", "ring_steps", "split_attention", "visible"]
