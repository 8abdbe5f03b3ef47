"""Proofs that the programs of all ranks compute one device's graph; and every planted fault is found, at its node."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ranks import annotations
from test_partition_models import data, sequence, tensor
from torch import nn

from tessel.cli import main
from tessel.frontend.joint import capture_step
from tessel.ir.node import Builder, Graph, Node, Value, make_input
from tessel.ir.sharding import Sharding
from tessel.ir.types import TensorType
from tessel.models import load_model
from tessel.ops import OPS
from tessel.passes.partition import Program, partition
from tessel.passes.shard import Seed, propagate
from tessel.sharding.spmd import Spmd, lay_out
from tessel.sharding.verify import verify_program, verify_ranks
from tessel.targets.mesh import Mesh

S = Sharding.parse


class Block(nn.Module):
    """A decoder layer with biases and a table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (4, -1)).transpose(1, 2)

        x = self.table(ids)
        y = self.norm(x)
        q, k, v = heads(self.q(y)), heads(self.k(y)), heads(self.v(y))
        got = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(got.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


LINES: dict[str, list[tuple[Any, ...]]] = {
    "tensor": [("shard", n, ("tp", None)) for n in ("q.weight", "up.weight", "table.weight")],
    "data": [("shard", "inputs[0]", ("dp", None))],
    "sequence": [
        ("shard", "inputs[0]", (None, "tp")),
        *(("shard", n, ("tp", None)) for n in ("q.weight", "k.weight", "v.weight", "up.weight")),
    ],
}


@cache
def laid(mesh: tuple[tuple[str, int], ...], *parts: str) -> Spmd:
    torch.manual_seed(0)
    step = capture_step(Block(), (torch.randint(0, 12, (2, 8)),), train=True)
    lines = [line for p in parts for line in LINES[p]]
    return lay_out(step, Mesh(dict(mesh)), annotations(lines), whole_results=False)


TENSOR = ((("tp", 2),), "tensor")
SEQUENCE = ((("tp", 2),), "sequence")


@pytest.mark.parametrize(
    "how",
    [TENSOR, SEQUENCE, ((("dp", 2), ("tp", 2)), "data", "tensor"), ((("dp", 2), ("tp", 4)), "data", "tensor")],
)
def test_programs_are_proved(how: tuple[Any, ...]) -> None:
    spmd = laid(*how)
    for program in spmd.programs():
        report = verify_program(program)
        assert report.proved, report.text()
        free = sum(n.op.name in ("full", "iota") for n in program.graph.nodes)
        assert report.operations == len(program.graph.nodes) - free
        assert report.collectives == len(program.collectives())
        assert report.opaque.total() < report.operations / 4


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bert"])
def test_models_are_proved(name: str) -> None:
    """Forward and backward under data, tensor and sequence parallelism, in seconds."""
    pytest.importorskip("transformers")
    model, args, kwargs = load_model(f"hf:{name}", layers=1, batch=4, seq=8, device="meta")
    step = capture_step(model, args, kwargs, train=True)
    lines = [*data(name), *tensor(name), *sequence(name, "dp")]
    for program in lay_out(step, Mesh({"dp": 2, "tp": 2}), annotations(lines)).programs():
        report = verify_program(program, seconds=60)
        assert report.proved, report.text()


def test_cli(tmp_path: Path) -> None:
    config, plan = tmp_path / "c.json", tmp_path / "plan.json"
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 4, "vocab_size": 96}
    config.write_text(json.dumps({"model_type": "gpt2", **sizes}))
    asked = ("--mesh", "dp=2,tp=2", "--target", "h100", "--global-batch", "4", "--seq", "8", "--no-whole")
    run = CliRunner().invoke
    assert run(main, ["plan", f"hf:{config}", *asked, "-o", str(plan)]).exit_code == 0
    got = run(main, ["verify", str(plan), f"hf:{config}"])
    assert got.exit_code == 0 and "proved: 4 ranks compute what one device computes" in got.output, got.output
    config.write_text(json.dumps({"model_type": "gpt2", **sizes, "n_embd": 128}))
    other = run(main, ["verify", str(plan), f"hf:{config}"])
    assert other.exit_code == 2 and "in the model and [96, 64] in the plan" in other.output, other.output


# ---------------------------------------------------------------- planted faults

Change = Callable[[int, Builder, Node], "Value | None"]


def mutated(program: Program, change: Change) -> list[Graph]:
    """The ranks' graphs with some nodes replaced."""
    graphs = []
    for rank in range(program.mesh.devices):
        graphs.append(program.rank(rank).rewrite(lambda b, n, r=rank: change(r, b, n)))  # type: ignore[misc]
    assert any(a.nodes != program.rank(r).nodes for r, a in enumerate(graphs))
    return graphs


def first(op: str, module: str, by: Callable[[int, Builder, Node], Value | None]) -> Change:
    """Change the nodes of an operator in a module."""
    return lambda r, b, n: by(r, b, n) if n.op.name == op and n.loc.module == module else None


def other(op: str | None = None, **attrs: Any) -> Callable[[int, Builder, Node], Value]:
    """The node with another operator or other attributes."""
    return lambda r, b, n: b.add(OPS[op or n.op.name], *n.args, **({**n.attrs, **attrs} if attrs else n.attrs))


