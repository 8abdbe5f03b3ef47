"""One step of a loop, as a graph of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """One step of a loop, and what it is applied to.

    Attributes:
        gm: its graph: takes carries, slices and extras, in this order, and returns new carries, then results.
        init: where each carry starts, nodes of the host graph.
        xs: what each slice is a step of (time first), nodes of the host graph.
        extras: the same at every step, nodes of the host graph.
        length: how many steps.
    """

    gm: fx.GraphModule
    init: tuple[fx.Node, ...]
    xs: tuple[fx.Node, ...]
    extras: tuple[fx.Node, ...]
    length: int

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.gm.graph.nodes if n.op == "placeholder"]

    def outputs(self) -> list[Any]:
        (out,) = (n for n in self.gm.graph.nodes if n.op == "output")
        return list(out.args[0]) if isinstance(out.args[0], tuple | list) else [out.args[0]]
