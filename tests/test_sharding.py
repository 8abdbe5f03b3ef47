"""Shardings and meshes: text, local shapes, what is refused, and the cheapest way from one to another."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from in_process import InProcess

from tessel.errors import TesselError
from tessel.ir.sharding import Sharding
from tessel.passes._reshard import Step, reshard, sources
from tessel.runtime.shares import assemble, share
from tessel.targets.mesh import Link, Mesh

MESH = Mesh({"dp": 2, "tp": 4})
S = Sharding.parse


@pytest.mark.parametrize(
    "text", ["{}", "{·,·}", "{dp,·}", "{dp.tp,·,·}", "{dp?,?,tp}", "{·|tp:sum}", "{|dp:max|tp:min}"]
)
def test_text_is_read_back(text: str) -> None:
    assert str(S(text)) == text
    assert S(str(S(text))) == S(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dp,·", "write it in braces"),
        ("{dp,,·}", "dim 1 is empty"),
        ("{2x}", "no name of a mesh axis"),
        ("{·|tp}", "is not <axis>:<combine>"),
        ("{·|tp:mean}", "none of sum, max, min"),
        ("{dp,dp}", "'dp' is used twice"),
        ("{dp|dp:sum}", "'dp' is used twice"),
    ],
)
def test_bad_text(text: str, words: str) -> None:
    with pytest.raises(TesselError, match=words):
        S(text)


def test_local_shapes_and_what_does_not_fit() -> None:
    assert S("{dp.tp,·}").local_shape((16, 3), MESH) == (2, 3)
    with pytest.raises(TesselError, match=r"dim 0 of size 12 does not divide by 8 \(dp=2 x tp=4\)"):
        S("{dp.tp,·}").local_shape((12, 3), MESH)
    with pytest.raises(TesselError, match="names mesh axis 'pp'; the mesh has dp, tp"):
        S("{pp}").local_shape((8,), MESH)
    with pytest.raises(TesselError, match="has 1 dims, the tensor has 2"):
        S("{dp}").local_shape((8, 8), MESH)
    with pytest.raises(TesselError, match="dim 3 is said to be open"):
        Sharding(((), ()), (), frozenset({3}))


def test_ranks_of_a_mesh() -> None:
    assert [MESH.rank(MESH.coordinates(r)) for r in range(8)] == list(range(8))
    assert MESH.groups("tp") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert MESH.groups("tp", "dp") == ((0, 4, 1, 5, 2, 6, 3, 7),)
    assert MESH.index(6, ("tp", "dp")) == 5
    assert Mesh.parse("dp=2, tp=4") == MESH and hash(Mesh.parse("dp=2,tp=4")) == hash(MESH)
    assert Mesh({"dp": 2}, {"dp": Link(1e-5, 1e11)}).link("dp") == Link(1e-5, 1e11)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mesh({}), "at least one axis"),
        (lambda: Mesh({"dp": 0}), "'dp' has size 0"),
        (lambda: Mesh({"dp": -2}), "'dp' has size -2"),
        (lambda: Mesh({"dp": True}), "'dp' has size True"),
        (lambda: Mesh({"d p": 2}), "'d p' is no name"),
        (lambda: Mesh({"dp": 2}, {"tp": Link(1, 1)}), "a link is given for axis 'tp'"),
        (lambda: Mesh.parse("dp2"), "'dp2' is not <axis>=<size>"),
        (lambda: Mesh.parse("dp=2,dp=4"), "'dp' is named twice"),
        (lambda: MESH.coordinates(8), "rank 8 is not in the mesh dp=2,tp=4 of 8 devices"),
    ],
)
def test_bad_meshes(make: object, words: str) -> None:
    with pytest.raises(TesselError, match=words):
        make()  # type: ignore[operator]


# ---------------------------------------------------------------- reshard

SHAPE = (16, 8)
FINISHED = [
    S(t) for t in ("{·,·}", "{dp,·}", "{tp,·}", "{·,tp}", "{dp,tp}", "{tp,dp}", "{dp.tp,·}", "{tp.dp,·}", "{·,dp.tp}")
]
PARTIAL = [S(t) for t in ("{·,·|tp:sum}", "{dp,·|tp:sum}", "{·,·|dp:sum|tp:sum}", "{·,tp|dp:max}")]


def kinds(steps: tuple[Step, ...]) -> list[str]:
    return [f"{s.kind} {'.'.join(s.axes)}" for s in steps]


def cost(steps: tuple[Step, ...]) -> int:
    return sum(s.bytes for s in steps)


@pytest.mark.parametrize(
    ("before", "after", "want"),
    [
        ("{dp,tp}", "{dp,·}", ["all_gather tp"]),
        ("{dp,·}", "{dp,tp}", ["slice tp"]),
        ("{dp,·|tp:sum}", "{dp,tp}", ["reduce_scatter tp"]),
        ("{dp,·|tp:sum}", "{dp,·}", ["all_reduce tp"]),
        ("{·,·|dp:sum|tp:sum}", "{·,·}", ["all_reduce dp.tp"]),
        ("{·,·|dp:sum|tp:sum}", "{tp.dp,·}", ["reduce_scatter tp.dp"]),
        ("{tp,·}", "{·,tp}", ["all_to_all tp"]),
        ("{dp.tp,·}", "{tp.dp,·}", ["collective_permute dp.tp"]),
        ("{dp.tp,·}", "{tp,dp}", ["collective_permute dp.tp", "all_to_all dp"]),
        ("{dp.tp,·}", "{·,·}", ["all_gather dp.tp"]),
    ],
)
def test_reshards_that_are_known(before: str, after: str, want: list[str]) -> None:
    assert kinds(reshard(SHAPE, 4, S(before), S(after), MESH)) == want


@pytest.mark.parametrize("before", [*FINISHED, *PARTIAL], ids=str)
@pytest.mark.parametrize("after", FINISHED, ids=str)
def test_reshards_move_what_they_say(before: Sharding, after: Sharding) -> None:
    """All ranks in one process: the result is the whole tensor in the new sharding."""
    from tessel.ir.interp import interpret
    from tessel.ir.node import Graph, make_input
    from tessel.ir.types import TensorType
    from tessel.passes._places import Places
    from tessel.passes._rank import Move, write_rank

    x = make_input("x", TensorType(SHAPE, torch.float64))
    graph = Graph((x,), (), (x.out,))
    steps = reshard(SHAPE, 8, before, after, MESH)
    moves = [Move(x.out, steps, "a test")] if steps else []
    parts = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(MESH.devices)]
    if not before.partial:
        parts = [parts[0]] * MESH.devices
    how = dict(before.partial)
    # ranks that differ along a partial axis hold terms; along other axes they hold the same
    term = {r: tuple(MESH.coordinates(r)[a] for a in how) for r in range(MESH.devices)}
    chosen = {t: parts[i] for i, t in enumerate(dict.fromkeys(term.values()))}
    terms = torch.stack(list(chosen.values()))
    whole = terms.amax(0) if "max" in how.values() else terms.sum(0) if how else parts[0]
    world = InProcess(MESH)
    got = world.run(
        lambda r: interpret(
            write_rank(graph, Places(MESH, r), moves, [before], [after], []),
            [share(chosen[term[r]] if how else parts[0], before, MESH, r).contiguous()],
        )[0]
    )
    torch.testing.assert_close(assemble(got, after, MESH, tolerance=1e-12), whole)
    assert {m.sent.total for m in world.ranks} == {cost(steps)}


def test_no_detour_is_cheaper() -> None:
    """The triangle inequality, over shardings of two dimensions; and nothing costs nothing."""
    for a, b, c in product([*FINISHED, *PARTIAL], FINISHED, FINISHED):
        if not set(b.axes) <= {*a.axes, *c.axes, *(axis for axis, _ in a.partial)}:
            continue
        direct = cost(reshard(SHAPE, 4, a, c, MESH))
        assert direct <= cost(reshard(SHAPE, 4, a, b, MESH)) + cost(reshard(SHAPE, 4, b, c, MESH))
    assert all(reshard(SHAPE, 4, a, a, MESH) == () for a in FINISHED)


def test_all_reduce_is_reduce_scatter_and_all_gather() -> None:
    scattered = reshard(SHAPE, 4, S("{·,·|tp:sum}"), S("{tp,·}"), MESH)
    gathered = reshard(SHAPE, 4, S("{tp,·}"), S("{·,·}"), MESH)
    assert cost(reshard(SHAPE, 4, S("{·,·|tp:sum}"), S("{·,·}"), MESH)) == cost(scattered) + cost(gathered)


def test_a_finished_tensor_does_not_become_partial() -> None:
    with pytest.raises(TesselError, match="cannot become the partial"):
        reshard(SHAPE, 4, S("{·,·}"), S("{·,·|tp:sum}"), MESH)


def test_a_permute_is_a_permutation() -> None:
    found = sources(S("{dp.tp}"), S("{tp.dp}"), ("dp", "tp"), MESH)
    assert sorted(found) == list(range(8)) and found[0] == 0 and found[7] == 7
