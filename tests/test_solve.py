"""The solver: every kernel gets a tile that the machine allows, the fastest by a prediction that adds up."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from kernels import (
    INTERPRET,
    attention_kernel,
    check,
    fold_kernel,
    fused_kernel,
    gather_kernel,
    interpret,
    norm_kernel,
    poisoned,
    product_kernel,
    rand,
)
from offline_record import Recorded

import tessel
from tessel.codegen.triton import render
from tessel.config import Options, tile_entries
from tessel.errors import TesselError
from tessel.solve import Learned, Problem, problem_of, tile, tile_of
from tessel.solve.forced import TileRefused, forced_knobs, unused_entries
from tessel.solve.solver import Table
from tessel.targets import TARGETS, get_target
from tessel.tiles.header import load_header
from tessel.tiles.kernel import Kernel

GPUS = [t for t in TARGETS.values() if t.gpu_target is not None]
H100, A100 = get_target("h100"), get_target("a100")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def kernels() -> list[Kernel]:
    """A few of each family, half and full precision, odd sizes."""
    heads = [meta(1, 8, 300, 128), meta(1, 2, 300, 128), meta(1, 2, 300, 128)]
    narrow = [meta(1, 2, 50, 24, dtype=F32) for _ in range(3)]
    return [
        fused_kernel(meta(128, 512), meta(512), meta(512, 128).t()),
        gather_kernel(5, 7),
        fold_kernel("amax", meta(128, 500), BF16),
        fold_kernel("any", meta(128, 50000, dtype=torch.bool), torch.bool),
        fold_kernel("sum", meta(500, 128, dtype=F32).t(), F32),
        norm_kernel(meta(2048, 4096), meta(4096)),
        norm_kernel(meta(4, 40000, dtype=F32), meta(40000, dtype=F32)),
        product_kernel(meta(256, 512), meta(384, 512).t(), meta(384), relu=True),
        product_kernel(meta(8192, 8192), meta(8192, 8192)),
        product_kernel(meta(3, 100, 70, dtype=F32), meta(3, 70, 50, dtype=F32)),
        product_kernel(meta(64, 64, dtype=F64), meta(64, 64, dtype=F64)),
        product_kernel(meta(64, 64, dtype=torch.int64), meta(64, 64, dtype=torch.int64)),
        product_kernel(meta(1, 4096), meta(4096, 4096)),
        attention_kernel(*heads, causal=True),
        attention_kernel(*narrow, causal=True),
        attention_kernel(*(t.double() for t in narrow)),
    ]


def shown(kernel: Kernel) -> str:
    return f"{kernel.family} {kernel.params[0].type}"


# ---------------------------------------------------------------- every kernel, every GPU


@pytest.mark.parametrize("target", GPUS, ids=lambda t: t.name)
def test_every_kernel_gets_a_legal_tile(target: Any) -> None:
    for kernel in kernels():
        choice = tile(kernel, target)
        header = load_header(kernel.family)
        header.check_knobs(choice.knobs)
        assert choice.predicted.total > 0 and np.isfinite(choice.predicted.total), shown(kernel)
        assert choice.resources.shared_bytes <= target.limits.shared_bytes_per_block
        assert choice.resources.per_unit >= 1
        assert not choice.resources.spills, shown(kernel)
        assert choice.knobs["num_warps"] * target.limits.warp_size <= target.limits.threads_per_block
        assert choice.candidates(1)[0].knobs == choice.knobs
        assert tile(kernel, target).knobs == choice.knobs


def test_a_prediction_is_the_sum_of_its_parts() -> None:
    for target in GPUS:
        for kernel in kernels():
            for candidate in tile(kernel, target).candidates(40):
                t = candidate.time
                assert t.total == pytest.approx(sum(t.parts.values()), rel=1e-12)
                assert min(t.parts.values()) >= 0
                step = (t.matrix, t.l2, t.memory, t.shared, t.vector, t.serial, t.latency)
                assert getattr(t, t.bound) == max(step)
                waves = np.ceil(t.waves)
                assert t.work <= waves * t.steps * max(step) * (1 + 1e-9)  # the last wave may be shorter


def test_no_faster_than_the_machine() -> None:
    """No prediction beats the data sheet's matrix rate, or the time to move every byte once."""
    for target in GPUS:
        memory = target.level("memory").bandwidth_bytes_per_s
        for kernel in kernels():
            choice = tile(kernel, target)
            p = choice.problem
            floor = p.flops / max(target.flops.values()) if p.matrix else 0.0
            if p.total_bytes > target.level("l2").capacity_bytes:
                floor = max(floor, p.total_bytes / memory)
            assert choice.predicted.total >= floor, shown(kernel)


