"""2:4 layers in the compressed-tensors layout ("sparse-24-bitmask").

A layer ``name`` is ``name.compressed`` ``[n, k / 2]``, the values that are there, ``name.bitmask`` (uint8 ``[n,
ceil(k / 8)]``, a bit a weight, lowest first) and ``name.shape``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check
from .sparse import SparseLinear

__all__ = ["SPARSE_PARTS", "read_sparse", "said_of_sparse", "sparse_tensors"]

SPARSE_PARTS = ("compressed", "bitmask", "shape")
_FORMAT = "sparse-24-bitmask"


def sparse_tensors(layer: SparseLinear) -> dict[str, Tensor]:
    """A layer's tensors, by the names of ``SPARSE_PARTS``."""
    n, k = layer.out_features, layer.in_features
    bits = layer.mask.contiguous().view(torch.uint8)[:, : -(-k // 8)]
    parts = (layer.values.contiguous(), bits.contiguous(), torch.tensor([[n], [k]]))
    return dict(zip(SPARSE_PARTS, parts, strict=True))


def said_of_sparse(names: Collection[str], whole: Collection[str]) -> dict[str, Any]:
    """The record of ``sparsity_config``: layers that are sparse, and linear layers that are not."""
    return {
        "format": _FORMAT,
        "sparsity_structure": "2:4",
        "global_sparsity": 0.5,
        "registry_requires_subclass": False,
        "targets": ["Linear"] if not whole else sorted(names),
        "ignore": sorted(whole),
    }


def read_sparse(name: str, layer: nn.Module, parts: dict[str, Tensor | None], said: dict[str, Any]) -> SparseLinear:
    """The layer that a file holds, in the place of ``layer``.

    Raises:
        TesselError: parts are missing or of other sizes, or a format that is not known.
    """
    told = said.get("format")
    check(told == _FORMAT, lambda: f"load_quantized: {name}: sparse format {told!r}; {_FORMAT} is what can be read")
    absent = [p for p in SPARSE_PARTS if parts.get(p) is None]
    check(not absent, lambda: f"load_quantized: {name} has no {' and no '.join(absent)}")
    values, bits, shape = (parts[p] for p in SPARSE_PARTS)
    assert values is not None and bits is not None and shape is not None
    n, k = (int(x) for x in shape.flatten())
    weight: Any = getattr(layer, "weight", None)
    check(
        type(layer) is nn.Linear and tuple(weight.shape) == (n, k),
        lambda: f"load_quantized: {name} is {n} x {k} in the file, {type(layer).__name__} in the model",
    )
    sizes = tuple(values.shape) == (n, k // 2) and tuple(bits.shape) == (n, -(-k // 8)) and k % 4 == 0
    check(
        sizes and bits.dtype == torch.uint8,
        lambda: f"load_quantized: {name}: values {tuple(values.shape)} and bits {tuple(bits.shape)} of {n} x {k}",
    )
    kept = ((bits[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(n, -1)[:, :k].bool()
    two = bool((kept.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    check(two, lambda: f"load_quantized: {name}: of some four weights not two are there")
    dense = torch.zeros(n, k, dtype=values.dtype)
    dense[kept] = values.flatten()
    own = nn.Linear(k, n, bias=layer.bias is not None, device=values.device, dtype=weight.dtype)
    return SparseLinear.of(own, kept, dense)
