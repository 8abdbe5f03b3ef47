"""Ways of writing a loop over time: each is one node whatever the length, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tessel

Tensor = torch.Tensor


def from_the_end(x: Tensor, w: Tensor) -> Tensor:
    h, out = x.new_zeros(x.shape[0], 4), []
    for t in range(x.shape[1]):
        h = torch.tanh(h @ w + x[:, -1 - t, :, None][..., 0])  # with more parts than dimensions
        out.append(h)
    return torch.stack(out, 1)


def iterated(x: Tensor, w: Tensor) -> Tensor:
    """Python takes every step's part before the first step."""
    h, out = x.new_zeros(x.shape[0], 4), []
    for part in x.transpose(0, 1):
        h = torch.tanh(h @ w + part)
        out.append(h)
    return torch.stack(out, 1)


def two_results(x: Tensor, w: Tensor) -> Any:
    h, first, second = x.new_zeros(x.shape[0], 4), [], []
    for t in reversed(range(x.shape[1])):
        h = torch.tanh(h @ w + x[:, t])
        first.append(h.softmax(-1))
        second.append(h.sum(-1))
    return torch.stack(first[::-1], 1), torch.stack(second, 1), h


def whole_numbers(x: Tensor, w: Tensor) -> Any:
    h, n, out = x.new_zeros(x.shape[0], 4), torch.zeros(x.shape[0], dtype=torch.int64), []
    for t in range(x.shape[1]):
        h = torch.tanh(h @ w + x[:, t])
        n = n + (h.sum(-1) > 0).long()
        out.append(h * n[:, None])
    return torch.stack(out, 1), n


def switched_off(x: Tensor, w: Tensor) -> Any:
    h, on, out = x.new_zeros(x.shape[0], 4), torch.ones(x.shape[0], 1, dtype=torch.bool), []
    for t in range(x.shape[1]):
        on = on & (x[:, t, :1] < 0.5)
        h = torch.where(on, torch.tanh(h @ w + x[:, t]), h)
        out.append(h)
    return torch.stack(out, 1), on


def fed_back(x: Tensor, w: Tensor) -> Any:
    h, token, out = x.new_zeros(x.shape[0], 4), torch.zeros(x.shape[0], dtype=torch.int64), []
    for t in range(x.shape[1]):
        h = torch.tanh(h @ w + w[token] + x[:, t])
        token = h.argmax(-1)
        out.append(token)
    return torch.stack(out, 1), h


def compare(fn: Callable[..., Any], time: int, gradients: bool) -> int:
    """Nodes captured of the forward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    given = [torch.randn(s, dtype=torch.float64, requires_grad=gradients) for s in ((3, time, 4), (4, 4))]
    made = tessel.compile(fn, target="cpu", fullgraph=True)
    got, want = ([*x] if isinstance(x, tuple) else [x] for x in (made(*given), fn(*given)))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    if gradients:
        grads = [torch.autograd.grad(sum(o.sin().sum() for o in outs), given) for outs in (got, want)]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    run = tessel.explain(made).compilations[0]
    assert [n.op.name for n in run.passes[0].graph.nodes].count("loop") == 1
    return run.captured


@pytest.mark.parametrize("fn", [from_the_end, iterated, two_results], ids=lambda f: f.__name__)
def test_rolled_with_gradients(fn: Callable[..., Any]) -> None:
    assert compare(fn, 6, True) == compare(fn, 15, True)


@pytest.mark.parametrize("fn", [whole_numbers, switched_off, fed_back], ids=lambda f: f.__name__)
def test_carries_and_results_that_are_no_floats(fn: Callable[..., Any]) -> None:
    assert compare(fn, 6, False) == compare(fn, 15, False)


def written_between(x: Tensor) -> Tensor:
    y = x.clone()
    parts = [y[t] for t in range(6)]
    h, out = x[0] * 0, []
    for t in range(6):
        h = torch.tanh(h + parts[t])
        y[5 - t] = h
        out.append(h)
    return torch.stack(out)


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [x[t] for t in range(6)]
    h = x[0]
    for part in parts:
        h = torch.tanh(h * part)
    return h


@pytest.mark.parametrize("fn", [written_between, without_gradients], ids=lambda f: f.__name__)
def test_parts_are_not_read_past_what_changes_them(fn: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    x = torch.rand(6, 3, 4, dtype=torch.float64, requires_grad=True)
    got, want = tessel.compile(fn, target="cpu", fullgraph=True)(x), fn(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
