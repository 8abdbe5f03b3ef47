"""Caches and packed batches: pages by their table, static caches, documents, block-sparse layouts; C++ and Triton."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import gpu_kernels
from offline_record import Recorded

import tessel
from tessel.codegen.triton import render
from tessel.targets import get_target

TARGETS = ("cpu", "triton-interpret")
TEMPLATE = {"attention": "template"}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(fn: Callable[..., Any], target: str, *args: torch.Tensor) -> tuple[Any, list[Any]]:
    """What the compiled function gives without gradients, and its kernels."""
    fast = tessel.compile(fn, target=target, options=TEMPLATE, dynamic=False)
    with torch.no_grad():
        got = fast(*args)
        (graph,) = tessel.explain(fast, *args).compilations[-1:]
    assert not graph.fallbacks
    return got, graph.kernels


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Each test compiles anew: past torch's limit a function would run without Tessel."""
    torch._dynamo.reset()


# ---------------------------------------------------------------- pages


def by_table(q: Any, pages: Any, values: Any, table: Any, lengths: Any) -> torch.Tensor:
    """Pages ``[count, page, heads, width]``; ``table [batch, pages of a sequence]``."""
    k, v = (p[table].flatten(1, 2).transpose(1, 2) for p in (pages, values))
    at = torch.arange(k.shape[2])
    last = lengths[:, None, None, None] - q.shape[2] + torch.arange(q.shape[2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=at <= last, enable_gqa=True)


def by_select(q: Any, pages: Any, values: Any, table: Any, lengths: Any) -> torch.Tensor:
    """The same pages, looked up by a flat list."""

    def read(p: torch.Tensor) -> torch.Tensor:
        rows = p.index_select(0, table.flatten())
        return rows.unflatten(0, tuple(table.shape)).flatten(1, 2).transpose(1, 2)

    seen = torch.arange(table.shape[1] * pages.shape[1]) < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(q, read(pages), read(values), attn_mask=seen, enable_gqa=True)


def paged(m: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    pages, values = rand(12, 16, 2, 32), rand(12, 16, 2, 32, seed=1)
    table = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:5] for i in range(2)])
    lengths = torch.tensor([41, 80])
    table[0, 3:] = -1  # never read by what is seen; the last page, as indexing has it
    return [rand(2, 8, m, 32).to(dtype), pages.to(dtype), values.to(dtype), table, lengths]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("m", (1, 5))
@pytest.mark.parametrize("how", (by_table, by_select))
def test_pages_are_read_where_they_lie(target: str, m: int, how: Callable[..., torch.Tensor]) -> None:
    args = paged(m)
    if how is by_select:
        args[3] = args[3].clamp(min=0)
    got, kernels = run(how, target, *args)
    torch.testing.assert_close(got, how(*args), rtol=1e-5, atol=1e-5)
    assert [k.family for k in kernels if "attention" in k.name] == ["attention"]
    assert not any("index" in k.name for k in kernels), "both gathers are in the kernel"


@pytest.mark.parametrize("target", TARGETS)
def test_pages_in_half_precision(target: str) -> None:
    args = paged(3, torch.bfloat16)
    got, _ = run(by_table, target, *args)
    want = by_table(*(x.double() if x.is_floating_point() else x for x in args))
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("target", TARGETS)
def test_a_page_that_there_is_not(target: str) -> None:
    args = paged(1)
    fast = tessel.compile(by_table, target=target, options=TEMPLATE, dynamic=False)
    with torch.no_grad():
        fast(*args)
        args[3][1, 4] = 12
        with pytest.raises(IndexError, match="out of range|out of bounds"):
            fast(*args)


# ---------------------------------------------------------------- static caches


def into_cache(q: Any, k: Any, v: Any, keys: Any, values: Any, at: Any) -> torch.Tensor:
    """A step with a cache of fixed size ``[batch, heads, size, width]``; new keys go to the places ``at``."""
    keys, values = keys.index_copy(2, at, k), values.index_copy(2, at, v)
    seen = torch.arange(keys.shape[2]) <= at[:, None]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("at", ([0], [63], [7, 8, 9]))
