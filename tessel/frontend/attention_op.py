"""``tessel::attention``: scaled dot-product attention as one operator that no tracer opens.

``torch.nn.functional.scaled_dot_product_attention`` is decomposed by AOTAutograd, and differently in
the forward and in the backward graph. This operator takes its place before AOTAutograd sees it:

    attention(q, k, v, mask, causal, scale) -> (out, lse)
    attention_backward(grad, q, k, v, mask, out, lse, causal, scale, mask_grad) -> (dq, dk, dv, dmask)

Shapes: q ``[b, hq, sq, d]``, k ``[b, hk, sk, d]``, v ``[b, hk, sk, dv]`` with hq a multiple of hk; mask
``bool`` (true = attend) or float (added), broadcastable to ``[b, hq, sq, sk]``; out ``[b, hq, sq, dv]``;
lse ``[b, hq, sq]``, the logarithm of each row's sum of exponentials, in float32 (float64 for float64).
A row with nothing to attend to gives zeros and an lse of minus infinity. ``causal`` aligns top left.

Every kernel here is plain torch, for eager runs and for the interpreter of the IR; the backward reads
``lse`` instead of the probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .compat import autocast_disabled

# Scores held at once by the plain-torch kernels: 64 Mi elements, 256 MiB in float32.
_CHUNK = 1 << 26

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    "bool causal, float? scale, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads_inside(x: Tensor) -> Tensor:
    """``[b, h, s, d]`` laid out as ``[b, s, h, d]`` in memory, which is what projections want."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(like: Tensor, b: Any, h: Any, s: Any, d: Any) -> Tensor:
    return like.new_empty((b, s, h, d)).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Scaled and masked scores ``[b, h, sq, sk]`` in the wide dtype; k already has q's heads."""
    wide = _wide(q.dtype)
    s = torch.matmul(q.to(wide) * scale, k.to(wide).transpose(-1, -2))
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(wide)
    if causal:
        keep = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~keep, -math.inf)
    return s


def _whole_heads(x: Tensor, heads: int) -> Tensor:
    """k or v with each head repeated for the group of query heads that shares it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _step(q: Tensor, k: Tensor) -> int:
    """How many batches at a time keep the scores under ``_CHUNK``."""
    return max(1, _CHUNK // max(1, q.shape[1] * q.shape[2] * k.shape[2]))


def _batches(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    if mask is None or mask.dim() < 4 or mask.shape[0] == 1:
        return mask
    return mask[start:stop]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    heads, wide = q.shape[1], _wide(q.dtype)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = _empty(q, q.shape[0], heads, q.shape[2], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=wide)
    step = _step(q, k)
    for i in range(0, q.shape[0], step):
        part = slice(i, i + step)
        s = _scores(q[part], _whole_heads(k[part], heads), _batches(mask, i, i + step), causal, factor)
        row = torch.logsumexp(s, dim=-1)
        p = torch.exp(s - row.masked_fill(row == -math.inf, 0.0).unsqueeze(-1))
        out[part] = torch.matmul(p, _whole_heads(v[part], heads).to(wide)).to(q.dtype)
        lse[part] = row
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, wide = q.shape[1], _wide(q.dtype)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    dq, dk, dv = (_empty(x, *x.shape) for x in (q, k, v))
    dmask = _mask_gradient(mask) if mask_grad else q.new_empty((0,))
    step = _step(q, k)
    for i in range(0, q.shape[0], step):
        part = slice(i, i + step)
        kk, vv = _whole_heads(k[part], heads).to(wide), _whole_heads(v[part], heads).to(wide)
        qq, g = q[part].to(wide), grad[part].to(wide)
        s = _scores(q[part], kk.to(k.dtype), _batches(mask, i, i + step), causal, factor)
        row = lse[part].to(wide)
        p = torch.exp(s - row.masked_fill(row == -math.inf, 0.0).unsqueeze(-1))
        dp = torch.matmul(g, vv.transpose(-1, -2))
        delta = (g * out[part].to(wide)).sum(-1, keepdim=True)
        ds = p * (dp - delta)
        dq[part] = (torch.matmul(ds, kk) * factor).to(q.dtype)
        dk[part] = _sum_groups(torch.matmul(ds.transpose(-1, -2), qq) * factor, k.shape[1]).to(k.dtype)
        dv[part] = _sum_groups(torch.matmul(p.transpose(-1, -2), g), v.shape[1]).to(v.dtype)
        if mask_grad:
            assert mask is not None
            piece = _batches(dmask, i, i + step)
            assert piece is not None
            piece += ds.sum_to_size(_batches_shape(mask, ds))
    if mask_grad:
        assert mask is not None
        dmask = dmask.to(mask.dtype)
    return dq, dk, dv, dmask


def _mask_gradient(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return torch.zeros(mask.shape, dtype=_wide(mask.dtype), device=mask.device)


def _batches_shape(mask: Tensor, ds: Tensor) -> tuple[int, ...]:
    if mask.dim() < 4 or mask.shape[0] == 1:
        return tuple(mask.shape)
    return (ds.shape[0], *mask.shape[1:])


def _sum_groups(x: Tensor, heads: int) -> Tensor:
    """Sums the gradients of the query heads that share one key head."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def _fused_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mask_grad: bool = False) -> bool:
    """Whether torch's CPU flash kernel takes these operands: it is faster and is what eager runs."""
    return (
        q.device.type == "cpu"
        and not mask_grad
        and q.shape[1] == k.shape[1]
        and q.shape[-1] == v.shape[-1]
        and min(q.numel(), k.numel()) > 0
        and all(x.stride(-1) == 1 for x in (q, k, v))
        and (mask is None or mask.dtype in (torch.bool, q.dtype))
    )


