"""Generated matmul and attention kernels, run in Triton's interpreter, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernels import INTERPRET, Program, attention_kernel, check, interpret, poisoned, product_kernel, rand, run

from tessel.codegen.triton import render
from tessel.errors import TesselError
from tessel.ir.types import symbol
from tessel.targets import get_target
from tessel.tiles.index import Cond, value
from tessel.tiles.kernel import ACC, Ref

SIZES = (1, 2, 17, 129)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = {"BM": 16, "BN": 16, "BK": 16, "GROUP": 4}


def multiplied(*tensors: torch.Tensor, knobs: dict[str, int] | None = None, **options: Any) -> torch.Tensor:
    a, b = tensors[:2]
    out = poisoned((*a.shape[:-1], b.shape[-1]), a.dtype)
    interpret(product_kernel(*tensors, **options), [*tensors, out], knobs=knobs)
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", SIZES)
def test_matmul(m: int, dtype: torch.dtype) -> None:
    """Every combination of odd sizes, the right operand transposed in memory, small and large tiles."""
    for n, k in ((1, 17), (17, 129), (129, 1), (2, 2)):
        a, b = rand(m, k, dtype=dtype), rand(n, k, dtype=dtype).t()
        got = multiplied(a, b, knobs=SMALL if m == 17 else None)
        check(got, a.double() @ b.double(), a.double().abs() @ b.double().abs(), k)


def test_matmul_of_a_long_axis() -> None:
    a, b = rand(5, 4097, dtype=torch.bfloat16), rand(4097, 3, dtype=torch.bfloat16)
    check(multiplied(a, b), a.double() @ b.double(), a.double().abs() @ b.double().abs(), 4097)


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.int8), ids=str)
def test_integer_matmul_is_exact(dtype: torch.dtype) -> None:
    a, b = rand(3, 17, 33, dtype=dtype), rand(3, 33, 5, dtype=dtype)
    if dtype == torch.int64:
        a = a + 2**40
    assert torch.equal(multiplied(a, b, knobs=SMALL), (a @ b))


def test_batched_bias_relu() -> None:
    a, b, bias = rand(2, 3, 17, 40), rand(3, 2, 40, 20).transpose(0, 1), rand(20)
    got = multiplied(a, b, bias, knobs=SMALL, relu=True)
    size = a.double().abs() @ b.double().abs() + bias.abs()
    check(got, (a.double() @ b.double() + bias).relu(), size, 41)


def test_prologue_with_row_statistics_and_gather() -> None:
    """rms-norm style scaling and a gathered row ahead of the product, a residual and a second output after."""
    m, k, n = 17, 40, 20
    table, rows = rand(9, k, dtype=torch.bfloat16), torch.randint(0, 9, (m,))
    scale, weight = rand(m), rand(k, n, dtype=torch.bfloat16)
    residual = rand(m, n, dtype=torch.bfloat16)
    p = Program("matmul", m=m, n=n, k=k)
    ins = [p.like(t) for t in (table, rows, scale, weight, residual)]
    outs = [p.param((m, n), d, out=True) for d in (torch.bfloat16, torch.float32)]
    p.part("a")
    at = p.load(ins[1], "m")
    v = p.cast(p.load(ins[0], value(at.number, 9), "k"), torch.float32)
    v = p.op("add", p.op("mul", v, p.load(ins[2], "m")), 1.0)
    p.provides["a"] = p.cast(v, torch.bfloat16)
    p.part("b")
    p.provides["b"] = p.load(ins[3], "k", "n")
    p.part("body")
    p.dtypes[ACC] = torch.bfloat16
    y = p.op("add", Ref(ACC), p.load(ins[4], "m", "n"))
    p.store(outs[0], ("m", "n"), y)
    p.store(outs[1], ("m", "n"), p.cast(y, torch.float32))
    got = [poisoned((m, n), d) for d in (torch.bfloat16, torch.float32)]
    source = interpret(p.kernel(), [table, rows, scale, weight, residual, *got], knobs=SMALL)
    loop = source.body.split("for k_start")
    assert "in2" in loop[0].split("def kernel")[1].split("m_ok = ")[1]  # row loads stay outside the loop
    left = (table[rows].float() * scale[:, None] + 1).bfloat16().double()
    size = left.abs() @ weight.double().abs() + residual.double().abs()
    want = left @ weight.double() + residual.double()
    check(got[0], want, size, k + 1)
    check(got[1], want, size, k + 1)


def test_padded_operand_and_symbolic_sizes() -> None:
    """The left operand is padded along k with a value that must not leak; every size is a symbol."""
    m, n, k = (symbol(s) for s in ("s0", "s1", "s2"))
    p = Program("matmul", m=m, n=n, k=k + 2)
    a, b = p.param((m, k), torch.float32), p.param((k + 2, n), torch.float32)
    o = p.param((m, n), torch.float32, out=True)
    p.part("a")
    col = p.axes["k"] + -1
    p.provides["a"] = p.load(a, "m", col, mask=(Cond(col, 0, k),), other=3.0)
    p.part("b")
    p.provides["b"] = p.load(b, "k", "n")
    p.part("body")
    p.store(o, ("m", "n"), Ref(ACC))
    source = render(p.kernel(), INTERPRET, SMALL)
    for mm, nn, kk in ((1, 1, 1), (17, 2, 129), (2, 129, 17)):
        x, y = rand(mm, kk), rand(kk + 2, nn)
        out = poisoned((mm, nn), torch.float32)
        run(source, [x, y, out], {"s0": mm, "s1": nn, "s2": kk})
        left = torch.nn.functional.pad(x, (1, 1), value=3.0).double()
        check(out, left @ y.double(), left.abs() @ y.double().abs(), kk + 2)


def test_mixed_operands_are_refused() -> None:
    a, b = rand(4, 4), rand(4, 4)
    kernel = product_kernel(a, b.bfloat16())
    with pytest.raises(TesselError, match="cast one operand first"):
        render(kernel, get_target("h100"))


# ---------------------------------------------------------------- attention


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    knobs: dict[str, int] | None = None,
    lse: bool = True,
    **attrs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = poisoned((*q.shape[:-1], v.shape[-1]), q.dtype)
    stat = poisoned(q.shape[:-1], torch.float32)
    ins = [q, k, v] + ([mask] if mask is not None else [])
    interpret(attention_kernel(q, k, v, mask, lse, **attrs), [*ins, out, stat], knobs=knobs)
    return out, stat


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, lse and sum of |p||v| in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask.double()
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, float("-inf"))
    lse = s.logsumexp(-1)
    p = (s - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    return p @ v, lse, p @ v.abs()


def agree(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    """Within the rounding of the weights to the operands' dtype and of f32 scores."""
    out, lse = got
    unit = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 0.0)
    assert bool(((out.double() - want[0]).abs() <= 2 * unit * want[2] + unit * want[0].abs() + 1e-12).all())
    assert torch.equal(lse == -torch.inf, want[1] == -torch.inf)
    shown = want[1] != -torch.inf
    assert bool(((lse.double() - want[1])[shown].abs() <= 2e-5).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_sizes(dtype: torch.dtype) -> None:
    """Odd lengths and head widths, keys and values of different widths, one tile and many."""
    for m, n, d, e in ((1, 17, 8, 8), (17, 1, 3, 5), (129, 129, 16, 16), (2, 129, 24, 17)):
        q, k, v = rand(1, 2, m, d, dtype=dtype), rand(1, 2, n, d, dtype=dtype), rand(1, 2, n, e, dtype=dtype)
        for knobs in (None, {"BM": 32, "BN": 64}):
            agree(attend(q, k, v, knobs=knobs), oracle(q, k, v), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_attention_causal_and_grouped(dtype: torch.dtype) -> None:
    """Causal from the top left with more and with fewer keys than queries; heads that share keys."""
    for m, n in ((129, 129), (17, 129), (129, 17), (1, 2)):
        q = rand(2, 4, m, 16, dtype=dtype)
        k, v = rand(2, n, 2, 16, dtype=dtype).transpose(1, 2), rand(2, 2, n, 16, dtype=dtype)
        for knobs in (None, {"BM": 16, "BN": 32}):
            agree(attend(q, k, v, knobs=knobs, causal=True), oracle(q, k, v, causal=True), dtype)


def test_attention_masks() -> None:
    """Boolean and additive masks, broadcast in every way; rows that see nothing give zeros and -inf."""
    q, k, v = rand(2, 2, 20, 8), rand(2, 2, 40, 8), rand(2, 2, 40, 8)
    seen = torch.rand(2, 1, 20, 40) > 0.4
    seen[0, 0, 3] = False
    seen[1] = False
    knobs = {"BM": 16, "BN": 16}
    out, lse = attend(q, k, v, seen, knobs)
    agree((out, lse), oracle(q, k, v, seen), torch.float32)
    assert bool((out[1] == 0).all()) and bool((lse[1] == -torch.inf).all())
    for mask in (rand(1, 2, 1, 40), rand(2, 2, 20, 40).bfloat16(), torch.rand(20, 40)[None, None] > 0.5):
        agree(attend(q, k, v, mask, knobs), oracle(q, k, v, mask), torch.float32)
    agree(attend(q, k, v, seen, knobs, causal=True, scale=0.3), oracle(q, k, v, seen, True, 0.3), torch.float32)
    far = torch.full((1, 1, 20, 40), torch.finfo(torch.float32).min)
    got, _ = attend(q, k, v, far, knobs)
    assert not got.isnan().any()


def test_score_edited_by_itself() -> None:
    """A soft cap reads nothing but the score: it belongs in the loop all the same."""
    q, k, v = (rand(1, 2, 40, 8) for _ in range(3))
    p = Program("attention", x0=2, m=40, n=40, d=8, e=8)
    ins = [p.like(t[0]) for t in (q, k, v)]
    o = p.param((2, 40, 8), torch.float32, out=True)
    for part, param, axes in zip("qkv", ins, (("m", "d"), ("n", "d"), ("n", "e"))):
        p.part(part)
        p.provides[part] = p.load(param, "x0", *axes)
    p.part("score")
    p.dtypes[ACC] = torch.float32
    p.provides["score"] = p.op("mul", p.op("tanh", p.op("div", Ref(ACC), 0.5)), 0.5)
    p.part("body")
    p.store(o, ("x0", "m", "e"), Ref(ACC))
    out = poisoned((2, 40, 8), torch.float32)
    interpret(p.kernel(scale=0.3), [q, k, v, out], knobs={"BM": 16, "BN": 16})
    score = ((q.double() @ k.double().transpose(-1, -2)) * 0.3 / 0.5).tanh() * 0.5
    assert bool(((score.softmax(-1) @ v.double())[0] - out).abs().max() < 2e-6)


def test_attention_without_lse_and_with_nan() -> None:
    q, k, v = rand(1, 1, 4, 8), rand(1, 1, 5, 8), rand(1, 1, 5, 8)
    out, lse = attend(q, k, v, lse=False)
    agree((out, oracle(q, k, v)[1].float()), oracle(q, k, v), torch.float32)
    assert lse.isnan().all()  # nobody wrote it
    k[0, 0, 2, 3] = float("nan")
    assert attend(q, k, v)[0].isnan().all()