def test_a_plain_roofline_would_pick_otherwise() -> None:
    """The largest tile with two stages is the roofline's choice for a large square; latency and issue rule it out."""
    problem = Problem.product(8192, 8192, 8192)
    choice = tile_of(problem, H100)
    assert (choice.knobs["BK"], choice.knobs["num_stages"]) != (32, 2)
    roofline = tile_of(problem, H100, given={"BM": 128, "BN": 256, "BK": 32, "num_stages": 2, "num_warps": 8})
    assert roofline.predicted.total > 1.03 * choice.predicted.total
    peak = H100.flops["bf16"]
    assert 0.5 < problem.flops / choice.predicted.total / peak < 0.85  # 794 of 989 TFLOP/s is the library's


def test_what_is_known_of_products() -> None:
    few = tile_of(Problem.product(1, 4096, 4096), H100)
    assert few.knobs["BM"] == 16 and few.predicted.bound in ("memory", "latency", "l2")
    small, large = (tile_of(Problem.product(n, n, n), H100) for n in (256, 8192))
    assert small.knobs["BM"] * small.knobs["BN"] < large.knobs["BM"] * large.knobs["BN"]
    assert small.predicted.programs > 1 and large.knobs["GROUP"] > 1  # L2 is worth an order
    odd = tile_of(Problem.product(4096, 4096, 4095), H100)
    assert odd.predicted.total > 1.5 * tile_of(Problem.product(4096, 4096, 4096), H100).predicted.total
    twice = tile_of(Problem.product(8192, 8192, 8192), get_target("h200")).predicted.total
    assert twice <= large.predicted.total


def test_more_work_takes_longer() -> None:
    rng = random.Random(3)
    for _ in range(40):
        m, n, k = (2 ** rng.randrange(5, 13) for _ in range(3))
        one = tile_of(Problem.product(m, n, k), H100).predicted.total
        for more in ((4 * m, n, k), (m, 4 * n, k), (m, n, 4 * k)):
            assert tile_of(Problem.product(*more), H100).predicted.total >= 0.97 * one, (m, n, k, more)


def test_the_same_answer_in_another_process() -> None:
    code = (
        "import json; from tessel.solve import Problem, tile_of; from tessel.targets import get_target\n"
        "print(json.dumps([dict(tile_of(Problem.product(*s), get_target(t)).knobs) for t in ('h100', 'mi300x')"
        " for s in ((4096, 4096, 4096), (1, 4096, 4096), (333, 777, 999))]))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = [
        dict(tile_of(Problem.product(*s), get_target(t)).knobs)
        for t in ("h100", "mi300x")
        for s in ((4096, 4096, 4096), (1, 4096, 4096), (333, 777, 999))
    ]
    assert json.loads(there) == here


def test_sizes_known_at_run_time_take_hints() -> None:
    n = tessel.ir.types.symbol("s0")
    kernel = product_kernel(meta(64, 64), meta(64, 64))
    axes = tuple(dataclasses.replace(a, extent=n) if a.name == "m" else a for a in kernel.axes)
    open_ended = dataclasses.replace(kernel, axes=axes)
    assert problem_of(open_ended, H100).m == 2048 and problem_of(open_ended, H100).symbolic
    assert problem_of(open_ended, H100, {"s0": 7}).m == 7
    assert tile(open_ended, H100, hints={"s0": 7}).knobs["BM"] == 16


