"""A backward cut in two: together the halves are the whole, and the first waits for no gradient of a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from in_process import InProcess
from ranks import annotations
from test_staged import MICROBATCHES, TENSOR, Model

from tessel.errors import TesselError
from tessel.ir.interp import interpret
from tessel.ir.node import Builder, Graph, Value, make_input
from tessel.ir.text import print_graph
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.ops.collective import units
from tessel.sharding.halves import Halves, halve
from tessel.sharding.parts import CutModel, Pipeline, cut_model
from tessel.targets.mesh import Mesh


def cut(mesh: dict[str, int], lines: list[tuple[Any, ...]]) -> CutModel:
    torch.manual_seed(0)
    return cut_model(
        Model(), (torch.randint(64, (8, 8)),), None, Mesh({"pp": 2, **mesh}),
        pipeline=Pipeline(("layers.1",), MICROBATCHES, "zb1p"), annotations=annotations(lines), train=True,
    )  # fmt: skip


def backward_of(laid: Any, rank: int) -> tuple[Graph, set[int]]:
    """A rank's backward, and which of its outputs are gradients of what was handed to the part."""
    inputs = [n for n in laid.spmd.step.forward.graph.inputs if n.attrs["role"] != "constant"]
    assert laid.spmd.backward is not None
    graph = laid.spmd.backward.rank(rank)
    return graph, {i for i, n in enumerate(inputs) if n.attrs["role"] == "input" and graph.outputs[i] is not None}


def run_halves(halves: Halves, given: list[Any], outputs: int) -> list[Any]:
    first = interpret(halves.first, [given[i] for i in halves.takes[0]], precise=True)
    n = len(halves.wanted)
    second = interpret(halves.second, [*(given[i] for i in halves.takes[1]), *first[n:]], precise=True)
    found: list[Any] = [None] * outputs
    for i, x in [*zip(halves.wanted, first[:n], strict=True), *zip(halves.later, second, strict=True)]:
        found[i] = x
    return found


def arguments(graph: Graph) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    given = []
    for n in graph.inputs:
        if n.out.dtype.is_floating_point:
            given.append(torch.rand(n.out.shape, generator=gen, dtype=torch.float64) + 0.1)
        else:
            given.append(torch.zeros(n.out.shape, dtype=n.out.dtype))
    return given


def test_halves_are_the_whole() -> None:
    for i, laid in enumerate(cut({}, []).laid):
        graph, handed = backward_of(laid, 0)
        halves = halve(graph, handed)
        given = arguments(graph)
        want = interpret(graph, given, precise=True)
        for x, y in zip(want, run_halves(halves, given, len(want)), strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        if i == 0:  # tokens have no gradient: nobody waits for anything
            assert handed == set() and not halves.first.nodes and halves.handed == 0
            continue
        assert halves.wanted == tuple(handed)
        # of the products of the whole, those that make gradients of parameters are in the second half
        products = [sum(n.op.name == "matmul" for n in g.nodes) for g in (graph, halves.first, halves.second)]
        weights = sum(laid.spmd.step.forward.graph.inputs[j].out.type.rank == 2 for j in halves.later)
        assert products[0] == products[1] + products[2] and products[2] == weights
        # and nothing is handed over that a view would give again
        assert all(v.op.kind != "view" for v in halves.first.outputs[len(halves.wanted) :])


def test_collectives_are_each_in_one_half() -> None:
    laid = cut({"tp": 2}, TENSOR).laid[1]
    graphs = [backward_of(laid, r) for r in range(2)]
    cuts = [halve(*g) for g in graphs]
    every = [n for n in graphs[0][0].nodes for _ in units(n)]
    assert sorted(cuts[0].collectives[0] + cuts[0].collectives[1]) == list(range(len(every)))
    assert cuts[0].collectives == cuts[1].collectives  # or ranks would wait for each other
    assert cuts[0].collectives[0]  # Megatron's f: the sum of the gradients of what came in
    given = arguments(graphs[0][0])
    mesh = Mesh({"pp": 1, "tp": 2})
    wants = InProcess(mesh).run(lambda r: interpret(graphs[r][0], given, precise=True))
    gots = InProcess(mesh).run(lambda r: run_halves(cuts[r], given, len(wants[0])))
    for x, y in zip(wants[1], gots[1], strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_what_has_an_order_is_refused() -> None:
    x = make_input("x", TensorType((4,), torch.float32))
    b = Builder([x])
    y: Value = b.add(OPS["relu"], x.out)
    drawing = b.finish([y, x.out], ((x, y),))
    with pytest.raises(TesselError, match="an effect has its place in the order of the backward.*take 1f1b"):
        halve(drawing, {0})
    same = halve(b.finish([y, x.out]), {0})
    assert print_graph(same.second).count("relu") == 0 and same.later == (1,) and same.handed == 0
