"""Captures kept between processes: found where nothing has changed, and never where something has."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.frontend import recorded
from tessel.frontend.fingerprint import Fingerprints

ROOT = Path(__file__).resolve().parents[1]

MODEL = """
import torch
from torch import nn
FACTOR = 2.0
TABLE = {"a": 1.0, "b": 2.0}

def helper(x, power=2):
    return x ** power

class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = 3
    def shift(self, x):
        return x + 1.0
    def forward(self, x):
        return self.shift(torch.relu(self.linear(x)) * self.scale)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([Part(), Part()])
        self.register_buffer("seen", torch.zeros(3))
        self.kind = "sum"
    def forward(self, x, flag=True, *, more=None):
        for part in self.parts:
            x = part(x)
        self.seen.add_(1)
        x = helper(x) * FACTOR + TABLE["a"]
        if self.kind == "sum" and flag:
            x = x - x.sum(-1, keepdim=True)
        return {"y": x, "z": x.exp() if more is None else x * more}
"""

COMMON = """
import json, sys, warnings
import torch
from model import Model
import model as m
import tessel
from tessel import capture_cache
from tessel.frontend import recorded
capture_cache.WORTH = 0
out = {}
x = torch.linspace(-1, 1, 40).reshape(5, 8)

def right(f, model, *args, **kwargs):
    want, got = model(*args, **kwargs), f(*args, **kwargs)
    return all(torch.allclose(want[k], got[k], rtol=1e-4, atol=1e-5) for k in want)

def found(f):
    return any("from the cache" in n for c in tessel.explain(f).compilations for n in c.notes)
"""

COLD = """
with torch.no_grad():
    model = Model().eval()
    f = tessel.compile(model, target="cpu")
    out["right"], out["found"] = right(f, model, x), found(f)
"""

WARM = """
def why(change=lambda model: None, x=x, undo=lambda: None, **kwargs):
    model = Model().eval()
    tessel.compile(model, target="cpu")  # leaves a mark on the module
    change(model)
    def make_run(text, record):
        raise AssertionError("believed")
    try:
        got = recorded.put_back(data, model.forward, (x,), kwargs, make_run, lambda: True)
    except AssertionError as e:
        got = str(e)
    undo()
    return got

def set_(owner, name, value):
    old = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)

import os
folder = tessel.config.cache_dir() / "captures"
data = (folder / os.listdir(folder)[0]).read_bytes()
recorded.possible()
from tessel.frontend import dynamo
undo_config = dynamo.patcher()()  # as in the first call of a compiled function
with torch.no_grad():
    def sub(name, value):
        return lambda model: setattr(model.parts[1], name, value)
    out["same"] = why()
    out["attribute"] = why(sub("scale", 4))
    out["type of an attribute"] = why(sub("scale", 3.0))
    out["mode"] = why(lambda model: model.train())
    out["text"] = why(lambda model: setattr(model, "kind", "none"))
    out["shape"] = why(x=x[:4])
    out["strides"] = why(x=torch.randn(8, 5).t())
    out["dtype"] = why(x=x.double())
    out["wants a gradient"] = why(x=x.clone().requires_grad_())
    out["argument"] = why(more=2.0)
    out["default"] = why(undo=set_(m.helper, "__defaults__", (3,)))
    out["parameter"] = why(lambda model: setattr(model.parts[0], "linear", torch.nn.Linear(8, 8, bias=False)))
    out["hook"] = why(lambda model: model.parts[0].register_forward_hook(lambda *a: None))
    out["own method"] = why(lambda model: setattr(model.parts[0], "forward", lambda x: x))
    out["one more part"] = why(lambda model: model.parts.append(m.Part()))
    out["tied"] = why(lambda model: setattr(model.parts[1].linear, "weight", model.parts[0].linear.weight))
    class Other(m.Part): pass
    out["another class"] = why(lambda model: setattr(model.parts[0], "__class__", Other))
    out["method put into the class"] = why(undo=set_(m.Part, "shift", lambda self, x: x - 1.0))
    out["global"] = why(undo=set_(m, "FACTOR", 3.0))
    m.TABLE["a"] = 5.0
    out["table"] = why()
    m.TABLE["a"] = 1.0
    out["function"] = why(undo=set_(m, "helper", lambda x, power=2: x))
    torch.set_num_threads(torch.get_num_threads() + 1)
    out["threads"] = why()
    torch.set_num_threads(torch.get_num_threads() - 1)
    with torch.enable_grad():
        out["gradients"] = why()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out["autocast"] = why()
    with torch._dynamo.config.patch(specialize_int=True):
        out["config"] = why()
    out["same at the end"] = why()
undo_config()

import torch._dynamo.convert_frame as frames
def traced():
    return frames.FRAME_COUNTER
with torch.no_grad():
    model = Model().eval()
    f = tessel.compile(model, target="cpu")
    out["right"] = right(f, model, x)
    out["found"] = found(f)
    out["buffer written"] = model.seen.tolist()
    n = traced()
    out["again"] = right(f, model, x * 2) and right(f, model, x - 1)
    out["traced"] = traced() - n
    out["other shape"] = right(f, model, x[:3])
    out["first shape"] = right(f, model, x)
    model.parts[1].scale = 5
    out["other attribute"] = right(f, model, x)
    m.FACTOR = 0.5
    out["other global"] = right(f, model, x)
    m.FACTOR = 2.0
    model.parts[1].scale = 3
    # Another function compiled from the same code keeps its own record of what was done.
    twin = Model().eval()
    g = tessel.compile(twin, target="cpu", options={"fusion": False})
    out["twin"] = right(g, twin, x)
    out["twin's own"] = len(tessel.explain(g).compilations)
    other = Model().eval()
    seen = []
    def backend(gm, inputs):
        seen.append(gm)
        return gm.forward
    out["torch.compile"] = right(torch.compile(other, backend=backend), other, x)
    out["its own graph"] = len(seen)
