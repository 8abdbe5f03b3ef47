"""Tiles that the compiler refuses are replaced; the real compiler has the last word."""

from __future__ import annotations

import pytest
import torch
from kernels import fold_kernel, product_kernel, rand

from tessel.autotune import settle as module
from tessel.autotune.settle import compile_all, settle
from tessel.codegen.offline import Compiled
from tessel.codegen.source import Source
from tessel.codegen.triton import render
from tessel.config import Options
from tessel.solve import tile
from tessel.targets import Target, get_target

BF16 = torch.bfloat16
H100 = get_target("h100")


def product() -> Source:
    kernel = product_kernel(rand(1024, 512, dtype=BF16), rand(512, 1024, dtype=BF16))
    return render(kernel, H100, tile(kernel, H100))


def test_what_compiles_is_kept_and_its_binary_too() -> None:
    sources = [render(fold_kernel("sum", rand(64, 300), torch.float32), H100), product()]
    seen: list[tuple[int, int]] = []
    got = settle(sources, H100, progress=lambda done, total: seen.append((done, total)))
    assert [s.source for s in got] == sources and not any(s.fault or s.refused for s in got)
    assert all(s.compiled.binary[:4] == b"\x7fELF" for s in got)
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Compiled(False, error="the compiler aborted (SIGABRT): LLVM ERROR"), "aborted"),
        (Compiled(True, shared_bytes=300_000), "300,000 bytes of shared memory; a block has at most 232,448"),
        (Compiled(True, shared_bytes=1, registers=255, spills=128), "spills 128 bytes"),
    ],
)
def test_the_next_tile_is_tried(said: Compiled, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = product()
    tried: list[dict[str, int]] = []

    def compiler(sources: list[Source], target: Target, jobs: int, done: object) -> list[Compiled]:
        tried.extend(dict(s.knobs) for s in sources)
        return [said if dict(s.knobs) == dict(first.knobs) else Compiled(True, 1000, 100, 0) for s in sources]

    monkeypatch.setattr(module, "compile_all", compiler)
    (got,) = settle([first], H100)
    assert tried[0] == dict(first.knobs) != tried[1] == dict(got.source.knobs) and len(tried) == 2
    assert words in got.refused[0].why and got.refused[0].hard == (said.spills is None) and not got.fault
    second = tile(first.kernel, H100).candidates(2)[1]
    assert dict(got.source.knobs) == dict(second.knobs)


def test_when_everything_is_refused_the_fault_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compile_all", lambda sources, *rest: [Compiled(False, error="no") for _ in sources])
    (got,) = settle([product()], H100)
    assert got.fault == "no" and len(got.refused) <= module.ROUNDS


def test_a_forced_tile_stays_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(tile="matmul: 64x64x32 stages=2")
    kernel = product().kernel
    first = render(kernel, H100, tile(kernel, H100, options))
    spilled = Compiled(True, 1000, 255, 64)
    tried: list[Source] = []

    def compiler(sources: list[Source], *rest: object) -> list[Compiled]:
        tried.extend(sources)
        return [spilled for _ in sources]

    monkeypatch.setattr(module, "compile_all", compiler)
    settle([first], H100, options)
    sides = {tuple(s.knobs[n] for n in ("BM", "BN", "BK", "num_stages")) for s in tried}
    assert sides == {(64, 64, 32, 2)} and len(tried) > 1


def test_nothing_to_compile() -> None:
    assert compile_all([], H100) == [] and settle([], H100) == []
