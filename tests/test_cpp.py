"""Generated C++: every operator's expression, pointwise and reduction kernels, whole models, the build cache."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import (
    Program,
    check,
    compiled,
    fold_kernel,
    fused_kernel,
    gather_kernel,
    norm_kernel,
    poisoned,
    rand,
)

import tessel
from tessel.codegen.cpp import CppSource, fold, gather, reduce, render, unit, vector
from tessel.codegen.cpp.space import space_of
from tessel.errors import TesselError
from tessel.ir.types import Dim, TensorType, symbol
from tessel.models import load_model
from tessel.ops import OPS
from tessel.runtime import matmul_cpu, native
from tessel.runtime.native import build
from tessel.tiles.index import Cond, floordiv, mod, scale, value
from tessel.tiles.kernel import Check, Kernel

pytestmark = pytest.mark.usefixtures("own_cache")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int32, torch.int64, torch.uint8, torch.int8)


def foresees(monkeypatch: pytest.MonkeyPatch, little: bool) -> None:
    """As on a CPU that is asked for all it reads from memory, or one that is not."""
    for module in (vector, fold, gather, reduce, unit):
        monkeypatch.setattr(module, "foresees_little", lambda: little)


def run(kernel: Kernel, tensors: Sequence[torch.Tensor], *sizes: int) -> CppSource:
    (fn,) = compiled([kernel])
    fn((), *tensors, *sizes)
    return fn.source


# ---------------------------------------------------------------- every operator's expression

# How many units in the last place a float function may be off; others are rounded correctly or as the C library does.
ULPS = {"sin": 2, "cos": 2, "expm1": 2.5, "log10": 2.5, "log1p": 2, "tanh": 2, "sigmoid": 3, "rsqrt": 1.6, "pow": 2}
ULPS |= dict.fromkeys("tan sinh cosh asinh acosh atanh erfc atan2 asin acos atan hypot".split(), 4)
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 1.0, -1.0, 3e38, -3e38, 88.722, 88.73, -87.4]
SPECIAL += [-103.9, 0.5, -0.5, 1e-10, 0.99999994, 2.5, -2.5, 1.5, 3.1415927, 1e5, 709.0]
UNARY = [n for n, o in OPS.items() if o.kind == "pointwise" and "{1}" not in o.code["cpp"] and n not in ("cast",)]
BINARY = [n for n, o in OPS.items() if o.kind == "pointwise" and "{1}" in o.code["cpp"] and "{2}" not in o.code["cpp"]]
WHOLE = {"bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "shift_left", "shift_right"}


def values() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=g).to(torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(SPECIAL), bits, torch.randn(3000, generator=g) * 3, torch.rand(3000, generator=g)])


def op_kernel(name: str, tensors: Sequence[torch.Tensor], to_bool: bool) -> Kernel:
    p = Program("pointwise", x0=len(tensors[0]))
    ins = [p.like(t) for t in tensors]
    out = p.param((len(tensors[0]),), torch.bool if to_bool else tensors[0].dtype, out=True)
    args = [p.load(i, "x0") for i in ins]
    p.store(out, ("x0",), p.op(name, *args, dtype=torch.bool if to_bool else tensors[0].dtype))
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    return p.kernel(f"op_{name}_{dtype}")


def test_every_operator_against_float64() -> None:
    x = values()
    g = torch.Generator().manual_seed(1)
    y = x[torch.randperm(len(x), generator=g)].clone()
    y[: len(SPECIAL)] = torch.tensor(SPECIAL).roll(3)
    small = torch.randn(len(x), generator=g)
    cases: list[tuple[str, list[torch.Tensor]]] = []
    for name in UNARY:
        cases += [(name, [x])] if name not in WHOLE else []
    for name in BINARY:
        if name not in WHOLE:
            cases += [(name, [x, small if name in ("fmod", "remainder", "floor_div") else y])]
    for dtype in INTS:
        a = torch.randint(-100, 100, (999,), generator=g).to(dtype)
        b = torch.randint(1, 7, (999,), generator=g).to(dtype)
        skip = {"floor_div"} if dtype == torch.uint8 else set()  # wraps differently in torch's own kernels
        cases += [(n, [a, b]) for n in BINARY if _takes(n, dtype) and n not in skip]
        cases += [(n, [a]) for n in UNARY if _takes(n, dtype)]
    refs = []
    for name, tensors in cases:
        wide = [t.double() if t.dtype.is_floating_point else t for t in tensors]
        # whole quotients of floats are eager's: of the rounded quotient; powers of two are of the dtype's own numbers
        own = name in ("floor_div", "trunc_div", "floor_pow2")
        refs.append(OPS[name].ref(*(tensors if own else wide)))
    kernels = compiled([op_kernel(n, t, r.dtype == torch.bool) for (n, t), r in zip(cases, refs, strict=True)])
    wrong = []
    for (name, tensors), want, kernel in zip(cases, refs, kernels, strict=True):
        got = poisoned(tensors[0].shape, torch.bool if want.dtype == torch.bool else tensors[0].dtype)
        kernel((), *tensors, got)
        off = _off(got, want)
        if off > ULPS.get(name, 1.1):
            at = int(_errors(got, want).argmax())
            given = [t[at].item() for t in tensors]
            wrong.append(f"{name} {tensors[0].dtype} {given}: {got[at]} is not {want[at]} ({off})")
    assert not wrong, "\n".join(wrong)


def _takes(name: str, dtype: torch.dtype) -> bool:
    t = TensorType((2,), dtype)
    try:
        OPS[name].infer(*([t, t] if name in BINARY else [t]))
    except TesselError:
        return False
    return True


def _errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    if not got.dtype.is_floating_point:
        return (got != want.to(got.dtype)).double() * 1e9
    near = want.to(got.dtype)
    unit = (torch.nextafter(near.abs(), torch.tensor(math.inf)) - near.abs()).double()
    same = (got == near) | (got.isnan() & near.isnan()) | ((got.double() - want).abs() <= torch.finfo(got.dtype).tiny)
    off = ((got.double() - want).abs() / unit).nan_to_num(1e9, 1e9)
    return torch.where(same, 0.0, off)


def _off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(_errors(got, want).max())


def test_sign_of_zero_and_powers() -> None:
    x = torch.tensor([0.0, -0.0, 2.0, -3.0, math.inf, -math.inf, math.nan])
    p = Program("pointwise", x0=len(x))
    a = p.like(x)
    v = p.load(a, "x0")
    exponents = (2.0, 3.0, 0.5, -0.5, -1.0, -2.0, 0.0, 1.0, 2.5)
    names = ("neg", "tanh", "sin", "erf", "expm1", "log1p", "floor", "ceil", "round", "trunc", "copy")
    outs = [p.param((len(x),), torch.float32, out=True) for _ in (*exponents, *names)]
    for o, e in zip(outs, exponents, strict=False):
        p.store(o, ("x0",), p.op("pow", v, e))
    for o, n in zip(outs[len(exponents) :], names, strict=True):
        p.store(o, ("x0",), p.op(n, v))
    got = [poisoned(x.shape, torch.float32) for _ in outs]
    run(p.kernel(), [x, *got])
    for g, e in zip(got, exponents, strict=False):
        torch.testing.assert_close(g, torch.pow(x, e), equal_nan=True)
    for g, n in zip(got[len(exponents) :], names, strict=True):
        want = OPS[n].ref(x)
        torch.testing.assert_close(g, want, equal_nan=True)
        zeros = want == 0
        assert torch.equal(g[zeros].signbit(), want[zeros].signbit()), n


@pytest.mark.parametrize("source", (*FLOATS, *INTS, torch.bool), ids=str)
def test_casts(source: torch.dtype) -> None:
    x = rand(99, dtype=source)
    if source.is_floating_point:
        x[:6] = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 65504.0, 1e-7]).to(source)
    targets = [*FLOATS, torch.bool, torch.int64] + ([torch.int8] if not source.is_floating_point else [])
    p = Program("pointwise", x0=99)
    a = p.like(x)
    outs = [p.param((99,), t, out=True) for t in targets]
    v = p.load(a, "x0")
    for o, t in zip(outs, targets, strict=True):
        p.store(o, ("x0",), p.cast(v, t))
    got = [poisoned((99,), t) for t in targets]
    run(p.kernel(), [x, *got])
    for g, t in zip(got, targets, strict=True):
        want = x.to(t)
        keep = x.isfinite() if t == torch.int64 and source.is_floating_point else torch.ones(99, dtype=torch.bool)
        assert torch.equal(g[keep], want[keep]), t


def test_half_rounding_over_all_floats() -> None:
    """Every bf16 and f16 there is, and what lies between them."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = halves.view(dtype).float()
        x = torch.cat([x, torch.nextafter(x, torch.tensor(math.inf)), (x + x.roll(1)) / 2])
        p = Program("pointwise", x0=len(x))
        a, o = p.like(x), p.param((len(x),), dtype, out=True)
        p.store(o, ("x0",), p.cast(p.load(a, "x0"), dtype))
        got = poisoned((len(x),), dtype)
        run(p.kernel(), [x, got])
        torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- pointwise


