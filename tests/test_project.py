"""Options, targets, errors, and the command line."""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

from tessel.cli import main
from tessel.config import Options, cache_dir, debug_level
from tessel.errors import TesselError, check, nearest
from tessel.models import load_model
from tessel.targets import TARGETS, Level, Target, get_target, match_device
from tessel.targets.cpu import host_cpu

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TESSEL_DEBUG", "TESSEL_DUMP", "TESSEL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


# -- errors -----------------------------------------------------------------------------------------


def test_check_builds_no_message_when_it_passes() -> None:
    check(True, lambda: pytest.fail("the message was built"))
    with pytest.raises(TesselError, match="^no$"):
        check(False, lambda: "no")


@pytest.mark.parametrize(
    ("name", "want"), [("H10O", "h100"), ("triton-interp", "triton-interpret"), ("zz", None), (7, None)]
)
def test_nearest(name: object, want: str | None) -> None:
    assert nearest(name, ["h100", "triton-interpret", "cpu"]) == want


# -- options ----------------------------------------------------------------------------------------


def test_options_defaults_are_hashable_and_frozen() -> None:
    options = Options()
    assert (options.matmul, options.attention, options.fusion, options.rng) == ("auto", "auto", True, "eager")
    assert options == Options.of(None) == Options.of({}) and hash(options) == hash(Options())
    assert Options.of(options) is options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.fusion = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fussion": True}, "unknown name 'fussion'; did you mean 'fusion'?"),
        ({3: True}, "unknown name 3"),
        ({"fusion": 1}, "fusion: expected bool, got 1 (int)"),
        ({"fusion": None}, "fusion: expected bool, got None"),
        ({"matmul": "cublas"}, "matmul: expected 'auto' or 'template' or 'library', got 'cublas'"),
        ({"attention": ["auto"]}, "attention: expected 'auto'"),
        ({"rng": "philox"}, "rng: expected 'eager', got 'philox'"),
        ({"debug": True}, "debug: expected int, got True (bool)"),
        ({"debug": 5}, "debug: expected an int from 0 to 4, got 5"),
        ({"dump_dir": 3}, "dump_dir: expected str or None, got 3"),
        ({"dump_dir": ""}, "dump_dir: expected a directory name"),
        ({"recompile_limit": 0}, "recompile_limit: expected an int of at least 1"),
        ({"recompile_limit": 2.0}, "recompile_limit: expected int or None, got 2.0 (float)"),
        ("fusion", "expected Options, a mapping or None, got str"),
        ([("fusion", True)], "expected Options, a mapping or None, got list"),
    ],
)
def test_options_refuse_in_words(given: object, words: str) -> None:
    with pytest.raises(TesselError, match=re.escape(words)):
        Options.of(given)  # type: ignore[arg-type]


def test_every_option_is_documented() -> None:
    text = Path(sys.modules["tessel.config"].__file__ or "").read_text()
    for f in dataclasses.fields(Options):
        assert re.search(rf'^    {f.name}: .*\n    """', text, re.M), f"{f.name} has no words below it"


def test_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert debug_level() == 0 and Options().dump_dir is None
    assert cache_dir() == Path.home() / ".cache/tessel"
    assert Options().source_dir() == cache_dir() / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_dir() == Path.home() / ".cache/tessel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "tessel"
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("TESSEL_DUMP", str(tmp_path / "dump"))
    monkeypatch.setenv("TESSEL_DEBUG", "3")
    assert cache_dir() == tmp_path / "own"
    assert (Options().debug, Options().source_dir()) == (3, tmp_path / "dump")
    assert Options(debug=0).debug == 0
    for bad in ("yes", "-1", "9", "1.5", "²"):
        monkeypatch.setenv("TESSEL_DEBUG", bad)
        with pytest.raises(TesselError, match="TESSEL_DEBUG: expected a whole number from 0 to 4"):
            Options()


# -- targets ----------------------------------------------------------------------------------------


