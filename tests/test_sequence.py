"""Small kernels run by one call: places in the block, the same bits as one by one, threads, errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from memory_graphs import drawn
from torch.nn import functional as F

import tessel
from tessel.codegen.steps import Launch
from tessel.ir.node import Builder, Graph, Node, Value, make_input
from tessel.ir.types import TensorType, symbol
from tessel.models import load_model
from tessel.ops import OPS
from tessel.runtime import program
from tessel.runtime.buffers import span_bytes
from tessel.runtime.sequence import BLOCK, SMALL, plan_places


@pytest.fixture(autouse=True)
def _fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def launched(node: Node) -> Launch | None:
    """Every operator a kernel, views and library operators not."""
    if node.op.kind in ("view", "library", "effect"):
        return None
    outs = tuple(("out", i) for i in range(len(node.outs)))
    return Launch(node.op.name, (), (*(("in", i) for i in range(len(node.operands))), *outs), tuple(node.symbols()))


def test_places_of_values_alive_together_never_overlap() -> None:
    shared = 0
    for seed in range(80):
        g = drawn(seed)
        plan = plan_places(g, launched)
        if plan is None:
            continue
        born = {v: i for i, n in enumerate(g.nodes) for v in n.outs}
        last = {v: i for i, n in enumerate(g.nodes) for v in (*n.outs, *n.operands)}
        users = g.users()
        for v, offset in plan.at.items():
            assert offset % 64 == 0 and offset + span_bytes(v.type) <= plan.bytes
            assert v not in g.results() and all(launched(u) for u in users.get(v, ()))
        values = list(plan.at)
        for i, v in enumerate(values):
            for w in values[:i]:
                apart = born[v] > last[w] or born[w] > last[v]
                a, b = plan.at[v], plan.at[w]
                beside = a + span_bytes(v.type) <= b or b + span_bytes(w.type) <= a
                assert apart or beside, (seed, v, w)
                shared += not beside
        covered = [i for start, end in plan.runs.items() for i in range(start, end)]
        assert covered == [i for i, n in enumerate(g.nodes) if launched(n)]
    assert shared > 100


def test_large_or_symbolic_values_have_no_places() -> None:
    def chain(*shape: Any, n: int = 3) -> Graph:
        x = make_input("x", TensorType(shape, torch.float32))
        b = Builder([x])
        v: Value = x.out
        for _ in range(n):
            v = b.add(OPS["neg"], v)
        return b.finish([v])

    plan = plan_places(chain(64, SMALL // 256), launched)
    assert plan is not None and plan.bytes == 2 * SMALL and plan.runs == {0: 3}
    assert plan_places(chain(64, SMALL // 256 + 1), launched) is None
    assert plan_places(chain(symbol("s0"), 4), launched) is None

    x = make_input("x", TensorType((64, SMALL // 256), torch.float32))
    b = Builder([x])
    many = [b.add(OPS["neg"], x.out) for _ in range(BLOCK // SMALL + 1)]
    total = many[0]
    for v in many[1:]:
        total = b.add(OPS["add"], total, v)
    assert plan_places(b.finish([total]), launched) is None


def by_hand(fn: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiled so that Python makes every launch."""

    def compiled(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as m:
            m.setattr(program, "all_native", lambda kernels: False)
            torch._dynamo.reset()
            return tessel.compile(fn, target="cpu")(*args, **kwargs)

    return compiled


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_models_give_the_bits_of_single_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, args, kwargs = load_model(f"hf:{name}", batch=1, seq=7)
    with torch.no_grad():
        want = by_hand(fn, monkeypatch)(*args, **kwargs)[0]
        torch._dynamo.reset()
        fast = tessel.compile(fn, target="cpu")
        for _ in range(3):
            assert torch.equal(fast(*args, **kwargs)[0], want)
    host = tessel.explain(fast).compilations[0].host
    assert "run0(" in host and "block = empty(" in host


def small(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = F.layer_norm(x, (32,))
    for _ in range(3):
        h = torch.softmax(h @ w, -1) + h.sort(-1).values  # a call to torch between the kernels
        h = F.layer_norm(h * 2 - 1, (32,))
    return h, h.sum(0)


def test_calls_to_torch_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(9, 32), torch.randn(32, 32)
    want = by_hand(small, monkeypatch)(x, w)
    torch._dynamo.reset()
    got = tessel.compile(small, target="cpu")(x, w)
    assert all(map(torch.equal, got, want))
    for a, b in zip(got, small(x, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_many_threads_at_once() -> None:
    fast = tessel.compile(small, target="cpu")
    inputs = [(torch.randn(9, 32), torch.randn(32, 32)) for _ in range(4)]
    want = [fast(*i) for i in inputs]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(200):
            if not all(map(torch.equal, fast(*inputs[k]), want[k])):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_results_are_new_memory_every_time() -> None:
    fast = tessel.compile(small, target="cpu")
    x, w = torch.randn(9, 32), torch.randn(32, 32)
    first = fast(x, w)
    kept = [t.clone() for t in first]
    fast(x + 1, w)
    assert all(map(torch.equal, first, kept))


def test_a_kernel_that_stops_stops_the_run() -> None:
    def f(x: torch.Tensor, i: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = torch.softmax(x, -1).sum(0)
        return torch.softmax(t[i] * h, -1) @ t.t()

    x, t = torch.randn(5, 8), torch.randn(20, 8)
    fast = tessel.compile(f, target="cpu")
    good = torch.tensor([1, 19, 3])
    want = fast(x, good, t)
    torch.testing.assert_close(want, f(x, good, t))
    with pytest.raises(IndexError, match="index out of range"):
        fast(x, torch.tensor([1, 20, 3]), t)
    assert torch.equal(fast(x, good, t), want)


def test_gradients() -> None:
    x = torch.randn(9, 32, requires_grad=True)
    w = torch.randn(32, 32, requires_grad=True)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.softmax(F.layer_norm(torch.tanh(x @ w), (32,)), -1).pow(2).sum()

    want = torch.autograd.grad(loss(x, w), (x, w))
    fast = tessel.compile(loss, target="cpu")
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(fast(x, w), (x, w)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
