"""One part of a model on one rank: what a pipeline schedule calls forward and backward, a microbatch at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import check
from ..frontend.compat import pytree
from ..frontend.importer import Imported
from ..frontend.joint import Output
from ..ir.sharding import Sharding
from ..passes.partition import Program
from ..runtime.collectives import ProcessGroups
from ..targets.mesh import Mesh
from .distributed import Distributed, How, Run, rank_runner
from .halves import halve
from .parts import Laid

__all__ = ["StageModule"]

_ABSENT = object()  # in the place of a tensor that another stage holds


class StageModule(Distributed):
    """One part of the model on this rank: it takes and gives shares, but whole arguments and whole last results.

    Calls take what the part before handed on and give a tuple of what is handed on. ``microbatches`` holds the caller's
    tensors that the part reads, by number, and ``at`` which of them the next call is for.

    With ``apart`` a backward gives only what the stage before waits for, and the gradients of parameters come when
    ``gradients_left`` is asked for them, as the zero-bubble schedules do.
    """

    def __init__(
        self, model: torch.nn.Module, laid: Laid, by: ProcessGroups, run: How, last: bool, apart: bool = False
    ) -> None:
        self.laid, self.last, self.apart = laid, last, apart
        self.held = {str(n.attrs["name"]) for n in laid.spmd.step.forward.graph.inputs if n.attrs["role"] != "input"}
        self._left: Callable[[], None] | None = None
        super().__init__(model, laid.spmd, by, run)
        self.microbatches: list[dict[int, torch.Tensor]] = []
        self.at = 0

    def _tell(self) -> None:
        """Said for all parts at once."""

    def _run_backward(self, imported: Imported, program: Program, run: How) -> Run:
        """What runs this rank's backward, in one piece or its first half."""
        if not self.apart:
            return super()._run_backward(imported, program, run)
        graph, rows = program.rank(self.by.rank), program.collectives()
        inputs = self.spmd.step.forward.graph.inputs
        names = [str(n.attrs["name"]) for n in inputs if n.attrs["role"] != "constant"]
        own = dict(self.module.named_parameters(remove_duplicate=False))
        halves = halve(graph, {i for i in range(len(graph.outputs)) if names[i] not in own})

        def runner(piece: Any, numbers: Sequence[int], kind: str) -> Run:
            if not piece.outputs:
                return lambda _: ()
            return rank_runner(imported, program, self.by, run, kind, piece, [rows[i] for i in numbers])

        first = runner(halves.first, halves.collectives[0], "backward")
        second = runner(halves.second, halves.collectives[1], "backward")
        n = len(halves.wanted)

        def now(given: list[Any]) -> Sequence[Any]:
            later = [given[i] for i in halves.takes[1]]
            got = list(first([given[i] for i in halves.takes[0]]))
            later += got[n:]

            def left() -> None:
                with torch.no_grad():
                    for i, grad in zip(halves.later, second(later), strict=True):
                        p = own[names[i]]
                        p.grad = grad if p.grad is None else p.grad + grad

            self._left = left
            found: list[Any] = [None] * len(graph.outputs)
            for i, x in zip(halves.wanted, got, strict=False):
                found[i] = x
            return found

        return now

    def gradients_left(self) -> Callable[[], None]:
        """What adds up the gradients of parameters that the last backward left for later."""
        left, self._left = self._left, None
        return left if left is not None else lambda: None

    def _take_shards(self, model: torch.nn.Module, mesh: Mesh, rank: int) -> None:
        made: dict[int, Any] = {}
        with torch.no_grad():
            named: list[tuple[str, torch.Tensor]] = [
                *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
            ]  # fmt: skip
            for name, x in named:
                check(not x.is_meta, lambda n=name: f"stages take a model with its tensors; {n} is on the meta device")  # type: ignore[misc]
                if name in self.held and made.get(id(x), _ABSENT) is _ABSENT:
                    self.shapes[name] = tuple(x.shape)
                    own = self._shard(name, x, mesh, rank)
                    made[id(x)] = torch.nn.Parameter(own, x.requires_grad) if isinstance(x, torch.nn.Parameter) else own
                else:
                    made.setdefault(id(x), _ABSENT)
            known = {id(x): name for name, x in named if name in self.held}
            for name, x in named:
                first = known.get(id(x))
                if first is not None and first in self.shardings:  # a tied parameter's other names
                    self.shapes[name], self.shardings[name] = self.shapes[first], self.shardings[first]
        self.module = copy.deepcopy(model, memo=made)
        for module in self.module.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update((k, None) for k, x in tensors.items() if x is _ABSENT)

    def user_inputs(self) -> list[int]:
        """The caller's tensors that the part reads."""
        step = self.spmd.step
        handed = {self.tensors + k for k in range(len(self.laid.handed))}
        return sorted({n for n in step.positions.values() if n not in handed})

    @property
    def tensors(self) -> int:
        """How many tensors the caller gives; what is handed on counts from there."""
        own = sorted(self.spmd.step.positions.values())
        return own[-1] + 1 - len(self.laid.handed) if self.laid.handed else len(own)

    def forward(self, *handed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Results of one microbatch."""
        own = self.microbatches[self.at]
        results = self._results(self._arguments(own, handed={self.tensors + k: x for k, x in enumerate(handed)}))
        if self.last:
            leaves = [results[x.number] for x in self.spmd.step.leaves if isinstance(x, Output)]
            return tuple(x.reshape(1) if x.dim() == 0 else x for x in leaves)
        return tuple(x.contiguous() for x in results)

    def result(self, leaves: Sequence[torch.Tensor], whole: bool) -> Any:
        """The model's own result from a tuple of what ``forward`` gives, or (``whole``) of what microbatches give."""
        given = iter(leaves)
        out = []
        for x in self.spmd.step.leaves:
            if not isinstance(x, Output):
                out.append(x)
                continue
            got = next(given)
            scalar = self.spmd.step.forward.graph.outputs[x.number].type.rank == 0  # type: ignore[union-attr]
            out.append((got.mean(0) if whole else got.reshape(())) if scalar else got)
        return pytree.tree_unflatten(out, self.spmd.step.tree)

    def example(self, shardings: Sequence[Sharding], values: Sequence[Any], grads: Sequence[bool]) -> tuple[Any, ...]:
        """Empty tensors as they travel, on the model's device."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        return tuple(
            torch.empty(s.local_shape(v.shape, self.spmd.mesh), dtype=v.dtype, device=device).requires_grad_(g)
            for s, v, g in zip(shardings, values, grads, strict=True)
        )
