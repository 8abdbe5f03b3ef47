"""Plans that run: what the user annotated holds, the program is the plan's, and a changed one is refused."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from ranks import same_as_one_device
from torch import nn

import tessel
from tessel.errors import TesselError
from tessel.frontend.joint import Step, capture_step
from tessel.sharding.plan_file import ShardingPlan, parse_plan
from tessel.sharding.planned import lay_out_plan


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Model(nn.Module):
    """An embedding, two blocks and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


MESH = tessel.Mesh({"dp": 2, "tp": 2})
ANNOTATED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("blocks.*.up.weight", ("tp", None), {}),
    ("blocks.*.up.bias", ("tp",), {}),
    ("blocks.0.down.weight", (None, "tp"), {}),
    ("blocks.1.down.weight", (None, ("tp", "dp")), {"gather": ["dp"]}),
    ("inputs[0]", ("dp", None), {}),
]


@cache
def planned() -> tuple[nn.Module, torch.Tensor, ShardingPlan, Step]:
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(32, (4, 8))
    with tessel.annotate(model) as a:
        for name, dims, options in ANNOTATED:
            a.shard(name, dims, **options)
        a.output("blocks.0", ("dp", "tp", None))
        a.replicate("blocks.1.norm.weight")
    plan = tessel.plan(model, (ids,), mesh=MESH, target="h100", train=True)
    return model, ids, parse_plan(plan.text()), capture_step(model, (ids,), train=True)


def test_annotations_hold_and_the_rest_is_chosen() -> None:
    model, ids, plan, step = planned()
    tensors = plan.data["tensors"]
    assert tensors["blocks.0.up.weight"]["sharding"] == tensors["blocks.1.up.weight"]["sharding"] == "{tp,·}"
    assert tensors["blocks.0.down.weight"]["sharding"] == "{·,tp}"
    last = tensors["blocks.1.down.weight"]
    assert (last["sharding"], last["use"]) == ("{·,tp.dp}", "{·,tp}")
    assert tensors["blocks.1.norm.weight"]["sharding"] == "{·}"
    assert [x["sharding"] for x in plan.data["inputs"].values()] == ["{dp,·}"]
    assert plan.data["aliases"] in ({"head.weight": "embed.weight"}, {"embed.weight": "head.weight"})
    result = next(n for n in plan.data["nodes"] if n["name"] == "blocks.0:add#2")
    assert result["makes"] == ["{dp,tp,·}"]
    spmd = lay_out_plan(plan, step)
    same_as_one_device(spmd, model, [ids])
    assert spmd.bytes == plan.data["program"]["bytes"] > 0


def test_a_model_without_weights_gives_the_same_plan() -> None:
    _, ids, plan, _ = planned()
    with torch.device("meta"):
        empty = Model()
    with tessel.annotate(empty) as a:
        for name, dims, options in ANNOTATED:
            a.shard(name, dims, **options)
        a.output("blocks.0", ("dp", "tp", None))
        a.replicate("blocks.1.norm.weight")
    other = tessel.plan(empty, (ids.to("meta"),), mesh=MESH, target="h100", train=True)
    for section in ("model", "tensors", "nodes", "program"):
        assert other.data[section] == plan.data[section], section


def changed(plan: ShardingPlan, change: Any) -> ShardingPlan:
    data = copy.deepcopy(dict(plan.data))
    change(data)
    return ShardingPlan(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("program"), "holds no program.*--whole"),
        (lambda d: d["nodes"].pop(), r"the plan has \d+ nodes, the model's graph \d+"),
        (lambda d: d["nodes"][0].update(name="other:add"), "the plan's node is other:add where the model's graph has"),
        (lambda d: d["settings"].update(train=False), "the plan is for inference, the model is run for the other"),
        (lambda d: d["program"]["collectives"][0].update(bytes=1), "collective 0 of the plan is .* 1 bytes"),
        (lambda d: d["program"]["collectives"].pop(), r"the plan has \d+ collectives, the program"),
        (
            lambda d: d["program"]["collectives"][0].update(beside=99),
            "in call 0 beside 99 operations, .* the program that",
        ),
        (lambda d: d["settings"].update(bucket_bytes=0, in_flight_bytes=0), "collective . of the plan is .* in call"),
        (
            lambda d: next(n for n in d["nodes"] if n["name"] == "blocks.0.up:matmul").update(splits={"dp": "q"}),
            "blocks.0.up:matmul: dp splits 'q'; matmul has",
        ),
        (
            lambda d: next(n for n in d["nodes"] if n["name"] == "blocks.0.up:matmul").update(splits={"dp": "m"}),
            "the program that its nodes give",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, words: str) -> None:
    _, _, plan, step = planned()
    with pytest.raises(TesselError, match=words):
        lay_out_plan(changed(plan, change), step)


@pytest.mark.parametrize(
    ("method", "name", "dims", "words"),
    [
        ("shard", "blocks.0.up.weight", ("dp", None), "test_planned.py.*|no way to run it fits"),
        ("shard", "blocks.0.up.weight", (("tp", "dp"), None), "in the order of the mesh.*: dp.tp, not tp.dp"),
        ("shard", "blocks.7.up.weight", ("tp", None), "nothing has such a name"),
        ("output", "blocks.0", ("dp", "xx", None), "names mesh axis 'xx'"),
    ],
)
def test_annotations_that_no_plan_keeps(method: str, name: str, dims: tuple[Any, ...], words: str) -> None:
    with torch.device("meta"):
        model, ids = Model(), torch.zeros(4, 8, dtype=torch.long)
    with tessel.annotate(model) as a:
        getattr(a, method)(name, dims)
    with pytest.raises(TesselError, match=words) as e:
        tessel.plan(model, (ids,), mesh=MESH, target="h100", train=True)
    assert "test_planned.py:" in str(e.value)
