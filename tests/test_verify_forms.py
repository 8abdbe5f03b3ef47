"""Proofs for every form of parallelism: plans of transformers' models, stage by stage where there are stages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from dist_rows import FAMILIES, MICROBATCHES, Row, annotations, build, rows_of
from ranks import annotations as lines
from ranks import counts
from test_staged import MICROBATCHES as PARTS
from test_staged import TENSOR, Model

from tessel.cli import main
from tessel.frontend.joint import capture_step
from tessel.ir.sharding import Sharding
from tessel.sharding.parts import CutModel, Pipeline, cut_model
from tessel.sharding.plan_file import parse_plan
from tessel.sharding.planned import lay_out_plan, plan_model
from tessel.sharding.planner import Request
from tessel.sharding.verify import verify_program
from tessel.sharding.verify_stages import faults_between, handed_inputs, verify_stages
from tessel.targets.mesh import Mesh

pytest.importorskip("transformers")

ROWS = rows_of(2)
# one row for every form; `make test-dist` proves all
FEW = {"llama:ring", "llama:ulysses", "gpt2:fsdp", "bert:tp", "bert:tp+sp", "vit:dp", "mixtral:ep", "llama:pp"}
ALL = "TESSEL_TEST_DIST" in os.environ
SHOWN = [r for r in ROWS if ALL or r.key in FEW]


@pytest.mark.slow
@pytest.mark.parametrize("row", SHOWN, ids=[r.key for r in SHOWN])
def test_plans_are_proved(row: Row) -> None:
    module, kwargs = build(row.name, 2 if "pp" in row.mesh else 1)
    said = annotations(row, module)
    if "pp" in row.mesh:
        cut = Pipeline((FAMILIES[row.name].second,), MICROBATCHES, "1f1b")
        made = cut_model(module, (), kwargs, row.mesh, pipeline=cut, annotations=said, train=True)
        for name, report in verify_stages(made):
            assert report.proved, f"{row.key}: {name}: {report.text()}"
        return
    request = Request(train=True, remat="none")
    plan = plan_model(module, (), kwargs, mesh=row.mesh, target="h100", request=request, annotations=said)
    spmd = lay_out_plan(parse_plan(plan.text()), capture_step(module, (), kwargs, train=True))
    for program in spmd.programs():
        report = verify_program(program)
        assert report.proved, f"{row.key}: {report.text()}"
        assert report.collectives == len(program.collectives())


def test_every_form_is_there() -> None:
    forms = {"dp", "fsdp", "tp", "tp+sp", "ring", "ulysses", "ep", "pp"}
    assert forms <= {r.how for r in ROWS} and {k.partition(":")[2] for k in FEW} == forms
    assert {r.key for r in ROWS} >= FEW


# ---------------------------------------------------------------- stages


def stages() -> CutModel:
    return cut_model(
        Model(), (torch.randint(64, (8, 8)),), None, Mesh({"pp": 2, "tp": 2}),
        pipeline=Pipeline(("layers.1",), PARTS), annotations=lines(TENSOR), train=True,
    )  # fmt: skip


def test_stages_are_proved_and_faults_between_them_found() -> None:
    cut = stages()
    reports = dict(verify_stages(cut))
    assert all(r.proved for r in reports.values()), "\n".join(r.text() for r in reports.values())
    assert len(reports) == 5 and sum(r.operations for r in reports.values()) > 100
    second = cut.laid[1].spmd
    assert counts(second.forward)["all_reduce tp"] == 2
    (at,) = handed_inputs(cut.laid[1])
    inputs = list(second.forward.inputs)
    inputs[at] = Sharding.parse("{·,·,tp}")
    second.forward.inputs = tuple(inputs)
    (fault,) = faults_between(1, *cut.laid)
    assert fault.startswith("part 1 takes f32[2,8,32] as {·,·,tp}, part 0 leaves f32[2,8,32] as {")


def test_cli_proves_stages(tmp_path: Path) -> None:
    config, plan = tmp_path / "c.json", tmp_path / "plan.json"
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 96}
    config.write_text(json.dumps({"model_type": "gpt2", **sizes}))
    asked = (
        "--mesh",
        "pp=2",
        "--target",
        "h100",
        "--global-batch",
        "4",
        "--seq",
        "8",
        "--train",
        "--microbatches",
        "2",
    )
    run = CliRunner().invoke
    assert run(main, ["plan", f"hf:{config}", *asked, "--schedule", "1f1b", "-o", str(plan)]).exit_code == 0
    got = run(main, ["verify", str(plan), f"hf:{config}"])
    assert got.exit_code == 0 and "proved: 2 ranks compute what one device computes" in got.output, got.output
    assert "part 1, " in got.output
    config.write_text(json.dumps({"model_type": "gpt2", **sizes, "n_embd": 128}))
    other = run(main, ["verify", str(plan), f"hf:{config}"])
    assert other.exit_code == 2, other.output
    assert "bf16[96, 64] in the plan and bf16[96, 128] in the model" in other.output, other.output
