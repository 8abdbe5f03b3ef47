"""Propagation: axes flow along factors, conflicts are settled the same way each time, every axis says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tessel.errors import TesselError
from tessel.ir.node import Builder, Graph, Node, Value, make_input
from tessel.ir.sharding import Sharding
from tessel.ir.types import Loc, TensorType
from tessel.ops import OPS
from tessel.passes.shard import Layouts, Seed, propagate
from tessel.targets.mesh import Mesh

MESH = Mesh({"dp": 2, "tp": 4})
S = Sharding.parse


def inputs(**shapes: tuple[int, ...]) -> dict[str, Node]:
    return {n: make_input(n, TensorType(s, torch.float32)) for n, s in shapes.items()}


def spread(
    outputs: tuple[Value, ...], given: dict[str, Node], b: Builder, seeds: dict[str, str], **named: Any
) -> Layouts:
    graph = Graph(tuple(given.values()), tuple(b.nodes), outputs)
    return propagate(graph, MESH, [Seed(given[n].out, S(t), f"{n} is {t}", **named) for n, t in seeds.items()])


def mlp() -> tuple[dict[str, Node], Builder, tuple[Value, Value]]:
    given = inputs(x=(8, 16), up=(16, 32), down=(32, 16))
    b = Builder(given.values(), Loc("model.py", 3, "mlp"))
    hidden = b.add(OPS["sigmoid"], b.add(OPS["matmul"], given["x"].out, given["up"].out))
    return given, b, (hidden, b.add(OPS["matmul"], hidden, given["down"].out))


def test_one_weight_tells_the_other() -> None:
    given, b, (hidden, out) = mlp()
    found = spread((out,), given, b, {"x": "{dp,·}", "up": "{·,tp}"})
    assert str(found.of[hidden]) == "{dp,tp}"
    assert str(found.of[given["down"].out]) == "{tp,·}"
    assert str(found.of[out]) == "{dp,·}"


def test_backward_from_the_result() -> None:
    given, b, (hidden, out) = mlp()
    graph = Graph(tuple(given.values()), tuple(b.nodes), (out,))
    found = propagate(graph, MESH, [Seed(out, S("{dp,tp}"), "the result")])
    assert [str(found.of[given[n].out]) for n in ("x", "up", "down")] == ["{dp,·}", "{·,·}", "{·,tp}"]
    assert str(found.of[hidden]) == "{dp,·}"


def test_every_axis_says_where_it_comes_from() -> None:
    given, b, (_, out) = mlp()
    found = spread((out,), given, b, {"x": "{dp,·}", "up": "{·,tp}"})
    lines = found.explain(given["down"].out, 0, "tp")
    assert lines[0] == "through matmul at model.py:3 in mlp"
    assert lines[-1] == "up is {·,tp}" and len(lines) == 4
    assert found.because(out) == "x is {dp,·}"


def test_what_the_user_closed_stays() -> None:
    given, b, (hidden, out) = mlp()
    found = spread((out,), given, b, {"up": "{·,tp}", "down": "{·,·}"})
    assert str(found.of[given["down"].out]) == "{·,·}" and str(found.of[hidden]) == "{·,tp}"
    opened = spread((out,), given, b, {"up": "{·,tp}", "down": "{?,·}"})
    assert str(opened.of[given["down"].out]) == "{tp,·}"


def test_an_axis_goes_to_the_factor_of_the_larger_tensor() -> None:
    for shapes, want in ((((64, 16), (16, 32)), "{dp,·}"), (((8, 16), (16, 32)), "{·,dp}")):
        given = inputs(x=shapes[0], w=shapes[1])
        b = Builder(given.values())
        out = b.add(OPS["matmul"], given["x"].out, given["w"].out)
        assert str(spread((out,), given, b, {"x": "{dp,·}", "w": "{·,dp}"}).of[out]) == want


def test_lists_that_differ_share_their_beginning() -> None:
    given = inputs(x=(16, 8), y=(16, 8))
    b = Builder(given.values())
    out = b.add(OPS["add"], given["x"].out, given["y"].out)
    assert str(spread((out,), given, b, {"x": "{dp.tp,·}", "y": "{dp,·}"}).of[out]) == "{dp.tp,·}"
    assert str(spread((out,), given, b, {"x": "{dp,·}", "y": "{tp,·}"}).of[out]) == "{·,·}"


def test_user_priority_comes_first() -> None:
    given = inputs(x=(16, 8), y=(16, 8))
    b = Builder(given.values())
    out = b.add(OPS["add"], given["x"].out, given["y"].out)
    graph = Graph(tuple(given.values()), tuple(b.nodes), (out,))
    seeds = [Seed(given["x"].out, S("{dp,·}"), "x", priority=1), Seed(given["y"].out, S("{tp,·}"), "y")]
    assert str(propagate(graph, MESH, seeds).of[out]) == "{tp,·}"


@pytest.mark.parametrize(
    ("shape", "to", "given", "want"),
    [
        ((8, 6), (48,), "{dp,·}", "{dp}"),
        ((2, 24), (48,), "{dp,tp}", "{dp.tp}"),  # the outer factor is split to the end
        ((8, 24), (192,), "{·,tp}", "{·}"),  # an inner factor alone: no sharding says it
        ((32, 6), (4, 8, 6), "{tp.dp,·}", "{tp,dp,·}"),
        ((8, 4, 16), (8, 64), "{dp,tp,·}", "{dp,tp}"),
        ((6, 4), (4, 6), "{dp,·}", "{·,·}"),
    ],
)
def test_reshapes(shape: tuple[int, ...], to: tuple[int, ...], given: str, want: str) -> None:
    x = inputs(x=shape)
    b = Builder(x.values())
    out = b.add(OPS["reshape"], x["x"].out, shape=to)
    assert str(spread((out,), x, b, {"x": given}).of[out]) == want


def test_sizes_that_do_not_divide_are_left_whole() -> None:
    x = inputs(x=(8, 6))
    b = Builder(x.values())
    out = b.add(OPS["reshape"], x["x"].out, shape=(4, 2, 6))
    # tp=4 fills the outer factor, dp goes on to the inner one
    assert str(spread((out,), x, b, {"x": "{tp.dp,·}"}).of[out]) == "{tp,dp,·}"
    y = inputs(y=(6, 4), z=(1, 4))
    b = Builder(y.values())
    out = b.add(OPS["add"], y["y"].out, y["z"].out)
    found = spread((out,), y, b, {"y": "{dp,tp}"})
    assert str(found.of[y["z"].out]) == "{·,tp}"


def test_bad_seeds() -> None:
    given, b, (_, out) = mlp()
    with pytest.raises(TesselError, match=r"x is \{pp,·\}.*names mesh axis 'pp'"):
        spread((out,), given, b, {"x": "{pp,·}"})
    with pytest.raises(TesselError, match="cannot be asked to stay partial"):
        spread((out,), given, b, {"x": "{·,·|tp:sum}"})


def test_it_is_deterministic() -> None:
    given, b, (_, out) = mlp()
    first, second = (spread((out,), given, b, {"x": "{dp,·}", "up": "{·,tp}"}) for _ in range(2))
    assert first.of == second.of and first.why == second.why
