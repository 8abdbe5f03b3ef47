"""``tessel::packed_linear``: a linear layer of packed integers as one operator that no tracer opens.

    packed_linear(x, words, scale, zero, bias, table, bits) -> out

Shapes and meaning are those of ``ops/packed.py``, whose reference runs here: for eager, and wherever there is no
kernel. Gradients go to ``x`` and ``bias``: the weight is what training does not touch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.node import Value
from ..ops.packed import dequantized, packed_linear_ref
from .lower import Lowering, Table, register

__all__ = ["packed_linear"]

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define(
    "packed_linear(Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? bias, Tensor? table, int bits) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(*args: Any) -> Tensor:
    return packed_linear_ref(*args)


def _fake(x: Tensor, words: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], words.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, zero, _, table, bits = inputs
    ctx.save_for_backward(words, scale, zero, table)
    ctx.bits, ctx.k, ctx.dtype = bits, x.shape[1], x.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        words, scale, zero, table = ctx.saved_tensors
        dx = grad @ dequantized(words, scale, zero, table, ctx.bits, ctx.k, ctx.dtype)
    if ctx.needs_input_grad[4]:
        dbias = grad.sum(0)
    return dx, None, None, None, dbias, None, None


_LIB.impl("packed_linear", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::packed_linear", _fake, lib=_LIB)
torch.library.register_autograd("tessel::packed_linear", _differentiate, setup_context=_setup, lib=_LIB)

packed_linear = torch.ops.tessel.packed_linear.default

TABLE: Table = {}


@register(TABLE, "tessel.packed_linear.default")
def _packed_linear(c: Lowering, *args: Any) -> Value:
    return c("packed_linear", *args[:6], bits=args[6])
