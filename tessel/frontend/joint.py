"""A model's forward and backward graphs at once, without running either: what a plan for training needs.

Dynamo and AOTAutograd trace as for ``tessel.compile``; instead of running, each graph gives empty tensors of
its types. A model on the meta device does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TesselError, check
from ..ir.node import Value
from ..ir.types import TensorType
from .capture import GraphInfo, aot
from .compat import pytree
from .dynamo import patcher
from .importer import Imported

_CAPTURES = 10_000


@dataclass(frozen=True)
class Step:
    """What a model does in one call.

    Attributes:
        forward: the inference graph, or with gradients the forward graph: its outputs are the model's results,
            then what is saved for the backward.
        backward: takes what was saved, then the gradients of the differentiable results; gives one gradient for
            each input of ``forward``, ``None`` where there is none. Absent without gradients.
        results: how many outputs of ``forward`` the model returns.
        positions: for the inputs of ``forward`` that come from the caller (by number) which tensor among the
            arguments each is, keyword arguments last.
        tree: the structure of what the model returns.
        leaves: for each leaf of it the number of the output, or the constant itself.
        differentiable: the outputs whose gradients ``backward`` takes, in its order.
    """

    forward: Imported
    backward: Imported | None
    results: int
    positions: Mapping[int, int]
    tree: Any
    leaves: tuple[Any, ...]
    differentiable: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """A leaf of what the model returns that is output ``number`` of the forward graph."""

    number: int


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among a call's arguments, in the order that ``Step.positions`` counts them."""
    return [x for x in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(x, torch.Tensor)]


def capture_step(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, train: bool
) -> Step:
    """The graphs of one call of a model.

    Args:
        model: on any device, meta included; nothing of it is changed.
        args, kwargs: example arguments; sizes are fixed to theirs.
        train: with gradients of the parameters.

    Raises:
        TesselError: torch cannot capture the model as one graph; its message is kept.
    """
    capture = Capture(train)
    leaves, tree = capture.run(model, tuple(args), dict(kwargs or {}))
    known = capture.given(tensors_of(args, kwargs or {}))
    return capture.recorder.step(known, leaves, capture.numbered, tree)


class Recorder:
    """Takes the graphs of one Dynamo graph from AOTAutograd; running them gives empty tensors.

    Args:
        given: the arguments of the Dynamo graph.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        self.given = list(given)
        self.graphs: dict[str, tuple[Imported, GraphInfo]] = {}
        self.made: list[Any] = []

    def graph(self, imported: Imported, info: GraphInfo) -> Any:
        check(
            info.kind not in self.graphs, lambda: f"the model has two {info.kind} graphs: a graph break; see fullgraph"
        )
        self.graphs[info.kind] = (imported, info)

        def empty(inputs: list[Any]) -> list[Any]:
            made = [_empty(o, imported.device) for o in imported.graph.outputs]
            if info.kind != "backward":
                self.made = made
            return made

        return empty

    def numbered(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Which output of the graph each leaf is, told by its memory."""
        where = {x.untyped_storage()._cdata: i for i, x in reversed(list(enumerate(self.made))) if _is_tensor(x)}
        found: list[Any] = []
        for x in leaves:
            if not isinstance(x, torch.Tensor):
                found.append(x)
                continue
            at = where.get(x.untyped_storage()._cdata)
            if at is None:
                raise TesselError(
                    f"the model returns a tensor of shape {list(x.shape)} that its graph does not compute"
                )
            found.append(Output(at))
        return tuple(found)

    def step(self, known: Mapping[int, int], leaves: Sequence[Any], numbered: tuple[Any, ...], tree: Any) -> Step:
        """What was recorded, after it ran forward and backward.

        Args:
            known: arguments of the Dynamo graph that the caller gives, by number; to their place among its tensors.
            leaves: of the result, and ``numbered`` of them.
        """
        kind = "forward" if "forward" in self.graphs else "inference"
        forward, info = self.graphs[kind]
        positions = {i: known[at] for i, at in enumerate(info.order) if at is not None and at in known}
        if "backward" not in self.graphs:
            return Step(forward, None, len(forward.graph.outputs), positions, tree, numbered, ())
        backward, _ = self.graphs["backward"]
        names = [str(n.attrs["name"]) for n in backward.graph.inputs if n.attrs["role"] != "constant"]
        tangents = sum(n.startswith("tangents") for n in names)
        results = len(forward.graph.outputs) - (len(names) - tangents)
        returned = {o.number for o in numbered if isinstance(o, Output)}
        check(
            returned == set(range(results)),
            lambda: (
                f"the forward graph has {results} results, the model returns {len(returned)} of them: it changes a "
                "tensor in a way that a distributed step does not carry"
            ),
        )
        pairs = zip(leaves, numbered, strict=True)
        wanted = {o.number for x, o in pairs if isinstance(x, torch.Tensor) and x.requires_grad}
        differentiable = tuple(sorted(wanted))
        if len(differentiable) != tangents:
            raise TesselError(
                f"the backward takes {tangents} gradients, the model has {len(differentiable)} such results"
            )
        return Step(forward, backward, results, positions, tree, numbered, differentiable)


class Capture:
    """One call of a model, captured by a backend that calls ``record`` for its Dynamo graph."""

    def __init__(self, train: bool) -> None:
        self.train = train
        self.recorder = Recorder(())

    def backend(self, gm: Any, examples: Sequence[Any]) -> Any:
        self.recorder = Recorder(examples)
        return aot(gm, examples, self.recorder.graph)

    def run(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        """Call the model, and its backward; what it returns, flattened, and the structure of that."""
        grad = contextlib.nullcontext() if self.train else torch.no_grad()
        # each capture is a compilation of the same code for its own backend
        undo = patcher(recompile_limit=_CAPTURES, accumulated_recompile_limit=_CAPTURES)()
        try:
            with grad:
                compiled = torch.compile(model, backend=self.backend, fullgraph=True, dynamic=False)
                result = compiled(*args, **kwargs)
                leaves, tree = pytree.tree_flatten(result)
                self.ran(leaves)
                if self.train:
                    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
                    check(bool(wanted), lambda: "no result of the model depends on a parameter that needs a gradient")
                    leaf = [x for x in (*model.parameters(), *tensors_of(args, kwargs)) if x.requires_grad]
                    # not backward(): nobody's gradients are touched
                    torch.autograd.grad(wanted, leaf, [torch.empty_like(x) for x in wanted], allow_unused=True)
        except TesselError:
            raise
        except Exception as e:  # Dynamo raises everything that the model may raise, and classes of its own
            inner = getattr(e, "inner_exception", None)
            if isinstance(inner, TesselError):
                raise inner from e
            raise TesselError(f"torch cannot capture the model as one graph: {type(e).__name__}: {e}") from e
        finally:
            undo()
        return leaves, tree

    def ran(self, leaves: list[Any]) -> None:
        """After the forward: which output each leaf is."""
        self.numbered = self.recorder.numbered(leaves)

    def given(self, tensors: Sequence[torch.Tensor]) -> dict[int, int]:
        """The arguments of the Dynamo graph that are the caller's tensors, and which."""
        found = {}
        for at, x in enumerate(self.recorder.given):
            for n, own in enumerate(tensors):
                if x is own:
                    found[at] = n
        return found


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _empty(output: Any, device: str) -> Any:
    if not isinstance(output, Value) or not isinstance(output.type, TensorType):
        return output
    t = output.type
    return torch.empty_strided(t.shape, t.strides, dtype=t.dtype, device=t.device or device)


__all__ = ["Capture", "Output", "Recorder", "Step", "capture_step", "tensors_of"]
