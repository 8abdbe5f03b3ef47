"""Masks in programs that all ranks share: what hides nothing is dropped, what asks where a rank stands is a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from in_process import InProcess
from ranks import annotations, arguments, compare, cut

from tessel.frontend.joint import capture_step
from tessel.ir.interp import interpret
from tessel.ir.node import Graph
from tessel.ir.text import parse_graph
from tessel.ops import OPS
from tessel.passes import masks
from tessel.passes._known import Known
from tessel.sharding.spmd import lay_out
from tessel.targets.mesh import Mesh


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("iota(shape=(4,), start=2, step=3, dtype=i64)", (2, 11)),
        ("iota(shape=(4,), start=s0, step=1, dtype=i64)", None),
        ("index(%zero, (%where,))", (0, 0)),
        ("index(%small, (%where,))", (2, 5)),
        ("eq(%far, 0)", (1, 1)),
        ("ne(%far, 0)", (0, 0)),
        ("lt(%far, %near)", (1, 1)),
        ("ge(%far, %near)", (0, 0)),
        ("gt(%near, 3)", (0, 1)),
        ("le(%near, 5)", (1, 1)),
        ("cast(%near, dtype=b1)", (1, 1)),
        ("cast(%near, dtype=f32)", (2, 5)),
        ("cast(%near, dtype=bf16)", None),
        ("where(%no, %far, %near)", (2, 5)),
        ("bitwise_and(%no, %some)", (0, 0)),
        ("bitwise_or(%no, %some)", (0, 1)),
        ("logical_not(%no)", (1, 1)),
        ("expand(%near, shape=(9, 4))", (2, 5)),
        ("full(shape=(4,), value=nan, dtype=f32)", None),
        ("mul(%near, 2)", None),
        ("eq(%x, 0)", None),
    ],
)
def test_what_is_known_of_a_value(line: str, want: tuple[int, int] | None) -> None:
    """Values that begin where a rank stands are not computed, and yet some are known."""
    graph = parse_graph(
        f"""graph "g"
  %x: i64[4] = input "x"
  %place: sym[s0] = input "s0"
  %zero = full(shape=(8,), value=0, dtype=i64)
  %small = iota(shape=(4,), start=2, step=1, dtype=i64)
  %where = iota(shape=(4,), start=s0, step=1, dtype=i64)
  %far = index(%zero, (%where,))
  %near = index(%small, (%where,))
  %no = ne(%far, 0)
  %some = gt(%near, 3)
  %v = {line}
  return %v""",
        OPS,
    )
    (v,) = graph.results()
    assert Known().range(v) == want


def small(kind: str) -> torch.nn.Module:
    """A model of transformers with one layer, whose mask is made of places and of what document a token is in."""
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32,
             "num_hidden_layers": 1, "use_cache": False}  # fmt: skip
    torch.manual_seed(0)
    if kind == "gpt_neox":
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes)).eval()  # type: ignore[no-any-return]
    slide = {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention"]}
    config = t.Qwen2Config(**sizes, num_key_value_heads=2, **(slide if kind == "sliding" else {}))
    return t.Qwen2ForCausalLM(config).eval()  # type: ignore[no-any-return]


def attention(graph: Graph) -> list[tuple[bool, int | None, bool]]:
    """Of each attention operator whether it is causal, its window, and whether a mask is left."""
    at = {"attention": 3, "attention_backward": 4}
    found = [n for n in graph.nodes if n.op.name in at]
    return [(n.attrs["causal"], n.attrs.get("window"), n.args[at[n.op.name]] is not None) for n in found]


@pytest.mark.parametrize(
    ("kind", "mesh", "dims"),
    [
        ("sliding", {"dp": 2}, ("dp", None)),
        pytest.param("full", {"dp": 4}, ("dp", None), marks=pytest.mark.slow),
        pytest.param("gpt_neox", {"dp": 2}, ("dp", None), marks=pytest.mark.slow),
    ],
)
def test_masks_of_ranks_are_read(kind: str, mesh: dict[str, int], dims: tuple[Any, ...]) -> None:
    """Their bounds, from the shard's place on; the results of the ranks are those of one device."""
    model, ids = small(kind), torch.randint(32, (4, 8))
    step = capture_step(model, (), {"input_ids": ids}, train=True)
    spmd = lay_out(step, Mesh(mesh), annotations([("shard", "inputs[0]", dims)]))
    for program in spmd.programs():
        for rank in range(spmd.mesh.devices):
            graph, _ = program.shared(rank)
            found = attention(masks.run(graph))
            assert len(found) > 0
            assert all(x == (True, 3 if kind == "sliding" else None, False) for x in found), (program.graph.name, found)
    inputs = arguments(step.forward, model, step, [ids])
    want = interpret(step.forward.graph, inputs, precise=True)
    program = spmd.forward
    graphs = [program.shared(r) for r in range(spmd.mesh.devices)]
    shares = cut(inputs, program.inputs, spmd.mesh)
    world = InProcess(spmd.mesh)
    got = world.run(lambda r: interpret(masks.run(graphs[r][0]), [*shares[r], *graphs[r][1].values()], precise=True))
    compare(got, program, want, spmd.step.results)
