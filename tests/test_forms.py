"""Parallel forms that plans choose and run: rings, heads, tokens that travel, ZeRO's stages, microbatches, remat."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from groups import environment, free_port, start
from in_process import InProcess
from ranks import annotations, arguments, counts, on_all_ranks, same_as_one_device
from test_partition import DEVICES, HEADS, HIDDEN, ORACLES, SEQUENCE, Grouped
from torch import nn
from torch.utils import _pytree as pytree

import tessel
from tessel.errors import TesselError
from tessel.frontend.joint import capture_step
from tessel.frontend.linear_attention_op import linear_attention
from tessel.ir.interp import interpret
from tessel.ir.node import Builder, Graph, make_input
from tessel.ir.sharding import Sharding
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.passes.partition import partition
from tessel.passes.shard import Seed, propagate
from tessel.runtime.shares import assemble, share
from tessel.sharding.microbatches import microbatch
from tessel.sharding.plan_file import ShardingPlan, parse_plan
from tessel.sharding.planned import lay_out_plan, plan_model
from tessel.sharding.planner import Request
from tessel.sharding.spmd import Spmd, lay_out
from tessel.sharding.staged import distribute_model
from tessel.sharding.verify import verify_program, verify_ranks
from tessel.targets.mesh import Link, Mesh

S = Sharding.parse
IDS = torch.arange(16).reshape(2, 8)


class Block(nn.Module):
    """Causal attention and a layer around it, each behind a norm."""

    def __init__(self, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = Grouped(hidden, heads, groups)
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))  # type: ignore[no-any-return]


class Model(nn.Module):
    """A small decoder."""

    def __init__(self, heads: int = 4, groups: int = 2, hidden: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, groups) for _ in range(layers))
        self.head = nn.Linear(hidden, 24, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


@cache
def made(heads: int = 4, groups: int = 2, hidden: int = 16, layers: int = 1, kind: type[Model] = Model) -> Model:
    """A model that tests share; its numbers are drawn once."""
    torch.manual_seed(0)
    return kind(heads, groups, hidden, layers)


def fast(sizes: dict[str, int]) -> Mesh:
    """A mesh on which the smallest model is worth splitting."""
    return Mesh(sizes, {a: Link(1e-12, 1e13) for a in sizes})


_captures: dict[Any, Any] = {}


def captured(model: nn.Module, args: Any, kwargs: Any = None, *, train: bool) -> Any:
    """``capture_step``, once for a model and the shapes of its arguments."""
    key = (model, train, *((tuple(x.shape), x.dtype) for x in args))
    if key not in _captures:
        _captures[key] = capture_step(model, args, kwargs, train=train)
    return _captures[key]


def planned(
    model: nn.Module, given: Sequence[torch.Tensor], mesh: Mesh, train: bool = True, **asked: Any
) -> tuple[ShardingPlan, Spmd]:
    """A plan, and the program that its file gives."""
    request = Request(train=train, **{"remat": "none", **asked})
    with mock.patch("tessel.sharding.planned.capture_step", captured):
        plan = plan_model(model, given, mesh=mesh, target="h100", request=request)
    plan = parse_plan(plan.text())
    small, _ = microbatch(given, {}, request.microbatches)
    return plan, lay_out_plan(plan, captured(model, *small, train=train))


def same_gradients(spmd: Spmd, model: nn.Module, given: Sequence[torch.Tensor]) -> None:
    """A step of all ranks: gradients are those that torch has in float64, bytes the program's."""
    step, mesh, k = spmd.step, spmd.mesh, spmd.microbatches
    assert spmd.backward is not None and step.backward is not None
    exact = copy.deepcopy(model).double()
    world = InProcess(mesh)
    ranks = range(mesh.devices)
    inputs = [n for n in spmd.forward.graph.inputs if n.attrs["role"] != "constant"]
    names = [str(n.attrs["name"]) for n in inputs]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
    if spmd.gather is not None:
        kept = [str(n.attrs["name"]) for n in spmd.gather.graph.inputs]
        cut = [[share(state[n].detach(), spmd.kept[n], mesh, r) for n in kept] for r in ranks]
        whole = [dict(zip(kept, own, strict=True)) for own in on_all_ranks(spmd.gather, cut, world)]
    sums: list[list[Any]] = [[None] * len(names) for _ in ranks]
    gen = torch.Generator().manual_seed(0)
    for i in range(k):
        micro = [x.chunk(k)[i] for x in given]
        result = exact(*micro)
        xs = arguments(step.forward, model, step, micro)
        shares = []
        for r in ranks:
            own = []
            for node, x, s in zip(spmd.forward.graph.inputs, xs, spmd.forward.inputs, strict=True):
                name = str(node.attrs["name"])
                own.append(whole[r][name] if name in whole[r] else x if s is None else share(x, s, mesh, r))
            shares.append(own)
        got = on_all_ranks(spmd.forward, shares, world)
        want = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        for j in range(step.results):
            lies = spmd.forward.outputs[j]
            assert lies is not None
            found = assemble([own[j] for own in got], lies, mesh, tolerance=1e-9)
            torch.testing.assert_close(found, want[j].detach(), rtol=1e-8, atol=1e-9)
        late = [torch.randn(want[j].shape, generator=gen, dtype=torch.float64) for j in step.differentiable]
        torch.autograd.backward([want[j] for j in step.differentiable], late)
        consts = [step.backward.constants[n.attrs["name"]] for n in spmd.backward.graph.inputs
                  if n.attrs["role"] == "constant"]  # fmt: skip
        saved = len(spmd.forward.outputs) - step.results
        lies_late = spmd.backward.inputs[saved:]
        back = [
            [*got[r][step.results :], *(share(x, s, mesh, r) for x, s in zip([*late, *consts], lies_late, strict=True))]  # type: ignore[arg-type]
            for r in ranks
        ]
        for r, own in enumerate(on_all_ranks(spmd.backward, back, world)):
            sums[r] = [g if a is None else a + g for a, g in zip(sums[r], own, strict=True)]
    final = dict(zip(names, spmd.backward.outputs, strict=True))
    grads = [dict(zip(names, own, strict=True)) for own in sums]
    if spmd.reduce is not None:
        some = [str(n.attrs["name"]) for n in spmd.reduce.graph.inputs]
        for r, own in enumerate(on_all_ranks(spmd.reduce, [[g[n] for n in some] for g in grads], world)):
            grads[r].update(zip(some, own, strict=True))
        final.update(zip(some, spmd.reduce.outputs, strict=True))
    for name, p in exact.named_parameters():
        if name in final and p.grad is not None:
            lies = final[name]
            assert lies is not None and lies == spmd.inputs()[name]
            found = assemble([g[name] for g in grads], lies, mesh, tolerance=1e-9)
            torch.testing.assert_close(found, p.grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for program in spmd.programs():
        report = verify_program(program)
        assert report.proved, report.text()
    assert {m.sent.total for m in world.ranks} == {2 * spmd.bytes}  # in float64 what the program has in float32


# ---------------------------------------------------------------- sequences


@pytest.mark.parametrize(
    ("mesh", "heads", "groups", "want"),
    [
        ({"ring": 4}, 4, 2, {"s(ring)"}),
        ({"dp": 2, "ring": 2}, 4, 2, {"s(ring)"}),
        ({"dp": 2, "ulysses": 2}, 4, 2, {"g"}),
        ({"sp": 4}, 2, 1, {"s(ring)", "s"}),  # two heads do not divide
    ],
)
def test_split_sequences_are_planned_and_run(mesh: dict[str, int], heads: int, groups: int, want: set[str]) -> None:
    model, ids = made(heads, groups), IDS
    plan, spmd = planned(model, [ids], fast(mesh))
    (axis,) = set(mesh) - {"dp"}
    found = {n["splits"].get(axis) for n in plan.data["nodes"] if n["op"] == "attention"}
    assert found <= want, found
    linear = {n["splits"].get(axis) for n in plan.data["nodes"] if n["name"].endswith("up:linear")}
    assert None not in linear, "batch and sequence are apart, so that the sequence splits layers"
    same_gradients(spmd, model, [ids])
    assert spmd.bytes == plan.data["program"]["bytes"] > 0


@pytest.mark.parametrize(
    ("axis", "groups", "kind", "oracle"),
    [
        ("ring", 64, "collective_permute", "ring_forward_mha"),
        ("ring", 8, "collective_permute", "ring_forward_gqa"),
        ("ulysses", 64, "all_to_all", "ulysses_forward_mha"),
        ("ulysses", 8, "all_to_all", "ulysses_forward_gqa"),
    ],
)
def test_planned_bytes_are_those_of_the_papers(axis: str, groups: int, kind: str, oracle: str) -> None:
    with torch.device("meta"):
        model = Model(HEADS, groups, HIDDEN, layers=1).to(torch.bfloat16)
        ids = torch.empty(1, SEQUENCE, dtype=torch.int64)
    plan, _ = planned(model, [ids], Mesh({axis: DEVICES}), train=False)
    rows = plan.data["program"]["collectives"]
    assert sum(c["bytes"] for c in rows if c["kind"] == kind) == ORACLES[oracle]
    priced = [c for c in plan.data["collectives"] if c["kind"] == {"all_to_all": "all-to-all"}.get(kind, "permute")]
    assert sum(c["bytes"] * c["times"] for c in priced) == ORACLES[oracle]


def test_long_sequences_of_few_heads_go_round_a_ring() -> None:
    """Nothing is asked for: with one key head for two query heads the ring is the cheapest way over eight devices."""
    with torch.device("meta"):
        model = Model(2, 1, 1024, layers=1).to(torch.bfloat16)
        ids = torch.empty(1, 2**17, dtype=torch.int64)
    plan, _ = planned(model, [ids], Mesh({"sp": DEVICES}))
    (split,) = (n["splits"] for n in plan.data["nodes"] if n["op"] == "attention")
    assert split == {"sp": "s(ring)"}


@pytest.mark.parametrize(
    ("mesh", "heads", "words"),
    [
        ({"ulysses": 4}, 6, r"6 heads do not divide over ulysses=4"),
        ({"ring": 3}, 6, "ring=3 is there to split the sequence, and 8 does not divide by 3"),
    ],
)
def test_forms_that_do_not_fit_are_refused(mesh: dict[str, int], heads: int, words: str) -> None:
    with pytest.raises(TesselError, match=words):
        planned(made(heads, heads, 24), [torch.randint(24, (2, 8))], fast(mesh))


@pytest.mark.parametrize(("window", "steps"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (99, 4)])
def test_a_window_goes_only_as_far_as_it_reaches(window: int, steps: int) -> None:
    """Shares of two keys: a halo of whole shares, and gradients that come home from there."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 8, 4), (2, 2, 8, 4), (2, 2, 8, 4)]
    q, k, v = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
    mesh = Mesh({"sp": 4})
    nodes = [make_input(n, TensorType(tuple(x.shape), x.dtype)) for n, x in zip("qkv", (q, k, v), strict=True)]
    b = Builder(nodes)
    attrs = {"causal": True, "window": window}
    out, lse = b.node(OPS["attention"], *(n.out for n in nodes), **attrs).outs
    grads = b.node(OPS["attention_backward"], out, *(n.out for n in nodes), None, None, out, lse, **attrs).outs
    graph = b.finish((out, *grads))
    ringed = {"s": ("sp",), "t": ("sp",)}
    seeds = [Seed(n.out, S("{·,·,sp,·}"), "") for n in nodes]
    program = partition(graph, mesh, propagate(graph, mesh, seeds), splits=dict.fromkeys(graph.nodes, ringed))
    assert Counter(c.kind for c in program.collectives()) == Counter(
        collective_permute=4 * (steps - 1) + (2 * steps if steps > 1 else 0)
    )
    whole = [q, k, v]
    cut = [[share(x, s, mesh, r) for x, s in zip(whole, program.inputs, strict=True)] for r in range(4)]  # type: ignore[arg-type]
    got = on_all_ranks(program, cut, InProcess(mesh))
    for i, want in enumerate(interpret(graph, whole, precise=True)):
        lies = program.outputs[i]
        assert lies is not None
        torch.testing.assert_close(assemble([g[i] for g in got], lies, mesh, tolerance=1e-9), want)


@pytest.mark.parametrize(("decay", "start"), [(None, False), ("number", True), ("channels", False)])
def test_states_are_gathered(decay: str | None, start: bool) -> None:
    """LASP-2: (W-1) states of d x d a head and rank, whatever the length; with factors, how each decays."""
    gen = torch.Generator().manual_seed(0)
    b, h, t, k, v, parts = 2, 3, 8, 4, 5, 4

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    given: list[torch.Tensor | None] = [real(b, h, t, k), real(b, h, t, k), real(b, h, t, v)]
    given += [None if decay is None else torch.rand(b, h, t, *([k] * (decay == "channels")), generator=gen).double()]
    given += [None, real(b, h, k, v) if start else None, real(b, h, t, v), real(b, h, k, v) if start else None]
    nodes = [None if x is None else make_input(f"i{i}", TensorType(tuple(x.shape), x.dtype))
             for i, x in enumerate(given)]  # fmt: skip
    q, k_, v_, factors, beta, first, grad, last = (None if n is None else n.out for n in nodes)
    builder = Builder([n for n in nodes if n is not None])
    out, state = builder.node(OPS["linear_attention"], q, k_, v_, factors, beta, first).outs
    grads = builder.node(OPS["linear_attention_backward"], grad, last, q, k_, v_, factors, beta, first).outs
    wanted = [g for g in grads if g.shape != (0,)]
    graph = builder.finish((out, state, *wanted))
    mesh = Mesh({"sp": parts})
    seeds = [Seed(n.out, S("{·,·,sp,·}" if n.out.type.rank == 4 else "{·,·,sp}"), "")
             for i, n in enumerate(nodes) if n is not None and i not in (5, 7)]  # fmt: skip
    split = {"t": ("sp",)}
    program = partition(graph, mesh, propagate(graph, mesh, seeds), splits=dict.fromkeys(graph.nodes, split))
    rows = [c.bytes for c in program.collectives() if c.kind == "all_gather" and "of linear_attention" in c.tensor]
    size = (parts - 1) * b * h * k * v * 8
    decays = {None: [], "number": [(parts - 1) * b * h * 8], "channels": [(parts - 1) * b * h * k * 8]}[decay]
    assert sorted(rows) == sorted([size, size, size, *decays, *decays])
    values = [x for x in given if x is not None]
    cut = [[share(x, s, mesh, r) for x, s in zip(values, program.inputs, strict=True)] for r in range(parts)]  # type: ignore[arg-type]
    got = on_all_ranks(program, cut, InProcess(mesh))
    for i, want in enumerate(interpret(graph, values, precise=True)):
        lies = program.outputs[i]
        assert lies is not None
        torch.testing.assert_close(assemble([g[i] for g in got], lies, mesh, tolerance=1e-9), want)


class Recurrent(nn.Module):
    """Words, linear attention whose states decay, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.into, self.head = nn.Embedding(24, 16), nn.Linear(16, 48), nn.Linear(16, 24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in self.into(self.embed(ids)).chunk(3, -1))
        out, _ = linear_attention(q, k, v)
        return self.head(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_tokens_of_linear_attention_are_planned_and_run() -> None:
    torch.manual_seed(0)
    model, ids = Recurrent(), torch.randint(24, (2, 8))
    plan, spmd = planned(model, [ids], fast({"sp": 4}))
    (node,) = (n for n in plan.data["nodes"] if n["op"] == "linear_attention")
    assert node["splits"] == {"sp": "t(states)"}
    same_gradients(spmd, model, [ids])


def test_states_of_the_papers_size() -> None:
    """LASP-2's 64 heads of states of 128 x 128, in the paper's two bytes a number; ours are float32."""
    with torch.device("meta"):
        b = Builder([make_input(n, TensorType((1, HEADS, SEQUENCE, 128), torch.bfloat16)) for n in "qkv"])
        out, state = b.node(OPS["linear_attention"], *(n.out for n in b.inputs)).outs
    graph, mesh = b.finish((out,)), Mesh({"sp": DEVICES})
    layouts = propagate(graph, mesh, [Seed(n.out, S("{·,·,sp,·}"), "") for n in b.inputs])
    program = partition(graph, mesh, layouts, splits={n: {"t": ("sp",)} for n in graph.nodes})
    (states,) = (c for c in program.collectives() if c.kind == "all_gather")
    assert states.bytes == ORACLES["lasp2_forward"] * state.dtype.itemsize // 2


class Video(nn.Module):
    """Attention over the places of every frame, then over the frames of every place."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.places, self.frames = Grouped(hidden, heads, heads), Grouped(hidden, heads, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frames(self.places(x).transpose(0, 1))  # type: ignore[no-any-return]


def switched(model: nn.Module, x: torch.Tensor, mesh: Mesh, train: bool) -> Spmd:
    said = [("shard", "inputs[0]", ("sp", None, None)), ("output", "places", ("sp", None, None)),
            ("output", "frames", ("sp", None, None))]  # fmt: skip
    return lay_out(capture_step(model, (x,), train=train), mesh, annotations(said))


def test_a_switch_of_what_is_split_is_one_exchange() -> None:
    """Dynamic sequence parallelism (DSP, arXiv 2403.10266): of M bytes a device sends M(N-1)/N²."""
    torch.manual_seed(0)
    model, x, n = Video(16, 4), torch.randn(8, 4, 16), 4
    spmd = switched(model, x, Mesh({"sp": n}), train=True)
    assert counts(spmd.forward) == {"all_to_all sp": 1, "all_gather sp": 1}  # the result is whole on every device
    # the backward switches the gradient, and what the forward saved before its switch
    assert spmd.backward is not None and counts(spmd.backward)["all_to_all sp"] == 2
    same_as_one_device(spmd, model, [x])
    with torch.device("meta"):
        large, frames = Video(HIDDEN, HEADS).to(torch.bfloat16), torch.empty(64, 128, HIDDEN, dtype=torch.bfloat16)
    program = switched(large, frames, Mesh({"sp": DEVICES}), train=False).forward
    (switch,) = (c for c in program.collectives() if c.kind == "all_to_all")
    assert switch.bytes == frames.nbytes * (DEVICES - 1) // DEVICES**2


# ---------------------------------------------------------------- tokens that travel to their experts


def layer(bias: bool, turned: bool) -> tuple[Graph, list[torch.Tensor]]:
    """A layer of eight experts and its gradients, and numbers for it."""
    gen = torch.Generator().manual_seed(1)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    t, h, e, i, o = 16, 4, 8, 3, 5
    first, second = ((e, h, 2 * i), (e, i, o)) if turned else ((e, 2 * i, h), (e, o, i))
    index = torch.stack([torch.randperm(e, generator=gen)[:2] for _ in range(t)])
    given = [real(t, h), real(*first), real(e, 2 * i), real(*second), real(e, o), index, real(t, 2), real(t, o)]
    used = [x for n, x in enumerate(given) if bias or n not in (2, 4)]
    nodes = [make_input(f"i{n}", TensorType(tuple(x.shape), x.dtype)) for n, x in enumerate(used)]
    values = iter(n.out for n in nodes)
    args = [next(values) if bias or n not in (2, 4) else None for n in range(8)]
    b = Builder(nodes)
    out, pre = b.node(OPS["experts"], *args[:7], turned=turned, keep=True).outs
    grads = b.node(OPS["experts_backward"], args[7], *args[:7], pre, turned=turned).outs
    wanted = [g for n, g in enumerate(grads) if bias or n not in (2, 4)]
    return b.finish((out, *wanted)), used


@pytest.mark.parametrize(
    ("mesh", "bias", "turned"), [({"ep": 4}, False, False), ({"ep": 2}, True, True), ({"dp": 2, "ep": 2}, True, False)]
)
def test_tokens_go_to_their_experts(mesh: dict[str, int], bias: bool, turned: bool) -> None:
    graph, given = layer(bias, turned)
    over = Mesh(mesh)
    split = {"t": tuple(mesh), "e": ("ep",)}
    seeds = []
    for n, x in zip(graph.inputs, given, strict=True):
        dims: list[tuple[str, ...]] = [tuple(mesh) if len(x) == 16 else ("ep",), *([()] * (x.dim() - 1))]
        seeds.append(Seed(n.out, Sharding(tuple(dims)), ""))
    layouts = propagate(graph, over, seeds)
    program = partition(graph, over, layouts, splits=dict.fromkeys(graph.nodes, split), capacity=1.9)
    parts = mesh["ep"]
    tokens = 16 // over.devices
    room = min(tokens, -(-19 * tokens * 2 // parts // 10)) if parts > 2 else tokens
    assert verify_program(program).proved
    rows = [c.bytes for c in program.collectives() if c.kind == "all_to_all"]
    assert len(rows) == 4 + 6
    assert rows[0] == parts * room * 4 * 8 * (parts - 1) // parts
    cut = [[share(x, s, over, r) for x, s in zip(given, program.inputs, strict=True)] for r in range(over.devices)]  # type: ignore[arg-type]
    got = on_all_ranks(program, cut, InProcess(over))
    for i, want in enumerate(interpret(graph, given, precise=True)):
        lies = program.outputs[i]
        assert lies is not None
        torch.testing.assert_close(assemble([g[i] for g in got], lies, over, tolerance=1e-9), want)


def test_faults_of_tokens_that_travel_are_found() -> None:
    graph, given = layer(False, False)
    mesh = Mesh({"ep": 2})
    seeds = [Seed(n.out, Sharding((("ep",), *([()] * (x.dim() - 1)))), "")
             for n, x in zip(graph.inputs, given, strict=True)]  # fmt: skip
    split = {"t": ("ep",), "e": ("ep",)}
    program = partition(graph, mesh, propagate(graph, mesh, seeds), splits=dict.fromkeys(graph.nodes, split))
    assert verify_program(program).proved

    def fault(b: Builder, n: Any) -> Any:
        return b.node(n.op, *n.args, **{**n.attrs, "offset": 0}).outs if n.op.name == "experts" else None

    (found,) = verify_ranks(program, [program.rank(r).rewrite(fault) for r in range(2)]).faults
    assert "rank 1 is to run experts here" in found


def test_more_tokens_than_there_is_room_for_end_the_run() -> None:
    graph, given = layer(False, False)
    given[3] = torch.zeros_like(given[3])  # all tokens want the first expert
    mesh = Mesh({"ep": 4})
    seeds = [Seed(n.out, Sharding((("ep",), *([()] * (x.dim() - 1)))), "")
             for n, x in zip(graph.inputs, given, strict=True)]  # fmt: skip
    split = {"t": ("ep",), "e": ("ep",)}
    layouts = propagate(graph, mesh, seeds)
    program = partition(graph, mesh, layouts, splits=dict.fromkeys(graph.nodes, split), capacity=1.0)
    cut = [[share(x, s, mesh, r) for x, s in zip(given, program.inputs, strict=True)] for r in range(4)]  # type: ignore[arg-type]
    with pytest.raises(TesselError, match="4 of a device's 4 tokens go to one device, there is room for 2"):
        on_all_ranks(program, cut, InProcess(mesh))


# ---------------------------------------------------------------- ZeRO, microbatches, remat


@pytest.mark.parametrize(("zero", "microbatches"), [(0, 2), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_stages_of_zero(zero: int, microbatches: int) -> None:
    """DP, ZeRO-1 and 2 send 2Ψ(n-1)/n, ZeRO-3 3Ψ(n-1)/n; what is not kept whole moves for every microbatch."""
    model, ids = made(4, 2), torch.arange(32).reshape(4, 8) % 24 if microbatches > 1 else IDS
    plan, spmd = planned(model, [ids], fast({"dp": 2}), zero=zero, microbatches=microbatches)
    assert all("dp" in n["splits"] for n in plan.data["nodes"] if n["op"] == "matmul")
    k = microbatches
    times = {0: 2, 1: 2, 2: 1 + k, 3: 3 * k}[zero]
    sizes = {n: 4 * p.numel() for n, p in model.named_parameters()}
    psi = sum(sizes.values())
    # the backward gathers what it reads: not the table of words, and nothing that was added
    unread = k * sum(n for name, n in sizes.items() if name.startswith("embed") or name.endswith("bias"))
    rows = plan.data["program"]["collectives"]
    of_results = [c for c in rows if (c["phase"], c["why"][:8]) == ("forward", "output 0")]
    sent = times * psi - (unread if zero == 3 else 0)
    assert plan.data["program"]["bytes"] - sum(c["bytes"] * c.get("times", 1) for c in of_results) == sent // 2
    assert spmd.bytes == plan.data["program"]["bytes"]
    states = {t.get("state", t["sharding"]) for t in plan.data["tensors"].values()}
    assert all(("dp" in s) == (zero > 0) for s in states)
    same_gradients(spmd, model, [ids])


def saved_bytes(spmd: Spmd) -> int:
    """Bytes of activations that a device keeps for the backward."""
    graph = spmd.forward.graph
    pairs = list(zip(graph.outputs, spmd.forward.outputs, strict=True))[spmd.step.results :]
    weights = {n.out for n in graph.inputs}
    sizes = [
        v.dtype.itemsize * torch.Size(s.local_shape(v.shape, spmd.mesh)).numel()
        for v, s in pairs
        if s is not None and v not in weights and not (v.op.kind == "view" and v.node.args[0] in weights)
    ]
    return sum(sizes)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"ring": 2}])
def test_blocks_are_computed_again(mesh: dict[str, int]) -> None:
    model, ids = made(4, 2), IDS
    held = {}
    for how in ("none", "selective", "full"):
        plan, spmd = planned(model, [ids], fast(mesh), remat=how)
        same_gradients(spmd, model, [ids])
        held[how] = saved_bytes(spmd)
        assert {n["keep"] for n in plan.data["nodes"]} == {how}
    assert held["full"] < 0.5 * held["none"] and held["selective"] <= held["none"], held


class Dropped(Model):
    """With numbers that both runs of a block must draw alike."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = nn.functional.dropout(block(x), 0.5, training=True)
        return self.head(x)  # type: ignore[no-any-return]


def test_random_numbers_are_not_drawn_again() -> None:
    _, spmd = planned(made(kind=Dropped), [IDS], fast({"dp": 2}), remat="full")
    assert spmd.backward is not None
    assert any(n.op.random for n in spmd.forward.graph.nodes)
    assert not any(n.op.random for n in spmd.backward.graph.nodes)


def test_bad_numbers_of_microbatches() -> None:
    model, ids = made(4, 2), torch.randint(24, (6, 8))
    with pytest.raises(TesselError, match="a batch of 6 rows does not divide into 4 microbatches"):
        planned(model, [ids], fast({"dp": 2}), microbatches=4)
    with pytest.raises(TesselError, match="2 microbatches are for training"):
        planned(model, [ids], fast({"dp": 2}), train=False, microbatches=2)
    with pytest.raises(TesselError, match="zero: expected a stage from 0 to 3, got 4"):
        planned(model, [ids], fast({"dp": 2}), zero=4)


# ---------------------------------------------------------------- the public face


def test_the_public_plan_takes_what_was_asked() -> None:
    model, ids = made(4, 2), torch.randint(24, (4, 8))
    with mock.patch("tessel.sharding.planned.capture_step", captured):
        plan = tessel.plan(
            model, (ids,), mesh=fast({"dp": 2}), target="h100", train=True, remat="full", microbatches=2, zero=2
        )
    settings = plan.data["settings"]
    assert (settings["remat"], settings["microbatches"], settings["global_batch"]) == ("full", 2, 4)


# ---------------------------------------------------------------- real processes


def loss(result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(result.flatten(0, 1), target.flatten())


def steps_of_a_rank(rank: int, world: int, port: int, folder: str) -> None:
    """Two microbatches, then one, in ZeRO's stages, against one device; shards are updated and gathered."""
    environment(rank, world, port, folder)
    torch.manual_seed(0)
    model, ids, target = Model(layers=1), torch.randint(24, (4, 8)), torch.randint(24, (4, 8))
    for zero, microbatches in ((1, 2), (2, 1)):
        asked = {"train": True, "remat": "full", "zero": zero, "microbatches": microbatches}
        plan = tessel.plan(model, (ids,), mesh=fast({"dp": 2}), target="h100", **asked)  # type: ignore[arg-type]
        more = {"loss": loss} if microbatches > 1 else {}
        placed: Any = distribute_model(model, plan, args=(ids,), seconds=100, run="interpreted", **more)
        single = copy.deepcopy(model).double()
        ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (placed, single))
        before = placed.sent
        for _ in range(2):
            if microbatches > 1:
                out, losses = placed.step(ids, target=target)
                assert len(losses) == 2
                with pytest.raises(TesselError, match=r"runs by .step"):
                    placed(ids)
            else:
                out = placed(ids)
                loss(out, target).backward()
            want = single(ids)
            loss(want, target).backward()
            torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
        assert placed.sent - before == 2 * plan.data["program"]["bytes"]
        named = dict(placed.module.named_parameters())
        for name, p in single.named_parameters():
            lies = placed.shardings[name]
            assert lies.axes == ("dp",)
            want = share(p.detach(), lies, placed.spmd.mesh, rank)
            torch.testing.assert_close(named[name].detach().double(), want, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_steps_of_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        start(steps_of_a_rank, 2, free_port(), folder)
