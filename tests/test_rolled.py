"""Loops over time that Dynamo unrolled: rolled back up whatever they look like, right with gradients, or left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tessel

Tensor = torch.Tensor


def collected(a: Tensor, b: Tensor) -> Tensor:
    """What is collected begins with what the recurrence starts from."""
    states = [b[:, 0]]
    for t in range(1, a.shape[1]):
        states.append(a[:, t] * states[-1] + b[:, t])
    return torch.stack(states, 1)


def written(a: Tensor, b: Tensor) -> Any:
    h, out = torch.zeros(a.shape[0], a.shape[2], dtype=a.dtype), torch.zeros_like(b)
    for t in range(a.shape[1]):
        h = a[:, t] * h
        h = h + b[:, t]
        out[:, t] = h
    return out, h


def backwards(a: Tensor, b: Tensor) -> Tensor:
    h, out = torch.zeros(a.shape[0], a.shape[2], dtype=a.dtype), []
    for t in reversed(range(a.shape[1])):
        h = a[:, t] * h + b[:, t]
        out.insert(0, h)
    return torch.stack(out, 1)


def unbound(a: Tensor, b: Tensor) -> Tensor:
    h, out = a[:, 0] * 0.1, []
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):
        h = 0.1 * x * h - y * 0.5 + h * 0.2
        out.append(torch.matmul(h[:, None, :], y[:, :, None])[:, 0])
    return torch.cat(out, 1)


def chunks(a: Tensor, b: Tensor) -> Tensor:
    h, out = torch.zeros(a.shape[0], 2, a.shape[2], dtype=a.dtype), []
    for i in range(0, a.shape[1], 2):
        h = h * 0.5 + a[:, i : i + 2]
        out.append(h * b[:, i : i + 2])
    return torch.cat(out, 1)


def bent(a: Tensor, b: Tensor) -> Any:
    h, out = torch.zeros(a.shape[0], a.shape[2], dtype=a.dtype), []
    for t in range(a.shape[1]):
        h = torch.tanh(h * a[:, t] + b[:, t])
        out.append(h * 2)
    return torch.stack(out, 1), h


def delta_rule(k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(k.shape[0], k.shape[2], v.shape[2], dtype=k.dtype), []
    for t in range(k.shape[1]):
        kt, vt = k[:, t], v[:, t]
        known = (state * kt.unsqueeze(-1)).sum(-2)
        state = state + kt.unsqueeze(-1) * (vt - known).unsqueeze(-2) * 0.1
        out.append((state * vt.unsqueeze(-1)).sum(-2))
    return torch.stack(out, 1)


def two_back(a: Tensor, b: Tensor) -> Tensor:
    """Two steps at a time are a step that looks back once."""
    states = [b[:, 0], b[:, 1]]
    for t in range(2, a.shape[1]):
        states.append(torch.tanh(states[-1] + states[-2] * a[:, t]))
    return torch.stack(states, 1)


CASES = {
    collected: "linear_scan",
    written: "linear_scan",
    backwards: "linear_scan",
    unbound: "linear_scan",
    chunks: "linear_scan",
    bent: "loop",
    delta_rule: "linear_attention",
    two_back: "loop",
}


def compiled(fn: Callable[..., Any], *args: Tensor) -> tuple[list[Tensor], tessel.report.Report]:
    torch._dynamo.reset()
    made = tessel.compile(fn, target="cpu", fullgraph=True)
    got = made(*args)
    return list(got) if isinstance(got, tuple) else [got], tessel.explain(made)


def names(report: tessel.report.Report) -> list[str]:
    return [n.op.name for n in report.compilations[0].passes[0].graph.nodes]


@pytest.mark.parametrize("fn", CASES, ids=lambda f: f.__name__)
def test_loops_are_rolled(fn: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    given = [torch.rand(2, 12, 3, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)]
    given = [x.requires_grad_() for x in given]
    got, report = compiled(fn, *given)
    assert names(report).count(CASES[fn]) == 1
    want = fn(*given)
    want = list(want) if isinstance(want, tuple) else [want]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        assert x.stride() == y.stride()
    grads = [torch.autograd.grad(sum(o.sin().sum() for o in outs), given) for outs in (got, want)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fn", [collected, bent], ids=lambda f: f.__name__)
def test_node_counts_do_not_depend_on_the_length(fn: Callable[..., Any]) -> None:
    with torch.no_grad():
        counts = {compiled(fn, torch.rand(2, n, 3), torch.rand(2, n, 3))[1].captured for n in (8, 32)}
    assert len(counts) == 1


@pytest.mark.parametrize("fn", [written, delta_rule, bent], ids=lambda f: f.__name__)
def test_sizes_that_are_symbols(fn: Callable[..., Any]) -> None:
    """A batch that has changed stays one; the length has changed too, and is the number that the loop counted to."""
    torch._dynamo.reset()
    made = tessel.compile(fn, target="cpu", fullgraph=True)
    for batch, time in ((2, 12), (3, 12), (5, 12), (5, 16)):
        given = torch.rand(batch, time, 3), torch.randn(batch, time, 3)
        with torch.no_grad():
            results = zip(*(x if isinstance(x, tuple) else (x,) for x in (made(*given), fn(*given))), strict=True)
            for x, y in results:
                torch.testing.assert_close(x, y)
    runs = tessel.explain(made).compilations
    assert len(runs) == 3 and max(r.captured for r in runs) <= runs[0].captured + 1
    for run in runs:
        assert [n.op.name for n in run.passes[0].graph.nodes].count(CASES[fn]) == 1


def test_a_loop_is_one_kernel_where_its_state_is_a_line() -> None:
    with torch.no_grad():
        _, report = compiled(collected, torch.rand(2, 20, 40), torch.rand(2, 20, 40))
    assert [k.family for k in report.kernels] == ["scan"]


@pytest.mark.parametrize("fn", [written, backwards], ids=lambda f: f.__name__)
def test_a_first_factor_that_is_not_finite_meets_a_start_of_zero(fn: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 20, 40), torch.randn(2, 20, 40)
    a[0, 0, 3], a[0, -1, 3], a[1, 0, 5], a[1, -1, 5] = torch.nan, torch.nan, torch.inf, torch.inf
    with torch.no_grad():
        got, report = compiled(fn, a, b)
        want = fn(a, b)
    assert "scan" in [k.family for k in report.kernels]
    for x, y in zip(got, want if isinstance(want, tuple) else [want], strict=True):
        assert x.isnan().any() and torch.equal(x.isnan(), y.isnan())


def stored(a: Tensor, b: Tensor) -> Any:
    """Two results of one dtype, written from values of two."""
    h = torch.zeros(a.shape[0], a.shape[2], dtype=a.dtype)
    first, second = torch.zeros(a.shape), torch.zeros(a.shape)
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        first[:, t] = h.float()
        second[:, t] = h
    return first, second


def masked(a: Tensor, b: Tensor) -> Tensor:
    h, out = b[:, 0], []
    for t in range(a.shape[1]):
        h = torch.where((a[:, t] > 0.2) & (b[:, t] < 1.0), torch.tanh(h + b[:, t]), h)
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize(("fn", "op"), [(stored, "linear_scan"), (masked, "loop")], ids=["stored", "masked"])
def test_dtypes_and_conditions_of_steps(fn: Callable[..., Any], op: str) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 12, 3, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    with torch.no_grad():
        got, report = compiled(fn, a, b)
        want = fn(a, b)
    assert names(report).count(op) == 1
    for x, y in zip(got, want if isinstance(want, tuple) else [want], strict=True):
        torch.testing.assert_close(x, y)  # dtypes too


def noisy(a: Tensor) -> Tensor:
    h = a[:, 0]
    for t in range(a.shape[1]):
        h = torch.nn.functional.dropout(h * a[:, t], 0.5)
    return h


def drawn(a: Tensor) -> Tensor:
    h = a[:, 0]
    for t in range(a.shape[1]):
        h = torch.tanh(h * a[:, t] + torch.normal(0.0, 1.0, (3,), dtype=a.dtype))
    return h


def overwritten(a: Tensor) -> Tensor:
    """What the steps share changes as they go."""
    h, on = a[:, 0], a[:, 0] > 0.1
    for t in range(a.shape[1]):
        on &= a[:, t] > 0.3
        h = torch.where(on, torch.tanh(h + a[:, t]), h)
    return h


def read_while_written(a: Tensor) -> Tensor:
    out = torch.zeros_like(a)
    for t in range(1, a.shape[1]):
        out[:, t] = out[:, t - 1] * 0.5 + a[:, t]
    return out


def uneven(a: Tensor) -> Tensor:
    h = a[:, 0]
    for t in (1, 2, 4, 7, 11):
        h = torch.tanh(h * a[:, t])
    return h


def weights(a: Tensor) -> Tensor:
    """The same layer over and over has nothing to go over."""
    w, h = a[0, :3, :3], a[:, 0]
    for _ in range(8):
        h = torch.tanh(h @ w)
    return h


KEPT = [noisy, drawn, overwritten, read_while_written, uneven, weights]


@pytest.mark.parametrize("fn", KEPT, ids=lambda f: f.__name__)
def test_what_is_no_loop_stays(fn: Callable[..., Any]) -> None:
    a = torch.rand(2, 12, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(1)
        got, report = compiled(fn, a)
        torch.manual_seed(1)
        want = fn(a)
    assert not {"loop", "linear_scan"} & set(names(report))
    if fn not in (noisy, drawn):
        torch.testing.assert_close(got[0], want)
