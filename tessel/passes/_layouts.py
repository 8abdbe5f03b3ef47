"""How the tensors of a graph lie on a mesh: what is known before propagation, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..ir.node import Node, Value
from ..ir.sharding import Sharding


@dataclass(frozen=True)
class Seed:
    """What is known of a value before anything is propagated.

    Attributes:
        value: an input or the result of a node.
        sharding: its dims; those in ``open`` may be split further.
        why: the annotation, with the user's file and line.
        priority: smaller ones are propagated first.
        stored: how an input arrives, if that differs from how it is used: then it is brought from the
            one to the other first (parameters that are kept split and gathered before use).
    """

    value: Value
    sharding: Sharding
    why: str
    priority: int = 0
    stored: Sharding | None = None


@dataclass(frozen=True)
class Why:
    """What brought a mesh axis to a dimension of a value: an annotation, or an edge from another value."""

    note: str
    node: Node | None = None
    source: Value | None = None
    source_dim: int = -1


@dataclass
class Layouts:
    """How every tensor of a graph lies on a mesh.

    Attributes:
        mesh: axis to size.
        of: the sharding of each tensor value, closed; nothing in it is partial.
        stored: of inputs that arrive otherwise than they are used.
        fixed: values that the user said the sharding of.
        why: for (value, dimension, mesh axis) what brought it.
    """

    mesh: Mapping[str, int]
    of: dict[Value, Sharding] = field(default_factory=dict)
    stored: dict[Value, Sharding] = field(default_factory=dict)
    fixed: set[Value] = field(default_factory=set)
    why: dict[tuple[Value, int, str], Why] = field(default_factory=dict)

    def arrives(self, v: Value) -> Sharding:
        """How an input arrives."""
        return self.stored.get(v, self.of[v])

    def explain(self, value: Value, dim: int, axis: str) -> list[str]:
        """Why ``axis`` splits dimension ``dim`` of a value, from here back to the annotation, a line a step."""
        lines: list[str] = []
        at: tuple[Value, int, str] | None = (value, dim, axis)
        seen = set()
        while at is not None and at not in seen:
            seen.add(at)
            why = self.why.get(at)
            if why is None:
                return lines
            if why.source is None or why.node is None:
                lines.append(why.note)
                return lines
            lines.append(f"through {why.node.op.name} at {why.node.loc}")
            at = (why.source, why.source_dim, axis)
        return lines

    def because(self, value: Value) -> str:
        """The annotations that a value's sharding comes from, in one line."""
        found = [self.explain(value, d, a)[-1:] for d, axes in enumerate(self.of[value].dims) for a in axes]
        return "; ".join(dict.fromkeys(line for lines in found for line in lines)) or "nothing says otherwise"


__all__ = ["Layouts", "Seed", "Why"]
