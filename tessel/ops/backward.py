"""Grouped matrix products (experts), which have their own reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType, product
from .common import arg_types, need_tensor, operand_types, result, table


def grouped_mm_ref(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> torch.Tensor:
    """Products of groups of rows (``a`` 2-d), of columns (``b`` 2-d) or of inner dims (both 2-d).

    ``offs`` has the end of each group. Rows and columns past the last end give zeros.
    """
    ends = [] if offs is None else [0, *offs.tolist()]
    spans = list(pairwise(ends))
    if a.dim() == b.dim() == 2:
        got = torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
    elif a.dim() == 2:
        got = a.new_empty(a.shape[0], b.shape[2])
        got[ends[-1] :].zero_()
        for g, (i, j) in enumerate(spans):  # each product where it belongs: no copy, no second block of memory
            torch.mm(a[i:j], b[g], out=got[i:j])
    elif b.dim() == 2:
        got = a.new_zeros(a.shape[1], b.shape[1])
        for g, (i, j) in enumerate(spans):
            got[:, i:j] = a[g] @ b[:, i:j]
    else:
        got = torch.matmul(a, b)
    got = got if bias is None else got + bias
    return got if out_dtype is None else got.to(out_dtype)


def _grouped_infer(
    a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> tuple[TensorType, ...]:
    need_tensor("grouped_mm", a, b)
    ok = {a.rank, b.rank} <= {2, 3} and (offs is not None) == (a.rank == 2 or b.rank == 2)
    check(ok, lambda: f"grouped_mm: {a} and {b} must be 2-d (with offsets) or 3-d")
    lead: tuple[Dim, ...] = (a.shape[0],) if a.rank == b.rank == 3 else ()
    if a.rank == b.rank == 2:
        lead = (offs.shape[0],)
    return (result((*lead, a.shape[-2], b.shape[-1]), out_dtype or a.dtype, a),)


def _grouped_dims(node: Node) -> str:
    a, b = operand_types(node)[:2]
    table = {
        (2, 2): ("m k*", "k* n", "g* m n"),
        (2, 3): ("m* k+", "g* k+ n", "m* n"),
        (3, 2): ("g* m k+", "k+ n*", "m n*"),
        (3, 3): ("g m k+", "g k+ n", "g m n"),
    }
    left, right, out = table[a.rank, b.rank]
    given = [left, right]
    names = arg_types(node)
    if len(names) > 2 and names[2] is not None:
        given.append("g*")
    if len(names) > 3 and names[3] is not None:
        given = [w.replace("+", "*") for w in given]  # each piece would add the bias
        given.append(" ".join(out.split()[-names[3].rank :]))
    return f"{', '.join(given)} -> {out}"


def _grouped_flops(node: Node) -> Dim:
    a, b = operand_types(node)[:2]
    return product((2, *a.shape, b.shape[-1]))


BACKWARD = table(
    Op(
        "grouped_mm",
        "library",
        dims=_grouped_dims,
        ref=grouped_mm_ref,
        infer=_grouped_infer,
        flops=_grouped_flops,
        cost=1000,
        doc="grouped_mm(a, b, offs|None, bias|None, out_dtype|None): one product a group (experts)",
    ),
)
