"""Steps of several microbatches without stages: gradients add up on every device, what can wait is sent once a step.

    dist = tessel.distribute(model, plan, args=(ids,), loss=loss)      # a plan with microbatches, under torchrun
    out, losses = dist.step(ids, target=labels)                        # the gradients of the mean of the losses

Gradients that a plan keeps whole, or splits only with the optimizer's state (ZeRO's stage 1), stay sums of this
device until the last microbatch; those of stages 2 and 3 are scattered in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import TesselError, check
from ..frontend.compat import pytree
from ..frontend.joint import Output, tensors_of
from ..runtime.collectives import ProcessGroups
from .distributed import Distributed, How, Init, Run, Weights, rank_runner
from .spmd import Spmd

__all__ = ["Accumulating"]

Loss = Callable[..., torch.Tensor]


class Accumulating(Distributed):
    """One rank of a laid-out model whose steps are several microbatches; ``distribute`` makes it.

    Args:
        cut: which of the caller's tensors are cut into microbatches.
        loss: ``loss(result, target)`` of one microbatch.
    """

    def __init__(
        self, model: torch.nn.Module, spmd: Spmd, by: ProcessGroups, run: How, weights: Weights, init: Init,
        *, cut: Sequence[bool], loss: Loss | None,
    ) -> None:  # fmt: skip
        check(loss is not None, lambda: "the plan has microbatches: distribute(..., loss=fn) says what they train on")
        super().__init__(model, spmd, by, run, weights, init)
        self.cut, self.loss = list(cut), loss
        self._reduce: Run | None = None
        if spmd.reduce is not None:
            self._reduce = rank_runner(spmd.step.forward, spmd.reduce, by, run, "reduce")
        takes = (n for n in spmd.forward.graph.inputs if n.attrs["role"] != "constant")
        self._takes = [str(n.attrs["name"]) for n in takes]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Steps have no call of their own.

        Raises:
            TesselError: always.
        """
        raise TesselError("a plan with microbatches runs by .step(inputs, target=...): each call is a whole step")

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
        """One step over the whole batch: forward and backward of every microbatch; gradients add to ``.grad``.

        Every process gives the whole arguments. Gradients are those of the mean of the microbatches' losses.

        Args:
            target: tensors (in any structure) that ``loss`` is told, cut by rows like the arguments.

        Returns:
            The model's results of the whole batch, of scalars the mean, and the loss of each microbatch.

        Raises:
            TesselError: the arguments are others than the plan's.
        """
        given, k = tensors_of(args, kwargs), self.spmd.microbatches
        n = len(self.cut)
        check(len(given) == n, lambda: f"laid out for {n} tensors, called with {len(given)}")
        for x in (*(x for x, own in zip(given, self.cut, strict=True) if own), *tensors_of((target,), {})):
            fits = x.dim() > 0 and x.shape[0] % k == 0
            check(fits, lambda x=x: f"rows of a tensor of shape {list(x.shape)} do not divide into {k} microbatches")  # type: ignore[misc]
        pieces = [x.chunk(k) if own else [x] * k for x, own in zip(given, self.cut, strict=True)]
        held = self._whole(self._arguments([own[0] for own in pieces]))
        sums: list[torch.Tensor | None] = [None] * len(held)
        results, losses = [], []
        leaves, tree = pytree.tree_flatten(target)
        for i in range(k):
            late = [x.chunk(k)[i] if isinstance(x, torch.Tensor) else x for x in leaves]
            small = self._arguments([own[i] for own in pieces], held)
            out, loss, grads = self._microbatch(small, pytree.tree_unflatten(late, tree))
            results.append(out)
            losses.append(loss)
            for at, grad in enumerate(grads):
                if grad is not None:
                    old = sums[at]
                    sums[at] = grad if old is None else old + grad  # one tensor may be the gradient of two
        self._give(sums)
        return self._result(results), losses

    def _microbatch(self, inputs: list[torch.Tensor], target: Any) -> tuple[list[Any], torch.Tensor, Sequence[Any]]:
        """Results, loss, and the gradients of the inputs."""
        step = self.spmd.step
        assert self._backward is not None and self.loss is not None
        with torch.no_grad():
            out = list(self._plain(list(inputs)))
        results = [x.detach() if isinstance(x, torch.Tensor) else x for x in out[: step.results]]
        for i in step.differentiable:
            results[i] = results[i].clone().requires_grad_()
        leaves = [results[x.number] if isinstance(x, Output) else x for x in step.leaves]
        with torch.enable_grad():
            loss = self.loss(pytree.tree_unflatten(leaves, step.tree), target)
        wanted = [results[i] for i in step.differentiable]
        found = torch.autograd.grad(loss / self.spmd.microbatches, wanted, allow_unused=True)
        late = [torch.zeros_like(x) if g is None else g.contiguous() for x, g in zip(wanted, found, strict=True)]
        with torch.no_grad():
            grads = self._backward([*out[step.results :], *late])
        return [x.detach() if isinstance(x, torch.Tensor) else x for x in results], loss.detach(), grads

    def _give(self, sums: list[torch.Tensor | None]) -> None:
        """Finish the sums over devices, and add them to the parameters' gradients."""
        found = {n: g for n, g in zip(self._takes, sums, strict=True) if g is not None}
        program = self.spmd.reduce
        if self._reduce is not None and program is not None:
            names = [str(n.attrs["name"]) for n in program.graph.inputs]
            with torch.no_grad():
                found.update(zip(names, self._reduce([found[n] for n in names]), strict=True))
        for name, p in self.module.named_parameters(remove_duplicate=False):
            grad = found.pop(name, None)
            if grad is not None and p.requires_grad:
                p.grad = grad if p.grad is None else p.grad + grad

    def _result(self, results: Sequence[Sequence[Any]]) -> Any:
        """The model's own result of the whole batch."""
        step = self.spmd.step

        def whole(i: int) -> Any:
            parts = [r[i] for r in results]
            if not isinstance(parts[0], torch.Tensor):
                return parts[0]
            return torch.stack(parts).mean(0) if parts[0].dim() == 0 else torch.cat(parts)

        leaves = [whole(x.number) if isinstance(x, Output) else x for x in step.leaves]
        return pytree.tree_unflatten(leaves, step.tree)
