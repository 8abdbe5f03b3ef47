"""Collectives merged into calls, begun early and waited for late: the same results and bytes, less waiting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ranks import annotations, same_as_one_device
from torch import nn

from tessel.errors import TesselError
from tessel.frontend.joint import Step, capture_step
from tessel.ir.node import Builder, Graph, Node, make_input
from tessel.ir.sharding import Sharding
from tessel.ir.types import TensorType
from tessel.ops import OPS
from tessel.passes._rank import Action, Local, Move, Start, Wait
from tessel.passes._reshard import reshard
from tessel.passes.collectives import Overlap, overlapped
from tessel.passes.partition import Program, partition
from tessel.passes.shard import Seed, propagate
from tessel.runtime.collectives import ProcessGroups
from tessel.sharding.spmd import Spmd, lay_out
from tessel.sharding.verify import verify_program, verify_ranks
from tessel.targets.mesh import Mesh

S = Sharding.parse
WIDE, LAYERS = 16, 3


class Layer(nn.Module):
    """A feed-forward layer; every parameter has its own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDE), nn.Linear(WIDE, 32), nn.Linear(32, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


@cache
def captured() -> tuple[nn.Module, torch.Tensor, Step]:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Layer() for _ in range(LAYERS))), torch.randn(4, WIDE)
    return model, x, capture_step(model, (x,), train=True)


DATA = [("shard", "inputs[0]", ("dp", None))]
APART = [*DATA, *(("shard", f"*.{n}.weight", ("dp", None), {"gather": ["dp"]}) for n in ("up", "down"))]


@cache
def laid(lines: str, overlap: Overlap | None) -> Spmd:
    return lay_out(captured()[2], Mesh({"dp": 2}), annotations({"data": DATA, "apart": APART}[lines]), overlap=overlap)


def starts(program: Program) -> list[Start]:
    return [a for a in program.actions if isinstance(a, Start)]


def held(start: Start) -> int:
    """Bytes that a call of half of a tensor's rows (gathers), or of a whole gradient (sums), brings."""
    return sum(m.value.type.nbytes for m in start.moves)


@pytest.mark.parametrize("lines", ["data", "apart"])
@pytest.mark.parametrize("overlap", [Overlap(4096, 2**20), Overlap(0, 2**20), Overlap(4096, 0)])
def test_results_and_bytes_stay(lines: str, overlap: Overlap) -> None:
    """On all ranks of a mesh, in float64; nothing but the calls changes, and z3 proves it."""
    model, x, _ = captured()
    plain, spmd = laid(lines, None), laid(lines, overlap)
    same_as_one_device(spmd, model, [x])
    assert spmd.bytes == plain.bytes > 0
    for a, b in zip(plain.programs(), spmd.programs(), strict=True):
        rows = [sorted((c.kind, c.axes, c.bytes, c.tensor) for c in p.collectives()) for p in (a, b)]
        assert rows[0] == rows[1]
        nodes = [[str(x.node) for x in p.actions if isinstance(x, Local)] for p in (a, b)]
        assert nodes[0] == nodes[1]  # what is computed, in its order
        report = verify_program(b)
        assert report.proved and report.collectives == len(rows[1]), report.text()


def test_gradients_share_calls() -> None:
    """Buckets of gradients, each begun when its last is there, as long as more is computed."""
    assert laid("data", None).backward is not None
    small, large = (laid("data", Overlap(n, 2**20)).backward for n in (4500, 2**20))
    assert small is not None and large is not None
    (only,) = starts(large)
    assert len(only.moves) == 6 * LAYERS and only.beside == 0  # the last gradient is in it
    calls = starts(small)
    assert len(calls) > 2 and all(held(c) <= 4500 for c in calls)
    assert all(c.beside > 0 for c in calls[:-1])
    assert sum(len(c.moves) for c in calls) == len(small.collectives())


