"""Variants of the matmul template: descriptors, a persistent grid, the epilogue in pieces. The same numbers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from kernels import check, interpret, poisoned, product_kernel, rand
from offline_record import Recorded

from tessel.codegen.offline import offline_compile
from tessel.codegen.triton import render
from tessel.errors import TesselError
from tessel.runtime.launch import Launcher, load
from tessel.solve import tile as tile_of_kernel
from tessel.targets import get_target
from tessel.tiles.descriptors import descriptors
from tessel.tiles.kernel import Kernel

BF16, F32 = torch.bfloat16, torch.float32
SMALL = {"BM": 32, "BN": 32, "BK": 32, "GROUP": 4}
VARIANTS = list(itertools.product((0, 1), (0, 2), (1, 2, 4)))


def operands(*names: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Odd sizes, every layout, batches."""
    all_of = {
        "row, row": (rand(100, 72, dtype=BF16), rand(72, 56, dtype=BF16)),
        "row, column": (rand(33, 72, dtype=BF16), rand(40, 72, dtype=BF16).t()),
        "column, row": (rand(104, 72, dtype=BF16).t(), rand(104, 56, dtype=BF16)),
        "batch": (rand(3, 33, 40, dtype=BF16), rand(3, 24, 40, dtype=BF16).transpose(1, 2)),
        "unaligned": (rand(17, 33, dtype=BF16), rand(33, 7, dtype=BF16)),
        "wide": (rand(20, 32), rand(32, 40)),
    }
    return [all_of[n] for n in names or all_of]


@pytest.mark.parametrize(("a", "b"), operands())
def test_every_variant_multiplies(a: torch.Tensor, b: torch.Tensor) -> None:
    want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bias = rand(b.shape[-1], dtype=a.dtype) if a.dim() == 2 else None
    kernel = product_kernel(a, b, bias, relu=True) if bias is not None else product_kernel(a, b)
    if bias is not None:
        want, size = (want + bias.double()).relu(), size + bias.double().abs()
    for tma, persist, pieces in VARIANTS:
        out = poisoned(want.shape, a.dtype)
        tensors = [a, b, *([bias] if bias is not None else []), out]
        interpret(kernel, tensors, knobs=SMALL | {"TMA": tma, "PERSIST": persist, "PIECES": pieces})
        check(out, want, size, a.shape[-1] + 3)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("row, row", "ab"),
        ("row, column", "ab"),
        ("column, row", "ab"),
        ("batch", "ab"),
        ("unaligned", ""),
        ("wide", ""),
    ],
)
def test_which_operands_descriptors_load(case: str, parts: str) -> None:
    ((a, b),) = operands(case)
    found = descriptors(product_kernel(a, b))
    assert "".join(found) == parts
    for part, x in zip("ab", (a, b)):
        if part in found:
            assert found[part].stride == max(x.stride()[-2:]) and found[part].param == "ab".index(part)
    one = descriptors(product_kernel(rand(16, 16, dtype=BF16), rand(16, 17, dtype=BF16)))
    assert list(one) == ["a"]  # 34 bytes a row are no multiple of 16


def product(m: int, n: int, k: int) -> Kernel:
    return product_kernel(rand(m, k, dtype=BF16), rand(n, k, dtype=BF16).t(), rand(n, dtype=BF16), relu=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "b200"])
def test_variants_compile_within_what_the_header_says(target: str, offline: Recorded) -> None:
    record = get_target(target)
    tile = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    sources = [
        render(product(520, 264, 1032), record, tile | {"TMA": t, "PERSIST": p, "PIECES": q})
        for t, p, q in itertools.product((0, 1), (0, 1), (1, 2))
    ]
    for source, got in zip(sources, offline(sources, record.arch)):
        assert got.ok, got.error
        assert got.shared_bytes is not None and got.shared_bytes <= source.smem_bytes, dict(source.knobs)
        # Registers move between Triton's releases: tiles are fitted with 3.7, and 3.6 spills four bytes on b200.
        assert (got.spills or 0) <= (0 if triton.__version__.startswith("3.7.") else 16)
    assert sources[-1].grid_for({}) == (min(5 * 3, record.units),)


@pytest.mark.slow
def test_warps_of_their_own_for_loads_and_when_they_are_silently_left_out() -> None:
    record = get_target("h100")
    tile = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_stages": 3, "PERSIST": 0, "PIECES": 1, "SPLIT": 1}
    sources = [
        render(product(512, 512, 512), record, tile | {"TMA": t, "num_warps": w, "SPECIALIZE": 1})
        for t, w in ((1, 4), (1, 8), (0, 4))
    ]
    kept, ignored, without = offline_compile(sources, record.arch)
    assert kept.ok and kept.shared_bytes is not None and kept.shared_bytes <= sources[0].smem_bytes
    assert not ignored.ok and "no ttg.warp_specialize in its TTGIR" in ignored.error
    assert not without.ok
    with pytest.raises(TesselError, match="need descriptors and 4 warps, not TMA=1 and 8"):
        tile_of_kernel(product(512, 512, 512), record, given={"SPECIALIZE": 1, "num_warps": 8, "TMA": 1})
    assert tile_of_kernel(product(512, 512, 512), record, given={"SPECIALIZE": 1}).knobs["num_warps"] == 4


def test_unaligned_tensors_go_to_the_twin_without_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = render(product(64, 64, 64), get_target("h100"), {"TMA": 1})
    assert source.described == (0, 1) and source.twin is not None and "make_tensor_descriptor" in source.text
    assert "make_tensor_descriptor" not in source.twin.text and not source.twin.described
    launcher = load(source, tmp_path)
    assert isinstance(launcher, Launcher) and isinstance(launcher.twin, Launcher)
    ran: list[str] = []

    class Fn:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: ran.append(self.name)

    launcher.fn, launcher.twin.fn = Fn("descriptors"), Fn("pointers")
    whole, shifted = torch.zeros(64, 64, dtype=BF16), torch.zeros(64 * 64 + 1, dtype=BF16)[1:].view(64, 64)
    bias = torch.zeros(65, dtype=BF16)[1:]  # no descriptor loads it
    launcher((1,), whole, whole, bias, whole)
    launcher((1,), whole, shifted, bias, whole)
    launcher((1,), shifted, whole, bias, whole)
    assert ran == ["descriptors", "pointers", "pointers"]


def test_an_interpreter_that_its_numpy_breaks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter takes a number out of an array of one, which numpy 2.4 refuses."""
    run = load(render(product_kernel(*operands("wide")[0]), get_target("triton-interpret"), SMALL), tmp_path)

    def fails(*args: Any, **options: Any) -> None:
        try:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        except TypeError as e:
            raise triton.runtime.errors.InterpreterError(repr(e)) from e

    monkeypatch.setattr(run, "fn", {(1,): fails})
    with pytest.raises(TesselError, match=r"does not work with numpy .*: install Triton 3\.7 or numpy 2\.3"):
        run((1,))
