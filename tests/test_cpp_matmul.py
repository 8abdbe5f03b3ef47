"""Products in C++ against float64: sizes, layouts, dtypes, computed operands, epilogues, groups, whole functions."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernels import Program, poisoned, rand

import tessel
from tessel.codegen.cpp import CppSource, render, translation_unit
from tessel.codegen.cpp.gemm import gemm_header, multiplies_bf16
from tessel.codegen.cpp.matmul import grouped_unit, matmul, product_header, refusal
from tessel.errors import TesselError
from tessel.ir.node import Node
from tessel.ir.text import parse_graph
from tessel.ir.types import Dim, symbol
from tessel.ops import OPS
from tessel.ops.backward import grouped_mm_ref
from tessel.runtime import native
from tessel.runtime.matmul_cpu import Grouped, by_library
from tessel.runtime.native import NativeKernel, build
from tessel.targets import get_target
from tessel.tiles.kernel import ACC, Kernel, Ref

pytestmark = pytest.mark.usefixtures("own_cache", "same_start")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 5, 9, 16, 17, 23, 24, 25, 129)
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def program(
    name: str,
    m: Dim,
    n: Dim,
    k: Dim,
    dtype: torch.dtype = torch.float32,
    left: str = "mk",
    right: str = "nk",
    batch: Dim | None = None,
    epilogue: bool = False,
    computed: bool = False,
    pad: int = 0,
) -> Kernel:
    """A product of a [b, m, k] and b [b, k, n].

    Args:
        left, right: the order of an operand's dims in memory.
        epilogue: ``silu(acc + bias) * gate + residual``, and the sum before the gate stored as well.
        computed: the operands are twice what lies in memory.
        pad: elements between the rows of the operands.
    """
    p = Program("matmul", **({} if batch is None else {"x0": batch}), m=m, n=n, k=k)
    lead = () if batch is None else (batch,)
    x = () if batch is None else ("x0",)

    def operand(rows: Dim, columns: Dim, turned: bool) -> int:
        inner, outer = (rows, columns) if turned else (columns, rows)
        strides = (1, inner + pad) if turned else (inner + pad, 1)
        whole = ((inner + pad) * outer,) if batch is not None else ()
        return p.param((*lead, rows, columns), dtype, (*whole, *strides))

    a, b = operand(m, k, left == "km"), operand(k, n, right == "nk")
    more = [p.param((n,), dtype), *(p.param((*lead, m, n), dtype) for _ in range(2))] if epilogue else []
    outs = [p.param((*lead, m, n), dtype, out=True) for _ in range(1 + epilogue)]
    for part, tensor, place in (("a", a, ("m", "k")), ("b", b, ("k", "n"))):
        p.part(part)
        got = p.load(tensor, *x, *place)
        p.provides[part] = p.op("mul", got, 2.0) if computed else got
    p.part("body")
    p.dtypes[ACC] = dtype
    value = Ref(ACC)
    if epilogue:
        value = p.op("add", value, p.load(more[0], "n"))
        value = p.op("mul", value, p.op("sigmoid", value))
        p.store(outs[1], (*x, "m", "n"), value)
        value = p.op("mul", value, p.load(more[1], *x, "m", "n"))
        value = p.op("add", value, p.load(more[2], *x, "m", "n"))
    p.store(outs[0], (*x, "m", "n"), value)
    return p.kernel(name)


def compiled(kernels: Sequence[Kernel]) -> list[NativeKernel]:
    sources = [render(k) for k in kernels]
    library, path = build(translation_unit(sources))
    return [NativeKernel(s, library, path) for s in sources]


def laid_out(x: torch.Tensor, turned: bool, pad: int = 0) -> torch.Tensor:
    """The same values with the last two dims in the other order in memory, or with gaps between rows."""
    y = x.mT if turned else x
    held = torch.full((*y.shape[:-1], y.shape[-1] + pad), math.nan, dtype=x.dtype)
    held[..., : y.shape[-1]] = y
    view = held[..., : y.shape[-1]]
    return view.mT if turned else view


def check(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, want: torch.Tensor, size: torch.Tensor) -> None:
    """Within the error of a sum of k terms in float, and one rounding to the dtype of the result."""
    k = a.shape[-1]
    unit = torch.finfo(got.dtype).eps
    bound = 4 * k**0.5 * 2**-24 * size + unit * want.abs() + 2 * k * torch.finfo(got.dtype).tiny
    wrong = (got.double() - want).abs()
    same = (got.double() == want) | (got.isnan() & want.isnan())
    assert bool((same | (wrong <= bound)).all()), f"off by {(wrong / bound).nan_to_num(0).max().item():.3g} bounds"


def run(fn: NativeKernel, m: int, n: int, k: int, case: dict[str, Any], *sizes: int) -> list[torch.Tensor]:
    """Run a kernel of ``program`` on random numbers, check what it gives, and return that."""
    dtype, pad = case.get("dtype", torch.float32), case.get("pad", 0)
    lead = () if case.get("batch") is None else (3,)
    a, b = rand(*lead, m, k, dtype=dtype), rand(*lead, k, n, dtype=dtype)
    ins = [laid_out(a, case.get("left") == "km", pad), laid_out(b, case.get("right", "nk") == "nk", pad)]
    outs = [poisoned((*lead, m, n), dtype)]
    twice = 4.0 if case.get("computed") else 1.0
    want, size = twice * (a.double() @ b.double()), twice * (a.double().abs() @ b.double().abs())
    if case.get("epilogue"):
        bias, gate, rest = rand(n, dtype=dtype), rand(*lead, m, n, dtype=dtype), rand(*lead, m, n, dtype=dtype)
        ins += [bias, gate, rest]
        outs.append(poisoned((*lead, m, n), dtype))
        act = torch.nn.functional.silu(want + bias.double())
        want, size = act * gate.double() + rest.double(), (size + 4) * (1 + gate.double().abs()) + rest.double().abs()
        fn((), *ins, *outs, *sizes)
        check(outs[1], a, b, act, size)
    else:
        fn((), *ins, *outs, *sizes)
    check(outs[0], a, b, want, size)
    return outs


# ---------------------------------------------------------------- sizes, layouts, dtypes


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_rows_and_layouts(dtype: torch.dtype) -> None:
    cases: list[tuple[tuple[int, int, int], dict[str, Any]]] = []
    for m in ROWS:
        for right in ("nk", "kn"):
            n, k = (100, 65) if m % 2 else (64, 64)  # with a rest, or whole panels and whole steps
            cases.append(((m, n, k), {"dtype": dtype, "right": right, "epilogue": m in (2, 25)}))
    cases += [((27, 50, 33), {"dtype": dtype, "left": left, "pad": 3}) for left in ("mk", "km")]
    cases += [((27, 51, 20), {"dtype": dtype, "right": right, "computed": True}) for right in ("nk", "kn")]
    cases += [((m, 57, 40), {"dtype": dtype, "batch": 3, "epilogue": True}) for m in (1, 18, 28)]
    cases += [((28, n, 40), {"dtype": dtype, "epilogue": n == 48}) for n in (1, 19, 47, 48, 49)]  # few columns
    steps = (1, 2, 15, 16, 17, 31, 48, 300)  # a tile goes 16 of them at a time, or 32, or 256
    cases += [((m, 65, k), {"dtype": dtype}) for m in (13, 31) for k in steps]
    cases += [((1, 1, 1), {"dtype": dtype}), ((9, 1, 5), {"dtype": dtype, "right": "kn"})]
    cases += [((m, n, 96), {"dtype": dtype}) for m in (33, 48) for n in (80, 150)]  # parts of a tile of 32 x 32
    cases += [((40, 520, 70), {"dtype": dtype, "right": right}) for right in ("nk", "kn")]  # two panels at a time
    swapped = (16, 33, 45, 64, 70, 128, 200, 256)
    cases += [((m, 4 * m + 7, 70), {"dtype": dtype, "epilogue": m != 70}) for m in swapped]
    cases += [((30, 130, 900), {"dtype": dtype, "batch": 3}), ((97, 1100, 800), {"dtype": dtype, "pad": 3})]
    fns = compiled([program(f"p{i}", *mnk, **case) for i, (mnk, case) in enumerate(cases)])
    for fn, (mnk, case) in zip(fns, cases, strict=True):
        run(fn, *mnk, case)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["f32", "bf16"])
def test_a_left_operand_along_its_rows(dtype: torch.dtype) -> None:
    """As in the gradient of a weight: turned in squares, with a rest in either direction."""
    both: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
        ((130, 50, 64), {"right": "kn"}),
        ((130, 48, 130), {"right": "nk", "pad": 5}),
        ((130, 58, 130), {"right": "nk", "pad": 5}),
        ((33, 40, 31), {"right": "kn", "pad": 5}),
        ((7, 9, 1), {"right": "kn"}),
        ((4, 9, 33), {"right": "nk"}),
        ((19, 20, 75), {"batch": 3, "epilogue": True}),
        ((29, 60, 75), {"batch": 3, "epilogue": True}),
    ]
    both = [(mnk, {"dtype": dtype, "left": "km", **case}) for mnk, case in both]
    fns = compiled([program(f"k{i}", *mnk, **case) for i, (mnk, case) in enumerate(both)])
    for fn, (mnk, case) in zip(fns, both, strict=True):
        run(fn, *mnk, case)
    as_it_is = dtype == torch.float32 or multiplies_bf16(get_target("cpu").features)
    assert all(("gemm::turned(" in fn.source.body) == (as_it_is and k > 1) for fn, ((_, _, k), _) in zip(fns, both))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["f32", "bf16"])
def test_long_sums_in_parts(dtype: torch.dtype) -> None:
    cases = [{"dtype": dtype, "right": r, "computed": c} for r in ("nk", "kn") for c in (False, True)]
    for fn, case in zip(compiled([program(f"l{i}", 31, 50, 9001, **c) for i, c in enumerate(cases)]), cases):
        run(fn, 31, 50, 9001, case)


def test_sizes_known_at_run_time() -> None:
    s = symbol("s0")
    cases = [{"right": r, "epilogue": e} for r in ("nk", "kn") for e in (False, True)]
    fns = compiled([program(f"s{i}", s, 70, 33, **c) for i, c in enumerate(cases)])
    for fn, case in zip(fns, cases, strict=True):
        for m in ROWS:
            run(fn, m, 70, 33, case, m)
    (fn,) = compiled([program("every", s, s, s, batch=3)])
    for n in (1, 7, 40, 59):
        run(fn, n, n, n, {"batch": 3}, n)


def test_not_a_number_and_infinity() -> None:
    fns = compiled([program(f"n{m}{r}", m, 50, 40, right=r) for m in (2, 30) for r in ("nk", "kn")])
    for fn, (m, right) in zip(fns, itertools.product((2, 30), ("nk", "kn")), strict=True):
        a, b = rand(m, 40), rand(40, 50)
        a[0, 3], a[1, 39] = math.nan, math.inf
        a.view(torch.int32)[m // 2, 20] = -1  # the bits of a NaN that rounding to bf16 would carry over
        b[7, 49] = -math.inf
        out = poisoned((m, 50), torch.float32)
        fn((), a, laid_out(b, right == "nk"), out)
        want = a.double() @ b.double()
        assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())
        assert torch.equal(out[out.isinf()].double(), want[want.isinf()])


def magnitudes(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands whose elements are down to subnormal, in rows and columns whose greatest is not."""
    a, b = rand(m, k), rand(k, n)
    for x in (a, b):
        some = x.view(-1)[::3]
        some *= 2.0 ** -torch.randint(0, 149, some.shape).double()
    return a, b


