"""Rings of keys, merged softmaxes, split vocabularies, run by all ranks; bytes are those of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from in_process import InProcess
from ranks import annotations, compare, counts, cut, on_all_ranks, same_as_one_device
from test_partition import DEVICES, HEADS, HIDDEN, ORACLES, SEQUENCE, Grouped

from tessel.frontend.joint import capture_step
from tessel.ir.interp import interpret
from tessel.ir.node import Builder, Graph, make_input
from tessel.ir.sharding import Sharding
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.ops.attention import ring_steps
from tessel.passes.partition import partition
from tessel.passes.shard import Seed, propagate
from tessel.sharding.spmd import Spmd, lay_out
from tessel.sharding.verify import verify_program, verify_ranks
from tessel.targets.mesh import Mesh

S = Sharding.parse


def ringed(model: torch.nn.Module, x: torch.Tensor, mesh: dict[str, int], batch: str | None, train: bool) -> Spmd:
    lines = annotations([("shard", "inputs[0]", (batch, "sp", None))])
    return lay_out(capture_step(model, (x,), train=train), Mesh(mesh), lines, whole_results=False, ring=("sp",))


# ---------------------------------------------------------------- rings


@pytest.mark.parametrize("groups", [64, 8])
def test_a_ring_moves_what_the_paper_says(groups: int) -> None:
    """Liu et al. 2023: 2bs·kv(P-1)/P elements in the forward; gradients of keys and values go one place further."""
    with torch.device("meta"):
        model = Grouped(HIDDEN, HEADS, groups).to(torch.bfloat16)
        x = torch.empty(1, SEQUENCE, HIDDEN, dtype=torch.bfloat16)
    spmd = ringed(model, x, {"sp": DEVICES}, None, train=False)
    assert counts(spmd.forward) == {"collective_permute sp": 2 * (DEVICES - 1)}
    assert spmd.bytes == ORACLES["ring_forward_gqa" if groups == 8 else "ring_forward_mha"]


@pytest.mark.parametrize(("groups", "mesh"), [(4, {"sp": 4}), (2, {"dp": 2, "sp": 2}), (1, {"dp": 2, "sp": 4})])
def test_rings_compute_attention(groups: int, mesh: dict[str, int]) -> None:
    """Causal, with the gradients of keys and values; proved, but for the ring itself."""
    torch.manual_seed(0)
    model, x = Grouped(16, 4, groups), torch.randn(mesh.get("dp", 1), 8, 16)
    spmd = ringed(model, x, mesh, "dp" if "dp" in mesh else None, train=True)
    parts = mesh["sp"]
    assert spmd.backward is not None
    assert counts(spmd.forward)["collective_permute sp"] == 2 * (parts - 1)
    assert counts(spmd.backward)["collective_permute sp"] == 2 * (parts - 1) + 2 * parts
    same_as_one_device(spmd, model, [x])
    for program in spmd.programs():
        report = verify_program(program)
        assert report.proved and sum("(ring)" in name for name in report.opaque) == 1, report.text()


def attention(mask: tuple[int, ...] | None, **attrs: Any) -> tuple[Graph, list[torch.Tensor]]:
    """One attention with its mask, and numbers for it."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 8, 4), (2, 2, 8, 4), (2, 2, 8, 4)]
    given = [torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes]
    if mask is not None:
        given.append(torch.rand(mask, generator=gen) > 0.4)
        given[-1][:, :, 0] = False  # a query that sees nothing
    nodes = [make_input(n, TensorType(tuple(x.shape), x.dtype)) for n, x in zip("qkvm", given, strict=False)]
    b = Builder(nodes)
    out, lse = b.node(OPS["attention"], *(n.out for n in nodes), **attrs).outs
    return b.finish((out, lse)), given


