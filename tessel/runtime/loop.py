"""Runs a loop whose step is a compiled program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Loop"]


class Loop:
    """``loop(init, xs, extras)``: the last carries, then the results of all steps, as ``loop_ref`` gives them.

    Args of the constructor:
        step: takes a list of carries, slices and extras and gives a list of carries and results.
    """

    def __init__(self, step: Callable[[list[Any]], Sequence[Any]]) -> None:
        self.step = step

    def __call__(
        self, init: Sequence[torch.Tensor], xs: Sequence[torch.Tensor], extras: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        carries: list[torch.Tensor] = list(init)
        results: list[torch.Tensor] = []
        length = xs[0].shape[0]
        for t, parts in enumerate(zip(*(x.unbind(0) for x in xs), strict=True)):
            out = self.step([*carries, *parts, *extras])
            carries = list(out[: len(init)])
            rest = out[len(init) :]
            if not t:
                results = [r.new_empty((length, *r.shape)) for r in rest]
            for whole, r in zip(results, rest, strict=True):
                whole[t].copy_(r)
        return (*carries, *results)
