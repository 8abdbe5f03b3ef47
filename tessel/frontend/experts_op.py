"""``tessel::experts``: a layer of experts as one operator that no tracer opens.

    experts(x, gate_up, gate_up_bias, down, down_bias, index, scale, act, interleaved, turned, alpha, limit, keep)
        -> (out, pre)
    experts_backward(grad, x, ..., scale, pre, act, ..., wanted) -> (dx, dgate_up, dbias, ddown, dbias, dscale)

Shapes and meaning are those of ``ops/experts.py``, whose references run here: for eager, and wherever there is no
kernel. ``keep`` is set where a gradient will be asked for: ``pre`` is then what the backward reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.experts import experts_backward_ref, experts_ref
from .compat import autocast_disabled

_LIB = torch.library.Library("tessel", "FRAGMENT")
_OPERANDS = "Tensor x, Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor index, Tensor scale"
_ATTRS = "str act, bool interleaved, bool turned, float alpha, float limit"
_LIB.define(
    f"experts({_OPERANDS}, {_ATTRS}, bool keep) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    f"experts_backward(Tensor grad, {_OPERANDS}, Tensor pre, {_ATTRS}, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OPERAND_COUNT, _ATTR_NAMES = 7, ("act", "interleaved", "turned", "alpha", "limit")


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return experts_ref(*args)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, gate_up, _, down, _, index, _ = args[:_OPERAND_COUNT]
    turned, keep = args[_OPERAND_COUNT + 2], args[-1]
    last = 2 if turned else 1
    pre = x.new_empty((index.numel(), gate_up.shape[last]) if keep else (0,))
    return x.new_empty((x.shape[0], down.shape[last])), pre


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *operands, wanted = args
    cut = _OPERAND_COUNT + 2
    attrs = {**dict(zip(_ATTR_NAMES, operands[cut:], strict=True)), "wanted": tuple(wanted)}
    return experts_backward_ref(*operands[:cut], **attrs)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, gate_up, gate_up_bias, down, down_bias, _, scale = args[1 : 1 + _OPERAND_COUNT]
    want_x, want_experts, want_scale = args[-1]
    given = (x, gate_up, gate_up_bias, down, down_bias, scale)
    wants = (want_x, *(want_experts,) * 4, want_scale)
    return tuple(
        x.new_empty(0, dtype=scale.dtype if i == 5 else x.dtype) if t is None or not w else t.new_empty(t.shape)
        for i, (t, w) in enumerate(zip(given, wants, strict=True))
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_OPERAND_COUNT], output[1])
    ctx.attrs, ctx.kept = inputs[_OPERAND_COUNT:-1], inputs[-1]


def _differentiate(ctx: Any, grad: Tensor | None, _pre: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * (len(_ATTR_NAMES) + 1)
    if grad is None:
        return *(None,) * _OPERAND_COUNT, *rest
    *operands, pre = ctx.saved_tensors
    if not ctx.kept:
        pre = torch.ops.tessel.experts(*operands, *ctx.attrs, True)[1]
    needs = ctx.needs_input_grad
    wanted = [needs[0], any(needs[1:5]), needs[6]]
    got = torch.ops.tessel.experts_backward(grad, *operands, pre, *ctx.attrs, wanted)
    grads = [*got[:5], None, got[5]]
    return *(g if n and g is not None else None for g, n in zip(grads, needs, strict=False)), *rest


def _autocast(device: str) -> Any:
    """The autocast kernel of one device: it casts what it casts for linear layers."""

    def cast(x: Tensor | None) -> Tensor | None:
        skip = x is None or x.dtype == torch.float64 or x.device.type != device
        return x if skip else x.to(torch.get_autocast_dtype(device))  # type: ignore[union-attr]

    def kernel(*args: Any) -> Any:
        with autocast_disabled():
            return torch.ops.tessel.experts(*map(cast, args[:5]), *args[5:])

    return kernel


_LIB.impl("experts", _forward, "CompositeExplicitAutograd")
_LIB.impl("experts_backward", _backward, "CompositeExplicitAutograd")
_LIB.impl("experts", _autocast("cpu"), "AutocastCPU")
_LIB.impl("experts", _autocast("cuda"), "AutocastCUDA")
torch.library.register_fake("tessel::experts", _forward_fake, lib=_LIB)
torch.library.register_fake("tessel::experts_backward", _backward_fake, lib=_LIB)
torch.library.register_autograd("tessel::experts", _differentiate, setup_context=_setup, lib=_LIB)

experts = torch.ops.tessel.experts.default

__all__ = ["experts"]
