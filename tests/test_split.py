"""Split-K: two tile programs for one product, with its numbers; and through the whole compiler."""

from __future__ import annotations

import pytest
import torch
from kernels import check, interpret, poisoned, product_kernel, rand

import tessel
from tessel.errors import TesselError
from tessel.tiles.kernel import Kernel
from tessel.tiles.split import can_split, split_k

BF16 = torch.bfloat16
TILE = {"BM": 32, "BN": 32, "BK": 32}


def run(kernel: Kernel, parts: int, inputs: list[torch.Tensor], out: torch.Tensor) -> None:
    """Both kernels, in order, through the interpreter."""
    partial, combine, buffer = split_k(kernel, parts)
    between = poisoned(buffer.shape, buffer.dtype)
    for step, tile in ((partial, TILE), (combine, None)):
        tensors = [between if p.slot < 0 else out if p.out else inputs[p.slot] for p in step.params]
        interpret(step, tensors, knobs=tile)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    ("a", "b", "bias"),
    [
        (rand(3, 128), rand(128, 70), rand(70)),
        (rand(33, 192, dtype=BF16), rand(50, 192, dtype=BF16).t(), rand(50, dtype=BF16)),
        (rand(3, 17, 64, dtype=BF16), rand(3, 64, 20, dtype=BF16), None),
        (rand(1, 64, dtype=torch.float64), rand(64, 5, dtype=torch.float64), rand(5, dtype=torch.float64)),
    ],
)
def test_the_sum_of_the_parts_is_the_product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, parts: int
) -> None:
    want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    kernel = product_kernel(a, b) if bias is None else product_kernel(a, b, bias, relu=True)
    if bias is not None:
        want, size = (want + bias.double()).relu(), size + bias.double().abs()
    out = poisoned(want.shape, a.dtype)
    run(kernel, parts, [a, b] + ([] if bias is None else [bias]), out)
    check(out, want, size, a.shape[-1] + parts + 3)


def test_each_kernel_takes_only_what_it_reads() -> None:
    partial, combine, buffer = split_k(product_kernel(rand(3, 64), rand(64, 5), rand(5), relu=True), 4)
    assert [p.slot for p in partial.params] == [0, 1, -1] and [p.slot for p in combine.params] == [-1, 2, 0]
    assert buffer.shape == (4, 3, 5) and buffer.dtype == torch.float32
    assert partial.axis("k").extent == 16 and not can_split(partial, 2)


def test_what_cannot_be_split() -> None:
    assert not can_split(product_kernel(rand(3, 60), rand(60, 5)), 2)  # parts of 30
    assert not can_split(product_kernel(rand(3, 64), rand(64, 5)), 3)
    assert not can_split(product_kernel(rand(3, 64, dtype=torch.int32), rand(64, 5, dtype=torch.int32)), 2)
    with pytest.raises(TesselError, match="cannot be cut into 3 equal parts"):
        split_k(product_kernel(rand(3, 64), rand(64, 5)), 3)


def test_through_the_compiler() -> None:
    linear = torch.nn.Linear(256, 24)
    x, y = torch.randn(5, 256), torch.randn(5, 24)

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(linear(x)) + y

    fast = tessel.compile(fn, target="triton-interpret", options={"tile": "matmul: SPLIT=4"})
    with torch.no_grad():
        torch.testing.assert_close(fast(x, y), fn(x, y))
        assert torch.equal(fast(x, y), fast(x, y))
    (done,) = tessel.explain(fast).compilations
    assert done.launches == 2 and len(done.kernels) == 2 and list(done.splits.values()) == [4]
    assert {k.family for k in done.kernels} == {"matmul", "reduction"}
    with pytest.raises(TesselError, match="SPLIT=16: k is 40"):
        tessel.compile(torch.nn.Linear(40, 8), target="triton-interpret", options={"tile": "matmul: SPLIT=16"})(
            torch.randn(3, 40)
        )