# ---------------------------------------------------------------- explanations


def test_the_page_on_a_kernel() -> None:
    choice = tile(product_kernel(meta(4096, 4096), meta(4096, 4096).t()), H100)
    text = choice.explain(3)
    for words in (
        "4096×4096×4096 bf16, on h100",
        "1. BM=",
        "3. BM=",
        "<- the most",
        "launch",
        "of the data sheet's",
        "ruled out by shared memory",
        "a block has at most 232,448",
        "ruled out by accumulators",
        "ruled out by registers",
        "offline compiles",
    ):
        assert words in text, f"{words}\n{text}"
    out = {r.constraint: r for r in choice.ruled_out()}
    assert out["accumulators"].words == (
        "16×512 with 1 warp needs 256 accumulators a thread; at most 255 registers exist"
    )
    assert all(r.tiles > 0 for r in out.values())
    assert choice.why in render(product_kernel(meta(4096, 4096), meta(4096, 4096).t()), H100).text


def test_every_tile_is_allowed_or_ruled_out() -> None:
    choice = tile(product_kernel(meta(512, 512), meta(512, 512)), A100)
    assert len(choice.candidates()) + sum(r.tiles for r in choice.ruled_out()) >= 20_160
    assert len({tuple(c.knobs.values()) for c in choice.candidates()}) == len(choice.candidates())


# ---------------------------------------------------------------- what is forced


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("256x256x64", "matmul_3_x", "accumulators: 256×256 with 8 warps needs 256 accumulators a thread; at most 255"),
        ("128x128x256 stages=4", "matmul_3_x", "shared memory: 128×128×256 with 4 stages and 1 warp needs 524,288"),
        ("matmul: BM=128 TMA=1", "matmul_3_x", "descriptors: neither operand can come by a descriptor"),
        ("100x128x64", "matmul_3_x", "BM=100 is none of the template's 16, 32, 64, 128, 256, 512"),
        ("matmul: 128x128", "matmul_3_x", "a matmul tile is BM x BN x BK, not 128x128"),
        ("matmul_3: BQ=4", "matmul_3_x", "the matmul template has no knob 'BQ'"),
    ],
)
def test_forced_tiles_that_cannot_be(text: str, name: str, words: str) -> None:
    kernel = dataclasses.replace(product_kernel(meta(500, 500), meta(500, 500)), name=name)
    with pytest.raises(TileRefused, match="matmul_3_x: ") as e:
        tile(kernel, H100, Options(tile=text))
    assert words in str(e.value), str(e.value)


def test_descriptors_that_the_device_does_not_have() -> None:
    kernel = product_kernel(meta(512, 512), meta(512, 512))
    assert tile(kernel, H100, given={"TMA": 1}).knobs["TMA"] == 1
    with pytest.raises(TesselError, match=r"a100 \(sm_80\) has no tensor descriptors"):
        tile(kernel, A100, given={"TMA": 1})
    with pytest.raises(TesselError, match="no knob 'BQ'"):
        tile(kernel, A100, given={"BQ": 1})
    with pytest.raises(TesselError, match="BM=48 is none of"):
        tile(kernel, A100, given={"BM": 48})
    with pytest.raises(TesselError, match="target cpu is no GPU"):
        tile(kernel, get_target("cpu"))


def test_forced_knobs_are_kept_and_the_rest_is_solved() -> None:
    kernel = product_kernel(meta(4096, 4096), meta(4096, 4096).t())
    free = tile(kernel, H100)
    forced = tile(kernel, H100, Options(tile="64x128x64 warps=4"))
    assert [forced.knobs[n] for n in ("BM", "BN", "BK", "num_warps")] == [64, 128, 64, 4]
    assert forced.predicted.total >= 0.97 * free.predicted.total and forced.why.startswith("given: BM, BN, BK")
    other = tile(kernel, H100, Options(tile="attention: 64x64; matmul_9: 16x16x16"))
    assert other.knobs == free.knobs
    assert tile(kernel, H100, Options(tile="64x64x64"), given={"BM": 128}).knobs["BM"] == 128