@pytest.mark.parametrize("dtype", FLOATS + INTS, ids=str)
def test_pointwise(dtype: torch.dtype) -> None:
    for n in (1, 17, 129):
        a, b, c = rand(n, 5, dtype=dtype), rand(5, dtype=dtype), rand(5, n, dtype=dtype).t()
        out = poisoned(a.shape, dtype)
        run(fused_kernel(a, b, c), [a, b, c, out])
        wide = [t.double() if dtype.is_floating_point else t for t in (a, b, c)]
        check(out, wide[0] * wide[1] + wide[2], (a.double() * b.double()).abs() + c.double().abs(), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (131, 300), (8, 4096), (257, 15)], ids=str)
def test_what_lies_across_is_turned_in_squares(size: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = size
    x, y = (rand(*s).mul(9).to(dtype) for s in ((n, m), (m, n)))
    p = Program("pointwise", x0=m, x1=n)
    a, b, o = p.like(x.t()), p.like(y), p.param((m, n), dtype, out=True)
    p.store(o, ("x0", "x1"), p.op("maximum", p.load(a, "x0", "x1"), p.load(b, "x0", "x1")))
    out = torch.zeros(m, n, dtype=dtype)
    source = run(p.kernel("turned"), [x.t(), y, out])
    assert torch.equal(out, torch.maximum(x.t(), y))
    assert "turn_square(" in source.body


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool], ids=str)
def test_results_that_no_cache_holds_are_stored_past_the_caches(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector, "last_cache", lambda: 1000)
    x = rand(700, 131).to(dtype)  # rows that begin anywhere
    p = Program("pointwise", x0=700, x1=130)
    a, o = p.param((700, 130), dtype, (131, 1)), p.param((700, 130), dtype, (131, 1), out=True)
    p.store(o, ("x0", "x1"), p.op("maximum", p.load(a, "x0", "x1"), p.load(a, "x0", "x1")))
    out = torch.zeros_like(x)
    source = run(p.kernel("past"), [x[:, :130], out[:, :130]])
    assert torch.equal(out[:, :130], x[:, :130])
    assert not out[:, 130].any()
    assert "put_past_" in source.body


