"""Families of kernels on drawn shapes, masks and dtypes: every element within the rounding of its own terms.

What each family's own tests ask of chosen sizes is asked here of drawn ones. References are the operators' own, in
float64. The size of an element's terms is what the reference makes of operands that are all positive.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels import check, compiled, interpret, poisoned
from test_attention_kernels import doubled, rand
from test_attention_kernels import run as by_triton
from test_moe import by_definition, dtypes, layer
from test_scan_trace import by_steps, largest, recurrence, swapped, total
from test_scan_triton import IN_ORDER, kernel_of, running_kernel
from test_selective_scan import operands as selective_operands
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan

import tessel
from tessel.errors import TesselError
from tessel.frontend.compat import SCAN_CUTS_CARRY
from tessel.frontend.scan_op import linear_scan
from tessel.ir.types import symbol
from tessel.ops import OPS
from tessel.ops.attention import attention_ref
from tessel.ops.combine import merge_attention
from tessel.ops.scan import FOLDS, linear_scan_ref, running_ref
from tessel.ops.selective import selective_scan_backward_ref
from tessel.runtime import experts_cpu
from tessel.runtime.native import NativeKernel
from tessel.runtime.scan_cpu import SelectiveScan

Tensor = torch.Tensor
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def within(got: Tensor, want: Tensor, size: Tensor, unit: Any) -> None:
    """Each element off by at most ``unit`` of its ``size``, and one rounding of the result."""
    assert got.shape == want.shape
    bound = unit * size + torch.finfo(got.dtype).eps * want.abs() + torch.finfo(F32).tiny
    wrong = (got.double() - want).abs() <= bound
    assert bool(wrong.all()), f"{((got.double() - want).abs() / bound).max()} bounds"


# ---------------------------------------------------------------- attention


def prefix_mask(m: int, n: int, prefix: Any) -> Tensor:
    """The first ``prefix`` keys are seen by all, the others by queries that do not come before them."""
    at = torch.arange(n)
    return (at <= torch.arange(m)[:, None]) | (at < prefix)


def drawn_mask(kind: str, b: int, h: int, m: int, n: int) -> Tensor | None:
    return {
        "none": lambda: None,
        "keys": lambda: rand(b, 1, 1, n) > -0.5,
        "rows": lambda: rand(m, n) > 0,
        "added": lambda: rand(1, h, m, n),
        "hidden": lambda: rand(b, 1, m, n).masked_fill(rand(m, n, seed=7) > 0, -torch.inf),
        "prefix": lambda: prefix_mask(m, n, torch.arange(b).view(b, 1, 1, 1) * n // 2),
    }[kind]()


SIZES = ((1, 2), (1, 2), (1, 3), (1, 33), (1, 33), (1, 40), (1, 40))


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(*x) for x in SIZES)),
    mask=st.sampled_from(("none", "keys", "rows", "added", "hidden", "prefix")),
    dtype=st.sampled_from((F32, BF16, F16, F64)),
    bounds=st.tuples(st.booleans(), st.integers(-3, 9), st.none() | st.integers(1, 20)),
    softcap=st.sampled_from((None, 1.5)),
    with_sink=st.booleans(),
)
def test_attention(
    sizes: tuple[int, ...], mask: str, dtype: torch.dtype, bounds: tuple[Any, ...], softcap: Any, with_sink: bool
) -> None:
    """By Triton's kernels, results and gradients. What is weighed: values that are the identity give the weights."""
    b, hk, group, m, n, d, e = sizes
    q, k, v = (x.to(dtype) for x in (rand(b, hk * group, m, d), rand(b, hk, n, d, seed=1), rand(b, hk, n, e, seed=2)))
    held, sink = drawn_mask(mask, b, hk * group, m, n), rand(hk * group) if with_sink else None
    args = [q, k, v, held, sink]
    attrs = {**dict(zip(("causal", "offset", "window"), bounds, strict=True)), "softcap": softcap}
    attrs = {name: x for name, x in attrs.items() if x is not None}
    exact = list(map(doubled, args))
    out, lse = attention_ref(*exact, **attrs)
    weights, _ = attention_ref(exact[0], exact[1], torch.eye(n, dtype=F64).expand(b, hk, n, n), *exact[3:], **attrs)
    wide = [x.repeat_interleave(group, 1).abs() for x in exact[1:3]]
    scores = exact[0].abs() @ wide[0].transpose(-1, -2) * d**-0.5
    inner = 1e-14 if dtype == F64 else 2e-6
    unit = 4 * torch.finfo(dtype).eps + inner * (8 + float(scores.max()))
    within(by_triton("attention", args, attrs)[0], out, weights @ wide[1], unit)

    grad = rand(*out.shape, seed=5).to(dtype)
    of = grad.double().abs()
    want = OPS["attention_backward"].ref(grad.double(), *exact, out, lse, **attrs)
    given_ = [grad, q, k, v, held, *((x.to(F64 if dtype == F64 else F32)) for x in ((grad * out).sum(-1), lse))]
    slopes = of @ wide[1].transpose(-1, -2) + (of * (weights @ wide[1])).sum(-1, keepdim=True)
    slopes = weights * slopes * d**-0.5
    (dq,) = by_triton("attention_backward_queries", given_, attrs)
    dk, dv = by_triton("attention_backward_keys", given_, attrs)
    within(dq, want[0], slopes @ wide[0], unit)
    for got, exactly, terms in ((dk, want[1], (slopes, exact[0].abs())), (dv, want[2], (weights, of))):
        size = (terms[0].transpose(-1, -2) @ terms[1]).unflatten(1, (hk, group)).sum(2)
        within(got, exactly, size, unit)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 9), min_size=1, max_size=5), causal=st.booleans(), offset=st.integers(-2, 6))
