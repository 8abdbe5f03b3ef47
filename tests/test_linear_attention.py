"""Linear attention: kernels against float64, gradients, and how models' loops are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._higher_order_ops.scan import scan

import tessel
from tessel.errors import TesselError
from tessel.frontend.linear_attention_op import linear_attention, operator
from tessel.ops.linear_attention import linear_attention_backward_ref, linear_attention_ref
from tessel.runtime.linear_cpu import LinearKernels

Tensor = torch.Tensor
# Of the terms that are added up: what sums of some hundred of them in f32, and a result in a half, are rounded by.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
KERNELS = LinearKernels()


def operands(
    b: int, h: int, time: int, keys: int, values: int, decay: str, delta: bool, start: bool, dtype: torch.dtype
) -> list[Any]:
    torch.manual_seed(time + 100 * keys + values)
    q, k, v = torch.randn(b, h, time, keys), torch.randn(b, h, time, keys), torch.randn(b, h, time, values)
    shapes = {"number": (b, h, time), "channels": (b, h, time, keys)}
    factors = torch.rand(shapes[decay]) * 0.5 + 0.5 if decay in shapes else None
    beta = torch.rand(b, h, time) if delta else None
    state = torch.randn(b, h, keys, values) if start else None
    given = [x.to(dtype) for x in (q, F.normalize(k, dim=-1), v)]
    return [*given, factors, beta, state]


def doubled(xs: Any) -> list[Any]:
    return [None if x is None else x.double() for x in xs]


def sizes(grad: Tensor, grad_last: Tensor | None, *given: Any) -> list[Any]:
    """Of o, the last state and the gradients of all operands: the sum of the absolute values of each element's terms.

    States and their gradients are what they are; of operands that are all positive these are sums of the same.
    """
    q, k, v, decay, beta, start = (None if x is None else x.detach().requires_grad_() for x in given)
    assert q is not None and k is not None and v is not None
    factors = torch.ones(q.shape[:3], dtype=q.dtype) if decay is None else decay
    factors = (factors if factors.dim() == 4 else factors[..., None]).detach()
    rate = torch.ones(q.shape[:3], dtype=q.dtype) if beta is None else beta.detach()
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if start is None else start
    before, after, total = [], [], q.new_zeros(())
    for t in range(q.shape[2]):
        before.append(state.detach())
        state = factors[:, :, t, :, None] * state
        known = 0.0 if beta is None else torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
        u = rate[:, :, t, None] * (v[:, :, t] - known)
        state = state + k[:, :, t, :, None] * u[:, :, None]
        after.append(state)
        total = total + (torch.einsum("bhk,bhkv->bhv", q[:, :, t], state) * grad[:, :, t]).sum()
    total = total if grad_last is None else total + (state * grad_last).sum()
    slopes = torch.stack(torch.autograd.grad(total, after), 2).abs()
    old, new = torch.stack(before, 2).abs(), torch.stack(after, 2).detach().abs()
    q, k, v, rate, factors, grad = (x.detach().abs() for x in (q, k, v, rate, factors, grad))
    decayed = factors[..., None] * old
    known = 0.0 if beta is None else torch.einsum("bhtk,bhtkv->bhtv", k, decayed)
    dv = torch.einsum("bhtk,bhtkv->bhtv", k, slopes)  # of what is written, before beta
    u = rate[..., None] * (v + known)
    dk = torch.einsum("bhtv,bhtkv->bhtk", u, slopes)
    through = slopes
    if beta is not None:
        dk = dk + torch.einsum("bhtv,bhtkv->bhtk", rate[..., None] * dv, decayed)
        through = slopes + k[..., None] * (rate[..., None] * dv)[..., None, :]
    ddecay = (through * old).sum(-1)
    last = decayed[:, :, -1] + k[:, :, -1, :, None] * u[:, :, -1, None]
    return [
        torch.einsum("bhtk,bhtkv->bhtv", q, new),
        last,
        torch.einsum("bhtv,bhtkv->bhtk", grad, new),
        dk,
        rate[..., None] * dv,
        None if decay is None else ddecay if decay.dim() == 4 else ddecay.sum(-1),
        None if beta is None else (dv * (v + known)).sum(-1),
        None if start is None else factors[:, :, 0, :, None] * through[:, :, 0],
    ]


def near(got: Any, want: Any, size: Any, dtype: torch.dtype) -> None:
    for x, y, s in zip(got, want, size, strict=True):
        assert x.shape == y.shape
        far = BOUND[dtype] if x.dtype == dtype else BOUND[torch.float32]
        if y.numel():
            assert ((x.double() - y).abs() <= far * s).all()


def compare_with(kernels: Any, given: list[Any], dtype: torch.dtype, last: bool = True, backward: bool = True) -> None:
    """Forward and backward by kernels against the definition in float64, by the sizes of the terms."""
    q, _, v, *_, beta, _ = given
    grad = torch.randn(v.shape).to(dtype)
    grad_last = torch.randn(*q.shape[:2], q.shape[3], v.shape[3]) if last else None
    exact, slopes = doubled(given), doubled([grad, grad_last])
    size: list[Any] = [0.0] * 8
    if q.numel() and v.numel():
        if beta is None:  # nothing is subtracted of positive operands: each element has a bound of its own
            size = sizes(*(None if x is None else x.abs() for x in (*slopes, *exact)))
        else:  # what is taken out and put in again cancels: one bound for all elements
            size = [None if x is None else x.max() for x in sizes(*slopes, *exact)]
    near(kernels.forward(*given), linear_attention_ref(*exact), size[:2], dtype)
    if backward:
        want = linear_attention_backward_ref(*slopes, *exact)
        near(kernels.backward(grad, grad_last, *given), want, size[2:], dtype)


def compare(given: list[Any], dtype: torch.dtype, last: bool = True) -> None:
    compare_with(KERNELS, given, dtype, last)


# ---------------------------------------------------------------- the operator


@pytest.mark.parametrize("decay", ["none", "number", "channels"])
@pytest.mark.parametrize("delta", [False, True])
def test_the_reference_is_the_gradient(decay: str, delta: bool) -> None:
    given = doubled(operands(1, 2, 5, 3, 4, decay, delta, delta, torch.float32))
    given = [None if x is None else x.requires_grad_() for x in given]
    assert torch.autograd.gradcheck(operator, given)


def test_the_backward_goes_on_over_stretches() -> None:
    given = doubled(operands(1, 1, 150, 3, 2, "number", True, True, torch.float32))
    wanted = [x.requires_grad_() for x in given]
    o, last = linear_attention_ref(*wanted)
    grad, grad_last = torch.randn_like(o), torch.randn_like(last)
    want = torch.autograd.grad((o, last), wanted, (grad, grad_last))
    got = linear_attention_backward_ref(grad, grad_last, *(x.detach() for x in given))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    ("decay", "delta", "dtype"),
    [
        *((decay, delta, torch.float32) for decay in ("none", "number", "channels") for delta in (False, True)),
        ("number", False, torch.bfloat16),
        ("channels", True, torch.bfloat16),
        ("number", True, torch.float16),
    ],
)
def test_kernels(decay: str, delta: bool, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for threads, sizes in ((1, (1, 2, 37, 40, 64)), (2, (2, 1, 50, 80, 33)), (2, (1, 1, 16, 128, 20))):
            torch.set_num_threads(threads)
            compare(operands(*sizes, decay, delta, threads == 1, dtype), dtype, last=threads == 1)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(*x) for x in ((1, 3), (1, 3), (0, 50), (1, 40), (1, 40)))),
    decay=st.sampled_from(["none", "number", "channels"]),
    delta=st.booleans(),
    start=st.booleans(),
    last=st.booleans(),
    dtype=st.sampled_from(sorted(BOUND, key=str)),
)
def test_shapes(sizes: tuple[int, ...], decay: str, delta: bool, start: bool, last: bool, dtype: torch.dtype) -> None:
    compare(operands(*sizes, decay, delta, start, dtype), dtype, last)  # type: ignore[misc]


@pytest.mark.parametrize("decay", ["number", "channels"])
def test_states_that_vanish_are_zero(decay: str) -> None:
    """Factors that underflow, zeros among them, and signs: products are never divided by."""
    q, k, v, factors, beta, start = operands(1, 2, 40, 16, 16, decay, True, True, torch.float32)
    for change in (lambda a: a * 1e-30, lambda a: torch.where(a < 0.7, 0.0, a), lambda a: a - 0.75):
        given = [q, k, v, change(factors), beta, start]
        compare(given, torch.float32)
        assert all(x.isfinite().all() for x in KERNELS.backward(v, None, *given))


def test_what_is_not_finite_reaches_no_earlier_token() -> None:
    q, k, v, *rest = operands(1, 1, 40, 16, 16, "number", False, False, torch.float32)
    for x in (q, k, v):
        broken = x.clone()
        broken[0, 0, 20, 3] = torch.nan
        got, _ = KERNELS.forward(*(broken if y is x else y for y in (q, k, v)), *rest)
        want, _ = linear_attention_ref(*(broken if y is x else y for y in (q, k, v)), *rest)
        assert torch.equal(got.isnan(), want.isnan())


def test_strided_operands() -> None:
    """As projections give them: heads inside, and factors that are the same at every token."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 30, 4, 16).transpose(2, 3)
    decay = torch.rand(4)[None, :, None].expand(2, 4, 30)
    compare([q, k / 4, v, decay, None, None], torch.float32)


