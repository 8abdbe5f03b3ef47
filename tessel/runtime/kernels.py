"""The kernels of a graph: lowered, rendered once per distinct body, and made callable.

A kernel that cannot be rendered runs operator by operator through torch, and the reason is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..codegen.host import Called, Launch
from ..codegen.triton import grid_of, render
from ..errors import TesselError
from ..ir.node import Graph, Node, make_input
from ..ir.types import SymType, symbol, unbacked
from ..solve.forced import TileRefused
from ..targets import Target
from ..tiles.default import Choice
from ..tiles.kernel import Kernel
from ..tiles.lower import lower
from .launch import load
from .program import build

__all__ = ["Kernels", "Pick", "by_torch"]

Pick: TypeAlias = Callable[[Kernel], Mapping[str, int] | Choice | None]


@dataclass
class Kernels:
    """The kernels of one graph.

    Attributes:
        target: what they are rendered for.
        directory: where their text goes.
        pick: the knobs of a kernel's template, as far as they are decided; None, and a result of None: the
            tile that is solved for the target.
        at: kernel node -> how it is launched.
        sources: launcher name -> rendered text.
        sites: launcher name -> nodes that launch it.
        launchers: launcher name -> callable, once ``load`` has run.
        failed: kernel node -> why it runs through torch.
    """

    target: Target
    directory: Path
    pick: Pick | None = None
    at: dict[Node, Launch] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, list[Node]] = field(default_factory=dict)
    launchers: dict[str, Any] = field(default_factory=dict)
    failed: dict[Node, str] = field(default_factory=dict)
    _notes: dict[str, list[str]] = field(default_factory=dict)

    def render_all(self, graph: Graph) -> None:
        """Lower and render every kernel node; equal kernels are rendered once."""
        by_program: dict[Any, str] = {}
        by_body: dict[str, str] = {}
        for node in graph.nodes:
            if node.op.kind != "kernel":
                continue
            try:
                kernel = lower(node)
                same = _program_key(kernel)
                name = by_program.get(same)
                if name is None:
                    source = self.render(kernel)
                    name = by_body.setdefault(source.body_key, source.name)
                    by_program[same] = name
                    self.sources.setdefault(name, source)
            except TileRefused:
                raise  # the user's word: no quiet way around it
            except TesselError as e:
                self.failed[node] = str(e)
                continue
            self.sites.setdefault(name, []).append(node)
            self._notes.setdefault(name, []).extend(kernel.notes)
            params = tuple(("out" if p.out else "in", p.slot) for p in kernel.params)
            self.at[node] = Launch(name, self.grid(kernel, name), params, kernel.symbols())

    def render(self, kernel: Kernel) -> Any:
        """The source of one kernel."""
        return render(kernel, self.target, self.pick(kernel) if self.pick else None)

    def grid(self, kernel: Kernel, name: str) -> tuple[Any, ...]:
        """The grid of a kernel that runs the source ``name``, perhaps another's: sizes of the grid may differ."""
        return grid_of(kernel, self.sources[name].knobs, self.target)

    def places(self, name: str) -> list[str]:
        """Comment lines about the other places that launch a kernel, if there are any."""
        if len(self.sites[name]) < 2:
            return []
        notes = list(dict.fromkeys(self._notes[name]))[len(self.sources[name].kernel.notes) :]
        return [f"launched at {len(self.sites[name])} places", *(f"also: {_line(n)}" for n in notes)]

    def load(self) -> None:
        """Make the rendered kernels callable; their headers name every place that launches them."""
        for name, source in self.sources.items():
            more = "".join(f"# {line}\n" for line in self.places(name))
            source = self.sources[name] = dataclasses.replace(source, header=source.header + more)
            self.launchers[name] = load(source, self.directory)


def _program_key(kernel: Kernel) -> Any:
    """Equal for kernels that differ only in name and notes."""
    return (
        kernel.family,
        kernel.params,
        kernel.axes,
        kernel.body,
        tuple(kernel.parts.items()),
        tuple(kernel.provides.items()),
        tuple(kernel.attrs.items()),
    )


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else "?" for c in text).split())


def by_torch(
    node: Node,
    call: Callable[[Node], Called | Launch],
    directory: Path,
    device: str,
    constants: Mapping[str, torch.Tensor] | None = None,
) -> Called:
    """A kernel node as a Python function that runs its region operator by operator."""
    region = node.regions[0]
    wanted = sorted({s for n in region.nodes for s in n.symbols()})
    sizes = [unbacked(s) if s.startswith("u") else symbol(s) for s in wanted]
    inputs = (*region.inputs, *(make_input(s.name, SymType(s)) for s in sizes))
    name = str(node.attrs["name"])
    program = build(region.replace(inputs=inputs, name=name), call, {}, directory, constants=constants, device=device)
    run = program.run

    def region_by_torch(*tensors: torch.Tensor, sizes: tuple[int, ...] = ()) -> list[Any]:
        return run([*tensors, *sizes])

    attrs = {"sizes": tuple(sizes)} if sizes else {}
    return Called(name, region_by_torch, attrs, owned=False, flat=True)
