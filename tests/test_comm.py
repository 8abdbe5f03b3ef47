"""Communication: bytes against published formulas, times against measured ones, and what any price must obey."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessel.errors import TesselError
from tessel.solve.comm import Atom, Layouts, MeshAxis, P, R, V, axes_of, bytes_sent
from tessel.targets import get_target
from tessel.targets.links import COLLECTIVES, LINKS
from tessel.targets.mesh import Link, Mesh

ORACLES = json.loads((Path(__file__).parent / "data/sharding_oracles.json").read_text())["bytes"]
B, S, H, KV, N = 1, 8192, 8192, 1024, 8
TP = MeshAxis("tp", N, N, LINKS["h100"])
ACTIVATION = Layouts(2 * B * S * H, [Atom(0, 1, B), Atom(1, 1, S), Atom(2, 1, H)], [TP], train=True)


def sent(layouts: Layouts, a: int, b: int, backward: bool | None = None) -> float:
    steps = layouts.steps((a,), (b,))
    return sum(s.sent for s in steps if backward is None or s.backward == backward)


def test_megatron() -> None:
    """f (nothing, then an all-reduce) and g (an all-reduce, then nothing), twice a layer."""
    layer = 2 * (sent(ACTIVATION, R, V) + sent(ACTIVATION, P, R))
    assert layer == ORACLES["megatron_tp_layer"]
    gather, scatter = sent(ACTIVATION, 1, V, False), sent(ACTIVATION, P, 1, False)
    assert 2 * (gather + scatter) == ORACLES["megatron_sp_forward"]
    assert 2 * (sent(ACTIVATION, 1, V) + sent(ACTIVATION, P, 1)) == ORACLES["megatron_tp_layer"]  # as many bytes


@pytest.mark.parametrize(("kv", "name"), [(H, "mha"), (KV, "gqa")])
def test_sequence_parallel_attention(kv: int, name: str) -> None:
    def switch(width: int) -> float:  # sequence to heads, or back
        x = Layouts(2 * B * S * width, [Atom(1, 1, S), Atom(2, 1, width)], [TP])
        return sent(x, 0, 1)

    assert 2 * switch(H) + 2 * switch(kv) == ORACLES[f"ulysses_forward_{name}"]
    gathered = 2 * bytes_sent("all-gather", 2 * B * S * kv, N)  # a ring hands on what an all-gather collects
    assert gathered == ORACLES[f"ring_forward_{name}"]


def test_linear_attention_and_switches() -> None:
    state = 2 * B * H * 128  # one state of d × d a head, H = heads · d
    assert bytes_sent("all-gather", N * state, N) == ORACLES["lasp2_forward"]
    m = 2 * B * S * H  # DSP: one all-to-all of the local M/N, of which 1/N stays
    assert sent(Layouts(m, [Atom(1, 1, S), Atom(2, 1, H)], [TP]), 0, 1) == m * (N - 1) // N**2


def test_data_parallel() -> None:
    psi = 2 * 8 * 10**6
    w = Layouts(psi, [Atom(0, 1, 8000)], [MeshAxis("dp", N, N, LINKS["h100"])], train=True)
    once = psi * (N - 1) // N
    assert sent(w, R, V) == 2 * once  # DP, ZeRO-1 and -2: an all-reduce, in one piece or two
    assert sent(w, 0, V) + sent(w, 0, V, False) == 3 * once  # ZeRO-3: gathered twice, scattered once
    assert bytes_sent("all-reduce", psi, N) == bytes_sent("all-gather", psi, N) + bytes_sent("reduce-scatter", psi, N)


def test_gspmd_feed_forward() -> None:
    """The two tables of the GSPMD paper: one-dimensional and two-dimensional, m × h × f on X × Y."""
    m, h, f, x, y = 4096, 1024, 4096, 4, 2
    axes = (MeshAxis("x", x, x, LINKS["h100"]), MeshAxis("y", y, y, LINKS["h100"]))
    act = Layouts(2 * m * h, [Atom(0, 1, m), Atom(1, 1, h)], axes)
    weight = Layouts(2 * h * f, [Atom(0, 1, h), Atom(1, 1, f)], axes)
    # 2-D: batch over x, activations' h over y; weights [h, f] lie as [x, y]: gathered over x
    kinds = [(s.kind, s.axis, s.sent) for s in weight.steps((0, 1), (R, 1))]
    assert kinds == [("all-gather", "x", 2 * h * f // y * (x - 1) // x)]
    kinds = [(s.kind, s.axis, s.sent) for s in act.steps((0, 1), (0, R))]
    assert kinds == [("all-gather", "y", 2 * m * h // x * (y - 1) // y)]
    kinds = [(s.kind, s.axis, s.sent) for s in act.steps((0, P), (0, 1))]
    assert kinds == [("reduce-scatter", "y", 2 * m * h // x * (y - 1) // y)]
    # 1-D: batch over x, f over y: one all-reduce of the result
    kinds = [(s.kind, s.axis, s.sent) for s in act.steps((0, P), (0, R))]
    assert kinds == [("all-reduce", "y", 2 * 2 * m * h // x * (y - 1) // y)]


def test_measured_times() -> None:
    """The H100 figures of the table come out again: time over size in GB/s at large sizes."""
    size = 2**34
    for n, gbs in ((2, 537), (4, 434), (8, 394)):
        assert size / MeshAxis("a", n, n, LINKS["h100"]).seconds("all-gather", size) / 1e9 == pytest.approx(
            gbs, rel=0.01
        )
    alone = MeshAxis("a", 8, 1, LINKS["h100"])
    assert alone.seconds("all-gather", 0) == pytest.approx(106e-6)
    assert alone.seconds("all-reduce", 0) == pytest.approx(204e-6)
    assert size / alone.seconds("all-gather", size) / 1e9 == pytest.approx(54.9, rel=0.01)
    assert size / alone.seconds("all-reduce", size) / 1e9 == pytest.approx(27.4, rel=0.01)
    for nodes, gather, gbs, reduce in ((2, 70, 410, 53), (4, 146, 396, 81), (8, 297, 390, 109), (32, 1204, 386, 165)):
        axis = MeshAxis("a", 8 * nodes, 8, LINKS["h100"])
        assert axis.seconds("all-gather", 0) * 1e6 == pytest.approx(gather, rel=0.08)
        assert axis.seconds("all-reduce", 0) * 1e6 == pytest.approx(reduce, rel=0.03)
        assert size / axis.seconds("all-gather", size) / 1e9 == pytest.approx(gbs, rel=0.04)


def test_every_link_has_a_source() -> None:
    for name, links in LINKS.items():
        fields = {"node", "inside", "nic", "hop_alone", "hop_full", "tree", "tree_bus", "exchange"}
        assert links.name == name and set(links.sources) == fields and all(links.sources.values())


def test_axes_on_nodes() -> None:
    h100 = get_target("h100")
    assert [str(a) for a in axes_of(Mesh({"dp": 8, "tp": 8}), h100)] == [
        "dp=8 (1 in each of 8 nodes)",
        "tp=8 (inside a node)",
    ]
    assert [(a.inside, a.nodes) for a in axes_of(Mesh({"dp": 8, "tp": 4}), h100)] == [(2, 4), (4, 1)]
    assert [(a.inside, a.nodes) for a in axes_of(Mesh({"dp": 8, "tp": 4}), h100, 4)] == [(1, 8), (4, 1)]
    with pytest.raises(TesselError, match="tp=3.*|axis dp=3 steps over 3 devices .* nodes of 8"):
        axes_of(Mesh({"dp": 3, "tp": 3}), h100)
    with pytest.raises(TesselError, match="no links"):
        axes_of(Mesh({"dp": 2}), get_target("cpu"))
    plain = axes_of(Mesh({"dp": 2}, {"dp": Link(1e-6, 1e9)}), get_target("cpu"))
    assert plain[0].seconds("all-gather", 2e9) == pytest.approx(1 + 1e-6)


def test_a_reduction_over_two_axes_is_hierarchical() -> None:
    axes = axes_of(Mesh({"dp": 8, "tp": 8}), get_target("h100"))
    w = Layouts(2**30, [Atom(0, 1, 4096)], axes)
    steps = w.steps((P, P), (R, R))
    assert [(s.kind, s.axis) for s in steps] == [("reduce-scatter", "tp"), ("all-reduce", "dp"), ("all-gather", "tp")]
    assert steps[1].size == 2**30 / 8
    with pytest.raises(TesselError, match="no sequence"):
        w.steps((R, R), (P, P))


AXES = st.tuples(*[st.builds(
    lambda n, inside, i: MeshAxis(f"a{i}", n, min(n, inside), LINKS["h100"]),
    st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.just(i),
) for i in range(2)])  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(AXES, st.lists(st.sampled_from([4, 8, 48, 64]), min_size=1, max_size=3), st.integers(1, 2**20), st.booleans())
def test_changes_obey_the_triangle_inequality(
    axes: tuple[MeshAxis, ...], shape: list[int], itemsize: int, train: bool
) -> None:
    atoms = [Atom(d, 1, n) for d, n in enumerate(shape)]
    cost = Layouts(itemsize * math.prod(shape), atoms, axes, train=train).total
    through = (cost[:, :, None] + cost[None, :, :]).min(axis=1)
    finite = cost < math.inf
    assert (cost[finite] <= through[finite] + 1e-12).all() and (cost.diagonal() == 0).all()


@settings(max_examples=60, deadline=None)
@given(AXES, st.sampled_from(COLLECTIVES), st.floats(1, 1e10), st.floats(0, 1e9))
def test_more_bytes_never_take_less(axes: tuple[MeshAxis, ...], kind: str, size: float, more: float) -> None:
    assert axes[0].seconds(kind, size) <= axes[0].seconds(kind, size + more)