# ---------------------------------------------------------------- the function


def test_the_function_says_what_is_wrong() -> None:
    q, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5)
    decay = torch.rand(1, 2, 1)
    o, last = linear_attention(q, q, v, log_decay=decay.log(), scale=0.5)
    want = linear_attention_ref(q / 2, q, v, decay.expand(1, 2, 3))
    torch.testing.assert_close((o, last), want)
    for words, more in (
        ("give one", {"decay": decay, "log_decay": decay}),
        (r"decay is \[7\], it must broadcast to \[1, 2, 3\] or \[1, 2, 3, 4\]", {"decay": torch.ones(7)}),
        (r"initial_state is \[4, 5\]", {"initial_state": torch.ones(4, 5)}),
    ):
        with pytest.raises(TesselError, match=words):
            linear_attention(q, q, v, **more)  # type: ignore[arg-type]
    with pytest.raises(TesselError, match="floats of one dtype"):
        linear_attention(q, q.double(), v)
    with pytest.raises(TesselError, match="it must be"):
        linear_attention(q, q[:, :, :2], v)


# ---------------------------------------------------------------- loops of models


def retnet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gamma = torch.tensor([0.9, 0.5], dtype=q.dtype).view(1, 2, 1, 1)
    state, out = torch.zeros(2, 2, q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        state = gamma * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2)


