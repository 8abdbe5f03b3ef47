"""``tessel::packed_experts``: a layer of experts whose matrices are stored in few bits and whose inputs are rounded.

    packed_experts(x, words, scale, zero, bias, table, down: the same five, index, weights,
                   bits, inputs, exponent, act, interleaved, alpha, limit, floats, scales) -> out

Shapes and meaning are those of ``ops/packed_stacks.py``, whose ``floats`` are ``floats`` and ``scales`` here. Its
reference runs for eager, and wherever there is no kernel. Gradients go to x, the biases and the weights of the choices;
rounded inputs are as if they were whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.node import Value
from ..ops.packed_stacks import packed_experts_ref
from .experts_op import experts
from .lower import Lowering, Table, register
from .packed_op import unpacked

__all__ = ["TABLE", "packed_experts"]

_LIB = torch.library.Library("tessel", "FRAGMENT")
_STACK = "Tensor {0}words, Tensor {0}scale, Tensor? {0}zero, Tensor? {0}bias, Tensor? {0}table"
_LIB.define(
    f"packed_experts(Tensor x, {_STACK.format('')}, {_STACK.format('down_')}, Tensor index, Tensor weights, int bits, "
    "int inputs, int exponent, str act, bool interleaved, float alpha, float limit, float[] floats, str scales) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OPERANDS = 13
_NAMES = ("bits", "inputs", "exponent", "act", "interleaved", "alpha", "limit", "floats", "scales")


def _attrs(args: tuple[Any, ...]) -> dict[str, Any]:
    attrs = dict(zip(_NAMES, args[_OPERANDS:], strict=True))
    floats, scales = attrs.pop("floats"), attrs.pop("scales")
    if floats:
        *whole, largest = floats
        attrs["floats"] = (*map(int, whole), largest, scales)
    return attrs


def _forward(*args: Any) -> Tensor:
    return packed_experts_ref(*args[:_OPERANDS], **_attrs(args))[0]


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], args[5].shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_OPERANDS])
    ctx.attrs = inputs[_OPERANDS:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """That of the layer with the matrices written out."""
    x, *stacks, index, weights = ctx.saved_tensors
    bits, _, exponent, act, interleaved, alpha, limit, *_ = ctx.attrs
    widths = (x.shape[1], stacks[0].shape[1] // 2)  # of gate and up, of down
    up, down = (
        unpacked(words, scale, zero, table, bits, k, x.dtype, exponent)
        for (words, scale, zero, _, table), k in zip((stacks[:5], stacks[5:]), widths, strict=True)
    )
    operands = (x, up, stacks[3], down, stacks[8], index, weights)
    attrs = (act, interleaved, False, alpha, limit)
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[4] or needs[9], needs[12]]
    pre = experts(*operands, *attrs, True)[1]
    got = torch.ops.tessel.experts_backward(grad.contiguous(), *operands, pre, *attrs, wanted)
    grads: list[Any] = [None] * (_OPERANDS + len(_NAMES))
    for place, value in ((0, got[0]), (4, got[2]), (9, got[4]), (12, got[5])):
        grads[place] = value if needs[place] else None
    return tuple(grads)


_LIB.impl("packed_experts", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::packed_experts", _fake, lib=_LIB)
torch.library.register_autograd("tessel::packed_experts", _differentiate, setup_context=_setup, lib=_LIB)

packed_experts = torch.ops.tessel.packed_experts.default

TABLE: Table = {}


@register(TABLE, "tessel.packed_experts.default")
def _packed_experts(c: Lowering, *args: Any) -> Value:
    attrs = _attrs(args)
    if attrs["act"] != "limited":
        del attrs["alpha"], attrs["limit"]
    return c("packed_experts", *args[:_OPERANDS], **{n: v for n, v in attrs.items() if v})
