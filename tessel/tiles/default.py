"""The tile of a kernel in Triton's interpreter, and what of a kernel every choice of a tile looks at.

Tiles are large there: a program costs milliseconds and numpy does the work. For GPUs they are solved, in ``solve/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import TesselError
from ..ir.types import Dim, product
from .header import ATTENTION, load_header
from .index import Index, delinearize, substitute, var
from .kernel import Axis, Compute, Kernel, Load, Store, axes_read

LARGE = 2**17  # elements: numpy's cost a call is small beside the work, temporaries stay in cache
UNKNOWN = 2**20  # a symbolic size counts as large


@dataclass(frozen=True)
class Choice:
    """Knob values and the reason, in words, for the kernel's header."""

    knobs: Mapping[str, int]
    why: str


def choose(kernel: Kernel, knobs: Mapping[str, int] | None = None) -> Choice:
    """The interpreter's tile of a kernel, or ``knobs`` completed by it, with the reason."""
    if knobs is not None and set(load_header(kernel.family).knobs) <= set(knobs):
        return Choice(dict(knobs), "given")
    rule = {"pointwise": _pointwise, "reduction": _reduction, "matmul": _matmul, "attention": _attention}
    rule |= {"attention_backward": _attention, "scan": _scan}
    header = load_header(kernel.family)
    got = {**rule[kernel.family](kernel), **header.plain}
    if knobs:
        return Choice({**got, **knobs}, f"given: {', '.join(knobs)}; others by default")
    return Choice(got, "large for the interpreter")


def formula_values(kernel: Kernel, knobs: Mapping[str, int], vendor: str) -> dict[str, int]:
    """What the formulas of a header may name: knobs, item sizes in bytes, head widths, whether products are plain."""
    ins = [p.type.dtype.itemsize for p in kernel.params if not p.out] or [4]
    outs = [p.type.dtype.itemsize for p in kernel.params if p.out] or [4]
    widths: dict[str, int] = {}
    if kernel.family in ATTENTION:
        by_keys = int(kernel.attrs.get("wrt") == "keys")
        widths = {**head_widths(kernel), "score_bytes": score_bytes(kernel), "by_keys": by_keys}
    plain = kernel.family in ("matmul", *ATTENTION) and plain_dot(kernel, vendor)
    itemsize = operand_dtype(kernel).itemsize if kernel.family in ATTENTION else max(ins)
    itemsize = max(itemsize, staged_bytes(kernel)) if kernel.family == "matmul" else itemsize
    sizes = {"itemsize": itemsize, "out_itemsize": max(outs), "widest": max(*ins, *outs, 4)}
    return {**knobs, **widths, **sizes, "plain": int(plain)}


def staged_bytes(kernel: Kernel) -> int:
    """Bytes that a product's loop holds for one element of an operand that is unpacked there: its word, its scale, its
    zero and its number of a table are loaded for every element; 0 where nothing is unpacked."""
    most = 0
    for part in ("a", "b"):
        stmts = kernel.parts[part]
        if any(isinstance(s, Compute) and s.op == "shift_right" for s in stmts):
            most = max(most, sum(s.dtype.itemsize for s in stmts if isinstance(s, Load)))
    return most


def of_kind(kernel: Kernel, kind: str) -> list[Axis]:
    """The parallel (``x``), reduced (``r``) or scanned (``s``) axes of a kernel that is no product."""
    return [a for a in kernel.axes if a.kind == kind]


def batch_axes(kernel: Kernel) -> list[Axis]:
    """The axes of a matmul or attention kernel that only say which product or head it is."""
    return [a for a in kernel.axes if a.name not in ("m", "n", "k", "d", "e")]


def head_pieces(kernel: Kernel) -> dict[str, tuple[int, ...]]:
    """The widths ``d`` of keys and ``e`` of values in pieces that are powers of two, at least 16: (512, 64) for 576.

    One piece where two would be no narrower than the next power of two.

    Raises:
        TesselError: a width is symbolic.
    """
    out: dict[str, tuple[int, ...]] = {}
    for axis in "de":
        extent = kernel.axis(axis).extent
        if not isinstance(extent, int):
            raise TesselError(f"{kernel.name}: the head width {extent} must be a known number")
        whole = max(16, next_power(extent))
        first = whole // 2
        rest = max(16, next_power(extent - first))
        out[axis] = (first, rest) if whole > 16 and first + rest < whole else (whole,)
    return out


def head_widths(kernel: Kernel) -> dict[str, int]:
    """BD and BE of attention: how wide keys and values are in tiles, all pieces together."""
    pieces = head_pieces(kernel)
    return {"BD": sum(pieces["d"]), "BE": sum(pieces["e"])}


def score_bytes(kernel: Kernel) -> int:
    """Bytes that attention loads for each score: a mask, a bias; what is the same for all keys does not count."""
    return sum(s.dtype.itemsize for s in kernel.parts.get("score", ()) if isinstance(s, Load) and "n" in axes_read(s))


