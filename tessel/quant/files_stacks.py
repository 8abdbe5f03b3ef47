"""Stacks of experts' matrices in the compressed-tensors layout, where each matrix is a layer of its own.

    experts.gate_up_proj [e, 2i, h]   is   experts.0.gate_proj.weight_packed, experts.0.up_proj.weight_packed, ...
    experts.down_proj [e, o, i]       is   experts.0.down_proj.weight_packed, ...

as models were before their experts were put into stacks, and as engines that serve such files have them. Where rows of
gate and up alternate they stay together, as ``experts.0.gate_up_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TesselError, check
from .experts import ExpertInputs
from .files_packed import PARTS, PARTS_TOO, packed_tensors, read_packed
from .formats import Format, Quantized
from .stacks import Stack, own_stacks, put_stacks

__all__ = ["load_stacks", "names_of_stack", "owner_of", "stack_tensors"]

_ALIASES = {"gate_proj": ("w1",), "up_proj": ("w3",), "down_proj": ("w2",)}
"""What else files call them: Mixtral's."""


def _layers(own: str, module: nn.Module) -> tuple[str, ...]:
    """The layers that a stack's matrices are in a file, rows of one after those of the other."""
    halves = own == "gate_up_proj" and getattr(module, "is_concatenated", True)
    return ("gate_proj", "up_proj") if halves else (own,)


def names_of_stack(owner: str, own: str, module: nn.Module, stack: Stack) -> list[str]:
    """What the matrices of a stack are called in a file."""
    layers = _layers(own, module)
    return [f"{owner}.{e}.{layer}" for e in range(stack.words.shape[0]) for layer in layers]


def stack_tensors(owner: str, own: str, module: nn.Module, stack: Stack) -> dict[str, Tensor]:
    """All tensors of a stack in a file, by name."""
    out: dict[str, Tensor] = {}
    names, count = names_of_stack(owner, own, module, stack), len(_layers(own, module))
    for i, name in enumerate(names):
        e, part = divmod(i, count)
        words, scale, zero = (
            None if t is None else t[e].chunk(count)[part].clone() for t in (stack.words, stack.scale, stack.zero)
        )
        assert words is not None and scale is not None
        parts = packed_tensors(words, scale, zero, stack.format.bits, stack.k)
        out |= {f"{name}.{part_}": t for part_, t in parts.items()}
    return out


# ---------------------------------------------------------------- reading


def owner_of(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The module whose stacks hold the layer of this name, if it may be one of an expert."""
    found = re.fullmatch(r"(.*)\.\d+\.[^.]+", name)
    return found[1] if found and found[1] in modules and own_stacks(modules[found[1]]) else None


def load_stacks(
    owner: str, module: nn.Module, names: set[str], take: Callable[[str], Tensor | None], said: dict[str, Any]
) -> Callable[[], None]:
    """Put the stacks of a module, which a file holds, in the place of its parameters.

    Args:
        names: of the experts' layers in the file.
        take: gives a tensor of the file and strikes it out.
        said: the file's words.

    Returns:
        What is to be called when all else is loaded: it lets the module round its inputs if the file says so.

    Raises:
        TesselError: some experts' layers are missing, do not fit, or are too many.
    """
    stacks: dict[str, Stack] = {}
    inputs: set[Format | None] = set()
    left = set(names)

    def matrix(name: str, n: int, k: int) -> Quantized:
        check(name in names, lambda: f"load_quantized: {name} is missing, others are there")
        parts = {x: take(f"{name}.{x}") for x in (*PARTS, *PARTS_TOO)}
        made, activation, order = read_packed(name, parts, said, (n, k))
        check(order is None, lambda: f"load_quantized: {name}: experts whose channels are in an order cannot be read")
        left.discard(name)
        inputs.add(activation)
        return made

    for own, p, turned in own_stacks(module):
        layers = _layers(own, module)
        count, n, k = p.shape[0], p.shape[2 if turned else 1] // len(layers), p.shape[1 if turned else 2]
        called = [[_called(f"{owner}.{e}", layer, names) for layer in layers] for e in range(count)]
        if not any(name in names for each in called for name in each):
            continue  # whole in this file
        matrices = [_joined([matrix(name, n, k) for name in each]) for each in called]
        if len({m.format for m in matrices}) > 1:
            raise TesselError(f"load_quantized: experts of {owner}.{own} differ in format")
        like = torch.empty(0, dtype=p.dtype, device=matrices[0].codes.device)
        stacks[own] = Stack(matrices, like, turned)
    check(not left, lambda: f"load_quantized: the model has no layer {min(left)}")
    put_stacks(module, stacks)

    def round_inputs() -> None:
        check(len(inputs) == 1, lambda: f"load_quantized: inputs of {owner} are rounded in more than one way")
        why = ExpertInputs(next(iter(inputs))).put(module)
        if why:
            raise TesselError(f"load_quantized: inputs of {owner} are rounded in the file, here they cannot be: {why}")

    return round_inputs


def _called(expert: str, layer: str, names: set[str]) -> str:
    """What a layer of an expert is called in this file."""
    known = (f"{expert}.{own}" for own in (layer, *_ALIASES.get(layer, ())))
    return next((name for name in known if name in names), f"{expert}.{layer}")


def _joined(parts: list[Quantized]) -> Quantized:
    """Rows of one matrix after those of another."""
    first = parts[0]
    check(all(p.format == first.format for p in parts), lambda: "load_quantized: gate and up differ in format")
    if len(parts) == 1:
        return first
    scale = [p.scale.expand(p.codes.shape[0], -1) for p in parts]
    zero = None if first.zero is None else torch.cat([p.zero for p in parts if p.zero is not None])
    return replace(first, codes=torch.cat([p.codes for p in parts]), scale=torch.cat(scale), zero=zero)
