"""The pipeline: order, records, and the blame of a pass that breaks the graph."""

from __future__ import annotations

import pytest

from tessel.config import Options
from tessel.errors import TesselError
from tessel.ir.node import Graph
from tessel.ir.text import parse_graph, print_graph
from tessel.ops import OPS
from tessel.passes.pipeline import PASSES, Trace, run_pipeline

TEXT = """graph "g"
  %x: f32[s0,4] = input "x"
  %a = mul(%x, 1.0)
  %b = silu(%a)
  %c = silu(%x)
  return %b, %c, %b
"""
BEFORE_FUSION = tuple(p for p in PASSES if p[0] not in ("fuse", "writes"))


def test_order() -> None:
    assert [name for name, _ in PASSES][:5] == ["canonicalize", "decompose", "packed", "unpack", "masks"]


def test_trace_records_each_pass() -> None:
    trace = Trace(keep_text=True, check=True)
    got = run_pipeline(parse_graph(TEXT, OPS), Options(), trace, BEFORE_FUSION)
    assert [(s.name, s.before, s.after) for s in trace.steps] == [
        ("canonicalize", 3, 2),
        ("decompose", 2, 3),
        ("packed", 3, 3),
        ("unpack", 3, 3),
        ("masks", 3, 3),
        ("decode", 3, 3),
        ("gradients", 3, 3),
        ("recurrences", 3, 3),
        ("running", 3, 3),
        ("small_products", 3, 3),
        ("narrow_products", 3, 3),
        ("canonicalize", 3, 3),
        ("layouts", 3, 3),
        ("inplace", 3, 3),
    ]
    assert trace.steps[-1].text == print_graph(got)
    assert trace.text is not None and "mul(%0, 1.0)" in trace.text
    assert all(s.seconds > 0 for s in trace.steps)
    assert "canonicalize" in str(trace.steps[0]) and "3 -> 2 nodes" in str(trace.steps[0])


def test_text_is_kept_only_if_asked() -> None:
    trace = Trace()
    run_pipeline(parse_graph(TEXT, OPS), None, trace, BEFORE_FUSION)
    assert trace.text is None and all(s.text is None for s in trace.steps)


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    def careless(graph: Graph, options: Options) -> Graph:
        return graph.replace(nodes=graph.nodes[1:])

    graph = parse_graph(TEXT, OPS)
    with pytest.raises(TesselError, match=r"the pass careless broke the graph: (.|\n)*not in this graph"):
        run_pipeline(graph, None, Trace(check=True), (("careless", careless),))
