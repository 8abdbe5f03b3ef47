"""Products whose weight is stored in few bits and written out in the model: one kernel, the weight unpacked inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tessel
from tessel.quant.formats import integers, quantize

pytestmark = pytest.mark.usefixtures("shared_cache")


def whole_bytes(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``codes`` int8 ``[n, k]``, a scale a row."""
    return (x @ codes.to(x.dtype).t()) * scale


def eight_a_word(x: Tensor, words: Tensor, scale: Tensor, shifts: Tensor) -> Tensor:
    """``words`` int32 ``[n, k / 8]``, lowest bits first, a scale a group of k."""
    n, groups = scale.shape
    codes = ((words[:, :, None] >> shifts) & 15) - 8
    weight = codes.reshape(n, groups, -1).to(x.dtype) * scale[:, :, None]
    return x @ weight.reshape(n, -1).t()


@pytest.mark.parametrize("target", ["cpu", "triton-interpret"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_one_kernel_unpacks_and_multiplies(rows: int, dtype: torch.dtype, target: str) -> None:
    n, k = 24, 64
    g = torch.Generator().manual_seed(rows)
    x, w = torch.randn(rows, k, generator=g).to(dtype), torch.randn(n, k, generator=g)
    eight, four = quantize(w, integers(8)), quantize(w, integers(4, 16))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    words = ((four.codes.long() + 8).reshape(n, -1, 8) << shifts.long()).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    options = {"matmul": "template"}
    calls = (
        (whole_bytes, (x, eight.codes.to(torch.int8), eight.scale[:, 0].to(dtype))),
        (eight_a_word, (x, words, four.scale.to(dtype), shifts)),
    )
    for fn, args in calls:
        fast = tessel.compile(fn, target=target, options=options)
        got = fast(*args)
        wide = [a.double() if a.is_floating_point() else a for a in args]
        want = fn(*wide)
        room = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert (got.double() - want).abs().max() <= room * want.abs().max()
        (done,) = tessel.explain(fast).compilations
        assert [kernel.family for kernel in done.kernels] == ["matmul"] and not done.calls
