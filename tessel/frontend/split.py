"""A captured model cut into parts that follow each other: a forward and a backward graph for each.

The Dynamo graph is cut between the uses of parameters, where the fewest bytes are alive, and AOTAutograd
differentiates each part alone. What no parameter flows into (masks, positions) is computed by every part that reads
it. A value that a later part than the next one reads is handed on by those between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import TesselError, check
from ..ir.nested import leaves
from . import compat
from .capture import aot
from .fx_effects import SETTINGS, draws, written
from .fx_words import call_name, value_of
from .joint import Capture, Recorder, Step, tensors_of
from .locs import qualified_name

__all__ = ["Part", "capture_parts"]

# part_of(the parameter of every use, in order) -> the parts that use each
PartOf = Callable[[Sequence[str]], Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        step: its graphs. ``step.positions`` counts the caller's tensors, then what the part before hands on; its
            leaves are what it hands on itself, of the last part the model's results.
        handed: how many tensors the part before hands on.
    """

    step: Step
    handed: int


def capture_parts(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, part_of: PartOf, *, train: bool
) -> list[Part]:
    """The graphs of one call of a model, cut into parts.

    Args:
        model, args, kwargs, train: as ``capture_step``; the arguments are one microbatch.
        part_of: is asked once, with the parameter of every use in order: the parts, from 0, that use each.

    Raises:
        TesselError: as ``capture_step``; the model cannot be cut there.
    """
    capture = _Parts(train, part_of)
    leaves, tree = capture.run(model, tuple(args), dict(kwargs or {}))
    tensors = tensors_of(args, kwargs or {})
    outer = capture.given(tensors)
    found = []
    for i, piece in enumerate(capture.pieces):
        last = i == len(capture.pieces) - 1
        known = {at: outer[x] for at, x in enumerate(piece.outer) if x in outer}
        known |= {len(piece.outer) + k: len(tensors) + k for k in range(len(piece.handed))}
        own = leaves if last else piece.results
        numbered = piece.recorder.numbered(own)
        structure = tree if last else None
        found.append(Part(piece.recorder.step(known, own, numbered, structure), len(piece.handed)))
    return found


@dataclass
class _Piece:
    """A part as a Dynamo graph: which arguments of the whole it takes, and which values of the part before."""

    module: fx.GraphModule
    outer: list[int]
    handed: list[fx.Node]
    recorder: Recorder
    call: Any = None
    results: Sequence[Any] = ()


class _Parts(Capture):
    """Cuts the Dynamo graph and captures each part."""

    def __init__(self, train: bool, part_of: PartOf) -> None:
        super().__init__(train)
        self.part_of = part_of
        self.pieces: list[_Piece] = []

    def backend(self, gm: Any, examples: Sequence[Any]) -> Any:
        self.recorder = Recorder(examples)
        self.pieces = _Cutter(gm, examples, self.part_of).pieces()
        for piece in self.pieces:
            given = piece.recorder.given
            piece.call = aot(piece.module, given, piece.recorder.graph)

        def run(*args: Any) -> Any:
            handed: Sequence[Any] = ()
            for piece in self.pieces:
                handed = piece.results = list(piece.call(*(args[i] for i in piece.outer), *handed))
            return handed

        return run

    def ran(self, leaves: list[Any]) -> None:
        """Which output each leaf is, every part says of its own."""