def test_bfloat16_is_rounded_to_even_and_copied_bit_by_bit() -> None:
    x = values()[: 20000 // 16 * 16 + 7]
    p = Program("pointwise", x0=len(x))
    a, copy = p.like(x), p.param((len(x),), torch.bfloat16, out=True)
    computed = p.param((len(x),), torch.bfloat16, out=True)
    v = p.load(a, "x0")
    p.store(copy, ("x0",), v)
    p.store(computed, ("x0",), p.op("mul", v, 0.5))
    outs = [torch.zeros(len(x), dtype=torch.bfloat16) for _ in range(2)]
    run(p.kernel("halved"), [x, *outs])
    want = x.to(torch.bfloat16)
    assert torch.equal(outs[0].isnan(), want.isnan())
    assert torch.equal(outs[0].view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])
    want = (x * 0.5).to(torch.bfloat16)
    normal = ~want.isnan() & ((x * 0.5).abs() >= 2.0**-126)
    assert torch.equal(outs[1].isnan(), want.isnan())
    assert torch.equal(outs[1][normal], want[normal])
    assert (outs[1][~normal & ~want.isnan()].abs() <= 2.0**-126).all()  # below it, zero is allowed


def test_pointwise_over_several_threads_and_strides() -> None:
    for a, b, c in (
        (rand(3, 40970), rand(40970), rand(3, 81940)[:, ::2]),
        (rand(700, 300), rand(300), rand(300, 700).t()),
        (rand(1, 1), rand(1), rand(1, 1)),
    ):
        out = poisoned(a.shape, a.dtype)
        run(fused_kernel(a, b, c), [a, b, c, out])
        check(out, a.double() * b + c, a.double().abs() * b.abs() + c.abs(), 2)


