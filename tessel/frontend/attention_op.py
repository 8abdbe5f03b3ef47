"""``tessel::attention``: scaled dot-product attention as one operator that no tracer opens.

``torch.nn.functional.scaled_dot_product_attention`` is decomposed by AOTAutograd, and differently in
the forward and in the backward graph. This operator takes its place before AOTAutograd sees it:

    attention(q, k, v, mask, causal, scale, sink, offset, window, softcap) -> (out, lse)
    attention_backward(grad, q, k, v, mask, sink, out, lse, ..., mask_grad) -> (dq, dk, dv, dmask, dsink)

Shapes: q ``[b, hq, sq, d]``, k ``[b, hk, sk, d]``, v ``[b, hk, sk, dv]`` with hq a multiple of hk; mask
``bool`` (true = attend) or float (added), broadcastable to ``[b, hq, sq, sk]``; sink ``[hq]``; out ``[b, hq, sq, dv]``;
lse ``[b, hq, sq]``, the logarithm of each row's sum of exponentials, in float32 (float64 for float64). What the
attributes mean is in ``ops/attention.py``. Gradients that were not asked for are empty tensors.

Every kernel here is plain torch, for eager runs and for the interpreter of the IR; the backward reads
``lse`` instead of the probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import attention_backward_ref, attention_ref
from .compat import autocast_disabled

# Scores held at once by the plain-torch kernels: 64 Mi elements, 256 MiB in float32.
_CHUNK = 1 << 26

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale, Tensor? sink=None, "
    "SymInt offset=0, int? window=None, float? softcap=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sink, Tensor out, Tensor lse, "
    "bool causal, float? scale, SymInt offset, int? window, float? softcap, bool mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _heads_inside(x: Tensor) -> Tensor:
    """``[b, h, s, d]`` laid out as ``[b, s, h, d]`` in memory, which is what projections want."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(like: Tensor, b: Any, h: Any, s: Any, d: Any) -> Tensor:
    return like.new_empty((b, s, h, d)).transpose(1, 2)


def _whole_heads(x: Tensor, heads: int) -> Tensor:
    """k or v with each head repeated for the group of query heads that shares it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Ranges of the batch whose scores stay under ``_CHUNK``."""
    step = max(1, _CHUNK // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(i, i + step) for i in range(0, q.shape[0], step)]


def _batches(mask: Tensor | None, part: slice) -> Tensor | None:
    return mask if mask is None or mask.dim() < 4 or mask.shape[0] == 1 else mask[part]


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None, how: _How) -> Any:
    out = _empty(q, q.shape[0], q.shape[1], q.shape[2], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=_lse_dtype(q))
    for part in _parts(q, k):
        got = attention_ref(q[part], k[part], v[part], _batches(mask, part), sink, *how)
        out[part], lse[part] = got
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    how: _How,
    mask_grad: bool,
) -> tuple[Tensor, ...]:
    dq, dk, dv = (_empty(x, *x.shape) for x in (q, k, v))
    # What the whole batch shares is summed in the wide dtype.
    dmask = _zeros(mask) if mask_grad else q.new_empty((0,))
    dsink = q.new_empty((0,)) if sink is None else _zeros(sink)
    for part in _parts(q, k):
        held = _batches(mask, part)
        held = held.to(dmask.dtype) if mask_grad and held is not None else held
        wide_sink = None if sink is None else sink.to(dsink.dtype)
        operands = (grad[part], q[part], k[part], v[part], held, wide_sink, out[part], lse[part])
        dq[part], dk[part], dv[part], *rest = attention_backward_ref(*operands, *how, mask_grad)
        if sink is not None:
            dsink += rest.pop()
        if mask_grad:
            _batches(dmask, part).add_(rest.pop())  # type: ignore[union-attr]
    return dq, dk, dv, dmask.to(mask.dtype) if mask_grad and mask is not None else dmask, _like(dsink, sink)