def test_the_table_is_complete() -> None:
    names = {"a100", "h100", "h200", "b200", "l40s", "rtx4090", "mi300x", "cpu", "triton-interpret"}
    assert set(TARGETS) == names and all(TARGETS[n].name == n for n in names)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_number_of_a_target_has_a_source(name: str) -> None:
    target = get_target(name)
    assert set(target.sources) == set(target.numbers()) and all(target.sources.values())
    assert all(v is None or v > 0 for v in target.numbers().values())
    text = target.describe()
    assert all(source in text for source in target.sources.values())
    assert pickle.loads(pickle.dumps(target)) == target and isinstance(hash(target), int)
    if target.vendor in ("nvidia", "amd"):
        assert target.limits is not None and target.gpu_target is not None
        assert target.gpu_target[2] == target.limits.warp_size
        assert target.limits.shared_bytes_per_block <= target.limits.shared_bytes_per_unit
        assert target.limits.shared_bytes_per_unit == target.level("shared").capacity_bytes
        assert target.limits.registers_per_unit * 4 == target.level("registers").capacity_bytes
        for what, value in target.reached.items():
            peak = target.flops.get(what, target.level("memory").bandwidth_bytes_per_s)
            assert peak is not None and value < peak, f"{what} is reached beyond its peak"


def test_some_numbers() -> None:
    h100, mi300x = get_target("h100"), get_target("mi300x")
    assert h100.gpu_target == ("cuda", 90, 32) and mi300x.gpu_target == ("hip", "gfx942", 64)
    assert h100.limits is not None and h100.limits.shared_bytes_per_block == 227 * 1024
    assert h100.flops["bf16"] == 989.4e12 and "f8" not in get_target("a100").flops
    assert h100.level("memory").bandwidth_bytes_per_s == 3.35e12
    with pytest.raises(TesselError, match="no level 'L2'; did you mean 'l2'"):
        h100.level("L2")


@pytest.mark.parametrize("bad", ["h10", "", "H100 ", None, 3])
def test_unknown_target(bad: object) -> None:
    with pytest.raises(TesselError, match=r"unknown target .* known: a100, b200"):
        get_target(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"units": -1}, "units must be positive, got -1"),
        ({"clock_hz": float("nan")}, "clock_hz must be positive"),
        ({"clock_hz": None}, "clock_hz is missing and its source does not say why"),
        ({"sources": {}}, "units has no source"),
        ({"flops": {"f3": 1.0}}, "flops.f3 has no source"),
        ({"flops": {}}, "a source for 'flops."),
        ({"vendor": "intel"}, "unknown vendor 'intel'"),
        ({"levels": (Level("l9", 1, None, "rack"),)}, "scope 'rack'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_record_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(TesselError, match=re.escape(words)):
        dataclasses.replace(get_target("h100"), **change)


def test_a_record_is_read_only() -> None:
    with pytest.raises(TypeError):
        get_target("h100").flops["bf16"] = 1.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("NVIDIA GeForce RTX 3090", None),
        ("", None),
    ],
)
def test_match_device(name: str, want: str | None) -> None:
    found = match_device(name)
    assert (found.name if found else None) == want