def test_static_cache(target: str, at: list[int]) -> None:
    m = len(at)
    args = [
        rand(2, 4, m, 16),
        *(rand(2, 2, m, 16, seed=i) for i in (1, 2)),
        *(rand(2, 2, 64, 16, seed=i) for i in (3, 4)),
    ]
    got, _ = run(into_cache, target, *args, torch.tensor(at))
    torch.testing.assert_close(got, into_cache(*args, torch.tensor(at)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_a_cache_position_past_the_end(target: str) -> None:
    args = [
        rand(1, 2, 1, 16),
        *(rand(1, 2, 1, 16, seed=i) for i in (1, 2)),
        *(rand(1, 2, 8, 16, seed=i) for i in (3, 4)),
    ]
    fast = tessel.compile(into_cache, target=target, options=TEMPLATE, dynamic=False)
    with torch.no_grad():
        fast(*args, torch.tensor([7]))
        for past in (8, 1000):
            with pytest.raises((IndexError, RuntimeError), match="out of range|out of bounds|index"):
                fast(*args, torch.tensor([past]))


# ---------------------------------------------------------------- packed batches and layouts


def packed(q: Any, k: Any, v: Any, starts: Any) -> torch.Tensor:
    """Causal attention inside documents that stand one after another; ``starts`` as cumulative lengths."""
    at = torch.arange(q.shape[2])
    doc = (at[:, None] >= starts).sum(-1)
    seen = (doc[:, None] == doc) & (at[:, None] >= at)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def layout(q: Any, k: Any, v: Any, blocks: Any) -> torch.Tensor:
    """``blocks [heads, length / 16, length / 16]`` says which blocks of 16 x 16 scores are seen."""
    seen = blocks.repeat_interleave(16, -1).repeat_interleave(16, -2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def looked_up(q: Any, k: Any, v: Any, blocks: Any) -> torch.Tensor:
    """The same, by an index."""
    block = torch.arange(q.shape[2]) // 16
    return F.scaled_dot_product_attention(q, k, v, attn_mask=blocks[:, block[:, None], block])


def longformer(q: Any, k: Any, v: Any, far: Any) -> torch.Tensor:
    """A window to both sides, and tokens that see all and are seen by all (Beltagy et al., 2020)."""
    at = torch.arange(q.shape[2])
    seen = ((at[:, None] - at).abs() <= 8) | far[:, None] | far
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def masks(name: str, n: int) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    if name == "packed":
        return packed, torch.tensor([0, 3, 4, n // 3, n])
    if name == "longformer":
        return longformer, torch.arange(n) % 67 == 0
    blocks = torch.rand(4, -(-n // 16), -(-n // 16), generator=torch.Generator().manual_seed(0)) > 0.7
    blocks[:, 1] = False  # rows that see nothing
    return (layout if name == "layout" else looked_up), blocks


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("cpu", "longformer"),
        ("triton-interpret", "layout"),
        *(slow("cpu", name) for name in ("packed", "layout", "looked_up")),
        *(slow("triton-interpret", name) for name in ("packed", "longformer", "looked_up")),
    ],
)
def test_packed_and_sparse(target: str, name: str) -> None:
    n = 144
    fn, held = masks(name, n)
    q, k, v = (rand(2, 4, n, 16, seed=i).requires_grad_() for i in range(3))
    fast = tessel.compile(fn, target=target, options=TEMPLATE, dynamic=False)
    grad = rand(2, 4, n, 16, seed=9)
    results = []
    for f, wide in ((fast, False), (fn, True)):
        ins = [x.detach().double().requires_grad_() if wide else x for x in (q, k, v)]
        out = f(*ins, held)
        results.append([out.detach(), *torch.autograd.grad(out, ins, grad.to(out.dtype))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), torch.nan_to_num(want), rtol=1e-4, atol=1e-5)
    assert not tessel.explain(fast, q, k, v, held).compilations[-1].fallbacks


# ---------------------------------------------------------------- shapes that are easily forgotten


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 5), (5, 0), (1, 1), (1, 7), (3, 1)])
def test_lengths_of_nought_and_one(target: str, m: int, n: int) -> None:
    def fn(q: Any, k: Any, v: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    args = [rand(2, 4, m, 16), rand(2, 4, n, 16, seed=1), rand(2, 4, n, 24, seed=2)]
    fast = tessel.compile(fn, target=target, options=TEMPLATE, dynamic=False)
    with torch.no_grad():
        got = fast(*args)
    want = fn(*args) if n else torch.zeros(2, 4, m, 24)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "width"),
    [
        *(("triton-interpret", width) for width in (40, 80, 96, 192, 256, 576)),
        ("cpu", 40),
        *(slow("cpu", width) for width in (80, 96, 192, 256, 576)),
    ],
)
def test_head_widths(target: str, width: int) -> None:
    """Odd lengths, one key head, values of another width, a row that a mask hides; forward and gradients."""

    def fn(q: Any, k: Any, v: Any, held: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=held, enable_gqa=True)

    q, k, v = rand(1, 2, 7, width), rand(1, 1, 13, width, seed=1), rand(1, 1, 13, width - 8, seed=2)
    held = rand(7, 13) > -0.5
    held[4] = False
    fast = tessel.compile(fn, target=target, options=TEMPLATE, dynamic=False)
    grad = rand(1, 2, 7, width - 8, seed=3)
    results = []
    for f, dtype in ((fast, torch.float32), (fn, torch.float64)):
        ins = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = f(*ins, held)
        results.append([out.detach(), *torch.autograd.grad(out, ins, grad.to(dtype))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), torch.nan_to_num(want), rtol=1e-4, atol=2e-5)
    assert bool((results[0][0][:, :, 4] == 0).all()) and not any(bool(x.isnan().any()) for x in results[0])


@pytest.mark.parametrize("target", TARGETS)
def test_groups_that_do_not_fit(target: str) -> None:
    fast = tessel.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), target=target, options=TEMPLATE
    )
    with pytest.raises(Exception, match="heads|must match|multiple|divisible"):
        fast(rand(1, 5, 4, 16), rand(1, 2, 4, 16), rand(1, 2, 4, 16))


