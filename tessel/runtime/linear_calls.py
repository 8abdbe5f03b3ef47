"""Calls of linear attention's kernels, whatever the device: what they give, and sizes of zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

__all__ = ["LinearCalls"]


class LinearCalls(ABC):
    """Kernels that are called as the references of the operators are."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``linear_attention_ref``."""
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        last = torch.empty((*q.shape[:2], q.shape[3], v.shape[3]), dtype=torch.float32, device=v.device)
        if 0 in (*q.shape, v.shape[3]):
            return o.zero_(), last.zero_() if start is None else last.copy_(start)
        self._forward(q, k, v, decay, beta, start, o, last)
        return o, last

    def backward(
        self,
        grad: torch.Tensor,
        grad_last: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """See ``linear_attention_backward_ref``."""
        if 0 not in (*q.shape, v.shape[3]):
            return self._backward(grad, grad_last, q, k, v, decay, beta, start)
        none = torch.empty(0, dtype=torch.float32, device=q.device)
        found = [none if x is None else torch.zeros_like(x) for x in (q, k, v, decay, beta, start)]
        if start is not None and grad_last is not None:
            found[5] = grad_last.clone()
        return tuple(found)

    @abstractmethod
    def _forward(self, q: Any, k: Any, v: Any, decay: Any, beta: Any, start: Any, o: Any, last: Any) -> None:
        """Write the results; no size is zero."""

    @abstractmethod
    def _backward(
        self, grad: Any, grad_last: Any, q: Any, k: Any, v: Any, decay: Any, beta: Any, start: Any
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of q, k, v, decay, beta and start, empty for what is None; no size is zero."""