def check_magnitudes(fn: NativeKernel, a: torch.Tensor, b: torch.Tensor, right: str) -> None:
    out = poisoned((a.shape[0], b.shape[1]), torch.float32)
    fn((), a, laid_out(b, right == "nk"), out)
    want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    check(out, a, b, want.where(want.abs() < 2.0**128, want.sign() * math.inf), size)


@pytest.mark.parametrize("right", ["nk", "kn"])
def test_floats_of_all_magnitudes(right: str) -> None:
    """A matrix unit takes some of these for zero or infinity: vectors multiply their rows and columns."""
    m, n, k = 150, 200, 900
    (fn,) = compiled([program("magnitudes", m, n, k, right=right)])
    a, b = magnitudes(m, n, k)
    a[3] *= 2.0**-100
    a[40] *= 2.0**-60
    a[75, :800] *= 2.0**80
    a[75, 800:] = 0  # their products would be infinite
    a[76:110] = 0
    a[120, 5] = 2.0**110
    b[:, 9] *= 2.0**-70
    b[:, 70] *= 2.0**-100
    b[800:, 130] = 2.0**66
    b[:, 199] = 0
    check_magnitudes(fn, a, b, right)


@pytest.mark.parametrize("m", [16, 30, 41, 60, 121])
def test_few_rows_of_all_magnitudes(m: int) -> None:
    """A column that vectors multiply is known when its products are made: in either half of a block, or in a part."""
    (fn,) = compiled([program(f"few{m}", m, 500, 900)])
    a, b = magnitudes(m, 500, 900)
    check_magnitudes(fn, a, b, "nk")
    a, b = a * 2.0**40, b * 2.0**40
    b[:, [2, 401]] *= 2.0**-80
    b[:, [2, 401]] *= 2.0**-80
    b[710, 386] = math.inf
    b[:, 499] = 0
    b[899, 499] = 2.0**-140  # as bf16 the whole column is zero
    check_magnitudes(fn, a, b, "nk")
    b, a[m - 2] = b * 2.0**20, 0
    a[m - 2, 64] = 2.0**-140
    check_magnitudes(fn, a, b, "nk")
    a[m - 1] *= 2.0**-80
    a[m - 1] *= 2.0**-80
    check_magnitudes(fn, a, b, "nk")


