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

from ..codegen.steps import Called, Launch
from ..codegen.triton import grid_of, render
from ..errors import TesselError
from ..ir.node import Graph, Node, make_input
from ..ir.types import SymType, TensorType, symbol, unbacked
from ..solve.forced import TileRefused
from ..targets import Target
from ..tiles.default import Choice
from ..tiles.kernel import Kernel, Param
from ..tiles.lower import lower
from ..tiles.split import can_split, split_k
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
        splits: name of a product -> in how many parts its k is cut, where it is.
    """

    target: Target
    directory: Path
    pick: Pick | None = None
    at: dict[Node, Launch] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, list[Node]] = field(default_factory=dict)
    launchers: dict[str, Any] = field(default_factory=dict)
    failed: dict[Node, str] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    _notes: dict[str, list[str]] = field(default_factory=dict)
    _asked: tuple[Kernel, Mapping[str, int] | Choice | None] | None = None

    def render_all(self, graph: Graph) -> None:
        """Lower and render every kernel node; equal kernels are rendered once."""
        by_program: dict[Any, tuple[int, tuple[str, ...]]] = {}
        by_body: dict[str, str] = {}
        for node in graph.nodes:
            if node.op.kind != "kernel":
                continue
            try:
                kernel = lower(node)
                same = kernel.content()
                if same not in by_program:
                    parts = self.parts(kernel)
                    by_program[same] = parts, tuple(self._named(k, by_body) for k in _steps(kernel, parts)[0])
            except TileRefused:
                raise  # the user's word: no quiet way around it
            except TesselError as e:
                self.failed[node] = str(e)
                continue
            parts, names = by_program[same]
            steps, buffer = _steps(kernel, parts)
            launch: Launch | None = None
            for name, step in zip(names, steps, strict=True):
                self.sites.setdefault(name, []).append(node)
                self._notes.setdefault(name, []).extend(step.notes)
                params = tuple(_place_of(p) for p in step.params)
                launch = Launch(name, self.grid(step, name), params, step.symbols(), launch, buffer if launch else None)
            assert launch is not None
            self.at[node] = launch
            if parts > 1:
                self.splits[kernel.name] = parts

    def _named(self, kernel: Kernel, by_body: dict[str, str]) -> str:
        """The name of the source of a kernel, rendered unless an equal one is there."""
        source = self.render(kernel)
        name = by_body.setdefault(source.body_key, source.name)
        self.sources.setdefault(name, source)
        return name

    def parts(self, kernel: Kernel) -> int:
        """In how many parts the k of a product is cut: the knob ``SPLIT``.

        Raises:
            TileRefused: somebody asked for more than one, and it cannot be.
        """
        picked = self._picked(kernel) if kernel.family == "matmul" else None
        knobs = picked.knobs if isinstance(picked, Choice) else picked or {}
        parts = knobs.get("SPLIT", 1)
        if parts > 1 and not can_split(kernel, parts):
            k = kernel.axis("k").extent
            raise TileRefused(f"{kernel.name}: SPLIT={parts}: k is {k}, which is not {parts} equal parts of 16 or more")
        return parts

    def render(self, kernel: Kernel) -> Any:
        """The source of one kernel."""
        return render(kernel, self.target, self._picked(kernel))

    def _picked(self, kernel: Kernel) -> Mapping[str, int] | Choice | None:
        """What ``pick`` says of a kernel, asked once."""
        if self.pick is None:
            return None
        if self._asked is None or self._asked[0] is not kernel:
            self._asked = kernel, self.pick(kernel)
        return self._asked[1]

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


def _steps(kernel: Kernel, parts: int) -> tuple[tuple[Kernel, ...], TensorType | None]:
    """The kernels that one kernel node launches, and the memory between them."""
    if parts == 1:
        return (kernel,), None
    partial, combine, buffer = split_k(kernel, parts)
    return (partial, combine), buffer


def _place_of(param: Param) -> tuple[str, int]:
    """Where a launch finds a parameter: an operand, a result, or the memory between two kernels."""
    return ("buffer", -1) if param.slot < 0 else ("out" if param.out else "in", param.slot)


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