def test_loops_are_merged_split_and_ordered() -> None:
    p = Program("pointwise", x0=4, x1=8, x2=3)
    a, o = p.param((4, 8, 3), torch.float32), p.param((4, 8, 3), torch.float32, out=True)
    p.store(o, ("x0", "x1", "x2"), p.load(a, "x0", "x1", "x2"))
    space = space_of(p.kernel())
    assert [x.extent for x in space.xs] == [96]

    p = Program("pointwise", x0=64, x1=32)  # read as [64, 4, 8] with the middle moved to the front
    a, o = p.param((4, 64, 8), torch.float32), p.param((64, 32), torch.float32, out=True)
    x1 = p.axes["x1"]
    p.store(o, ("x0", "x1"), p.load(a, floordiv(x1, 8), "x0", mod(x1, 8)))
    kernel = p.kernel()
    text = render(kernel).body
    assert "in0[" in text and "x1l" in text and "/ 8" not in text.split("#pragma")[1]
    x, got = rand(4, 64, 8), poisoned((64, 32), torch.float32)
    run(kernel, [x, got])
    assert torch.equal(got, x.permute(1, 0, 2).reshape(64, 32))

    x = rand(40, 50).t()
    p = Program("pointwise", x0=50, x1=40)  # all memory lies along x0
    a, o = p.like(x), p.param((50, 40), torch.float32, strides=(1, 50), out=True)
    p.store(o, ("x0", "x1"), p.load(a, "x0", "x1"))
    assert [s.extent for s in space_of(p.kernel()).xs] == [2000]


def test_pad_cat_flip_slice() -> None:
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
    run(p.kernel(), [x, y, *got])
    assert torch.equal(got[0], torch.nn.functional.pad(x, (2, 1), value=0.3))
    assert torch.equal(got[1], torch.cat([y, x.flip(0)]))
    assert torch.equal(got[2], x[1::2])


