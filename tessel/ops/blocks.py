"""Matrices a few rows at a time: what is made in between stays in a cache, and no second matrix is written."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["VALUES", "row_blocks"]

VALUES = 2**19
"""Of a block: 2 MiB of float32, so that a few of them lie in the caches of most CPUs, and one call of torch is short
beside what it does."""


def row_blocks(x: Tensor) -> Iterator[slice]:
    """The rows of a matrix ``[n, k]``, some at a time; all at once where they do not lie in this machine's memory.

    >>> import torch
    >>> list(row_blocks(torch.empty(100, VALUES // 64)))
    [slice(0, 64, None), slice(64, 100, None)]
    """
    n, k = x.shape
    step = max(1, VALUES // max(k, 1)) if x.device.type == "cpu" else max(n, 1)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
