"""The record of what was measured on this CPU: kept safely, read back only if it can be trusted, never by accident."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import tessel
from tessel.cli import main
from tessel.runtime import host_rates
from tessel.targets import TARGETS, HostRates, get_target, host_measured
from tessel.targets.host import features_that_matter, key_of, read_record, vector_bits, with_rates, write_record

CPU = get_target("cpu")
RATES = HostRates(
    read_bytes_per_s=50e9,
    copy_bytes_per_s=40e9,
    stream_copy_bytes_per_s=60e9,
    threads=2,
    when="2026-01-02T03:04:05+00:00",
    flops={"f32": 5e11, "bf16": 1e12},
    how={"read_bytes_per_s": "sums", "flops.f32": "multiply-adds"},
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory; returns the folder that records go to."""
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "host"


def record(cache: Path) -> Path:
    return cache / f"{key_of(CPU)}.json"


def test_kept_and_read_back(cache: Path) -> None:
    assert host_measured() is None and not cache.exists()
    write_record(CPU, RATES)
    assert host_measured() == RATES
    write_record(CPU, dataclasses.replace(RATES, threads=1))  # replaces
    assert host_measured() == dataclasses.replace(RATES, threads=1)
    assert [f.name for f in cache.iterdir()] == [record(cache).name]
    assert cache.stat().st_mode & 0o777 == 0o700 and record(cache).stat().st_mode & 0o077 == 0


def sealed(data: object) -> str:
    text = json.dumps(data)
    return json.dumps({"rates": text, "checksum": hashlib.sha256(text.encode()).hexdigest()})


GOOD = dataclasses.asdict(RATES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"rates": 3, "checksum": "x"}',
        "\0" * 100,
        sealed([]),
        sealed({}),
        sealed({**GOOD, "more": 1}),
        sealed({**GOOD, "read_bytes_per_s": -1.0}),
        sealed({**GOOD, "read_bytes_per_s": math.nan}),
        sealed({**GOOD, "copy_bytes_per_s": math.inf}),
        sealed({**GOOD, "copy_bytes_per_s": "fast"}),
        sealed({**GOOD, "flops": {"f32": 0}}),
        sealed({**GOOD, "flops": 7}),
        sealed({**GOOD, "threads": 0}),
        sealed(GOOD).replace("50000000000", "90000000000"),
        sealed(GOOD)[:-20],
    ],
)
def test_a_broken_record_is_none(cache: Path, text: str) -> None:
    write_record(CPU, RATES)
    record(cache).write_text(text)
    assert host_measured() is None
    write_record(CPU, RATES)
    assert host_measured() == RATES


def test_a_folder_that_others_write_to_is_not_used(cache: Path) -> None:
    write_record(CPU, RATES)
    cache.chmod(0o777)
    assert host_measured() is None
    with pytest.raises(OSError, match="open to other users"):
        write_record(CPU, RATES)


def test_links_are_not_followed(cache: Path, tmp_path: Path) -> None:
    write_record(CPU, RATES)
    moved = record(cache).rename(tmp_path / "elsewhere")
    record(cache).symlink_to(moved)
    assert host_measured() is None
    record(cache).unlink()
    moved.rename(record(cache))
    assert host_measured() == RATES
    cache.rename(tmp_path / "folder")
    cache.symlink_to(tmp_path / "folder")
    assert host_measured() is None


def test_another_cpu_has_another_record() -> None:
    write_record(CPU, RATES)
    for changes in (
        {"units": CPU.units + 1},
        {"features": (*CPU.features, "zz")},
        {"device_names": ("Another CPU",)},
        {"arch": "riscv64"},
        {"levels": CPU.levels[1:]},
    ):
        sources = {k: v for k, v in CPU.sources.items() if "levels" not in changes or CPU.levels[0].name not in k}
        other = dataclasses.replace(CPU, **changes, sources=sources)
        assert key_of(other) != key_of(CPU) and read_record(other) is None


def test_the_rates_in_a_target() -> None:
    found = with_rates(CPU, RATES)
    assert found.level("memory").bandwidth_bytes_per_s == 50e9
    assert dict(found.flops) == {"f32": 5e11, "bf16": 1e12} and found.reached["memory"] == 40e9
    assert found.sources["flops.f32"] == "measured 2026-01-02: multiply-adds"
    assert CPU.level("memory").bandwidth_bytes_per_s is None and not CPU.flops  # the table is as it was
    assert "500 GFLOP/s" in found.describe() and "60 GB/s" in found.describe()


