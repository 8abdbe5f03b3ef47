"""Layers whose weights are stored in few bits, or without their zeros, as operators that no tracer opens.

    packed_linear(x, words, scale, zero, bias, table, bits, inputs=0, exponent=0) -> out

    sparse_linear(x, values, mask, bias) -> out
    unpacked(words, scale, zero, table, bits, k, dtype, exponent) -> weights

Shapes and meaning are those of ``ops/packed.py``, ``sparse.py`` and ``packed_stacks.py``, whose references run here:
for eager, and wherever there is no kernel. Gradients go to ``x`` and ``bias``: the weight is what training does not
touch, and rounded inputs are as if they were whole (Bengio et al., "Estimating or propagating gradients").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.node import Value
from ..ops.packed import dequantized, packed_linear_ref
from ..ops.packed_stacks import unpacked_ref
from ..ops.sparse import dense, sparse_linear_ref
from .lower import Lowering, Table, register

__all__ = ["packed_linear", "sparse_linear", "unpacked"]

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define(
    "packed_linear(Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? bias, Tensor? table, int bits, "
    "int inputs=0, int exponent=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(*args: Any) -> Tensor:
    return packed_linear_ref(*args)


def _fake(x: Tensor, words: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], words.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, zero, _, table, bits = inputs[:7]
    ctx.save_for_backward(words, scale, zero, table)
    ctx.bits, ctx.k, ctx.dtype = bits, x.shape[1], x.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        words, scale, zero, table = ctx.saved_tensors
        dx = grad @ dequantized(words, scale, zero, table, ctx.bits, ctx.k, ctx.dtype)
    if ctx.needs_input_grad[4]:
        dbias = grad.sum(0)
    return dx, None, None, None, dbias, None, None, None, None


_LIB.impl("packed_linear", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::packed_linear", _fake, lib=_LIB)
torch.library.register_autograd("tessel::packed_linear", _differentiate, setup_context=_setup, lib=_LIB)

packed_linear = torch.ops.tessel.packed_linear.default

# ---------------------------------------------------------------- sparse

_LIB.define(
    "sparse_linear(Tensor x, Tensor values, Tensor mask, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _sparse_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, mask, _ = inputs
    ctx.save_for_backward(values, mask)


def _sparse_differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, mask = ctx.saved_tensors
    dx = grad @ dense(values, mask) if ctx.needs_input_grad[0] else None
    return dx, None, None, grad.sum(0) if ctx.needs_input_grad[3] else None


_LIB.impl("sparse_linear", lambda *args: sparse_linear_ref(*args), "CompositeExplicitAutograd")
torch.library.register_fake("tessel::sparse_linear", _fake, lib=_LIB)
torch.library.register_autograd("tessel::sparse_linear", _sparse_differentiate, setup_context=_sparse_setup, lib=_LIB)

sparse_linear = torch.ops.tessel.sparse_linear.default

# ---------------------------------------------------------------- stacks of matrices

_LIB.define(
    "unpacked(Tensor words, Tensor scale, Tensor? zero, Tensor? table, int bits, int k, ScalarType dtype, "
    "int exponent) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _unpacked_fake(words: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    _, _, _, k, dtype, _ = rest
    return scale.new_empty((*words.shape[:2], k), dtype=dtype)


_LIB.impl("unpacked", lambda *args: unpacked_ref(*args[:-1]), "CompositeExplicitAutograd")
torch.library.register_fake("tessel::unpacked", _unpacked_fake, lib=_LIB)

unpacked = torch.ops.tessel.unpacked.default

TABLE: Table = {}


@register(TABLE, "tessel.packed_linear.default")
def _packed_linear(c: Lowering, *args: Any) -> Value:
    more = dict(zip(("inputs", "exponent"), args[7:], strict=False))
    return c("packed_linear", *args[:6], bits=args[6], **{name: n for name, n in more.items() if n})


@register(TABLE, "tessel.sparse_linear.default")
def _sparse_linear(c: Lowering, *args: Any) -> Value:
    return c("sparse_linear", *args)


@register(TABLE, "tessel.unpacked.default")
def _unpacked(c: Lowering, *args: Any) -> Value:
    *operands, bits, k, dtype, exponent = args
    return c("unpacked", *operands, bits=bits, k=k, dtype=dtype, exponent=exponent)
