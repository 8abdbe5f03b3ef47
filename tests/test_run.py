"""``tessel run`` on real processes: plans with microbatches and with stages, checked against one device; errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from groups import free_port, start

from tessel.cli import main
from tessel.cli.model import as_planned
from tessel.cli.run import run as run_command
from tessel.sharding.plan_file import ShardingPlan, read_plan

MODEL = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Its head has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make():
    torch.manual_seed(0)
    return Model(), (torch.randint(32, (8, 4)),)


def other():
    return nn.Linear(4, 4), (torch.ones(8, 4),)
'''


def tessel(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and plans of it."""
    path = tmp_path_factory.mktemp("run")
    (path / "model.py").write_text(MODEL)
    both = ("plan", f"{path / 'model.py'}:make", "--target", "h100", "--train", "--microbatches", 4)
    for name, more in (
        ("microbatches", ("--mesh", "dp=2", "--zero", 1)),
        ("stages", ("--mesh", "pp=2", "--schedule", "zb1p")),
        ("others", ("--mesh", "tp=2")),
    ):
        made = tessel(*both, *more, "-o", path / f"{name}.json")
        assert made.exit_code == 0, made.output
    return path


def process(rank: int, world: int, folder: str, ports: list[int], out: str) -> None:
    """All plans, one after the other, each in a group of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", TESSEL_CACHE_DIR=folder)
    os.environ["CXX"] = "/nonexistent"  # operators by torch: what is compiled is tested elsewhere
    with Path(out).with_suffix(f".{rank}").open("w") as f:
        os.dup2(f.fileno(), 1)
    for name, port in zip(("microbatches", "stages"), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        run_command.main(
            [f"{folder}/{name}.json", f"{folder}/model.py:make", "--check", "--steps", "1"], standalone_mode=False
        )


def test_microbatches_and_stages_run_and_are_checked(folder: Path) -> None:
    folder.chmod(0o700)
    start(process, 2, str(folder), [free_port() for _ in range(2)], str(folder / "out"))
    said = (folder / "out.0").read_text()
    assert (folder / "out.1").read_text() == ""
    checks = [line for line in said.splitlines() if line.startswith("check: ")]
    assert len(checks) == 2 and all("results and gradients of 2 ranks are one device's" in c for c in checks), said
    assert said.count("as the plan's program says") == 2
    assert "stage 1" in said and "rank 1: " in said and "to other stages" in said
    parts = read_plan(folder / "stages.json").data["tensors"]["embed.weight"]["parts"]
    assert parts == [0, 1]  # kept by both stages, and its gradients are added up


def test_what_a_plan_says_of_its_model() -> None:
    """What it was planned with, else what its parameters and inputs tell; what is asked for comes first."""
    tensors = {"a": {"shape": [2], "dtype": "f32"}, "b": {"shape": [64, 2], "dtype": "bf16"}}
    settings = {"global_batch": 8, "seq": 16}
    data = {"model": {"name": "hf:x.json"}, "settings": settings, "tensors": tensors}
    ids, images = ({"x": {"dtype": t}} for t in ("i64", "f32"))
    size = {"batch": 8, "seq": 16, "dtype": "bf16"}
    assert as_planned(ShardingPlan(data), "hf:y.json") == size
    assert as_planned(ShardingPlan({**data, "inputs": ids}), "hf:y.json", layers=2) == {**size, "layers": 2}
    assert "seq" not in as_planned(ShardingPlan({**data, "inputs": images}), "hf:y.json")
    assert as_planned(ShardingPlan(data), "m.py:make", meta=True) == {}
    said = {**data, "model": {"name": "hf:x.json", "parameters": 2**30, "given": {"dtype": "f16"}}}
    assert as_planned(ShardingPlan(said), "hf:y.json", meta=True) == {"dtype": "f16", "device": "meta"}
    assert as_planned(ShardingPlan(said), "hf:y.json", dtype="f32") == {"dtype": "f32"}
    assert as_planned(ShardingPlan(said), "m.py:make") == {}
    assert as_planned(ShardingPlan({**said, "program": {}}), "hf:bert", meta=True) == {"dtype": "f16"}


def test_without_torchrun_it_says_how_to_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    got = tessel("run", folder / "stages.json", "model.py:make")
    assert got.exit_code == 2
    assert "torchrun --nproc-per-node 2 -m tessel run" in got.output


@pytest.mark.slow
def test_ranks_that_read_different_plans_stop_together(folder: Path) -> None:
    """What both find is said once, and nobody waits for a group that the other does not make."""
    plan = f"$([ $RANK = 0 ] && echo {folder}/microbatches.json || echo {folder}/others.json)"
    each = f'exec {sys.executable} -m tessel run {plan} "{folder}/model.py:make" --timeout 60'
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TESSEL_CACHE_DIR": str(folder), "CXX": "/nonexistent"}
    done = subprocess.run(
        [*start, "--no-python", "bash", "-c", each], env=env, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode != 0
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("Error: rank "))
    assert re.search(r"collective \d+ of the step is .* on rank 0 and .* on rank 1$", said), said
