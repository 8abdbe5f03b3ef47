"""Experts' matrices, which lie in stacks ``[experts, n, k]`` of one parameter, in few bits.

The module that holds them keeps its code: a stack takes the place of the parameter, whose name gives the matrices
unpacked. Where a compiler sees that a layer of experts reads them, it multiplies with them as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TesselError
from ..frontend.packed_op import unpacked
from .experts import ExpertInputs
from .formats import Format, Quantized
from .linear import stored
from .report import LayerReport
from .sqnr import sqnr_of

__all__ = ["Stack", "own_stacks", "put_stacks", "quantize_stacks", "quantized_stack", "stack_of", "stacked"]


class Stack(nn.Module):
    """Matrices in few bits; called without arguments, it gives them ``[e, n, k]``, or turned ``[e, k, n]``.

    Attributes:
        words, scale, zero, table: as of ``QuantLinear``, with the experts before.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None

    def __init__(self, matrices: list[Quantized], like: Tensor, turned: bool) -> None:
        """Args: matrices ``[n, k]``; ``like``: of their dtype and device; turned: it gives ``[e, k, n]``."""
        super().__init__()
        self.k, self.dtype, self.turned = matrices[0].codes.shape[1], like.dtype, turned
        self.format = matrices[0].format
        parts = [stored(m, like.device) for m in matrices]
        for i, name in enumerate(("words", "scale", "zero")):
            held = [p[i] for p in parts]
            self.register_buffer(name, None if held[0] is None else torch.stack(held))  # type: ignore[arg-type]
        self.register_buffer("table", parts[0][3], persistent=False)

    def forward(self) -> Tensor:
        f = self.format
        exponent = f.exponent if f.kind == "float" else 0
        made = unpacked(self.words, self.scale, self.zero, self.table, f.bits, self.k, self.dtype, exponent)
        return made.transpose(1, 2) if self.turned else made

    def extra_repr(self) -> str:
        shape = " x ".join(map(str, (*self.words.shape[:2], self.k)))
        return f"{shape}, {self.format.kind} of {self.format.bits} bits{', turned' * self.turned}"


def stacked(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter, bool]]:
    """Parameters that are stacks of experts' matrices, by name: the module, the parameter, and whether it is ``[e, k,
    n]`` instead of ``[e, n, k]``.

    Modules of experts are known by their class's name, or by what transformers marks them with.
    """
    return {
        f"{name}.{own}" if name else own: (module, p, turned)
        for name, module in model.named_modules()
        for own, p, turned in own_stacks(module)
    }


def own_stacks(module: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """Of one module, see ``stacked``."""
    turned = getattr(module, "is_transposed", None)
    if turned is None and not type(module).__name__.endswith("Experts"):
        return []
    parameters = module.named_parameters(recurse=False)
    return [(own, p, bool(turned)) for own, p in parameters if p.dim() == 3 and p.is_floating_point()]


def put_stacks(module: nn.Module, stacks: dict[str, Stack]) -> None:
    """Let stacks take the places of a module's parameters of these names."""
    for name, stack in stacks.items():
        del module._parameters[name]
        module.add_module(_held(name), stack)
    kind: Any = type(module)
    module.__class__ = _class_of(kind, tuple(stacks))


def quantize_stacks(
    model: nn.Module,
    format: Format,
    words: str,
    skipped: Callable[[str], bool],
    round_one: Callable[[Tensor], Quantized],
    note: str = "",
    inputs: Format | None = None,
) -> tuple[list[LayerReport], list[LayerReport]]:
    """Put all stacks of a model into a format, in place; what became of them, and of those that stay whole.

    Args:
        words: the format's.
        skipped: which names stay as they are.
        round_one: rounds one matrix ``[n, k]``, float32.
        note: what the method could not do here.
        inputs: what the inputs of experts are rounded to; None: nothing.
    """
    rows: list[LayerReport] = []
    whole: list[LayerReport] = []
    rounding = ExpertInputs(inputs)
    for owner, module in list(model.named_modules()):  # one after another, whose parameters are then let go
        stacks: dict[str, Stack] = {}
        made: list[LayerReport] = []
        for own, p, turned in own_stacks(module):
            name = f"{owner}.{own}" if owner else own
            if skipped(name):
                continue
            k, before = p.shape[1 if turned else 2], p.numel() * p.element_size()
            shape = (p.shape[0], p.shape[2 if turned else 1], k)
            if format.group > 0 and k % format.group:
                why = f"left whole: groups of {format.group} do not divide k = {k}"
                whole.append(LayerReport(name, shape, why, None, None, (), before, before))
                continue
            try:
                stacks[own], got = quantized_stack(p, format, turned, round_one)
            except TesselError as e:
                raise TesselError(f"quantize: {name}: {e}") from e
            after = sum(t.numel() * t.element_size() for t in stacks[own].buffers())
            made.append(LayerReport(name, shape, f"{words}; {shape[0]} experts", got, None, (), before, after, note))
        if not stacks:
            continue
        put_stacks(module, stacks)
        why = rounding.put(module)
        said = f", inputs {inputs.kind}{inputs.bits}" if inputs is not None and not why else ""
        for row in made:
            notes = "; ".join(filter(None, (row.fallback, why)))
            rows.append(replace(row, how=row.how + said, fallback=notes))
    return rows, whole


def quantized_stack(
    p: Tensor, format: Format, turned: bool, round_one: Callable[[Tensor], Quantized]
) -> tuple[Stack, float]:
    """A stack of a parameter's matrices, and their SQNR in dB; ``round_one`` rounds one, ``[n, k]`` in float32."""
    whole = [(one.t() if turned else one).float().cpu() for one in p.detach()]
    matrices = [round_one(one) for one in whole]
    pairs = ((w[part], own) for w, q in zip(whole, matrices, strict=True) for part, own in q.blocks())
    return Stack(matrices, p, turned), sqnr_of(pairs)


def _held(name: str) -> str:
    return f"{name}_stack"


def stack_of(name: str) -> tuple[str, str]:
    """Of a stack's name in a model: the module that holds it, and the parameter in whose place it is.

    >>> stack_of("layers.0.experts.down_proj_stack")
    ('layers.0.experts', 'down_proj')
    """
    owner, _, held = name.rpartition(".")
    return owner, held.removesuffix("_stack")


@cache
def _class_of(base: Any, names: tuple[str, ...]) -> type:
    """A class whose attributes of these names are what the stacks give."""

    def given(name: str) -> Any:
        return property(lambda self: getattr(self, _held(name))())

    return type(base.__name__, (base,), {"__module__": base.__module__, **{name: given(name) for name in names}})
