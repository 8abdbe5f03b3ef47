"""Fused linear and cross-entropy: the CPU kernel against float64, its capture from models, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tessel
from tessel.ops.loss import (
    linear_cross_entropy_backward_ref,
    linear_cross_entropy_gradients_ref,
    linear_cross_entropy_ref,
)
from tessel.runtime import loss_cpu as kernels

# Of the terms that are added up: what rounding sums of some hundred in f32 does, and rounding operands and results.
SUMS = 1e-6
BOUND = {torch.float32: 0.0, torch.bfloat16: 3 * 2**-8}


def dtypes() -> list[torch.dtype]:
    from tessel.codegen.cpp.gemm import multiplies_bf16
    from tessel.targets import get_target

    half = multiplies_bf16(get_target("cpu").features)
    return [torch.float32, *([torch.bfloat16] if half else [])]


def eager(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, target: torch.Tensor, ignore: int, smoothing: float, cap: float
) -> torch.Tensor:
    """The losses by torch's own operators."""
    logits = F.linear(x, weight, bias)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    return F.cross_entropy(logits, target, ignore_index=ignore, label_smoothing=smoothing, reduction="none")


Sizes = list[torch.Tensor]


def sizes(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any, target: torch.Tensor, ignore: int,
    smoothing: float, cap: float,
) -> tuple[Sizes, Sizes]:  # fmt: skip
    """Of the losses and the gradients of x, weight and bias: the sums of their terms' absolute values, and these with
    what rounding the logits does to each term. All in float64."""
    logits = x @ weight.t() + (0 if bias is None else bias)
    terms = x.abs() @ weight.abs().t() + (0 if bias is None else bias.abs())
    slope = torch.ones_like(logits)
    if cap:
        logits, slope = torch.tanh(logits / cap) * cap, 1 - torch.tanh(logits / cap) ** 2
    counted = target != ignore
    d = torch.softmax(logits, 1) + smoothing / logits.shape[1]
    d = d.scatter_add(1, torch.where(counted, target, 0)[:, None], torch.ones_like(d[:, :1]))
    d = d * (grad.abs() * counted)[:, None]
    top = terms.amax(1, keepdim=True)
    loss = (logits.logsumexp(1).abs() + logits.abs().amax(1)) * counted
    both = []
    for base, each in ((loss, d * slope), (loss + top[:, 0] * counted, d * (1 + 2 * top))):
        both.append([base, each @ weight.abs(), each.t() @ x.abs(), each.sum(0)])
    return both[0], both[1]


def near(
    got: torch.Tensor, want: torch.Tensor, plain: torch.Tensor, rounded: torch.Tensor, dtype: torch.dtype, what: str
) -> None:
    assert got.shape == want.shape, what
    far = (got.double() - want).abs()
    assert (far <= BOUND[dtype] * plain + SUMS * rounded).all(), f"{what}: {float((far / rounded).max())}"


