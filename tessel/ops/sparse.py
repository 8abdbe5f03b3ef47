"""A linear layer of whose weight, of each four values along k, two are zero and are not stored (2:4).

    out[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n]

The two that are stored lie in ``values``; which of the four they are is a bit each in ``mask``, lowest bits first, 32 a
word, as the compressed-tensors layout has them ("sparse-24-bitmask", whose bytes these words are).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..ir.node import Builder, Node, Op, Value
from ..ir.types import Dim, dim_equal, product
from .blocks import row_blocks
from .common import arg_types, need_tensor, result, table
from .emit import Emit
from .fold import need_float

__all__ = ["SPARSE", "dense", "open_sparse", "sparse_linear_ref"]


def dense(values: Tensor, mask: Tensor) -> Tensor:
    """The weight ``[n, k]`` of values ``[n, k / 2]`` and words ``[n, ceil(k / 32)]``.

    >>> dense(torch.tensor([[5.0, 7.0]]), torch.tensor([[0b1010]], dtype=torch.int32))
    tensor([[0., 5., 0., 7.]])
    """
    n, quarters = values.shape[0], values.shape[1] // 2
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=mask.device)
    places = torch.arange(4, dtype=torch.int32, device=mask.device)
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    made = values.new_empty((n, 4 * quarters))
    for part in row_blocks(made):
        four = ((mask[part, :, None] >> shifts) & 15).flatten(1)[:, :quarters, None]
        there, first = (four >> places) & 1, (four & ((1 << places) - 1)) == 0
        pair = values[part].unflatten(1, (quarters, 2))
        made[part] = torch.where(there != 0, torch.where(first, pair[..., :1], pair[..., 1:]), zero).flatten(1)
    return made


def sparse_linear_ref(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer by its definition.

    Args:
        x: [m, k] floating, k a multiple of 4.
        values: [n, k / 2] in x's dtype.
        mask: [n, ceil(k / 32)] int32.
        bias: [n] in x's dtype, or None.
    """
    return torch.nn.functional.linear(x, dense(values, mask), bias)


def _infer(x: Any, values: Any, mask: Any, bias: Any = None) -> Any:
    need_float("sparse_linear", x)
    need_tensor("sparse_linear", values, mask)
    fits = x.rank == values.rank == mask.rank == 2 and mask.dtype == torch.int32 and x.dtype == values.dtype
    check(fits, lambda: f"sparse_linear: {x}, {values} and {mask} are not of the ranks and dtypes it takes")
    rows = [mask.shape[0]] + [t.shape[0] for t in (bias,) if t is not None]
    check(all(dim_equal(n, values.shape[0]) for n in rows), lambda: f"sparse_linear: {values}, {mask}, {bias}")
    k, half, words = x.shape[1], values.shape[1], mask.shape[1]
    if all(isinstance(n, int) for n in (k, half, words)):
        check(
            k % 4 == 0 and half == k // 2 and words == -(-k // 32),
            lambda: f"sparse_linear: {values} and {mask} hold no rows of k = {k}, of each four of which two are stored",
        )
    return (result((x.shape[0], values.shape[0]), x.dtype, x),)


def _dims(node: Node) -> str:
    return f"m i*, n v*, n w*{', n' if len(arg_types(node)) > 3 and arg_types(node)[3] is not None else ''} -> m n"


def _flops(node: Node) -> Dim:
    x, values = arg_types(node)[:2]
    return product((2, *x.shape, values.shape[0]))


def open_sparse(builder: Builder, node: Node) -> tuple[Value, ...]:
    """The layer in simple operators: a product whose weight is written out where it is read."""
    x, values, mask, bias = [*node.args] + [None] * (4 - len(node.args))
    e = Emit(builder)
    (n, half), words = values.shape, mask.shape[1]
    quarters = half // 2
    shifts = e("iota", shape=(8,), start=0, step=4, dtype=torch.int32)
    four = e("bitwise_and", e("shift_right", e.reshape(mask, (n, words, 1)), shifts), 15)
    four = e.reshape(four, (n, words * 8))
    if not dim_equal(words * 8, quarters):
        four = e("slice", four, dim=1, start=0, size=quarters, step=1)
    four = e.reshape(four, (n, quarters, 1))
    places = e("iota", shape=(4,), start=0, step=1, dtype=torch.int32)
    there = e("bitwise_and", e("shift_right", four, places), 1)
    # the bits below a place: none set means that its value is the first of the two
    below = e("sub", e("shift_left", e("full", shape=(4,), value=1, dtype=torch.int32), places), 1)
    first = e("eq", e("bitwise_and", four, below), 0)
    pair = e.reshape(values, (n, quarters, 2))
    one, other = (e("slice", pair, dim=2, start=i, size=1, step=1) for i in (0, 1))
    weight = e("where", e("eq", there, 0), 0.0, e("where", first, one, other))
    out = e("matmul", x, e("permute", e.reshape(weight, (n, 2 * half)), dims=(1, 0)))
    return (out if bias is None else e("add", out, bias),)


SPARSE = table(
    Op(
        "sparse_linear",
        "library",
        dims=_dims,
        ref=sparse_linear_ref,
        infer=_infer,
        flops=_flops,
        cost=1000,
        doc="sparse_linear(x [m, k], values [n, k / 2], mask [n, k / 32], bias|None)",
    ),
)
