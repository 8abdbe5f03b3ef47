"""Torch's default dtype, which programs set to a half, is not that of the memory that kernels write float32 to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_linear_attention import operands

from tessel.runtime.linear_calls import LinearCalls
from tessel.runtime.linear_cpu import LinearKernels
from tessel.runtime.linear_gpu import GpuLinear
from tessel.runtime.scan_gpu import GpuSelective
from tessel.targets import get_target

INTERPRET = get_target("triton-interpret")


@pytest.fixture
def _half() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_linear_attention(device: str, _half: None, tmp_path: Path) -> None:
    kernels: LinearCalls = LinearKernels() if device == "cpu" else GpuLinear(INTERPRET, tmp_path)
    torch.set_default_dtype(torch.float32)
    q, k, v, decay, beta, start = operands(1, 2, 20, 16, 16, "number", True, True, torch.float32)
    want = *kernels.forward(q, k, v, decay, beta, start), *kernels.backward(v, start, q, k, v, decay, beta, start)
    torch.set_default_dtype(torch.bfloat16)
    got = *kernels.forward(q, k, v, decay, beta, start), *kernels.backward(v, start, q, k, v, decay, beta, start)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype == torch.float32
        torch.testing.assert_close(x, y)


def test_gradients_of_a_selective_scan(_half: None, tmp_path: Path) -> None:
    w, dt, A, B, C = (torch.rand(s, dtype=torch.float32) for s in ((1, 9, 4), (1, 9, 4), (4, 3), (1, 9, 3), (1, 9, 3)))
    kernels = GpuSelective(INTERPRET, tmp_path)
    got = kernels.backward(w, w, dt, -A, B, C)
    torch.set_default_dtype(torch.float32)
    for x, y in zip(got, kernels.backward(w, w, dt, -A, B, C), strict=True):
        torch.testing.assert_close(x, y)
