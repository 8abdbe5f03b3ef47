"""Loops of any step as one Triton kernel, where a step is one kernel; else step by step, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from offline_record import Recorded
from test_rolled import bent, two_back

import tessel
from tessel.codegen.triton import render
from tessel.targets import get_target
from tessel.tiles.kernel import Kernel

Tensor = torch.Tensor


def normed(a: Tensor, b: Tensor) -> Any:
    """The state is a row, folded twice at every step."""
    h, out = torch.zeros(a.shape[0], a.shape[2], dtype=a.dtype), []
    for t in range(a.shape[1]):
        h = torch.softmax(h * a[:, t] + b[:, t], -1)
        out.append(h.sum(-1))
    return torch.stack(out, 1), h


def swapped(a: Tensor, b: Tensor) -> Any:
    """Each carry becomes what the other was."""
    g, h = a[:, 0] * 2, b[:, 0] * 3
    out = []
    for t in range(a.shape[1]):
        g, h = torch.tanh(h + a[:, t]), torch.sin(g * b[:, t])
        out.append(g - h)
    return torch.stack(out, 1), g, h


def multiplied(a: Tensor, b: Tensor) -> Any:
    """A step with a matrix product is no one kernel."""
    h = torch.zeros(a.shape[0], a.shape[2], dtype=a.dtype)
    for t in range(a.shape[1]):
        h = torch.tanh(h @ b[0, :5] + a[:, t])
    return h


def run(fn: Callable[..., Any], *args: Tensor, tile: str | None = None) -> tuple[list[Tensor], Any]:
    torch._dynamo.reset()
    made = tessel.compile(fn, target="triton-interpret", fullgraph=True, options={"tile": tile} if tile else None)
    got = made(*args)
    return list(got) if isinstance(got, tuple) else [got], made


def loops(made: Any) -> list[tuple[str, str]]:
    """Of every loop why it runs as it does, and of what kernels."""
    return [(c.operator, c.reason) for r in tessel.explain(made).compilations for c in r.calls if c.operator == "loop"]


@pytest.mark.parametrize("tile", [None, "scan: STEPS=4"])
@pytest.mark.parametrize("fn", [bent, two_back, normed, swapped], ids=lambda f: f.__name__)
def test_one_kernel(fn: Callable[..., Any], tile: str | None) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 13, 5), torch.randn(2, 13, 5)
    with torch.no_grad():
        got, made = run(fn, a, b, tile=tile)
        want = fn(a.double(), b.double())
    for x, y in zip(got, want if isinstance(want, tuple) else [want], strict=True):
        assert (x - y).abs().max() <= 2e-6 * y.abs().max()
    assert loops(made) == [("loop", "Tessel's kernel: all steps in one launch")]
    assert any(k.name.startswith("loop_") and k.family == "scan" for k in tessel.explain(made).kernels)


@pytest.mark.parametrize("fn", [bent, normed], ids=lambda f: f.__name__)
def test_gradients(fn: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    given = [torch.rand(2, 9, 5).requires_grad_(), torch.randn(2, 9, 5).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in given]
    got, made = run(fn, *given)
    grads = torch.autograd.grad(sum(x.sin().sum() for x in got), given)
    wanted = torch.autograd.grad(sum(x.sin().sum() for x in fn(*exact)), exact)
    for x, y in zip(grads, wanted, strict=True):
        assert (x - y).abs().max() <= 5e-6 * y.abs().max()
    assert len(loops(made)) == 2


def test_halves_are_rounded_at_every_step_as_in_eager() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 40, 5).bfloat16(), torch.randn(2, 40, 5).bfloat16()
    with torch.no_grad():
        got, made = run(bent, a, b)
        want = bent(a.double(), b.double())
        eager = bent(a, b)
    assert "one launch" in loops(made)[0][1]
    for x, y, z in zip(got, want, eager, strict=True):
        assert (x - y).abs().max() <= 2 * (z - y).abs().max() + 1e-6


def test_a_step_of_several_kernels_goes_step_by_step_and_says_so() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 6, 5), torch.randn(2, 6, 5)
    with torch.no_grad():
        got, made = run(multiplied, a, b)
    assert (got[0] - multiplied(a.double(), b.double())).abs().max() <= 1e-5
    ((_, why),) = loops(made)
    assert why.startswith("a loop over time, step by step from Python (its step is ")


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    found = []
    for fn in (bent, normed):
        with torch.no_grad():
            _, made = run(fn, torch.rand(2, 13, 5), torch.rand(2, 13, 5))
        found += [k.rendered.kernel for k in tessel.explain(made).kernels if k.name.startswith("loop_")]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ("a100", "h100", "b200", "mi300x"))
def test_compile_offline(target: str, kernels: list[Kernel], offline: Recorded) -> None:
    record = get_target(target)
    assert len(kernels) == 2 and record.limits is not None
    sources = [render(k, record) for k in kernels]
    for source, got in zip(sources, offline(sources, record.arch), strict=True):
        what = f"{source.name} on {record.arch}"
        assert got.ok, f"{what}: {got.error}"
        assert got.shared_bytes is not None and got.shared_bytes <= source.smem_bytes, what
        assert not got.spills, what
