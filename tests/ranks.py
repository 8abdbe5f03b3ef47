"""All ranks of a laid-out model in one process, compared with one device in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from in_process import InProcess

from tessel.frontend.importer import Imported
from tessel.frontend.joint import Step
from tessel.ir.interp import interpret
from tessel.ir.sharding import Sharding
from tessel.ir.verify import verify
from tessel.ops import OPS
from tessel.passes.partition import Program
from tessel.runtime.shares import assemble, share
from tessel.sharding.annotate import Annotations
from tessel.sharding.spmd import Spmd
from tessel.targets.mesh import Mesh

Lines = Sequence[tuple[Any, ...]]


def annotations(lines: Lines) -> Annotations:
    """Annotations from tuples: method, name, dims and keyword arguments."""
    found = Annotations()
    for method, *rest in lines:
        keywords = rest.pop() if rest and isinstance(rest[-1], dict) else {}
        getattr(found, method)(*rest, **keywords)
    return found


def counts(program: Program) -> Counter[str]:
    """How often each kind of collective stands in a program, as ``all_reduce tp``."""
    return Counter(f"{c.kind} {'.'.join(c.axes)}" for c in program.collectives())


def arguments(imported: Imported, model: torch.nn.Module, step: Step, user: Sequence[torch.Tensor]) -> list[Any]:
    """The inputs of a forward graph: parameters, buffers, constants, the user's tensors."""
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    found = []
    for i, node in enumerate(imported.graph.inputs):
        name, role = str(node.attrs["name"]), node.attrs["role"]
        if role == "constant":
            found.append(imported.constants[name])
        else:
            found.append(user[step.positions[i]] if i in step.positions else state[name].detach())
    return found


def on_all_ranks(program: Program, shares: list[list[Any]], world: InProcess) -> list[list[Any]]:
    """What each rank's program gives for its inputs, in float64."""
    graphs = [program.rank(r) for r in range(program.mesh.devices)]
    verify(graphs[-1], OPS)
    assert len({tuple(n.op.name for n in g.nodes if n.op.random) for g in graphs}) == 1
    return world.run(lambda r: interpret(graphs[r], shares[r], precise=True))


def cut(xs: Sequence[Any], shardings: Sequence[Sharding | None], mesh: Mesh) -> list[list[Any]]:
    """For each rank its shares."""
    pairs = list(zip(xs, shardings, strict=True))
    return [[x if s is None else share(x, s, mesh, r) for x, s in pairs] for r in range(mesh.devices)]


def compare(got: list[list[Any]], program: Program, want: Sequence[Any], n: int) -> None:
    """The first ``n`` outputs, put together, are those of one device."""
    for i in range(n):
        s = program.outputs[i]
        if s is None:
            assert want[i] is None
            continue
        whole = assemble([parts[i] for parts in got], s, program.mesh, tolerance=1e-9)
        torch.testing.assert_close(whole, want[i], rtol=1e-9, atol=1e-9)


def same_as_one_device(spmd: Spmd, model: torch.nn.Module, user: Sequence[torch.Tensor]) -> None:
    """Results, and with a backward the gradients of all inputs, equal those of one device; bytes the plan's."""
    step, mesh = spmd.step, spmd.mesh
    inputs = arguments(step.forward, model, step, user)
    want = interpret(step.forward.graph, inputs, precise=True)
    world = InProcess(mesh)
    got = on_all_ranks(spmd.forward, cut(inputs, spmd.forward.inputs, mesh), world)
    compare(got, spmd.forward, want, step.results)
    if spmd.backward is None or step.backward is None:
        return
    saved = len(want) - step.results
    gen = torch.Generator().manual_seed(0)
    tangents = [torch.randn(want[i].shape, generator=gen, dtype=want[i].dtype) for i in step.differentiable]
    graph = step.backward.graph
    constants = [step.backward.constants[n.attrs["name"]] for n in graph.inputs if n.attrs["role"] == "constant"]
    grads = interpret(graph, [*want[step.results :], *tangents, *constants], precise=True)
    late = cut([*tangents, *constants], spmd.backward.inputs[saved:], mesh)
    shares = [[*got[r][step.results :], *late[r]] for r in range(mesh.devices)]
    back = on_all_ranks(spmd.backward, shares, world)
    compare(back, spmd.backward, grads, len(grads))
    calls = {tuple(sorted(m.sent.calls.items())) for m in world.ranks}
    planned = (c.kind for p in (spmd.forward, spmd.backward) for c in p.collectives())
    assert calls == {tuple(sorted(Counter(planned).items()))}