def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Any:
    state, out = torch.zeros(2, 2, q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        added = torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        state = state * torch.sigmoid(g[:, :, t]).unsqueeze(-1) + added
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state) * F.silu(v[:, :, t]))
    return torch.stack(out, 2), state


def mamba2(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """States are values times keys, and keys and queries are those of all heads."""
    state, out = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for t in range(x.shape[1]):
        state = state * torch.exp(dt[:, t] * A)[:, :, None, None]
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None, :]
        out.append((state * C[:, t, None, None, :]).sum(-1) + x[:, t])
    return torch.stack(out, 1)


def delta_net(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Any:
    out = []
    for t in range(q.shape[2]):
        old = torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
        state = state - torch.einsum("bh,bhk,bhv->bhkv", beta[:, :, t], k[:, :, t], old)
        state = state + beta[:, :, t, None, None] * (k[:, :, t].unsqueeze(-1) @ v[:, :, t].unsqueeze(-2))
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(out, 2), state


def gated_delta_net(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
    state, out = torch.zeros(2, 2, q.shape[3], v.shape[3], dtype=q.dtype), torch.zeros_like(v)
    for t in range(q.shape[2]):
        state = state * g[:, :, t].exp().unsqueeze(-1).unsqueeze(-1)
        known = (state * k[:, :, t].unsqueeze(-1)).sum(dim=-2)
        change = (v[:, :, t] - known) * beta[:, :, t].unsqueeze(-1)
        state = state + k[:, :, t].unsqueeze(-1) * change.unsqueeze(-2)
        out[:, :, t] = (state * q[:, :, t].unsqueeze(-1)).sum(dim=-2)
    return out, state


def by_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Any:
    def step(state: Tensor, x: Any) -> Any:
        q, k, v, g = x
        state = state * g[..., None] + k[..., None] * v[:, :, None, :]
        return state, (state * q[..., None]).sum(-2)

    last, out = scan(step, state, tuple(x.movedim(2, 0) for x in (q, k, v, g)))
    return out, last


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def arguments(fn: Callable[..., Any], time: int) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = real(2, 2, time, 5), F.normalize(real(2, 2, time, 5), dim=-1), real(2, 2, time, 7)
    beta = torch.rand(2, 2, time).double()
    if fn is mamba2:
        return [v.transpose(1, 2), beta.transpose(1, 2), -real(2).abs(), k[:, 0], q[:, 0]]
    more = {gated: [real(2, 2, time, 5)], delta_net: [beta, real(2, 2, 5, 7)], gated_delta_net: [-beta, beta]}
    return [q, k, v, *more.get(fn, []), *([torch.sigmoid(q), real(2, 2, 5, 7)] if fn is by_scan else [])]


def ran(fn: Callable[..., Any], *args: Tensor) -> tuple[list[Tensor], tessel.report.Report]:
    torch._dynamo.reset()
    made = tessel.compile(fn, target="cpu", fullgraph=True)
    got = made(*args)
    return [got] if isinstance(got, Tensor) else list(got), tessel.explain(made)


def names(report: tessel.report.Report) -> list[str]:
    return [n.op.name for n in report.compilations[0].passes[0].graph.nodes]


FAMILIES = [retnet, gated, mamba2, delta_net, gated_delta_net, by_scan]


@pytest.mark.parametrize("fn", FAMILIES, ids=lambda f: f.__name__)
def test_loops_become_the_operator(fn: Callable[..., Any]) -> None:
    for dtype, far in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        exact = [x.requires_grad_() for x in arguments(fn, 9)]
        given = [x.detach().to(dtype).requires_grad_() for x in exact]
        got, report = ran(fn, *given)
        assert names(report).count("linear_attention") == 1 and not {"loop", "linear_scan"} & set(names(report))
        want = fn(*exact)
        want = [want] if isinstance(want, Tensor) else list(want)
        grads = [
            torch.autograd.grad(sum(o.sin().sum() for o in outs), xs) for outs, xs in ((got, given), (want, exact))
        ]
        for x, y in zip([*got, *grads[0]], [*want, *grads[1]], strict=True):
            assert x.shape == y.shape and (x - y).abs().max() <= far * y.abs().max()
    reasons = [c.reason for c in report.compilations[0].calls if c.operator == "linear_attention"]
    assert len(reasons) == 1 and reasons[0].startswith("Tessel's kernel")


def test_as_many_nodes_for_any_length() -> None:
    with torch.no_grad():
        counts = {len(names(ran(gated_delta_net, *arguments(gated_delta_net, n))[1])) for n in (7, 31)}
    assert len(counts) == 1


def other_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is taken out is not what was put in."""
    state, out = torch.zeros(2, 2, q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        known = (state * q[:, :, t].unsqueeze(-1)).sum(-2)
        state = state + k[:, :, t].unsqueeze(-1) * (v[:, :, t] - known).unsqueeze(-2)
        out.append((state * q[:, :, t].unsqueeze(-1)).sum(-2))
    return torch.stack(out, 2)


def other_sign(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(2, 2, q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        known = (state * k[:, :, t].unsqueeze(-1)).sum(-2)
        state = state + k[:, :, t].unsqueeze(-1) * (v[:, :, t] + known).unsqueeze(-2)
        out.append((state * q[:, :, t].unsqueeze(-1)).sum(-2))
    return torch.stack(out, 2)


def before_the_update(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(2, 2, q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        out.append((state * q[:, :, t].unsqueeze(-1)).sum(-2))
        state = state * 0.5 + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
    return torch.stack(out, 2)


def a_norm_of_the_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(2, 2, q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        state = state * 0.5 + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append((state * q[:, :, t].unsqueeze(-1)).sum(-2) / state.norm())
    return torch.stack(out, 2)


@pytest.mark.parametrize(
    "fn", [other_key, other_sign, before_the_update, a_norm_of_the_state], ids=lambda f: f.__name__
)
def test_what_is_not_linear_attention_stays(fn: Callable[..., Any]) -> None:
    given = arguments(retnet, 9)
    with torch.no_grad():
        got, report = ran(fn, *given)
    assert "linear_attention" not in names(report)
    torch.testing.assert_close(got[0], fn(*given))
