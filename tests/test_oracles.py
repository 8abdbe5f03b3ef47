"""Published figures that no other test compares with: what ZeRO's levels send, activations under tensor and sequence
parallelism, times of collectives, and the solver against z3.

Rows of the papers and the tests that hold them:

    bytes of Megatron TP, TP + SP       test_comm.test_megatron; programs: test_partition.test_megatron_*
    bytes of Ulysses, ring attention    test_comm.test_sequence_parallel_attention; programs:
                                        test_partition.test_split_sequences, test_exchange.test_a_ring_moves_*
    bytes of LASP-2, DSP                test_comm.test_linear_attention_and_switches
    bytes of DP, ZeRO-1/2/3             test_comm.test_data_parallel, here; programs:
                                        test_partition.test_data_parallel_and_zero_3
    memory of ZeRO                      test_plan_memory.test_zero
    activations a layer                 test_plan_memory.test_activations_of_a_layer, here
    bubbles                             test_plan_pipeline.test_bubbles, test_timelines_*
    GSPMD's feed-forward tables         test_comm.test_gspmd_feed_forward; programs: test_partition.test_gspmd_*
    times of collectives                test_comm.test_measured_times, here
    exhaustive search, 200 instances    test_search_shard.test_equals_exhaustive_search
    triangle inequality, monotonicity   test_comm.test_changes_obey_*, test_search_shard.test_more_memory_*
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import isfinite
from typing import Any

import numpy as np
import pytest
import torch
import z3
from torch import nn

from tessel.frontend.capture import export_program, import_program
from tessel.ir.node import Builder, make_input
from tessel.ir.sharding import Sharding
from tessel.ir.text import value_names
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.solve.comm import MeshAxis, axes_of
from tessel.solve.shard_choice import Pins, Setting
from tessel.solve.shard_price import Pricer
from tessel.solve.shard_search import Search
from tessel.solve.units import Segment, Unit, segments_of, units_of
from tessel.targets import get_target
from tessel.targets.links import LINKS
from tessel.targets.mesh import Link, Mesh

H100 = get_target("h100")

# ---------------------------------------------------------------- what ZeRO sends


def product(m: int, k: int, n: int) -> list[Segment]:
    """One product with a parameter, and a nonlinearity."""
    x = make_input("x", TensorType((m, k), torch.bfloat16))
    w = make_input("w", TensorType((k, n), torch.bfloat16), "param")
    b = Builder([x, w])
    graph = b.finish([b.add(OPS["relu"], b.add(OPS["matmul"], x.out, w.out))])
    return segments_of(units_of(graph, value_names(graph))[0])


@pytest.mark.parametrize(
    ("level", "microbatches", "times"), [(0, 1, 2), (1, 4, 2), (2, 1, 2), (3, 1, 3), (2, 4, 5), (3, 4, 12)]
)
def test_bytes_of_data_parallelism(level: int, microbatches: int, times: int) -> None:
    """DP, ZeRO-1 and ZeRO-2 send 2Ψ(n − 1)/n, ZeRO-3 3Ψ(n − 1)/n (arXiv 1910.02054, section 7); a gradient or a
    parameter that is kept in shares moves for every microbatch."""
    n, segments = 8, product(64, 1024, 1024)
    psi = 2 * 1024 * 1024
    setting = Setting(True, "adamw", microbatches, "none", levels=(level,))
    pricer = Pricer(H100, axes_of(Mesh({"dp": n}), H100), setting)
    unit = next(u for s in segments for u in s.units if u.op == "matmul")
    over_rows = [c for c in pricer.choices(unit) if c.splits[0] is not None and c.splits[0].factor == "m"]
    kept = [w for c in over_rows for w in c.weights if w.levels == (level,)]
    assert kept and {sum(s.sent for s in w.steps) for w in kept} == {times * psi * (n - 1) / n}


# ---------------------------------------------------------------- activations


class Layer(nn.Module):
    """A GPT layer without dropout, with attention as one operator or written out."""

    def __init__(self, h: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.heads, self.flash = heads, flash
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.q, self.k, self.v, self.out = (nn.Linear(h, h, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(h, 4 * h, bias=False), nn.Linear(4 * h, h, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.flash:
            a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            a = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


B, S, H, A, T = 2, 64, 128, 4, 4
SBH = S * B * H


@cache
def units(flash: bool, tokens: bool = True) -> list[Segment]:
    """Three layers behind an embedding, or behind a linear layer, for which numbers of the input become rows."""
    first = nn.Embedding(16, H) if tokens else nn.Linear(H, H, bias=False)
    model = nn.Sequential(first, *(Layer(H, A, flash) for _ in range(3))).to(torch.bfloat16)
    x = torch.zeros(B, S, dtype=torch.int64) if tokens else torch.zeros(B, S, H, dtype=torch.bfloat16)
    graph = import_program(export_program(model, (x,), {})).graph.live()
    return segments_of(units_of(graph, value_names(graph))[0])


def activations(sequence: bool | None, flash: bool = True, tokens: bool = True) -> float:
    """Bytes of a layer's activations on a device under tensor parallelism, with and without sequences split; None: on
    one device.

    What Megatron copies to every device, or splits by the sequence, is the stream between products and its norms.
    """
    segments = units(flash, tokens)
    place = (1, 1) if sequence else None
    pins: dict[str, Mapping[str, Any]] = {}
    for segment in segments:
        for unit in segment.units:
            for t in unit.results:
                if unit.op in ("embedding", "add", "layer_norm") and t.type.rank == 3:
                    pins[t.name] = {"tp": place}
    columns, rows = (Sharding.parse(t) for t in ("{tp,·}", "{·,tp}"))
    pinned = [(f"{n}.weight", columns) for n in ("q", "k", "v", "up")] + [
        (f"{n}.weight", rows) for n in ("out", "down")
    ]
    setting = Setting(True, "adamw", 1, "none", levels=(0,))
    if sequence is not None:
        setting = replace(setting, pinned=tuple(pinned), pins=Pins(results=pins))
    # what the pins ask of is part of what makes segments equal; here it is the same of all
    kinds = {s.signature: s for s in segments}
    order = [list(kinds).index(s.signature) for s in segments]
    pricer = Pricer(H100, axes_of(Mesh({"tp": 1 if sequence is None else T}), H100), setting)
    answer = Search(list(kinds.values()), order, pricer).answer(1e15)
    middle = [p for p, s in zip(answer.segments, segments, strict=True) if {"2"} == {_layer(u) for u in s.units}]
    assert len(middle) == 2  # attention and feed-forward
    return sum(p.nbytes - sum(w.nbytes for c in p.choices.values() for w in c.weights) for p in middle)


def _layer(unit: Unit) -> str:
    return unit.node.loc.module.split(".")[0]


@pytest.mark.parametrize("tokens", [True, False])
def test_activations_under_tensor_and_sequence_parallelism(tokens: bool) -> None:
    """sbh(10 + 24/t) and sbh · 34/t of arXiv 2205.05198 with flash attention, without the dropouts' masks of 2sbh,
    and the log-sum-exp of every row of attention; the norms' statistics are what is left over."""
    lse, statistics = 4 * B * A * S, 4 * 4 * B * S
    tensor = activations(False, tokens=tokens)
    assert 0 <= tensor - (SBH * (8 + 24 / T) + lse / T) <= statistics
    both = activations(True, tokens=tokens)
    assert 0 <= both - (SBH * 32 + lse) / T <= statistics / T