def compare(dtype: torch.dtype, operands: list[Any], ignore: int, s: float, cap: float) -> None:
    """Kernel and reference against autograd in float64, elementwise, by the sizes of the terms."""
    target = operands[3]
    grad = torch.randn(target.shape)
    more = {"ignore_index": ignore, "label_smoothing": s, "softcap": cap}

    def judge(by: Any, slope: torch.Tensor, results: Any, own: torch.dtype) -> None:
        """``own``: what the losses are rounded to. References round logits to the dtype as well."""
        wide = [None if t is None else t.double().requires_grad_() for t in operands[:3]]
        want = eager(*wide, target, ignore, s, cap)  # type: ignore[arg-type]
        grads = torch.autograd.grad(want, [t for t in wide if t is not None], slope.double())
        exact = [None if t is None else t.detach() for t in wide]
        plain, rounded = sizes(slope.double(), *exact, target, ignore, s, cap)  # type: ignore[arg-type]
        plain = plain if by is kernels else rounded
        loss, *made = results
        near(loss, want.detach(), plain[0], rounded[0], own, "loss")
        for i, (g, w) in enumerate(zip((g for g in made if g.numel()), grads, strict=False), start=1):
            near(g, w, plain[i], rounded[i], dtype, ("", "dx", "dweight", "dbias")[i])

    for by, forward, backward, gradients in (
        (kernels, kernels.forward, kernels.backward, kernels.gradients),
        (None, linear_cross_entropy_ref, linear_cross_entropy_backward_ref, linear_cross_entropy_gradients_ref),
    ):
        own = torch.float32 if by is kernels else dtype
        loss, lse = forward(*operands, **more)
        judge(by, grad, (loss, *backward(grad, *operands, lse, **more)), own)
        if not (s and cap):  # no kernel of both at once
            judge(by, torch.ones_like(grad), gradients(*operands, **more), own)


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize(
    ("n", "k", "v", "bias", "ignore", "smoothing", "cap"),
    [
        (13, 24, 97, True, -100, 0.0, 0.0),
        (1, 33, 4099, False, -100, 0.1, 0.0),  # one token: dot products, two spans of classes
        (70, 16, 2100, True, 5, 0.2, 4.0),
        (1030, 7, 51, False, -100, 0.0, 2.0),  # two blocks of tokens
        (9, 3001, 50, False, -100, 0.0, 0.0),  # k in parts
        (4, 8, 1, True, -100, 0.0, 0.0),  # one class
    ],
)
def test_sizes(
    dtype: torch.dtype,
    n: int,
    k: int,
    v: int,
    bias: bool,
    ignore: int,
    smoothing: float,
    cap: float,
) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, v, (n,))
    target[1::4] = ignore
    operands = [torch.randn(n, k), torch.randn(v, k) / k**0.5, torch.randn(v) if bias else None]
    operands = [None if t is None else t.to(dtype) for t in operands]
    compare(dtype, [*operands, target], ignore, smoothing, cap)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    v=st.integers(2, 130),
    ignored=st.sampled_from(["none", "some", "all"]),
    bias=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3]),
    cap=st.sampled_from([0.0, 3.0]),
    strided=st.booleans(),
    dtype=st.sampled_from(dtypes()),
)
def test_shapes(
    n: int,
    k: int,
    v: int,
    ignored: str,
    bias: bool,
    smoothing: float,
    cap: float,
    strided: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(n * 1000 + k)
    target = torch.randint(0, v, (n,))
    target[{"none": slice(0, 0), "some": slice(0, n, 2), "all": slice(0, n)}[ignored]] = -100
    x = torch.randn(n, 2 * k).to(dtype)[:, :k] if strided else torch.randn(n, k).to(dtype)
    operands = [x, torch.randn(v, k).to(dtype), torch.randn(v).to(dtype) if bias else None, target]
    compare(dtype, operands, -100, smoothing, cap)


def test_numbers_that_are_none() -> None:
    """NaN and infinities of logits give what eager gives; threads change no bit."""
    torch.manual_seed(0)
    x, weight, target = torch.randn(6, 8), torch.randn(5000, 8), torch.randint(0, 5000, (6,))
    x[0, 0], x[1, 0], x[2] = torch.nan, torch.inf, 1e30
    got, _ = kernels.forward(x, weight, None, target)
    want = F.cross_entropy(x @ weight.t(), target, reduction="none")
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got[3:], want[3:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernels.forward(x, weight, None, target)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one[0], got, rtol=0, atol=0, equal_nan=True)


def test_pieces_of_the_vocabulary() -> None:
    """What a mesh that splits the classes runs: partial results merge into the whole."""
    from tessel.ops.combine import Part, combine

    torch.manual_seed(0)
    x, weight, target = torch.randn(9, 8), torch.randn(50, 8), torch.randint(0, 50, (9,))
    target[2] = -100
    whole = kernels.forward(x, weight, None, target)
    parts = []
    for start, size in ((0, 20), (20, 30)):
        piece = weight[start : start + size]
        got = kernels.forward(x, piece, None, target, offset=start, classes=50)
        parts.append(Part(start, size, (x, piece, target), got))
    for i in range(2):
        got = combine("nll-merge", parts, {}, i)
        torch.testing.assert_close(got[target >= 0], whole[i][target >= 0])


# ---------------------------------------------------------------- capture


class Head(torch.nn.Module):
    """A language model's head and loss as transformers writes them."""

    def __init__(self, vocabulary: int = 211, cap: float = 0.0, give_logits: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, 24)
        self.head = torch.nn.Linear(24, vocabulary, bias=False)
        self.vocabulary, self.cap, self.give_logits = vocabulary, cap, give_logits

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, items: Any = None, **more: Any) -> Any:
        logits = self.head(torch.tanh(self.embed(ids)))
        if self.cap:
            logits = logits / self.cap
            logits = torch.tanh(logits)
            logits = logits * self.cap
        wide = logits.float()
        labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        reduction = "mean" if items is None else "sum"
        loss = F.cross_entropy(wide.view(-1, self.vocabulary), labels.view(-1), reduction=reduction, **more)
        loss = loss if items is None else loss / items
        return (loss, logits) if self.give_logits else loss


def called(fn: Any) -> list[str]:
    return [c.operator for run in tessel.explain(fn).compilations for c in run.calls]


