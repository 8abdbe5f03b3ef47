"""Recurrences: found however they are written, and right as C++ kernels against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._higher_order_ops.associative_scan import associative_scan

import tessel
from tessel.errors import TesselError

Tensor = torch.Tensor
F = torch.nn.functional


def combine(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1]


def tree(a: Tensor, b: Tensor) -> Tensor:
    return associative_scan(combine, (a, b), dim=1, combine_mode="generic")[1]


def doubling(a: Tensor, b: Tensor) -> Tensor:
    """Hillis and Steele: every step doubles how far back each place looks."""
    d = 1
    while d < a.shape[1]:
        b = torch.cat([b[:, :d], a[:, d:] * b[:, :-d] + b[:, d:]], 1)
        a = torch.cat([a[:, :d], a[:, d:] * a[:, :-d]], 1)
        d *= 2
    return b


def chain(a: Tensor, b: Tensor) -> Tensor:
    states = [b[:, 0]]
    for t in range(1, a.shape[1]):
        states.append(a[:, t] * states[-1] + b[:, t])
    return torch.stack(states, 1)


def compiled(fn: Callable[..., Any], *args: Tensor) -> tuple[Any, list[str], tessel.report.Report]:
    """The result, the families of the kernels, and the report."""
    torch._dynamo.reset()
    run = tessel.compile(fn, target="cpu")
    with torch.no_grad():
        got = run(*args)
    report = tessel.explain(run)
    return got, [k.family for k in report.kernels], report


@pytest.mark.parametrize("write", [tree, doubling, chain])
@pytest.mark.parametrize("shape", [(3, 13, 5), (1, 21, 64), (2, 8, 300)], ids=str)
def test_each_way_of_writing_is_one_kernel(write: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for dtype, far in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        a, b = torch.rand(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        got, families, _ = compiled(write, a, b)
        assert families == ["scan"]
        want = chain(a.double(), b.double())
        assert (got - want).abs().max() <= far * want.abs().max()


def test_infinities_and_nan_go_on_from_where_they_are() -> None:
    a, b = torch.rand(2, 24, 32), torch.randn(2, 24, 32)
    a[0, 0] = torch.nan  # the first factor has nothing to multiply
    b[0, 5, 3], b[1, 7, 9], a[1, 11, 2] = torch.inf, torch.nan, -torch.inf
    got, families, _ = compiled(chain, a, b)
    assert families == ["scan"]
    assert torch.equal(got.isnan(), chain(a, b).isnan()) and torch.equal(got.isinf(), chain(a, b).isinf())


def test_another_rule_stays_what_it_is() -> None:
    def other(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[0] * right[1] + left[1]

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return associative_scan(other, (a, b), dim=1, combine_mode="generic")[1]

    def skips(a: Tensor, b: Tensor) -> Tensor:
        states = [b[:, 0]]
        for t in range(1, a.shape[1]):
            states.append(a[:, t] * states[-1] + b[:, max(t - 1, 1)])
        return torch.stack(states, 1)

    a, b = torch.rand(2, 16, 4, dtype=torch.float64), torch.randn(2, 16, 4, dtype=torch.float64)
    got, families, _ = compiled(fn, a, b)
    assert "scan" not in families
    torch.testing.assert_close(got, torch.compile(fn, backend="eager")(a, b))
    torch.testing.assert_close(compiled(skips, a, b)[0], skips(a, b))


def selective(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """The state of a selective scan folded at every step; dt, u and z are [batch, time, channel]."""
    dt, u = F.softplus(dt.transpose(1, 2)), u.transpose(1, 2)
    a = torch.exp(A[None, :, None, :] * dt[..., None])
    b = dt[..., None] * B[:, None] * u[..., None]
    h = associative_scan(combine, (a, b), dim=2, combine_mode="generic")[1]
    y = torch.matmul(h.transpose(1, 2), C.unsqueeze(-1)).squeeze(-1)
    return y * F.silu(z)


def selective_ref(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, z: Tensor) -> Tensor:
    dt = F.softplus(dt)[..., None]
    h = chain(torch.exp(A * dt), dt * B[:, :, None] * u[..., None])
    return (h * C[:, :, None]).sum(-1) * F.silu(z)


@pytest.mark.parametrize("sizes", [(1, 32, 64, 16), (2, 48, 33, 5), (1, 20, 20, 64), (3, 7, 11, 3)], ids=str)
def test_a_selective_scan_is_one_kernel(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch, wide, time, state = sizes
    shapes = [(batch, time, wide), (wide, state), *[(batch, time, state)] * 2, *[(batch, time, wide)] * 2]
    args = [torch.randn(s, dtype=torch.float64) for s in shapes]
    args[1] = -args[1].abs()
    want = selective_ref(*args)
    for dtype, far in ((torch.float32, 1e-5), (torch.float64, 1e-13), (torch.bfloat16, 5e-2)):
        few = [x.to(dtype) for x in args]
        got, families, _ = compiled(selective, *few)
        assert families == ["scan"]
        exact = want if dtype is not torch.bfloat16 else selective_ref(*(x.double() for x in few))
        assert (got - exact).abs().max() <= far * exact.abs().max()


def test_a_norm_before_a_recurrence_is_a_kernel_of_its_own() -> None:
    def fn(a: Tensor, x: Tensor) -> Tensor:
        return chain(a, x / x.norm(dim=-1, keepdim=True))

    torch.manual_seed(0)
    a, x = torch.rand(2, 12, 40, dtype=torch.float64), torch.randn(2, 12, 40, dtype=torch.float64)
    got, families, _ = compiled(fn, a, x)
    assert sorted(families) == ["reduction", "scan"]
    torch.testing.assert_close(got, fn(a, x))


def test_sums_over_time_stay_apart() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return chain(a, b).sum(1)

    a, b = torch.rand(3, 10, 40, dtype=torch.float64), torch.randn(3, 10, 40, dtype=torch.float64)
    got, families, _ = compiled(fn, a, b)
    assert sorted(families) == ["reduction", "scan"]
    torch.testing.assert_close(got, fn(a, b))


def test_depthwise_convolutions_in_any_padding_and_layout() -> None:
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 6, 17), (6, 1, 4), (6,)))
    for padding, dilation, turned in ((0, 2, False), (3, 1, False), (3, 1, True), (20, 2, True)):

        def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.silu(F.conv1d(x, w, b, padding=padding, dilation=dilation, groups=6))  # noqa: B023

        given = x.transpose(1, 2).contiguous().transpose(1, 2) if turned else x
        got, families, report = compiled(fn, given, w, b)
        assert set(families) == {"pointwise"} and not report.compilations[0].calls
        torch.testing.assert_close(got, fn(given, w, b))
        assert got.stride() == fn(given, w, b).stride()


@pytest.mark.parametrize("steps", [1, 2, 13])
def test_doubling_is_the_recurrence(steps: int) -> None:
    from tessel.ops.scan import linear_scan_doubling, linear_scan_ref

    a, b = torch.rand(3, steps, 2, dtype=torch.float64), torch.randn(3, steps, 2, dtype=torch.float64)
    a[0, 0] = torch.nan  # the first factor has nothing to multiply
    torch.testing.assert_close(linear_scan_doubling(a, b, 1), linear_scan_ref(a, b, 1))


def test_the_operator_says_what_it_needs() -> None:
    from tessel.ir.node import Builder, make_input
    from tessel.ir.types import TensorType
    from tessel.ops import OPS

    a, b = (make_input("x", TensorType((4, 3), d)) for d in (torch.float32, torch.float64))
    with pytest.raises(TesselError, match="one dtype"):
        Builder((a, b)).add(OPS["linear_scan"], a.out, b.out, dim=0)
