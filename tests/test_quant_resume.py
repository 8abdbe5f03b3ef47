"""An interrupted run goes on where it was, and gives what an uninterrupted one gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tessel
from tessel.cli import main
from tessel.errors import TesselError
from tessel.quant.linear import QuantLinear

files = pytest.importorskip("safetensors.torch")

SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Stack(nn.Module):
    def __init__(self, blocks, width):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def make():
    torch.manual_seed(0)
    return Stack(10, 512), (torch.randn(2, 512),)

def data():
    g = torch.Generator().manual_seed(1)
    for _ in range(2):
        yield torch.randn(600, 512, generator=g)
"""


def test_interrupted_and_started_again(tmp_path: Path) -> None:
    """A real SIGINT in the middle; the second run takes what is finished, and the files are equal bit by bit."""
    source = tmp_path / "mine.py"
    source.write_text(SOURCE)
    out, work = tmp_path / "out", tmp_path / "out/.unfinished"
    args = ["quantize", f"{source}:make", "--scheme", "w4a16-g64", "--method", "gptq"]
    args += ["--calibration", f"{source}:data", "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tessel", *args, str(out)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells may ignore it
    )  # fmt: skip
    end = time.monotonic() + 120
    while len(list(work.glob("*.safetensors"))) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    finished = len(list(work.glob("*.safetensors")))
    assert 3 <= finished < 16 and not [p for p in work.iterdir() if p.name.startswith(".")], "no half files"
    assert f"finished layers are in {work}; the same command goes on from there" in said and "Traceback" not in said
    assert not (out / "model.safetensors").exists()

    other = CliRunner().invoke(main, [*args, str(out), "--method", "rtn"])
    assert other.exit_code == 2 and "holds another run: method was 'gptq', now 'rtn'" in other.output
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as the process before: sums in the same order
        done = CliRunner().invoke(main, [*args, str(out)])
        fresh = CliRunner().invoke(main, [*args, str(tmp_path / "fresh")])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    assert f"{finished} layers were finished by an earlier run" in done.output and not work.exists()
    assert fresh.exit_code == 0 and "earlier run" not in fresh.output
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "fresh/model.safetensors").read_bytes()


class Stopped(Exception):
    pass


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def stop_after(count: int) -> Any:
    def progress(name: str, done: int, total: int) -> None:
        if not name.startswith(("measuring", "pricing")) and done == count:
            raise Stopped

    return progress


DATA = [torch.randn(100, 64, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("w4a16-g32", {"method": "awq+gptq"}),
        ("nf4", {"method": "hadamard"}),
        ("w4a8-g32-asym", {"method": "smoothquant"}),
        (None, {"budget": "5bits", "method": "gptq"}),
    ],
)
def test_every_kind_of_layer_is_kept(scheme: str | None, more: dict[str, Any], tmp_path: Path) -> None:
    model, folder = small_model(), tmp_path / "work"
    with pytest.raises(Stopped):
        tessel.quantize(model, scheme, DATA, **more, work=folder, progress=stop_after(2))
    again = tessel.quantize(model, scheme, DATA, **more, work=folder)
    want = tessel.quantize(model, scheme, DATA, **more)
    assert again.quantization.resumed == 2 and want.quantization.resumed == 0
    assert again.quantization.layers == want.quantization.layers
    for a, b in zip(again, want):
        if isinstance(b, QuantLinear):
            assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    x = torch.randn(3, 64)
    assert torch.equal(again(x), want(x))


def damage(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def change_format(folder: Path) -> None:
    said = json.loads((folder / "work.json").read_text())
    (folder / "work.json").write_text(json.dumps({**said, "format": 9}))


@pytest.mark.parametrize(
    ("break_it", "change", "words"),
    [
        (None, {"scheme": "w3a16-g32"}, r"holds another run: scheme was .*'w4a16-g32'.*, now .*'w3a16-g32'"),
        (None, {"calibration": [DATA[0] + 1e-6]}, "the calibration data differ"),
        (None, {"model": small_model(1)}, "the model's weights differ"),
        (None, {"skip": ("0",)}, "skip was"),
        (damage("0.safetensors", "half"), {}, "0.safetensors cannot be read.*; delete that file"),
        (damage("work.json", "{"), {}, "work.json cannot be read.*; delete the folder"),
        (change_format, {}, "format 9; 1 is what can be read"),
    ],
)
def test_another_run_and_damaged_files_are_refused(break_it: Any, change: Any, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    given = {"model": small_model(), "scheme": "w4a16-g32", "calibration": DATA, "method": "gptq", "work": folder}
    with pytest.raises(Stopped):
        tessel.quantize(**given, progress=stop_after(1))
    if break_it is not None:
        break_it(folder)
    with pytest.raises(TesselError, match=words):
        tessel.quantize(**{**given, **change})


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TesselError, match="holds files of something else"):
        tessel.quantize(small_model(), "w8a16", work=tmp_path)
    with pytest.raises(TesselError, match="is no folder"):
        tessel.quantize(small_model(), "w8a16", work=tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