class _Cutter:
    """One Dynamo graph on its way into parts."""

    def __init__(self, gm: fx.GraphModule, examples: Sequence[Any], part_of: PartOf) -> None:
        self.gm, self.examples = gm, examples
        self.nodes = list(gm.graph.nodes)
        self.at = {n: i for i, n in enumerate(self.nodes)}
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.output = self.nodes[-1]
        self.names: dict[fx.Node, str] = {}
        for node in self.inputs:
            known = qualified_name(compat.dynamo_source(node))
            if known is not None and known[1] == "param":
                self.names[node] = known[0]
        uses = sorted(((self.at[u], p) for p in self.names for u in p.users), key=lambda x: x[0])
        self.parts_of = part_of([self.names[p] for _, p in uses])
        self.count = 1 + max((max(own) for own in self.parts_of.values()), default=0)
        self.free = self._free()
        self.starts = self._starts()

    def _free(self) -> set[fx.Node]:
        """Nodes that no parameter flows into, and that every part may therefore compute."""
        bound: set[fx.Node] = set(self.names)
        while True:
            for n in self.nodes:
                if n.op != "placeholder" and (written(n) or draws(n) or any(x in bound for x in n.all_input_nodes)):
                    bound.add(n)
            # what is overwritten is there once, and so is all that it may be a view of
            stack = [x for n in self.nodes if n in bound for x in written(n)]
            base: set[fx.Node] = set()
            while stack:
                n = stack.pop()
                if n not in base and n not in bound and n.op != "placeholder":
                    base.add(n)
                    stack += n.all_input_nodes
            if not base:
                return {n for n in self.nodes if n not in bound and n.op not in ("placeholder", "output")}
            bound |= base

    def _starts(self) -> list[int]:
        """For each part the node it begins at: of all places between uses of parameters where least is alive."""
        last_read = {n: max((self.at[u] for u in n.users), default=-1) for n in self.nodes}
        starts = [0]
        for part in range(1, self.count):
            before, after = 0, len(self.nodes) - 1
            for node, name in self.names.items():
                own, uses = self.parts_of.get(name, ()), sorted(self.at[u] for u in node.users)
                if not own or not uses:
                    continue
                # of one that several parts use the first use is in the first of them, the last in the last
                if min(own) < part:
                    before = max(before, 1 + (uses[-1] if max(own) < part else uses[0]))
                if max(own) >= part:
                    after = min(after, uses[0] if min(own) >= part else uses[-1])
            check(
                max(before, starts[-1] + 1) <= after,
                lambda p=part: f"part {p} uses a parameter before part {p - 1} is done with its own: cut elsewhere",  # type: ignore[misc]
            )
            alive = {
                at: sum(_nbytes(n) for n in self.nodes[:at] if self._moves(n) and last_read[n] >= at)
                for at in range(max(before, starts[-1] + 1), after + 1)
            }
            starts.append(min(alive, key=lambda at: (alive[at], at)))
        return starts

    def _moves(self, n: fx.Node) -> bool:
        return n not in self.free and n.op not in ("placeholder", "output", "get_attr")

    def part(self, n: fx.Node) -> int:
        return max(i for i, start in enumerate(self.starts) if self.at[n] >= start)

    def pieces(self) -> list[_Piece]:
        own: list[list[fx.Node]] = [[] for _ in range(self.count)]
        for n in self.nodes:
            if self._moves(n):
                own[self.part(n)].append(n)
        results = list(self.output.args[0]) if isinstance(self.output.args[0], list | tuple) else [self.output.args[0]]
        reads: list[set[fx.Node]] = []
        for i in range(self.count):
            needed = {x for n in own[i] for x in n.all_input_nodes}
            if i == self.count - 1:
                needed |= {x for x in results if isinstance(x, fx.Node)}
            reads.append(self._with_free(needed))
        handed: list[list[fx.Node]] = [[]]
        for i in range(self.count - 1):
            made = {n for own_ in own[: i + 1] for n in own_}
            later = set().union(*reads[i + 1 :])
            handed.append([n for n in self.nodes if n in made and n in later])
        out = []
        for i in range(self.count):
            keep = set(own[i]) | {n for n in reads[i] if n in self.free or n.op == "get_attr"}
            leaves: list[Any] = results if i == self.count - 1 else list(handed[i + 1])
            out.append(self._piece(keep, reads[i], handed[i], leaves))
        return out

    def _with_free(self, needed: set[fx.Node]) -> set[fx.Node]:
        """With everything that is computed again for it."""
        stack, found = list(needed), set(needed)
        while stack:
            n = stack.pop()
            if n in self.free:
                more = [x for x in n.all_input_nodes if x not in found]
                found.update(more)
                stack += more
        return found

    def _piece(self, keep: set[fx.Node], reads: set[fx.Node], handed: list[fx.Node], leaves: Sequence[Any]) -> _Piece:
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        outer = [i for i, n in enumerate(self.inputs) if n in reads]
        given: list[Any] = []
        for i in outer:
            new[self.inputs[i]] = graph.node_copy(self.inputs[i])
            source = getattr(self.inputs[i], "_dynamo_source", None)
            if source is not None:
                new[self.inputs[i]]._dynamo_source = source  # type: ignore[attr-defined]
            given.append(self.examples[i])
        for k, n in enumerate(handed):
            new[n] = graph.placeholder(f"handed_{k}")
            value = _like(n)
            new[n].meta["example_value"] = value
            given.append(value)
        for n in self.nodes:
            if n in keep or call_name(n) in SETTINGS:
                new[n] = graph.node_copy(n, new.__getitem__)
        out = []
        for x in leaves:
            # an input that is a result would be no result of the graph that AOTAutograd makes
            again = isinstance(x, fx.Node) and x in handed
            at = new[x] if isinstance(x, fx.Node) else x
            out.append(graph.call_function(torch.clone, (at,)) if again else at)
        graph.output(tuple(out))
        module = fx.GraphModule(self.gm, graph)
        return _Piece(module, outer, handed, Recorder(given))


def _nbytes(n: fx.Node) -> int:
    return sum(x.numel() * x.element_size() for x in leaves(value_of(n), torch.Tensor))


def _like(n: fx.Node) -> torch.Tensor:
    """An empty fake tensor of a node's value, contiguous as it arrives, a leaf of autograd."""
    value = value_of(n)
    if not isinstance(value, torch.Tensor):
        raise TesselError(f"parts of the model meet at {n.name}, which is no tensor: cut elsewhere")
    with value.fake_mode:  # type: ignore[attr-defined]
        made = torch.empty(tuple(value.shape), dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)
