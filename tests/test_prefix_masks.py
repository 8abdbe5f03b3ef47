"""Prefix masks (PrefixLM): tokens of the prefix see one another, those after it all that come before them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_attention_kernels import rand
from test_families import prefix_mask

import tessel

Tensor = torch.Tensor
TEMPLATE = {"attention": "template"}
SCALE = 0.3


def written_out(q: Tensor, k: Tensor, v: Tensor, prefix: Any) -> Tensor:
    scores = torch.where(prefix_mask(q.shape[2], k.shape[2], prefix), q @ k.transpose(-1, -2) * SCALE, -math.inf)
    return torch.softmax(scores, -1) @ v


def by_operator(q: Tensor, k: Tensor, v: Tensor, prefix: Any) -> Tensor:
    held = prefix_mask(q.shape[2], k.shape[2], prefix)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=held, scale=SCALE)


def prefixes(which: str) -> Any:
    """One number, or one of every sequence of a batch, a prefix of nothing among them."""
    return 11 if which == "one" else torch.tensor([0, 17]).view(2, 1, 1, 1)


def compile_(fn: Any, target: str) -> Any:
    torch._dynamo.reset()
    return tessel.compile(fn, target=target, options=TEMPLATE, fullgraph=True, dynamic=False)


@pytest.mark.parametrize(
    ("target", "fn", "which"),
    [
        ("cpu", written_out, "each"),
        pytest.param("cpu", by_operator, "one", marks=pytest.mark.slow),
        ("triton-interpret", written_out, "one"),
        ("triton-interpret", by_operator, "each"),
    ],
)
def test_prefixes(target: str, fn: Any, which: str) -> None:
    """One operator however it is written, results and gradients against float64."""
    q, k, v = (rand(2, 2, 37, 16, seed=i).requires_grad_() for i in range(3))
    fast, prefix, grad = compile_(fn, target), prefixes(which), rand(2, 2, 37, 16, seed=9)
    results = []
    for f, dtype in ((fast, torch.float32), (written_out, torch.float64)):
        ins = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = f(*ins, prefix)
        results.append([out.detach(), *torch.autograd.grad(out, ins, grad.to(dtype))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    report = tessel.explain(fast)
    names = [[n.op.name for n in c.passes[0].graph.nodes] for c in report.compilations]
    assert [n.count("attention") + n.count("attention_backward") for n in names] == [1, 1]
    assert not any(c.fallbacks or c.calls for c in report.compilations)


def test_blocks_after_the_prefix_are_not_read() -> None:
    """Keys that no query of a block sees hold NaN: weights of nothing would hand it on."""
    q, k, v = (rand(1, 2, 640, 16, seed=i) for i in range(3))
    prefix = torch.tensor([40]).view(1, 1, 1, 1)
    want = written_out(*(x.double() for x in (q, k, v)), prefix)
    k[:, :, 512:] = v[:, :, 512:] = torch.nan
    with torch.no_grad():
        got = compile_(by_operator, "cpu")(q, k, v, prefix)
    torch.testing.assert_close(got[:, :, :128].double(), want[:, :, :128], rtol=1e-5, atol=1e-5)
    assert bool(got[:, :, 512:].isnan().all())
