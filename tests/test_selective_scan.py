"""The selective scan: found in a graph, its kernel against float64, odd sizes and values."""

from __future__ import annotations

import pytest
import torch
from torch._higher_order_ops.associative_scan import associative_scan

import tessel
from tessel.frontend.scan_op import selective_scan
from tessel.ops.selective import selective_scan_backward_ref, selective_scan_ref
from tessel.runtime.scan_cpu import SelectiveScan

Tensor = torch.Tensor


def operands(b: int, time: int, d: int, n: int) -> list[Tensor]:
    torch.manual_seed(b + time + d + n)
    shapes = [(b, time, d), (b, time, d), (b, time, d), (d, n), (b, time, n), (b, time, n)]
    grad, w, dt, A, B, C = (torch.randn(s) for s in shapes)
    return [grad, w, dt.abs(), -A.abs(), B, C]


def test_the_reference_is_the_gradient() -> None:
    grad, *given = (x.double() for x in operands(2, 7, 3, 4))
    given = [x.requires_grad_() for x in given]
    want = torch.autograd.grad((selective_scan_ref(*given) * grad).sum(), given)
    for x, y in zip(selective_scan_backward_ref(grad, *given), want, strict=True):
        torch.testing.assert_close(x, y)
    assert torch.autograd.gradcheck(
        selective_scan, [x.detach()[:1].requires_grad_() if x.dim() == 3 else x for x in given]
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "sizes", [(2, 37, 33, 5), (1, 16, 16, 16), (3, 1, 7, 3), (1, 100, 40, 16), (1, 17, 70, 64), (2, 0, 3, 4)], ids=str
)
def test_the_kernel(sizes: tuple[int, int, int, int], threads: int) -> None:
    given = operands(*sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = SelectiveScan().backward(*given)
    finally:
        torch.set_num_threads(before)
    for x, y in zip(got, selective_scan_backward_ref(*(x.double() for x in given)), strict=True):
        assert x.shape == y.shape
        if x.numel():
            assert (x - y).abs().max() <= 3e-6 * y.abs().max().clamp_min(1e-6)


def test_values_that_are_not_finite_spread_as_they_should() -> None:
    grad, w, dt, A, B, C = operands(1, 40, 18, 4)
    w[0, 20, 3], B[0, 30, 1] = torch.nan, torch.inf
    got = SelectiveScan().backward(grad, w, dt, A, B, C)
    want = selective_scan_backward_ref(grad, w, dt, A, B, C)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.isnan(), y.isnan())


def by_scan(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    a = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
    b = dt[:, :, :, None] * B[:, None] * u[:, :, :, None]
    h = associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), dim=2, combine_mode="generic")[1]
    return torch.matmul(h.transpose(1, 2), C.unsqueeze(-1)).squeeze(-1).transpose(1, 2)


def by_loop(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    a, b = torch.exp(dt[..., None] * A[:, None]), (u * dt)[..., None] * B.unsqueeze(1)
    h, out = torch.zeros(dt.shape[0], A.shape[0], A.shape[1], dtype=dt.dtype), []
    for t in range(dt.shape[2]):
        h = a[:, :, t] * h + b[:, :, t]
        out.append(torch.matmul(h, C[:, t, :].unsqueeze(-1))[:, :, 0])
    return torch.stack(out, -1)


@pytest.mark.parametrize("fn", [by_scan, by_loop], ids=lambda f: f.__name__)
def test_found_where_it_is_differentiated(fn: object) -> None:
    b, d, n, time = 2, 20, 3, 11
    torch.manual_seed(0)
    given = [
        torch.rand(b, d, time),
        -torch.rand(d, n),
        *(torch.randn(b, time, n) for _ in range(2)),
        torch.randn(b, d, time),
    ]
    given = [x.requires_grad_() for x in given]
    torch._dynamo.reset()
    made = tessel.compile(fn, target="cpu", fullgraph=True)
    got = made(*given)
    exact = [x.detach().double().requires_grad_() for x in given]
    want = by_loop(*exact)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    grads = torch.autograd.grad(got.sin().sum(), given)
    for x, y in zip(grads, torch.autograd.grad(want.sin().sum(), exact), strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()
    forward, backward = tessel.explain(made).compilations
    assert [k.family for k in forward.kernels] == ["scan"]
    assert "selective_scan_backward" in [c.operator for c in backward.calls]
    # no value of all states is kept or made
    sizes = [t.shape for c in (forward, backward) for node in c.passes[-1].graph.nodes for t in node.types]
    assert not any(torch.Size(s).numel() >= b * d * n * time for s in sizes)
