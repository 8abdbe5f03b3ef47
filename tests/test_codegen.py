"""Generated pointwise and reduction kernels, run in Triton's interpreter, against float64."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from kernels import (
    INTERPRET,
    Program,
    check,
    fold_kernel,
    fused_kernel,
    gather_kernel,
    interpret,
    norm_kernel,
    poisoned,
    rand,
    run,
)

from tessel.codegen.triton import render
from tessel.errors import TesselError
from tessel.ir.types import symbol
from tessel.ops import OPS
from tessel.targets import get_target
from tessel.tiles.header import FAMILIES, load_header
from tessel.tiles.index import Cond, scale, value

SIZES = (1, 2, 17, 129)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int32, torch.int64, torch.uint8)


# ---------------------------------------------------------------- pointwise


def fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, **knobs: int) -> torch.Tensor:
    out = poisoned(a.shape, a.dtype)
    interpret(fused_kernel(a, b, c), [a, b, c, out], knobs=knobs)
    return out


@pytest.mark.parametrize("dtype", FLOATS + INTS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_pointwise(n: int, dtype: torch.dtype) -> None:
    a, b, c = rand(n, 5, dtype=dtype), rand(5, dtype=dtype), rand(5, n, dtype=dtype).t()
    got = fused(a, b, c) if n != 17 else fused(a, b, c, XB=16)
    wide = [t.double() if dtype.is_floating_point else t for t in (a, b, c)]
    check(got, wide[0] * wide[1] + wide[2], (a.double() * b.double()).abs() + c.double().abs(), 2)


def test_pointwise_long_axis() -> None:
    a, b, c = rand(3, 4097), rand(4097), rand(3, 8194)[:, ::2]
    check(fused(a, b, c), a.double() * b + c, a.double().abs() * b.abs() + c.abs(), 2)


def test_flat_index_stays_flat() -> None:
    """Contiguous operands are addressed by x itself, without a division."""
    p = Program("pointwise", x0=4, x1=8)
    a, o = p.param((4, 8), torch.float32), p.param((4, 8), torch.float32, out=True)
    p.store(o, ("x0", "x1"), p.op("exp", p.load(a, "x0", "x1")))
    text = render(p.kernel(), get_target("h100")).text
    assert "tl.load(in0_ptr + x)" in text and "//" not in text.split("def kernel")[1]


def test_pad_cat_flip_slice() -> None:
    """pad(x, (2, 1)), cat([y, flip(x)]) and x[1::2] in one kernel."""
    x, y = rand(6), rand(3)
    p = Program("pointwise", x0=9)
    a, b = p.like(x), p.like(y)
    outs = [p.param((9,), torch.float32, out=True) for _ in range(2)]
    sliced = p.param((3,), torch.float32, out=True)
    i = p.axes["x0"]
    inside = Cond(i + -2, 0, 6)
    p.store(outs[0], ("x0",), p.load(a, i + -2, mask=(inside,), other=0.3))
    first = Cond(i, None, 3)
    left = p.load(b, i, mask=(first,))
    right = p.load(a, scale(i, -1) + 8, mask=(Cond(i, 3, None),))
    p.store(outs[1], ("x0",), p.op("where", p.test(first), left, right))
    few = Cond(i, None, 3)
    p.store(sliced, ("x0",), p.load(a, scale(i, 2) + 1, mask=(few,)), mask=(few,))
    got = [poisoned((n,), torch.float32) for n in (9, 9, 3)]
    interpret(p.kernel(), [x, y, *got], knobs={"XB": 4})
    check(got[0], torch.nn.functional.pad(x, (2, 1), value=0.3))
    check(got[1], torch.cat([y, x.flip(0)]))
    check(got[2], x[1::2])


def test_gather_and_bound_check() -> None:
    table, index = rand(5, 3, dtype=torch.bfloat16), torch.tensor([4, 0, 0, 2, 1, 3, 4])
    out = poisoned((7, 3), torch.bfloat16)
    source = render(gather_kernel(5, 7), INTERPRET)
    run(source, [table, index, out])
    assert source.checks and torch.equal(out, table[index])
    index[3] = 5
    with pytest.raises(Exception, match="index .out. of range"):
        run(source, [table, index, out])


def test_symbolic_sizes() -> None:
    """One source serves every size; literals may be size expressions."""
    s, t = symbol("s0"), symbol("s1")
    p = Program("pointwise", x0=s, x1=t)
    a, b = p.param((s, t), torch.float32), p.param((t, s), torch.float32)
    o = p.param((s, t), torch.float32, out=True)
    v = p.op("add", p.load(a, "x0", "x1"), p.load(b, "x1", "x0"))
    v = p.op("div", v, s * t / 2)
    p.store(o, ("x0", "x1"), p.op("add", v, sympy.sqrt(t)))
    source = render(p.kernel(), INTERPRET)
    assert source.sizes == ("s0", "s1") and source.args[-2:] == ("s0", "s1")
    for m, n in ((1, 1), (2, 17), (129, 5)):
        x, y, out = rand(m, n), rand(n, m), poisoned((m, n), torch.float32)
        run(source, [x, y, out], {"s0": m, "s1": n})
        want = (x.double() + y.double().t()) / (m * n / 2) + math.sqrt(n)
        check(out, want, want.abs() + (x.abs() + y.t().abs()) / (m * n / 2), 4)
    assert not source.wide({"s0": 1000, "s1": 1000}) and source.wide({"s0": 2**16, "s1": 2**15})
    assert source.grid_for({"s0": 2**17, "s1": 3}) == (3,)


def test_wide_indices() -> None:
    """Known sizes decide the index type at once; 64-bit indices give the same numbers."""
    p = Program("pointwise", x0=2**16, x1=2**15)
    a, o = (p.param((2**16, 2**15), torch.int8, out=out) for out in (False, True))
    p.store(o, ("x0", "x1"), p.load(a, "x0", "x1"))
    assert render(p.kernel(), INTERPRET).wide({})
    x, out = rand(5, 7), poisoned((5, 7), torch.float32)
    p = Program("pointwise", x0=5, x1=7)
    a, o = p.like(x), p.param((5, 7), torch.float32, out=True)
    p.store(o, ("x0", "x1"), p.load(a, "x0", scale(p.axes["x1"], -1) + 6))
    source = render(p.kernel(), INTERPRET)
    assert not source.wide({})
    object.__setattr__(source, "always_wide", True)
    run(source, [x, out])
    assert torch.equal(out, x.flip(1))


def test_literals_are_exact() -> None:
    """0.1 in f64 is not 0.1 in f32; infinities, denormals and integers that only i64 holds."""
    x = torch.tensor([1.0, -2.0, float("nan"), 0.0], dtype=torch.float64)
    p = Program("pointwise", x0=4)
    a = p.like(x)
    outs = [p.param((4,), d, out=True) for d in (torch.float64, torch.float64, torch.int64, torch.float32)]
    v = p.load(a, "x0")
    p.store(outs[0], ("x0",), p.op("add", p.op("mul", v, 0.1), 1e-300))
    p.store(outs[1], ("x0",), p.op("where", p.op("lt", v, 0.0), float("-inf"), p.op("maximum", v, 0.1)))
    i = p.iota("x0", torch.int64)
    p.store(outs[2], ("x0",), p.op("add", i, 2**40 + 1))
    p.store(outs[3], ("x0",), p.op("mul", p.cast(i, torch.float32), 1e-42))
    got = [poisoned((4,), d) for d in (torch.float64, torch.float64, torch.int64, torch.float32)]
    interpret(p.kernel(), [x, *got])
    assert torch.equal(got[0].nan_to_num(7), (x * 0.1 + 1e-300).nan_to_num(7))
    assert got[1].nan_to_num(7).tolist() == [1.0, -torch.inf, 7.0, 0.1] or got[1][1] == -torch.inf
    assert torch.equal(got[2], torch.arange(4) + 2**40 + 1)
    assert torch.equal(got[3], torch.arange(4).float() * 1e-42)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_casts_round_as_torch_does(dtype: torch.dtype) -> None:
    """Through a 16-bit type and back, and a 16-bit store: nearest, ties to even, NaN and overflow kept."""
    x = torch.cat([rand(999), torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 3e38, 1.00390625, 65520.0])])
    p = Program("pointwise", x0=len(x))
    a = p.like(x)
    outs = [p.param((len(x),), d, out=True) for d in (torch.float32, dtype, torch.int32, torch.bool)]
    v = p.load(a, "x0")
    w = p.cast(v, dtype)
    p.store(outs[0], ("x0",), p.cast(w, torch.float32))
    p.store(outs[1], ("x0",), w)
    p.store(outs[2], ("x0",), p.cast(p.op("where", p.op("lt", p.op("abs", v), 9.0), v, 3.5), torch.int32))
    p.store(outs[3], ("x0",), p.cast(v, torch.bool))
    got = [poisoned(x.shape, d) for d in (torch.float32, dtype, torch.int32, torch.bool)]
    interpret(p.kernel(), [x, *got])
    assert torch.equal(got[0].nan_to_num(5.5), x.to(dtype).float().nan_to_num(5.5))
    assert torch.equal(got[1].nan_to_num(5.5), x.to(dtype).nan_to_num(5.5))
    assert torch.equal(got[2], torch.where(x.abs() < 9, x, 3.5).int())
    assert torch.equal(got[3], x.to(torch.bool))


POINTWISE = [n for n, op in OPS.items() if op.kind == "pointwise" and n not in ("cast", "where")]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.int32, torch.bool), ids=str)
def test_every_pointwise_op(dtype: torch.dtype) -> None:
    """All code strings of the table run, in one kernel, with tensor and with literal operands."""
    torch.manual_seed(0)
    x = rand(64, dtype=dtype)
    y = rand(64, dtype=dtype)
    if dtype == torch.int32:
        y = y.abs() + 1
    p = Program("pointwise", x0=64)
    ins = [p.like(x), p.like(y)]
    u, v = (p.load(i, "x0") for i in ins)
    wants, refs = [], []
    for name in POINTWISE:
        op = OPS[name]
        two = "{1}" in op.code["triton"]
        for args, tensors in (((u, v), (x, y)), ((u, 2), (x, 2))) if two else (((u,), (x,)),):
            if dtype == torch.bool and 2 in args:
                continue
            try:
                types = op.infer(*(p.params[ins[0]].type if isinstance(a, type(u)) else a for a in args))  # type: ignore[misc]
                exact = (t.double() if dtype == torch.float32 and isinstance(t, torch.Tensor) else t for t in tensors)
                want = op.ref(*exact)
            except (TesselError, RuntimeError):
                continue  # not for this dtype, in eager neither
            wants.append((name, want))
            refs.append(p.op(name, *args, dtype=types[0].dtype))
    outs = [p.param((64,), p.dtype(r), out=True) for r in refs]
    for o, r in zip(outs, refs):
        p.store(o, ("x0",), r)
    got = [poisoned((64,), p.params[o].type.dtype) for o in outs]
    interpret(p.kernel(), [x, y, *got])
    assert len(got) > 8
    for (name, want), out in zip(wants, got):
        if out.dtype.is_floating_point:
            close = torch.isclose(out.double(), want.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
            assert bool(close.all()), f"{name}: {out[~close][:3]} for {want[~close][:3]} at {x[~close][:3]}"
        else:
            assert torch.equal(out, want.to(out.dtype)), name


# ---------------------------------------------------------------- reductions

LOOPED = {"XB": 4, "RB": 8}


def reduced(op: str, x: torch.Tensor, dtype: torch.dtype, knobs: dict[str, int] | None) -> torch.Tensor:
    out = poisoned(x.shape[:1], dtype)
    interpret(fold_kernel(op, x, dtype), [x, out], knobs=knobs)
    return out


@pytest.mark.parametrize("knobs", (None, LOOPED), ids=("block", "loop"))
@pytest.mark.parametrize("dtype", FLOATS + (torch.int32, torch.int8), ids=str)
@pytest.mark.parametrize("op", ("sum", "prod", "amax", "amin", "argmax", "argmin"))
def test_reductions(op: str, dtype: torch.dtype, knobs: dict[str, int] | None) -> None:
    for n in SIZES:
        x = rand(3, n, dtype=dtype)
        if op == "prod" and dtype.is_floating_point:
            x = (1 + x.double() / (8 + n)).to(dtype)
        wide = x.double() if dtype.is_floating_point else x
        whole = torch.int64 if op in ("sum", "prod", "argmax", "argmin") else dtype
        out_dtype = dtype if dtype.is_floating_point and not op.startswith("arg") else whole
        want = getattr(torch, op)(wide, -1)
        got = reduced(op, x, out_dtype, knobs)
        if op.startswith("arg"):  # the first of equals
            best = (wide.amax(-1, True) if op == "argmax" else wide.amin(-1, True)) == wide
            want = best.int().argmax(-1)
        size = wide.abs().sum(-1) if op == "sum" else None
        check(got, want, size, n if op in ("sum", "prod") else 1)


@pytest.mark.parametrize("knobs", (None, LOOPED), ids=("block", "loop"))
def test_reductions_of_nan_inf_and_bool(knobs: dict[str, int] | None) -> None:
    x = rand(4, 17)
    x[0, 12], x[1], x[2, 3] = float("nan"), float("-inf"), float("inf")
    x[0, 15] = float("nan")
    for op in ("amax", "amin"):
        want = getattr(torch, op)(x, -1)
        assert torch.equal(reduced(op, x, x.dtype, knobs).nan_to_num(9.5), want.nan_to_num(9.5))
    assert reduced("argmax", x, torch.int64, knobs)[:3].tolist() == [12, 0, 3]
    assert reduced("argmin", x, torch.int64, knobs)[:2].tolist() == [12, 0]
    b = torch.tensor([[True] * 17, [False] * 17, [False] * 16 + [True], [True] * 16 + [False]])
    for op, fn in (("any", torch.any), ("all", torch.all), ("amax", torch.any), ("amin", torch.all)):
        assert torch.equal(reduced(op, b, torch.bool, knobs), fn(b, -1))
    assert torch.equal(reduced("any", x.nan_to_num(0), torch.bool, knobs), x.nan_to_num(0).bool().any(-1))
    assert torch.equal(reduced("sum", b, torch.int64, knobs), b.sum(-1))


def norm(x: torch.Tensor, w: torch.Tensor, knobs: dict[str, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    out, stat = poisoned(x.shape, x.dtype), poisoned(x.shape[:1], torch.float32)
    interpret(norm_kernel(x, w), [x, w, out, stat], knobs=knobs)
    return out, stat


@pytest.mark.parametrize("knobs", (None, LOOPED), ids=("block", "loop"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_layer_norm(dtype: torch.dtype, knobs: dict[str, int] | None) -> None:
    for n in (2, 17, 129, 4097):
        if n == 4097 and knobs:
            knobs = {"XB": 2, "RB": 1024}
        x, w = rand(3, n, dtype=dtype), rand(n, dtype=dtype)
        got, mean = norm(x, w, knobs)
        want = torch.nn.functional.layer_norm(x.double(), (n,), w.double())
        unit = torch.finfo(dtype).eps
        assert bool(((got.double() - want).abs() <= unit * want.abs() + 2e-5 * w.double().abs()).all())
        check(mean, x.double().mean(-1), x.double().abs().mean(-1), n + 1)


@pytest.mark.parametrize("knobs", (None, LOOPED), ids=("block", "loop"))
def test_softmax_of_permuted_and_column_sum(knobs: dict[str, int] | None) -> None:
    x = rand(17, 5, 3).permute(1, 2, 0)
    p = Program("reduction", x0=5, x1=3, r0=17)
    a, o = p.like(x), p.param((5, 3, 17), torch.float32, out=True)
    v = p.load(a, "x0", "x1", "r0")
    e = p.op("exp", p.op("sub", v, p.fold("amax", v)))
    p.store(o, ("x0", "x1", "r0"), p.op("div", e, p.fold("sum", e)))
    out = poisoned((5, 3, 17), torch.float32)
    interpret(p.kernel(), [x, out], knobs=knobs)
    check(out, x.double().softmax(-1), None, 40)
    y = rand(40, 6)
    p = Program("reduction", x0=6, r0=4, r1=10)
    a, o = p.like(y), p.param((6,), torch.float32, out=True)
    row = scale(p.axes["r0"], 10) + p.axes["r1"]
    p.store(o, ("x0",), p.fold("sum", p.load(a, row, "x0")))
    out = poisoned((6,), torch.float32)
    interpret(p.kernel(), [y, out], knobs=knobs)
    check(out, y.double().sum(0), y.double().abs().sum(0), 40)


@pytest.mark.parametrize("knobs", (None, {"XB": 1, "RB": 16}, {"XB": 4, "RB": 64}), ids=("block", "loop", "wide"))
def test_reduction_to_a_scalar(knobs: dict[str, int] | None) -> None:
    """No parallel axis at all; the sum of a constant; a value that does not vary along r."""
    x, y = rand(129), rand(1)
    p = Program("reduction", x0=1, r0=129)
    a, b = p.like(x), p.param((), torch.float32)
    o, count = p.param((), torch.float32, out=True), p.param((), torch.float32, out=True)
    v = p.fold("sum", p.op("mul", p.load(a, "r0"), p.load(b)))
    p.store(o, (), v)
    p.store(count, (), p.fold("sum", p.load(b)))
    got = [poisoned((), torch.float32) for _ in range(2)]
    interpret(p.kernel(), [x, y[0], *got], knobs=knobs)
    check(got[0], (x.double() * y.double()).sum(), (x.double() * y).abs().sum(), 130)
    check(got[1], y[0].double() * 129, None, 130)


def test_symbolic_reduction_with_gather_and_mask() -> None:
    """Rows of a symbolic length through an index, where a mask cuts each row short."""
    s = symbol("s0")
    p = Program("reduction", x0=3, r0=s)
    t, i, length = p.param((5, s), torch.float32), p.param((3,), torch.int32), p.param((3,), torch.int64)
    o, top = p.param((3,), torch.float32, out=True), p.param((3,), torch.int64, out=True)
    row = p.load(i, "x0")
    v = p.load(t, value(row.number, 5), "r0")
    v = p.op("where", p.op("lt", p.iota("r0", torch.int64), p.load(length, "x0")), v, 0.0)
    p.store(o, ("x0",), p.fold("sum", v))
    p.store(top, ("x0",), p.fold("argmax", v))
    source = render(p.kernel(), INTERPRET)
    for n in SIZES:
        table, rows = rand(5, n), torch.tensor([4, 0, 2], dtype=torch.int32)
        lengths = torch.tensor([n, n // 2, 1])
        got = [poisoned((3,), torch.float32), poisoned((3,), torch.int64)]
        run(source, [table, rows, lengths, *got], {"s0": n})
        want = torch.where(torch.arange(n) < lengths[:, None], table[rows.long()], 0.0).double()
        check(got[0], want.sum(-1), want.abs().sum(-1), n)
        assert torch.equal(want.gather(1, got[1][:, None])[:, 0], want.amax(-1))


# ---------------------------------------------------------------- records


def test_headers_declare_knobs_and_formulas() -> None:
    for family in FAMILIES:
        header = load_header(family)
        assert {"num_warps", "num_stages"} <= set(header.knobs) and "default" in header.smem_bytes
    with pytest.raises(TesselError, match="no knob 'XA'; did you mean 'XB'"):
        load_header("pointwise").check_knobs({"XA": 4})
    with pytest.raises(TesselError, match="XB=3 is none of"):
        load_header("pointwise").check_knobs({"XB": 3, "num_warps": 1, "num_stages": 1})
    with pytest.raises(TesselError, match="no triton template for the family 'pointwize'"):
        load_header("pointwize")


def test_readable_and_shared() -> None:
    """The header names what is computed; kernels that differ only in it share a body key."""
    kernel = gather_kernel(5, 7, "embedding")
    a, b = render(kernel, get_target("h100")), render(gather_kernel(5, 7, "other"), get_target("h100"))
    assert a.body_key == b.body_key and a.text != b.text
    assert a.text.startswith("# %1 = made by a test   test.py:1\n# tile: XB=32")
    compile(a.text, "kernel", "exec")
    assert render(gather_kernel(6, 7), get_target("h100")).body_key != a.body_key
