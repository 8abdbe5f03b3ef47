"""What runs ``linear_attention`` and its backward: C++ kernels on a CPU, Triton kernels on a GPU, or the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..codegen.cpp.linear import NAMES
from ..codegen.fused_linear import MOST_KEYS
from ..errors import TesselError
from ..ir.node import Node, Value
from ..targets import Target
from .linear_calls import LinearCalls
from .linear_cpu import WIDENED, LinearKernels
from .linear_gpu import GpuLinear

__all__ = ["LINEAR", "linear"]

LINEAR = frozenset({"linear_attention", "linear_attention_backward"})


def linear(node: Node, how: str, target: Target, folder: Path) -> tuple[Callable[..., Any] | None, str]:
    """What runs a node of ``LINEAR``, and why; ``None``: its reference.

    Args:
        node: one of these operators.
        how: ``Place.how``.
        target: where it runs.
        folder: where Triton kernels are written.
    """
    backward = node.op.name == "linear_attention_backward"
    q, _, _, decay, beta, _ = (*node.args[2 if backward else 0 :], None, None, None)[:6]
    channels = decay is not None and len(decay.shape) == 4
    kernels: LinearCalls
    if how == "native":
        kernels, why = LinearKernels(), _missing(node.op.name, q.dtype, channels, beta is not None)
    else:
        kernels, why = _on_gpu(target, folder), _not_on_gpu(how, q)
    if why:
        return None, f"its reference in torch, token by token: {why}"
    kept = "states are not written" if how == "native" or not backward else "states are written once a chunk"
    through = f", {_word(q.dtype)} through {_word(WIDENED[q.dtype])}" if how == "native" and q.dtype in WIDENED else ""
    return (kernels.backward if backward else kernels.forward), f"Tessel's kernel: chunk by chunk, {kept}{through}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _on_gpu(target: Target, folder: Path) -> GpuLinear:
    return GpuLinear(target, folder)


def _not_on_gpu(how: str, q: Value) -> str:
    """Why there is no Triton kernel; nothing if there is."""
    if how == "torch":
        return "nothing compiles for this place"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{_word(q.dtype)} has no kernel here, whose states are float32"
    keys = q.shape[3]
    if not isinstance(keys, int) or keys > MOST_KEYS:
        return f"keys of {keys}: the kernel has registers for {MOST_KEYS}"
    return ""


@cache
def _missing(name: str, dtype: torch.dtype, channels: bool, delta: bool) -> str:
    """Why there is no C++ kernel; nothing if there is."""
    if dtype not in NAMES and dtype not in WIDENED:
        return f"{_word(dtype)} has no kernel here, whose states are float32"
    try:
        LinearKernels.prepare(name, dtype, channels, delta)
    except TesselError as e:
        return str(e)
    return ""
