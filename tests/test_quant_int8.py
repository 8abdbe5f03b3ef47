"""Products of integers of 8 bits: the kernel against whole numbers, on this CPU and as others would run it."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tessel
from tessel.codegen.cpp.gemm import gemm_header
from tessel.codegen.cpp.includes import headers
from tessel.codegen.cpp.packed import packed_unit
from tessel.config import cxx
from tessel.frontend.packed_op import packed_linear
from tessel.ops.packed import rounded_rows
from tessel.quant.formats import integers, rounded
from tessel.quant.linear import pack
from tessel.runtime import packed_cpu
from tessel.runtime.native import find_compiler
from tessel.targets import get_target

pytestmark = pytest.mark.usefixtures("shared_cache")


def by_whole_numbers(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Sums of each group in int64, then scales in float64."""
    q, rows = rounded_rows(x, 8)
    groups = scale.shape[1]
    middle = torch.full_like(scale, 2.0 ** (bits - 1)) if zero is None else zero
    apart = codes.unflatten(1, (groups, -1)) - middle.long()[..., None]
    sums = torch.einsum("mgk,ngk->mng", q.long().unflatten(1, (groups, -1)), apart)
    return (sums.double() * scale.double()).sum(-1) * rows.double()


def inputs(m: int, k: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return (torch.randn(m, k, generator=g) * 3).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    groups=st.integers(1, 4),
    group=st.sampled_from([4, 12, 32, 64, 128, 256]),
    kind=st.sampled_from([(8, torch.float32), (8, torch.bfloat16), (4, torch.float32), (3, torch.float32)]),
    zero=st.booleans(),
    bias=st.booleans(),
)
def test_the_kernel(
    m: int, n: int, groups: int, group: int, kind: tuple[int, torch.dtype], zero: bool, bias: bool
) -> None:
    """Against whole numbers: only scales, the sum over groups and the result are rounded."""
    bits, dtype = kind
    g = torch.Generator().manual_seed(m * 100 + n)
    k = groups * group
    x, codes = inputs(m, k, dtype, g), torch.randint(0, 2**bits, (n, k), generator=g)
    scale = torch.rand(n, groups, generator=g)
    zeros = torch.randint(0, 2**bits, (n, groups), generator=g).float() if zero else None
    b = torch.randn(n, generator=g).to(dtype) if bias else None
    got = packed_cpu.forward_integers(x, pack(codes, bits), scale, zeros, b, None, bits)
    want = by_whole_numbers(x, codes, scale, zeros, bits) + (0.0 if b is None else b.double())
    room = (2e-6 if dtype == torch.float32 else 4e-3) * want.abs()
    size = x.abs().double() @ (codes.double().abs().amax(1) * scale.double().amax(1))[None].expand(k, -1)
    assert got.dtype == dtype and ((got.double() - want).abs() <= room + 4e-7 * size).all()