def test_all_keys_hidden_by_infinity() -> None:
    """-inf everywhere gives zeros in every form, as the documented result of a boolean mask is."""
    held = torch.full((4, 6), -math.inf)
    for target in TARGETS:
        got, _ = run(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=held), target, *[rand(1, 2, 4, 16)] * 1,
            *[rand(1, 2, 6, 16)] * 2,
        )  # fmt: skip
        assert torch.equal(got, torch.zeros(1, 2, 4, 16))


# ---------------------------------------------------------------- GPUs, offline


def one_query(q: Any, k: Any, v: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "queries"), [("a100", 1), ("h100", 16), ("b200", 1), ("mi300x", 16)])
def test_offline(target: str, queries: int, offline: Recorded) -> None:
    """One query for a long cache, its keys in parts that a merge follows; pages, for one query or for several."""
    record = get_target(target)
    cache = (4, 8, 4096, 128)
    decode = [rand(4, 32, 1, 128), rand(*cache), rand(*cache)]
    pages, table = [rand(80, 16, 8, 128)] * 2, torch.arange(64)[None].expand(4, 64)
    kernels = gpu_kernels(one_query, *(x.bfloat16() for x in decode))
    assert len(kernels) > 1, "parts of the keys and their merge"
    args = [x.bfloat16() for x in (rand(4, 32, queries, 128), *pages)]
    kernels += gpu_kernels(by_table, *args, table, torch.full((4,), 1000))
    assert sum(k.family == "attention" for k in kernels) == 2
    sources = [render(k, record) for k in kernels]
    offline.fitting(sources, record)
