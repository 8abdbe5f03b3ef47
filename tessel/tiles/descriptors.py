"""Operands of a product that tensor descriptors (TMA) can load.

A descriptor says base, sizes, strides and block of a matrix once; a load then names two coordinates, the hardware
computes the addresses and fills what overhangs with zeros. It asks for a matrix that lies in memory as it is:
contiguous along one axis, everything else at multiples of 16 bytes. Wider elements than 16 bits are left out: in
full precision they do not feed matrix instructions from shared memory, and the compiler spills.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.types import Dim
from .index import Index
from .kernel import Kernel, Load, Ref

__all__ = ["OPERAND_AXES", "Descriptor", "descriptors"]

ALIGN_BYTES = 16  # of the base and of every stride but the last: CUDA C++ programming guide, tensor maps
OPERAND_AXES = {"a": ("m", "k"), "b": ("k", "n")}


@dataclass(frozen=True)
class Descriptor:
    """How one operand is loaded.

    Attributes:
        part: ``a`` or ``b``.
        load: the statement it stands for.
        param: the tensor's position among the kernel's parameters.
        outer, inner: the axis with the large stride, and the contiguous one.
        stride: elements from one ``outer`` to the next.
        base: offset in elements of the matrix, an index over the batch axes.
        sizes: extents of ``outer`` and ``inner``.
        made: lines that make the descriptor.
    """

    part: str
    load: Load
    param: int
    outer: str
    inner: str
    stride: int
    base: Index
    sizes: tuple[Dim, Dim]
    name: str


def descriptors(kernel: Kernel) -> dict[str, Descriptor]:
    """The operands of a product that descriptors can load, by part."""
    found = {}
    for part, axes in OPERAND_AXES.items():
        got = _descriptor(kernel, part, axes)
        if got is not None:
            found[part] = got
    return found


def _descriptor(kernel: Kernel, part: str, axes: tuple[str, str]) -> Descriptor | None:
    provided, stmts = kernel.provides[part], kernel.parts[part]
    if len(stmts) != 1 or not isinstance(stmts[0], Load) or provided != Ref(stmts[0].out):
        return None
    load = stmts[0]
    param = kernel.params[load.access.param]
    dtype = param.type.dtype
    if load.access.mask or load.dtype != dtype or not dtype.is_floating_point or dtype.itemsize > 2:
        return None
    strides: dict[str, int] = {}
    rest = []
    address = load.access.address(param)
    for atom, factor in address.terms:
        if atom.kind == "var" and atom.name in axes:
            if not isinstance(factor, int) or factor <= 0:
                return None
            strides[atom.name] = factor
        elif any(a.kind != "var" or a.name in axes for a in (atom.arg.atoms() if atom.arg is not None else [atom])):
            return None  # a gather, or rows that are taken apart
        elif not _aligned(factor, dtype):
            return None
        else:
            rest.append((atom, factor))
    inner = next((axis for axis in axes if strides.get(axis) == 1), None)
    if inner is None or not _aligned(address.const, dtype):
        return None
    outer = axes[0] if inner == axes[1] else axes[1]
    if outer not in strides or not _aligned(strides[outer], dtype):
        return None
    base = Index(tuple(rest), address.const)
    sizes = (kernel.axis(outer).extent, kernel.axis(inner).extent)
    return Descriptor(part, load, load.access.param, outer, inner, strides[outer], base, sizes, param.name)


def _aligned(elements: object, dtype: torch.dtype) -> bool:
    return isinstance(elements, int) and elements * dtype.itemsize % ALIGN_BYTES == 0
