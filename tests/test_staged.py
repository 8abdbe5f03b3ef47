"""Pipeline stages in real processes over gloo: loss, results and gradients of one device, bytes of the plan."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from groups import environment, free_port, start
from ranks import annotations
from test_partition import Layer
from torch import nn

import tessel
from tessel.errors import TesselError
from tessel.frontend.split import capture_parts
from tessel.runtime.shares import share
from tessel.sharding.captured import capture_model
from tessel.sharding.plan_file import read_plan
from tessel.sharding.planner import Request, make_plan
from tessel.sharding.stage_module import StageModule
from tessel.sharding.staged import Pipeline, Staged, distribute_model
from tessel.solve.pipeline import held
from tessel.targets.mesh import Mesh

DATA = [("shard", "inputs[0]", ("dp", None))]
TENSOR = [("shard", "*.q.weight", ("tp", None)), ("shard", "*.up.weight", ("tp", None))]
# name -> mesh, modules at which parts begin, schedule, annotations, how each rank runs its programs
Cases = dict[str, tuple[dict[str, int], tuple[str, ...], str, list[tuple[Any, ...]], str]]
TWO: Cases = {
    "1f1b": ({"pp": 2}, ("layers.1",), "1f1b", [], "interpreted"),
    "round a V, tied": ({"pp": 2}, ("layers.0", "layers.1", "head"), "zbv", [], "interpreted"),
}
FOUR: Cases = {
    "over data": ({"dp": 2, "pp": 2}, ("layers.1",), "gpipe", DATA, "compiled"),
    "tensors": ({"pp": 2, "tp": 2}, ("layers.1",), "zb1p", TENSOR, "interpreted"),
    "interleaved": ({"pp": 2, "dp": 2}, ("layers.0", "layers.1", "head"), "interleaved", DATA, "interpreted"),
}
ROWS, MICROBATCHES = 8, 4


class Model(nn.Module):
    """A decoder of two layers whose head has the embedding's weight; every layer reads a mask made of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Layer(32, 4) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64, bias=False))
        self.head[1].weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        seen = (ids != 0)[..., None]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x) * seen
        return self.head(x)  # type: ignore[no-any-return]


def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@contextmanager
def counting_alive() -> Iterator[list[int]]:
    """How many microbatches of a part this rank holds at once: [now, at the most]."""
    count = [0, 0]
    forward, left = StageModule.forward, StageModule.gradients_left

    def begins(self: StageModule, *handed: torch.Tensor) -> Any:
        count[0] += 1
        count[1] = max(count)
        return forward(self, *handed)

    def ends(self: StageModule) -> Any:
        rest = left(self)

        def run() -> None:
            rest()
            count[0] -= 1

        return run

    with mock.patch.object(StageModule, "forward", begins), mock.patch.object(StageModule, "gradients_left", ends):
        yield count


def steps(rank: int, cases: Cases) -> None:
    """Every case, on one rank of one group of processes."""
    torch.manual_seed(0)
    module, ids = Model(), torch.randint(64, (ROWS, 8))
    want = module(ids)
    wanted = loss(want, ids)
    wanted.backward()
    for name, (sizes, starts, schedule, lines, run) in cases.items():
        mesh, cut = Mesh(sizes), Pipeline(starts, MICROBATCHES, schedule)
        with counting_alive() as alive:
            placed = distribute_model(
                module, mesh=mesh, args=(ids,), pipeline=cut, loss=loss, annotations=annotations(lines), run=run
            )
            assert isinstance(placed, Staged)
            got = placed.step(ids, target=ids)
        chunks = len(placed.parts)
        most = chunks * held(schedule, mesh["pp"], MICROBATCHES, placed.stage, chunks)
        assert alive == [0, most], f"{name}: stage {placed.stage} held {alive[1]} microbatches of a part, not {most}"
        if got is not None:
            torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(torch.stack(got[1]).mean(), wanted.detach(), rtol=1e-5, atol=1e-6)
        seen = check_gradients(placed, module, mesh, name, rank)
        check_bytes(placed, mesh, name)
        if name == "1f1b":
            assert seen < {n for n, _ in module.named_parameters()}  # what others hold is not here
            with pytest.raises(TesselError, match=r"a model with pipeline stages runs by \.step"):
                placed(ids)
            with pytest.raises(TesselError, match="a loss, which takes a target"):
                placed.step(ids)
            with pytest.raises(TesselError, match="a batch of 6 rows does not divide into 4 microbatches"):
                placed.step(ids[:6], target=ids[:6])


def check_gradients(placed: Staged, module: nn.Module, mesh: Mesh, name: str, rank: int) -> set[str]:
    whole, seen = dict(module.named_parameters()), set()
    for part in placed.parts.values():
        for n, p in part.module.named_parameters():  # type: ignore[union-attr, operator]
            seen.add(n)
            given = whole[n].grad
            assert given is not None and p.grad is not None, f"{name}: {n} has no gradient"
            own = share(given, part.shardings[n], mesh, rank)  # type: ignore[index]
            torch.testing.assert_close(p.grad, own, rtol=1e-3, atol=1e-6, msg=lambda m, n=n: f"{name}: {n}: {m}")
    return seen


def check_bytes(placed: Staged, mesh: Mesh, name: str) -> None:
    """Collectives of each microbatch, tied gradients, and messages to the stages before and after."""
    inside = MICROBATCHES * sum(placed.laid[int(i)].spmd.bytes for i in placed.parts)
    over = {i: placed.laid[i].part for i in range(len(placed.laid))}
    tied = 0
    for _, size, copies in placed._ties:
        tied += (2 * (size - 1) * copies[0].numel() * 4) // size
    assert placed.by.sent.total == inside + tied, name
    stages = {i: placed.laid[i].bytes_handed(mesh) for i in over}
    homes = {i: int(i) for i in map(int, placed.parts)}
    sent = 0
    for i in homes:
        if i + 1 < len(over) and i + 1 not in homes:
            sent += stages[i]
        if i > 0 and i - 1 not in homes:
            sent += stages[i - 1]
    assert placed.handed.bytes == MICROBATCHES * sent, name


