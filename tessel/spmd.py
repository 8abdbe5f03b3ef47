"""A captured model laid out on a mesh: the partitioned forward and backward, and how every tensor is kept.

One program for all devices (SPMD): ``lay_out`` spreads the annotations, partitions both graphs and sees to it
that they fit together: what the forward saves arrives in the backward as it left, and each gradient has the
sharding of its parameter, so that what data parallelism adds up, or scatters, falls out of partial sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .annotate import Annotations, seeds
from .frontend.importer import Imported
from .frontend.joint import Step
from .ir.node import Graph, Node, Value
from .ir.sharding import Sharding
from .ir.types import TensorType
from .passes._factors import Split
from .passes._reshard import Price
from .passes.partition import Collective, Program, partition
from .passes.pipeline import BEFORE_SHARD, run_pipeline
from .passes.shard import Seed, propagate
from .targets.mesh import Mesh


@dataclass(frozen=True)
class Spmd:
    """A model on a mesh.

    Attributes:
        step: as captured; the graphs of ``forward`` and ``backward`` have gone through ``BEFORE_SHARD``.
        mesh: the devices.
        forward, backward: the programs; no backward without gradients.
    """

    step: Step
    mesh: Mesh
    forward: Program
    backward: Program | None

    def collectives(self) -> list[Collective]:
        """Those of one step, forward first."""
        return self.forward.collectives() + (self.backward.collectives() if self.backward else [])

    @property
    def bytes(self) -> int:
        """What one device sends in one step."""
        return sum(c.bytes for c in self.collectives())

    def inputs(self) -> dict[str, Sharding]:
        """How every parameter, buffer and input of the model arrives, by name."""
        pairs = zip(self.forward.graph.inputs, self.forward.inputs, strict=True)
        return {str(n.attrs["name"]): s for n, s in pairs if s is not None}


def prepared(imported: Imported) -> Graph:
    """The graph that is laid out: canonical, its composites opened."""
    return run_pipeline(imported.graph, passes=BEFORE_SHARD)


def lay_out(
    step: Step,
    mesh: Mesh,
    annotations: Annotations,
    *,
    whole_results: bool = True,
    splits: Mapping[Node, Split] | None = None,
    price: Price | None = None,
) -> Spmd:
    """Lay a captured model out on a mesh.

    Args:
        step: from ``capture_step``.
        mesh: the devices.
        annotations: the user's.
        whole_results: every device returns the model's whole results, as one device would; else its share.
        splits: decided splits of nodes of the prepared graphs.
        price: see ``partition``.

    Raises:
        TesselError: an annotation fits nothing, or does not fit its tensor or the mesh.
    """
    graph = prepared(step.forward)
    layouts = propagate(graph, mesh, seeds(annotations, graph, mesh, step.positions))
    wanted = {}
    if whole_results:
        results = enumerate(graph.outputs[: step.results])
        wanted = {i: Sharding.replicated(o.type.rank) for i, o in results if _is_tensor(o)}
    forward = partition(graph, mesh, layouts, outputs=wanted, splits=splits, price=price)
    if step.backward is None:
        return Spmd(step, mesh, forward, None)
    back = prepared(step.backward)
    found = []
    arriving = [*forward.outputs[step.results :], *(forward.outputs[i] for i in step.differentiable)]
    saves = len(forward.outputs) - step.results
    takes = [n for n in back.inputs if n.attrs["role"] != "constant"]
    for i, (node, sharding) in enumerate(zip(takes, arriving, strict=True)):
        if sharding is None or not _is_tensor(node.out):
            continue
        name = node.attrs["name"]
        if i >= saves:
            # a gradient comes as its result left, and is used as the rest of the backward likes it
            anywhere = Sharding(((),) * node.out.type.rank, (), frozenset(range(node.out.type.rank)))
            found.append(Seed(node.out, anywhere, f"the gradient {name}", 1, sharding))
            continue
        saved = graph.outputs[step.results + i]
        used = forward.layouts.of[saved] if saved in forward.layouts.stored else sharding
        found.append(Seed(node.out, used, f"{name}, as the forward left it", 0, sharding))
    grads = {
        i: forward.layouts.arrives(n.out)
        for i, n in enumerate(n for n in graph.inputs if n.attrs["role"] != "constant")
        if i < len(back.outputs) and _is_tensor(back.outputs[i])
    }
    backward = partition(back, mesh, propagate(back, mesh, found), outputs=grads, splits=splits, price=price)
    return Spmd(step, mesh, forward, backward)


def _is_tensor(x: object) -> bool:
    return isinstance(x, Value) and isinstance(x.type, TensorType)


__all__ = ["Spmd", "lay_out", "prepared"]