def next_power(n: int) -> int:
    """The least power of two that is not below ``n``.

    >>> next_power(1), next_power(17)
    (1, 32)
    """
    return 1 << max(0, n - 1).bit_length()


def size_or(d: Dim, unknown: int = UNKNOWN) -> int:
    """A size as a number, symbols counting as large."""
    return d if isinstance(d, int) else unknown


def _pointwise(kernel: Kernel) -> dict[str, int]:
    size = size_or(product(a.extent for a in of_kind(kernel, "x")))
    return {"XB": min(next_power(size), LARGE), "num_warps": 1, "num_stages": 1}


def _reduction(kernel: Kernel) -> dict[str, int]:
    x_size = size_or(product(a.extent for a in of_kind(kernel, "x")))
    r_extent = product(a.extent for a in of_kind(kernel, "r"))
    r_size = size_or(r_extent)
    if isinstance(r_extent, int) and r_extent <= LARGE:  # a program holds whole rows
        rb = next_power(r_size)
        xb = min(next_power(x_size), max(1, LARGE // rb))
    elif reads_across(kernel):  # neighbours in memory are neighbours along x
        xb = min(next_power(x_size), LARGE // 32)
        rb = min(next_power(r_size), LARGE // xb)
    else:
        xb, rb = min(next_power(x_size), 8), min(next_power(r_size), LARGE // 8)
    return {"XB": xb, "RB": rb, "num_warps": 1, "num_stages": 1}


def _scan(kernel: Kernel) -> dict[str, int]:
    x_size, r_size = (size_or(product(a.extent for a in of_kind(kernel, kind))) for kind in "xr")
    rb = next_power(r_size)
    xb = min(next_power(x_size), max(1, LARGE // rb))
    return {"XB": xb, "RB": rb, "STEPS": 1, "SIDE": 1, "num_warps": 1, "num_stages": 1}


def _matmul(kernel: Kernel) -> dict[str, int]:
    sizes = (size_or(kernel.axis(a).extent, 4096) for a in "mnk")
    most = (32, 32, 64) if plain_dot(kernel, "interpret") else (256, 256, 512)
    bm, bn, bk = (min(max(16, next_power(s)), top) for s, top in zip(sizes, most))
    return {"BM": bm, "BN": bn, "BK": bk, "GROUP": 1, "num_warps": 1, "num_stages": 1}


def plain_dot(kernel: Kernel, vendor: str) -> bool:
    """Whether tiles are multiplied by plain sums of products instead of matrix instructions.

    So are integers; and f64 on NVIDIA where a narrower load feeds the product, at which Triton's
    compiler (3.7) aborts: "Currently fp64 don't support largeK MMA".
    """
    dtype = operand_dtype(kernel)
    loads = [s.dtype for part in kernel.parts.values() for s in part if isinstance(s, Load)]
    narrow = any(d.itemsize < 8 for d in loads)
    return not dtype.is_floating_point or (vendor == "nvidia" and dtype.itemsize == 8 and narrow)


def operand_dtype(kernel: Kernel) -> torch.dtype:
    """The type of what a product's left operand, or attention's queries, hold."""
    part = "a" if kernel.family == "matmul" else "q"
    number = getattr(kernel.provides[part], "number", None)
    return next(s.dtype for s in kernel.parts[part] if getattr(s, "out", None) == number)  # type: ignore[union-attr]


def _attention(kernel: Kernel) -> dict[str, int]:
    most = 128 if kernel.family == "attention_backward" else 256
    bm, bn = (min(max(16, next_power(size_or(kernel.axis(a).extent, 4096))), most) for a in "mn")
    return {"BM": bm, "BN": bn, "num_warps": 1, "num_stages": 1}


def reads_across(kernel: Kernel, inner: str = "r") -> bool:
    """Whether most loads step by one element along x and not along r (a reduction over columns), or not along
    another kind of axis."""
    axes: dict[str, Index] = {}
    for kind in ("x", inner):
        mine = of_kind(kernel, kind)
        flat = var(kind, product(a.extent for a in mine))
        axes.update(zip((a.name for a in mine), delinearize(flat, [a.extent for a in mine]), strict=True))
    votes = 0
    for stmt in kernel.body:
        if not isinstance(stmt, Load | Store):
            continue
        address = stmt.access.address(kernel.params[stmt.access.param])
        address = substitute(address, lambda a: axes.get(a.name) if a.kind == "var" else None)
        step = {kind: _unit_step(address, kind) for kind in ("x", inner)}
        if step["x"] != step[inner]:
            votes += 1 if step["x"] else -1
    return votes > 0


def _unit_step(address: Index, name: str) -> bool:
    """Whether moving one along ``name`` moves one element, as far as the outermost term tells."""
    for a, c in address.terms:
        if c == 1 and a.kind == "var" and a.name == name:
            return True
        if c == 1 and a.kind == "mod" and a.arg is not None and _unit_step(a.arg, name):
            return True
    return False