def test_gather_and_bound_check() -> None:
    table, index = rand(5, 3, dtype=torch.bfloat16), torch.tensor([4, 0, 0, 2, 1, 3, 4])
    out = poisoned((7, 3), torch.bfloat16)
    (fn,) = compiled([gather_kernel(5, 7)])
    fn((), table, index, out)
    assert torch.equal(out, table[index])
    for wrong in (5, -1, 2**62):
        index[3] = wrong
        with pytest.raises(IndexError, match="index out of range"):
            fn((), table, index, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_taken_by_number_are_asked_for_early_where_no_cache_holds_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = itertools.product((130, 600, 5000), (1000, 2**25), (32, 48, 0))  # rows in one piece, and in several
    for width, last, first in sizes:
        foresees(monkeypatch, first == 0)
        monkeypatch.setattr(vector, "last_cache", lambda last=last: last)
        monkeypatch.setattr(vector, "first_cache", lambda first=first: first * 1024)
        table, index, more = rand(40, width, dtype=dtype), torch.randint(0, 40, (70,)), rand(width, dtype=dtype)
        p = Program("pointwise", x0=70, x1=width)
        a, i, b = p.like(table), p.like(index), p.like(more)
        o = p.param((70, width), dtype, out=True)
        at = p.load(i, "x0")
        p.lists["body"].append(Check(at, 40, (), 'index "out" of range'))
        p.store(o, ("x0", "x1"), p.op("add", p.load(a, value(at.number, 40), "x1"), p.load(b, "x1")))
        (fn,) = compiled([p.kernel("taken")])
        least = 512 // dtype.itemsize
        assert ("soon0" in fn.source.body) == (last == 1000 and width >= least)
        assert ("__builtin_prefetch(in1 + x0)" in fn.source.body) == ("soon0" in fn.source.body)
        assert ("far0" in fn.source.body) == (last == 1000 and width >= least and first == 48)
        assert ("soon0.ask(" in fn.source.body) == ("soon0" in fn.source.body and first == 0)  # many rows at once
        assert ("i64 back" in fn.source.body) == ("soon0" in fn.source.body and first != 0)
        out = poisoned((70, width), dtype)
        fn((), table, index, more, out)
        assert torch.equal(out, table[index] + more)
        index[69] = 40
        with pytest.raises(IndexError, match="index out of range"):
            fn((), table, index, more, out)


@pytest.mark.parametrize(("sequences", "length", "width"), [(3, 12, 600), (2, 7, 1023), (5, 1, 544), (1, 30, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_serve_all_sequences_stay_in_the_first_cache(
    dtype: torch.dtype, sequences: int, length: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector, "last_cache", lambda: 1000)
    table, positions = rand(40, width, dtype=dtype), rand(length, width, dtype=dtype)
    index = torch.randint(0, 40, (sequences, length))
    p = Program("pointwise", x0=sequences, x1=length, x2=width)
    a, i, b = p.like(table), p.like(index), p.like(positions)
    o = p.param((sequences, length, width), dtype, out=True)
    at = p.load(i, "x0", "x1")
    p.store(o, ("x0", "x1", "x2"), p.op("add", p.load(a, value(at.number, 40), "x2"), p.load(b, "x1", "x2")))
    (fn,) = compiled([p.kernel("embedded")])
    out = poisoned((sequences, length, width), dtype)
    fn((), table, index, positions, out)
    assert torch.equal(out, table[index] + positions)
    assert ("const i64 place" in fn.source.body) == (sequences > 1 and length > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("little", [False, True])
def test_streams_are_asked_for_where_a_cpu_foresees_little(
    little: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    foresees(monkeypatch, little)
    monkeypatch.setattr(vector, "last_cache", lambda: 1000)
    monkeypatch.setattr(vector, "first_cache", lambda: 32 * 1024)
    a, b, bias = rand(70, 600, dtype=dtype), rand(70, 600, dtype=dtype), rand(600, dtype=dtype)
    p = Program("pointwise", x0=70, x1=600)
    x, y, z, o = p.like(a), p.like(b), p.like(bias), p.param((70, 600), dtype, out=True)
    both = p.op("add", p.load(x, "x0", "x1"), p.load(y, "x0", "x1"))
    p.store(o, ("x0", "x1"), p.op("add", both, p.load(z, "x1")))
    out = poisoned((70, 600), dtype)
    source = run(p.kernel(), [a, b, bias, out])
    check(out, a.double() + b.double() + bias.double(), a.abs() + b.abs() + bias.abs(), 4)
    asked = [line for line in source.body.split("\n") if "__builtin_prefetch" in line]
    assert [("in0" in t, "in1" in t, "in2" in t) for t in asked] == [(1, 0, 0), (0, 1, 0)] * little


def test_whole_numbers_divide_as_eager_does() -> None:
    a = torch.tensor([7, -7, 7, -7, torch.iinfo(torch.int64).min])
    b = torch.tensor([2, 2, -2, -2, -1])
    p = Program("pointwise", x0=5)
    x, y = p.like(a), p.like(b)
    names = ("floor_div", "trunc_div", "remainder", "fmod")
    outs = [p.param((5,), torch.int64, out=True) for _ in names]
    u, v = p.load(x, "x0"), p.load(y, "x0")
    for o, n in zip(outs, names, strict=True):
        p.store(o, ("x0",), p.op(n, u, v))
    (fn,) = compiled([p.kernel()])
    got = [poisoned((5,), torch.int64) for _ in names]
    fn((), a, b, *got)
    for g, n in zip(got, names, strict=True):
        assert torch.equal(g[:4], OPS[n].ref(a[:4], b[:4])), n
    b[2] = 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        fn((), a, b, *got)


def test_symbolic_sizes() -> None:
    s, t = symbol("s0"), symbol("s1")
    p = Program("pointwise", x0=s, x1=t)
    a, b = p.param((s, t), torch.float32), p.param((t, s), torch.float32)
    o = p.param((s, t), torch.float32, out=True)
    v = p.op("add", p.load(a, "x0", "x1"), p.load(b, "x1", "x0"))
    p.store(o, ("x0", "x1"), p.op("div", v, s * t / 2))
    (fn,) = compiled([p.kernel()])
    assert fn.source.sizes == ("s0", "s1")
    for m, n in ((1, 1), (2, 17), (129, 5), (5, 5000), (0, 3)):
        x, y, out = rand(m, n), rand(n, m), poisoned((m, n), torch.float32)
        fn((), x, y, out, m, n)
        want = (x.double() + y.double().t()) / max(m * n / 2, 0.5)
        check(out, want, (x.abs() + y.t().abs()) / max(m * n / 2, 0.5), 4)


# ---------------------------------------------------------------- reductions


def reduced(op: str, x: torch.Tensor) -> torch.Tensor:
    wide = x.double() if x.dtype.is_floating_point else x
    return {"any": lambda: (x != 0).any(1), "all": lambda: (x != 0).all(1)}.get(op, lambda: getattr(wide, op)(dim=1))()


@pytest.mark.parametrize("dtype", (*FLOATS, torch.int32, torch.int64, torch.bool), ids=str)
def test_folds_along_across_and_of_few_rows(dtype: torch.dtype) -> None:
    ops = ("sum", "amax", "amin", "argmax", "argmin", "any", "all", "prod")
    cases = []
    for op in ops:
        for shape, turned in (((5, 37), False), ((37, 5), False), ((40, 33), True), ((2, 40001), False)):
            if op == "prod" and (shape[1] > 100 or not dtype.is_floating_point):
                continue
            if dtype == torch.bool and op.startswith("arg"):
                continue
            x = rand(*shape, dtype=dtype) if not turned else rand(*shape[::-1], dtype=dtype).t()
            if dtype == torch.float32 and op in ("amax", "argmax", "amin", "argmin"):
                x[0, 3] = math.nan
                x[1, 2:] = x[1, 2].item()
            result = {"argmax": torch.int64, "argmin": torch.int64, "any": torch.bool, "all": torch.bool}.get(op, dtype)
            if op == "sum" and not dtype.is_floating_point:
                result = torch.int64
            kernel = fold_kernel(op, x, result)
            kernel = dataclasses.replace(kernel, name=f"k{len(cases)}")
            cases.append((op, x, result, kernel))
    for (op, x, result, _), fn in zip(cases, compiled([c[3] for c in cases]), strict=True):
        out = poisoned((x.shape[0],), result)
        fn((), x, out)
        want = reduced(op, x)
        if op.startswith("arg"):
            want = getattr(x, op)(dim=1)  # ties and NaN as eager
            got, best = x.gather(1, out[:, None]), x.gather(1, want[:, None])
            assert torch.equal(out, want) or torch.allclose(got, best, equal_nan=True), (op, x.shape)
        else:
            check(out, want, x.double().abs().sum(1) if op == "sum" else want, 60)


def test_layer_norm_keeps_what_is_dear() -> None:
    for dtype in FLOATS:
        x, w = rand(33, 51, dtype=dtype), rand(51, dtype=dtype)
        out, mean = poisoned(x.shape, dtype), poisoned((33,), torch.float32)
        run(norm_kernel(x, w), [x, w, out, mean])
        want = torch.nn.functional.layer_norm(x.double(), (51,)).to(dtype).double() * w.double()
        torch.testing.assert_close(out.double(), want, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [40, 9000])
def test_a_sum_of_which_one_element_counts_is_no_loop(n: int) -> None:
    x = rand(50, n)
    x[3, 4] = math.inf  # not looked at
    at = torch.randint(-3, n + 3, (50,))  # some count nowhere
    p = Program("reduction", x0=50, r1=n)
    a, i, o = p.like(x), p.like(at), p.param((50,), torch.float32, out=True)
    here = p.op("eq", p.iota("r1", torch.int64), p.load(i, "x0"), dtype=torch.bool)
    twice = p.op("mul", p.load(a, "x0", "r1"), 2.0)
    p.store(o, ("x0",), p.fold("sum", p.op("where", here, twice, 0.0)))
    out = torch.full((50,), math.nan)
    source = run(p.kernel("picked"), [x, at, out])
    known = (at >= 0) & (at < n)
    want = torch.where(known, x.gather(1, at.clamp(0, n - 1)[:, None])[:, 0] * 2, 0.0)
    assert torch.equal(out, want)
    assert "for (i64 r1" not in source.body


def softmax_kernel(shape: Sequence[Dim], strides: Any = None) -> Kernel:
    m, n = shape
    p = Program("reduction", x0=m, r0=n)
    a, o = p.param((m, n), torch.float32, strides), p.param((m, n), torch.float32, strides, out=True)
    v = p.load(a, "x0", "r0")
    e = p.op("exp", p.op("sub", v, p.fold("amax", v)))
    p.store(o, ("x0", "r0"), p.op("div", e, p.fold("sum", e)))
    return p.kernel()


@pytest.mark.parametrize(
    ("shape", "strides"), [((7, 50), None), ((3, 70000), None), ((20, 9000), None), ((50, 30), (1, 50))], ids=str
)
def test_softmax_in_every_form(shape: tuple[int, int], strides: Any) -> None:
    x = rand(*shape) if strides is None else rand(*shape[::-1]).t()
    out = torch.full_like(x, math.nan)
    source = run(softmax_kernel(shape, strides), [x, out])
    if strides is None:
        assert "kept0 +" in source.body or "kept0[" in source.body  # the exponential is computed once
    torch.testing.assert_close(out, torch.softmax(x.double(), 1).float(), rtol=1e-5, atol=1e-8)
    again = torch.full_like(x, math.nan)
    run(softmax_kernel(shape, strides), [x, again])
    assert torch.equal(out, again)


@pytest.mark.parametrize(
    ("kib", "width", "asks"),
    [
        (48, 600, " + 4200);"),  # 16 KiB ahead, seven rows of 2400 bytes
        (32, 600, " + 600);"),  # the next row, beside this one
        (32, 300, " + 600);"),  # the next two, 2 KiB
        (32, 3000, " + 6000, 0, 2);"),  # no room for two rows
        (0, 600, " + 1200, 0, 2);"),  # foresees little: a page, two rows
    ],
)
def test_rows_read_again_ask_for_what_the_first_cache_holds(
    kib: int, width: int, asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    foresees(monkeypatch, kib == 0)
    for module in (vector, fold):
        monkeypatch.setattr(module, "first_cache", lambda: kib * 1024)
    monkeypatch.setattr(vector, "last_cache", lambda: 1000)
    x, out = rand(40, width), poisoned((40, width), torch.float32)
    source = run(softmax_kernel((40, width)), [x, out])
    torch.testing.assert_close(out, torch.softmax(x, 1), rtol=1e-5, atol=1e-8)
    asked = [line.strip() for line in source.body.split("\n") if "__builtin_prefetch" in line]
    assert all(line.endswith(asks) for line in asked)
    halves = [line.split(" __")[0] for line in asked]  # of a row, asked for by its first pass and its last
    assert len(set(asked)) == 1 if kib else halves == ["if (r0 < 600 / 2)", "if (r0 >= 600 / 2)"]


def test_softmax_of_a_size_known_at_run_time() -> None:
    s = symbol("s0")
    (fn,) = compiled([softmax_kernel((s, s))])
    for n in (1, 5, 3000):
        x = rand(n, n)
        out = poisoned((n, n), torch.float32)
        fn((), x, out, n)
        torch.testing.assert_close(out, torch.softmax(x, 1), rtol=1e-5, atol=1e-8)


def test_sums_of_many_terms_are_accurate() -> None:
    for rows, terms in ((1, 4_000_003), (20, 200_001)):
        x = torch.rand(rows, terms)
        out = poisoned((rows,), torch.float32)
        run(fold_kernel("sum", x, torch.float32), [x, out])
        assert (out / x.double().sum(1) - 1).abs().max() < 2e-7


# ---------------------------------------------------------------- graphs


def close(got: Any, want: Any, tol: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models(name: str) -> None:
    torch._dynamo.reset()
    fn, args, kwargs = load_model(f"hf:{name}", batch=2, seq=9)
    fast = tessel.compile(fn, target="cpu")
    with torch.no_grad():
        want, got = fn(*args, **kwargs), fast(*args, **kwargs)
    close(got[0], want[0])
    report = tessel.explain(fast)
    assert report.kernels and all(k.language == "cpp" for k in report.kernels) and not report.compilations[0].notes


def test_a_training_step() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 5))
    x, y = torch.randn(7, 12), torch.randint(0, 5, (7,))

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x), y)

    step(x, y).backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    fast = tessel.compile(step, target="cpu")
    loss = fast(x, y)
    loss.backward()
    close(loss, step(x, y))
    for p, w in zip(model.parameters(), want, strict=True):
        close(p.grad, w)


def test_composites_against_torch() -> None:
    torch._dynamo.reset()

    def f(x: torch.Tensor, w: torch.Tensor) -> Any:
        h = torch.nn.functional.layer_norm(x, (40,), w)
        return torch.softmax(h, -1), torch.log_softmax(h.t(), 0), h.var(0), h.cumsum(1), x.new_zeros(3, 40)[:, 1:]

    x, w = torch.randn(30, 40), torch.randn(40)
    for got, want in zip(tessel.compile(f, target="cpu")(x, w), f(x, w), strict=True):
        close(got, want)


def test_products_by_either_library() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for deterministic in (False, True):
            product = matmul_cpu.Product(deterministic)
            a, w, bias = rand(33, 40, dtype=dtype), rand(50, 40, dtype=dtype), rand(50, dtype=dtype)
            tol = 1e-4 if dtype == torch.float32 else 5e-2
            for b in (w.t(), w.t().contiguous()):
                close(product(a, b), a @ b, tol)
                close(product(bias, a, b), torch.addmm(bias, a, b), tol)
            close(product(a.t(), a), a.t() @ a, tol)
            assert product(a[:0], w.t()).shape == (0, 50)
    assert matmul_cpu.chosen()


# ---------------------------------------------------------------- the compiler and the cache

TEXT = '#include "tessel.hpp"\nextern "C" __attribute__((visibility("default"))) int one() { return 1; }\n'


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_warned", set())
    monkeypatch.setattr(native, "_private", [])
    return tmp_path / "cache" / "native"


def test_a_build_is_kept_and_verified(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, path = build(TEXT)
    assert library.one() == 1 and path.parent == fresh and stat.S_IMODE(fresh.stat().st_mode) == 0o700
    assert [p.name for p in fresh.glob("*.so")] == [path.name]
    monkeypatch.setattr(native, "_loaded", {})
    made = path.stat().st_mtime_ns
    assert build(TEXT)[1] == path and path.stat().st_mtime_ns == made
    data = bytearray(path.read_bytes())
    path.unlink()  # the loaded object must not change under the process
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(native, "_loaded", {})
    library, again = build(TEXT)
    assert library.one() == 1 and again.read_bytes() != bytes(data)
    assert build(TEXT + "//")[1] != again


def test_other_flags_or_another_cpu_build_anew(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = build(TEXT)
    here = native.get_target("cpu")
    other = dataclasses.replace(here, features=(*here.features, "more"))
    monkeypatch.setattr(native, "get_target", lambda name: other)
    assert build(TEXT)[1] != first


@pytest.mark.parametrize("how", ["open", "file", "read-only", "link"])
def test_a_doubtful_directory_is_not_used(fresh: Path, how: str, tmp_path: Path) -> None:
    fresh.parent.mkdir(mode=0o700)
    if how == "file":
        fresh.write_text("")
    elif how == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        fresh.symlink_to(tmp_path / "elsewhere")
    else:
        fresh.mkdir()
        fresh.chmod(0o777 if how == "open" else 0o500)
    if how == "read-only" and os.access(fresh, os.W_OK):
        pytest.skip("this user writes everywhere")
    with pytest.warns(UserWarning, match="compiled kernels are not kept"):
        library, path = build(TEXT)
    assert library.one() == 1 and fresh not in path.parents and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    if fresh.is_dir():
        fresh.chmod(0o700)


def test_another_users_directory_is_not_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(UserWarning, match="another user"):
        assert build(TEXT)[1].parent != fresh


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false", "sh -c 'echo broken >&2; test \"$0\" = --version'"])
def test_without_a_compiler_torch_runs_everything(fresh: Path, cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", cxx)
    torch._dynamo.reset()
    x = torch.randn(4, 8)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * 2, -1) + 1

    with pytest.warns(UserWarning, match="no compiled kernels") as seen:
        fast = tessel.compile(f, target="cpu")
        close(fast(x), f(x))
    assert sum("no compiled kernels" in str(w.message) for w in seen) == 1
    report = tessel.explain(fast)
    assert not report.kernels and any("operator by operator" in n for n in report.compilations[0].notes)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        close(tessel.compile(lambda x: f(x) * 2, target="cpu")(x), f(x) * 2)


def test_a_family_without_a_template() -> None:
    p = Program("histogram", x0=2)
    with pytest.raises(TesselError, match="no C\\+\\+ template for histogram"):
        render(p.kernel())