def test_a_forced_tile_may_be_unwise() -> None:
    """Judgements do not bind the user: a tile that would spill is made, and what speaks against it is said."""
    given = {"BM": 512, "BN": 64, "BK": 128, "num_warps": 8, "num_stages": 1, "TMA": 0}
    choice = tile_of(Problem.product(64, 64, 64), H100, given=given)
    assert {n: choice.knobs[n] for n in given} == given
    assert "overhang" in choice.why
    assert "overhang" in choice.explain()


@pytest.mark.parametrize(
    "text", ["", "64x64", "BM=64", "a b", "128x", "x:y:64", "matmul: -3", "matmul:", "64x64x64 BM", "64x64x64;"]
)
def test_entries_that_say_nothing(text: str) -> None:
    with pytest.raises(TesselError, match="options: tile: expected entries such as"):
        Options(tile=text)


def test_entries() -> None:
    assert tile_entries("attention: 128x64 warps=8;matmul_3:BM=16") == [
        ("attention", (128, 64), {"warps": 8}),
        ("matmul_3", (), {"BM": 16}),
    ]
    kernel = dataclasses.replace(product_kernel(meta(64, 64), meta(64, 64)), name="matmul_3_add")
    text = "matmul_3: BM=16; matmul: 64x64x32 group=4; matmul_33: BM=32; attention: 16x16"
    assert forced_knobs(text, kernel) == {"BM": 16, "BN": 64, "BK": 32, "GROUP": 4}  # a kernel's own has the last word
    assert unused_entries(text, [kernel]) == ["matmul_33"]
    assert forced_knobs(None, kernel) == {} and unused_entries(None, [kernel]) == []


def test_forced_tiles_reach_the_kernel() -> None:
    """Through the whole compiler, in the interpreter; a tile that cannot be is an error and no quiet fallback."""
    x, w = rand(40, 48), rand(56, 48)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w).relu()

    options = Options(tile="16x32x16; matmul_77: BM=16", matmul="template")
    compiled = tessel.compile(f, target="triton-interpret", options=options)
    torch.testing.assert_close(compiled(x), f(x))
    report = tessel.explain(compiled, x)
    (made,) = [k for c in report.compilations for k in c.kernels if k.family == "matmul"]
    assert "tile: BM=16, BN=32, BK=16," in made.source and "(given: BM, BN, BK" in made.source
    assert any("no kernel of this graph is called 'matmul_77'" in n for c in report.compilations for n in c.notes)
    on_cpu = tessel.compile(f, target="cpu", options=Options(tile="16x32x16"))
    notes = [n for c in tessel.explain(on_cpu, x).compilations for n in c.notes]
    assert any("options.tile is not used: tiles are for GPUs, this is cpu" in n for n in notes)
    with pytest.raises(TesselError, match="BM=48 is none of"):
        tessel.compile(f, target="triton-interpret", options=Options(tile="48x32x16", matmul="template"))(x)


# ---------------------------------------------------------------- what the compiler teaches


def test_a_refused_tile_is_not_picked_again() -> None:
    problem = Problem.product(4096, 4096, 4096)
    known: list[Learned] = []
    seen = set()
    for _ in range(4):
        choice = tile_of(problem, H100, learned=known)
        key = tuple(choice.knobs.items())
        assert key not in seen
        seen.add(key)
        known.append(Learned(dict(choice.knobs), "the compiler aborted (SIGABRT)"))
    assert any(r.constraint == "compiler" and "SIGABRT" in r.words for r in choice.ruled_out())
    with pytest.raises(TesselError, match="compiler: the compiler aborted"):
        tile_of(problem, H100, given=choice.knobs, learned=known)


