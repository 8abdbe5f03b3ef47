"""What Dynamo traces in place of ``associative_scan``: the same bits as torch's own way, or torch's own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._higher_order_ops.associative_scan import associative_scan

from tessel.frontend import scan_trace

Pair = tuple[torch.Tensor, torch.Tensor]


def recurrence(left: Pair, right: Pair) -> Pair:
    a, b = left
    c, d = right
    return a * c, c * b + d


def mixed(left: Any, right: Any) -> Any:
    (a, b), (c, d) = left, right
    return a + c, b * d - a


def product(left: Any, right: Any) -> Any:
    (a, b), (c, d) = left, right
    return a @ c, b @ c + d


def largest(left: Any, right: Any) -> Any:
    (a, b), (c, d) = left, right
    return torch.maximum(a, c), b + d


def traced(fn: Callable[..., Any], *args: torch.Tensor) -> tuple[Any, int]:
    """The result of a function through Dynamo alone, and how many nodes it captured."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    got = torch.compile(fn, backend=keep, fullgraph=True)(*args)
    return got, len(graphs[0].graph.nodes)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("combine", [recurrence, mixed])
def test_arithmetic_gives_torchs_bits(combine: Any, n: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(2, n, 3), torch.randn(2, n, 3)
    a[0, n // 2, 0] = float("nan")
    b[1, 0, 1] = float("inf")

    def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
        return associative_scan(combine, (a, b), dim=1, reverse=reverse, combine_mode="generic")

    scan_trace.register()
    got, nodes = traced(fn, a, b)
    monkeypatch.setattr(scan_trace, "is_arithmetic", torch._dynamo.assume_constant_result(lambda code, count: False))
    want, more = traced(fn, a, b)
    assert n == 1 or nodes < more
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def test_the_sequential_recurrence() -> None:
    a, b = torch.rand(5, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)

    def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
        return associative_scan(recurrence, (a, b), dim=-1, combine_mode="generic")[1]

    scan_trace.register()
    h = torch.zeros(5, dtype=torch.float64)
    want = []
    for i in range(12):
        h = a[:, i] * h + b[:, i]
        want.append(h)
    torch.testing.assert_close(traced(fn, a, b)[0], torch.stack(want, -1))


def test_gradients() -> None:
    a, b = (torch.rand(4, 6, requires_grad=True) for _ in range(2))

    def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
        return associative_scan(recurrence, (a, b), dim=1, combine_mode="generic")[1].sum()

    scan_trace.register()
    fast = torch.autograd.grad(traced(fn, a, b)[0], (a, b))
    h = torch.zeros(4)
    total = torch.zeros(())
    for i in range(6):
        h = a[:, i] * h + b[:, i]
        total = total + h.sum()
    for x, y in zip(fast, torch.autograd.grad(total, (a, b)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("combine", [product, largest])
def test_other_functions_take_torchs_way(combine: Any) -> None:
    a, b = torch.randn(4, 3, 3), torch.randn(4, 3, 3)

    def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
        return associative_scan(combine, (a, b), dim=0, combine_mode="generic")

    scan_trace.register()
    got, _ = traced(fn, a, b)
    x, y = a[0], b[0]
    for i in range(1, 4):
        x, y = combine((x, y), (a[i], b[i]))
        torch.testing.assert_close(got[0][i], x)
        torch.testing.assert_close(got[1][i], y)


def test_other_shapes_take_torchs_way() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 2, 3)  # slices of ranks 1 and 2

    def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
        return associative_scan(mixed_ranks, (a, b), dim=0, combine_mode="generic")

    scan_trace.register()
    got, _ = traced(fn, a, b)
    x, y = a[0], b[0]
    for i in range(1, 4):
        x, y = mixed_ranks((x, y), (a[i], b[i]))
        torch.testing.assert_close(got[1][i], y)


def mixed_ranks(left: Any, right: Any) -> Any:
    (a, b), (c, d) = left, right
    return a * c, c * b + d


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (lambda a, b: (a / b, b), 2),  # whole numbers would become others
        (lambda a, b: a + b, 2),
        (lambda a, b: (a, b), 3),
        (lambda a, b: (a * 2, b), 2),
        (lambda a, b, c: (a, b), 2),
        (lambda *a: (a, a), 2),
        (lambda a, b: (a if b else b, a), 2),
        (product, 2),
        (largest, 2),
    ],
)
def test_what_is_no_arithmetic(fn: Any, count: int) -> None:
    assert not scan_trace.is_arithmetic(fn.__code__, count)
    assert scan_trace.is_arithmetic(recurrence.__code__, 2)