def test_a_float_is_no_worse_by_parts() -> None:
    """Three bf16 hold a float: what their products leave out, less than 2^-23, and the roundings of a sum."""
    m, n, k = 40, 70, 32
    (fn,) = compiled([program("parts", m, n, k)])
    a, b = torch.zeros(m, k), torch.zeros(k, n)
    at = torch.arange(m)
    a[at, at % k] = rand(m)  # one product a sum
    b[:] = rand(k, n)
    out = poisoned((m, n), torch.float32)
    fn((), a, laid_out(b, True), out)
    want = a.double() @ b.double()
    assert ((out.double() - want).abs() <= 2.0**-22 * want.abs()).all()


def test_threads_and_runs_give_the_same_bits() -> None:
    cases = [(m, {"dtype": d, "right": r}) for m in (2, 129, 600) for d in DTYPES[:2] for r in ("nk", "kn")]
    fns = compiled([program(f"t{i}", m, 1000, 700, **c) for i, (m, c) in enumerate(cases)])
    for fn, (m, case) in zip(fns, cases, strict=True):
        got = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            got += run(fn, m, 1000, 700, case)
        assert all(torch.equal(g, got[0]) for g in got)


# ---------------------------------------------------------------- CPUs of other kinds

# Features, and what the compiler is told beside -march=native.
OTHERS: dict[str, tuple[tuple[str, ...], str]] = {
    "avx2": (("avx2", "fma"), "-mno-avx512f -mavx2 -mfma"),
    "portable": ((), "-mno-avx512f -mno-avx2 -mno-avx -mno-fma"),
    "avx512 without bf16": (("avx512f",), "-mno-avx512bf16"),
    "no matrix unit": (("avx512f", "avx512_bf16"), ""),
}
MATRIX_UNIT = ("avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


@pytest.mark.parametrize("kind", OTHERS)
def test_code_for_narrower_cpus(kind: str) -> None:
    features, flags = OTHERS[kind]
    cpu = get_target("cpu")
    if cpu.arch != "x86_64" or not set(features) <= set(cpu.features):
        pytest.skip("this CPU cannot run it")
    made, sizes = [], ((21, 50, 33), (40, 96, 64), (7, 16, 32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tessel.codegen.cpp.matmul.matmul.__defaults__", (features,))
        cases = [{"dtype": d, "right": r} for d in DTYPES for r in ("nk", "kn")]
        patch.setattr("tessel.runtime.native._FLAGS", [*native._FLAGS, *flags.split()])
        both = list(itertools.product(cases, sizes))
        for i, (c, mnk) in enumerate(both):
            made.append(render(program(f"c{i}", *mnk, **c)))
        library, path = build(translation_unit(made), {"gemm.hpp": gemm_header(features)})
    for source, (case, mnk) in zip(made, both, strict=True):
        run(NativeKernel(source, library, path), *mnk, case)


def test_code_for_a_matrix_unit_compiles_everywhere() -> None:
    """On a CPU that has one every test of bf16 and of f32 runs it."""
    wider = "-march=sapphirerapids"
    compiler = native.find_compiler(None)
    if subprocess.run([*compiler.command, wider, "-E", "-xc++", os.devnull], capture_output=True).returncode:
        pytest.skip(f"the compiler does not know {wider}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tessel.codegen.cpp.matmul.matmul.__defaults__", (MATRIX_UNIT,))
        patch.setattr(native.Compiler, "flags", lambda self: [*native._FLAGS, wider])
        both = itertools.product(DTYPES[:2], ("nk", "kn"))
        made = [render(program(f"a{i}", 40, 100, 70, dtype=d, right=r)) for i, (d, r) in enumerate(both)]
        _, path = build(translation_unit(made), {"gemm.hpp": product_header(MATRIX_UNIT)})
    assert path.exists()


# ---------------------------------------------------------------- what is refused


def test_refusals() -> None:
    assert "float64" in str(refusal(torch.float64)) and refusal(torch.float16) is None
    with pytest.raises(TesselError, match="float64"):
        matmul(program("k", 3, 3, 3, torch.float64))
    p = program("k", 3, 3, 3)
    with pytest.raises(TesselError, match="provides a value"):
        matmul(Kernel("k", "matmul", p.params, p.axes, p.body, p.parts, {"a": 0, "b": 0}))


def node(dtype: str, m: int = 3) -> Node:
    text = f"""graph "g"
  %a: {dtype}[{m},5] = input "a"
  %b: {dtype}[5,7] = input "b"
  %p = matmul(%a, %b)
  return %p
"""
    return next(n for n in parse_graph(text, OPS).nodes if n.op.name == "matmul")


def test_who_multiplies() -> None:
    wide = ("avx512f", "avx512_bf16")
    assert by_library(node("f32"), wide) is None and by_library(node("bf16"), wide) is None
    assert by_library(node("f32"), ("avx2", "fma")) is None
    assert by_library(node("f16"), wide) is None and "one row" in str(by_library(node("f16", 1), wide))
    assert "AVX" in str(by_library(node("f32"), ("avx2",)))
    assert by_library(node("bf16"), (*wide, "amx_tile", "amx_bf16")) is None
    assert "widen" in str(by_library(node("bf16"), ("avx512f",)))
    assert by_library(node("bf16"), (), wanted=True) is None
    assert "float64" in str(by_library(node("f64"), wide, wanted=True))


# ---------------------------------------------------------------- groups of rows


def test_grouped_products() -> None:
    product = Grouped()
    assert "grouped_f32_nk" in grouped_unit()
    cases = ((37, 33, 50, [0, 1, 9, 37]), (40, 16, 48, [10, 10, 30, 36]), (80, 5000, 50, [31, 79]), (5, 8, 9, [0, 0]))
    for (m, k, n, ends), dtype, turned in itertools.product(cases, DTYPES, (False, True)):
        a, b = rand(m, k, dtype=dtype), laid_out(rand(len(ends), k, n, dtype=dtype), turned)
        offs = torch.tensor(ends, dtype=torch.int32)
        want = grouped_mm_ref(a.double(), b.double(), offs)
        size = grouped_mm_ref(a.double().abs(), b.double().abs(), offs)
        check(product(a, b, offs), a, b, want, size)
    wrong = torch.tensor([50, -3, 70], dtype=torch.int32)  # no memory is touched outside the operands
    assert product(rand(7, 8), rand(3, 8, 5), wrong).shape == (7, 5)


def test_other_forms_of_grouped_products_by_definition() -> None:
    product = Grouped()
    a, b, offs = rand(6, 4), rand(4, 5), torch.tensor([1, 4], dtype=torch.int32)
    torch.testing.assert_close(product(a.t().contiguous(), rand(6, 5), offs).shape, torch.Size((2, 4, 5)))
    torch.testing.assert_close(product(rand(2, 6, 4), rand(2, 4, 5)).shape, torch.Size((2, 6, 5)))
    torch.testing.assert_close(product(rand(2, 6, 4), b, torch.tensor([2, 5])).shape, torch.Size((6, 5)))
    assert product(a, rand(2, 4, 5), offs, out_dtype=torch.float64).dtype == torch.float64


# ---------------------------------------------------------------- whole functions


def test_functions_and_their_gradients() -> None:
    torch._dynamo.reset()
    w, v, bias = rand(70, 40).requires_grad_(), rand(40, 70).requires_grad_(), rand(70).requires_grad_()

    def f(x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.linear(x, w, bias)
        return x + torch.nn.functional.gelu(h) @ w + torch.relu(x @ v) @ v.t()

    x = rand(3, 11, 40)
    want = torch.autograd.grad(f(x).square().sum(), (w, v, bias))
    fast = tessel.compile(f, target="cpu")
    got = torch.autograd.grad(fast(x).square().sum(), (w, v, bias))
    torch.testing.assert_close(fast(x), f(x), rtol=1e-4, atol=1e-4)
    for g, expected in zip(got, want, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-3, atol=1e-2)
    kernels = [k for k in tessel.explain(fast).kernels if k.family == "matmul"]
    if by_library(node("f32"), get_target("cpu").features) is None:
        assert kernels


def test_explain_says_why_a_library_multiplies() -> None:
    torch._dynamo.reset()

    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    for options, dtype, words in (
        ({"matmul": "library"}, torch.float32, "'library'"),
        ({}, torch.float64, "float64"),
    ):
        torch._dynamo.reset()
        fast = tessel.compile(f, target="cpu", options=options)
        x = rand(5, 5, dtype=dtype)
        torch.testing.assert_close(fast(x, x), x @ x)
        (call,) = (c for comp in tessel.explain(fast).compilations for c in comp.calls)
        assert words in call.reason


def test_the_text_is_small() -> None:
    source = render(program("k", 300, 300, 300, epilogue=True))
    assert isinstance(source, CppSource) and source.text.count("\n") < 60 and "\n\n" not in source.body
