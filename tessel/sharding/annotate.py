"""What a user says about how a model lies on a mesh: a little, propagation does the rest.

with tessel.annotate(model) as a:
    a.shard("layers.*.mlp.up_proj.weight", ("tp", None))
    a.shard("inputs[0]", ("dp", None))
    a.replicate("norm.weight")
    a.output("layers.*", ("dp", "tp", None))

Names are those of ``model.named_parameters()``, ``named_buffers()`` and, for outputs, ``named_modules()``. In a
pattern ``*`` stands for any part of a name between two dots, ``**`` for anything; a pattern may leave out the
first parts of a name.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import TesselError, check, did_you_mean
from ..ir.node import Graph, Node, Value
from ..ir.sharding import AXIS, Sharding
from ..ir.types import Loc, TensorType
from ..passes._layouts import Seed

Spec = Sequence[Any]
_INPUT = re.compile(r"inputs\[(\d+)\]\Z")


@dataclass(frozen=True)
class Annotation:
    """One line of the user's.

    Attributes:
        kind: ``tensor`` (a parameter, a buffer or an input) or ``output`` (of a module).
        pattern: of its name.
        sharding: dims and which of them are open.
        gather: mesh axes that split it where it is kept and not where it is used.
        priority: smaller ones are propagated first.
        where: the user's file and line.
    """

    kind: str
    pattern: str
    sharding: Sharding
    gather: tuple[str, ...] = ()
    priority: int = 0
    where: Loc = field(default_factory=Loc)

    def __str__(self) -> str:
        verb = "output" if self.kind == "output" else "shard"
        kept = f", kept split over {', '.join(self.gather)} and gathered" if self.gather else ""
        return f"{verb} {self.pattern!r} as {self.sharding}{kept} at {self.where}"


class Annotations:
    """A list of annotations; ``tessel.annotate`` gives one to write into."""

    def __init__(self, entries: Sequence[Annotation] = ()) -> None:
        self.entries: list[Annotation] = list(entries)

    def shard(self, name: str, dims: Spec, *, gather: Sequence[str] = (), priority: int = 0) -> None:
        """Split a parameter, a buffer or an input (``inputs[0]``).

        Args:
            name: a pattern; all tensors that it fits.
            dims: one entry a dimension: ``None`` (whole), a mesh axis, a tuple of axes (major to minor),
                ``"?"`` or ``"dp?"`` for a dimension that propagation may split (further).
            gather: of these axes, those that split the tensor only where it is kept: it is gathered over
                them before each use and its gradient is scattered (ZeRO-3, FSDP).
            priority: smaller ones are propagated first.

        Raises:
            TesselError: an entry of ``dims`` is none of these, an axis is used twice, or ``gather`` names
                an axis that is not in ``dims``.
        """
        sharding = _spec(dims)
        for axis in gather:
            check(
                axis in sharding.axes,
                lambda a=axis: f"shard {name!r}: gather names {a!r}, which is not in {sharding}",  # type: ignore[misc]
            )
        self.entries.append(Annotation("tensor", name, sharding, tuple(gather), priority, _caller()))

    def replicate(self, name: str, *, priority: int = 0) -> None:
        """Keep tensors whole on every device."""
        whole = Sharding(())
        self.entries.append(Annotation("tensor", name, whole, (), priority, _caller()))

    def output(self, module: str, dims: Spec, *, priority: int = 0) -> None:
        """Split what modules return: the last tensor of as many dimensions as ``dims`` that each computes."""
        self.entries.append(Annotation("output", module, _spec(dims), (), priority, _caller()))

    def __iter__(self) -> Iterator[Annotation]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


_of_models: weakref.WeakKeyDictionary[torch.nn.Module, Annotations] = weakref.WeakKeyDictionary()


@contextmanager
def annotate(model: torch.nn.Module) -> Iterator[Annotations]:
    """Say how some tensors of a model lie on a mesh; see the head of this file.

    Entered again, it adds to what was said. Names that do not exist raise where the model is planned.
    """
    check(isinstance(model, torch.nn.Module), lambda: f"annotate needs an nn.Module, got {type(model).__name__}")
    found = Annotations(annotations_of(model).entries)
    yield found
    _of_models[model] = found


def annotations_of(model: torch.nn.Module) -> Annotations:
    """What ``annotate`` was told about a model."""
    return _of_models.get(model) or Annotations()


# ---------------------------------------------------------------- from annotations to seeds


def seeds(
    annotations: Annotations, graph: Graph, mesh: Mapping[str, int], positions: Mapping[int, int] | None = None
) -> list[Seed]:
    """What annotations say of a graph's values.

    Args:
        graph: an inference or a forward graph.
        mesh: axis to size.
        positions: for graph inputs (by number) their number among the model's inputs; in order if not given.

    Raises:
        TesselError: a pattern fits nothing; the message names its file and line and the nearest name.
    """
    tensors, order = _tensors(graph, positions)
    modules = {n.loc.module for n in graph.nodes if n.loc.module}
    paths = {".".join(p.split(".")[:i]) for p in modules for i in range(1, p.count(".") + 2)}
    found: dict[Value, Seed] = {}
    for entry in annotations:
        if entry.kind == "output":
            hits = [v for p in sorted(paths) if fits(entry.pattern, p) for v in _result(graph, p, entry)]
            known: Any = paths
        else:
            number = _INPUT.match(entry.pattern)
            hits = [order[int(number[1])]] if number and int(number[1]) in order else []
            hits = hits or [v for name, v in tensors.items() if fits(entry.pattern, name)]
            known = [*tensors, *(f"inputs[{i}]" for i in order)]
        if not hits:
            raise TesselError(f"{entry}: nothing has such a name; {did_you_mean(entry.pattern, known)}"[:2000])
        for v in hits:
            found[v] = _seed(entry, v)
    return list(found.values())


def _tensors(graph: Graph, positions: Mapping[int, int] | None) -> tuple[dict[str, Value], dict[int, Value]]:
    tensors: dict[str, Value] = {}
    order: dict[int, Value] = {}
    for i, node in enumerate(graph.inputs):
        if not isinstance(node.types[0], TensorType):
            continue
        tensors[str(node.attrs["name"])] = node.out
        if node.attrs["role"] == "input":
            at = len(order) if positions is None else positions.get(i)
            if at is not None:
                order[at] = node.out
    return tensors, order


def _seed(entry: Annotation, v: Value) -> Seed:
    rank = v.type.rank
    said = entry.sharding if entry.sharding.rank else Sharding.replicated(rank)
    if said.rank != rank:
        raise TesselError(f"{entry}: {said.rank} dims are given, {v.type} has {rank}")
    if not entry.gather:
        return Seed(v, said, str(entry), entry.priority)
    used = tuple(tuple(a for a in axes if a not in entry.gather) for axes in said.dims)
    return Seed(v, Sharding(used, (), said.open), str(entry), entry.priority, said.closed())


def _result(graph: Graph, module: str, entry: Annotation) -> list[Value]:
    """What a module returns: its last value of that rank that something outside reads."""

    def inside(node: Node) -> bool:
        return node.loc.module == module or node.loc.module.startswith(module + ".")

    leaving = set(graph.results())
    for node in graph.nodes:
        if not inside(node):
            leaving.update(node.operands)
    made = [
        v
        for n in graph.nodes
        if inside(n)
        for v in n.outs
        if v in leaving and isinstance(v.type, TensorType) and v.type.rank == entry.sharding.rank
    ]
    return made[-1:]


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern fits a name, or what is left of it without its first parts.

    >>> fits("layers.*.mlp", "model.layers.0.mlp"), fits("layers.*", "model.layers.0.mlp"), fits("a.**", "a.b.weight")
    (True, False, True)
    """
    words = re.split(r"(\*\*|\*)", pattern)
    text = "".join({"**": ".*", "*": "[^.]*"}.get(w, re.escape(w)) for w in words)
    return re.fullmatch(rf"(.*\.)?{text}", name) is not None


def _spec(dims: Spec) -> Sharding:
    check(
        not isinstance(dims, str) and isinstance(dims, Sequence),
        lambda: f"dims {dims!r}: give one entry a dimension, as in ('dp', None)",
    )
    axes: list[tuple[str, ...]] = []
    open_ = set()
    for d, entry in enumerate(dims):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        if names and isinstance(names[-1], str) and names[-1].endswith("?"):
            open_.add(d)
            names = (*names[:-1], names[-1][:-1]) if names[-1] != "?" else names[:-1]
        for name in names:
            if not isinstance(name, str) or not AXIS.match(name):
                raise TesselError(
                    f"dims {tuple(dims)!r}: {name!r} is no name of a mesh axis; write None for a whole dim"
                )
        axes.append(tuple(names))
    return Sharding(tuple(axes), (), frozenset(open_))


def _caller() -> Loc:
    """The user's line: the first frame outside this file."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return Loc(frame.f_code.co_filename, frame.f_lineno)


__all__ = ["Annotation", "Annotations", "annotate", "annotations_of", "fits", "seeds"]