def test_activations_of_attention_that_is_written_out() -> None:
    """Of sbh(34 + 5as/h), the 5as²b of scores and their softmax never arise: the pattern is taken for attention."""
    assert activations(None, flash=False) == activations(None)


# ---------------------------------------------------------------- times of collectives


def test_measured_reductions_and_exchanges() -> None:
    """H100, by NCCL's authors: GB/s of the data and microseconds; what test_comm does not compare with."""
    size, axis = 2**34, lambda n, inside: MeshAxis("a", n, inside, LINKS["h100"])
    for n, gbs, us in ((2, 324, 10), (4, 236, 15), (8, 267, 31)):
        assert size / axis(n, n).seconds("all-reduce", size) / 1e9 == pytest.approx(gbs, rel=0.01)
        assert axis(n, n).seconds("all-reduce", 0) * 1e6 == pytest.approx(us)
    assert size / axis(8, 8).seconds("all-to-all", size) / 1e9 == pytest.approx(380, rel=0.01)
    assert axis(8, 8).seconds("all-to-all", 0) * 1e6 == pytest.approx(50)
    for nodes, us in ((2, 37), (4, 42), (8, 60), (16, 98), (32, 290)):
        assert axis(8 * nodes, 8).seconds("all-to-all", 0) * 1e6 == pytest.approx(us)
    for nodes in (4, 8, 32):  # at two nodes NCCL's tree reaches 267, the model says 205
        assert size / axis(8 * nodes, 8).seconds("all-reduce", size) / 1e9 == pytest.approx(160, rel=0.02)


# ---------------------------------------------------------------- z3


