"""2:4 sparse layers: of each four weights along k the two that matter less are zero, and are not stored.

>>> layer = torch.nn.Linear(32, 8)
>>> sparse = SparseLinear.of(layer, pruned(layer.weight.detach()))
>>> tuple(sparse.values.shape), tuple(sparse.mask.shape)
((8, 16), (8, 1))
>>> x = torch.randn(3, 32)
>>> torch.allclose(sparse(x), torch.nn.functional.linear(x, sparse.weight, layer.bias), atol=1e-5)
True
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check
from ..frontend.packed_op import sparse_linear
from ..ops.blocks import row_blocks
from ..ops.sparse import dense
from .hessian import BLOCK, damped, inverse_factor
from .linear import pack
from .moments import shape_of
from .report import LayerReport
from .sqnr import sqnr
from .transforms import outliers

__all__ = ["SparseLinear", "kept_of", "pruned", "pruned_by", "sparse_layer"]


def kept_of(importance: Tensor) -> Tensor:
    """Which two of each four along the last dimension are largest, bool; of equal ones the first.

    >>> kept_of(torch.tensor([[1.0, 3.0, 2.0, 3.0]]))
    tensor([[False,  True, False,  True]])
    """
    kept = torch.empty_like(importance, dtype=torch.bool)
    flat, to = importance.reshape(-1, importance.shape[-1]), kept.view(-1, importance.shape[-1])
    for part in row_blocks(flat):
        own = flat[part].unflatten(1, (-1, 4)).movedim(2, 0).contiguous()
        for i in range(4):  # kept: at most one of the other three goes before it
            before = sum((own[j] >= own[i] if j < i else own[j] > own[i]).to(torch.uint8) for j in range(4) if j != i)
            to[part, i::4] = before < 2
    return kept


def pruned(weight: Tensor) -> Tensor:
    """Bool ``[n, k]``: the two of each four whose magnitudes are largest."""
    return kept_of(weight.abs())


def pruned_by(weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor, str]:
    """Prune four columns after four others, which make up for the errors: each weight by what its loss is worth.

    With U the upper factor of H's inverse the loss of a zero is ``w^2 / (2 U_jj^2)``, and its error spreads over the
    columns after it as GPTQ's does (Frantar and Alistarh, "SparseGPT").

    Args:
        weight: ``[n, k]``, k a multiple of 4.
        h: ``[k, k]``, see ``hessian``.

    Returns:
        What is kept, bool ``[n, k]``; the changed weight; why magnitudes decided after all, empty if they did not.
    """
    w = weight.double().clone()
    try:
        factor = inverse_factor(damped(h.double()))
    except torch.linalg.LinAlgError as e:
        return pruned(weight), weight, f"pruned by magnitude: {str(e).splitlines()[0]}"
    kept, k = torch.empty(w.shape, dtype=torch.bool), w.shape[1]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty(w.shape[0], stop - start, dtype=w.dtype)
        for j in range(start, stop):
            if j % 4 == 0:
                kept[:, j : j + 4] = kept_of(w[:, j : j + 4].square() / factor.diagonal()[j : j + 4].square())
            errors[:, j - start] = torch.where(kept[:, j], 0.0, w[:, j] / factor[j, j])
            w[:, j] = torch.where(kept[:, j], w[:, j], 0.0)
            w[:, j + 1 : stop] -= errors[:, j - start, None] * factor[j, j + 1 : stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return kept, w.to(weight.dtype), ""


class SparseLinear(nn.Module):
    """``x W^T + b`` with W 2:4 sparse.

    Attributes:
        values: ``[n, k / 2]``, of each four weights the two that are there, in their order.
        mask: int32 ``[n, ceil(k / 32)]``, a bit a weight, set where it is there, lowest bits first.
    """

    values: Tensor
    mask: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def of(cls, layer: nn.Module, kept: Tensor, weight: Tensor | None = None) -> SparseLinear:
        """The layer with what ``kept`` says of its weight ``[n, k]``, or of ``weight`` in its place."""
        own: Any = layer
        given = own.weight.detach() if weight is None else weight
        (n, k), device = kept.shape, own.weight.device
        made = cls(k, n)
        values = torch.empty((n, k // 2), dtype=own.weight.dtype, device=device)
        for part in row_blocks(kept):
            values[part] = given[part][kept[part].to(given.device)].reshape(-1, k // 2)
        made.register_buffer("values", values)
        made.register_buffer("mask", pack(kept, 1).to(device))
        bias = getattr(own, "bias", None)
        made.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        made.train(layer.training)
        return made

    @property
    def weight(self) -> Tensor:
        """The weight with its zeros, ``[n, k]``."""
        return dense(self.values, self.mask)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k]`` -> ``[..., n]``."""
        rows = x.reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        out = sparse_linear(rows, self.values.to(rows.dtype), self.mask, bias)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, 2:4 sparse"


def sparse_layer(
    name: str, layer: nn.Module, weight: Tensor, h: Tensor | None
) -> tuple[SparseLinear | None, LayerReport]:
    """A linear layer made 2:4 sparse, or None where it stays whole; and what became of it.

    Args:
        weight: of the layer, ``[n, k]``.
        h: of its inputs, see ``hessian``; None: magnitudes decide.
    """
    given = weight.detach().cpu()
    n, k = given.shape
    shape, before = shape_of(given), sum(p.numel() * p.element_size() for p in layer.parameters())
    odd = tuple(outliers(shape.largest))
    if k % 4:
        why = f"left whole: four do not divide k = {k}"
        return None, LayerReport(name, (n, k), why, None, None, odd, before, before, "", shape.kurtosis)
    check(
        bool(torch.isfinite(shape.largest).all()), lambda: f"quantize: {name}: the weight holds NaN or infinite values"
    )
    kept, changed, why = (pruned(given), given, "") if h is None else pruned_by(given, h)
    made = SparseLinear.of(layer, kept, changed)
    after = sum(t.numel() * t.element_size() for t in (*made.buffers(), *made.parameters()))
    how = "2:4 sparse, the larger two of four" if h is None or why else "2:4 sparse, the others make up for zeros"
    got = sqnr(given, made.weight.cpu())
    return made, LayerReport(name, (n, k), how, got, None, odd, before, after, why, shape.kurtosis)
