"""Inputs changed in part are written where they are, or copied whole where that could show."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tessel
from tessel.ir.parse import parse_graph
from tessel.ops import OPS
from tessel.passes import inplace
from tessel.tiles.cost import bytes_moved

Tensors = tuple[torch.Tensor, ...]


def both(fn: Callable[..., Any], *args: torch.Tensor, **options: Any) -> tuple[str, tessel.Report]:
    """Run eager and compiled on equal inputs: results and inputs are equal afterwards; the host text and report."""
    torch._dynamo.reset()
    dynamic = options.pop("dynamic", False)
    compiled = tessel.compile(fn, target="cpu", dynamic=dynamic, options=options)
    for _ in range(2):
        left, right = [_same_layout(a) for a in args], [_same_layout(a) for a in args]
        with torch.no_grad():
            want, got = fn(*left), compiled(*right)
        for a, b in zip((*left, *_tuple(want)), (*right, *_tuple(got)), strict=True):
            torch.testing.assert_close(b, a)
    report = tessel.explain(compiled)
    return report.compilations[-1].host, report


def copied(text: str) -> list[str]:
    """The lines that copy into an input, other than from the input's own copy in another layout."""
    return [line for line in text.splitlines() if re.search(r"\.copy_\((?!a\d+\))", line)]


def _tuple(x: Any) -> Tensors:
    return () if x is None else x if isinstance(x, tuple) else (x,)


def _same_layout(x: torch.Tensor) -> torch.Tensor:
    storage = x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())  # type: ignore[call-overload, no-any-return]


