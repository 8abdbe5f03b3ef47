"""Torch's scan operators: captured as one node whatever their length, right with gradients, refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan

import tessel
from tessel.errors import TesselError

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]


def recurrence(left: Pair, right: Pair) -> Pair:
    return left[0] * right[0], right[0] * left[1] + right[1]


def swapped(left: Pair, right: Pair) -> Pair:
    (b, a), (d, c) = left, right
    return d + b * c, a * c


def softmax(left: Pair, right: Pair) -> Pair:
    top = torch.maximum(left[0], right[0])
    return top, left[1] * torch.exp(left[0] - top) + right[1] * torch.exp(right[0] - top)


def largest(left: Tensor, right: Tensor) -> Tensor:
    return torch.maximum(left, right)


def total(left: Tensor, right: Tensor) -> Tensor:
    return left + right


def product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def by_steps(combine: Callable[..., Any], xs: Any, dim: int, reverse: bool = False) -> Any:
    """The definition."""
    single = isinstance(xs, Tensor)
    steps = list(zip(*(x.unbind(dim) for x in ([xs] if single else xs)), strict=True))
    out = []
    for x in steps[::-1] if reverse else steps:
        now: Any = x[0] if single else x
        out.append(combine(out[-1], now) if out else now)
    out = out[::-1] if reverse else out
    if single:
        return torch.stack(out, dim)
    return tuple(torch.stack([o[i] for o in out], dim) for i in range(len(xs)))


def run(fn: Callable[..., Any], *args: Tensor) -> tuple[Any, tessel.report.Report]:
    torch._dynamo.reset()
    made = tessel.compile(fn, target="cpu", fullgraph=True)
    got = made(*args)
    return got, tessel.explain(made)


def compare(fn: Callable[..., Any], want: Callable[..., Any], *args: Tensor) -> tessel.report.Report:
    """Results and gradients against the definition, in float64."""
    wrt = [x.clone().requires_grad_() for x in args]
    got, report = run(fn, *wrt)
    results = [torch.utils._pytree.tree_leaves(x) for x in (got, want(*wrt))]
    grads = []
    for outs in results:
        loss = sum((o.sin() * torch.arange(o.numel()).view(o.shape)).sum() for o in outs)
        grads.append(torch.autograd.grad(loss, wrt, allow_unused=True))
    for x, y in (*zip(*results, strict=True), *zip(*grads, strict=True)):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    return report


def sample(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.1


@pytest.mark.parametrize(
    ("combine", "node"),
    [(recurrence, "linear_scan"), (swapped, "linear_scan"), (softmax, "loop")],
    ids=["recurrence", "swapped", "softmax"],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_pairs(combine: Any, node: str, reverse: bool) -> None:
    torch.manual_seed(0)

    def fn(a: Tensor, b: Tensor) -> Any:
        return associative_scan(combine, (a, b), dim=1, reverse=reverse, combine_mode="generic")

    report = compare(fn, lambda a, b: by_steps(combine, (a, b), 1, reverse), sample(2, 7, 3), sample(2, 7, 3))
    names = [n.op.name for n in report.compilations[0].passes[0].graph.nodes]
    assert names.count(node) == 1


@pytest.mark.parametrize(("combine", "node"), [(total, "cumsum"), (largest, "call"), (product, "loop")])
def test_single_tensors(combine: Any, node: str) -> None:
    torch.manual_seed(0)

    def fn(a: Tensor) -> Any:
        return associative_scan(combine, a, dim=0, combine_mode="generic")

    report = compare(fn, lambda a: by_steps(combine, a, 0), sample(6, 3, 3))
    assert node in [n.op.name for n in report.compilations[0].passes[0].graph.nodes]


@pytest.mark.parametrize("combine", [recurrence, softmax], ids=["recurrence", "softmax"])
def test_node_counts_do_not_depend_on_the_length(combine: Any) -> None:
    def fn(a: Tensor, b: Tensor) -> Any:
        return associative_scan(combine, (a, b), dim=1, combine_mode="generic")[1]

    counts = {run(fn, sample(2, n, 3), sample(2, n, 3))[1].captured for n in (5, 40)}
    assert len(counts) == 1


def test_one_step_and_odd_values() -> None:
    def fn(a: Tensor, b: Tensor) -> Any:
        return associative_scan(recurrence, (a, b), dim=-1, combine_mode="generic")

    a, b = sample(3, 1), sample(3, 1)
    got, _ = run(fn, a, b)
    assert torch.equal(got[0], a) and torch.equal(got[1], b)
    a, b = sample(3, 9), sample(3, 9)
    a[0, 4], b[1, 2], b[2, 5] = torch.nan, torch.inf, -torch.inf
    for x, y in zip(run(fn, a, b)[0], by_steps(recurrence, (a, b), 1), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, y: (x + y) / 2,
        lambda x, y: x - y,
        lambda x, y: torch.tanh(x + y),
        lambda x, y: x * 0.5 + y,
    ],
    ids=["mean", "difference", "tanh", "decay"],
)
def test_what_is_not_associative_is_refused(combine: Any) -> None:
    def fn(a: Tensor) -> Tensor:
        return associative_scan(combine, a, dim=0, combine_mode="generic")

    with pytest.raises(TesselError, match="is not associative"):
        run(fn, sample(6, 3))


def test_other_backends_trace_what_torch_has() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    def fn(a: Tensor) -> Tensor:
        return associative_scan(total, a, dim=0, combine_mode="generic")

    run(fn, sample(4, 3))  # Tessel is told of
    torch._dynamo.reset()
    x = sample(4, 3)
    torch.testing.assert_close(torch.compile(fn, backend=keep)(x), x.cumsum(0))
    assert not any("tessel" in str(n.target) for n in graphs[0].graph.nodes)


def step_line(h: Tensor, x: Pair) -> Pair:
    h = x[0] * h + x[1]
    return h, h * x[1]


def step_curve(h: Tensor, x: Pair) -> Pair:
    h = torch.tanh(x[0] * h + x[1])
    return h, h.sum(-1)


@pytest.mark.parametrize(("step", "node"), [(step_line, "linear_scan"), (step_curve, "loop")])
def test_scan(step: Any, node: str) -> None:
    torch.manual_seed(0)

    def fn(h: Tensor, a: Tensor, b: Tensor) -> Any:
        return scan(step, h, (a, b))

    def want(h: Tensor, a: Tensor, b: Tensor) -> Any:
        ys = []
        for x in zip(a, b, strict=True):
            h, y = step(h, x)
            ys.append(y)
        return h, torch.stack(ys)

    report = compare(fn, want, sample(2, 3), sample(7, 2, 3), sample(7, 2, 3))
    names = [n.op.name for n in report.compilations[0].passes[0].graph.nodes]
    assert names.count(node) == 1
    if node == "loop":
        (inner,) = report.compilations[0].steps
        assert inner.launches and "step of a loop" in str(report)
