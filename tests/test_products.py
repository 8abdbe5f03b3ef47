"""Products for the library take their bias along, and only where nothing else reads the product."""

from __future__ import annotations

import pytest
import torch

from tessel.config import Options
from tessel.ir.interp import interpret
from tessel.ir.text import parse_graph
from tessel.ir.verify import verify
from tessel.ops import OPS
from tessel.passes.pipeline import run_pipeline

TEXT = """graph "g"
  %a: f32[3,5] = input "a"
  %w: f32[5,7] = input "w"
  %b: {bias} = input "b"
  %p = matmul(%a, %w)
  %s = add({operands})
  return {results}
"""


@pytest.mark.parametrize(
    "bias, operands, results, taken",
    [
        ("f32[7]", "%p, %b", "%s", True),
        ("f32[7]", "%b, %p", "%s", True),
        ("f32[7]", "%p, %b", "%s, %p", False),  # the product itself is wanted
        ("f32[1]", "%p, %b", "%s", False),
        ("f32[3,7]", "%p, %b", "%s", False),
        ("f32[7]", "%p, %p", "%s", False),
    ],
)
def test_bias(bias: str, operands: str, results: str, taken: bool) -> None:
    graph = parse_graph(TEXT.format(bias=bias, operands=operands, results=results), OPS)
    after = run_pipeline(graph, Options(matmul="library"))
    verify(after, OPS)
    names = [n.op.name for n in after.nodes]
    assert ("addmm" in names) == taken and ("matmul" in names) != taken
    inputs = [torch.randn(tuple(map(int, i.type.shape))) for i in graph.inputs]
    for want, got in zip(interpret(graph, inputs), interpret(after, inputs)):
        torch.testing.assert_close(got, want)
    assert "addmm" not in [n.op.name for n in run_pipeline(graph, Options(matmul="template")).nodes]
