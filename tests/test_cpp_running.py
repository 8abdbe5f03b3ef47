"""Running folds as C++ kernels: along memory and across it, with what is fused before and after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels import check, compiled, poisoned
from test_scan_triton import running_kernel

import tessel
from tessel.ir.types import symbol
from tessel.ops.scan import FOLDS, running_ref
from tessel.runtime.native import NativeKernel

Tensor = torch.Tensor
BF16, F32, F64, I32, I64 = torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64
LENGTHS = tuple(map(symbol, ("s0", "s1", "s2")))
CASES = [
    *((fold, dim, F32) for fold in FOLDS for dim in (1, 2)),
    *(("sum", dim, dtype) for dim in (1, 2) for dtype in (BF16, F64, I64)),
    *(("prod", 2, I32), ("amax", 1, BF16), ("amin", 2, I64), ("logsumexp", 2, BF16), ("logsumexp", 2, F64)),
]

pytestmark = pytest.mark.usefixtures("same_start")


@cache
def kernels() -> list[NativeKernel]:
    """Of any lengths."""
    made = (running_kernel(LENGTHS, dim, fold, dtype) for fold, dim, dtype in CASES)
    return compiled([replace(k, name=f"running_{i}") for i, k in enumerate(made)])


def run(which: int, x: Tensor) -> Tensor:
    out = poisoned(x.shape, x.dtype)
    kernels()[which]((), x, out, *x.shape)
    return out


def right(which: int, x: Tensor) -> None:
    """Sums and products of floats have the digits of a double till they are stored; log-sums are of as many terms."""
    fold, dim, dtype = CASES[which]
    want = running_ref(x.double() if dtype.is_floating_point else x, dim, fold)
    size = running_ref(x.double().abs(), dim, "prod" if fold == "prod" else "sum") + 1
    steps = 16 if fold == "logsumexp" else 2 * x.shape[dim] if dtype == F64 else 0
    check(run(which, x), want, size, steps)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(range(len(CASES))),
    st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 40)),
    st.sampled_from((1, 7)),
)
@example(0, (1, 1, 1), 1)
def test_any_shape(which: int, shape: tuple[int, int, int], longer: int) -> None:
    """``longer`` makes steps of several stretches."""
    fold, dim, dtype = CASES[which]
    sizes = list(shape)
    sizes[dim] = sizes[dim] * (longer if dtype != BF16 else 1) + longer
    x = torch.randn(sizes, dtype=F64) * (0.3 if fold == "prod" else 2)
    right(which, x.to(dtype) if dtype.is_floating_point else (x * 20).to(dtype))


def test_bits_do_not_depend_on_the_threads() -> None:
    for which in range(4):
        x = torch.randn(3, 133, 101)
        torch.set_num_threads(1)
        one = run(which, x)
        torch.set_num_threads(2)
        assert torch.equal(run(which, x), one)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("fold", FOLDS)
def test_what_is_not_finite_goes_on_from_where_it_is(fold: str, dim: int) -> None:
    x = torch.randn(6, 40, 40)
    if dim == 1:
        x = x.transpose(1, 2)  # rows, written as they come
    x[0, 0, 17], x[1, 1, 3], x[2, 2, 5], x[2, 2, 30] = torch.nan, torch.inf, -torch.inf, torch.inf
    x[3, :, :9], x[4, 3, 20], x[4, 3, 21], x[5, 1, 2] = -torch.inf, 0.0, torch.inf, -0.0
    x = x.transpose(1, 2).contiguous() if dim == 1 else x
    got, want = run(CASES.index((fold, dim, F32)), x), running_ref(x, dim, fold)
    for found, wanted in ((got.isnan(), want.isnan()), (got == torch.inf, want == torch.inf)):
        assert torch.equal(found, wanted)
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
def test_log_sums_far_apart(dim: int) -> None:
    """Terms whose exponentials have no number, growing and falling."""
    x = torch.linspace(-3000, 3000, 37).repeat(2, 37, 1)
    x[1] = x[1].flip(-1)
    x = x.transpose(1, 2).contiguous() if dim == 1 else x
    right(CASES.index(("logsumexp", dim, F32)), x)


# ---------------------------------------------------------------- in graphs


def through(fn: Callable[..., Any], *args: Tensor) -> tuple[Any, tessel.report.Report]:
    torch._dynamo.reset()
    made = tessel.compile(fn, target="cpu", fullgraph=True, dynamic=False)
    with torch.no_grad():
        return made(*args), tessel.explain(made)


def nucleus(x: Tensor, y: Tensor) -> Tensor:
    """What a sampler keeps: the sum before each place is not yet above a bound."""
    p = (x * 0.1).exp()
    return torch.where(p.cumsum(-1) - p < 9.0, y, -torch.inf)


def chained(x: Tensor, y: Tensor) -> Any:
    total = (x * y).cumsum(-1)
    return total, (total - y).cummax(-1).values * 2


def backwards(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flip(-1).cumsum(-1)


def across(x: Tensor, y: Tensor) -> Any:
    return x.sigmoid().cumsum(0) * y, torch.logcumsumexp(x - y, 0)


def turned(x: Tensor, y: Tensor) -> Tensor:
    return x.t().cumsum(0).relu() + y.t()


FUSED = (nucleus, chained, backwards, across, turned)


def test_what_stands_before_and_after_is_one_kernel_with_them() -> None:
    def fn(x: Tensor, y: Tensor) -> Any:
        return torch.utils._pytree.tree_leaves([f(x, y) for f in FUSED])

    x, y = torch.randn(33, 601), torch.randn(33, 601)
    got, report = through(fn, x, y)
    assert [k.family for k in report.kernels] == ["scan"] * (len(FUSED) + 1)  # two of ``across``
    assert not report.compilations[0].calls
    for a, b in zip(got, fn(x.double(), y.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=3e-5)


def test_positions_of_tokens() -> None:
    """Booleans are counted in whole numbers."""
    mask = torch.rand(5, 77) > 0.3
    got, report = through(lambda m: (m.cumsum(-1) - 1).clamp(min=0), mask)
    assert torch.equal(got, (mask.cumsum(-1) - 1).clamp(min=0)) and got.dtype == I64
    assert [k.family for k in report.kernels] == ["scan"]


def test_places_of_extremes_stay_a_call() -> None:
    x = torch.randn(4, 30)
    got, report = through(lambda x: x.cummax(-1), x)
    assert torch.equal(got[0], x.cummax(-1)[0]) and torch.equal(got[1], x.cummax(-1)[1])
    assert not report.kernels