def test_one_by_one_and_begun_early() -> None:
    """Without buckets every gradient goes its way as soon as it is there."""
    program = laid("data", Overlap(0, 2**20)).backward
    assert program is not None
    rows = program.collectives()
    assert len({c.call for c in rows}) == len(rows) == 6 * LAYERS
    assert sum(c.beside > 0 for c in rows) >= 6 * LAYERS - 3


def test_parameters_of_a_layer_share_a_call_and_come_before_their_use() -> None:
    program = laid("apart", Overlap(2**20, 2**20)).forward
    gathers = [s for s in starts(program) if s.moves[0].steps[0].kind == "all_gather" and s.moves[0].loc.module]
    assert [sorted({m.loc.module for m in s.moves}) for s in gathers] == [
        [f"{i}.down", f"{i}.up"] for i in range(LAYERS)
    ]
    assert all(s.beside > 0 for s in gathers)  # of the first, a norm
    one = laid("apart", Overlap(2**20, 0)).forward  # nothing early: a layer's call stands before its first product
    assert all(c.beside == 0 for c in one.collectives())
    assert len(starts(one)) == LAYERS


def on_the_way(program: Program) -> int:
    """The most bytes of results that are there before their first reader, and of operands that are kept for a call."""
    there: dict[Any, int] = {}
    most = 0
    for i, a in enumerate(program.actions):
        if isinstance(a, Start):
            for m in a.moves:
                nbytes = m.value.dtype.itemsize * torch.Size(m.after.local_shape(m.value.shape, program.mesh)).numel()
                late = not any(reads(b, m) for b in program.actions[i + 1 :])
                there[m] = nbytes if not late else 2 * nbytes
        elif isinstance(a, Wait):
            for m in a.moves:
                if not any(reads(b, m) for b in program.actions[i + 1 :]):
                    there.pop(m)
        else:
            for m in [m for m in there if reads(a, m)]:
                del there[m]
        most = max(most, sum(there.values()))
    return most


def reads(a: Action, move: Move) -> bool:
    if not isinstance(a, Local):
        return isinstance(a, Move) and (a.value, a.before) == (move.value, move.after)
    values = (v for v in a.node.operands if isinstance(v.type, TensorType))
    return any((v, s) == (move.value, move.after) for v, s in zip(values, a.reads, strict=True))


@pytest.mark.parametrize("limit", [3000, 5000, 9000, 2**20])
def test_memory_on_the_way_is_limited(limit: int) -> None:
    """What is early never takes more; with less of it, less is early."""
    spmd = laid("apart", Overlap(0, limit))
    for program in spmd.programs():
        assert on_the_way(program) <= limit
    early = [sum(c.beside > 0 for c in laid("apart", Overlap(0, n)).forward.collectives()) for n in (0, limit)]
    assert early[0] == 0 < early[1]


# ---------------------------------------------------------------- small programs


def program_of(graph: Graph, mesh: Mesh, seeds: dict[str, str], outputs: dict[int, Sharding]) -> Program:
    found = [Seed(n.out, S(seeds[n.attrs["name"]]), "") for n in graph.inputs]
    return partition(graph, mesh, propagate(graph, mesh, found), outputs=outputs)


def called(program: Program, overlap: Overlap) -> list[Action]:
    return overlapped(program.graph, program.mesh, program.actions, program.inputs, overlap)


def sums(n: int, shape: Sequence[int] = (8, 8), dtype: torch.dtype = torch.float32) -> Program:
    """Sums over a split dimension that nothing reads, one after the other."""
    nodes = [make_input(f"x{i}", TensorType(tuple(shape), dtype)) for i in range(n)]
    b = Builder(nodes)
    made = [b.add(OPS["sum"], x.out, dims=(0,), keepdim=False) for x in nodes]
    mesh = Mesh({"a": 8})
    lies = "{a" + ",·" * (len(shape) - 1) + "}"
    leave = {i: Sharding.replicated(len(shape) - 1) for i in range(n)}
    return program_of(b.finish(made), mesh, {f"x{i}": lies for i in range(n)}, leave)


