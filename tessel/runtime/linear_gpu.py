"""``linear_attention`` and its backward by Triton kernels: what a GPU runs, and through the interpreter the CPU."""

from __future__ import annotations

from typing import Any

import torch

from ..codegen.fused_linear import linear_source
from .fused_gpu import FusedKernels
from .linear_calls import LinearCalls

__all__ = ["GpuLinear"]


class GpuLinear(FusedKernels, LinearCalls):
    """The kernels, loaded and kept by what they depend on.

    Gradients of q, k, beta and factors are sums over blocks of values, added in the order of the blocks.
    """

    def _kernel(self, part: str, q: torch.Tensor, v: torch.Tensor, **kind: bool) -> Any:
        widths = (q.shape[3], v.shape[3])
        key = (part, q.dtype, *widths, *sorted(kind.items()))
        return self.get(key, lambda: linear_source(part, q.dtype, self.target, *widths, kind))

    def _forward(self, q: Any, k: Any, v: Any, decay: Any, beta: Any, start: Any, o: Any, last: Any) -> None:
        self._run_forward(q, k, v, decay, beta, start, [o, last], keep=False)

    def _run_forward(
        self, q: Any, k: Any, v: Any, decay: Any, beta: Any, start: Any, outs: list[torch.Tensor], keep: bool
    ) -> None:
        kind = {"delta": beta is not None, "start": start is not None, "keep": keep, **_factors(decay)}
        kernel = self._kernel("forward", q, v, **kind)
        given = [x.contiguous() for x in (q, k, v, decay, beta, start) if x is not None]
        b, h, steps, _ = q.shape
        kernel((b * h * _blocks(kernel, v),), *given, *outs, steps)

    def _backward(
        self, grad: Any, grad_last: Any, q: Any, k: Any, v: Any, decay: Any, beta: Any, start: Any
    ) -> tuple[torch.Tensor, ...]:
        b, h, steps, keys = q.shape
        values = v.shape[3]

        def room(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=q.device)

        none = room(0)
        kind = {"delta": beta is not None, "start": start is not None, "last_grad": grad_last is not None}
        kind |= _factors(decay)
        # With a factor for every channel one kernel goes back step by step; else the adjoints of the states are kept,
        # and gradients of all chunks are made side by side.
        parts = ("backward",) if kind["channels"] else ("adjoints", "gradients")
        kernels = [self._kernel(part, q, v, **kind) for part in parts]
        chunks, blocks = -(-steps // kernels[0].source.knobs["C"]), _blocks(kernels[0], v)
        kept = [room(b * h, chunks, keys, values)]  # states, and what steps write before beta
        kept += [] if beta is None else [room(*v.shape)]
        self._run_forward(q, k, v, decay, beta, start, kept, keep=True)
        dq, dk = (room(blocks, b, h, steps, keys) for _ in range(2))
        dv = torch.empty(v.shape, dtype=v.dtype, device=q.device)
        of_steps = [none if x is None else room(blocks, *x.shape) for x in (beta, decay)]
        down = [none if start is None else torch.empty_like(start, memory_format=torch.contiguous_format)]
        given = [x.contiguous() for x in (q, k, v, decay, beta) if x is not None]
        ends = [] if grad_last is None else [grad_last.contiguous()]
        wanted = [x for x in of_steps if x.numel()]
        starts = [x for x in down if x.numel()]
        grad = grad.contiguous()
        if kind["channels"]:
            kernels[0]((b * h * blocks,), *given, *kept, grad, *ends, dq, dk, dv, *wanted, *starts, steps)
        else:
            # adjoints where chunks end, and gradients of what steps write
            between = [torch.empty_like(x) for x in kept]
            kernels[0]((b * h * blocks,), *given, grad, *ends, *between, dv, *starts, steps)
            kernels[1]((b * h * chunks * blocks,), *given, *kept, grad, *between, dq, dk, *wanted, steps)
        dbeta, ddecay = (x.sum(0) if x.numel() else x for x in of_steps)
        return dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dv, ddecay, dbeta, *down


def _factors(decay: torch.Tensor | None) -> dict[str, bool]:
    return {"decay": decay is not None, "channels": decay is not None and decay.dim() == 4}


def _blocks(kernel: Any, v: torch.Tensor) -> int:
    return int(-(-v.shape[3] // kernel.source.knobs["BV"]))
