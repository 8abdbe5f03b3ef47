"""Bytes of collectives against the papers, at their sizes; nothing is run.

The formulas and vectors are those of the papers named at each test, for b=1, s=h=8192, 64 heads, 8 devices, bf16.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import InProcess
from ranks import annotations, counts, cut, on_all_ranks, same_as_one_device
from torch import nn

from tessel.errors import TesselError
from tessel.frontend.joint import Step, capture_step
from tessel.ir.node import Builder, Graph, make_input
from tessel.ir.sharding import Sharding
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.ops.collective import payload
from tessel.passes._factors import follow, rule_of, through
from tessel.passes.partition import Program, partition
from tessel.passes.shard import Seed, propagate
from tessel.runtime.shares import assemble
from tessel.sharding.spmd import Spmd, lay_out
from tessel.targets.mesh import Mesh

S = Sharding.parse
ORACLES = json.loads((Path(__file__).parent / "data/sharding_oracles.json").read_text(encoding="utf-8"))["bytes"]
HIDDEN = SEQUENCE = 8192
HEADS, DEVICES = 64, 8


class Layer(nn.Module):
    """A decoder layer as in Megatron-LM: attention and an MLP of four times the width, biases left out."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        y = self.norm1(x)
        got = nn.functional.scaled_dot_product_attention(
            heads(self.q(y)), heads(self.k(y)), heads(self.v(y)), is_causal=True
        )
        x = x + self.o(got.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


TENSOR = [("shard", "q.weight", ("tp", None)), ("shard", "up.weight", ("tp", None))]


@cache
def layer(train: bool) -> Step:
    with torch.device("meta"):
        model = Layer(HIDDEN, HEADS).to(torch.bfloat16)
        x = torch.empty(1, SEQUENCE, HIDDEN, dtype=torch.bfloat16, requires_grad=train)
    return capture_step(model, (x,), train=train)


def laid(step: Step, mesh: dict[str, int], lines: list[tuple[Any, ...]], whole: bool = True) -> Spmd:
    return lay_out(step, Mesh(mesh), annotations(lines), whole_results=whole)


def test_megatron_tensor_parallel() -> None:
    """Shoeybi et al. 2019: four all-reduces a layer, 8bsh(t-1)/t elements of two bytes a device."""
    spmd = laid(layer(True), {"tp": DEVICES}, TENSOR)
    assert spmd.backward is not None
    assert counts(spmd.forward) == counts(spmd.backward) == {"all_reduce tp": 2}
    assert spmd.bytes == 939_524_096


class Grouped(nn.Module):
    """Attention alone, with as many key heads as said."""

    def __init__(self, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(hidden, hidden // heads * groups, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            y.unflatten(-1, (n, -1)).transpose(1, 2)
            for y, n in ((self.q(x), self.heads), (self.k(x), self.groups), (self.v(x), self.groups))
        )
        got = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(got.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("groups", "kinds", "nbytes"),
    [
        # Ulysses (Jacobs et al. 2023): q, k, v and the result change from tokens to heads and back
        (64, {"all_to_all sp": 4}, 58_720_256),
        # keys and values of few heads are cheaper to gather: the bytes of ring attention (Liu et al. 2023)
        (8, {"all_gather sp": 2}, 29_360_128),
    ],
)
def test_split_sequences(groups: int, kinds: dict[str, int], nbytes: int) -> None:
    """A split sequence is all that is said; how attention copes is the cheapest way."""
    with torch.device("meta"):
        model = Grouped(HIDDEN, HEADS, groups).to(torch.bfloat16)
        x = torch.empty(1, SEQUENCE, HIDDEN, dtype=torch.bfloat16)
    lines = [("shard", "inputs[0]", (None, "sp", None))]
    spmd = laid(capture_step(model, (x,), train=False), {"sp": DEVICES}, lines, whole=False)
    assert counts(spmd.forward) == kinds
    assert spmd.bytes == nbytes
    assert str(spmd.forward.outputs[0]) == "{·,sp,·}"


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("batch", ["dp", None])
def test_split_sequences_compute_attention(groups: int, batch: str | None) -> None:
    """Causal offsets and the gradients of keys that several ranks read, against one device."""
    torch.manual_seed(0)
    model, x = Grouped(16, 4, groups), torch.randn(2, 8, 16)
    step = capture_step(model, (x,), train=True)
    spmd = laid(step, {"dp": 2, "sp": 2}, [("shard", "inputs[0]", (batch, "sp", None))])
    same_as_one_device(spmd, model, [x])


def test_megatron_sequence_parallel_forward() -> None:
    """Korthikanti et al. 2022: all-gathers and reduce-scatters instead, 4bsh(P-1)/P elements in the forward."""
    # of q, k and v only one said, the other two could as well follow the split sequence of the input
    keys = [("shard", n, ("tp", None)) for n in ("k.weight", "v.weight")]
    lines = [*TENSOR, *keys, ("shard", "inputs[0]", (None, "tp", None))]
    spmd = laid(layer(False), {"tp": DEVICES}, lines, whole=False)
    assert counts(spmd.forward) == {"all_gather tp": 2, "reduce_scatter tp": 2}
    assert spmd.bytes == 469_762_048
    assert str(spmd.forward.outputs[0]) == "{·,tp,·}"


@pytest.mark.parametrize("kept", [False, True])
def test_data_parallel_and_zero_3(kept: bool) -> None:
    """Rajbhandari et al. 2020: 2P(n-1)/n bytes for P of parameters; 3P(n-1)/n for those that are kept split."""
    with torch.device("meta"):
        model = Layer(512, 8)
        x = torch.empty(DEVICES, 64, 512)
    lines: list[tuple[Any, ...]] = [("shard", "inputs[0]", ("dp", None, None))]
    params = dict(model.named_parameters())
    if kept:
        lines += [("shard", n, ("dp", None), {"gather": ["dp"]}) for n, p in params.items() if p.dim() == 2]
    spmd = laid(capture_step(model, (x,), train=True), {"dp": DEVICES}, lines, whole=False)
    size = sum((3 if kept and p.dim() == 2 else 2) * p.numel() * p.element_size() for p in params.values())
    assert spmd.bytes == size * (DEVICES - 1) // DEVICES


# ---------------------------------------------------------------- GSPMD's feed-forward layers

TOKENS, MODEL, WIDE = 64 * 1024, 4096, 16384


def feed_forward(mesh: Mesh, seeds: dict[str, str]) -> Program:
    """``y = relu(x up) down`` with x [tokens, model], as in GSPMD (Xu et al. 2021, tables 1 and 2)."""
    shapes = {"x": (TOKENS, MODEL), "up": (MODEL, WIDE), "down": (WIDE, MODEL)}
    roles = {"x": "input", "up": "param", "down": "param"}
    given = {n: make_input(n, TensorType(s, torch.bfloat16), roles[n]) for n, s in shapes.items()}
    b = Builder(given.values())
    hidden = b.add(OPS["maximum"], b.add(OPS["matmul"], given["x"].out, given["up"].out), 0.0)
    y = b.add(OPS["matmul"], hidden, given["down"].out)
    graph = b.finish((y,))
    where = {**{n: v.out for n, v in given.items()}, "hidden": hidden, "y": y}
    found = [Seed(where[n], S(t), n) for n, t in seeds.items()]
    return partition(graph, mesh, propagate(graph, mesh, found), outputs={0: S(seeds["y"])})


def test_gspmd_one_dimension() -> None:
    """The wide dimension over one axis: one all-reduce of the result."""
    program = feed_forward(Mesh({"y": 8}), {"up": "{·,y}", "y": "{·,·}"})
    (only,) = program.collectives()
    assert only.kind == "all_reduce" and only.bytes == payload("all_reduce", TOKENS * MODEL * 2, 8)


def test_gspmd_two_dimensions() -> None:
    """Batch over X, model dimension of the activations over Y, weights over both: all-gather of both weights
    over X, of the activation over Y, and a reduce-scatter of the result over Y."""
    program = feed_forward(
        Mesh({"x": 8, "y": 4}),
        {"x": "{x,y}", "up": "{x,y}", "down": "{y,x}", "hidden": "{x,y}", "y": "{x,y}"},
    )
    assert counts(program) == {"all_gather x": 2, "all_gather y": 1, "reduce_scatter y": 1}
    weight = MODEL * WIDE * 2 // 4  # over X, of a share over Y
    rows = TOKENS * MODEL * 2 // 8  # over Y, of a share over X
    want = sorted([weight * 7 // 8, weight * 7 // 8, rows * 3 // 4, rows * 3 // 4])
    assert sorted(c.bytes for c in program.collectives()) == want


# ---------------------------------------------------------------- what is said


def test_every_collective_says_where_and_why() -> None:
    spmd = laid(layer(True), {"tp": DEVICES}, TENSOR)
    for c in spmd.forward.collectives():
        assert c.loc.file.endswith("test_partition.py") and c.loc.line > 0
        assert "add at" in c.why and "reads it as" in c.why
    mover = next(spmd.forward.moves())
    assert mover.before.partial == (("tp", "sum"),)


def test_explain_goes_back_to_the_users_line() -> None:
    spmd = laid(layer(True), {"tp": DEVICES}, TENSOR)
    down = spmd.explain("down.weight").splitlines()
    assert down[0] == "down.weight: bf16[8192,32768] lies as {·,tp}"
    assert down[1] == "  dim 1 is split over tp:"
    assert "through permute at" in down[2] and "through matmul at" in down[3]
    assert down[-1].startswith("    shard 'up.weight' as {tp,·} at ") and "ranks.py:" in down[-1]
    moved = spmd.explain("down")
    assert "forward: all_reduce over tp, 234881024 bytes: add at" in moved
    with pytest.raises(TesselError, match=r"nothing is called 'dwn'; did you mean 'down'\?"):
        spmd.explain("dwn")


def test_what_is_cut_out_of_a_split_dimension_is_no_piece_of_each_share() -> None:
    """The first token lies on the first rank alone: a slice does not follow how its operand lies, a transpose does."""
    builder = Builder([x := make_input("x", TensorType((8, 16), torch.float32))])
    first = builder.node(OPS["slice"], x.out, dim=1, start=0, size=1, step=1)
    turned = builder.node(OPS["permute"], x.out, dims=(1, 0))
    lies, mesh = Sharding.parse("{·,sp}"), Mesh({"sp": 2})
    assert follow(rule_of(first), lies, mesh) is None
    assert through(turned, lies, mesh) == Sharding.parse("{sp,·}")


def test_a_full_rematerialization_is_said() -> None:
    """Two axes that swap and do not divide either way: through a whole copy, and the line is named."""
    x = make_input("x", TensorType((6, 5), torch.float32))
    graph = Graph((x,), (), (x.out,))
    layouts = propagate(graph, Mesh({"a": 3, "b": 5}), [Seed(x.out, S("{a,·}"), "here")])
    program = partition(graph, Mesh({"a": 3, "b": 5}), layouts, outputs={0: S("{·,b}")})
    # what is gathered over one axis and cut over the other lies whole in between
    assert [s.kind for m in program.moves() for s in m.steps] in (["all_gather", "slice"], ["slice", "all_gather"])
    whole = [m for m in program.moves() if any(not s.after.axes for s in m.steps[:-1])]
    assert len(program.warnings) == len(whole)


def test_outputs_that_do_not_fit_are_refused() -> None:
    x = make_input("x", TensorType((6,), torch.float32))
    graph = Graph((x,), (), (x.out,))
    mesh = Mesh({"tp": 4})
    with pytest.raises(TesselError, match=r"output 0: dim 0 of size 6 does not divide by 4 \(tp=4\)"):
        partition(graph, mesh, propagate(graph, mesh, []), outputs={0: S("{tp}")})


# ---------------------------------------------------------------- operators that need more than a share


@pytest.mark.parametrize("text", ["{tp,·}", "{·,tp}"])
def test_reductions_and_offsets(text: str) -> None:
    """Sums, extremes, iota and a masked lookup over a split dimension, against one device."""
    mesh = Mesh({"tp": 4})
    x = make_input("x", TensorType((8, 12), torch.float64))
    ids = make_input("ids", TensorType((5,), torch.int64))
    b = Builder((x, ids))
    top = b.add(OPS["amax"], x.out, dims=(0,), keepdim=True)
    low = b.add(OPS["amin"], x.out, dims=(1,), keepdim=False)
    total = b.add(OPS["sum"], b.add(OPS["sub"], x.out, top), dims=(0, 1), keepdim=False)
    place = b.add(OPS["cast"], b.add(OPS["iota"], shape=(12,)), dtype=torch.float64)
    moved = b.add(OPS["add"], x.out, place)
    rows = b.add(OPS["embedding"], moved, ids.out)
    some = b.add(OPS["any"], b.add(OPS["gt"], x.out, 2.0), dims=(0,), keepdim=False)
    graph = b.finish((top, low, total, moved, rows, some))
    given = [torch.randn(8, 12, dtype=torch.float64), torch.tensor([0, 7, 3, 3, 5])]
    layouts = propagate(graph, mesh, [Seed(x.out, S(text), "x")])
    program = partition(graph, mesh, layouts)
    got = on_all_ranks(program, cut(given, program.inputs, mesh), InProcess(mesh))
    from tessel.ir.interp import interpret

    for i, want in enumerate(interpret(graph, given, precise=True)):
        s = program.outputs[i]
        assert s is not None
        torch.testing.assert_close(assemble([p[i] for p in got], s, mesh, tolerance=1e-12), want)


def test_a_rank_that_fails_stops_the_others() -> None:
    mesh = Mesh({"tp": 2})
    world = InProcess(mesh, seconds=5)

    def one(rank: int) -> torch.Tensor:
        if rank == 1:
            raise RuntimeError("rank 1 is out of memory")
        return OPS["all_reduce"].ref(torch.ones(2), axes=("tp",), parts=2, combine="sum")  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match="rank 1 is out of memory"):
        world.run(one)


def test_a_collective_without_ranks_says_what_to_do() -> None:
    with pytest.raises(TesselError, match=r"all_reduce over tp: no ranks to talk to.*torchrun"):
        OPS["all_reduce"].ref(torch.ones(2), axes=("tp",), parts=2, combine="sum")
