"""Split-K: a product with few tiles is cut along k, so that all units of a device have work.

Cutting k is sharding it: each part gives a partial sum, and the parts are combined by addition. The tile program of
the product becomes two: the product of the parts, batched over them, into a buffer of its own; and a reduction over
the parts with the epilogue of the product. The order of the additions is fixed: the result is the same in every run.

    partial[s, m, n] = sum over k of one part of a[m, k] * b[k, n]
    out[m, n] = epilogue(sum over s of partial[s, m, n])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from ..errors import check
from ..ir.types import TensorType
from .index import Cond, Index, substitute, var
from .kernel import ACC, Access, Axis, Check, IndexOf, Kernel, Load, Param, Reduce, Ref, Stmt, Store, Test

__all__ = ["SPLIT_DEPTH", "can_split", "split_k", "splittable"]

SPLIT_DEPTH = 16  # a part is a multiple of the narrowest step of a matrix instruction
_PART = "s"  # the axis over the parts
_FIRST = 10**6  # the number of the value that loads a partial sum, above all others of a kernel


def splittable(kernel: Kernel) -> bool:
    """Whether k may be cut at all: a product with known sizes and floating-point sums that is no part already."""
    if kernel.family != "matmul" or "part_of" in kernel.attrs or any(a.name == _PART for a in kernel.axes):
        return False
    return all(isinstance(a.extent, int) for a in kernel.axes) and _sum_dtype(kernel) is not None


def can_split(kernel: Kernel, parts: int) -> bool:
    """Whether a product can be cut into so many parts along k, each a multiple of ``SPLIT_DEPTH``."""
    return parts > 1 and splittable(kernel) and kernel.axis("k").extent % (parts * SPLIT_DEPTH) == 0


def split_k(kernel: Kernel, parts: int) -> tuple[Kernel, Kernel, TensorType]:
    """The product of ``parts`` parts, the sum over them with the epilogue, and the buffer between the two.

    The first takes the inputs that the operands read and then the buffer; the second the buffer, the inputs that the
    epilogue reads, and the outputs. A parameter keeps its slot; the buffer has slot -1.

    Raises:
        TesselError: see ``can_split``.
    """
    check(can_split(kernel, parts), lambda: f"{kernel.name}: its k cannot be cut into {parts} equal parts")
    dtype = _sum_dtype(kernel)
    assert dtype is not None
    depth = kernel.axis("k").extent // parts
    part = var(_PART, parts)
    moved = part * depth + var("k", depth)
    outer = [a for a in kernel.axes if a.name != "k"]
    buffer = TensorType((parts, *(a.extent for a in outer)), dtype)
    here = (part, *(var(a.name, a.extent) for a in outer))

    operands = {name: _moved(stmts, moved) for name, stmts in kernel.parts.items()}
    ins, renumber = _params(kernel, (s for stmts in operands.values() for s in stmts))
    partial = dataclasses.replace(
        kernel,
        name=f"{kernel.name}_part",
        params=(*ins, Param("partial", buffer, True, -1)),
        axes=(Axis(_PART, parts, "x"), *outer, Axis("k", depth, "r")),
        parts={name: tuple(_with_params(s, renumber) for s in stmts) for name, stmts in operands.items()},
        body=(Store(Access(len(ins), here), Ref(ACC), dtype),),
        attrs={**kernel.attrs, "part_of": parts},
        notes=(*kernel.notes, f"k in {parts} parts, added up by sum_of_{kernel.name}"),
    )

    rest, renumber = _params(kernel, kernel.body)
    renumber = {old: new + 1 for old, new in renumber.items()}
    folded = (
        Load(_FIRST, Access(0, here), dtype),
        Reduce(ACC, "sum", Ref(_FIRST), dtype, dtype),
        *(_with_params(s, renumber) for s in kernel.body),
    )
    combine = dataclasses.replace(
        kernel,
        name=f"sum_of_{kernel.name}",
        family="reduction",
        params=(Param("partial", buffer, False, -1), *rest),
        axes=(*outer, Axis(_PART, parts, "r")),
        body=folded,
        parts={},
        provides={},
        attrs={},
        notes=(*kernel.notes, f"the sum of {parts} parts along k, and what follows the product"),
        flops=0,
    )
    return partial, combine, buffer


def _sum_dtype(kernel: Kernel) -> torch.dtype | None:
    """What a partial sum is kept in; None for integers, which wrap."""
    provided = kernel.provides["a"]
    number = provided.number if isinstance(provided, Ref) else None
    dtype = next((s.dtype for s in kernel.parts["a"] if getattr(s, "out", None) == number), None)  # type: ignore[union-attr]
    if dtype is None or not dtype.is_floating_point:
        return None
    return torch.float64 if dtype == torch.float64 else torch.float32


def _moved(stmts: Iterable[Stmt], k: Index) -> tuple[Stmt, ...]:
    """The statements at another place along k."""

    def index(i: Index) -> Index:
        return substitute(i, lambda atom: k if atom.kind == "var" and atom.name == "k" else None)

    def conds(cs: tuple[Cond, ...]) -> tuple[Cond, ...]:
        return tuple(dataclasses.replace(c, index=index(c.index)) for c in cs)

    out: list[Stmt] = []
    for s in stmts:
        if isinstance(s, Load | Store):
            access = dataclasses.replace(s.access, coords=tuple(map(index, s.access.coords)), mask=conds(s.access.mask))
            out.append(dataclasses.replace(s, access=access))
        elif isinstance(s, IndexOf):
            out.append(dataclasses.replace(s, index=index(s.index)))
        elif isinstance(s, Test):
            out.append(dataclasses.replace(s, conds=conds(s.conds)))
        elif isinstance(s, Check):
            out.append(dataclasses.replace(s, mask=conds(s.mask)))
        else:
            out.append(s)
    return tuple(out)


def _params(kernel: Kernel, stmts: Iterable[Stmt]) -> tuple[tuple[Param, ...], dict[int, int]]:
    """The parameters that statements touch, in order, and their new positions."""
    used = {s.access.param for s in stmts if isinstance(s, Load | Store)}
    kept = [i for i in range(len(kernel.params)) if i in used]
    return tuple(kernel.params[i] for i in kept), {old: new for new, old in enumerate(kept)}


def _with_params(s: Stmt, renumber: dict[int, int]) -> Stmt:
    if not isinstance(s, Load | Store):
        return s
    return dataclasses.replace(s, access=dataclasses.replace(s.access, param=renumber[s.access.param]))
