"""What the layers of a model see, and how much their outputs matter, when it runs on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TesselError, check
from ..frontend.compat import pytree

__all__ = ["Seen", "call", "empty", "look", "running"]

_SAMPLE = 1024  # rows of a layer's inputs that AWQ looks at
_NO_CACHE = {"past_key_values": None, "past_key_value": None, "cache_params": None, "use_cache": False}


@dataclass
class Seen:
    """Of a layer's inputs: ``2 sum x x^T`` (only for gptq and turboboa), largest magnitudes, a sample of rows.

    Attributes:
        outputs: ``sum g g^T`` ``[n, n]``, g what random changes of its block's result say of the layer's output:
            on average ``J^T J`` with J the block's derivative by it. None where it was not asked for.
    """

    gram: Tensor | None
    largest: Tensor
    rows: list[Tensor] = field(default_factory=list)
    count: int = 0
    outputs: Tensor | None = None


def look(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    steps: Sequence[str],
    block: nn.Module | None = None,
) -> dict[str, Seen]:
    """What the layers see when the model runs on the calibration data.

    Args:
        block: the module that holds the layers. For ``turboboa`` it runs a second time on every batch, with gradients:
            memory holds the activations of this one module.

    Raises:
        TesselError: a layer's inputs hold NaN or infinity; the block cannot be differentiated; the model raises
            something when it is called with an item.
    """
    seen: dict[str, Seen] = {}
    again = _Again(layers, seen) if block is not None and "turboboa" in steps else None
    whole = "gptq" in steps or "turboboa" in steps

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if again is not None and again.running:
                return
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            x = x.reshape(-1, x.shape[-1])
            check(bool(torch.isfinite(x).all()), lambda: f"quantize: calibration gives {name} NaN or infinite inputs")
            k = x.shape[1]
            if not len(x):
                return
            mine = seen.get(name)
            if mine is None:
                mine = seen[name] = Seen(torch.zeros(k, k, dtype=torch.float64) if whole else None, torch.zeros(k))
            if mine.gram is not None:
                wide = x.double().cpu()
                mine.gram += 2 * wide.T @ wide
            mine.largest = torch.maximum(mine.largest, x.abs().amax(0).float().cpu())
            if "awq" in steps and mine.count < _SAMPLE:
                mine.rows.append(x[:: max(1, len(x) * len(batches) // _SAMPLE)].float().cpu())
                mine.count += len(mine.rows[-1])

        return see

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    if again is not None and block is not None:
        handles.append(block.register_forward_hook(again, with_kwargs=True))
    try:
        with running(model):
            for i, batch in enumerate(batches):
                call(model, batch, f"item {i}")
    finally:
        for h in handles:
            h.remove()
    return seen


class _Again:
    """After a block has run: run it again with gradients, and add up what random changes of its result say."""

    def __init__(self, layers: Mapping[str, nn.Module], seen: dict[str, Seen]) -> None:
        self.layers, self.seen, self.running = layers, seen, False
        self.draw = torch.Generator().manual_seed(0)

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self.running:
            return
        self.running = True
        added: dict[str, Tensor] = {}

        def add(name: str) -> Callable[..., Tensor]:
            def zero(module: nn.Module, args: Any, out: Tensor) -> Tensor:
                added[name] = torch.zeros_like(out, requires_grad=True)
                return out + added[name]

            return zero

        handles = [m.register_forward_hook(add(n)) for n, m in self.layers.items()]
        try:
            with torch.enable_grad():
                # the cache holds this block's keys already
                out = block(*args, **{k: _NO_CACHE.get(k, v) for k, v in kwargs.items()})
                if not added:  # the block has not called them
                    return
                first = next(t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor))
                change = torch.randn(first.shape, generator=self.draw).to(first)
                grads = torch.autograd.grad(first, list(added.values()), change, allow_unused=True)
        except RuntimeError as e:
            name = next(iter(self.layers)).rpartition(".")[0]
            raise TesselError(f"turboboa: the block that holds {name} cannot be differentiated: {e}") from e
        finally:
            self.running = False
            for h in handles:
                h.remove()
        for name, grad in zip(added, grads, strict=True):
            if grad is None:
                continue
            flat = grad.detach().reshape(-1, grad.shape[-1]).double().cpu()
            if not bool(torch.isfinite(flat).all()):
                raise TesselError(f"turboboa: gradients of {name} are NaN or infinite")
            mine = self.seen[name]
            mine.outputs = flat.T @ flat if mine.outputs is None else mine.outputs + flat.T @ flat


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; the mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def call(model: nn.Module, batch: Any, which: str = "an item") -> Any:
    """The model's result for one item of calibration data: a mapping, a tuple of arguments, or one argument.

    Raises:
        TesselError: the model raises something; ``which`` item it is.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)
    except TesselError:
        raise
    except Exception as e:  # whatever a model's code raises
        what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise TesselError(f"quantize: the model cannot be called with {which} of the calibration data: {what}") from e


def empty(batches: Sequence[Any]) -> bool:
    """Whether there are no values in calibration data at all.

    >>> empty([torch.ones(0, 8)]), empty([{"x": torch.ones(2, 8)}]), empty([3])
    (True, False, False)
    """
    leaves = pytree.tree_leaves(list(batches))
    return all(isinstance(x, Tensor) and x.numel() == 0 for x in leaves)
