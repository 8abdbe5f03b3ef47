"""Tuning a model: predicted tiles that travel and are used, tiles measured and checked, what stops half-way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from kernels import INTERPRET

from tessel.autotune import measure as measure_module
from tessel.autotune import tune as tune_module
from tessel.autotune import tuned as tuned_module
from tessel.autotune.cache import Cache, default_cache
from tessel.autotune.entry import Fact, Times
from tessel.autotune.kernels import Found, kernels_of
from tessel.autotune.key import key_of
from tessel.autotune.known import lookup, remember
from tessel.autotune.measure import Bench, GpuMeasurer, arguments, error_of
from tessel.autotune.tune import DeviceLost, Measured, seconds_by_term, tune
from tessel.autotune.tuned import tuned
from tessel.autotune.why import why
from tessel.build import plan
from tessel.cli import main
from tessel.config import Options
from tessel.errors import TesselError
from tessel.models import load_model
from tessel.solve import tile
from tessel.targets import get_target

H100 = get_target("h100")


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = torch.nn.Linear(64, 96, dtype=dtype)
        self.b = torch.nn.Linear(96, 32, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.b(torch.relu(self.a(x))), -1)


def kernels(rows: int = 48, dtype: torch.dtype = torch.float32) -> list[Found]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return kernels_of(Net(dtype), (torch.randn(rows, 64, dtype=dtype),))


MODEL = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(64, 256, dtype=torch.bfloat16, device="meta")
        self.b = torch.nn.Linear(256, 64, dtype=torch.bfloat16, device="meta")
    def forward(self, x):
        return torch.softmax(self.b(torch.relu(self.a(x))), -1)
def net(batch=32): return Net(), (torch.empty(batch, 64, dtype=torch.bfloat16, device="meta"),)
"""


@pytest.fixture
def own(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "tiles")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own cache, elsewhere."""
    return at(tmp_path / "home", monkeypatch)


def at(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(path))
    return path / "tiles"


@pytest.fixture
def model(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "my_net.py").write_text(MODEL)
    torch._dynamo.reset()
    yield f"{tmp_path / 'my_net.py'}:net"


def run(*args: str) -> Result:
    torch._dynamo.reset()
    return CliRunner().invoke(main, args)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels whose tile was searched for (not those whose given tile was looked at)."""
    names: list[str] = []

    def counted(kernel: Any, *args: Any, given: Any = None, **kwargs: Any) -> Any:
        if not given:
            names.append(kernel.name)
        return tile(kernel, *args, given=given, **kwargs)

    for module in (tune_module, tuned_module):
        monkeypatch.setattr(module, "tile", counted)
    return names


# ---------------------------------------------------------------- predicted


def test_every_kernel_is_kept_when_its_step_is_there(own: Cache) -> None:
    found = kernels()
    assert {f.kernel.family for f in found} == {"matmul", "reduction"}
    for n, step in enumerate(tune(found, H100, cache=own), 1):
        assert step.how == "predicted" and len(own.entries()) == n
        hit = lookup(step.found.kernel, H100, cache=own)
        assert hit is not None and hit.knobs == step.knobs == tile(step.found.kernel, H100).knobs
        assert hit.entry.seconds == step.seconds and step.seconds is not None and 1e-7 < step.seconds < 1e-3
    assert [s.how for s in tune(found, H100, cache=own)] == ["kept"] * n
    assert [s.how for s in tune(found, H100, cache=own, again=True)] == ["predicted"] * n


def test_terms_are_seconds() -> None:
    predicted = tile(kernels()[0].kernel, H100).predicted
    terms = seconds_by_term(predicted)
    assert terms["total"] == predicted.total and terms["launch"] > 0 and not terms.keys() & {"waves", "programs"}