def cache_step(cache: torch.Tensor, at: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    cache.index_copy_(1, at, row * 2)
    return cache.sum(1)


def test_a_cache_is_not_copied() -> None:
    text, report = both(cache_step, torch.randn(2, 16, 4), torch.tensor([3, 7]), torch.randn(2, 2, 4))
    assert "index_put_(a" in text and copied(text) == []
    moved = report.compilations[-1].bytes_after
    assert moved < 16 * 4 * 2 * 4 * 2  # the cache is read once, and not written


def test_duplicate_indices_do_what_eager_does() -> None:
    def put(x: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
        x.index_put_((at,), rows, accumulate=True)

    def last(x: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
        x.index_copy_(0, at, rows)

    def add(x: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
        x.index_add_(0, at, rows)

    at = torch.tensor([1, 5, 1, 1, 5])
    for fn in (put, last, add):
        text, _ = both(fn, torch.randn(8, 3), at, torch.randn(5, 3))
        assert copied(text) == [], text


@pytest.mark.parametrize("dynamic", [False, True])
def test_slices_and_selected_rows(dynamic: bool) -> None:
    def step(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        x[:, 1:3] = row.exp()
        x[0] += 1.0
        return row + 1

    text, _ = both(step, torch.randn(3, 6, 4), torch.randn(3, 2, 4), dynamic=dynamic)
    assert "slice_scatter_(a" in text and copied(text) == []


def test_scatter_and_bool_masks() -> None:
    def step(x: torch.Tensor, y: torch.Tensor, at: torch.Tensor) -> None:
        x.scatter_(1, at, 2.5)
        x.scatter_add_(1, at, y)
        y[at > 1] = 0.0

    text, report = both(step, torch.randn(3, 6), torch.randn(3, 2), torch.tensor([[0, 1], [2, 2], [5, 3]]))
    assert "scatter_(a" in text and "scatter_add_(a" in text
    (note,) = report.compilations[-1].notes  # nothing orders the write to y after the read of it
    assert "the old value is read by scatter_add" in note and len(copied(text)) == 1


def test_the_old_value_read_afterwards_is_the_old_one() -> None:
    def late(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        old = x * 2
        x[1:3] = row
        return old

    def shifted(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        x[1:] = x[:-1].clone()
        return x.sum() + row.sum()

    for fn in (late, shifted):
        _, report = both(fn, torch.randn(6, 4), torch.randn(2, 4))
        assert any("is changed in part but copied whole" in n for n in report.compilations[-1].notes), fn


def test_a_result_never_lies_in_an_input() -> None:
    def step(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        x[1:3] = row
        return x.clone()

    compiled = tessel.compile(step, target="cpu")
    x = torch.zeros(4, 2)
    with torch.no_grad():
        got = compiled(x, torch.ones(2, 2))
    got.add_(5)
    assert x.max() == 1 and got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_a_result_that_is_the_input_stays_it() -> None:
    def step(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        x[1:3] = row
        return x

    compiled = tessel.compile(step, target="cpu")
    x = torch.zeros(4, 2)
    with torch.no_grad():
        assert compiled(x, torch.ones(2, 2)) is x
    assert x.tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]


def test_inputs_in_other_layouts_and_inputs_that_share_memory() -> None:
    both(cache_step, torch.randn(16, 2, 4).transpose(0, 1), torch.tensor([3]), torch.randn(2, 1, 4))

    def two(x: torch.Tensor, y: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        x[1] = row
        return y * 2

    for start in (0, 1, 4):  # the same, overlapping, apart; torch itself guards only against the first
        torch._dynamo.reset()
        compiled = tessel.compile(two, target="cpu")
        results = []
        for fn in (two, compiled):
            base = torch.arange(32.0)
            x, y = base[:12].view(3, 4), base[start * 4 : start * 4 + 12].view(3, 4)
            with torch.no_grad():
                results.append((fn(x, y, torch.full((4,), -1.0)), base))
        (want, old), (got, new) = results
        assert torch.equal(want, got) and torch.equal(old, new)


def test_elements_that_overlap_are_refused_as_in_eager() -> None:
    def step(x: torch.Tensor, row: torch.Tensor) -> None:
        x[1:3] = row

    x = torch.zeros(1, 4).expand(4, 4)
    for fn in (step, tessel.compile(step, target="cpu")):
        with pytest.raises(RuntimeError), torch.no_grad():
            fn(x, torch.ones(2, 4))


def test_an_index_out_of_range_breaks_nothing() -> None:
    compiled = tessel.compile(cache_step, target="cpu")
    x = torch.zeros(2, 4, 3)
    with torch.no_grad():
        compiled(x, torch.tensor([1]), torch.ones(2, 1, 3))
        with pytest.raises((IndexError, RuntimeError)):
            compiled(x, torch.tensor([9]), torch.ones(2, 1, 3))
        got = compiled(x, torch.tensor([2]), torch.ones(2, 1, 3))
    assert got.tolist() == [[4.0] * 3] * 2


def test_training_keeps_what_the_backward_needs() -> None:
    def step(cache: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        cache[1:3] = x
        return (torch.sin(cache.clone()) * w).sum()

    torch._dynamo.reset()
    compiled = tessel.compile(step, target="cpu")
    found = []
    for fn in (step, compiled):
        torch.manual_seed(0)
        cache, x, w = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
        fn(cache, x, w).backward()
        found.append((cache, w.grad))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b)


def test_reasons_and_bytes() -> None:
    text = """
graph "g"
  %0: f32[100,4] = input "cache"
  %1: f32[2,4] = input "rows"
  %2: f32[100,4] = slice_scatter(%0, %1, dim=0, start=1, size=2, step=1)
  %3: f32[100,4] = exp(%0)
  effect %0 := %2
  return {}
"""
    free, held = (parse_graph(text.format(r), OPS) for r in ("%1", "%3"))
    (reason,) = inplace.notes(held)
    assert reason.startswith("cache is changed in part but copied whole: the old value is read by exp")
    assert bytes_moved(inplace.run(held)) == bytes_moved(held)
    done = inplace.run(free.live())
    assert inplace.notes(free.live()) == [] and bytes_moved(done) == 2 * 2 * 4 * 4
