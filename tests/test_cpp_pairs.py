"""C++ loops over bfloat16 that work on even and odd elements apart, and functions that are rounded to 8 bits anyway."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kernels import Program, compiled, poisoned, rand

from tessel.codegen.cpp.vector import rough
from tessel.ops.rounding import floor_pow2
from tessel.tiles.kernel import Kernel

pytestmark = pytest.mark.usefixtures("own_cache")

HALF = torch.bfloat16
UNARY: dict[str, Callable[..., torch.Tensor]] = {
    "abs": torch.abs,
    "neg": torch.neg,
    "relu": torch.relu,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sigmoid": torch.sigmoid,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "floor_pow2": floor_pow2,
}
BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "copysign": torch.copysign,
}


def op_kernel(name: str, size: int, operands: int) -> Kernel:
    """Computed in float32 from bfloat16, and rounded."""
    p = Program("pointwise", x0=size)
    ins = [p.param((size,), HALF) for _ in range(operands)]
    out = p.param((size,), HALF, out=True)
    args = [p.cast(p.load(i, "x0"), torch.float32) for i in ins]
    p.store(out, ("x0",), p.cast(p.op(name, *args), HALF))
    return p.kernel(f"{name}_of_pairs")


ROUGH = frozenset({"exp", "exp2", "sigmoid"})


def matches(got: torch.Tensor, want: torch.Tensor, units: float = 0.51) -> None:
    """Rounded from what is nearly right: half a unit and a bit; below the least normal number, zero is allowed."""
    nearest = want.to(HALF)
    assert torch.equal(got.isnan(), nearest.isnan())
    assert torch.equal(got.isinf(), nearest.isinf())
    sound = nearest.isfinite()
    got, want = got[sound].double(), want[sound].double()
    unit = torch.exp2(torch.floor(torch.log2(want.abs().clamp_min(2.0**-126))) - 7)
    assert ((got - want).abs() <= torch.where(want.abs() < 2.0**-126, 2.0**-126, units * unit)).all()


def test_every_operator_on_every_bfloat16() -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(HALF)
    x = torch.cat([every, every[:7]])  # a tail that is no whole vector
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    kernels = [op_kernel(n, len(x), 1) for n in UNARY] + [op_kernel(n, len(x), 2) for n in BINARY]
    for kernel, (name, fn) in zip(compiled(kernels), {**UNARY, **BINARY}.items(), strict=True):
        assert "Pair{}" in kernel.source.body, name
        out = poisoned((len(x),), HALF)
        given = (x, y)[: 1 if name in UNARY else 2]
        kernel((), *given, out)
        matches(out, fn(*(g.double() for g in given)), 0.54 if name in ROUGH else 0.51)


@pytest.mark.parametrize("size", [1, 17, 32, 33, 63, 64, 95])
def test_every_length_of_the_rest(size: int) -> None:
    """Rows that begin anywhere; what lies behind a row stays."""
    p = Program("pointwise", x0=5, x1=size)
    a, o = p.param((5, size), HALF, (131, 1)), p.param((5, size), HALF, (131, 1), out=True)
    p.store(o, ("x0", "x1"), p.op("mul", p.load(a, "x0", "x1"), 0.5, dtype=torch.float32))
    x, out = rand(5, 131, dtype=HALF), torch.zeros(5, 131, dtype=HALF)
    (kernel,) = compiled([p.kernel("halved")])
    kernel((), x[:, :size], out[:, :size])
    assert torch.equal(out[:, :size], x[:, :size] * 0.5)
    assert not out[:, size:].any()


@pytest.mark.parametrize("scaled", [False, True], ids=["copied", "computed"])
@pytest.mark.parametrize("rows", [3, 2048], ids=["near", "past the caches"])
def test_one_value_a_row(rows: int, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessel.codegen.cpp.vector.last_cache", lambda: 2**16)
    p = Program("pointwise", x0=rows, x1=77)
    a, o = p.param((rows,), HALF), p.param((rows, 77), HALF, out=True)
    v = p.load(a, "x0")
    p.store(o, ("x0", "x1"), p.op("mul", v, 3.0, dtype=torch.float32) if scaled else v)
    (kernel,) = compiled([p.kernel("spread")])
    assert "Pair{}" in kernel.source.body and ("put_past_" in kernel.source.body) == (rows > 3)
    x, out = rand(rows, dtype=HALF), poisoned((rows, 77), HALF)
    kernel((), x, out)
    matches(out, (x.double() * (3.0 if scaled else 1.0))[:, None].expand(rows, 77))


def unit_rows(rows: int, width: int) -> Kernel:
    """x / |x| * w for every row."""
    p = Program("reduction", x0=rows, r0=width)
    a, b = p.param((rows, width), HALF), p.param((width,), HALF)
    o = p.param((rows, width), HALF, out=True)
    v = p.cast(p.load(a, "x0", "r0"), torch.float32)
    total = p.fold("sum", p.op("mul", v, v))
    scaled = p.op("mul", v, p.op("rsqrt", total))
    p.store(o, ("x0", "r0"), p.cast(p.op("mul", scaled, p.cast(p.load(b, "r0"), torch.float32)), HALF))
    return p.kernel("unit_rows")


@pytest.mark.parametrize("width", [1024, 1029])
def test_a_norm_of_rows(width: int) -> None:
    x, w = rand(9, width, dtype=HALF), rand(width, dtype=HALF)
    x[3, 5], x[4, 6] = math.nan, math.inf
    (fn,) = compiled([unit_rows(9, width)])
    assert "Pair{}" in fn.source.body
    out = poisoned((9, width), HALF)
    fn((), x, w, out)
    good = [0, 1, 2, 5, 6, 7, 8]
    d = x[good].double()
    matches(out[good], d * (1 / (d * d).sum(1, keepdim=True).sqrt()) * w.double())
    assert out[3].isnan().all()
    assert not out[4, torch.arange(width) != 6].any()


def test_what_may_be_rough() -> None:
    """What is rounded before anything is added to it, and nothing else."""
    p = Program("pointwise", x0=64)
    a, o, wide = p.param((64,), HALF), p.param((64,), HALF, out=True), p.param((64,), torch.float32, out=True)
    v = p.cast(p.load(a, "x0"), torch.float32)
    rounded, added, kept = p.op("sigmoid", v), p.op("exp", v), p.op("exp2", v)
    late = p.op("mul", p.op("sigmoid", p.load(a, "x0")), 3.0)  # bfloat16 by name, but not rounded yet
    finer = p.op("sigmoid", v)
    minus, times = p.op("neg", rounded), p.op("mul", v, finer)
    both = p.op("mul", v, minus)
    p.store(o, ("x0",), p.cast(both, HALF))
    p.store(o, ("x0",), p.cast(p.op("sub", added, 1.0), HALF))
    p.store(wide, ("x0",), kept)
    p.store(o, ("x0",), p.op("add", late, 1.0))
    p.store(o, ("x0",), p.cast(times, HALF))
    p.store(o, ("x0",), p.cast(p.cast(times, torch.float16), torch.float32))
    found = rough(p.kernel("four"))
    assert found.bits == {rounded.number: 8, finer.number: 11}
    assert found.made == {n.number for n in (rounded, minus, both, finer, times)}


@pytest.mark.parametrize(("squares", "bits"), [(0, {8}), (1, {8}), (2, {11}), (3, {11}), (4, set())])
def test_powers_are_off_by_more(squares: int, bits: set[int]) -> None:
    p = Program("pointwise", x0=64)
    a, o = p.param((64,), HALF), p.param((64,), HALF, out=True)
    v = p.op("sigmoid", p.cast(p.load(a, "x0"), torch.float32))
    for _ in range(squares):
        v = p.op("mul", v, v)
    p.store(o, ("x0",), p.cast(v, HALF))
    assert set(rough(p.kernel("power")).bits.values()) == bits


@pytest.mark.parametrize("op", sorted(ROUGH))
def test_rough_values_of_every_half(op: str) -> None:
    """Every bfloat16, doubled by a value that is rounded between: the ties of inexact numbers may go either way."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(HALF)
    p = Program("pointwise", x0=every.numel())
    a, o = p.param((every.numel(),), HALF), p.param((every.numel(),), HALF, out=True)
    value = p.op(op, p.cast(p.load(a, "x0"), torch.float32))
    once = p.cast(p.cast(p.op("mul", value, 1.5), HALF), torch.float32)
    p.store(o, ("x0",), p.cast(p.op("mul", once, 2.0), HALF))
    (fn,) = compiled([p.kernel(f"every_{op}")])
    assert f"rough8_{op}" in fn.source.body
    assert "round_rough_bf16" in fn.source.body
    out = poisoned((every.numel(),), HALF)
    fn((), every, out)
    matches(out, 3 * getattr(torch, op)(every.double()), 0.54)
