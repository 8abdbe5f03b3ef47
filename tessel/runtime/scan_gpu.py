"""``selective_scan_backward`` by Triton kernels: what a GPU runs, and through the interpreter the CPU.

Chunk by chunk, as on the CPU; sums over blocks of channels and over chunks are added up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch

from ..codegen.selective import PARTS, selective_source
from .fused_gpu import FusedKernels

__all__ = ["GpuSelective"]


class GpuSelective(FusedKernels):
    """The gradients of ``selective_scan``; the forward is opened, and fused by the fuse pass."""

    def backward(
        self, grad: torch.Tensor, w: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """See ``selective_scan_backward_ref``."""
        (batches, steps, channels), states = w.shape, A.shape[1]
        if w.numel() == 0 or states == 0:
            return tuple(torch.zeros_like(x) for x in (w, dt, A, B, C))
        chunks_of, carry, gradients = (
            self.get((part, w.dtype), lambda part=part: selective_source(part, w.dtype, self.target)) for part in PARTS
        )
        knobs = gradients.source.knobs
        chunks, blocks = -(-steps // knobs["BT"]), -(-channels // knobs["BD"])
        sizes = (batches, steps, channels, states)
        wide: Any = {"dtype": torch.float32, "device": w.device}
        grad, w, dt, A, B, C = (x.contiguous() for x in (grad, w, dt, A, B, C))
        state, adjoint = torch.empty((2, batches * chunks, states, channels), **wide)
        total = torch.empty((batches * chunks, channels), **wide)
        dw, ddt = torch.empty_like(w), torch.empty_like(w)
        db, dc = torch.empty((2, blocks, batches, steps, states), **wide)
        grid = (batches * chunks * blocks,)
        chunks_of(grid, grad, w, dt, A, B, C, state, adjoint, total, *sizes)
        chains = -(-batches * states * channels // carry.source.knobs["BD"])
        carry((chains,), A, total, state, adjoint, *sizes)
        gradients(grid, grad, w, dt, A, B, C, adjoint, state, dw, ddt, db, dc, *sizes)
        dA = state.sum(0).t()  # each chunk's part lies where its state was
        return dw, ddt, dA.to(w.dtype), db.sum(0).to(w.dtype), dc.sum(0).to(w.dtype)
