"""Tensors made from nothing: iota and full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import check
from ..ir.node import Node, Op
from ..ir.types import Dim, TensorType
from .common import letters, plain, table, words
from .dims import Piece, piece_shape
from .view import concrete


def _dims(node: Node) -> str:
    return words([], [letters(node.type.rank)])


def _iota_infer(
    shape: Sequence[Dim],
    start: Any = 0,
    step: Any = 1,
    dtype: torch.dtype = torch.int64,
    device: str | None = None,
) -> tuple[TensorType, ...]:
    check(len(shape) == 1, lambda: f"iota: shape {tuple(shape)} must have one dim")
    return (TensorType(shape, dtype, device=device),)


def _iota_ref(
    shape: Sequence[int],
    start: Any = 0,
    step: Any = 1,
    dtype: torch.dtype = torch.int64,
    device: str | None = None,
) -> torch.Tensor:
    # start + i*step in the widest type of its kind, rounded once, as torch.arange does.
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    places = torch.arange(plain(shape[0]), dtype=wide, device=device)
    return (places * plain(step) + plain(start)).to(dtype)


def _iota_split(node: Node, factor: str, start: Any, size: Any) -> Piece:
    first, step = node.attrs.get("start", 0), node.attrs.get("step", 1)
    return Piece({"shape": (size,), "start": first + start * step})


def _full_infer(
    shape: Sequence[Dim], value: Any, dtype: torch.dtype, device: str | None = None
) -> tuple[TensorType, ...]:
    return (TensorType(shape, dtype, device=device),)


def _full_ref(
    shape: Sequence[int], value: Any, dtype: torch.dtype, device: str | None = None
) -> torch.Tensor:
    return torch.full(concrete(shape), plain(value), dtype=dtype, device=device)


GENERATE = table(
    Op(
        "iota",
        "generate",
        dims=_dims,
        ref=_iota_ref,
        infer=_iota_infer,
        split=_iota_split,
        doc="iota(shape=(n,), start=, step=, dtype=): start + i*step",
    ),
    Op(
        "full",
        "generate",
        dims=_dims,
        ref=_full_ref,
        infer=_full_infer,
        split=lambda node, factor, start, size: Piece({"shape": piece_shape(node, factor, size)}),
        doc="full(shape=, value=, dtype=)",
    ),
)
