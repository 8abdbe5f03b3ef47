"""Reductions whose vectors lie along the results: few terms each, results used under several numbers."""

from __future__ import annotations

import pytest
import torch

import tessel


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
