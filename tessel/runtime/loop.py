"""Runs a loop: a step that is a compiled program, again and again, or one kernel that goes through all steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..tiles.kernel import Kernel

__all__ = ["Loop", "LoopKernel"]


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


class LoopKernel:
    """A whole loop in one launch, called as ``Loop`` is.

    Args of the constructor:
        kernel: what ``tiles/loops.py`` made; slots of its inputs are places among carries, slices and extras.
        launch: the kernel, loaded.
        grid: how many programs.
    """

    def __init__(self, kernel: Kernel, launch: Callable[..., None], grid: tuple[int, ...]) -> None:
        self.slots = [p.slot for p in kernel.params if not p.out]
        self.results: list[tuple[Any, torch.dtype]] = [(p.type.shape, p.type.dtype) for p in kernel.params if p.out]
        self.launch, self.grid = launch, grid

    def __call__(
        self, init: Sequence[torch.Tensor], xs: Sequence[torch.Tensor], extras: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        operands = [*init, *xs, *extras]
        outs = [torch.empty(shape, dtype=dtype, device=xs[0].device) for shape, dtype in self.results]
        self.launch(self.grid, *(operands[i] for i in self.slots), *outs)
        return tuple(outs)