def test_a_ring(cuts: list[int], causal: bool, offset: int) -> None:
    """Steps over parts of the keys, kept in single precision, in the order in which a ring brings them."""
    q, k, v = rand(1, 4, 7, 8), rand(1, 2, sum(cuts), 8, seed=1), rand(1, 2, sum(cuts), 5, seed=2)
    kept = torch.zeros(1, 4, 7, 5), torch.full((1, 4, 7), -torch.inf)
    for start, size in zip(itertools.accumulate(cuts, initial=0), cuts, strict=False):
        piece = (x[:, :, start : start + size] for x in (k, v))
        kept = merge_attention(kept, attention_ref(q, *piece, causal=causal, offset=offset - start))
    exact = [x.double() for x in (q, k, v)]
    out, lse = attention_ref(*exact, causal=causal, offset=offset)
    size, _ = attention_ref(exact[0], exact[1], exact[2].abs(), causal=causal, offset=offset)
    within(kept[0], out, size, 5e-6)
    torch.testing.assert_close(kept[1].double(), lse, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- scans


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3), time=st.integers(0, 50), d=st.integers(1, 40), n=st.integers(1, 20))
def test_selective_scan(b: int, time: int, d: int, n: int) -> None:
    """Gradients by the C++ kernel; decays are positive whatever A is, so only the others lose their signs."""
    grad, w, dt, A, B, C = selective_operands(b, time, d, n)
    exact = [x.double() for x in (grad, w, dt, A, B, C)]
    sizes = selective_scan_backward_ref(*(x if i in (2, 3) else x.abs() for i, x in enumerate(exact)))
    got = SelectiveScan().backward(grad, w, dt, A, B, C)
    for x, y, size in zip(got, selective_scan_backward_ref(*exact), sizes, strict=True):
        within(x, y, size.abs(), 5e-6)


@settings(max_examples=15, deadline=None)
@given(
    fold=st.sampled_from(FOLDS),
    dtype=st.sampled_from((F32, F64, torch.int32)),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 9)),
    dim=st.integers(0, 2),
    aside=st.booleans(),
)
def test_running_folds(fold: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int, aside: bool) -> None:
    """By Triton's kernels, in order and side by side."""
    dtype = F32 if fold == "logsumexp" and not dtype.is_floating_point else dtype
    x, out = (rand(*shape) * 2).to(dtype), poisoned(shape, dtype)
    knobs = {**IN_ORDER, "XB": 8, **({"SIDE": 64} if aside else {"STEPS": 4})}
    interpret(running_kernel(shape, dim, fold, dtype), [x, out], knobs=knobs)
    want = running_ref(x.double() if dtype.is_floating_point else x, dim, fold)
    size = running_ref(x.double().abs() + 1, dim, "prod" if fold == "prod" else "sum")
    check(out, want, size, 4 * shape[dim])