def test_host_cpu_reads_the_system(tmp_path: Path) -> None:
    proc, cache = tmp_path / "proc", tmp_path / "sys/devices/system/cpu/cpu0/cache"
    proc.mkdir()
    (proc / "cpuinfo").write_text("model name\t: Some CPU\nflags\t\t: avx2 fma\n\nmodel name\t: Another\n")
    (proc / "meminfo").write_text("MemTotal:       1024 kB\n")
    for i, (kind, level, size, shared) in enumerate(
        [
            ("Data", 1, "32K", "0"),
            ("Instruction", 1, "64K", "0"),
            ("Unified", 3, "16M", "0-511"),
            ("Unified", 9, "?", "0"),
        ]
    ):
        (cache / f"index{i}").mkdir(parents=True)
        for name, value in (("type", kind), ("level", level), ("size", size), ("shared_cpu_list", shared)):
            (cache / f"index{i}" / name).write_text(f"{value}\n")
    cpu = host_cpu(proc, tmp_path / "sys")
    assert cpu.features == ("avx2", "fma") and cpu.device_names == ("Some CPU",)
    assert [(x.name, x.capacity_bytes, x.scope) for x in cpu.levels] == [
        ("l1", 32768, "unit"),
        ("l3", 2**24, "device"),
        ("memory", 2**20, "device"),
    ]
    bare = host_cpu(tmp_path / "none", tmp_path / "none")  # a system that says nothing
    assert (
        isinstance(bare, Target)
        and bare.units >= 1
        and "assumed" in bare.sources["levels.memory.capacity_bytes"]
    )


def test_a_matrix_unit_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx512f amx_tile amx_bf16\n")
    asked: list[tuple[int, ...]] = []
    for answer, want in ((0, ("amx_bf16", "amx_tile", "avx512f")), (-1, ("avx512f",))):
        library = SimpleNamespace(syscall=lambda *x, answer=answer: asked.append(x) or answer)
        monkeypatch.setattr("tessel.targets.cpu.ctypes", SimpleNamespace(CDLL=lambda _, library=library: library))
        assert host_cpu(tmp_path, tmp_path).features == want
    assert asked == 2 * [(158, 0x1023, 18)]


# -- models -----------------------------------------------------------------------------------------