def _flash_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":  # its flash kernel takes no groups
        k, v = _whole_heads(k, q.shape[1]), _whole_heads(v, q.shape[1])
    if _fused_on_cpu(q, k, v, mask):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        bias = _flash_mask(mask, q.dtype)
        out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        if bias is not None:
            # The kernel says 0 for a row without anything to attend to.
            empty = (bias == -math.inf).all(-1).expand(q.shape[:3])
            lse = lse.masked_fill(empty, -math.inf)
        return _heads_inside(out), lse.contiguous()
    return _forward(q, k, v, mask, causal, scale)


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _fused_on_cpu(q, k, v, mask, mask_grad):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        row = lse.masked_fill(lse == -math.inf, 0.0)
        bias = _flash_mask(mask, q.dtype)
        # The kernel reads grad and out densely.
        grads = flash(
            grad.contiguous(), q, k, v, out, row, 0.0, causal, attn_mask=bias, scale=scale
        )
        dq, dk, dv = map(_heads_inside, grads)
        return dq, dk, dv, q.new_empty((0,))
    return _backward(grad, q, k, v, mask, out, lse, causal, scale, mask_grad)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    out = _empty(q, q.shape[0], q.shape[1], q.shape[2], v.shape[-1])
    return out, q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


def _attention_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmask = q.new_empty((0,))
    if mask_grad:
        assert mask is not None
        dmask = mask.new_empty(mask.shape)
    return _empty(q, *q.shape), _empty(k, *k.shape), _empty(v, *v.shape), dmask


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, causal, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, out, lse)
    ctx.causal, ctx.scale = causal, scale


def _differentiate(ctx: Any, grad: Tensor | None, _lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    q, k, v, mask, out, lse = ctx.saved_tensors
    mask_grad = mask is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dmask = torch.ops.tessel.attention_backward(
        grad, q, k, v, mask, out, lse, ctx.causal, ctx.scale, mask_grad
    )
    return dq, dk, dv, dmask if mask_grad else None, None, None


def _autocast(device: str) -> Any:
    """The autocast kernel of one device: casts as it does for scaled_dot_product_attention."""

    def cast(x: Tensor | None) -> Tensor | None:
        # Autocast leaves float64 and other devices' tensors alone.
        skip = x is None or not x.is_floating_point() or x.dtype == torch.float64 or x.device.type != device
        return x if skip else x.to(torch.get_autocast_dtype(device))  # type: ignore[union-attr]

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Any:
        with autocast_disabled():
            return torch.ops.tessel.attention(cast(q), cast(k), cast(v), cast(mask), causal, scale)

    return kernel


_LIB.impl("attention", _attention, "CompositeExplicitAutograd")
_LIB.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
_LIB.impl("attention", _autocast("cpu"), "AutocastCPU")
_LIB.impl("attention", _autocast("cuda"), "AutocastCUDA")
torch.library.register_fake("tessel::attention", _attention_fake, lib=_LIB)
torch.library.register_fake("tessel::attention_backward", _attention_backward_fake, lib=_LIB)
torch.library.register_autograd("tessel::attention", _differentiate, setup_context=_setup, lib=_LIB)

attention = torch.ops.tessel.attention.default
attention_backward = torch.ops.tessel.attention_backward.default

__all__ = ["attention", "attention_backward"]