@pytest.mark.parametrize(
    ("cap", "more"),
    [(0.0, {}), (3.0, {"label_smoothing": 0.1}), (0.0, {"items": 7})],
    ids=["mean", "softcap", "items"],
)
def test_capture(cap: float, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids = Head(cap=cap), torch.randint(0, 211, (3, 11))
    fast = tessel.compile(model, target="cpu")
    want = model(ids, ids, **more)
    want.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    got = fast(ids, ids, **more)
    got.backward()
    torch.testing.assert_close(got, want)
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids, ids, **more), want)
    names = called(fast)
    joined = ["linear_cross_entropy_gradients", "scaled_gradients"]  # logits are made once
    if cap and more:
        joined = ["linear_cross_entropy", "linear_cross_entropy_backward"]  # which no one kernel has
    assert sorted(n for n in names if "gradients" in n or "entropy" in n) == sorted([*joined, "linear_cross_entropy"])


def test_gradients_that_are_kept() -> None:
    """A backward that keeps the graph changes nothing that was saved; one that does not scales it in place."""
    torch._dynamo.reset()
    weight, x, target = torch.randn(50, 8, requires_grad=True), torch.randn(6, 8), torch.randint(0, 50, (6,))

    def fn(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    with torch._functorch.config.patch(donated_buffer=False):  # torch's own objection to a second backward
        loss = tessel.compile(fn, target="cpu")(x)
        (want,) = torch.autograd.grad(fn(x), weight)
        for by, keep in ((3.0, True), (0.5, True), (2.0, False)):
            (got,) = torch.autograd.grad(loss, weight, torch.tensor(by), retain_graph=keep)
            torch.testing.assert_close(got, want * by)


def test_losses_that_are_weighed_one_by_one() -> None:
    """Every token has a gradient of its own: the logits are made again in the backward."""
    torch._dynamo.reset()
    weight, x, target = torch.randn(50, 8, requires_grad=True), torch.randn(6, 8), torch.randint(0, 50, (6,))
    scale = torch.rand(6)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(F.linear(x, weight), target, reduction="none") * scale).sum()

    fast = tessel.compile(fn, target="cpu")
    (got,), (want,) = (torch.autograd.grad(f(x), weight) for f in (fast, fn))
    torch.testing.assert_close(got, want)
    assert "linear_cross_entropy_backward" in called(fast)


def test_logits_that_are_read_are_written() -> None:
    torch._dynamo.reset()
    model, ids = Head(give_logits=True), torch.randint(0, 211, (2, 5))
    fast = tessel.compile(model, target="cpu")
    with torch.no_grad():
        for a, b in zip(fast(ids, ids), model(ids, ids), strict=True):
            torch.testing.assert_close(a, b)
    assert "linear_cross_entropy" not in called(fast)
    notes = [n for run in tessel.explain(fast).compilations for n in run.notes]
    assert any("something else reads the logits" in n for n in notes)


def test_errors_are_eagers() -> None:
    torch._dynamo.reset()
    model, ids = Head(), torch.randint(0, 211, (2, 5))
    fast = tessel.compile(model, target="cpu")
    for wrong in (ids + 300, -ids - 1):
        with pytest.raises(IndexError) as want:
            model(ids, wrong)
        with pytest.raises(IndexError) as got:
            fast(ids, wrong)
        assert str(got.value) == str(want.value)
    ignored = torch.full_like(ids, -100)
    assert fast(ids, ignored).isnan() and model(ids, ignored).isnan()
    fast(ids, ignored).backward()
    assert model.head.weight.grad is not None and not model.head.weight.grad.any()


def test_writes_in_place_stay() -> None:
    """A rewrite of the loss leaves alone what it did not make dead: a method that writes in place."""
    torch._dynamo.reset()
    weight = torch.randn(50, 8)

    def fn(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(x)
        mask.scatter_(1, target[:, None] % 8, 1.0)
        return F.cross_entropy(F.linear(x * mask, weight), target)

    x, target = torch.randn(6, 8), torch.randint(0, 50, (6,))
    with torch.no_grad():
        torch.testing.assert_close(tessel.compile(fn, target="cpu")(x, target), fn(x, target))


def test_a_classifier_is_left_alone() -> None:
    """Fewer classes than features: its logits are smaller than the hidden states."""
    torch._dynamo.reset()
    weight, x, target = torch.randn(10, 16), torch.randn(6, 16), torch.randint(0, 10, (6,))

    def fn(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    fast = tessel.compile(fn, target="cpu")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), fn(x))
    assert not any("linear_cross_entropy" in name for name in called(fast))


def test_float64_runs_by_the_reference() -> None:
    torch._dynamo.reset()
    x, weight, target = torch.randn(6, 8).double(), torch.randn(50, 8).double(), torch.randint(0, 50, (6,))

    def fn(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight), target, reduction="sum")

    fast = tessel.compile(fn, target="cpu")
    with torch.no_grad():
        torch.testing.assert_close(fast(x, target), fn(x, target))
    (reason,) = (c.reason for r in tessel.explain(fast).compilations for c in r.calls if "linear" in c.operator)
    assert "float64 has no kernel" in reason
