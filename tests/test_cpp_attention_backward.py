"""The C++ kernel of attention's gradients against float64: lengths, widths, masks, windows, caps, sinks, graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import Program, poisoned, rand

import tessel
from tessel.codegen.cpp import render, translation_unit
from tessel.codegen.cpp.attention import refusal
from tessel.errors import TesselError
from tessel.frontend.attention_op import attention
from tessel.ir.types import Dim, symbol
from tessel.ops import OPS
from tessel.ops.attention import attention_ref, visible
from tessel.runtime.native import NativeKernel, build
from tessel.targets import get_target
from tessel.tiles.index import Index, floordiv, var
from tessel.tiles.kernel import ACC, DK, DQ, DSCORE, DSINK, DV, Compute, Kernel, Ref
from tessel.tiles.slope import NoSlope, slope

F = torch.nn.functional
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = [
    pytest.mark.usefixtures("own_cache", "same_start"),
    pytest.mark.skipif(refusal(F32, get_target("cpu").features) is not None, reason="no attention kernel for this CPU"),
]


@dataclass(frozen=True)
class Case:
    """Gradients of attention of q [b, h, m, d] and ``heads`` key heads, all laid out [b, length, heads, width].

    Attributes:
        mask: its shape, broadcast to [b, h, m, n]; ``learned``: it is floating and its gradient is wanted.
        attrs: ``causal``, ``offset``, ``window``, ``softcap``, ``scale``.
    """

    q: tuple[int, int, Dim, int]
    n: Dim
    heads: int
    e: int
    dtype: torch.dtype = F32
    mask: tuple[int, int, int, int] | None = None
    learned: bool = False
    sink: bool = False
    attrs: dict[str, Any] = field(default_factory=dict)

    def program(self, name: str) -> Kernel:
        b, h, m, d = self.q
        n, e = self.n, self.e
        p = Program("attention_backward", x0=b, x1=h, m=m, n=n, d=d, e=e)

        def tensor(length: Dim, count: int, width: int, out: bool = False) -> int:
            strides = (length * count * width, width, count * width, 1)
            return p.param((b, count, length, width), self.dtype, strides, out)

        rows, keys = (m, h), (n, self.heads)
        ins = {"grad": tensor(*rows, e), "q": tensor(*rows, d), "k": tensor(*keys, d), "v": tensor(*keys, e)}
        mask = None if self.mask is None else p.param(self.mask, F32 if self.learned else torch.bool)
        sink = p.param((h,), F32) if self.sink else None
        ins |= {"out": tensor(*rows, e), "lse": p.param((b, h, m), F32)}
        outs = [tensor(*rows, d, out=True), tensor(*keys, d, out=True), tensor(*keys, e, out=True)]
        outs += [p.param(self.mask, F32, out=True)] if self.mask is not None and self.learned else []
        outs += [p.param((h,), F32, out=True)] if self.sink else []
        head = floordiv(p.axes["x1"], h // self.heads) if h > 1 else p.axes["x1"]
        places = {
            **dict.fromkeys(("grad", "out"), ("x0", "x1", "m", "e")),
            "q": ("x0", "x1", "m", "d"),
            "k": ("x0", head, "n", "d"),
            "v": ("x0", head, "n", "e"),
            "lse": ("x0", "x1", "m"),
        }
        for part, param in ins.items():
            p.part(part)
            p.provides[part] = p.load(param, *places[part])
        if sink is not None:
            p.part("sink")
            p.provides["sink"] = p.load(sink, "x1")
        p.part("score")
        p.dtypes.update(dict.fromkeys((ACC, DQ, DK, DV, DSCORE, DSINK), F32))
        score = Ref(ACC)
        cap = self.attrs.get("softcap")
        if cap is not None:
            score = p.op("mul", p.op("tanh", p.op("div", score, cap)), cap)
        at: list[Any] = []
        if mask is not None and self.mask is not None:
            at = [Index() if s == 1 else w for w, s in zip(("x0", "x1", "m", "n"), self.mask, strict=True)]
            got = p.load(mask, *at)
            score = p.op("add", score, got) if self.learned else p.op("where", got, score, -math.inf)
        p.provides["score"] = score
        p.part("body")
        key_head = var("x1", self.heads)
        stores = [(DQ, ("x0", "x1", "m", "d")), (DK, ("x0", key_head, "n", "d")), (DV, ("x0", key_head, "n", "e"))]
        stores += [(DSCORE, tuple(at))] if self.learned else []
        stores += [(DSINK, ("x1",))] if self.sink else []
        for param, (value, place) in zip(outs, stores, strict=True):
            p.store(param, place, Ref(value))
        return p.kernel(name, **{"scale": d**-0.5, **{k: v for k, v in self.attrs.items() if k != "softcap"}})

    def operands(self, *sizes: int) -> dict[str, torch.Tensor | None]:
        """grad, q, k, v, mask and sink; ``sizes`` are the lengths that the case leaves open."""
        (b, h, m, d), n = self.q, self.n
        m, n = sizes or (m, n)
        made: dict[str, torch.Tensor | None] = {
            name: rand(b, length, heads, width, dtype=self.dtype).transpose(1, 2)
            for name, length, heads, width in (("grad", m, h, self.e), ("q", m, h, d), ("k", n, self.heads, d))
        }
        made["v"] = rand(b, n, self.heads, self.e, dtype=self.dtype).transpose(1, 2)
        made["mask"] = None if self.mask is None else rand(*self.mask, dtype=F32)
        if made["mask"] is not None and not self.learned:
            made["mask"] = made["mask"] > -0.3
        made["sink"] = rand(h, dtype=F32) if self.sink else None
        return made


def compiled(cases: Sequence[Case]) -> list[NativeKernel]:
    sources = [render(c.program(f"case_{i}")) for i, c in enumerate(cases)]
    library, path = build(translation_unit(sources))
    return [NativeKernel(s, library, path) for s in sources]


def gradients(case: Case, kernel: NativeKernel, ins: dict[str, Any], *sizes: int) -> list[torch.Tensor]:
    """What the kernel makes of the operands, and of the result and the log-sum-exp that belong to them."""
    wide = {k: t if t is None or t.dtype == torch.bool else t.double() for k, t in ins.items() if k != "grad"}
    out, lse = attention_ref(**wide, **{"scale": case.q[3] ** -0.5, **case.attrs})
    out = out.to(case.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    given = [t for t in ins.values() if t is not None]
    results = [poisoned(t.transpose(1, 2).shape, t.dtype).transpose(1, 2) for t in (ins["q"], ins["k"], ins["v"])]
    results += [poisoned(ins["mask"].shape, F32)] if case.learned else []
    results += [poisoned(ins["sink"].shape, F32)] if case.sink else []
    kernel((), *given, out, lse.float().contiguous(), *results, *sizes)
    return results


def agree(case: Case, got: Sequence[torch.Tensor], ins: dict[str, Any]) -> None:
    """Each element within what rounding scores and weights, and one rounding of the result, may change."""
    eps = torch.finfo(case.dtype).eps
    g, q, k, v = (ins[n].double() for n in ("grad", "q", "k", "v"))
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    kw, vw = (t.repeat_interleave(group, 1) for t in (k, v))
    scale, cap = case.attrs.get("scale", case.q[3] ** -0.5), case.attrs.get("softcap")
    raw = q @ kw.transpose(-1, -2) * scale
    s = raw if cap is None else cap * (raw / cap).tanh()
    bend = 1 if cap is None else 1 - (raw / cap).tanh() ** 2
    if ins["mask"] is not None:
        s = s + ins["mask"].double() if case.learned else s.masked_fill(~ins["mask"], -math.inf)
    bounds = (case.attrs.get("causal", False), case.attrs.get("offset", 0), case.attrs.get("window"))
    shown = visible(s.shape[2], s.shape[3], *bounds)
    s = s if shown is None else s.masked_fill(~shown, -math.inf)
    lse = s.logsumexp(-1, keepdim=True) if s.shape[3] else s.new_full((*s.shape[:3], 1), -math.inf)
    if case.sink:
        lse = torch.logaddexp(lse, ins["sink"].double()[:, None, None])
    p = (s - torch.where(lse == -math.inf, 0.0, lse)).exp()
    delta = (g * (p @ vw)).sum(-1, keepdim=True)
    edited = p * (g @ vw.transpose(-1, -2) - delta)
    loose = (q.abs() @ kw.abs().transpose(-1, -2) * abs(scale)).amax() if s.numel() else 0.0
    size = p * (g.abs() @ vw.abs().transpose(-1, -2) + (g.abs() * (p @ vw.abs())).sum(-1, keepdim=True))
    ds, ds_size = edited * bend * scale, size * abs(scale)

    def shared(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (heads, group)).sum(2)

    want = [ds @ kw, shared(ds.transpose(-1, -2) @ q), shared(p.transpose(-1, -2) @ g)]
    sizes = [ds_size @ kw.abs(), shared(ds_size.transpose(-1, -2) @ q.abs()), shared(p.transpose(-1, -2) @ g.abs())]
    if case.learned:
        want.append(edited.sum_to_size(ins["mask"].shape))
        sizes.append(size.sum_to_size(ins["mask"].shape))
    if case.sink:
        share = (ins["sink"].double()[:, None, None] - lse).exp()
        want.append(-(share * delta).sum((0, 2, 3)))
        sizes.append((share * (g.abs() * (p @ vw.abs())).sum(-1, keepdim=True)).sum((0, 2, 3)))
    unit = 2 * eps + 2e-6 * (1 + 0.2 * loose)
    for name, x, w, t in zip(("dq", "dk", "dv", "more", "dsink"), got, want, sizes, strict=False):
        assert x.isfinite().all(), name
        wrong = (x.double() - w).abs() - (2 * unit * t + torch.finfo(x.dtype).eps * w.abs() + 1e-12)
        assert bool((wrong <= 0).all()), f"{name} of {case}: off by {wrong.max()}"


def run(case: Case, kernel: NativeKernel, *sizes: int) -> None:
    ins = case.operands(*sizes)
    agree(case, gradients(case, kernel, ins, *sizes), ins)


# ---------------------------------------------------------------- lengths, widths, bounds


WIDTHS = ((1, 1, F32), (40, 17, F32), (64, 64, F32), (80, 80, BF16), (96, 128, BF16), (17, 40, BF16), (64, 64, F16))


def test_all_lengths_and_widths() -> None:
    """Lengths known at run time: one kernel meets all of them."""
    m, n = symbol("s0"), symbol("s1")
    cases = [
        Case((1, 2, m, d), n, 2 if i % 2 else 1, e, t, attrs={"causal": i % 3 == 0})
        for i, (d, e, t) in enumerate(WIDTHS)
    ]
    lengths = list(itertools.product((1, 2, 17, 64, 65, 193, 300), repeat=2))
    for i, (case, kernel) in enumerate(zip(cases, compiled(cases), strict=True)):
        for sizes in lengths[i % 3 :: 3]:
            run(case, kernel, *sizes)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_wide_heads(dtype: torch.dtype) -> None:
    cases = [Case((1, 2, 37, d), 130, 1, e, dtype, attrs={"causal": True}) for d, e in ((192, 128), (576, 512))]
    cases.append(Case((1, 1, 9, 256), 70, 1, 256, dtype))
    for case, kernel in zip(cases, compiled(cases), strict=True):
        run(case, kernel)


def test_bounds() -> None:
    """Causal with offsets and windows to one side and to both; whole blocks out of sight on either end."""
    attrs: list[dict[str, Any]] = [
        {"causal": True, "offset": 200},
        {"causal": True, "offset": -70},
        {"causal": True, "window": 50},
        {"causal": True, "window": 200, "offset": 30},
        {"window": 33, "offset": -20},
        {"causal": True, "window": 1},
    ]
    m, n = symbol("s0"), symbol("s1")
    cases = [Case((1, 4, m, 16), n, 2, 24, BF16 if i % 2 else F32, attrs=a) for i, a in enumerate(attrs)]
    for case, kernel in zip(cases, compiled(cases), strict=True):
        for sizes in ((300, 300), (70, 500), (500, 70), (1, 230)):
            run(case, kernel, *sizes)


def test_many_rows() -> None:
    """More rows than stay packed, all heads on one key head; keys in parts whose sums are added up."""
    case = Case((1, 5, 900, 16), 450, 1, 16, attrs={"causal": True})
    run(case, *compiled([case]))


def test_nothing_to_attend_to() -> None:
    m, n = symbol("s0"), symbol("s1")
    case = Case((2, 2, m, 8), n, 1, 8, sink=True)
    (kernel,) = compiled([case])
    for sizes in ((0, 5), (5, 0), (0, 0)):
        got = gradients(case, kernel, case.operands(*sizes), *sizes)
        assert all(bool((t == 0).all()) for t in got)


# ---------------------------------------------------------------- masks, caps, sinks


def test_masks_and_their_gradients() -> None:
    """Boolean and learned masks, broadcast in every way; rows and heads that share a gradient get its sum."""
    b, h, m, n = 2, 4, 70, 210
    cases = []
    for i, dims in enumerate((0, 1, 2, 5, 7, 8, 10, 12, 15)):
        shape = tuple(s if dims >> j & 1 else 1 for j, s in enumerate((b, h, m, n)))
        cases.append(Case((b, h, m, 16), n, 2, 16, mask=shape, learned=i % 4 != 1, sink=i % 5 == 0))  # type: ignore[arg-type]
    for case, kernel in zip(cases, compiled(cases), strict=True):
        run(case, kernel)


def test_hidden_rows_and_blocks() -> None:
    """Rows that see nothing have no gradient, never NaN; blocks that nobody sees are skipped."""
    case = Case((1, 2, 200, 16), 700, 2, 16, mask=(1, 1, 200, 700))
    learned = Case((1, 2, 200, 16), 700, 2, 16, mask=(1, 2, 200, 700), learned=True)
    plain, added = compiled([case, learned])
    ins = case.operands()
    seen = torch.arange(200)[:, None] // 50 == torch.arange(700) // 128
    seen[33] = False
    ins["mask"] = seen[None, None]
    got = gradients(case, plain, ins)
    agree(case, got, ins)
    assert bool((got[0][:, :, 33] == 0).all()) and bool((got[1][:, :, 640:] == 0).all())
    ins = learned.operands()
    ins["mask"] = ins["mask"].masked_fill(~seen, -math.inf)  # type: ignore[union-attr]
    agree(learned, gradients(learned, added, ins), ins)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_caps_and_sinks(dtype: torch.dtype) -> None:
    q = (2, 4, 90, 24)
    cases = [
        Case(q, 200, 2, 24, dtype, attrs={"softcap": 2.0, "causal": True}),
        Case(q, 200, 2, 24, dtype, sink=True, attrs={"window": 40, "causal": True}),
        Case(q, 200, 1, 24, dtype, mask=(1, 4, 90, 200), learned=True, sink=True, attrs={"softcap": 1.5}),
        Case(q, 200, 4, 24, dtype, attrs={"scale": -0.3}),
    ]
    for case, kernel in zip(cases, compiled(cases), strict=True):
        run(case, kernel)


_open = [
    Case((2, 4, symbol("s0"), 24), symbol("s1"), heads, 24, dtype, sink=sink, attrs=attrs)
    for heads, dtype, sink, attrs in (
        (4, F32, False, {"causal": True, "offset": 7}),
        (1, BF16, True, {"window": 19, "softcap": 4.0}),
        (2, F32, True, {"causal": True, "window": 70}),
    )
]


@pytest.fixture(scope="module")
def open_kernels(own_cache: None) -> list[NativeKernel]:
    return compiled(_open)


@given(st.integers(0, 2), st.integers(1, 260), st.integers(1, 260))
@settings(max_examples=30, deadline=None)
def test_any_lengths(open_kernels: list[NativeKernel], which: int, m: int, n: int) -> None:
    run(_open[which], open_kernels[which], m, n)


@pytest.mark.parametrize("batch", (1, 3))
def test_bits_do_not_depend_on_the_threads(batch: int) -> None:
    mask = (1, 1, 330, 700)
    case = Case(
        (batch, 4, 330, 32), 700, 2, 32, mask=mask, learned=True, sink=True, attrs={"causal": True, "offset": 370}
    )
    (kernel,) = compiled([case])
    ins = case.operands()
    got = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        got.append(gradients(case, kernel, ins))
    assert all(torch.equal(a, b) for one in got[1:] for a, b in zip(one, got[0], strict=True))


def test_not_a_number_stays_where_it_is_seen() -> None:
    case = Case((1, 1, 40, 16), 100, 1, 16, attrs={"causal": True})
    (kernel,) = compiled([case])
    ins = case.operands()
    ins["grad"][0, 0, 30, 2] = math.nan  # type: ignore[index]
    dq, dk, dv = gradients(case, kernel, ins)
    assert dq[0, 0, 30].isnan().all() and dq[0, 0, :30].isfinite().all() and dq[0, 0, 31:].isfinite().all()
    assert dk[0, 0, :31].isnan().all() and dk[0, 0, 64:].isfinite().all() and dv[0, 0, :31, 2].isnan().all()


# ---------------------------------------------------------------- derivatives of edits


def _values(stmts: Sequence[Any], x: torch.Tensor, other: torch.Tensor) -> dict[int, torch.Tensor]:
    values = {ACC: x, 50: other, 51: other > 0}
    for s in stmts:
        args = [values[a.number] if isinstance(a, Ref) else torch.tensor(a) for a in s.args]
        values[s.out] = OPS[s.op].ref(*args)
    return values


@pytest.mark.parametrize(
    "steps",
    [
        [("div", Ref(ACC), 3.0), ("tanh", Ref(0)), ("mul", Ref(1), 3.0)],
        [("mul", Ref(ACC), Ref(ACC)), ("add", Ref(0), Ref(50)), ("sub", 1.0, Ref(1))],
        [("neg", Ref(ACC)), ("exp", Ref(0)), ("add", 2.0, Ref(1)), ("div", Ref(50), Ref(2))],
        [("sigmoid", Ref(ACC)), ("where", Ref(51), Ref(0), Ref(ACC)), ("mul", Ref(1), Ref(50))],
        [("where", Ref(51), Ref(ACC), -7.0)],
    ],
)
def test_slopes_are_those_of_autograd(steps: list[tuple[Any, ...]]) -> None:
    stmts = [Compute(i, op, tuple(args), F32, F32) for i, (op, *args) in enumerate(steps)]
    x, other = torch.randn(64, requires_grad=True), torch.randn(64)
    (want,) = torch.autograd.grad(_values(stmts, x, other)[len(stmts) - 1].sum(), x)
    more, got = slope(stmts, Ref(len(stmts) - 1))
    values = _values([*stmts, *_renumbered(more)], x.detach(), other)
    torch.testing.assert_close(values[got.number + 100] if isinstance(got, Ref) else torch.full_like(x, got), want)


def _renumbered(stmts: Sequence[Any]) -> list[Any]:
    """Statements whose own values are counted from 100 on, beside the ones that stand for other operands."""
    mine = {s.out for s in stmts}
    args = [tuple(Ref(a.number + 100) if isinstance(a, Ref) and a.number in mine else a for a in s.args) for s in stmts]
    return [Compute(s.out + 100, s.op, a, F32, F32) for s, a in zip(stmts, args, strict=True)]


def test_an_edit_without_a_derivative_is_refused() -> None:
    stmts = [Compute(0, "floor", (Ref(ACC),), F32, F32)]
    with pytest.raises(NoSlope, match="floor"):
        slope(stmts, Ref(0))
    p = Case((1, 1, 4, 8), 4, 1, 8).program("floor")
    parts = {**p.parts, "score": tuple(stmts)}
    broken = Kernel(p.name, p.family, p.params, p.axes, p.body, parts, {**p.provides, "score": Ref(0)}, p.attrs)
    with pytest.raises(TesselError, match="floor among the score edits has no derivative.*library"):
        render(broken)


# ---------------------------------------------------------------- graphs


def _trained(fn: Any, ins: Sequence[torch.Tensor], tolerance: float = 1e-5) -> Any:
    """Gradients of the compiled function against those in float64; the report."""
    torch._dynamo.reset()
    learned = [t for t in ins if t.requires_grad]
    fast = tessel.compile(fn, target="cpu")
    out = fast(*ins)
    g = torch.randn_like(out)
    got = torch.autograd.grad(out, learned, g)
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in ins]
    want = torch.autograd.grad(fn(*wide), [t for t in wide if t.requires_grad], g.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    return tessel.explain(fast)


def _operands(heads: int, keys: int, dtype: torch.dtype = F32) -> list[torch.Tensor]:
    sizes = ((4, 33), (heads, keys), (heads, keys))
    return [rand(2, s, h, 24, dtype=dtype).transpose(1, 2).requires_grad_() for h, s in sizes]


@pytest.mark.parametrize("kind", ("plain", "causal", "mask", "bias", "groups"))
def test_training_through_both_kernels(kind: str) -> None:
    ins = _operands(2 if kind == "groups" else 4, 65)
    if kind == "groups":  # and nobody asks for the gradient of the values
        ins[2] = ins[2].detach()
    more: list[torch.Tensor] = []
    if kind == "mask":
        more = [torch.rand(2, 1, 33, 65) > 0.3]
    elif kind == "bias":
        more = [torch.randn(4, 33, 65).requires_grad_()]

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        how = {"is_causal": kind == "causal", "enable_gqa": kind == "groups"}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how).transpose(1, 2).flatten(2)  # type: ignore[arg-type]

    report = _trained(f, [*ins, *more])
    found = [k.family for k in report.kernels]
    assert "attention" in found and "attention_backward" in found
    assert not [c for one in report.compilations for c in one.calls]


def test_training_with_every_edit() -> None:
    ins = [*_operands(2, 33), torch.randn(4).requires_grad_()]

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        out, _ = attention(q, k, v, None, True, None, sink.to(q.dtype), 0, 9, 3.0)
        return out  # type: ignore[no-any-return]

    report = _trained(f, ins)
    assert [k.family for k in report.kernels].count("attention_backward") == 1


def test_who_computes_the_gradients() -> None:
    """float64 and the user's word go to torch, and the report says why."""
    for dtype, options in ((torch.float64, {}), (F32, {"attention": "library"})):
        torch._dynamo.reset()
        ins = _operands(4, 65, dtype)
        fast = tessel.compile(F.scaled_dot_product_attention, target="cpu", options=options)
        fast(*ins).sum().backward()
        report = tessel.explain(fast)
        calls = [c for one in report.compilations for c in one.calls if c.operator == "attention_backward"]
        assert len(calls) == 1 and ("float64" if dtype == torch.float64 else "'library'") in calls[0].reason
