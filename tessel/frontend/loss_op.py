"""``tessel::linear_cross_entropy``: a linear layer and the cross-entropy of its results as one operator.

    linear_cross_entropy(x, weight, bias, target, ignore_index, label_smoothing, softcap) -> (loss, lse)
    linear_cross_entropy_backward(grad, x, weight, bias, target, lse, ..., wanted) -> (dx, dweight, dbias)
    linear_cross_entropy_gradients(x, weight, bias, target, ..., wanted) -> (loss, dx, dweight, dbias)
    scaled_gradients(dx, dweight, dbias, by) -> (dx, dweight, dbias)

It takes the place of the two calls before AOTAutograd sees them (``losses.py``), so that the logits are written
neither for the forward nor for the backward. Shapes and meaning are those of ``ops/loss.py``, whose references
run here: for eager, and wherever there is no kernel. The last two are what ``early_gradients.py`` makes of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.emit import wide_dtype
from ..ops.loss import (
    linear_cross_entropy_backward_ref,
    linear_cross_entropy_gradients_ref,
    linear_cross_entropy_ref,
    scaled_gradients_ref,
)
from .compat import autocast_disabled

_LIB = torch.library.Library("tessel", "FRAGMENT")
_ATTRS = "int ignore_index, float label_smoothing, float softcap"
_ATTR_NAMES = ("ignore_index", "label_smoothing", "softcap")
_LIB.define(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, {_ATTRS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor lse, "
    f"{_ATTRS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    f"linear_cross_entropy_gradients(Tensor x, Tensor weight, Tensor? bias, Tensor target, {_ATTRS}, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "scaled_gradients(Tensor dx, Tensor dweight, Tensor dbias, Tensor by) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, smoothing: float, softcap: float
) -> tuple[Tensor, Tensor]:
    attrs = dict(zip(_ATTR_NAMES, (ignore_index, smoothing, softcap), strict=True))
    return linear_cross_entropy_ref(x, weight, bias, target, **attrs)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, smoothing: float, softcap: float
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    return x.new_empty(target.shape, dtype=wide), x.new_empty(target.shape, dtype=wide)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    mask = (wanted[0], wanted[1], wanted[2])
    attrs = dict(zip(_ATTR_NAMES, (ignore_index, smoothing, softcap), strict=True))
    return linear_cross_entropy_backward_ref(grad, x, weight, bias, target, lse, mask, **attrs)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    has_bias = wanted[2] and bias is not None
    return (
        x.new_empty(x.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        weight.new_empty(weight.shape[:1] if has_bias else (0,)),
    )


def _gradients(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *attrs, wanted = rest
    named = dict(zip(_ATTR_NAMES, attrs, strict=True))
    return linear_cross_entropy_gradients_ref(x, weight, bias, target, (wanted[0], wanted[1], wanted[2]), **named)


def _gradients_fake(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    loss, lse = _forward_fake(x, weight, bias, target, *rest[:-1])
    return loss, *_backward_fake(loss, x, weight, bias, target, lse, *rest)


def _scaled_fake(dx: Tensor, dweight: Tensor, dbias: Tensor, by: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(d) for d in (dx, dweight, dbias))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, target, *attrs = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, target, output[1])
    ctx.attrs = attrs


def _differentiate(ctx: Any, grad: Tensor | None, _lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    x, weight, bias, target, lse = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
    got = torch.ops.tessel.linear_cross_entropy_backward(grad, x, weight, bias, target, lse, *ctx.attrs, wanted)
    return *(g if w else None for g, w in zip(got, wanted, strict=True)), None, None, None, None


def _autocast(device: str) -> Any:
    """The autocast kernel of one device: it casts what it casts for a linear layer."""

    def cast(x: Tensor | None) -> Tensor | None:
        skip = x is None or x.dtype == torch.float64 or x.device.type != device
        return x if skip else x.to(torch.get_autocast_dtype(device))  # type: ignore[union-attr]

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        with autocast_disabled():
            return torch.ops.tessel.linear_cross_entropy(cast(x), cast(weight), cast(bias), *rest)

    return kernel


_LIB.impl("linear_cross_entropy", _forward, "CompositeExplicitAutograd")
_LIB.impl("linear_cross_entropy_backward", _backward, "CompositeExplicitAutograd")
_LIB.impl("linear_cross_entropy_gradients", _gradients, "CompositeExplicitAutograd")
_LIB.impl("scaled_gradients", scaled_gradients_ref, "CompositeExplicitAutograd")
_LIB.impl("linear_cross_entropy", _autocast("cpu"), "AutocastCPU")
_LIB.impl("linear_cross_entropy", _autocast("cuda"), "AutocastCUDA")
torch.library.register_fake("tessel::linear_cross_entropy", _forward_fake, lib=_LIB)
torch.library.register_fake("tessel::linear_cross_entropy_backward", _backward_fake, lib=_LIB)
torch.library.register_fake("tessel::linear_cross_entropy_gradients", _gradients_fake, lib=_LIB)
torch.library.register_fake("tessel::scaled_gradients", _scaled_fake, lib=_LIB)
torch.library.register_autograd("tessel::linear_cross_entropy", _differentiate, setup_context=_setup, lib=_LIB)

linear_cross_entropy = torch.ops.tessel.linear_cross_entropy.default
linear_cross_entropy_gradients = torch.ops.tessel.linear_cross_entropy_gradients.default
scaled_gradients = torch.ops.tessel.scaled_gradients.default

__all__ = ["linear_cross_entropy", "linear_cross_entropy_gradients", "scaled_gradients"]
