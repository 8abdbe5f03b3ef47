"""Recurrences as Triton kernels: every way of going through the steps against float64, and compiled for absent GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels import check, poisoned, run
from offline_record import Recorded
from test_scans import chain, selective, selective_ref, tree
from test_selective_scan import by_loop, by_scan, operands

import tessel
from tessel.codegen.selective import PARTS, selective_source
from tessel.codegen.triton import render
from tessel.config import Options
from tessel.errors import TesselError
from tessel.frontend.scan_op import linear_scan
from tessel.ir.node import Builder, make_input
from tessel.ir.types import Dim, TensorType, symbol
from tessel.ops import OPS
from tessel.ops.scan import FOLDS, linear_scan_ref, running_ref
from tessel.ops.selective import selective_scan_backward_ref
from tessel.passes import decompose, fuse
from tessel.runtime.scan_gpu import GpuSelective
from tessel.solve import tile
from tessel.targets import get_target
from tessel.tiles.kernel import Kernel
from tessel.tiles.lower import lower

INTERPRET = get_target("triton-interpret")
IN_ORDER = {"STEPS": 1, "SIDE": 1}
Tensor = torch.Tensor


def kernel_of(shape: Sequence[Dim], dim: int, reverse: bool = False, dtype: torch.dtype = torch.float32) -> Kernel:
    a, b = (make_input(n, TensorType(tuple(shape), dtype)) for n in "ab")
    builder = Builder((a, b))
    more = {"reverse": True} if reverse else {}
    h = builder.add(OPS["linear_scan"], a.out, b.out, dim=dim, **more)
    (node,) = fuse.run(builder.finish((h,)), Options()).nodes
    return lower(node)


def scanned(a: Tensor, b: Tensor, dim: int, reverse: bool = False, **knobs: int) -> Tensor:
    out = poisoned(a.shape, a.dtype)
    kernel = kernel_of(a.shape, dim, reverse, a.dtype)
    run(render(kernel, INTERPRET, {**IN_ORDER, **knobs}), [a, b, out])
    return out


def right(got: Tensor, a: Tensor, b: Tensor, dim: int, reverse: bool = False) -> None:
    """Within the bound: step t rounds t products and sums of terms that the recurrence of magnitudes adds up."""
    wide = [x.double() for x in (a, b)]
    size = linear_scan_ref(*(x.abs() for x in wide), dim, reverse)
    check(got, linear_scan_ref(*wide, dim, reverse), size, 2 * a.shape[dim])


@pytest.mark.parametrize("knobs", [{"STEPS": 4}, {"XB": 4, "STEPS": 8}, {"SIDE": 64, "XB": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan(reverse: bool, dtype: torch.dtype, knobs: dict[str, int]) -> None:
    torch.manual_seed(0)
    for shape, dim in (((3, 13, 5), 1), ((2, 70), 1), ((1, 3), 0), ((8, 2), 0)):
        a, b = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
        right(scanned(a, b, dim, reverse, **knobs), a, b, dim, reverse)


@settings(max_examples=8, deadline=None)
@example(5, 4, 3, 1, False, 4, False).via("three steps and a rest of one")
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
)
def test_any_shape(x: int, y: int, z: int, dim: int, reverse: bool, steps: int, aside: bool) -> None:
    torch.manual_seed(x + 10 * y + 100 * z)
    a, b = torch.randn(x, y, z), torch.randn(x, y, z)
    knobs = {"SIDE": 64, "XB": 32} if aside else {"STEPS": steps, "XB": 32}
    right(scanned(a, b, dim, reverse, **knobs), a, b, dim, reverse)


@pytest.mark.parametrize("knobs", [{"STEPS": 4}, {"SIDE": 64}], ids=str)
def test_infinities_and_nan_go_on_from_where_they_are(knobs: dict[str, int]) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(6, 77), torch.randn(6, 77)
    a[:, 0] = torch.nan  # the first factor has nothing to multiply
    b[1, 20], b[2, 20], a[3, 65], b[4, 64] = torch.nan, torch.inf, 0.0, -torch.inf
    a[4, 70] = 0.0  # -inf * 0
    got, want = scanned(a, b, 1, **knobs), linear_scan_ref(a, b, 1)
    for found, wanted in ((got.isnan(), want.isnan()), (got.isinf(), want.isinf())):
        assert torch.equal(found, wanted)


def test_steps_in_order_are_the_reference_to_the_bit() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(5, 50), torch.randn(5, 50)
    assert torch.equal(scanned(a, b, 1, STEPS=8), linear_scan_ref(a, b, 1))


def test_a_length_known_at_run_time() -> None:
    s = symbol("s0")
    for knobs in ({"STEPS": 4, "XB": 8}, {"SIDE": 64, "XB": 8}):
        source = render(kernel_of((3, s), 1), INTERPRET, {**IN_ORDER, **knobs})
        for n in (1, 4, 65):
            a, b, out = torch.rand(3, n), torch.randn(3, n), poisoned((3, n), torch.float32)
            run(source, [a, b, out], {"s0": n})
            right(out, a, b, 1)


def test_what_the_template_does_not_say() -> None:
    with pytest.raises(TesselError, match="STEPS=1"):
        render(kernel_of((4, 200), 1), get_target("h100"), {"SIDE": 64, "STEPS": 4, "XB": 1, "RB": 1, "num_warps": 1})


def by_triton(fn: Any, *args: Tensor, tile: str | None = None) -> tuple[Any, tessel.report.Report]:
    torch._dynamo.reset()
    made = tessel.compile(fn, target="triton-interpret", fullgraph=True, options={"tile": tile} if tile else None)
    return made(*args), tessel.explain(made)


@pytest.mark.parametrize("sizes", [(1, 13, 20, 16), (2, 6, 9, 5)], ids=str)
def test_a_selective_scan_is_one_kernel(sizes: tuple[int, ...]) -> None:
    b, t, d, n = sizes
    torch.manual_seed(0)
    shapes = [(b, t, d), (d, n), (b, t, n), (b, t, n), (b, t, d), (b, t, d)]
    dt, A, B, C, u, z = (torch.randn(s) for s in shapes)
    args = (dt, -A.abs(), B, C, u, z)
    got, report = by_triton(selective, *args, tile="scan: 8x16 STEPS=4" if n == 16 else None)
    want = selective_ref(*(x.double() for x in args))
    assert (got - want).abs().max() <= 3e-6 * want.abs().max()
    assert [k.family for k in report.kernels] == ["scan"]
    assert not [c for r in report.compilations for c in r.calls]


@pytest.mark.parametrize("write", [tree, chain])
def test_gradients_are_recurrences_too(write: Any) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 11, 5, requires_grad=True), torch.randn(2, 11, 5, requires_grad=True)
    got, _ = by_triton(write, a, b)
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    want = chain(*exact)
    grads = torch.autograd.grad(got.sin().sum(), (a, b))
    for x, y in zip(grads, torch.autograd.grad(want.sin().sum(), exact), strict=True):
        assert (x - y).abs().max() <= 2e-6 * y.abs().max()


def test_no_steps() -> None:
    got, _ = by_triton(lambda a, b: linear_scan(a, b, 1, False), torch.rand(3, 0, 2), torch.rand(3, 0, 2))
    assert got.shape == (3, 0, 2)


def large() -> dict[str, Kernel]:
    """Kernels of real sizes, by what they are."""

    def selective_of(b: int, t: int, d: int, n: int, dtype: torch.dtype) -> Kernel:
        shapes = [(b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n)]
        inputs = [make_input(name, TensorType(s, dtype)) for name, s in zip(("w", "dt", "A", "B", "C"), shapes)]
        builder = Builder(inputs)
        y = builder.add(OPS["selective_scan"], *(i.out for i in inputs))
        (node,) = fuse.run(decompose.run(builder.finish((y,))), Options()).nodes
        return lower(node)

    return {
        "Mamba bf16": selective_of(8, 2048, 1536, 16, torch.bfloat16),
        "odd": selective_of(2, 33, 47, 5, torch.float32),
        "channels": kernel_of((4, 2048, 1024), 1),
        "few": kernel_of((3, 100003), 1, reverse=True),
        "running sums": running_kernel((4096, 4096), 1, "sum"),
        "running log-sums": running_kernel((3, 100003), 1, "logsumexp"),
        "running extremes": running_kernel((4, 2048, 1024), 1, "amax", torch.bfloat16),
    }


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    return large()


@pytest.mark.slow
@pytest.mark.parametrize("target", ("a100", "h100", "b200", "mi300x"))
def test_compile_offline(target: str, kernels: dict[str, Kernel], offline: Recorded) -> None:
    record = get_target(target)
    sources = [render(k, record) for k in kernels.values()]
    for (what, kernel), got in zip(kernels.items(), offline.fitting(sources, record)):
        assert (got.registers or 0) <= tile(kernel, record).resources.registers * 1.15 + 8, f"{what} on {record.arch}"


def test_few_long_recurrences_go_side_by_side_and_many_in_order() -> None:
    record = get_target("h100")
    assert tile(kernel_of((3, 100003), 1), record).knobs["SIDE"] > 1
    assert tile(kernel_of((64, 512, 4096), 1), record).knobs["SIDE"] == 1


# ---------------------------------------------------------------- gradients of a selective scan


def near(got: Sequence[Tensor], want: Sequence[Tensor], far: float = 3e-6) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        if w.numel():
            assert (g.double() - w).abs().max() <= far * w.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize(
    "sizes", [(2, 37, 33, 5), (1, 16, 16, 16), (3, 1, 7, 3), (1, 50, 20, 4), (2, 0, 3, 4), (1, 17, 5, 1)], ids=str
)
def test_gradients_of_a_selective_scan(sizes: tuple[int, int, int, int], tmp_path: Path) -> None:
    given = operands(*sizes)
    want = selective_scan_backward_ref(*(x.double() for x in given))
    kernels = GpuSelective(INTERPRET, tmp_path)
    near(kernels.backward(*given), want)
    halves = [x.bfloat16() for x in given]
    rounded = selective_scan_backward_ref(*(x.double() for x in halves))
    near(kernels.backward(*halves), rounded, 2**-7)  # the interpreter truncates to bf16


def test_what_is_not_finite_spreads_as_it_should(tmp_path: Path) -> None:
    grad, w, dt, A, B, C = operands(1, 40, 18, 4)
    w[0, 20, 3], B[0, 30, 1] = torch.nan, torch.inf
    got = GpuSelective(INTERPRET, tmp_path).backward(grad, w, dt, A, B, C)
    for x, y in zip(got, selective_scan_backward_ref(grad, w, dt, A, B, C), strict=True):
        assert torch.equal(x.isnan(), y.isnan())


def test_training_runs_by_these_kernels() -> None:
    torch.manual_seed(0)
    b, d, n, t = 2, 10, 3, 19
    shapes = [(b, d, t), (d, n), (b, t, n), (b, t, n), (b, d, t)]
    dt, A, B, C, u = (torch.randn(s) for s in shapes)
    args = [x.requires_grad_() for x in (dt.abs(), -A.abs(), B, C, u)]
    torch._dynamo.reset()
    made = tessel.compile(by_scan, target="triton-interpret", fullgraph=True)
    got, exact = made(*args), [x.detach().double().requires_grad_() for x in args]
    want = by_loop(*exact)
    near(torch.autograd.grad(got.sin().sum(), args), torch.autograd.grad(want.sin().sum(), exact), 1e-5)
    forward, backward = tessel.explain(made).compilations
    assert [k.family for k in forward.kernels] == ["scan"]
    assert ["states are made again" in c.reason for c in backward.calls if "selective" in c.operator] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("target", ("a100", "h100", "b200", "mi300x"))
def test_gradients_compile_offline(target: str, offline: Recorded) -> None:
    record = get_target(target)
    sources = [selective_source(part, torch.bfloat16, record) for part in PARTS]
    offline.fitting(sources, record)


# ---------------------------------------------------------------- running folds


def running_kernel(shape: Sequence[Dim], dim: int, fold: str, dtype: torch.dtype = torch.float32) -> Kernel:
    x = make_input("x", TensorType(tuple(shape), dtype))
    builder = Builder((x,))
    h = builder.add(OPS["running"], x.out, dim=dim, fold=fold)
    (node,) = fuse.run(builder.finish((h,)), Options()).nodes
    return lower(node)


@pytest.mark.parametrize("knobs", [{"STEPS": 4}, {"SIDE": 64, "XB": 2}], ids=str)
@pytest.mark.parametrize("fold", FOLDS)
def test_running_folds(fold: str, knobs: dict[str, int]) -> None:
    """Odd lengths, halves, whole numbers, and what is not finite, against float64."""
    torch.manual_seed(0)
    for shape, dim, dtype in (((3, 13, 5), 1, torch.float32), ((2, 70), 1, torch.bfloat16), ((70, 3), 0, torch.int32)):
        if fold == "logsumexp" and not dtype.is_floating_point:
            continue
        x = (torch.randn(shape) * 2).to(dtype)
        if dtype == torch.float32:
            x[0, 4, 0], x[1, 2, 1], x[2, :3, 2], x[2, 5, 3] = torch.nan, torch.inf, -torch.inf, -torch.inf
        out = poisoned(shape, dtype)
        run(render(running_kernel(shape, dim, fold, dtype), INTERPRET, {**IN_ORDER, **knobs}), [x, out])
        want = running_ref(x.double() if dtype.is_floating_point else x, dim, fold)
        size = running_ref(x.double().abs().nan_to_num(0, 0, 0) + 1, dim, "prod" if fold == "prod" else "sum")
        if dtype == torch.bfloat16:  # the interpreter truncates
            assert ((out.double() - want).abs() <= 2**-7 * size).all()
        else:
            check(out, want, size, 4 * shape[dim])


def test_running_folds_are_kernels() -> None:
    """Fused with what is around them; an extreme whose places are read is left to torch."""
    torch.manual_seed(0)
    x = torch.randn(3, 41)
    mask = torch.rand(3, 41) > 0.5

    def fn(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        at = torch.cumsum(mask, -1) - 1
        return at, x.cumprod(0), (x * 2).logcumsumexp(1), torch.cummax(x, 1).values, torch.cummin(x, 0)[0], x.cumsum(1)

    got, report = by_triton(fn, x, mask)
    for g, w in zip(got, fn(x.double(), mask), strict=True):
        assert g.dtype in (torch.int64, torch.float32)
        torch.testing.assert_close(g, w.to(g.dtype), rtol=1e-5, atol=1e-5)
    assert {k.family for k in report.kernels} == {"scan"} and not [c for r in report.compilations for c in r.calls]
    both, report = by_triton(lambda x: torch.cummax(x, 1), x)
    assert torch.equal(both[1], torch.cummax(x, 1).indices)
    assert "aten.cummax.default" in [c.operator for r in report.compilations for c in r.fallbacks]


def test_running_folds_of_many_rows_go_side_by_side_too() -> None:
    """The order of their sums is free: what lies side by side in memory is read side by side."""
    assert tile(running_kernel((8192, 4096), 1, "sum"), get_target("h100")).knobs["SIDE"] > 1
    assert tile(running_kernel((4096, 65536), 0, "sum"), get_target("h100")).knobs["SIDE"] == 1