def test_what_the_flags_say() -> None:
    def cpu(*features: str, arch: str = "x86_64") -> tessel.targets.Target:
        return dataclasses.replace(CPU, arch=arch, features=features)

    assert vector_bits(cpu("sse2", "avx", "avx2", "avx512f")) == 512
    assert vector_bits(cpu("sse2", "avx", "avx2", "fma")) == 256
    assert vector_bits(cpu("sse2")) == 128 and vector_bits(cpu("asimd", "sve", arch="aarch64")) == 128
    assert vector_bits(cpu(arch="riscv64")) is None
    assert features_that_matter(cpu("sse2", "avx512_bf16", "fma", "aes")) == ["fma", "avx512_bf16"]
    assert features_that_matter(cpu("fma", arch="riscv64")) == []


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little: the figures mean nothing then."""
    monkeypatch.setattr(host_rates, "_array_bytes", lambda cpu: 4 * 2**20)
    monkeypatch.setattr(host_rates, "_BUDGET", 0.01)


def plausible(rates: HostRates) -> None:
    numbers = rates.numbers()
    assert set(numbers) == set(rates.how)
    assert all(1e7 < v < 1e15 for v in numbers.values()), numbers
    assert rates.flops["f32"] > 1e8 and 1 <= rates.threads <= max(CPU.units, torch.get_num_threads())


def test_measured_by_a_kernel(small: None) -> None:
    try:
        host_rates.build('extern "C" int nothing() { return 0; }', {})
    except tessel.TesselError as e:
        pytest.skip(str(e))
    rates = host_rates.measure_host()
    plausible(rates)
    assert "multiply-adds" in rates.how["flops.f32"] and f"{rates.threads} threads" in rates.how["read_bytes_per_s"]
    assert "bf16" in rates.flops or "avx512_bf16" not in CPU.features
    # A multiply-add on every vector unit cannot be slower than a dot product on one core is fast.
    if "bf16" in rates.flops:
        assert rates.flops["bf16"] > rates.flops["f32"] / 4
    assert host_measured() == rates


def test_measured_without_a_compiler(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    rates = host_rates.measure_host()
    plausible(rates)
    assert all("lower bound" in how and "no C++ compiler" in how for how in rates.how.values())


def test_a_cache_that_cannot_be_used(small: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    cache.parent.mkdir(mode=0o700)
    cache.write_text("in the way")
    with pytest.warns(UserWarning, match="what was measured is not kept"):
        plausible(host_rates.measure_host())
    assert host_measured() is None


def test_arrays_fit_in_memory() -> None:
    size = host_rates._array_bytes(CPU)
    assert 0 < size <= CPU.level("memory").capacity_bytes // 8 and size % 4096 == 0
    tiny = dataclasses.replace(
        CPU,
        levels=(dataclasses.replace(CPU.level("memory"), capacity_bytes=2**20),),
        sources={k: v for k, v in CPU.sources.items() if not k.startswith("levels.") or ".memory." in k},
    )
    assert host_rates._array_bytes(tiny) == 2**17


def test_cli_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def measure() -> HostRates:
        calls.append(1)
        write_record(CPU, RATES)
        return RATES

    monkeypatch.setattr(host_rates, "measure_host", measure)
    run = CliRunner().invoke
    for args, times in ((["--show", "cpu"], 1), (["--show", "cpu"], 1), (["--show", "cpu", "--measure"], 2)):
        got = run(main, ["targets", *args])
        assert got.exit_code == 0 and len(calls) == times, got.output
        assert "50 GB/s" in got.output and "500 GFLOP/s" in got.output and "measured 2026-01-02" in got.output
    assert run(main, ["targets"]).exit_code == 0 and len(calls) == 2
    refused = run(main, ["targets", "--show", "h100", "--measure"])
    assert refused.exit_code == 2 and "only the CPU can be measured" in refused.output


def test_compiling_measures_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured during a compilation")

    monkeypatch.setattr(host_rates, "measure_host", never)
    fast = tessel.compile(lambda x: (x * 2).sum(1), target="cpu")
    x = torch.randn(8, 16)
    torch.testing.assert_close(fast(x), (x * 2).sum(1))
    assert not os.path.exists(cache) and not TARGETS["cpu"].flops
