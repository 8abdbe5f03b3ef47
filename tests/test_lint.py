"""What lint finds in five bad plans, and what is said to bad input, one line an item."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ranks import annotations

from tessel.cli import main
from tessel.errors import TesselError
from tessel.frontend.joint import capture_step
from tessel.models import load_model
from tessel.passes.partition import Program
from tessel.sharding.captured import parameters_of
from tessel.sharding.plan_file import parse_plan, read_plan
from tessel.sharding.spmd import lay_out
from tessel.sharding.text import findings
from tessel.targets.mesh import Mesh

BAD = Path(__file__).parent / "data/bad_plans"
MODEL = f"hf:{BAD / 'model.json'}"


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("transformers")
    return load_model(MODEL, dtype="bfloat16", device="meta")[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "tp_over_kv_heads",
            [
                f"model.layers.0.self_attn.{n}_proj.weight: split in 4 (tp=4), the model has 2 key and value heads"
                for n in "kv"
            ],
        ),
        ("over_memory", ["memory: 878.75 KiB a device, more than the limit of 488.28 KiB"]),
        (
            "groups_cut",
            ["model.layers.0.mlp.down_proj.weight: shards of 32 columns cut groups of 64 that share a scale"],
        ),
        ("uneven_sequence", ["sequence: 18 does not divide by 4 (tp)"]),
    ],
)
def test_bad_plans(model: Any, name: str, words: list[str]) -> None:
    """Each has what is wrong with it, and nothing else."""
    found = findings(read_plan(BAD / f"{name}.json"), parameters_of(model), model.config.to_dict(), 64)
    assert found == words


def test_a_mesh_that_is_not_the_world() -> None:
    with pytest.raises(TesselError, match=r"mesh dp=2,tp=4 has 8 devices, world says 16"):
        read_plan(BAD / "mesh_is_not_world.json")
    got = CliRunner().invoke(main, ["lint", str(BAD / "mesh_is_not_world.json"), MODEL])
    assert got.exit_code == 1 and "has 8 devices, world says 16" in got.output


def test_lint_exits_with_1() -> None:
    pytest.importorskip("transformers")
    got = CliRunner().invoke(main, ["lint", str(BAD / "tp_over_kv_heads.json"), MODEL, "--world", "8"])
    assert got.exit_code == 1 and "2 findings" in got.output
    got = CliRunner().invoke(main, ["lint", str(BAD / "over_memory.json"), MODEL, "--world", "4"])
    assert got.exit_code == 1 and "for 8 devices (dp=2,tp=4), this run has 4" in got.output


# ---------------------------------------------------------------- bad input


class Twice(torch.nn.Module):
    """A custom operator between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(doubled(self.a(x)))  # type: ignore[no-any-return]


@torch.library.custom_op("tessel_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def laid(mesh: dict[str, int], *lines: tuple[Any, ...]) -> Program:
    step = capture_step(Twice(), (torch.randn(4, 8),), train=False)
    return lay_out(step, Mesh(mesh), annotations(lines), whole_results=False).forward


def test_a_custom_operator_is_kept_whole_and_said_so() -> None:
    program = laid({"dp": 2}, ("shard", "inputs[0]", ("dp", None)))
    (said,) = program.warnings
    assert re.fullmatch(
        r"tessel_tests\.doubled\.default at .*test_lint\.py:\d+ is computed whole on every device: no dims string says "
        r"how a custom operator may be split",
        said,
    )
    assert [c.kind for c in program.collectives()] == ["all_gather"]


@pytest.mark.parametrize(
    ("mesh", "line", "words"),
    [
        ({"dp": 2}, ("shard", "inputs[0]", ("xx", None)), r"'inputs\[0\]' .* names mesh axis 'xx'; the mesh has dp"),
        ({"dp": 2}, ("shard", "inputs[0]", ("dp", "dp")), "mesh axis 'dp' is used twice"),
        ({"dp": 3}, ("shard", "inputs[0]", ("dp", None)), r"dim 0 of size 4 does not divide by 3 \(dp=3\)"),
        ({"dp": -2}, ("shard", "inputs[0]", ("dp", None)), "'dp' has size -2"),
        ({"dp": 2}, ("shard", "a.weight", ("dp", None, None)), r"3 dims are given, f32\[8,8\] has 2"),
        ({"dp": 2}, ("shard", "a.wait", ("dp", None)), r"nothing has such a name; did you mean .*a\.weight"),
    ],
)
def test_bad_annotations(mesh: dict[str, int], line: tuple[Any, ...], words: str) -> None:
    with pytest.raises(TesselError, match=words) as e:
        laid(mesh, line)
    assert len(str(e.value)) < 600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # texts of a plan are data: none is run, and none that is no name of an axis is taken for one
        (lambda t: t.replace('"name":"dp"', "\"name\":\"__import__('os').system('id')\""), "does not match"),
        (lambda t: t.replace("{·,·}", "{eval,·}"), "names mesh axis 'eval'; the mesh has dp, tp"),
        (lambda t: t.replace('"size":2', '"size":-2', 1), "size: -2 is not from 1"),
        (lambda t: t.replace('"size":2', '"size":' + "9" * 300, 1), "a number of 300 digits"),
        (lambda t: t.replace('"size":2', '"size":1e400', 1), "expected integer|is no number"),
        (lambda t: t[: len(t) // 2], "no JSON: .*cut off"),
        (lambda t: "[" * 100_000, "nested deeper than 16"),
        (lambda t: '{"a":' * 17 + "0" + "}" * 17, "nested deeper than 16"),
        (lambda t: t.replace('"size":4', '"size":8', 1), "has 16 devices, world says 8"),
        (lambda t: t.replace('"version":1', '"version":9'), "version 9 of the format; this Tessel reads versions 1 to"),
    ],
)
def test_hostile_plans(change: Any, words: str) -> None:
    text = (BAD / "uneven_sequence.json").read_text(encoding="utf-8")
    changed = change(text)
    assert changed != text
    with pytest.raises(TesselError, match=words) as e:
        parse_plan(changed)
    assert len(str(e.value)) < 600


def test_a_plan_for_another_model(model: Any) -> None:
    plan = read_plan(BAD / "uneven_sequence.json")
    other = [(n, tuple(2 * d for d in shape), dtype) for n, shape, dtype in parameters_of(model)]
    found = findings(plan, other[:-1], {})
    assert any("lm_head.weight: in the plan, not in the model" in f for f in found)
    assert any("embed_tokens.weight: bf16[128, 64] in the plan, bf16[256, 128] in the model" in f for f in found)