def test_nothing_fits_is_said_with_numbers() -> None:
    """A device with next to no shared memory: an error with the constraint, not a tile."""
    assert H100.limits is not None
    tiny = dataclasses.replace(H100, name="tiny", limits=dataclasses.replace(H100.limits, shared_bytes_per_block=64))
    with pytest.raises(TesselError, match="no tile fits tiny: shared memory: .* a block has at most 64"):
        tile_of(Problem.product(512, 512, 512), tiny)


def test_tables_agree_with_one_tile_at_a_time() -> None:
    """All at once and alone a tile is predicted to take the same time and resources."""
    problem = Problem.product(1000, 3000, 2000)
    table = Table(problem, H100)
    rng = random.Random(1)
    for _ in range(20):
        one = table.candidate(rng.randrange(len(table.order)))
        alone = Table(problem, H100, one.knobs)
        assert len(alone) == 1 and alone.candidate(0) == one


# ---------------------------------------------------------------- the real compiler


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a100", "h100", "b200", "mi300x"])
def test_picks_compile_as_predicted(target: str, offline: Recorded) -> None:
    """The three best of some half-precision products: bytes within the bound, registers near, no spills."""
    record = get_target(target)
    products = [
        product_kernel(meta(4096, 4096), meta(4096, 4096).t(), meta(4096), relu=True),
        product_kernel(meta(256, 8192), meta(8192, 1024)),
        product_kernel(meta(16, 4096), meta(4096, 4096).t()),
        product_kernel(meta(1000, 1001), meta(1001, 1000)),
    ]
    offline.fitting([render(k, record, c.knobs) for k in products for c in tile(k, record).candidates(3)], record)


def test_the_interpreter_runs_a_solved_tile() -> None:
    """A tile solved for a GPU computes the same numbers, descriptors or not."""
    a, b = rand(70, 64, dtype=BF16), rand(48, 64, dtype=BF16).t()
    kernel = product_kernel(a, b)
    want = a.double() @ b.double()
    for given in ({}, {"TMA": 1}):
        out = poisoned(want.shape, BF16)
        interpret(kernel, [a, b, out], knobs=tile(kernel, H100, given=given).knobs)
        check(out, want, a.double().abs() @ b.double().abs(), 64)
    assert "large for the interpreter" in render(kernel, INTERPRET).text


# ---------------------------------------------------------------- parts of k


def test_k_is_cut_where_programs_are_few() -> None:
    deep = tile_of(Problem.product(256, 256, 65536), H100)
    assert deep.knobs["SPLIT"] > 1 and deep.predicted.combine > 0
    whole = tile_of(Problem.product(256, 256, 65536), H100, given={"SPLIT": 1})
    assert whole.predicted.total > 1.5 * deep.predicted.total
    assert tile_of(Problem.product(8192, 8192, 8192), H100).knobs["SPLIT"] == 1
    odd = tile_of(Problem.product(256, 256, 65544), H100)  # 16 × 4096.5
    assert odd.knobs["SPLIT"] == 1
    with pytest.raises(TesselError, match="split: k of 65544 cannot be cut into 4 parts, each a multiple of 16"):
        tile_of(Problem.product(256, 256, 65544), H100, given={"SPLIT": 4})


def test_a_shortlist_is_worth_measuring() -> None:
    for shape in ((4096, 4096, 4096), (256, 256, 65536), (1, 4096, 4096)):
        choice = tile_of(Problem.product(*shape), H100)
        few = choice.shortlist(6)
        assert len(few) == 6 and few[0].knobs == choice.knobs
        alike = {tuple(v for n, v in c.knobs.items() if n != "GROUP") for c in few}
        assert len(alike) == 6
        assert len({(c.knobs["BM"], c.knobs["BN"]) for c in few}) >= 3
