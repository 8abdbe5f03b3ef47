"""A model as the planner sees it: its graph, how often a stretch of it repeats, its parameters by name.

A model of many equal layers is captured with two of them; the others are known by their parameters: names, shapes and
dtypes must be those of the captured ones, counted on, or everything is captured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import TesselError, check
from ..frontend.capture import export_program, import_program
from ..ir.node import Builder, Graph, Value, make_input
from ..ir.text import value_names
from ..ir.types import DTYPE_NAMES, TensorType
from ..models import load_model
from ..ops import OPS
from ..solve.shard_choice import NO_PINS, Pins
from ..solve.units import Param, Segment, repeats, segments_of, units_of
from .entries import renamed
from .microbatches import microbatch
from .pins import asked_of
from .plan_file import fingerprint_of

__all__ = [
    "Captured",
    "Problem",
    "aliases_of",
    "capture_model",
    "captures_all",
    "parameters_of",
    "problem_of",
]

_VIEWS = ("reshape", "permute", "copy")
_ALL = 4  # layers that are always captured one by one


@dataclass(frozen=True)
class Captured:
    """A model's graph, and how often its repeated stretch stands in the model.

    Attributes:
        layers: of the model; ``held`` of them are in the graph.
        parameters: of the whole model: name, shape, dtype.
        global_batch, seq: of one step; None where the inputs do not say.
        aliases: other names of parameters that are tied, to the one in ``parameters``.
        positions: of graph inputs (by number) among the model's inputs; in order if None.
    """

    name: str
    graph: Graph
    parameters: tuple[tuple[str, tuple[int, ...], str], ...]
    layers: int = 0
    held: int = 0
    global_batch: int | None = None
    seq: int | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    positions: Mapping[int, int] | None = None

    @property
    def fingerprint(self) -> str:
        """Of the parameters; the batch is not part of it."""
        return fingerprint_of(self.parameters)


def capture_model(
    spec: str, *, batch: int | None = None, seq: int | None = None, dtype: str | None = None, layers: int | None = None,
    train: bool = False, microbatches: int = 1,
) -> Captured:  # fmt: skip
    """The graph of a model by name (see ``load_model``) on meta tensors, with its loss if it is trained.

    Args:
        batch: rows of a step over the whole mesh; ``microbatches`` must divide it.
        train: a language model that returns logits gets the cross-entropy of its last product as loss.

    Raises:
        TesselError: as ``load_model`` and ``export_graph``.
    """
    started = time.perf_counter()
    if batch is not None and batch % microbatches:
        raise TesselError(f"a batch of {batch} rows does not divide into {microbatches} microbatches")
    rows = None if batch is None else batch // microbatches
    named = spec.startswith("hf:")  # a function says itself what its tensors are: those of the whole batch
    size: dict[str, Any] = {"batch": rows if named else batch, "seq": seq, "dtype": dtype, "device": "meta"}
    size["dtype"] = dtype or ("bfloat16" if named else None)
    module, args, kwargs = load_model(spec, **size, layers=layers)
    if not named:
        (args, kwargs), _ = microbatch(args, kwargs, microbatches)
    count = layers or _layer_count(module)
    parameters = parameters_of(module)
    made: Captured | None = None
    if named and not captures_all(module, layers):
        two, args2, kwargs2 = load_model(spec, **size, layers=2)
        if _grown(parameters_of(two), 2, count) == sorted(parameters):
            said = f"captured 2 of {count} layers; the parameters of the others have the same names, shapes and dtypes"
            made = _captured(spec, two, args2, kwargs2, train, microbatches, (parameters, count, 2, said))
            made = made if _names_all(made) else None
    if made is None:
        made = _captured(spec, module, args, kwargs, train, microbatches, (parameters, count, count, ""))
    return replace(made, seconds=time.perf_counter() - started)


def captures_all(module: Any, layers: int | None = None) -> bool:
    """Whether a model has so few layers (``layers`` of it) that each is captured, however alike they are."""
    return (layers or _layer_count(module)) <= _ALL


def _captured(
    spec: str, module: Any, args: Sequence[Any], kwargs: Mapping[str, Any], train: bool, microbatches: int,
    whole: tuple[Sequence[tuple[str, tuple[int, ...], str]], int, int, str],
) -> Captured:  # fmt: skip
    """The graph of a module that stands for ``whole``: its parameters, layers, those that are captured, a note."""
    parameters, layers, held, said = whole
    graph = import_program(export_program(module, args, kwargs)).graph.live()
    notes = [said] if said else []
    if train:
        graph, loss = _with_loss(graph)
        notes.insert(0, loss)
    first = next((n.type for n in graph.inputs if n.attrs["role"] == "input"), None)
    shape = () if first is None else first.shape
    rows, inner = (shape[i] if len(shape) > i else None for i in (0, 1))
    return Captured(
        spec, graph, tuple(parameters), layers, held, microbatches * rows if isinstance(rows, int) else None,
        inner if isinstance(inner, int) else None, notes=tuple(notes), aliases=aliases_of(module),
    )  # fmt: skip


def _names_all(captured: Captured) -> bool:
    """Whether the captured layers, counted on, name every parameter of the model that they should."""
    try:
        problem = problem_of(captured)
    except TesselError:  # what repeats is not as many layers as there are
        return False
    found = {
        renamed(use.source.name, captured.held, shift)
        for segment, shift in zip(problem.chain, problem.shift)
        for unit in segment.units
        for use in unit.uses
        if isinstance(use.source, Param)
    }
    return found == {n for n, _, _ in captured.parameters}


def aliases_of(module: Any) -> dict[str, str]:
    if not isinstance(module, torch.nn.Module):
        return {}
    first = {id(p): n for n, p in module.named_parameters()}
    return {n: first[id(p)] for n, p in module.named_parameters(remove_duplicate=False) if n != first[id(p)]}


def parameters_of(module: Any) -> list[tuple[str, tuple[int, ...], str]]:
    if not isinstance(module, torch.nn.Module):
        return []
    return [(n, tuple(p.shape), DTYPE_NAMES[p.dtype]) for n, p in module.named_parameters()]


def _layer_count(module: Any) -> int:
    config = getattr(module, "config", None)
    found = getattr(config, "num_hidden_layers", None)
    return found if isinstance(found, int) else 0


def _grown(parameters: Sequence[tuple[str, tuple[int, ...], str]], held: int, layers: int) -> list[Any]:
    """The parameters of a model of ``layers``, told from one of ``held``: those of its last layer again and again."""
    out = []
    for name, shape, dtype in parameters:
        out.append((name, shape, dtype))
        parts = name.split(".")
        at = next((i for i, p in enumerate(parts) if p == str(held - 1)), None)
        if at is not None:
            out += [(".".join([*parts[:at], str(i), *parts[at + 1 :]]), shape, dtype) for i in range(held, layers)]
    return sorted(out)


def _with_loss(graph: Graph) -> tuple[Graph, str]:
    """The graph with a loss for its logits: the last product and the cross-entropy as one operator."""
    out = graph.outputs[0] if len(graph.outputs) == 1 else None
    node = out.node if isinstance(out, Value) else None
    while node is not None and node.op.name in _VIEWS:
        node = node.args[0].node
    weight = None
    if node is not None and node.op.name == "matmul" and node.type.rank == 2:
        transposed = node.args[1].node
        if transposed.op.name == "permute" and transposed.args[0].node.op.kind == "input":
            weight = transposed.args[0]
    if node is None or weight is None:
        return graph, "no loss was added: the result is no product with a parameter; gradients start at the results"
    x = node.args[0]
    target = make_input("target", TensorType((x.shape[0],), torch.int64))
    builder = Builder((*graph.inputs, target), node.loc)
    builder.nodes = list(graph.nodes)
    loss = builder.node(OPS["linear_cross_entropy"], x, weight, None, target.out).out
    made = builder.finish((loss,), graph.effects, graph.name).live()
    return made, "the loss is the cross-entropy of the logits, computed with the last product and never stored whole"


@dataclass(frozen=True)
class Problem:
    """What is searched: kinds of segments, the chain of them, and which layer each place of it is."""

    kinds: list[Segment]
    order: list[int]
    chain: list[Segment]
    shift: list[int]  # layers between the one that a segment is of and the one that it stands for


def problem_of(captured: Captured, pins: Pins = NO_PINS) -> Problem:
    """The graph's segments, its repeated stretch as often as the model has layers.

    Args:
        pins: segments of which the user asked different things are different ones.

    Raises:
        TesselError: the model has more layers than the graph, and no stretch of the graph repeats.
    """
    units, params, _ = units_of(captured.graph, value_names(captured.graph))
    for p in params:  # one that is tied has several names
        p.name = captured.aliases.get(p.name, p.name)
        p.apart = pins.apart(p.name)
    segments = [replace(s, signature=s.signature + asked_of(s, pins)) for s in segments_of(units)]
    numbers: dict[str, int] = {}
    kinds: list[Segment] = []
    ids = []
    for s in segments:
        if s.signature not in numbers:
            numbers[s.signature] = len(kinds)
            kinds.append(s)
        ids.append(numbers[s.signature])
    start, length, times = repeats(ids)
    shift = [0] * len(segments)
    chain = list(segments)
    more = captured.layers - captured.held
    if more > 0:
        check(times == captured.held, lambda: f"{captured.name}: its layers differ from each other; capture all")
        end = start + length * times
        last = slice(end - length, end)
        copies = [i + 1 for i in range(more) for _ in range(length)]
        shift = [*shift[:end], *copies, *([more] * (len(segments) - end))]
        chain = [*segments[:end], *(segments[last] * more), *segments[end:]]
        ids = [*ids[:end], *(ids[last] * more), *ids[end:]]
    return Problem(kinds, ids, chain, shift)
