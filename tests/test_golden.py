"""Every golden file: text round trip, idempotence, the same numbers, the same text.

``pytest --bless tests/test_golden.py`` rewrites the lower halves; read the diff before it is kept.
"""

from __future__ import annotations

import golden_files as golden
import pytest
import torch

from tessel.config import Options
from tessel.ir.interp import interpret
from tessel.ir.node import Graph
from tessel.ir.text import parse_graph, print_graph
from tessel.ir.verify import verify
from tessel.ops import OPS
from tessel.passes.pipeline import PASSES

RUN = dict(PASSES)
# Passes that put other arithmetic in place are compared in float64; all others bit for bit.
NEAR = {"decompose", "recurrences", "small_products"}


def outputs(graph: Graph, inputs: list, precise: bool) -> list:
    torch.manual_seed(0)  # for random nodes
    return interpret(graph, inputs, precise=precise)


@pytest.mark.parametrize("case", golden.cases(), ids=lambda c: f"{c.path.parent.name}/{c.path.stem}")
def test_golden(case: golden.Case, request: pytest.FixtureRequest) -> None:
    name = case.path.parent.name
    upper, lower = case.halves
    before = parse_graph(upper, OPS)
    verify(before, OPS)
    options = Options(debug=0)
    after = RUN[name](before, options)
    verify(after, OPS)
    text = print_graph(after)
    for graph in (before, after):
        assert print_graph(parse_graph(print_graph(graph), OPS)) == print_graph(graph)
    assert print_graph(RUN[name](after, options)) == text, f"{name} run twice changes more"
    near = name in NEAR
    for seed in range(2):
        inputs = golden.random_inputs(before, case.symbols, case.ints, special=not near, seed=seed)
        want, got = outputs(before, inputs, near), outputs(after, inputs, near)
        same = golden.close if near else golden.same_bits
        assert same(want, got), f"{name} changed the numbers: {want} became {got}"
    if request.config.getoption("--bless"):
        case.bless(text)
    else:
        assert text == lower, "the text differs; if it should, run pytest --bless and read the diff"
