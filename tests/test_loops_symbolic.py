"""Loops over time whose batch is a symbol: one node whatever the length, with the gradients of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._higher_order_ops.scan import scan

import tessel
from tessel.frontend.compat import SCAN_CUTS_CARRY

# Torch before 2.13 gives a carry no gradient if its first value needs none; a loop with sizes that are symbols stays
# unrolled there.
recent = pytest.mark.skipif(SCAN_CUTS_CARRY, reason="a scan of torch before 2.13")
Tensor = torch.Tensor
WIDTH = 4


def unrolled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A recurrent cell applied step after step from Python."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        h, out = x.new_zeros(x.shape[0], WIDTH), []
        for t in range(x.shape[1]):
            h = step(h, x[:, t], w)
            out.append(h)
        return torch.stack(out, 1)

    run.__name__ = step.__name__
    return run


def softmax(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(h @ w + x, -1)


def total(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    z = torch.tanh(h @ w + x)
    return z / (1 + z.abs().sum(-1, keepdim=True))


def over_batch(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    z = torch.tanh(h @ w + x)
    return z - z.mean(-1, keepdim=True) + z.sum(0)


def whole_mean(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Its gradient divides by the size of the batch."""
    z = torch.tanh(h @ w + x)
    return z - z.mean()


def reads_the_size(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    z = torch.tanh(h @ w + x).reshape(x.shape[0], 2, WIDTH // 2)
    return (z.softmax(1) / x.shape[0]).reshape(x.shape[0], WIDTH)


def normed(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(torch.tanh(h @ w + x), (WIDTH,))


def gated(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    r, z = torch.sigmoid(torch.cat([h, x], -1) @ torch.cat([w, w])).chunk(2, -1)
    new = torch.tanh(x[:, :2] * r + (h @ w)[:, 2:])
    return torch.cat([new * z, h[:, 2:] * (1 - z)], -1) + h.amax(-1, keepdim=True)


CELLS = [softmax, total, over_batch, whole_mean, reads_the_size, normed]


def inputs(batch: int, time: int, seed: int = 0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = (batch, time, WIDTH), (WIDTH, WIDTH)
    return [torch.randn(s, generator=made, dtype=torch.float64).requires_grad_() for s in shapes]


def agree(made: Callable[..., Any], fn: Callable[..., Any], args: list[Tensor]) -> None:
    got, want = made(*args), fn(*args)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(out.sin().sum(), args) for out in (got, want)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def captured(made: Callable[..., Any]) -> list[int]:
    """Nodes of every graph; each is the loop forward, or backward, and nothing fell back."""
    runs = tessel.explain(made).compilations
    for run in runs:
        assert [n.op.name for n in run.passes[0].graph.nodes].count("loop") == 1
        assert not run.fallbacks
    return [run.captured for run in runs]


@recent
@pytest.mark.parametrize("cell", CELLS, ids=lambda f: f.__name__)
def test_a_batch_that_is_a_symbol_is_rolled_with_gradients(cell: Callable[..., Tensor]) -> None:
    fn = unrolled(cell)
    counts = []
    for time in (6, 64 if cell in (softmax, total) else 12):
        torch._dynamo.reset()
        made = tessel.compile(fn, target="cpu", fullgraph=True, dynamic=True)
        for batch in (3, 5, 2, 7):
            agree(made, fn, inputs(batch, time))
        counts.append(captured(made))
    assert counts[0] == counts[1]
    assert len(counts[0]) == 2  # forward and backward, of every batch


@recent
@pytest.mark.parametrize("cell", [reads_the_size, gated], ids=lambda f: f.__name__)
def test_other_ways_in_are_the_same(cell: Callable[..., Tensor]) -> None:
    """A batch becomes a symbol once it has changed; torch.compile with Tessel as its backend."""
    fn = unrolled(cell)
    for make in (tessel.compile, torch.compile):
        torch._dynamo.reset()
        options = {"target": "cpu"} if make is tessel.compile else {"backend": "tessel"}
        made = make(fn, fullgraph=True, **options)
        for batch in (2, 3, 5):
            agree(made, fn, inputs(batch, 12))
        if make is tessel.compile:
            assert len(captured(made)) == 4


_compiled: dict[str, Any] = {}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(CELLS), st.integers(1, 33), st.integers(0, 2**16))
def test_drawn_batches(cell: Callable[..., Tensor], batch: int, seed: int) -> None:
    fn = unrolled(cell)
    if cell.__name__ not in _compiled:
        torch._dynamo.reset()
        _compiled[cell.__name__] = tessel.compile(fn, target="cpu", fullgraph=True, dynamic=True)
    agree(_compiled[cell.__name__], fn, inputs(batch, 6, seed))


@recent
@pytest.mark.parametrize("cell", CELLS, ids=lambda f: f.__name__)
def test_a_users_scan_with_a_symbol_is_compiled(cell: Callable[..., Tensor]) -> None:
    """Dynamo hands sizes to a step; nothing of it runs eagerly for that. Here the length is a symbol too."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = cell(h, x, w)
            return h, h.clone()

        return scan(step, x.new_zeros(x.shape[0], WIDTH), x.movedim(1, 0))[1]

    torch._dynamo.reset()
    made = tessel.compile(fn, target="cpu", fullgraph=True, dynamic=True)
    for batch, time in ((3, 6), (5, 9), (2, 17)):
        x, w = inputs(batch, time)
        agree(made, lambda x, w: unrolled(cell)(x, w).movedim(1, 0), [x, w])
    assert len(captured(made)) == 2
