"""What runs ``linear_attention`` and its backward: a C++ kernel on a CPU, else the reference in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..codegen.cpp_linear import NAMES
from ..errors import TesselError
from ..ir.node import Node
from .linear_cpu import LinearKernels

__all__ = ["LINEAR", "linear"]

LINEAR = frozenset({"linear_attention", "linear_attention_backward"})


def linear(node: Node, how: str) -> tuple[Callable[..., Any] | None, str]:
    """What runs a node of ``LINEAR``, and why; ``None``: its reference.

    Args:
        node: one of these operators.
        how: ``Place.how``.
    """
    backward = node.op.name == "linear_attention_backward"
    q, _, _, decay, beta, _ = (*node.args[2 if backward else 0 :], None, None, None)[:6]
    name = str(q.dtype).removeprefix("torch.")
    if how != "native" or q.dtype not in NAMES:
        return None, f"its reference in torch, token by token: {name} has no kernel here"
    why = _missing(node.op.name, q.dtype, decay is not None and len(decay.shape) == 4, beta is not None)
    if why:
        return None, f"its reference in torch, token by token: {why}"
    kernels = LinearKernels()
    return (
        kernels.backward if backward else kernels.forward
    ), "Tessel's kernel: chunk by chunk, states are not written"


@cache
def _missing(name: str, dtype: torch.dtype, channels: bool, delta: bool) -> str:
    """Why a kernel cannot be compiled here; nothing if it can."""
    try:
        LinearKernels.prepare(name, dtype, channels, delta)
    except TesselError as e:
        return str(e)
    return ""
