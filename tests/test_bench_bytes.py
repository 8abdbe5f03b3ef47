"""The counting rule of ``benchmarks/bytes.py``, against numbers worked out by hand; the rule for torch.compile too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
F32 = 4


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("bench_bytes", BENCHMARKS / "bytes.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_bytes"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


def count(counting: ModuleType, model: torch.nn.Module, x: torch.Tensor) -> dict[str, tuple[int, int, int]]:
    by = {**counting.count_tessel(model, {}, x), "torch.compile": counting.count_inductor(model, {}, x)}
    return {how: (c.kernels, c.calls, c.bytes) for how, c in by.items()}


def test_linear_and_gelu(counting: ModuleType) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU())
    x, w, b, y = 32 * 64 * F32, 128 * 64 * F32, 128 * F32, 32 * 128 * F32
    assert count(counting, model, torch.randn(32, 64)) == {
        "unfused": (3, 0, (x + w + y) + (y + b + y) + (y + y)),
        "tessel": (1, 1, (x + w + b + y) + (y + y)),
        "templates": (1, 0, x + w + b + y),
        "torch.compile": (1, 1, (x + w + b + y) + (y + y)),
    }


def test_layer_norm(counting: ModuleType) -> None:
    whole, row = 8 * 64 * F32, 64 * F32
    want = (1, 0, whole + 2 * row + whole)
    got = count(counting, torch.nn.LayerNorm(64), torch.randn(8, 64))
    assert {how: got[how] for how in ("tessel", "templates", "torch.compile")} == dict.fromkeys(
        ("tessel", "templates", "torch.compile"), want
    )


def test_views_count_as_the_part_read(counting: ModuleType) -> None:
    kernel = 2 * 8 * 16 * F32 + 8 * 16 * F32
    # two views of one tensor of 8 x 40: together at most the tensor
    x = torch.randn(8, 40)

    class Narrow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x[:, :16] + x[:, 16:32].exp(), torch.mm(x[:, :32], x[:, 8:].t())

    product = 8 * 40 * F32 + 8 * 8 * F32
    got = count(counting, Narrow(), x)
    for how in ("tessel", "torch.compile"):
        assert got[how] == (1, 1, kernel + product), how


def test_a_reshape_that_copies_counts(counting: ModuleType) -> None:
    class Copied(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return torch.mm(x.transpose(0, 1).reshape(16, 24), w)

    model, x, w = Copied(), torch.randn(6, 16, 4), torch.randn(24, 40)
    copy, product = 2 * x.nbytes, x.nbytes + w.nbytes + 16 * 40 * F32
    by = {**counting.count_tessel(model, {}, x, w), "torch.compile": counting.count_inductor(model, {}, x, w)}
    assert {how: c.bytes for how, c in by.items()} == {
        "unfused": copy + product,
        "tessel": copy + product,
        "templates": product,
        "torch.compile": copy + product,
    }