MODEL_FILE = """
import torch
def good(): return torch.nn.Linear(4, 2), (torch.ones(3, 4),)
def named(batch=2, seq=3): return torch.relu, [torch.ones(batch, seq)], {"inplace": False}
def bad(): raise ValueError("two\\nlines")
def leaves(): raise SystemExit(3)
def wrong(): return 3
value = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "my_model.py"
    path.write_text(MODEL_FILE)
    return str(path)


def test_model_from_a_file(file: str) -> None:
    module, args, kwargs = load_model(f"{file}:good")
    assert module(*args, **kwargs).shape == (3, 2)
    fn, args, kwargs = load_model(f"{file}:named", batch=5)
    assert args[0].shape == (5, 3) and kwargs == {"inplace": False} and fn is torch.relu


def test_model_from_a_module(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(file).parent))
    module, args, _ = load_model("my_model:good")
    assert module(*args).shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("goood", "no function 'goood'; did you mean 'good'?"),
        ("value", "'value' is a int, not a function"),
        ("bad", r"raised ValueError: two lines (.*my_model.py:5)"),
        ("leaves", "raised SystemExit: 3"),
        ("wrong", "expected (module, args tuple) or (module, args tuple, kwargs dict), got a int"),
    ],
)
def test_bad_functions_are_refused_in_one_line(file: str, name: str, words: str) -> None:
    with pytest.raises(TesselError) as e:
        load_model(f"{file}:{name}")
    pattern = re.escape(words).replace(re.escape(".*"), ".*")
    assert re.search(pattern, str(e.value)) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("model", "expected file.py:function"),
        (":f", "expected file.py:function"),
        ("hf:", "expected file.py:function"),
        ("none.py:f", "model file 'none.py' does not exist"),
        ("no_such_package.sub:f", "there is no module 'no_such_package'"),
        ("hf:lama", "unknown transformers model type 'lama' ("),
        ("hf:lama", "did you mean 'llama'?"),
    ],
)
def test_bad_specs(spec: str, words: str) -> None:
    with pytest.raises(TesselError, match=re.escape(words)):
        load_model(spec)


def test_bad_model_arguments(file: str, tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="seq was given, but 'good' has no parameter of that name"):
        load_model(f"{file}:good", seq=4)
    with pytest.raises(TesselError, match="batch: expected a whole number of at least 1, got 0"):
        load_model(f"{file}:good", batch=0)
    with pytest.raises(TesselError, match="dtype: unknown 'bfloat'; did you mean 'bfloat16'"):
        load_model("hf:llama", dtype="bfloat")
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    with pytest.raises(TesselError, match=r"raised SyntaxError: .*broken.py:1\)"):
        load_model(f"{broken}:f")


def test_hf_model_is_small_and_the_same_every_time() -> None:
    state = torch.random.get_rng_state()
    one, _, kwargs = load_model("hf:llama", batch=2, seq=5, dtype="bf16", layers=1)
    two, _, again = load_model("hf:llama", batch=2, seq=5, dtype="bf16", layers=1)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers are left alone
    assert kwargs["input_ids"].shape == (2, 5) and torch.equal(kwargs["input_ids"], again["input_ids"])
    assert isinstance(one, torch.nn.Module) and isinstance(two, torch.nn.Module)
    assert sum(p.numel() for p in one.parameters()) < 1_000_000
    assert all(p.dtype == torch.bfloat16 for p in one.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.config.num_hidden_layers == 1


HF_TYPES = "qwen2 mistral gemma3 mixtral gpt2 bert t5 vit clip whisper mamba deepseek_v3".split()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HF_TYPES)
def test_hf_models_run(model_type: str) -> None:
    module, args, kwargs = load_model(f"hf:{model_type}", batch=2)
    with torch.no_grad():
        out = module(*args, **kwargs)
    assert all(torch.isfinite(v).all() for v in out.values() if isinstance(v, torch.Tensor))


# -- command line -----------------------------------------------------------------------------------


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_cli_targets() -> None:
    result = run("targets")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in TARGETS)
    result = run("targets", "--show", "h200")
    assert result.exit_code == 0 and "4.8 TB/s" in result.output and "NVIDIA H200 data sheet" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("targets", "--show", "h20"), "unknown target 'h20'; did you mean 'h200'?"),
        (("explain", "nothing"), "expected file.py:function"),
        (("explain", "hf:lama"), "did you mean 'llama'?"),
        (("explain", "hf:llama", "--target", "h10"), "unknown target 'h10'"),
        (("explain", "hf:llama", "--dtype", "int3"), "dtype: unknown 'int3'"),
        (("explain", "hf:llama", "--batch", "0"), "0 is not in the range x>=1"),
        (("explain",), "Missing argument 'MODEL'"),
        (("explan",), "No such command 'explan'"),
    ],
)
def test_cli_refuses_with_two_and_words(args: tuple[str, ...], words: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and words in result.output, result.output
    assert "Traceback" not in result.output


def test_cli_explain_passes_the_model_on(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("tessel.compile", lambda m, target, **more: seen.append(target) or m, raising=False)
    monkeypatch.setattr(
        "tessel.explain", lambda m, *a, **k: seen.append((a, k)) or "the report", raising=False
    )
    result = run("explain", f"{file}:named", "--seq", "7", "--target", "cpu")
    assert result.exit_code == 0 and result.output == "the report\n"
    assert seen[0] == "cpu" and seen[1][0][0].shape == (2, 7) and seen[1][1] == {"inplace": False}


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tessel", "targets"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "mi300x" in done.stdout, done.stderr


# -- the example of the README ----------------------------------------------------------------------


def test_the_quickstart_prints_what_the_readme_shows() -> None:
    shown = (ROOT / "README.md").read_text().split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    code = "import torch, quickstart\nwith torch.no_grad(): quickstart.through_the_interpreter()"
    got = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "examples", capture_output=True, text=True, timeout=300, check=True
    ).stdout
    labels = [line[:16].strip() for line in got.splitlines() if line]
    assert labels[0] == "model" and "max error" in labels
    second = shown.split("through the interpreter")[1]
    assert [line[:16].strip() for line in second.splitlines() if line and line != "```"] == labels
    assert float(re.search(r"max error +(\S+)", got)[1]) < 1e-5  # type: ignore[index]