LENGTHS = tuple(map(symbol, ("s0", "s1", "s2")))
FLOATS = (F32, BF16, F64)


@cache
def recurrences() -> list[NativeKernel]:
    """C++ kernels of any length, along the middle of three dimensions."""
    return compiled([replace(kernel_of(LENGTHS, 1, dtype=t), name=f"scan_{i}") for i, t in enumerate(FLOATS)])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(range(len(FLOATS))), st.integers(1, 4), st.integers(1, 70), st.integers(1, 40))
def test_recurrences(which: int, x: int, time: int, y: int) -> None:
    shape, dtype = (x, time, y), FLOATS[which]
    a, b = rand(*shape).abs().clamp(max=1).to(dtype), rand(*shape, seed=1).to(dtype)
    out = poisoned(shape, dtype)
    recurrences()[which]((), a, b, out, *shape)
    want, size = (linear_scan_ref(a.double(), z, 1) for z in (b.double(), b.double().abs()))
    check(out, want, size, 2 * time)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_recurrences(dim: int, reverse: bool) -> None:
    a, b = (rand(4, 3, seed=i).double().requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(lambda a, b: linear_scan(a, b, dim, reverse), (a, b))


def test_gradients_of_running_folds() -> None:
    """Through the compiler, against autograd in float64."""

    def fn(x: Tensor) -> Tensor:
        found = (x.cumsum(0), x.cumprod(1), x.logcumsumexp(-1), x.cummax(1).values, x.cummin(0).values)
        return torch.stack([f.sin().sum() for f in found]).sum()

    torch._dynamo.reset()
    x = rand(5, 13).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(tessel.compile(fn, target="cpu")(x), x)
    (want,) = torch.autograd.grad(fn(exact), exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def matrices(left: Any, right: Any) -> Any:
    """Products of triangular matrices of two rows."""
    (a, b, c), (d, e, f) = left, right
    return a * d, b * d + c * e, c * f


# Results of positive operands are sums and products of positive terms, and so are their gradients; where they are not,
# another function's are as large.
COMBINES: dict[str, tuple[Any, int, Any]] = {
    "total": (total, 1, total),
    "largest": (largest, 1, total),
    "log_sum": (torch.logaddexp, 1, total),
    "recurrence": (recurrence, 2, recurrence),
    "swapped": (swapped, 2, swapped),
    "matrices": (matrices, 3, matrices),
}


def drawn(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [(rand(*shape, seed=i) * 0.7).to(dtype) for i in range(count)]


def with_gradients(fn: Any, args: list[Tensor], slopes: list[Tensor]) -> list[Tensor]:
    """Results of ``fn``, then the gradients of all arguments."""
    args = [x.detach().requires_grad_() for x in args]
    outs = torch.utils._pytree.tree_leaves(fn(*args))
    grads = torch.autograd.grad(outs, args, [g.to(o.dtype) for o, g in zip(outs, slopes, strict=True)])
    return [o.detach() for o in outs] + list(grads)


def as_it_is_written(fn: Any, want: Any, size: Any, args: list[Tensor], outs: list[Tensor], steps: int) -> None:
    """What is compiled against the definition in float64, results and gradients."""
    slopes = [rand(*o.shape, seed=9 + i) for i, o in enumerate(outs)]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ran eagerly")
        got = with_gradients(tessel.compile(fn, target="cpu", fullgraph=True, dynamic=False), args, slopes)
    wide = [x.double() for x in args]
    exact = with_gradients(want, wide, [g.to(o.dtype).double() for g, o in zip(slopes, outs, strict=True)])
    sizes = with_gradients(size, [x.abs() for x in wide], [g.abs().double() for g in slopes])
    largest = max(float(x.abs().max()) for x in wide)
    for x, y, s in zip(got, exact, sizes, strict=True):
        within(x, y, s, 4 * (steps + 1) * (1 + largest) * torch.finfo(x.dtype).eps)


@settings(max_examples=4, deadline=None)
@given(
    name=st.sampled_from(sorted(COMBINES)),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    dim=st.integers(0, 2),
    reverse=st.booleans(),
    dtype=st.sampled_from((F32, BF16, F64)),
)
def test_associative_scans(name: str, shape: tuple[int, ...], dim: int, reverse: bool, dtype: torch.dtype) -> None:
    combine, count, as_large = COMBINES[name]
    args = drawn(count, shape, dtype)
    if name == "largest":  # no two alike: the gradient of equal ones may go to any
        args = [torch.randperm(args[0].numel()).view(shape).to(dtype) / args[0].numel()]

    def fn(*xs: Tensor) -> Any:
        given_ = xs if count > 1 else xs[0]
        return associative_scan(combine, given_, dim=dim, reverse=reverse, combine_mode="generic")

    def of(combine: Any) -> Any:
        return lambda *xs: by_steps(combine, xs if count > 1 else xs[0], dim, reverse)

    as_it_is_written(fn, of(combine), of(as_large), args, args, shape[dim])


def line(h: Tensor, x: Any) -> Any:
    h = x[0] * h + x[1]
    return h, h * x[1]


def pair(carry: Any, x: Any) -> Any:
    """Two carries, of which one needs the other."""
    h, kept = carry
    h = x[0] * h + x[1]
    kept = kept * 0.5 + (h * x[0]).sum(-1)
    return (h, kept), h * kept[..., None]


def counted(carry: Any, x: Any) -> Any:
    """A carry that is one number, and results of two shapes."""
    h, n = carry
    h = h * x[0] + n * x[1]
    return (h, n + 1), (h * x[1], h.sum(-1))


STEPS: dict[str, Any] = {"line": line, "pair": pair, "counted": counted}


@settings(max_examples=3, deadline=None)
@given(
    name=st.sampled_from(sorted(STEPS)),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5)),
    dim=st.integers(0, 0 if SCAN_CUTS_CARRY else 1),  # before torch 2.13 results lie along dim 0 whatever dim is
    reverse=st.booleans(),
    dtype=st.sampled_from((F32, BF16, F64)),
)
def test_scans(name: str, shape: tuple[int, ...], dim: int, reverse: bool, dtype: torch.dtype) -> None:
    step = STEPS[name]
    a, b = drawn(2, shape, dtype)
    of_one = shape[:dim] + shape[dim + 1 :]
    h = (rand(*of_one, seed=5) * 0.7).to(dtype)
    carry = {"line": [h], "pair": [h, h.sum(-1)], "counted": [h, h.new_tensor(3)]}[name]

    def fn(a: Tensor, b: Tensor, *carry: Tensor) -> Any:
        return scan(step, carry if len(carry) > 1 else carry[0], (a, b), dim=dim, reverse=reverse)

    def want(a: Tensor, b: Tensor, *carry: Tensor) -> Any:
        now: Any = carry if len(carry) > 1 else carry[0]
        steps = list(zip(a.unbind(dim), b.unbind(dim), strict=True))
        ys = []
        for x in steps[::-1] if reverse else steps:
            now, y = step(now, x)
            ys.append(y if isinstance(y, tuple) else (y,))
        ys = ys[::-1] if reverse else ys
        return now, [torch.stack(y, dim) for y in zip(*ys, strict=True)]

    args = [a, b, *carry]
    as_it_is_written(fn, want, want, args, torch.utils._pytree.tree_leaves(want(*args)), shape[dim])


@settings(max_examples=6, deadline=None)
@given(
    of=st.tuples(st.sampled_from((0, 0.5, 1, -1)), st.sampled_from((0, 0.5, 1, 2)), st.sampled_from((0, 1, -0.5))),
    dtype=st.sampled_from((F32, BF16, F64)),
)
@example((1, 1, 1), F32)
@example((1, 0.5, 0), BF16)
def test_what_is_not_associative_is_refused(of: tuple[float, float, float], dtype: torch.dtype) -> None:
    """Of all functions p x + q y + r x y those that are, by algebra, are scanned."""
    p, q, r = of
    x, y, z = sympy.symbols("x y z")

    def combine(x: Any, y: Any) -> Any:
        return p * x + q * y + r * x * y

    def fn(x: Tensor) -> Tensor:
        return associative_scan(combine, x, dim=0, combine_mode="generic")

    args = drawn(1, (6, 3), dtype)
    torch._dynamo.reset()
    fast = tessel.compile(fn, target="cpu", fullgraph=True, dynamic=False)
    if sympy.expand(combine(combine(x, y), z) - combine(x, combine(y, z))) == 0:
        want = by_steps(combine, args[0].double(), 0)
        size = by_steps(lambda x, y: abs(p) * x + abs(q) * y + abs(r) * x * y, args[0].double().abs(), 0)
        within(fast(*args), want, size, 24 * torch.finfo(dtype).eps)
    else:
        with pytest.raises(TesselError, match="is not associative"):
            fast(*args)


# ---------------------------------------------------------------- experts


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(*x) for x in ((1, 30), (1, 40), (1, 9), (1, 40), (1, 3)))),
    bias=st.booleans(),
    dtype=st.sampled_from(dtypes()),
)
def test_experts(sizes: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    """By the C++ kernels. silu(x) is no larger than x, so products of positive operands bound every term; what rounding
    the first product changes in silu and its slope is bounded by the largest of these."""
    t, h, e, i, c = sizes
    torch.manual_seed(t * 100 + h)
    operands: list[Any] = layer(t, h, e, i, h + 1, c, bias, False, dtype)
    attrs: dict[str, Any] = {"act": "silu", "interleaved": False, "turned": False}
    grad = torch.randn(t, h + 1).to(dtype)

    def gradients(operands: list[Any], grad: Tensor, attrs: dict[str, Any]) -> list[Tensor]:
        ins = [x.requires_grad_() for x in operands if isinstance(x, Tensor) and x.is_floating_point()]
        out = by_definition(operands, attrs)
        return [out.detach(), *torch.autograd.grad(out, ins, grad)]

    def exact(change: Any) -> list[Any]:
        return [change(x.double()) if isinstance(x, Tensor) and x.is_floating_point() else x for x in operands]

    want = gradients(exact(torch.Tensor.clone), grad.double(), attrs)
    largest = exact(torch.abs)
    size = gradients(largest, grad.double().abs(), {**attrs, "act": "relu"})
    top = float((operands[0].double().abs().sum(1).max() * operands[1].double().abs().max()) + 1)
    out, pre = experts_cpu.forward(*operands, keep=True, **attrs)
    got = [out, *(g for g in experts_cpu.backward(grad, *operands, pre, **attrs) if g.numel())]
    for x, y, s in zip(got, want, size, strict=True):
        within(x, y, s * (1 + top), 1e-6 if dtype == F32 else 2**-7)


# ---------------------------------------------------------------- nothing, or next to it


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (1, 1)])
def test_gradients_of_attention_of_nought_and_one(m: int, n: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    torch._dynamo.reset()
    args = [rand(2, 4, m, 16), rand(2, 2, n, 16, seed=1), rand(2, 2, n, 24, seed=2)]
    args = [x.requires_grad_() for x in args]
    fast = tessel.compile(fn, target="cpu", options={"attention": "template"}, dynamic=False)
    grad = rand(2, 4, m, 24, seed=3)
    got = torch.autograd.grad(fast(*args), args, grad)
    exact = [x.detach().double().requires_grad_() for x in args]
    want = torch.autograd.grad(fn(*exact), exact, grad.double())
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), torch.nan_to_num(y), rtol=1e-5, atol=1e-5)


def test_no_step_and_no_token() -> None:
    """Running folds of nothing, a loss over no token: what eager gives, with gradients."""
    torch._dynamo.reset()
    weight = rand(40, 8).requires_grad_()

    def fn(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(F.linear(x, weight), target, reduction="sum"), x.cumsum(0) + x.cumprod(0)

    x, target = rand(0, 8), torch.zeros(0, dtype=torch.int64)
    for got, want in zip(tessel.compile(fn, target="cpu")(x, target), fn(x, target), strict=True):
        torch.testing.assert_close(got, want)
    loss = tessel.compile(lambda x, target: fn(x, target)[0], target="cpu")(x, target)
    assert not torch.autograd.grad(loss, weight)[0].any()
