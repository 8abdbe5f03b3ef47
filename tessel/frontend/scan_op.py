"""Recurrences as operators that no tracer opens, with gradients that are recurrences themselves.

    linear_scan(a, b, dim, reverse) -> h        h[t] = a[t] * h[t - 1] + b[t],  h[0] = b[0]

a and b have one shape and one dtype. With ``reverse`` the steps go from the last to the first. The gradient is the
adjoint recurrence, run the other way:

    g[t] = dh[t] + a[t + 1] * g[t + 1],    db = g,    da[t] = g[t] * h[t - 1]

The kernels here are plain torch, for eager runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.scan import linear_scan_ref

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define("linear_scan(Tensor a, Tensor b, int dim, bool reverse) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _shifted(x: Tensor, dim: int, later: bool) -> Tensor:
    """What each step's neighbour has: of the step after it (``later``) or before it, zero where there is none."""
    n = x.shape[dim]
    kept = x.narrow(dim, 1, n - 1) if later else x.narrow(dim, 0, n - 1)
    behind = [0, 0] * (x.dim() - 1 - dim)
    return torch.nn.functional.pad(kept, [*behind, 0, 1] if later else [*behind, 1, 0])


def _fake(a: Tensor, b: Tensor, dim: int, reverse: bool) -> Tensor:
    torch._check(a.shape == b.shape and a.dtype == b.dtype, lambda: "linear_scan: a and b differ in shape or dtype")
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, ctx.dim, ctx.reverse = inputs
    ctx.save_for_backward(a, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
    a, h = ctx.saved_tensors
    dim = ctx.dim % a.dim()
    g = linear_scan(_shifted(a, dim, not ctx.reverse), grad, dim, not ctx.reverse)
    da = g * _shifted(h, dim, ctx.reverse) if ctx.needs_input_grad[0] else None
    return da, g, None, None


_LIB.impl("linear_scan", linear_scan_ref, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::linear_scan", _fake, lib=_LIB)
torch.library.register_autograd("tessel::linear_scan", _differentiate, setup_context=_setup, lib=_LIB)

linear_scan = torch.ops.tessel.linear_scan.default

__all__ = ["linear_scan"]
