"""What communication costs: bytes and seconds of collectives, and of changing how a tensor lies on the mesh.

Time is the alpha-beta model with the figures of ``targets/links.py``. S is the size of the whole tensor (for
all-to-all of the local one), n the number of ranks, B the bus bandwidth:

    all-gather, reduce-scatter  latency + S(n−1)/(nB)          bytes a GPU S(n−1)/n
    all-reduce                  latency + 2S(n−1)/(nB)                    2S(n−1)/n
    all-to-all                  latency + S(n−1)/(nB)                      S(n−1)/n, S local
    permute (to a neighbour)    latency + S/B                              S

A tensor's layout on one mesh axis is one of

    S(d)  dimension d is split                       its gradient is split the same way
    R     every device has the same copy             its gradient too
    V     every device has the same copy             its gradient is partial: each device has one term of a sum
    P     partial: each device has one term of a sum its gradient is the same copy everywhere

(R and V are what JAX's shard_map calls invariant and varying values.) One step changes the layout on one axis. It has
a price forward and one backward, its transpose: S -> V is an all-gather, then a reduce-scatter of the gradient, R -> V
is nothing, then an all-reduce: Megatron's f. The price of a change is that of the cheapest sequence of steps, so the
triangle inequality holds, and an all-reduce over two axes finds its hierarchical form by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np

from ..errors import TesselError, check
from ..targets import Target
from ..targets.links import Links, links_of
from ..targets.mesh import Link, Mesh

__all__ = ["Atom", "Layouts", "MeshAxis", "P", "R", "Step", "V", "axes_of", "bytes_sent"]

R, V, P = -1, -2, -3  # a layout on one axis; 0, 1, ... number the atoms that may be split
State: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class MeshAxis:
    """One mesh axis and its wires.

    Attributes:
        name, size: of the axis.
        inside: how many of its ranks share a node.
        links: the device's links, or one plain link for every collective.
    """

    name: str
    size: int
    inside: int
    links: Links | Link

    @property
    def nodes(self) -> int:
        return self.size // self.inside

    def seconds(self, kind: str, size: float) -> float:
        """Time of one collective over the axis; ``size`` in bytes as in the table above."""
        if self.size == 1:
            return 0.0
        if isinstance(self.links, Link):
            latency, bus = self.links.latency, self.links.bandwidth
        else:
            latency, bus = self.links.at(kind, self.inside, self.nodes)
        sent = bytes_sent(kind, size, self.size)
        if kind == "all-to-all" and self.nodes > 1:  # what stays inside the node takes the fast links meanwhile
            sent = size * (self.size - self.inside) / self.size
        return latency + sent / bus

    def __str__(self) -> str:
        where = "inside a node" if self.nodes == 1 else f"{self.inside} in each of {self.nodes} nodes"
        return f"{self.name}={self.size} ({where})"


def axes_of(mesh: Mesh, target: Target, gpus_per_node: int | None = None) -> tuple[MeshAxis, ...]:
    """The mesh's axes with their wires: neighbouring ranks fill a node, as ``torchrun`` numbers them.

    Args:
        mesh: its own links go before the target's.
        gpus_per_node: as the target's machines are sold by default.

    Raises:
        TesselError: an axis straddles nodes unevenly; both numbers are named.
    """
    known = None if len(mesh.links) == len(mesh) else links_of(target)
    node = gpus_per_node or (known.node if known else mesh.devices)
    check(node >= 1, lambda: f"gpus per node: expected at least 1, got {node}")
    out, below = [], 1
    for name, size in reversed(mesh.axes):
        inside = min(size, max(1, node // below))
        even = (below % node == 0 or node % below == 0) and size % inside == 0
        check(
            even,
            lambda n=name, s=size, b=below: (  # type: ignore[misc]
                f"mesh {mesh}: axis {n}={s} steps over {b} devices and cannot be laid evenly on nodes of {node}; "
                "order the axes so that the inner ones fill a node, or give --gpus-per-node"
            ),
        )
        link = mesh.link(name)
        if link is None and known is None:
            raise TesselError(f"mesh {mesh}: no link is known for axis {name!r}")
        out.append(MeshAxis(name, size, inside, link if link is not None else known))  # type: ignore[arg-type]
        below *= size
    return tuple(reversed(out))


def bytes_sent(kind: str, size: float, n: int) -> float:
    """Bytes that one GPU sends; an integer where the shares are whole.

    >>> bytes_sent("all-gather", 1024, 8), bytes_sent("all-reduce", 1024, 8), bytes_sent("all-to-all", 1024, 8)
    (896, 1792, 896)
    """
    if n == 1 or kind == "slice":
        return 0
    if kind == "permute":
        return size
    twice = 2 if kind == "all-reduce" else 1
    total = twice * size * (n - 1)
    return int(total) // n if total % n == 0 else total / n


@dataclass(frozen=True)
class Atom:
    """A part of a dimension that an axis may split: elements ``major`` apart from the outside.

    ``Atom(0, 1, 8)`` is dimension 0 as it is; of a flattened ``(8 × 4096)``, ``Atom(0, 8, 4096)`` is the inner part.
    ``size`` is how many pieces there may be at most; pieces must divide it.
    """

    dim: int
    major: int
    size: int


@dataclass(frozen=True)
class Step:
    """One collective: over ``axis``, ``sent`` bytes a GPU, ``seconds`` on its own; ``backward`` of a gradient."""

    kind: str
    axis: str
    size: float
    sent: float
    seconds: float
    backward: bool = False


class Layouts:
    """The layouts of one tensor and the price of every change between them.

    Args:
        nbytes: of the whole tensor.
        atoms: what may be split.
        axes: of the mesh.
        train: whether there is a gradient: without one V is not told from R, and backward is free.
    """

    def __init__(
        self,
        nbytes: int,
        atoms: Sequence[Atom],
        axes: Sequence[MeshAxis],
        train: bool = False,
    ) -> None:
        self.nbytes, self.atoms, self.axes, self.train = nbytes, tuple(atoms), tuple(axes), train
        codes = [R, V, P, *range(len(atoms))] if train else [R, P, *range(len(atoms))]
        self.states: list[State] = [s for s in product(codes, repeat=len(axes)) if self.divides(s)]
        self.number = {s: i for i, s in enumerate(self.states)}

    def divides(self, state: State) -> bool:
        """Whether every atom has at least as many elements as pieces, and a multiple of them."""
        for i in {c for c in state if c >= 0}:
            pieces = prod(a.size for a, c in zip(self.axes, state) if c == i)
            if self.atoms[i].size % pieces:
                return False
        return True

    def share(self, state: State) -> int:
        """Into how many parts a layout splits the tensor."""
        return prod(a.size for a, c in zip(self.axes, state) if c >= 0)

    def local_bytes(self, state: State) -> float:
        """Bytes that one device holds."""
        return self.nbytes / self.share(state)

    def step(self, state: State, i: int, to: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]] | None:
        """Collectives (kind, size) forward and backward that change axis ``i``; None where one step cannot."""
        axis, was = self.axes[i], state[i]
        rest = self.share(state) // (axis.size if was >= 0 else 1)
        size = self.nbytes / rest
        table: dict[tuple[str, str], tuple[list[tuple[str, float]], list[tuple[str, float]]]] = {
            ("S", "S"): ([("all-to-all", size / axis.size)], [("all-to-all", size / axis.size)]),
            ("S", "R"): ([("all-gather", size)], []),
            ("S", "V"): ([("all-gather", size)], [("reduce-scatter", size)]),
            ("R", "S"): ([], [("all-gather", size)]),
            ("R", "V"): ([], [("all-reduce", size)]),
            ("V", "S"): ([], []),
            ("V", "R"): ([], []),
            ("P", "R"): ([("all-reduce", size)], []),
            ("P", "S"): ([("reduce-scatter", size)], [("all-gather", size)]),
        }
        found = table.get((_letter(was), _letter(to)))
        return None if found is None else (found[0], found[1] if self.train else [])

    @cached_property
    def _paths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(seconds, of these forward, next state)`` between all pairs (Floyd and Warshall)."""
        n = len(self.states)
        total, ahead = np.full((n, n), np.inf), np.zeros((n, n))
        after = np.full((n, n), -1)
        np.fill_diagonal(total, 0.0)
        after[np.arange(n), np.arange(n)] = np.arange(n)
        for a, state in enumerate(self.states):
            for i, axis in enumerate(self.axes):
                for to in {s[i] for s in self.states} - {state[i]}:
                    b = self.number.get((*state[:i], to, *state[i + 1 :]))
                    found = self.step(state, i, to)
                    if b is None or found is None:
                        continue
                    forward = sum(axis.seconds(k, size) for k, size in found[0])
                    cost = forward + sum(axis.seconds(k, size) for k, size in found[1])
                    if cost < total[a, b]:
                        total[a, b], ahead[a, b], after[a, b] = cost, forward, b
        for k in range(n):
            through = total[:, k, None] + total[None, k, :]
            better = through < total - 1e-15
            if better.any():
                total = np.where(better, through, total)
                ahead = np.where(better, ahead[:, k, None] + ahead[None, k, :], ahead)
                after = np.where(better, after[:, k, None], after)
        return total, ahead, after

    @property
    def total(self) -> np.ndarray:
        """Seconds of every change, forward and backward: ``total[number of from, number of to]``."""
        return self._paths[0]

    @property
    def forward(self) -> np.ndarray:
        """The forward part of ``total``."""
        return self._paths[1]

    def steps(self, source: State, to: State) -> list[Step]:
        """The cheapest sequence, forward steps in order, then the backward ones in theirs.

        Raises:
            TesselError: there is none (a finished value does not become partial).
        """
        a, b = self.number[source], self.number[to]
        if not np.isfinite(self.total[a, b]):
            raise TesselError(f"no sequence of collectives leads from {source} to {to}")
        forward: list[Step] = []
        backward: list[Step] = []
        while a != b:
            c = int(self._paths[2][a, b])
            i = next(i for i, (x, y) in enumerate(zip(self.states[a], self.states[c])) if x != y)
            found = self.step(self.states[a], i, self.states[c][i])
            assert found is not None
            axis = self.axes[i]
            for kinds, out, back in ((found[0], forward, False), (found[1], backward, True)):
                out += [
                    Step(k, axis.name, size, bytes_sent(k, size, axis.size), axis.seconds(k, size), back)
                    for k, size in kinds
                ]
            a = c
        return [*forward, *reversed(backward)]


def _letter(code: int) -> str:
    return {R: "R", V: "V", P: "P"}.get(code, "S")