@pytest.mark.parametrize(("m", "k"), [(1, 4096), (3, 20), (40, 4096), (9, 70_000)])
def test_sums_are_exact(m: int, k: int) -> None:
    """Scales of one: what comes out is the whole number, to the nearest float; rows of the largest codes, too."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (m, k), generator=g).float()
    x[:, 0] = 127
    x[-1] = 127
    codes = torch.randint(0, 256, (50, k), generator=g)
    codes[0], codes[1] = 255, 0
    got = packed_cpu.forward_integers(x, pack(codes, 8), torch.ones(50, 1))
    assert torch.equal(got, (x.long() @ (codes - 128).t()).float())


def test_inputs_are_rounded_as_the_reference_rounds() -> None:
    x = torch.randn(64, 96) * torch.logspace(-42, 37, 64)[:, None]
    x[3] = 0
    x[5, :6] = torch.tensor([254.0, 1.0, 3.0, 5.0, -1.0, -3.0])  # scaled by 2: halves go to even
    x[5, 6:] = 0
    eye = pack(torch.eye(96).long() + 128, 8)
    got = packed_cpu.forward_integers(x, eye, torch.ones(96, 1))
    codes, scale = rounded_rows(x, 8)
    assert torch.equal(got, codes * scale)
    assert got[5, :6].tolist() == [254.0, 0.0, 4.0, 4.0, 0.0, -4.0]
    assert torch.equal(rounded(x, integers(8)), codes * scale)


def test_a_row_that_is_no_number_stays_alone() -> None:
    x = torch.randn(20, 64)
    x[3, 5], x[7, 9] = torch.nan, -torch.inf
    words = pack(torch.randint(0, 256, (8, 64)), 8)
    for run in (packed_cpu.forward_integers, lambda *a: packed_linear(*a, None, None, None, 8, 8)):
        got = run(x, words, torch.ones(8, 1))
        assert sorted(set(torch.nonzero(got.isnan())[:, 0].tolist())) == [3, 7]
        assert torch.equal(got[:3], run(x[:3], words, torch.ones(8, 1)))


def test_threads_change_no_bit() -> None:
    x, codes, scale = torch.randn(70, 256), torch.randint(0, 16, (100, 256)), torch.rand(100, 2)
    threads, got = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got.append(packed_cpu.forward_integers(x, pack(codes, 4), scale, bits=4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


@pytest.mark.parametrize("target", ["cpu", "triton-interpret"])
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 2)])
def test_a_compiled_layer(bits: int, groups: int, target: str) -> None:
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(1)
    x, codes = torch.randn(5, 64, generator=g), torch.randint(0, 2**bits, (24, 64), generator=g)
    scale = torch.rand(24, groups, generator=g)
    words, bias = pack(codes, bits), torch.randn(24, generator=g)
    fast = tessel.compile(lambda x: packed_linear(x, words, scale, None, bias, None, bits, 8), target=target)
    want = by_whole_numbers(x, codes, scale, None, bits) + bias.double()
    torch.testing.assert_close(fast(x).double(), want, rtol=1e-5, atol=1e-4)
    (done,) = tessel.explain(fast).compilations
    if target == "cpu":
        (call,) = done.calls
        whole = packed_cpu.multiplies_int8(get_target("cpu").features)
        assert ("whole numbers" in call.reason) == whole
        assert whole or "this CPU has no product of 8-bit integers" in call.reason


def test_gradients_are_those_of_inputs_as_they_are() -> None:
    layer = nn.Sequential(nn.Linear(32, 7))
    small = tessel.quantize(layer, "w8a8")
    x = torch.randn(3, 32, requires_grad=True)
    small(x).sum().backward()
    torch.testing.assert_close(x.grad, small[0].weight.sum(0).expand(3, -1))


# What other CPUs are called with: flags, and the features that the header of products is made for.
OTHERS: dict[str, tuple[list[str], list[str]]] = {
    "avx2": (["-mno-avx512f", "-mno-avxvnni", "-mavx2", "-mfma"], ["avx2", "fma"]),
    "avx_vnni": (["-mno-avx512f", "-mavx2", "-mfma", "-mavxvnni"], ["avx2", "fma", "avx_vnni"]),
    "portable": (["-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma"], []),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_other_instructions(name: str, bits: int, tmp_path: Path) -> None:
    """The kernel for CPUs without AVX-512, run here; the same bits as this CPU's own."""
    if get_target("cpu").arch != "x86_64" or not {"avx2", "fma"} <= set(get_target("cpu").features):
        pytest.skip("not an x86-64 CPU with AVX2")
    if name == "avx_vnni" and "avx_vnni" not in get_target("cpu").features:
        pytest.skip("this CPU has no AVX-VNNI")
    flags, features = OTHERS[name]
    unit = packed_unit(f"int8_f32_{bits}")
    files = {"kernels.cpp": unit, **headers(unit, {"gemm.hpp": gemm_header(features)})}
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    command = [*find_compiler(cxx()).command, "-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-march=native", *flags]
    subprocess.run([*command, "kernels.cpp", "-o", "kernels.so"], cwd=tmp_path, check=True)
    fn: Any = ctypes.CDLL(str(tmp_path / "kernels.so"))[f"int8_f32_{bits}"]
    fn.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    g = torch.Generator().manual_seed(2)
    for m, n, k, groups in ((1, 40, 128, 1), (3, 40, 128, 4), (21, 50, 96, 1), (21, 50, 96, 2)):
        x, codes = inputs(m, k, torch.float32, g), torch.randint(0, 2**bits, (n, k), generator=g)
        words, scale, out = pack(codes, bits), torch.rand(n, groups, generator=g), torch.empty(m, n)
        places = (x.data_ptr(), words.data_ptr(), scale.data_ptr(), 0, 0, m, n, k, k // groups, out.data_ptr(), 0)
        assert fn(struct.pack("11q", *places), 1) == 0
        torch.testing.assert_close(out.double(), by_whole_numbers(x, codes, scale, None, bits), rtol=1e-5, atol=1e-4)