def gone(r: int, b: Builder, n: Node) -> Value:
    return n.args[0]  # type: ignore[no-any-return]


def bias(r: int, b: Builder, n: Node) -> Value:
    return next(i.out for i in b.inputs if i.attrs["name"] == "down.bias")


@pytest.mark.parametrize(
    ("how", "change", "words"),
    [
        # the add after it is the first that needs the sum
        (TENSOR, first("all_reduce", "down", gone), r"add at .*: reads .* as \{·,·,·\|tp:sum\}: element 0 of rank 0"),
        # means and differences of terms are terms; squares are not
        (TENSOR, first("all_reduce", "table", gone), r"mul at .* in norm: reads .*tp:sum"),
        (TENSOR, first("full", "down", bias), r"add at .* in down: reads .* combined over tp: for some values"),
        (TENSOR, first("all_reduce", "o", other(combine="max")), r"all_reduce at .* in o: all_reduce over tp of"),
        (TENSOR, first("embedding", "table", other(offset=0)), "embedding at .* in table: offset is 0 on rank 1, .* 6"),
        (TENSOR, first("sum", "norm", other("amax")), r"amax at .* in norm \(one device computes sum\): reads"),
        (SEQUENCE, first("all_gather", "up", other(dim=0)), r"all_gather at .* in up: .* over tp of .* makes no share"),
        (
            SEQUENCE,
            first("reduce_scatter", "o", other(dim=0)),
            r"add at .*: reads .*\{·,tp,·\}; .*\{tp,·,·\}: operand 1 comes as",
        ),
        (
            TENSOR,
            lambda r, b, n: gone(r, b, n) if r == 1 and n.op.name == "all_reduce" and n.loc.module == "o" else None,
            r"in o: rank 0 runs all_reduce where rank 1 runs add: they would wait",
        ),
    ],
)
def test_faults_are_found(how: tuple[Any, ...], change: Change, words: str) -> None:
    program = laid(*how).forward
    report = verify_ranks(program, mutated(program, change))
    assert len(report.faults) == 1, report.text()
    assert re.search(words, report.faults[0]), report.faults[0]


def small(seeds: dict[str, str], mesh: Mesh, leaves: str, op: str = "") -> Program:
    """``x [8, 8]`` from one sharding to another, with the mean of its rows if asked."""
    x = make_input("x", TensorType((8, 8), torch.float32))
    b = Builder([x])
    y = b.add(OPS["sum"], x.out, dims=(0,), keepdim=False) if op == "sum" else x.out
    graph = b.finish([y])
    return partition(graph, mesh, propagate(graph, mesh, [Seed(x.out, S(seeds["x"]), "x")]), outputs={0: S(leaves)})


MESH = Mesh({"a": 2, "b": 2})


@pytest.mark.parametrize(
    ("before", "after", "op", "change", "words"),
    [
        # ranks swapped in a permute
        ("{a.b,·}", "{b.a,·}", "collective_permute", {"sources": (0, 1, 2, 3)}, "output 0 leaves as {a.b,·}"),
        ("{a.b,·}", "{b.a,·}", "collective_permute", {"sources": (0, 2, 3, 1)}, "makes no share of it"),
        # along the wrong axis of the mesh, or of the tensor
        ("{a,b}", "{a,·}", "all_gather", {"axes": ("a",)}, "all_gather over a of x f32[8,8] as {a,b} makes no share"),
        ("{a,·}", "{·,·}", "all_gather", {"dim": 1}, "makes no share of it"),
        ("{a,·}", "{·,a}", "all_to_all", {"split": 0, "join": 1}, "makes no share of it"),
        ("{·,·}", "{a,·}", "slice", {"start": 0}, "makes no share of it"),
        ("{·,·}", "{a,·}", "slice", {"dim": 1}, "output 0 leaves as {·,a}, it is to be {a,·}"),
    ],
)
def test_faults_of_moves(before: str, after: str, op: str, change: dict[str, Any], words: str) -> None:
    program = small({"x": before}, MESH, after)
    assert verify_program(program).proved
    graphs = mutated(program, lambda r, b, n: other(**change)(r, b, n) if n.op.name == op else None)
    report = verify_ranks(program, graphs)
    assert len(report.faults) == 1 and words in report.faults[0], report.text()


def test_a_mean_for_a_sum() -> None:
    program = small({"x": "{a,·}"}, MESH, "{·}", "sum")
    assert verify_program(program).proved

    def mean(r: int, b: Builder, n: Node) -> Value | None:
        return b.add(OPS["div"], b.append(n).out, 4.0) if n.op.name == "sum" else None

    report = verify_ranks(program, mutated(program, mean))
    assert "div at" in report.faults[0] and "nothing more here" in report.faults[0]


def test_an_input_of_another_share() -> None:
    program = small({"x": "{a,·}"}, MESH, "{a,·}")
    program.inputs = (S("{·,a}"),)
    (fault,) = verify_ranks(program, [small({"x": "{a,·}"}, MESH, "{a,·}").rank(r) for r in range(4)]).faults
    assert fault == "input x of rank 0 is [4, 8], its share as {·,a} is [8, 4]"


def test_time_is_limited() -> None:
    report = verify_program(laid(*TENSOR).forward, seconds=0.0)
    assert not report.faults and not report.proved and "the time was over" in report.unproved[0]