def test_a_collective_stands_above_what_does_not_need_it() -> None:
    x, y = (make_input(n, TensorType((8, 8), torch.float32)) for n in "xy")
    b = Builder([x, y])
    total = b.add(OPS["sum"], x.out, dims=(0,), keepdim=False)
    other = b.add(OPS["exp"], b.add(OPS["sin"], y.out))
    graph = b.finish([b.add(OPS["mul"], b.add(OPS["relu"], total), other)])
    program = program_of(graph, Mesh({"a": 2}), {"x": "{a,·}", "y": "{·,·}"}, {0: S("{·,·}")})
    words = [a.node.op.name if isinstance(a, Local) else type(a).__name__ for a in called(program, Overlap())]
    assert words == ["sum", "Start", "sin", "exp", "Wait", "relu", "mul"]
    assert [type(a).__name__ for a in called(program, Overlap(0, 0)) if not isinstance(a, Local)] == ["Move"]
    assert [type(a).__name__ for a in called(program, Overlap(0, 300)) if not isinstance(a, Local)] == ["Start", "Wait"]
    assert [type(a).__name__ for a in called(program, Overlap(0, 60)) if not isinstance(a, Local)] == ["Move"]


def test_calls_send_what_their_collectives_would() -> None:
    """2·2·7/8 bytes are sent as 3, and 2·4·7/8 as 7: those two are no call. Of 16 bytes two are."""
    odd = called(sums(2, (8, 1), torch.bfloat16), Overlap())
    assert all(len(a.moves) == 1 for a in odd if isinstance(a, Start)) and sum(isinstance(a, Local) for a in odd) == 2
    (even,) = (a for a in called(sums(2), Overlap()) if isinstance(a, Start))
    assert len(even.moves) == 2


def test_other_types_and_ranks_are_other_calls() -> None:
    nodes = [make_input(f"x{i}", TensorType((8, 8), t)) for i, t in enumerate((torch.float32, torch.float64) * 2)]
    b = Builder(nodes)
    made = [b.add(OPS["sum" if i < 3 else "amax"], x.out, dims=(0,), keepdim=False) for i, x in enumerate(nodes)]
    program = program_of(
        b.finish(made), Mesh({"a": 2}), {f"x{i}": "{a,·}" for i in range(4)}, dict.fromkeys(range(4), S("{·}"))
    )
    found = [
        [m.value.node.args[0].node.attrs["name"] for m in a.moves]
        for a in called(program, Overlap())
        if isinstance(a, Start)
    ]
    assert sorted(found) == [["x0", "x2"], ["x1"], ["x3"]]


def test_what_is_at_hand_is_not_brought_again() -> None:
    """A second way to the same share, and a first step that two ways have in common."""
    x = make_input("x", TensorType((8, 8), torch.float32))
    graph = Builder([x]).finish([x.out])
    mesh = Mesh({"a": 2, "b": 2})
    here, whole, other = S("{a.b,·}"), S("{·,·}"), S("{a,·}")
    program = Program(graph, mesh, propagate(graph, mesh, []), [], (here,), (whole,))
    ways = [reshard((8, 8), 4, here, s, mesh) for s in (other, whole, whole)]
    program.actions = [Move(x.out, steps, "") for steps in ways]
    assert [len(w) for w in ways] == [1, 1, 1]
    assert [a.after for a in called(program, Overlap(0, 0)) if isinstance(a, Move)] == [other, whole]
    program.actions.append(Move(x.out, reshard((8, 8), 4, whole, here, mesh), ""))  # it came so
    assert len(called(program, Overlap(0, 0))) == 2


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -1)])
def test_sizes_below_nothing_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(TesselError, match="_bytes: expected a number of bytes, got -1"):
        Overlap(*numbers)


# ---------------------------------------------------------------- planted faults


def moved(graph: Graph, order: Sequence[int]) -> Graph:
    return graph.replace(nodes=tuple(graph.nodes[i] for i in order))


