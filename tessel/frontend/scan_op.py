"""Recurrences as operators that no tracer opens, with gradients that are recurrences themselves.

    linear_scan(a, b, dim, reverse) -> h        h[t] = a[t] * h[t - 1] + b[t],  h[0] = b[0]

a and b have one shape and one dtype. With ``reverse`` the steps go from the last to the first. The gradient is the
adjoint recurrence, run the other way:

    g[t] = dh[t] + a[t + 1] * g[t + 1],    db = g,    da[t] = g[t] * h[t - 1]

    selective_scan(w, dt, A, B, C) -> y         see ``ops/selective.py``; its gradient keeps no states

The kernels here are plain torch, for eager runs. ``scan_start`` and ``scan_result`` mark an associative scan while it
is captured (see ``scan_trace``); none is left in a graph that is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.scan import linear_scan_ref
from ..ops.selective import selective_scan_backward_ref, selective_scan_ref

_LIB = torch.library.Library("tessel", "FRAGMENT")
_LIB.define("linear_scan(Tensor a, Tensor b, int dim, bool reverse) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

_LIB.define(
    "selective_scan(Tensor w, Tensor dt, Tensor A, Tensor B, Tensor C) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIB.define(
    "selective_scan_backward(Tensor grad, Tensor w, Tensor dt, Tensor A, Tensor B, Tensor C) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define("scan_start(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("scan_result(Tensor x, Tensor ys) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.impl("scan_start", lambda x: x[0].clone(memory_format=torch.contiguous_format), "CompositeImplicitAutograd")
_LIB.impl("scan_result", lambda x, ys: torch.cat([x[:1], ys]), "CompositeImplicitAutograd")


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


def _empty_like_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _differentiate_selective(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.tessel.selective_scan_backward(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


_LIB.impl("selective_scan", selective_scan_ref, "CompositeExplicitAutograd")
_LIB.impl("selective_scan_backward", selective_scan_backward_ref, "CompositeExplicitAutograd")
torch.library.register_fake("tessel::selective_scan", lambda w, *_: _empty_like_all(w)[0], lib=_LIB)
torch.library.register_fake("tessel::selective_scan_backward", lambda _, *xs: _empty_like_all(*xs), lib=_LIB)
torch.library.register_autograd(
    "tessel::selective_scan",
    _differentiate_selective,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_LIB,
)

linear_scan = torch.ops.tessel.linear_scan.default
selective_scan = torch.ops.tessel.selective_scan.default

__all__ = ["linear_scan", "selective_scan"]
