"""Reductions whose vectors lie along the results: few terms each, results used under several numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from kernels import Program, compiled, fold_kernel, poisoned, rand

import tessel
from tessel.ir.types import symbol

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("terms", [2, 3, 7])
def test_a_fold_of_few_gathered_rows(terms: int) -> None:
    """Routed rows put back together; what follows the sum is stored, cast and squared."""

    def fn(rows: torch.Tensor, place: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = (rows.float() * weight[:, None])[place].reshape(-1, terms, rows.shape[1]).sum(1)
        z = x + y.to(x.dtype)
        wide = z.float()
        return z, wide, wide * wide

    torch.manual_seed(0)
    n, width = 12, 99
    place = torch.randperm(terms * n)
    rows = torch.randn(terms * n, width, dtype=torch.bfloat16)
    weight, x = torch.rand(terms * n), torch.randn(n, width, dtype=torch.bfloat16)
    torch._dynamo.reset()
    run = tessel.compile(fn, target="cpu")
    got = run(rows, place, weight, x)
    (kernel,) = tessel.explain(run).kernels
    assert "vectors across rows" in kernel.source
    y = (rows.double() * weight.double()[:, None])[place].reshape(n, terms, width).sum(1)
    for have, want in zip(got, (x.double() + y, x.double() + y, (x.double() + y) ** 2), strict=True):
        assert (have.double() - want).abs().max() <= 2e-2 * want.abs().max()
    with pytest.raises(IndexError, match="out of range"):
        run(rows, place + terms * n, weight, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(5000, 1024), (700, 99), (3000, 17), (600, 5000), (300, 33)], ids=str)
def test_folds_down_the_columns(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Threads share the rows, or the columns; sums lose no digits, NaN wins, and threads change no more than a bit."""
    rows, columns = size
    x = rand(rows, columns, dtype=dtype)
    odd = x.clone()
    odd[rows // 2, 3], odd[rows - 1, 5], odd[0, 7] = math.nan, math.inf, -math.inf
    given = {"sum": x, "amax": odd, "amin": odd}
    kernels = compiled(
        [dataclasses.replace(fold_kernel(op, v.t(), torch.float32), name=f"{op}_down") for op, v in given.items()]
    )
    threads = torch.get_num_threads()
    try:
        for (op, v), kernel in zip(given.items(), kernels, strict=True):
            got = []
            for n in (1, 3, 3):
                torch.set_num_threads(n)
                out = poisoned((columns,), torch.float32)
                kernel((), v.t(), out)
                got.append(out)
            assert torch.equal(got[1].view(torch.int32), got[2].view(torch.int32))
            want = getattr(v.double(), op)(dim=0)
            for out in got:
                if op == "sum":
                    assert ((out - want).abs() <= 2e-7 * v.double().abs().sum(0)).all()
                else:
                    assert torch.equal(out.nan_to_num(7e7), want.float().nan_to_num(7e7))
            assert ("_parts" in kernel.source.body) == (rows >= 512 and columns <= 4096)
    finally:
        torch.set_num_threads(threads)


def test_what_follows_a_fold_down_the_columns() -> None:
    """Two folds, one of which needs the other's result, and a result of one number a column that is cast and stored."""
    rows, columns = 900, 70
    x = rand(rows, columns).t()
    p = Program("reduction", x0=columns, r0=rows)
    a = p.like(x)
    spread, mean = p.param((columns,), torch.bfloat16, out=True), p.param((columns,), torch.float32, out=True)
    v = p.load(a, "x0", "r0")
    middle = p.op("div", p.fold("sum", v), float(rows))
    off = p.op("sub", v, middle)
    total = p.fold("sum", p.op("mul", off, off))
    p.store(mean, ("x0",), middle)
    p.store(spread, ("x0",), p.cast(p.op("sqrt", total), torch.bfloat16))
    (kernel,) = compiled([p.kernel("spread")])
    outs = [poisoned((columns,), torch.bfloat16), poisoned((columns,), torch.float32)]
    kernel((), x, *outs)
    wide = x.double()
    torch.testing.assert_close(outs[1].double(), wide.mean(1), rtol=1e-6, atol=1e-7)
    want = (wide - wide.mean(1, keepdim=True)).square().sum(1).sqrt()
    torch.testing.assert_close(outs[0].double(), want, rtol=5e-3, atol=0)


def test_a_fold_down_columns_of_a_size_known_at_run_time() -> None:
    s, t = symbol("s0"), symbol("s1")
    p = Program("reduction", x0=t, r0=s)
    a, o = p.param((t, s), torch.float32, (1, t)), p.param((t,), torch.float32, out=True)
    p.store(o, ("x0",), p.fold("sum", p.load(a, "x0", "r0")))
    (kernel,) = compiled([p.kernel("down")])
    for rows, columns in ((1, 1), (129, 1000), (2000, 3), (300, 2500)):
        x, out = rand(rows, columns), poisoned((columns,), torch.float32)
        kernel((), x.t(), out, rows, columns)
        assert ((out - x.double().sum(0)).abs() <= 2e-7 * x.double().abs().sum(0)).all(), (rows, columns)
