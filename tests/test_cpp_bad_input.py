"""The CPU target with what it should not be given: correct all the same, or refused in words.

No compiler, a failing one, caches that are full or read-only, odd numbers of threads, tensors of more than 2**31
elements, storage that is not aligned or overlaps.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tessel
from tessel.codegen.cpp.includes import headers
from tessel.config import child_environment
from tessel.runtime import modules, native

pytestmark = pytest.mark.usefixtures("own_cache", "same_start")

N = 2**31 + 64 * 1000 + 7


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled to C++; all of it must be."""
    fast = tessel.compile(fn, target="cpu", fullgraph=True)

    def call(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            got = fast(*args)
        assert tessel.explain(fast).kernels
        return got

    return call


def same(got: torch.Tensor, want: torch.Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x * 2, -1) + 1


# ---------------------------------------------------------------- the compiler and the cache


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and nothing loaded or said before."""
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_private", [])
    for module in (native, modules, sys.modules["tessel.runtime.native_kernels"]):
        monkeypatch.setattr(module, "_warned", set())
    return tmp_path / "cache"


def run_and_hear(x: torch.Tensor) -> tuple[bool, str]:
    """Whether there were kernels, and what was said; the result is right."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        fast = tessel.compile(softmax, target="cpu")
        same(fast(x), softmax(x))
    return bool(tessel.explain(fast).kernels), "\n".join(str(w.message) for w in said if "tessel" in str(w.message))


def test_what_a_failing_compiler_says_is_shown(
    nothing_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "broken 1.0" && exit\necho "wrong moon phase" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    kernels, said = run_and_hear(torch.randn(4, 8))
    assert not kernels and "wrong moon phase" in said and "torch runs each operator" in said
    assert said.count("wrong moon phase") == 1


def test_no_compiler_is_said(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    kernels, said = run_and_hear(torch.randn(4, 8))
    assert not kernels and "no-such-compiler --fast: not found" in said and "$CXX" in said


def test_who_builds_the_same_waits_for_the_first(
    nothing_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of one program start together: one compiles, the others load what it made."""
    slow = tmp_path / "slow"
    log, real = tmp_path / "log", native.find_compiler(None).command[0]
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {{ echo "$$" >> {log}; sleep 0.5; }}\nexec {real} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    text = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'
    command = f"from tessel.runtime.native import build; print(build({text!r}, {{}})[0].answer())"
    started = [subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) for _ in range(3)]
    assert [p.communicate()[0].strip() for p in started] == [b"42"] * 3
    assert len(log.read_text().split()) == 1


@pytest.fixture
def disk(nothing_built: Path) -> Iterator[Callable[[str], Path]]:
    """Puts a file system of its own, with the given mount options, under the cache directory."""
    mounted = []

    def mount(options: str) -> Path:
        nothing_built.mkdir(mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(nothing_built)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may not mount")
        mounted.append(nothing_built)
        return nothing_built

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


PAGES = sum(len(text) // 4096 + 1 for text in headers('#include "tessel.hpp"').values())
SOURCES = f"size={4 * PAGES + 12}k"


@pytest.mark.parametrize("full", ["size=16k", SOURCES, "size=1m,nr_inodes=1"], ids=["at once", "later", "no files"])
def test_a_full_disk_under_the_cache(disk: Callable[[str], Path], full: str) -> None:
    """The sources do not fit; they fit, but not the shared object; not even a folder fits."""
    folder = disk(full)
    kernels, said = run_and_hear(torch.randn(4, 8))
    assert kernels and "compiled kernels are not kept" in said, said
    left = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".so", ".tmp")]
    assert not left, "half a file in the cache"


def test_a_read_only_disk_under_the_cache(disk: Callable[[str], Path]) -> None:
    folder = disk("ro")
    kernels, said = run_and_hear(torch.randn(4, 8))
    assert kernels and "compiled kernels are not kept" in said and str(folder) in said
    (private,) = native._private
    assert stat.S_IMODE(os.stat(private.name).st_mode) == 0o700


def test_no_room_anywhere(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    for name in ("TemporaryDirectory", "TemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, full)
    kernels, said = run_and_hear(torch.randn(4, 8))
    assert not kernels and "No space left on device" in said and "torch runs each operator" in said


def test_a_build_for_another_cpu_is_not_loaded(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source and compiler, but a CPU of other features: another file, whatever lies in the cache."""
    run_and_hear(torch.randn(4, 8))
    (here,) = (p.name for p in (nothing_built / "native").glob("*.so"))
    cpu = native.get_target("cpu")
    kept = [cpu.features[:-1], (*cpu.features, "avx99")]
    for features in kept:
        other = type(cpu)(**{**{f: getattr(cpu, f) for f in cpu.__dataclass_fields__}, "features": tuple(features)})
        monkeypatch.setattr(native, "_loaded", {})
        monkeypatch.setattr(native, "get_target", lambda name, other=other: other)
        torch._dynamo.reset()
        run_and_hear(torch.randn(4, 8))
    found = {p.name for p in (nothing_built / "native").glob("*.so")}
    assert len(found) == 3 and len({n.split("-")[0] for n in found}) == 3 and here in found


# ---------------------------------------------------------------- threads

SCRIPT = """
import torch, tessel
torch.manual_seed(0)
x = torch.randn(300, 1000)
f = lambda x: torch.softmax(x * 2, -1).sum(0)
got = tessel.compile(f, target="cpu")(x)
assert torch.allclose(got, f(x), atol=1e-5), (got - f(x)).abs().max()
print("threads", torch.get_num_threads())
"""


@pytest.mark.parametrize("value", ["0", "-3", "many", "64", "2,3"])
def test_odd_values_of_omp_num_threads(value: str) -> None:
    env = child_environment({"OMP_NUM_THREADS": value, "MKL_NUM_THREADS": None})
    got = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert got.returncode == 0 and int(got.stdout.split()[-1]) >= 1, got.stderr[-2000:]


def test_no_threads_are_refused_by_torch() -> None:
    f = compiled(softmax)
    x = torch.randn(64, 2000)
    want = f(x)
    for n in (0, -1):
        with pytest.raises(RuntimeError, match="positive"):
            torch.set_num_threads(n)
    assert torch.equal(f(x), want)


def mixed(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every family of kernels: product, attention, norm, sums over rows, columns and everything."""
    h = F.layer_norm(F.gelu(x @ w), (64,))
    q = h.view(1, 4, 256, 64)
    a = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return h, a, x.sum(0), x.sum(1), (x * x).mean(), torch.softmax(x, 0)


def test_threads_change_no_bit_twice_and_little_once() -> None:
    """The same number of threads gives the same bits. Another number may split a sum over threads elsewhere: the
    tolerance for that is 32 units of float32 for the norm-wise error of each result."""
    x, w = torch.randn(1024, 96), torch.randn(96, 64)
    f = compiled(mixed)
    by_threads = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        first = f(x, w)
        for _ in range(3):
            assert all(map(torch.equal, f(x, w), first)), n
        by_threads.append(first)
    for other in by_threads[1:]:
        for a, b in zip(by_threads[0], other, strict=True):
            assert (a - b).abs().max() <= 32 * torch.finfo(torch.float32).eps * a.abs().max()


# ---------------------------------------------------------------- storage


def unaligned(x: torch.Tensor, by: int) -> torch.Tensor:
    """The same numbers, ``by`` bytes after an aligned address."""
    raw = bytearray(x.numel() * x.element_size() + 128)
    start = -torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % 64 + by
    y = torch.frombuffer(raw, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    y.copy_(x)
    assert y.data_ptr() % 64 == by
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_storage_that_is_not_aligned(dtype: torch.dtype) -> None:
    x, w = torch.randn(1024, 96, dtype=dtype), torch.randn(96, 64, dtype=dtype)
    f = compiled(mixed)
    want = f(x, w)
    for by in (1, 2, 4, 7, 20):
        for a, b in zip(f(unaligned(x, by), unaligned(w, by)), want, strict=True):
            assert torch.equal(a, b), by


def test_whole_numbers_and_bools_that_are_not_aligned() -> None:
    x = torch.randint(0, 50, (333,))
    table = torch.randn(50, 17)
    f = compiled(lambda i, t, m: torch.where(m, t[i].sum(1), 0.0) + i)
    want = f(x, table, x > 9)
    assert torch.equal(f(unaligned(x, 3), unaligned(table, 5), unaligned(x > 9, 1)), want)


def test_storage_that_overlaps_is_read_as_it_is() -> None:
    base = torch.randn(4000)
    rows = base.as_strided((300, 40), (7, 1))  # every row begins inside the one before
    wide = torch.randn(1, 40).expand(300, 40)
    back = base[:300, None].expand(300, 40)
    f = compiled(lambda a, b, c: (torch.softmax(a, -1) + b * c, (a * c).sum(0), a.t() @ b))
    for got, want in zip(f(rows, wide, back), (softmax(rows) * 0, 0, 0), strict=True):
        del want
        assert got.isfinite().all()
    for got, want in zip(f(rows, wide, back), f(rows.contiguous(), wide.contiguous(), back.contiguous()), strict=True):
        same(got, want)


def test_overlapping_storage_is_not_written_in_place() -> None:
    """Eager refuses to write where several elements share memory, and so does the compiled function."""

    def step(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2

    base = torch.arange(5.0)
    for fn in (step, tessel.compile(step, target="cpu")):
        with pytest.raises(RuntimeError, match="single memory location"):
            fn(base.expand(4, 5))
        assert torch.equal(base, torch.arange(5.0))


def test_inputs_that_share_memory() -> None:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x[1:] + y

    results = []
    for fn in (step, tessel.compile(step, target="cpu")):
        base = torch.arange(12.0)
        results.append((fn(base[:8], base[1:8]), base))
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got, want)


def test_no_elements_and_one() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.softmax(x, -1) * 2, x.sum(), x.sum(0) + 1, x.t() * 3

    for shape in ((0, 5), (3, 0), (1, 1), (1, 0)):
        torch._dynamo.reset()
        x = torch.randn(shape)
        for got, want in zip(tessel.compile(f, target="cpu")(x), f(x), strict=True):
            same(got, want)


# ---------------------------------------------------------------- more than 2**31 elements


@pytest.mark.slow
def test_more_than_two_billion_elements() -> None:
    """int8, 2 GiB in and 2 GiB out: offsets need 64 bits."""
    if _free_memory() < 7 * 2**30:
        pytest.skip("needs 7 GiB of memory")
    x = torch.zeros(N, dtype=torch.int8)
    marks = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**31 + 1, N - 2, N - 1])
    x[marks] = torch.tensor([1, 2, 3, 4, 5, 6, 7], dtype=torch.int8)
    f = compiled(lambda x: (x * 3 + 1, x.sum(), x.argmax()))
    y, total, at = f(x)
    assert y[marks].tolist() == [4, 7, 10, 13, 16, 19, 22] and total.item() == 28 and at.item() == N - 1
    y[marks] = 1
    for part in y.split(2**28):
        assert bool((part == 1).all())


@pytest.mark.slow
def test_a_matrix_of_more_than_two_billion_elements() -> None:
    if _free_memory() < 7 * 2**30:
        pytest.skip("needs 7 GiB of memory")
    rows, width = 70000, 31000  # 2.17e9 elements
    x = torch.zeros(rows, width, dtype=torch.int8)
    x[-1] = 1
    x[:, -1] = 2
    index = torch.tensor([0, rows - 1, 1])
    f = compiled(lambda x, i: (x.sum(0), x.sum(1), x[i] + 1, x.t()[-1] + 1))
    down, across, some, last = f(x, index)
    assert down[:-1].eq(1).all() and down[-1] == 2 * rows
    assert across[:-1].eq(2).all() and across[-1] == width + 1
    assert torch.equal(some, x[index] + 1) and last.eq(3).all()


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
