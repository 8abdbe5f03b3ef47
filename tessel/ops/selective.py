"""The selective scan of state-space models (Mamba), whose states of every step are never written.

    h[t] = exp(dt[t] * A) * h[t - 1] + w[t] * B[t],   y[t] = sum over n of C[t] * h[t]

    w, dt  [batch, time, d]      A  [d, n]      B, C  [batch, time, n]      h  [batch, d, n]

w is what enters, usually dt * u. The formulas are those of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with
Selective State Spaces"; the backward goes through time from the end, with states made again from those kept at the
beginning of every chunk, as they describe.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import check
from ..ir.node import Builder, Node, Op, Value
from ..ir.types import TensorType, dim_equal, product
from .common import HALVES, arg_types, need_tensor, result, table
from .elementwise import ELEMENTWISE
from .reduce import REDUCE
from .scan import SCAN, linear_scan_ref
from .view import VIEW


def _check(w: Any, dt: Any, A: Any, B: Any, C: Any) -> None:
    need_tensor("selective_scan", w, dt, A, B, C)
    ranks = [t.rank for t in (w, dt, A, B, C)]
    check(ranks == [3, 3, 2, 3, 3], lambda: f"selective_scan: ranks {ranks} of w, dt, A, B, C; they are 3, 3, 2, 3, 3")
    (b, time, d), n = w.shape, A.shape[1]
    want = [(dt, (b, time, d)), (A, (d, n)), (B, (b, time, n)), (C, (b, time, n))]
    fits = all(dim_equal(x, y) for t, shape in want for x, y in zip(t.shape, shape, strict=True))
    check(fits, lambda: f"selective_scan: shapes of {w}, {dt}, {A}, {B} and {C} do not fit together")
    same = len({t.dtype for t in (w, dt, A, B, C)}) == 1 and w.dtype.is_floating_point
    check(same, lambda: "selective_scan: operands must be floats of one dtype; cast them")


def selective_scan_ref(
    w: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> torch.Tensor:
    """The definition, with every state written; halves are computed in f32."""
    dtype = w.dtype
    w, dt, A, B, C = _widened(w, dt, A, B, C)
    return (_states(w, dt, A, B) * C[:, :, None]).sum(-1).to(dtype)


def _widened(*xs: torch.Tensor) -> list[torch.Tensor]:
    return [x.float() if x.dtype in HALVES else x for x in xs]


def _states(w: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return linear_scan_ref(torch.exp(dt[..., None] * A), w[..., None] * B[:, :, None], 1)


def selective_scan_backward_ref(
    grad: torch.Tensor, w: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients with respect to w, dt, A, B and C, by the adjoint recurrence, with every state written."""
    dtype = w.dtype
    grad, w, dt, A, B, C = _widened(grad, w, dt, A, B, C)
    a, h = torch.exp(dt[..., None] * A), _states(w, dt, A, B)
    before = torch.nn.functional.pad(h[:, :-1], (0, 0, 0, 0, 1, 0))
    later = torch.nn.functional.pad(a[:, 1:], (0, 0, 0, 0, 0, 1))
    g = linear_scan_ref(later, grad[..., None] * C[:, :, None], 1, reverse=True)
    q = g * before * a
    found = (
        (g * B[:, :, None]).sum(-1),
        (q * A).sum(-1),
        (q * dt[..., None]).sum((0, 1)),
        (g * w[..., None]).sum(2),
        (grad[..., None] * h).sum(2),
    )
    return tuple(x.to(dtype) for x in found)


def _infer(w: Any, dt: Any, A: Any, B: Any, C: Any) -> tuple[TensorType, ...]:
    _check(w, dt, A, B, C)
    return (result(w.shape, w.dtype, w),)


def _infer_backward(grad: Any, w: Any, dt: Any, A: Any, B: Any, C: Any) -> tuple[TensorType, ...]:
    _check(w, dt, A, B, C)
    check(grad.shape == w.shape, lambda: f"selective_scan_backward: a gradient {grad} for results like {w}")
    return tuple(result(t.shape, t.dtype, t) for t in (w, dt, A, B, C))


def _flops(passes: int) -> Any:
    def flops(node: Node) -> Any:
        A = arg_types(node)[-3]
        return product((passes, *arg_types(node)[-5].shape, A.shape[1]))

    return flops


def _opened(b: Builder, node: Node) -> tuple[Value, ...]:
    """In operators that the fuse pass makes one kernel of."""
    w, dt, A, B, C = node.args
    (batch, time, d), n = w.shape, A.shape[1]
    ops = {**ELEMENTWISE, **REDUCE, **SCAN, **VIEW}

    def wide(v: Value, *shape: Any) -> Value:
        return b.add(ops["reshape"], v, shape=shape)

    dtype = w.dtype
    if dtype in HALVES:
        w, dt, A, B, C = (b.add(ops["cast"], v, dtype=torch.float32) for v in (w, dt, A, B, C))
    dt, w = (wide(v, batch, time, d, 1) for v in (dt, w))
    B, C = (wide(v, batch, time, 1, n) for v in (B, C))
    factor = b.add(ops["exp"], b.add(ops["mul"], dt, wide(A, 1, 1, d, n)))
    states = b.add(ops["linear_scan"], factor, b.add(ops["mul"], w, B), dim=1)
    y = b.add(ops["sum"], b.add(ops["mul"], states, C), dims=(3,), keepdim=False)
    return (y if dtype not in HALVES else b.add(ops["cast"], y, dtype=dtype),)


SELECTIVE = table(
    Op(
        "selective_scan",
        "composite",
        dims="b t* d, b t* d, d n+, b t* n+, b t* n+ -> b t* d",
        ref=selective_scan_ref,
        infer=_infer,
        flops=_flops(7),
        decompose=_opened,
        cost=1000,
        doc="selective_scan(w, dt, A, B, C) -> y: h = exp(dt A) h + w B, y = C h, states never written",
    ),
    Op(
        "selective_scan_backward",
        "library",
        dims="b+ t* d+, b+ t* d+, b+ t* d+, d+ n+, b+ t* n+, b+ t* n+ -> b+ t* d+, b+ t* d+, d+ n+, b+ t* n+, b+ t* n+",
        ref=selective_scan_backward_ref,
        infer=_infer_backward,
        flops=_flops(25),
        cost=1000,
        doc="selective_scan_backward(grad, w, dt, A, B, C) -> (dw, ddt, dA, dB, dC)",
    ),
)

__all__ = ["SELECTIVE", "selective_scan_backward_ref", "selective_scan_ref"]
