"""Operators that are made of several matrix products and have a kernel of their own, outside the tile programs.

    run, why = whole(node, "native", target, folder)

``run`` takes what the operator's reference takes; ``None``: the reference runs, for the reason in ``why``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import TesselError
from ..ir.node import Node
from ..ops.packed import by_integers
from ..ops.packed_stacks import experts_by_integers
from ..targets import Target
from . import experts_cpu, loss_cpu, packed_cpu, scan_cpu
from .fused_gpu import GpuExperts, GpuLoss, GpuPackedExperts
from .linear import LINEAR, linear
from .matmul_cpu import by_library
from .scan_gpu import GpuSelective

__all__ = ["WHOLE", "whole"]

_NAMES = ("linear_cross_entropy", "experts", "selective_scan")
WHOLE = frozenset(f"{name}{suffix}" for name in _NAMES for suffix in ("", "_backward")) - {
    "selective_scan"  # opened, and fused by the fuse pass
} | {"linear_cross_entropy_gradients", "scaled_gradients", *LINEAR, "packed_linear", "packed_experts", "sparse_linear"}
_WHAT = {
    "linear_cross_entropy": "Tessel's kernel: logits are never written",
    "experts": "Tessel's kernel: all experts of a layer at once",
    "selective_scan": "Tessel's kernel: states are made again, chunk by chunk, never written",
}
_CPU_DTYPES = (torch.float32, torch.bfloat16)


_GPU: dict[str, Any] = {
    "linear_cross_entropy": GpuLoss,
    "experts": GpuExperts,
    "packed_experts": GpuPackedExperts,
    "selective_scan": GpuSelective,
}


def _parted(kind: str) -> tuple[str, str]:
    """What an operator's kernels are filed under, and the function of theirs that runs it."""
    for part in ("backward", "gradients"):
        if kind.endswith(f"_{part}"):
            return kind.removesuffix(f"_{part}"), part
    return kind, "forward"


@cache
def _on_gpu(name: str, target: Target, folder: Path) -> Any:
    return _GPU[name](target, folder)


def whole(
    node: Node, how: str, target: Target, folder: Path, wanted: bool = False
) -> tuple[Callable[..., Any] | None, str]:
    """What runs a node of ``WHOLE``, and why.

    Args:
        node: one of these operators.
        how: ``Place.how``.
        target: where it runs.
        folder: where Triton kernels are written.
        wanted: the kernel is asked for wherever there is one.
    """
    if node.op.name in LINEAR:
        return linear(node, how, target, folder)
    if node.op.name in ("packed_linear", "packed_experts", "sparse_linear"):
        return _packed(node, how, target, folder)
    if node.op.name == "scaled_gradients":
        return loss_cpu.scaled, "in place, where the backward runs once"
    (name, part), dtype, features = _parted(node.op.name), node.operands[1].dtype, target.features
    if how != "native":
        if how == "torch" or part not in ("forward", "backward") or name not in _GPU or dtype.itemsize > 4:
            return None, f"{str(dtype).removeprefix('torch.')} has no kernel here: its reference in torch"
        made = _on_gpu(name, target, folder)
        return getattr(made, part), _WHAT[name].replace("kernel", "kernels")
    why = None
    if dtype not in _CPU_DTYPES or (dtype == torch.bfloat16 and "avx512_bf16" not in features):
        why = f"{str(dtype).removeprefix('torch.')} has no kernel on this CPU"
    if node.op.name == "selective_scan_backward" and dtype != torch.float32:
        why = "only float32 has a kernel"
    why = why or by_library(node, features, wanted)
    run = None
    if why is None:
        run, why = _on_cpu(node.op.name, dtype, bool(node.attrs.get("turned")))
    if run is not None:
        return run, _WHAT[name]
    return None, f"its reference in torch, a chunk at a time: {why}"


@cache
def _on_cpu(kind: str, dtype: torch.dtype, turned: bool) -> tuple[Callable[..., Any] | None, str]:
    """The kernel of an operator, compiled, or why it cannot be."""
    name, part = _parted(kind)
    kernels: Any = {"linear_cross_entropy": loss_cpu, "experts": experts_cpu, "selective_scan": scan_cpu}[name]
    try:
        kernels.prepare(kind, dtype, turned)
    except TesselError as e:
        return None, str(e)
    return getattr(kernels, part), ""


def _packed(node: Node, how: str, target: Target, folder: Path) -> tuple[Callable[..., Any] | None, str]:
    dtype, attrs, name = node.operands[0].dtype, node.attrs, node.op.name
    if name == "packed_experts" and how not in ("native", "torch") and dtype.itemsize <= 4:
        why = "Tessel's kernels: all experts of a layer at once, codes become numbers where they are multiplied"
        return _on_gpu(name, target, folder).forward, why
    able = packed_cpu.multiplies_int8(target.features)
    fits = {"packed_linear": by_integers, "packed_experts": experts_by_integers}.get(name)
    integers = able and fits is not None and fits(node)
    half = dtype == torch.bfloat16 and "avx512_bf16" not in target.features
    if how != "native" or (half and not integers):
        return None, f"its reference in torch: {str(dtype).removeprefix('torch.')} has no kernel here"
    table = name != "sparse_linear" and len(node.args) > 5 and node.args[5] is not None
    possible, times = integers, ""
    if name != "packed_experts":
        from .packed_choice import choose  # what it needs is needed for nothing else

        way = choose(node, integers, not half, target)
        times = f"; {way.why}" * bool(way.why)
        if way.known is not None:
            integers = way.integers(way.known)
    try:
        if name == "sparse_linear":
            packed_cpu.prepare_sparse(dtype)
            return packed_cpu.forward_sparse, f"Tessel's kernel: zeros are put in where columns are read{times}"
        packed_cpu.prepare(dtype, attrs["bits"], integers, table, attrs.get("exponent", 0))
    except TesselError as e:
        return None, f"its reference in torch: {e}"
    whole_numbers = "inputs rounded a row, products of whole numbers"
    if name == "packed_experts":
        why = "Tessel's kernels, an expert after another, of those that tokens ask for"
        if integers:
            return packed_cpu.forward_experts_integers, f"{why}; {whole_numbers}"
    elif integers:
        if way.known is None and not half:
            packed_cpu.prepare(dtype, attrs["bits"])
            each = f"{whole_numbers}, or of floats, as its rows are"
            return packed_cpu.forward_either(way.integers), f"Tessel's kernels: {each}{times}"
        return packed_cpu.forward_integers, f"Tessel's kernel: {whole_numbers}{times}"
    else:
        why = "Tessel's kernel: codes become numbers in registers"
    if attrs.get("inputs"):
        slow = "this CPU has no product of 8-bit integers" if not able else "not both sides are integers of whole words"
        why += "; inputs are rounded and multiplied as floats" + ("" if possible else f": {slow}")
    return packed_cpu.forward_experts if name == "packed_experts" else packed_cpu.forward, why + times