def llama(rank: int, folder: Path) -> None:
    """A plan of a Llama by its config runs: its parts, layouts and messages."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plan = read_plan(folder / "plan.json")
    torch.manual_seed(0)
    config = LlamaConfig(**json.loads((folder / "llama.json").read_text()), use_cache=False)
    module, ids = LlamaForCausalLM(config), torch.randint(64, (ROWS, 8))
    want = loss(module(ids).logits, ids)
    want.backward()
    placed = distribute_model(
        module, plan, kwargs={"input_ids": ids}, loss=lambda out, y: loss(out.logits, y), run="interpreted"
    )
    assert isinstance(placed, Staged)
    got = placed.step(input_ids=ids, target=ids)
    if got is not None:
        torch.testing.assert_close(torch.stack(got[1]).mean(), want.detach(), rtol=1e-5, atol=1e-6)
    mesh = Mesh(plan.mesh)
    check_gradients(placed, module, mesh, "llama", rank)
    check_bytes(placed, mesh, "llama")
    messages = [c for c in plan.data["collectives"] if c["kind"] == "send"]
    (own,) = placed.parts
    assert placed.handed.bytes == sum(c["bytes"] * c["times"] for c in messages if c["part"] == int(own))


def process(rank: int, world: int, port: int, cases: Cases, folder: str) -> None:
    environment(rank, world, port, folder)
    try:
        steps(rank, cases)
        if (Path(folder) / "plan.json").exists():
            llama(rank, Path(folder))
    finally:
        dist.destroy_process_group()


def run_processes(world: int, cases: Cases, folder: str) -> None:
    Path(folder).chmod(0o700)
    start(process, world, free_port(), cases, folder)


def test_two_stages_give_what_one_device_gives() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_processes(2, TWO, folder)


@pytest.mark.slow
def test_stages_over_data_and_tensors_and_a_plan() -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 4, "vocab_size": 64, "max_position_embeddings": 32}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.json"
        path.write_text(json.dumps(small))
        named = Path(folder) / "named.json"
        named.write_text(json.dumps({**small, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
        asked = Request(train=True, microbatches=MICROBATCHES, schedule="1f1b", remat="none")
        model = capture_model(f"hf:{named}", batch=ROWS, seq=8, dtype="float32", train=True, microbatches=MICROBATCHES)
        make_plan(model, Mesh({"pp": 2, "dp": 2}), "h100", asked).write(Path(folder) / "plan.json")
        run_processes(4, FOUR, folder)


def parts_of(starts: tuple[str, ...], train: bool = False) -> Any:
    return capture_parts(Model(), (torch.randint(64, (2, 8)),), None, Pipeline(starts, 2).part_of, train=train)


def test_a_part_computes_what_no_parameter_flows_into() -> None:
    first, second = parts_of(("layers.1",))
    assert (first.handed, first.step.results, second.handed, second.step.results) == (0, 1, 1, 1)
    assert list(first.step.positions.values()) == [0]
    assert sorted(second.step.positions.values()) == [0, 1]  # the tokens, for the mask, and what the first part made
    names = [{str(n.attrs["name"]) for n in p.step.forward.graph.inputs} for p in (first, second)]
    assert "embed.weight" in names[0] and "embed.weight" in names[1]
    assert any(n.startswith("layers.0.") for n in names[0]) and not any(n.startswith("layers.0.") for n in names[1])


def test_impossible_cuts() -> None:
    with pytest.raises(TesselError, match="no parameter is used first in 'layers.7'"):
        parts_of(("layers.7",))
    with pytest.raises(TesselError, match="not in this order"):
        parts_of(("layers.1", "layers.0"))
    with pytest.raises(TesselError, match="part 1 uses a parameter before part 0 is done"):
        capture_parts(
            Model(), (torch.randint(64, (2, 8)),), None,
            lambda names: {n: [0 if "layers.1" in n else 1] for n in names}, train=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"mesh": {"pp": 2}}, "say where stages begin"),
        ({"mesh": {"dp": 2}, "loss": loss}, "a loss is for stages"),
        ({"mesh": {"pp": 2}, "pipeline": Pipeline(("layers.1",), 3)}, "8 rows does not divide into 3"),
        ({"mesh": {"pp": 2}, "pipeline": Pipeline(("layers.0", "layers.1"), 4)}, "3 parts do not make 2 stages"),
        ({"mesh": {"pp": 2}, "pipeline": Pipeline(("layers.1",), 4, "interleaved")}, "there is no such schedule"),
        ({"mesh": {"pp": 2}, "pipeline": Pipeline(("layers.1",), 4, "2f2b")}, "unknown schedule '2f2b'"),
        ({"mesh": {"pp": 2}, "pipeline": Pipeline(("layers.1",), 4), "train": True}, "trains with a loss"),
        ({"mesh": {"pp": 2}, "pipeline": Pipeline(("layers.1",), 4), "init": len}, "init is for meshes without stages"),
    ],
)
def test_impossible_stages(asked: dict[str, Any], words: str) -> None:
    given = {**asked, "mesh": Mesh(asked["mesh"])}
    with pytest.raises(TesselError, match=words):
        tessel.distribute(Model(), args=(torch.randint(64, (8, 8)),), **given)
