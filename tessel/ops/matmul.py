"""Matrix product. Transposes and bias are separate nodes: a split ``k`` would add a bias twice.

``mm`` and ``addmm`` are the library's product, without and with a bias; passes make them, and ``k`` stays whole.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, dim_equal, product
from .common import letters, need_tensor, operand_types, result, table, words


def _infer(a: Any, b: Any) -> tuple[TensorType, ...]:
    need_tensor("matmul", a, b)
    check(
        a.rank == b.rank and a.rank >= 2 and all(map(dim_equal, a.shape[:-2], b.shape[:-2])),
        lambda: (
            f"matmul: {a} and {b} need the same rank (2 or more) and the same batch sizes; expand them first"
        ),
    )
    check(dim_equal(a.shape[-1], b.shape[-2]), lambda: f"matmul: inner sizes of {a} and {b} differ")
    check(a.dtype == b.dtype, lambda: f"matmul: dtypes of {a} and {b} differ; cast one")
    return (result((*a.shape[:-1], b.shape[-1]), a.dtype, a, b),)


def _dims(node: Node, k: str = "k+") -> str:
    batch = [w.upper() for w in letters(node.type.rank - 2)]
    return words([[*batch, "m", k], [*batch, k, "n"]], [[*batch, "m", "n"]])


def _flops(node: Node) -> Dim:
    return product((2, *node.type.shape, operand_types(node)[0].shape[-1]))


def _addmm_infer(bias: Any, a: Any, b: Any) -> tuple[TensorType, ...]:
    (out,) = _infer(a, b)
    need_tensor("addmm", bias)
    fits = a.rank == 2 and bias.rank == 1 and dim_equal(bias.shape[0], b.shape[1]) and bias.dtype == a.dtype
    check(fits, lambda: f"addmm: bias {bias} does not fit the product of {a} and {b}, both of rank 2")
    return (out,)


MATMUL = table(
    Op(
        "matmul",
        "contract",
        dims=_dims,
        ref=torch.matmul,
        infer=_infer,
        flops=_flops,
        cost=1000,
        doc="matmul(a [B, m, k], b [B, k, n]) with equal batch sizes",
    ),
    Op(
        "mm",
        "library",
        dims=lambda node: _dims(node, "k*"),
        ref=torch.matmul,
        infer=_infer,
        flops=_flops,
        cost=1000,
        doc="mm(a [B, m, k], b [B, k, n]): the library's product",
    ),
    Op(
        "addmm",
        "library",
        dims="n, m k*, k* n -> m n",
        ref=torch.addmm,
        infer=_addmm_infer,
        flops=lambda node: product((2, *node.type.shape, operand_types(node)[1].shape[-1])),
        cost=1000,
        doc="addmm(bias [n], a [m, k], b [k, n]): the library's product with a bias",
    )
)
