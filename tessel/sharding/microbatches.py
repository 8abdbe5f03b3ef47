"""Pieces of a batch that run one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import check
from ..frontend.compat import pytree
from ..frontend.joint import tensors_of

__all__ = ["microbatch"]


def microbatch(
    args: Sequence[Any], kwargs: Mapping[str, Any] | None, parts: int
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], list[bool]]:
    """The arguments of one microbatch out of ``parts``, and which of the tensors among them are cut.

    Those are cut that have as many rows as the first.

    Raises:
        TesselError: the rows do not divide.
    """
    tensors = tensors_of(args, kwargs or {})
    rows = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    cut = [parts > 1 and bool(x.dim()) and x.shape[0] == rows for x in tensors]
    fits = parts == 1 or (rows > 0 and rows % parts == 0)
    check(fits, lambda: f"a batch of {rows} rows does not divide into {parts} microbatches")
    pieces = iter([x[: rows // parts] if own else x for x, own in zip(tensors, cut, strict=True)])
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
    return pytree.tree_unflatten([next(pieces) if isinstance(x, torch.Tensor) else x for x in leaves], tree), cut