"""


def run(folder: Path, script: str) -> dict[str, Any]:
    env = {**os.environ, "TESSEL_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    env.pop("PYTEST_XDIST_WORKER", None)
    got = subprocess.run(
        [sys.executable, "-B", "-c", f"{COMMON}{script}\nprint(json.dumps(out))"],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert got.returncode == 0, got.stderr
    return json.loads(got.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model, and a cache that one process has filled."""
    if not recorded.possible():
        pytest.skip("captures are not recorded with this torch")
    folder = tmp_path_factory.mktemp("captures")
    (folder / "model.py").write_text(MODEL)
    assert run(folder, COLD) == {"right": True, "found": False}
    assert len(list((folder / "cache/captures").iterdir())) == 1
    return folder


def test_found_where_nothing_changed_and_only_there(folder: Path) -> None:
    out = run(folder, WARM)
    same = {"same", "same at the end"}
    calls = ("right", "again", "other shape", "first shape", "other attribute", "other global", "twin", "torch.compile")
    assert [out.pop(c) for c in calls] == [True] * len(calls)
    assert out.pop("found") and out.pop("traced") == 0
    # Eager and compiled calls both add one.
    assert out.pop("buffer written") == [2.0] * 3
    assert out.pop("twin's own") == 1 and out.pop("its own graph") == 1
    assert {k for k, words in out.items() if words == "believed"} == same, json.dumps(out)
    assert all(out.values()) and len(out) > 25, out


@pytest.mark.slow
def test_another_source_is_traced_again(folder: Path) -> None:
    (folder / "model.py").write_text(MODEL.replace("x + 1.0", "x + 1.5"))
    try:
        assert run(folder, COLD) == {"right": True, "found": False}
    finally:
        (folder / "model.py").write_text(MODEL)


@pytest.mark.slow
def test_damaged_records_are_removed(folder: Path) -> None:
    for path in (folder / "cache/captures").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run(folder, COLD) == {"right": True, "found": False}
    assert run(folder, COLD) == {"right": True, "found": True}


@pytest.mark.slow
def test_a_cache_that_others_may_write_to_is_not_read(folder: Path) -> None:
    captures = folder / "cache/captures"
    captures.chmod(0o777)
    try:
        assert run(folder, COLD) == {"right": True, "found": False}
    finally:
        captures.chmod(0o700)


# -- what is not recorded ---------------------------------------------------------------------------


class Grows(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu_().view(-1)


class Breaks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1


class Views(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.view(-1), x + 1


@pytest.mark.parametrize("kind", [Grows, Breaks, Views])
def test_what_needs_work_around_the_graph_is_not_recorded(kind: Callable[[], torch.nn.Module]) -> None:
    import tessel

    if not recorded.possible():
        pytest.skip("captures are not recorded with this torch")
    model, x = kind(), torch.randn(3, 4)
    with torch.no_grad(), recorded.recording() as seen:
        tessel.compile(model, target="cpu", options={"capture_cache": False})(x)
    assert seen.recorded(model.forward, (x,), {}) is None and seen.why


# -- fingerprints -----------------------------------------------------------------------------------


def adds(by: float) -> Callable[[float], float]:
    def inner(x: float) -> float:
        return x + by

    return inner


class A:
    size = 3

    def f(self) -> int:
        return 1


class B(A):
    pass


def test_fingerprints_name_content() -> None:
    one = Fingerprints().of
    assert one(adds(1.0)) == one(adds(1.0)) != one(adds(2.0))
    assert one({"b": 1, "a": [1, (2,)]}) == one({"b": 1, "a": [1, (2,)]}) != one({"a": [1, (2,)], "b": 1})
    assert one({"x", "y", "z"}) == one({"z", "y", "x"})
    different = [0, 0.0, -0.0, False, None, "0", b"0", (), [], {}, torch.float32, "torch.float32", int, float, A, B]
    different += [
        torch.zeros(2),
        torch.zeros(2, 1),
        torch.zeros(2).double(),
        torch.zeros(4)[::2],
        torch.nn.Linear(1, 1),
    ]
    different += [torch.zeros(2, requires_grad=True), torch.nn.Parameter(torch.zeros(2)), torch.nn.Linear(1, 1).eval()]
    different += [functools.partial(adds, 1.0), functools.partial(adds, 2.0), A().f, B().f, len, sum, torch, os]
    assert len({Fingerprints().of(x) for x in different}) == len(different)


def test_a_class_is_named_by_its_methods_and_those_of_its_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Fingerprints().of(B)
    assert before == Fingerprints().of(B)
    monkeypatch.setattr(A, "size", 4)
    assert Fingerprints().of(B) != before
    monkeypatch.undo()
    monkeypatch.setattr(A, "f", lambda self: 2)
    assert Fingerprints().of(B) != before
    monkeypatch.undo()
    assert Fingerprints().of(B) == before