def test_a_kernel_without_a_tile_is_said_and_the_others_go_on(own: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels()

    def fails(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel is found[0].kernel:
            raise TesselError("no tile fits")
        return tile(kernel, *args, **kwargs)

    monkeypatch.setattr(tune_module, "tile", fails)
    steps = list(tune(found, H100, cache=own))
    assert [s.how for s in steps] == ["failed"] + ["predicted"] * (len(found) - 1)
    assert "no tile fits" in str(steps[0]) and len(own.entries()) == len(found) - 1


def test_command(home: Path, model: str) -> None:
    result = run("tune", model, "--target", "h100")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(": predicted, ") == 3 and "3 of 3 kernels for h100: 3 predicted" in result.stdout
    assert "3 of 3 kernels for h100: 3 kept" in run("tune", model, "--target", "h100", "--quiet").stdout
    assert "3 of 3 kernels hit for h100" in run("cache", "why", model, "--target", "h100").output
    other = run("cache", "why", model, "--target", "h100", "--batch", "64").output
    assert "0 of 3 kernels hit" in other and "miss: shape: wanted" in other
    assert "3 predicted" in run("tune", model, "--target", "h100", "--batch", "64", "-q").stdout
    assert len(Cache(home).entries()) == 6


def test_ctrl_c_keeps_what_is_done(home: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = []

    def stops(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return tile(*args, **kwargs)

    monkeypatch.setattr(tune_module, "tile", stops)
    result = run("tune", model, "--target", "h100")
    assert result.exit_code == 130 and "2 of 3 kernels for h100: 2 predicted" in result.stdout
    assert "what is done is kept" in result.stderr and "Traceback" not in result.output
    assert len(Cache(home).entries()) == 2
    monkeypatch.undo()
    at(home.parent, monkeypatch)
    assert "2 kept, 1 predicted" in run("tune", model, "--target", "h100").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--target", "h100", "--measure"), "torch finds no GPU here"),
        (("--target", "cpu"), "has no tuned tiles; name a GPU"),
        (("--target", "h10"), "unknown target"),
        (("--target", "h100", "--option", "matmul=libary"), "options: matmul"),
        ((), "no known GPU here: name one with --target"),
    ],
)
def test_refusals_are_one_line(args: tuple[str, ...], words: str, home: Path, model: str) -> None:
    if torch.cuda.is_available() and "GPU here" in words:
        pytest.skip("there is a GPU here")
    result = run("tune", model, *args)
    assert result.exit_code == 2 and words in result.output and len(result.output.strip().splitlines()) == 1
    assert not home.exists()


def test_a_cache_that_cannot_be_used_is_said_before_anything_is_done(home: Path, model: str) -> None:
    home.mkdir(parents=True)
    home.chmod(0o777)
    result = run("tune", model, "--target", "h100")
    assert result.exit_code == 2 and "open to other users" in result.output and not list(home.iterdir())


# ---------------------------------------------------------------- used


def tiles_of(report: Any) -> dict[str, dict[str, int]]:
    return {k.name: dict(k.rendered.knobs) for k in report.kernels}


def test_tuned_here_compiled_there_with_zero_tuning(
    tmp_path: Path, model: str, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at(tmp_path / "first", monkeypatch)
    assert run("tune", model, "--target", "h100").exit_code == 0 and len(solved) == 3
    assert run("cache", "export", str(tmp_path / "file")).exit_code == 0
    at(tmp_path / "second", monkeypatch)
    module, args, kwargs = load_model(model)
    solved.clear()
    without = plan(module, args, kwargs, target="h100")
    assert len(solved) == 3
    result = run("cache", "import", str(tmp_path / "file"))
    assert "3 entries new" in result.output
    solved.clear()
    with_ = plan(module, args, kwargs, target="h100")
    assert not solved  # zero tuning
    assert tiles_of(with_) == tiles_of(without) and len(with_.kernels) == 3
    assert all("kept: " in k.rendered.text and "predicted" in k.rendered.text for k in with_.kernels)


def test_a_measured_tile_wins_and_the_user_wins_over_it(home: Path) -> None:
    kernel = kernels(rows=4096, dtype=torch.bfloat16)[0].kernel
    second = tile(kernel, H100).candidates(2)[1].knobs
    times = {"warm": Times(3e-6, 2e-6, 4e-6, 21)}
    assert remember(kernel, H100, second, measured=times, here={"driver": "1.2"})
    got = tuned(kernel, H100)
    assert got.knobs == second and got.why.startswith("kept: 3.0 µs measured; to be checked again, driver: 1.2 -> ")
    forced = tuned(kernel, H100, Options(tile="matmul: BM=64"))
    assert forced.knobs["BM"] == 64 and "kept" not in forced.why


def test_what_is_illegal_or_predicted_by_another_solver_is_solved_anew(home: Path, solved: list[str]) -> None:
    kernel = kernels(rows=4096, dtype=torch.bfloat16)[0].kernel
    good = tile(kernel, H100).knobs
    own = default_cache()
    for bad in ({**good, "BM": 256, "BN": 256, "num_warps": 4}, {**good, "BM": 48}, {"BM": 128}, {**good, "X": 1}):
        remember(kernel, H100, bad, measured={"warm": Times(1e-9, 1e-9, 1e-9, 9)})
        solved.clear()
        assert tuned(kernel, H100).knobs == good and len(solved) == 1, bad
        (name,) = own.files()
        own.remove(name)
        own._memory.clear()
    remember(kernel, H100, tile(kernel, H100).candidates(2)[1].knobs, here={"solver": "another"})
    solved.clear()
    assert tuned(kernel, H100).knobs == good and len(solved) == 1
    assert "miss: solver" in str(why(kernel, H100, own))
    assert [s.how for s in tune([Found(kernel, (), kernels()[0].region)], H100)] == ["predicted"]
    assert tuned(kernel, H100).why.startswith("kept")


@pytest.mark.slow
def test_the_same_kernels_are_tuned_and_compiled(home: Path, solved: list[str]) -> None:
    """`tessel compile` exports the model, tessel.compile traces it: both find all that they need."""
    module, args, kwargs = load_model("hf:bert", dtype="bfloat16")
    torch._dynamo.reset()
    found = kernels_of(module, args, kwargs)
    assert all(s.how == "predicted" for s in tune(found, H100))
    solved.clear()
    report = plan(module, args, kwargs, target="h100")
    assert not solved
    assert {key_of(k.rendered.kernel, H100) for k in report.kernels} < {key_of(f.kernel, H100) for f in found}


# ---------------------------------------------------------------- measured


class Interpreted(Bench):
    """Runs tiles through Triton's interpreter. A tile's time is what ``speed`` says of it."""

    def __init__(
        self, folder: Path, speed: Callable[[Mapping[str, int]], float] | None = None, rounds: int = 1
    ) -> None:
        super().__init__(INTERPRET, "cpu", folder, rounds)
        self.speed, self.order, self.seen = speed, [], []  # type: ignore[var-annotated]

    def seconds(self, call: Callable[[], None], count: int) -> float:
        start = time.perf_counter()
        call()
        self.order.append(call)
        return time.perf_counter() - start

    def clear(self) -> None:
        self.order.append(None)

    def wait(self) -> None: ...

    def alive(self, failure: Exception) -> None:
        self.seen.append(failure)

    def facts(self) -> dict[str, Fact]:
        return {"driver": "7.7", "clock_hz": 1e9}

    def measure(self, found: Found, tiles: Sequence[Mapping[str, int]]) -> list[Measured]:
        got = super().measure(found, tiles)
        if self.speed is None:
            return got
        fixed = [{"warm": Times(t := self.speed(m.knobs), t, t, 3)} if m.times else {} for m in got]
        return [dataclasses.replace(m, times=t) for m, t in zip(got, fixed)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_right_tile_is_kept(own: Cache, tmp_path: Path, dtype: torch.dtype) -> None:
    found = [f for f in kernels(dtype=dtype) if f.kernel.family == "matmul"][:1]
    bench = Interpreted(tmp_path, speed=lambda k: 1e-6 * (1 + (k["BM"] != 32)) + 1e-9 * k["BN"])
    list(tune(found, H100, cache=own))
    steps = list(tune(found, H100, cache=own, measurer=bench))
    for step in steps:
        assert step.how == "measured" and "fastest of " in step.why, str(step)
        hit = lookup(step.found.kernel, H100, cache=own)
        assert hit is not None and hit.entry.measured and hit.entry.predicted["total"] > 0
        best = min((c.knobs for c in tile(step.found.kernel, H100).shortlist(6)), key=bench.speed)  # type: ignore[arg-type]
        assert bench.speed(hit.knobs) == bench.speed(best)  # type: ignore[misc]
        facts = hit.entry.provenance
        assert facts["driver"] == "7.7" and facts["clock_hz"] == 1e9 and 0 < float(facts["tolerance"]) < 0.1
        assert len(own.entries()) == len(found)
    assert any("driver: 7.7" in r for r in lookup(found[0].kernel, H100, cache=own).recheck)  # type: ignore[union-attr]


def test_tiles_take_turns_and_the_cache_is_cleared_between(tmp_path: Path) -> None:
    found = kernels()[0]
    tiles = [c.knobs for c in tile(found.kernel, H100).candidates(3)]
    bench = Interpreted(tmp_path, rounds=3)
    got = bench.measure(found, tiles)
    assert [m.knobs for m in got] == tiles and all(not m.refused and m.error <= m.bound for m in got)
    assert all(set(m.times) == {"warm", "cold"} and m.times["cold"].runs == 3 for m in got)
    rounds = bench.order[6:]  # after two looks at each for how many launches fill a figure
    calls = list(dict.fromkeys(rounds[i] for i in (0, 3, 6)))
    assert len(calls) == 3
    want = [c for first in range(3) for c in calls[first:] + calls[:first]]
    assert rounds == [x for c in want for x in (c, None, c)]


def test_a_wrong_tile_does_not_win(own: Cache, tmp_path: Path) -> None:
    """The kernel of one layer against the operators of another of the same sizes: nothing is kept."""
    first, other = (kernels_of(f, (torch.randn(32, 64),)) for f in (_scaled(2.0), _scaled(2.001)))
    planted = Found(first[0].kernel, ("here",), other[0].region)
    bench = Interpreted(tmp_path)
    (step,) = tune([planted], H100, cache=own, measurer=bench)
    assert step.how == "failed" and "is right" in step.why and "wrong result: error" in step.why
    assert not own.entries() and not bench.order
    (step,) = tune([Found(first[0].kernel, ("here",), first[0].region)], H100, cache=own, measurer=bench)
    assert step.how == "measured"


def _scaled(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    torch._dynamo.reset()
    return lambda x: torch.softmax(x * by, -1)


def test_a_tile_that_cannot_run_is_refused_and_the_others_are_measured(
    own: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernels()[0]
    real, count = measure_module.make_callable, []

    def breaks(source: Any, folder: Path) -> Any:
        count.append(1)
        if len(count) == 1:

            def out_of_memory(*args: Any) -> None:
                raise RuntimeError("out of resource: shared memory")

            return out_of_memory
        return real(source, folder)

    monkeypatch.setattr(measure_module, "make_callable", breaks)
    bench = Interpreted(tmp_path)
    (step,) = tune([found], H100, cache=own, measurer=bench)
    assert step.how == "measured" and "1 refused" in step.why and "out of resource" in step.why
    assert step.knobs != tile(found.kernel, H100).knobs and len(bench.seen) == 1


def test_a_device_that_is_lost_stops_all_and_what_is_done_is_kept(own: Cache, tmp_path: Path) -> None:
    class Breaks(Interpreted):
        def measure(self, found: Found, tiles: Sequence[Mapping[str, int]]) -> list[Measured]:
            if own.entries():
                raise DeviceLost("the GPU takes no more work")
            return [Measured(k, {"warm": Times(1e-6, 1e-6, 1e-6, 3)}) for k in tiles]

    steps = tune(kernels(), H100, cache=own, measurer=Breaks(tmp_path))
    assert next(steps).how == "measured"
    with pytest.raises(TesselError, match="no more work"):
        next(steps)
    assert len(own.entries()) == 1


def test_the_search_starts_at_the_nearest_shape_that_was_measured(own: Cache, tmp_path: Path) -> None:
    near, here = kernels(rows=2048, dtype=torch.bfloat16)[0], kernels(rows=1024, dtype=torch.bfloat16)[0]
    six = [c.knobs for c in tile(here.kernel, H100).shortlist(6)]
    other = next(c.knobs for c in tile(near.kernel, H100).candidates(60) if c.knobs not in six)
    remember(near.kernel, H100, other, measured={"warm": Times(1e-6, 1e-6, 1e-6, 9)}, cache=own)
    asked: list[Any] = []

    class Looks(Interpreted):
        def measure(self, found: Found, tiles: Sequence[Mapping[str, int]]) -> list[Measured]:
            asked.extend(tiles)
            return [Measured(k, {"warm": Times(1e-6, 1e-6, 1e-6, 3)}) for k in tiles]

    list(tune([here], H100, cache=own, measurer=Looks(tmp_path)))
    assert asked == [*six[:5], other]


def test_arguments_are_in_range_and_laid_out_as_the_kernel_expects() -> None:
    torch._dynamo.reset()
    table = torch.randn(2, 16)
    indices, mask, row = torch.tensor([0, 1, 1]), torch.ones(3) > 0, torch.randn(1, 16).expand(3, 16)
    found = kernels_of(lambda t, i, m, r: torch.where(m, (t[i] * r).t(), 0.0), (table, indices, mask, row))
    assert 0 in {s for f in found for n in f.region.inputs for s in n.types[0].strides}
    for f in found:
        for x, node in zip(arguments(f.region, f.kernel, "cpu"), f.region.inputs):
            t = node.types[0]
            assert x.shape == t.shape and x.stride() == t.strides and x.dtype == t.dtype
            if not x.dtype.is_floating_point:
                assert int(x.min()) >= 0 and int(x.max()) <= 1


def test_errors() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([3.0, 4.0])
    assert error_of(x, x) == 0 and error_of(x * 1.1, x) == pytest.approx(0.1)
    assert error_of(torch.tensor([3.0, nan]), x) == inf and error_of(x, torch.tensor([3.0, nan])) == inf
    odd = torch.tensor([inf, nan, 2.0])
    assert error_of(odd, odd) == 0 and error_of(-odd, odd) == inf
    assert error_of(torch.zeros(2), torch.zeros(2)) == 0 and error_of(torch.ones(2), torch.zeros(2)) == inf
    assert error_of(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert error_of(torch.tensor([1, 2]), torch.tensor([1, 3])) == inf


def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H200")
    with pytest.raises(TesselError, match="on h100, and the GPU here is NVIDIA H200"):
        GpuMeasurer(H100)