@pytest.mark.parametrize(
    ("mask", "attrs"),
    [
        (None, {}),
        (None, {"causal": True}),
        (None, {"causal": True, "window": 3}),
        (None, {"window": 2, "scale": 0.3}),
        ((2, 1, 8, 8), {}),
        ((1, 1, 8, 8), {"causal": True, "softcap": 5.0}),
        ((2, 1, 1, 8), {}),
    ],
)
@pytest.mark.parametrize("keys", ["ring", "merged"])
def test_masks_windows_and_merges(mask: tuple[int, ...] | None, attrs: Mapping[str, Any], keys: str) -> None:
    """Keys go round, or stay where they are and what each rank saw of its own is merged."""
    graph, given = attention(mask, **attrs)
    mesh = Mesh({"sp": 4})
    ring = keys == "ring"
    (node,) = graph.nodes
    split = {"s": ("sp",), "t": ("sp",)} if ring else {"t": ("sp",)}
    seeds = [Seed(n.out, S("{·,·,sp,·}" if ring or i else "{·,·,·,·}"), "") for i, n in enumerate(graph.inputs[:3])]
    program = partition(graph, mesh, propagate(graph, mesh, seeds), splits={node: split})
    got = on_all_ranks(program, cut(given, program.inputs, mesh), InProcess(mesh))
    want = interpret(graph, given, precise=True)
    compare(
        [[x.nan_to_num(neginf=-1e9) for x in r] for r in got], program, [x.nan_to_num(neginf=-1e9) for x in want], 2
    )
    kinds = counts(program)
    steps = ring_steps(2, 4, attrs)  # a causal window is seen by few
    assert kinds["collective_permute sp"] == (2 * (steps - 1) if ring else 0)
    assert kinds["all_reduce sp"] == (0 if ring else 3)
    report = verify_program(program)
    assert report.proved, report.text()


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        (
            "collective_start",
            {"each": ((("sources", (1, 2, 3, 0)),),) * 2},
            "is to run collective_start here, step 0 of a",
        ),
        ("attention", {"offset": 0}, "is to run attention here, step"),
        ("maximum", None, "is to run maximum here, step"),
    ],
)
def test_faults_of_rings_are_found(op: str, change: dict[str, Any] | None, words: str) -> None:
    program = ringed(Grouped(16, 4, 2), torch.randn(1, 8, 16), {"sp": 4}, None, train=False).forward

    def fault(b: Builder, n: Any) -> Any:
        if n.op.name != op:
            return None
        return b.node(n.op, *n.args, **{**n.attrs, **change}).outs if change else b.add(OPS["minimum"], *n.args)

    (found,) = verify_ranks(program, [program.rank(r).rewrite(fault) for r in range(4)]).faults
    assert words in found


# ---------------------------------------------------------------- vocabularies


@pytest.mark.parametrize("bias", [False, True])
def test_a_loss_over_a_split_vocabulary(bias: bool) -> None:
    """Every rank sums up its classes' exponentials: three all-reduces of one number a token, no logits moved."""
    gen = torch.Generator().manual_seed(0)
    x, w, c = (torch.randn(s, generator=gen, dtype=torch.float64) for s in ((6, 8), (12, 8), (12,)))
    target = torch.tensor([0, 11, 5, -100, 6, 3])
    given = [x, w, *([c] if bias else []), target]
    nodes = [make_input(f"i{i}", TensorType(tuple(t.shape), t.dtype)) for i, t in enumerate(given)]
    b = Builder(nodes)
    values = [n.out for n in nodes]
    args = values if bias else [*values[:2], None, values[2]]
    loss, lse = b.node(OPS["linear_cross_entropy"], *args).outs
    graph = b.finish((loss, lse))
    mesh = Mesh({"tp": 4})
    program = partition(graph, mesh, propagate(graph, mesh, [Seed(values[1], S("{tp,·}"), "")]))
    assert counts(program) == {"all_reduce tp": 3} and program.bytes == 3 * 2 * 6 * 8 * 3 // 4
    got = on_all_ranks(program, cut(given, program.inputs, mesh), InProcess(mesh))
    compare(got, program, interpret(graph, given, precise=True), 2)
    report = verify_program(program)
    assert report.proved and report.opaque == {"linear_cross_entropy (nll-merge)": 1}, report.text()


class Words(torch.nn.Module):
    """A table of words, a layer, and the loss of the next words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = torch.nn.Embedding(12, 16), torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 12, bias=False)

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layer(self.table(ids)))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def test_vocabulary_parallel_training() -> None:
    """Table and head split over the words, the batch over dp: the largest moves are those of activations."""
    torch.manual_seed(0)
    model = Words()
    ids, target = torch.randint(0, 12, (2, 8)), torch.randint(0, 12, (2, 8))
    target[0, 0] = -100
    step = capture_step(model, (ids, target), train=True)
    lines = [("shard", n, ("tp", None)) for n in ("table.weight", "head.weight")]
    spmd = lay_out(step, Mesh({"dp": 2, "tp": 2}), annotations([*lines, ("shard", "inputs[0]", ("dp", None))]))
    same_as_one_device(spmd, model, [ids, target])
    assert spmd.backward is not None
    assert not any(c.kind == "all_gather" and "tp" in c.axes for c in spmd.collectives())
    for program in spmd.programs():
        assert verify_program(program).proved
