"""What all ranks of a mesh do: the record that ``partition`` makes, and that is written down for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from ..ir.node import Graph
from ..ir.sharding import Sharding
from ..ir.types import Loc
from ..ops.collective import sent_of, units
from ..targets.mesh import Mesh
from ._exchange import dry_run
from ._layouts import Layouts
from ._places import Places
from ._rank import Action, Local, Move, Start, write_rank
from ._tokens import flattened

__all__ = ["Collective", "Program"]

_WHY = {
    "ring": "keys and values go round",
    "sent": "tokens go to their experts and back",
    "halo": "edges go to the shares beside",
    "states": "the states that shares of the tokens make are gathered",
}


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: ``all_reduce``, ``all_gather`` and so on.
        axes, parts: the mesh axes that it goes over, and how many devices that is.
        bytes: what a device sends.
        tensor: the operand's type and sharding.
        loc, why: the line that needs it, and what for.
        call: the place of the first collective that the same call carries.
        beside: nodes that are computed while it goes on; 0 if it is waited for at once.
    """

    kind: str
    axes: tuple[str, ...]
    parts: int
    bytes: int
    tensor: str
    loc: Loc
    why: str
    call: int = 0
    beside: int = 0


@dataclass
class Program:
    """What all ranks do, before it is written down for one of them.

    Attributes:
        graph: of the whole tensors.
        mesh: the devices.
        layouts: what propagation gave.
        actions: in order.
        inputs: the sharding in which each input arrives; ``None`` for host numbers.
        outputs: the sharding in which each output leaves; ``None`` for what is no tensor.
        effects: the sharding of each overwritten input's new contents.
        warnings: full rematerializations and custom operators that are not split, each with its source line.
    """

    graph: Graph
    mesh: Mesh
    layouts: Layouts
    actions: list[Action] = field(default_factory=list)
    inputs: tuple[Sharding | None, ...] = ()
    outputs: tuple[Sharding | None, ...] = ()
    effects: tuple[Sharding, ...] = ()
    warnings: list[str] = field(default_factory=list)

    def rank(self, rank: int, *, flat: bool = True) -> Graph:
        """The graph that rank ``rank`` runs: the same collectives in the same order on every rank.

        Args:
            flat: with products on rows; else as ``graph`` has them.
        """
        return self._written(Places(self.mesh, rank), flat)

    def shared(self, rank: int) -> tuple[Graph, dict[str, int]]:
        """The graph of a rank with symbols for its place on the mesh, and their values, which are inputs of their own.

        Ranks that compute the same on their shares have the same graph. Linear attention over split tokens is not that:
        a rank adds up the states of those before it.
        """
        places = Places(self.mesh, rank, symbols=True)
        return self._written(places, True), places.values

    def _written(self, places: Places, flat: bool) -> Graph:
        graph = write_rank(self.graph, places, self.actions, self.inputs, self.outputs, self.effects)
        return flattened(graph) if flat else graph

    def moves(self) -> Iterator[Move]:
        """The moves, in order."""
        for action in self.actions:
            if isinstance(action, Move):
                yield action
            elif isinstance(action, Start):
                yield from action.moves

    def collectives(self) -> list[Collective]:
        """Every collective in order; slices are none."""
        found: list[Collective] = []
        for action in self.actions:
            if isinstance(action, Move | Start):
                moves, beside = ((action,), 0) if isinstance(action, Move) else (action.moves, action.beside)
                call = len(found)
                for move in moves:
                    for s in move.steps:
                        if s.kind != "slice":
                            parts, what = prod(self.mesh[a] for a in s.axes), f"{move.value.type}{s.before}"
                            own = call if isinstance(action, Start) else len(found)
                            row = Collective(s.kind, s.axes, parts, s.bytes, what, move.loc, move.why, own, beside)
                            found.append(row)
            elif isinstance(action, Local) and action.exchange is not None:
                node, ex = action.node, action.exchange
                why = _WHY.get(ex.kind, f"pieces are put together ({ex.kind})")
                for n, beside in dry_run(ex, node, action.reads, node.attrs, self.mesh):
                    call = len(found)
                    for kind, x, attrs in units(n):
                        what, sent = f"{x.type} of {node.op.name}", sent_of(kind, x, attrs["parts"])
                        row = Collective(kind, attrs["axes"], attrs["parts"], sent, what, node.loc, why, call, beside)
                        found.append(row)
        return found

    @property
    def bytes(self) -> int:
        """What one device sends in all."""
        return sum(c.bytes for c in self.collectives())