def chain(width: int) -> list[Segment]:
    """Layers x + relu(x w) v, of which segments are equal."""
    x = make_input("x", TensorType((64, width), torch.float32))
    b = Builder([x])
    y = x.out
    for i in range(3):
        w, v = (make_input(f"{n}{i}", TensorType((width, width), torch.float32), "param") for n in "wv")
        b.inputs += [w, v]
        y = b.add(OPS["add"], y, b.add(OPS["matmul"], b.add(OPS["relu"], b.add(OPS["matmul"], y, w.out)), v.out))
    graph = b.finish([y])
    return segments_of(units_of(graph, value_names(graph))[0])


def tied(search: Search, cap: float) -> float | None:
    """The least seconds of a plan in which equal segments are run alike, by z3; None where none fits."""
    (own,) = search.chains
    solver = z3.Optimize()
    picks: list[dict[Any, list[Any]]] = []
    seconds, nbytes = [], []
    for kind, (tables,) in enumerate(own.tables):
        times = own.order.count(kind)
        bools = {
            v: [z3.Bool(f"{kind} {n} {i}") for i in range(len(d))] for n, (v, d) in enumerate(tables.domains.items())
        }
        picks.append(bools)
        for b in bools.values():
            solver.add(z3.PbEq([(x, 1) for x in b], 1))
        for n, f in enumerate(tables.factors):
            cost, held = z3.Int(f"cost {kind} {n}"), z3.Int(f"held {kind} {n}")
            shape = [len(tables.domains[v]) for v in f.vars]
            value_of, held_of = (np.broadcast_to(x, shape).reshape(-1).tolist() for x in (f.seconds, f.nbytes))
            for at, value in enumerate(value_of):
                where = _at(shape, at)
                chosen = z3.And([bools[v][i] for v, i in zip(f.vars, where, strict=True)])
                if isfinite(value):
                    both = (cost == round(value * 1e15), held == round(held_of[at]))
                    solver.add(z3.Implies(chosen, z3.And(both)))
                else:
                    solver.add(z3.Not(chosen))
            seconds.append(times * cost)
            nbytes.append(times * held)
    for a, b in zip(own.order, own.order[1:]):
        for x, y in zip(picks[a]["out"], picks[b]["in"], strict=True):
            solver.add(x == y)
    solver.add(z3.Sum(nbytes) <= int(cap))
    solver.minimize(z3.Sum(seconds))
    if solver.check() != z3.sat:
        return None
    return solver.model().eval(z3.Sum(seconds)).as_long() / 1e15


def _at(shape: Sequence[int], flat: int) -> tuple[int, ...]:
    found = []
    for n in reversed(shape):
        found.append(flat % n)
        flat //= n
    return tuple(reversed(found))


def test_the_solver_against_z3_with_all_layers_alike() -> None:
    """The optimum may mix plans: never slower than the best in which layers are alike, and as fast for one layer."""
    segments = chain(1024)
    one = segments[-2:-1]  # a layer between others
    axes = axes_of(Mesh({"dp": 2}, {"dp": Link(1e-6, 1e9)}), H100)
    pricer = Pricer(H100, axes, Setting(True, "adamw", 1, "none"))
    mixed = 0
    for order in ([0], [0] * 6):
        search = Search(one, order, pricer)
        least, most = search.answer(0.0).least, search.answer(1e15)
        for part in (0.0, 0.3, 0.6, 1.0):
            cap = least + part * (most.nbytes - least) + 1
            answer, alike = search.answer(cap), tied(search, cap)
            assert alike is not None and answer.seconds <= alike * (1 + 1e-6)
            assert answer.bound <= alike * (1 + 1e-6)
            if len(order) == 1:
                assert answer.seconds == pytest.approx(alike, rel=1e-6)
            mixed += answer.seconds < alike * (1 - 1e-4)
        assert tied(search, least * 0.9) is None and not search.answer(least * 0.9).fits
    assert mixed  # somewhere under a cap, layers that differ are faster


# ---------------------------------------------------------------- inputs that views stand before


class Scaled(nn.Module):
    """A product of an input that is scaled, cast and flattened first."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 4, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((x * 0.5).to(torch.bfloat16).flatten(0, 1))  # type: ignore[no-any-return]


def test_an_input_keeps_its_batch_behind_views() -> None:
    """Of the flattened rows the outer part is the batch's, the inner part may be split too."""
    graph = import_program(export_program(Scaled(), (torch.zeros(4, 6, 8),), {})).graph.live()
    product = next(u for u in units_of(graph, value_names(graph))[0] if u.op == "matmul")
    (rows,) = (f for f, n in product.sizes.items() if n == 24)
    assert product.roles == {(rows, 1): "batch"}
    assert product.majors[rows] == (1, 4)
    assert product.uses[0].name == "x" and [n.op.name for n in product.uses[0].views] == ["reshape"]
