"""Inputs changed in part are written where they are, or copied whole where that could show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tessel
from tessel.ir.interp import interpret
from tessel.ir.parse import parse_graph
from tessel.ir.text import print_graph
from tessel.ir.verify import verify
from tessel.ops import OPS
from tessel.passes import inplace, writes
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
    assert "write_1_index_put(" in text and copied(text) == []
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
    assert ("slice_scatter_(a" if dynamic else "_slice_scatter(") in text and copied(text) == []


def _places(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def _put(x: torch.Tensor, rows: torch.Tensor, *at: torch.Tensor | None) -> None:
    x[tuple(slice(None) if i is None else i for i in at)] = rows


WRITTEN: dict[str, tuple[Callable[..., Any], Callable[[], Tensors]]] = {
    "negative and doubled": (_put, lambda: (torch.randn(8, 33), torch.randn(5, 33), _places(1, -3, 1, 1, 5))),
    "in the middle": (
        lambda x, rows, i: _put(x, rows, None, i),
        lambda: (torch.randn(2, 9, 17), torch.randn(2, 3, 17), _places(8, 0, -1)),
    ),
    "two side by side": (_put, lambda: (torch.randn(4, 5, 64), torch.randn(3, 64), _places(0, 3, 1), _places(4))),
    "two apart": (
        lambda x, rows, i, j: _put(x, rows, i, None, j),
        lambda: (torch.randn(4, 3, 5, 16), torch.randn(2, 3, 16), _places(3, 1), _places(0, -1)),
    ),
    "a row for all": (_put, lambda: (torch.randn(8, 31), torch.randn(31), _places(2, 7))),
    "a number": (lambda x, i: _put(x, 2.5, i), lambda: (torch.randn(8, 31), _places(2, 7))),
    "of another layout": (
        lambda x, rows, i: _put(x, rows.t(), None, i),
        lambda: (torch.randn(6, 2, 40).transpose(0, 1), torch.randn(40, 1), _places(4)),
    ),
    "steps": (lambda x, rows: x[:, 1:8:3].copy_(rows), lambda: (torch.randn(2, 9, 8), torch.randn(3, 8))),
    "one row of one": (_put, lambda: (torch.randn(1, 1), torch.randn(1, 1), _places(0))),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_rows_that_kernels_write(name: str, dtype: torch.dtype) -> None:
    fn, make = WRITTEN[name]
    if name == "a number" and not dtype.is_floating_point:
        pytest.skip("2.5 is no whole number")
    args = [t.mul(3).to(dtype) if t.is_floating_point() else t for t in make()]
    text, report = both(lambda *t: (fn(*t), None)[1], *args)
    assert " 0 calls to torch" in text and copied(text) == [], text
    assert not report.compilations[-1].calls


@pytest.mark.parametrize("wrong", [4, -5, 2**40])
def test_a_place_out_of_range_writes_nothing(wrong: int) -> None:
    compiled = tessel.compile(lambda x, i, rows: _put(x, rows, None, i), target="cpu")
    x = torch.zeros(2, 4, 3)
    with torch.no_grad(), pytest.raises(IndexError):
        compiled(x, torch.tensor([wrong]), torch.ones(2, 1, 3))
    assert not x.any()


def test_rows_are_written_in_place_without_a_compiler_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "broken 1.0" && exit\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="no compiled kernels"):
        text, _ = both(cache_step, torch.randn(2, 16, 4), torch.tensor([3, 7]), torch.randn(2, 2, 4))
    assert "write_1_index_put(a" in text and copied(text) == []


def test_large_writes_are_worth_all_threads() -> None:
    text, _ = both(lambda x, i, rows: _put(x, rows, i), torch.zeros(40, 2**14), _places(*range(20)), torch.ones(2**14))
    assert "index_put_(a" in text and "1 calls to torch" in text


def test_writes_take_their_views_along() -> None:
    text = """
graph "g"
  %0: f32[2,5,3] = input "cache"
  %1: i64[1] = input "at"
  %2: f32[6] = input "rows"
  %3: f32[6] = exp(%2)
  %4: f32[2,1,3] = reshape(%3, shape=(2, 1, 3))
  %5: f32[2,5,3] = index_put_(%0, (None, %1), %4)
  effect %0 := %5
  return {}
"""
    alone = writes.run(parse_graph(text.format(""), OPS))
    assert [n.op.name for n in alone.nodes] == ["exp", "write"]
    assert [n.op.name for n in alone.nodes[-1].regions[0].nodes] == ["reshape", "index_put_"]
    assert [n.op.name for n in writes.run(parse_graph(text.format("%4"), OPS)).nodes] == ["exp", "reshape", "write"]
    verify(alone, OPS)
    again = parse_graph(print_graph(alone), OPS)
    args = torch.zeros(2, 5, 3), _places(-1), torch.randn(6)
    (one,), (other,) = (interpret(g, args) for g in (alone, again))
    assert torch.equal(one[:, 4], args[2].exp().view(2, 3)) and torch.equal(one, other)
    assert bytes_moved(alone) == (2 * 6 + 2 * 6) * 4 + 8


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