def ranks_of(program: Program, change: Any) -> list[Graph]:
    """The ranks' graphs, the last one changed."""
    graphs = [program.rank(r) for r in range(program.mesh.devices)]
    return [*graphs[:-1], change(graphs[-1])]


def other_order(graph: Graph) -> Graph:
    """The first two calls begin the other way round."""
    at = [i for i, n in enumerate(graph.nodes) if n.op.name == "collective_start"][:2]
    order = list(range(len(graph.nodes)))
    needed = [i for i, n in enumerate(graph.nodes) if at[0] < i < at[1]]
    order[at[0] : at[1] + 1] = [*needed, at[1], at[0]]
    return moved(graph, order)


def swapped(graph: Graph) -> Graph:
    """The two operands of the first call, and with them its results, are exchanged."""
    first = next(n for n in graph.nodes if n.op.name == "collective_start")

    def change(b: Builder, n: Node) -> Any:
        if n.op.name == "collective_start" and len(n.args) > 1 and n.loc == first.loc:
            return b.node(n.op, *reversed(n.args), **n.attrs).outs
        return None

    return graph.rewrite(change)


def too_soon(graph: Graph) -> Graph:
    """What is computed from a call's result reads its operand instead."""

    def change(b: Builder, n: Node) -> Any:
        if n.op.name == "collective_wait":
            b.append(n)
            return tuple(n.args[1:])
        return None

    return graph.rewrite(change)


def early_wait(graph: Graph) -> Graph:
    """The first call is waited for where it begins."""
    start = next(i for i, n in enumerate(graph.nodes) if n.op.name == "collective_start")
    wait = next(i for i, n in enumerate(graph.nodes) if n.op.name == "collective_wait")
    order = [i for i in range(len(graph.nodes)) if i != wait]
    order.insert(start + 1, wait)
    return moved(graph, order)


def unfinished(graph: Graph) -> Graph:
    """A call begins that nobody waits for."""
    starts = [n for n in graph.nodes if n.op.name == "collective_start"]
    return graph.replace(nodes=(*graph.nodes, starts[-1].replace()))


@pytest.mark.parametrize(
    ("change", "everywhere", "words"),
    [
        (other_order, False, "rank 0 runs collective_start where rank 7 runs sum: they would wait"),
        (swapped, False, "some ranks read"),
        (too_soon, True, r"output 0 leaves as \{·\|a:sum\}, it is to be \{·\}"),
        (early_wait, False, "rank 0 runs sum where rank 7 runs collective_wait: they would wait"),
        (unfinished, True, "a call is begun, and nobody waits for it"),
    ],
)
def test_wrong_orders_are_refused(change: Any, everywhere: bool, words: str) -> None:
    program = sums(4)
    program.actions = called(program, Overlap(64 if change is swapped else 0, 2**20))
    assert verify_program(program).proved
    graphs = ranks_of(program, change)
    if everywhere:
        graphs = [change(program.rank(r)) for r in range(program.mesh.devices)]
    (fault,) = verify_ranks(program, graphs).faults
    assert re.search(words, fault), fault


class Done:
    """A call that is done between the end of the time to look and the look, well or not."""

    def __init__(self, error: str = "") -> None:
        self.error, self.waited = error, 0

    def wait(self, *timeout: timedelta) -> None:
        self.waited += 1
        if self.waited == 1 or self.error:
            raise RuntimeError(self.error if self.waited > 1 else "Operation timed out!")

    def is_completed(self) -> bool:
        return True


def test_a_call_that_is_done_when_the_time_to_look_is_up() -> None:
    """Its own end counts, not that of the time: ranks on a busy machine stopped for no reason."""
    waiting: Any = SimpleNamespace(_polls=True, seconds=60.0, _stopped=lambda: "")
    ProcessGroups.wait(waiting, cast(Any, Done()))
    with pytest.raises(RuntimeError, match="a peer is gone"):
        ProcessGroups.wait(waiting, cast(Any, Done("a peer is gone")))