def _zeros(x: Tensor | None) -> Tensor:
    assert x is not None
    return torch.zeros(x.shape, dtype=_lse_dtype(x), device=x.device)


def _like(x: Tensor, wanted: Tensor | None) -> Tensor:
    return x if wanted is None else x.to(wanted.dtype)


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# causal, scale, offset, window, softcap: the attributes in the order of ``attention_ref``.
_How = tuple[bool, float | None, Any, int | None, float | None]


def _fused_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None, how: _How, mask_grad: bool = False
) -> bool:
    """Whether torch's CPU flash kernel takes these operands: it is faster and is what eager runs."""
    _, _, offset, window, softcap = how
    return (
        q.device.type == "cpu"
        and not mask_grad
        and (sink, offset, window, softcap) == (None, 0, None, None)
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    sink: Tensor | None = None,
    offset: Any = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    how: _How = (causal, scale, offset, window, softcap)
    if q.device.type == "cpu":  # its flash kernel takes no groups
        k, v = _whole_heads(k, q.shape[1]), _whole_heads(v, q.shape[1])
    if _fused_on_cpu(q, k, v, mask, sink, how):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        bias = _flash_mask(mask, q.dtype)
        out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        if bias is not None:
            # The kernel says 0 for a row without anything to attend to.
            empty = (bias == -math.inf).all(-1).expand(q.shape[:3])
            lse = lse.masked_fill(empty, -math.inf)
        return _heads_inside(out), lse.contiguous()
    return _forward(q, k, v, mask, sink, how)  # type: ignore[no-any-return]


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    offset: Any,
    window: int | None,
    softcap: float | None,
    mask_grad: bool,
) -> tuple[Tensor, ...]:
    how: _How = (causal, scale, offset, window, softcap)
    if _fused_on_cpu(q, k, v, mask, sink, how, mask_grad):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        row = lse.masked_fill(lse == -math.inf, 0.0)
        bias = _flash_mask(mask, q.dtype)
        # The kernel reads grad and out densely.
        grads = flash(grad.contiguous(), q, k, v, out, row, 0.0, causal, attn_mask=bias, scale=scale)
        return *map(_heads_inside, grads), q.new_empty((0,)), q.new_empty((0,))
    return _backward(grad, q, k, v, mask, sink, out, lse, how, mask_grad)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    out = _empty(q, q.shape[0], q.shape[1], q.shape[2], v.shape[-1])
    return out, q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    mask_grad = rest[-1]
    dmask = q.new_empty((0,))
    if mask_grad:
        assert mask is not None
        dmask = mask.new_empty(mask.shape)
    dsink = q.new_empty((0,)) if sink is None else sink.new_empty(sink.shape)
    return _empty(q, *q.shape), _empty(k, *k.shape), _empty(v, *v.shape), dmask, dsink


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, causal, scale, sink, offset, window, softcap = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, sink, out, lse)
    ctx.how = (causal, scale, offset, window, softcap)


def _differentiate(ctx: Any, grad: Tensor | None, _lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    q, k, v, mask, sink, out, lse = ctx.saved_tensors
    mask_grad = mask is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dmask, dsink = torch.ops.tessel.attention_backward(
        grad, q, k, v, mask, sink, out, lse, *ctx.how, mask_grad
    )
    dsink = None if sink is None else dsink
    return dq, dk, dv, dmask if mask_grad else None, None, None, dsink, None, None, None


def _autocast(device: str) -> Any:
    """The autocast kernel of one device: casts as it does for scaled_dot_product_attention."""

    def cast(x: Tensor | None) -> Tensor | None:
        # Autocast leaves float64 and other devices' tensors alone.
        skip = x is None or not x.is_floating_point() or x.dtype == torch.float64 or x.device.type != device
        return x if skip else x.to(torch.get_autocast_dtype(device))  # type: ignore[union-attr]

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any, **more: Any) -> Any:
        with autocast_disabled():
            return torch.ops.tessel.attention(cast(q), cast(k), cast(v), cast(mask), *rest, **more)

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
