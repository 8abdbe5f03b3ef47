"""Ranks that do the same share what is compiled: one text, told each rank's place on the mesh by arguments."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from in_process import InProcess
from ranks import annotations, arguments, cut
from test_forms import Model
from torch import nn

from tessel.errors import TesselError
from tessel.frontend.joint import capture_step
from tessel.ir.interp import interpret
from tessel.ops.collective import communicating
from tessel.passes._places import Places
from tessel.runtime import native_kernels
from tessel.sharding.distributed import rank_runner
from tessel.sharding.spmd import Spmd, lay_out
from tessel.targets.mesh import Mesh

# a split vocabulary, biases that one rank counts, keys that go round a ring under a causal mask, edges of windows
WORDS = [("shard", "inputs[0]", (None, "sp")), ("shard", "embed.weight", ("tp", None)),
         ("shard", "*.up.weight", ("tp", None)), ("shard", "*.down.weight", (None, "tp"))]  # fmt: skip
PLACES = [("shard", "inputs[0]", (None, None, "sp", None))]


def laid(name: str, train: bool) -> tuple[Spmd, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name == "words":
        model, x, mesh, lines = Model(), torch.randint(24, (2, 8)), Mesh({"sp": 2, "tp": 2}), WORDS
    else:
        model, x, mesh = nn.Conv2d(2, 3, 3, padding=1), torch.randn(1, 2, 8, 4), Mesh({"sp": 4})  # type: ignore[assignment]
        lines = PLACES  # type: ignore[assignment]
    return lay_out(capture_step(model, (x,), train=train), mesh, annotations(lines), ring=("sp",)), model, x


@pytest.mark.parametrize("name", ["words", "places"])
def test_symbols_say_what_numbers_say(name: str) -> None:
    spmd, model, x = laid(name, train=False)
    program, mesh = spmd.forward, spmd.mesh
    shares = cut(arguments(spmd.step.forward, model, spmd.step, [x]), program.inputs, mesh)

    def outputs(shared: bool) -> list[Any]:
        world = InProcess(mesh)

        def one(rank: int) -> Any:
            graph, places = program.shared(rank) if shared else (program.rank(rank), {})
            assert shared == bool(places)
            with communicating(world.ranks[rank]):
                return interpret(graph, [*shares[rank], *places.values()], precise=True)

        return world.run(one)

    for own, want in zip(outputs(True), outputs(False), strict=True):
        torch.testing.assert_close(own, want, rtol=0, atol=0)


def test_all_ranks_have_one_text() -> None:
    spmd, _, _ = laid("words", train=True)
    for program, imported in ((spmd.forward, spmd.step.forward), (spmd.backward, spmd.step.backward)):
        assert program is not None and imported is not None
        texts: list[str] = []

        def build(text: str, texts: list[str] = texts) -> Any:
            texts.append(text)
            raise TesselError("nothing is compiled here")

        with mock.patch.object(native_kernels, "build", build), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for rank in range(spmd.mesh.devices):
                rank_runner(imported, program, SimpleNamespace(rank=rank), "compiled", "forward")  # type: ignore[arg-type]
        assert len(texts) == spmd.mesh.devices and len(set(texts)) == 1


def test_places() -> None:
    mesh = Mesh({"dp": 2, "tp": 4})
    found = [Places(mesh, r, symbols=True) for r in range(8)]
    said = [(p.at(("tp",)), p.at(("tp",), 1), p.at(("tp",)), p.first([("dp",), ("tp",)])) for p in found]
    assert len(set(said)) == 1 and said[0][0] == said[0][2] != said[0][1]
    assert [p.values["place0"] - 1 for p in found] == [Places(mesh, r).at(("tp",)) for r in range(8)]
    assert [p.values["place2"] for p in found] == [1] + [2] * 7
    assert Places(Mesh({"tp": 1}), 0, symbols=True).at(("tp",)) == 0
