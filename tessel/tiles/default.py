"""A simple legal tile for every kernel: powers of two that fit the target. Nothing is measured or modelled.

For Triton's interpreter tiles are large, since a program costs milliseconds there and numpy does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import TesselError, check
from ..ir.types import Dim, product
from ..targets import Target
from .header import Header, load_header
from .index import Index, delinearize, substitute, var
from .kernel import Axis, Kernel, Load, Store

INTERPRET_TILE = 2**17  # elements: numpy's cost a call is small beside the work, temporaries stay in cache
ONE_BLOCK = 8192  # reduced elements that one block may hold
UNKNOWN = 2**20  # a symbolic size counts as large


@dataclass(frozen=True)
class Choice:
    """Knob values and the reason, in words, for the kernel's header."""

    knobs: Mapping[str, int]
    why: str


def default_knobs(kernel: Kernel, target: Target) -> dict[str, int]:
    """The default tile of a kernel: every knob of its template.

    Raises:
        TesselError: no legal tile fits the target's shared memory.
    """
    return dict(choose(kernel, target).knobs)


def choose(kernel: Kernel, target: Target, knobs: Mapping[str, int] | None = None) -> Choice:
    """The default tile, or ``knobs`` completed by it, with the reason."""
    if knobs is not None and set(load_header(kernel.family).knobs) <= set(knobs):
        return Choice(dict(knobs), "given")
    rule = {"pointwise": _pointwise, "reduction": _reduction, "matmul": _matmul, "attention": _attention}
    got, why = rule[kernel.family](kernel, target.vendor)
    if knobs:
        return Choice({**got, **knobs}, f"given: {', '.join(knobs)}; others by default")
    return Choice(fit(kernel, target, load_header(kernel.family), got), why)


def fit(kernel: Kernel, target: Target, header: Header, knobs: dict[str, int]) -> dict[str, int]:
    """The knobs, made smaller until the header's formula fits the target's shared memory."""
    if target.limits is None or target.vendor == "interpret":
        return knobs
    limit = target.limits.shared_bytes_per_block
    order = ("num_stages", "RB", "XB", "BK", "BN", "BM")
    while header.smem(target.arch, formula_values(kernel, knobs, target.vendor)) > limit:
        smaller = [(n, v) for n in order if n in knobs for v in header.knobs[n] if v < knobs[n]]
        check(bool(smaller), lambda: f"{kernel.name}: no tile fits {limit} bytes of shared memory on {target.name}")
        name = smaller[0][0]
        knobs = {**knobs, name: max(v for n, v in smaller if n == name)}
    return knobs


def formula_values(kernel: Kernel, knobs: Mapping[str, int], vendor: str) -> dict[str, int]:
    """What the formulas of a header may name: knobs, item sizes in bytes, head widths, whether products are plain."""
    ins = [p.type.dtype.itemsize for p in kernel.params if not p.out] or [4]
    outs = [p.type.dtype.itemsize for p in kernel.params if p.out] or [4]
    widths = head_widths(kernel) if kernel.family == "attention" else {}
    plain = kernel.family in ("matmul", "attention") and plain_dot(kernel, vendor)
    sizes = {"itemsize": max(ins), "out_itemsize": max(outs), "widest": max(*ins, *outs, 4)}
    return {**knobs, **widths, **sizes, "plain": int(plain)}


def of_kind(kernel: Kernel, kind: str) -> list[Axis]:
    """The parallel (``x``) or reduced (``r``) axes of a pointwise or reduction kernel."""
    return [a for a in kernel.axes if a.kind == kind]


def batch_axes(kernel: Kernel) -> list[Axis]:
    """The axes of a matmul or attention kernel that only say which product or head it is."""
    return [a for a in kernel.axes if a.name not in ("m", "n", "k", "d", "e")]


def head_widths(kernel: Kernel) -> dict[str, int]:
    """BD and BE of attention: the widths of keys and values as powers of two, at least 16.

    Raises:
        TesselError: a width is symbolic.
    """
    out: dict[str, int] = {}
    for axis, name in (("d", "BD"), ("e", "BE")):
        extent = kernel.axis(axis).extent
        if not isinstance(extent, int):
            raise TesselError(f"{kernel.name}: the head width {extent} must be a known number")
        out[name] = max(16, next_power(int(extent)))
    return out


def next_power(n: int) -> int:
    """The least power of two that is not below ``n``.

    >>> next_power(1), next_power(17)
    (1, 32)
    """
    return 1 << max(0, n - 1).bit_length()


def size_or(d: Dim, unknown: int = UNKNOWN) -> int:
    """A size as a number, symbols counting as large."""
    return d if isinstance(d, int) else unknown


def _pointwise(kernel: Kernel, vendor: str) -> tuple[dict[str, int], str]:
    interpret = vendor == "interpret"
    size = size_or(product(a.extent for a in of_kind(kernel, "x")))
    block = min(next_power(size), INTERPRET_TILE if interpret else 1024)
    warps = 1 if interpret else 4 if block >= 512 else 1
    why = "large for the interpreter" if interpret else "1024 elements a program, or all there are"
    return {"XB": block, "num_warps": warps, "num_stages": 1}, why


def _reduction(kernel: Kernel, vendor: str) -> tuple[dict[str, int], str]:
    interpret = vendor == "interpret"
    x_size = size_or(product(a.extent for a in of_kind(kernel, "x")))
    r_extent = product(a.extent for a in of_kind(kernel, "r"))
    r_size = size_or(r_extent)
    most = INTERPRET_TILE if interpret else 8192
    one_block = isinstance(r_extent, int) and r_extent <= (INTERPRET_TILE if interpret else ONE_BLOCK)
    if one_block and (interpret or not reads_across(kernel)):
        rb = next_power(r_size)
        xb = min(next_power(x_size), max(1, (most if interpret else 2048) // rb))
        why = "a program holds whole rows"
    elif reads_across(kernel):
        # Neighbours in memory are neighbours along x: a wide x makes full cache lines.
        xb = min(next_power(x_size), most // 32 if interpret else 64)
        rb = min(next_power(r_size), most // xb if interpret else 32)
        why = "x is the contiguous axis: wide along x, a loop over r"
    else:
        rb = min(next_power(r_size), most // 8 if interpret else 2048)
        xb = min(next_power(x_size), 8 if interpret else 1)
        why = "rows too long for a block, or of unknown length: a loop over r"
    warps = 1 if interpret else max(1, min(16 if rb > 4096 else 8, xb * rb // 256))
    return {"XB": xb, "RB": rb, "num_warps": warps, "num_stages": 1}, why


def _matmul(kernel: Kernel, vendor: str) -> tuple[dict[str, int], str]:
    interpret = vendor == "interpret"
    m, n, k = (size_or(kernel.axis(a).extent, 4096) for a in "mnk")
    exact = plain_dot(kernel, vendor)
    if interpret:
        most = (32, 32, 64) if exact else (256, 256, 512)
        bm, bn, bk = (min(max(16, next_power(s)), top) for s, top in zip((m, n, k), most))
        return _gemm(bm, bn, bk, 1, 1, 1), "large for the interpreter"
    if exact:
        return _gemm(16, 16, 16, 4, 4, 1), "no matrix instruction for this type: a small tile of plain sums"
    widest = max(p.type.dtype.itemsize for p in kernel.params if not p.out)
    if widest >= 4:  # f32 and f64 at full precision: bound by registers
        bm, bn, bk = 64, 64, 16 if widest == 8 else 32
    else:
        bm, bn, bk = (128, 128, 64) if m > 64 else (64, 128, 64)
    bm, bn, bk = (min(max(16, next_power(s)), b) for s, b in ((m, bm), (n, bn), (k, bk)))
    warps = 8 if bm * bn >= 128 * 128 else 4
    return _gemm(bm, bn, bk, 8, warps, 3), "a square tile, or what there is"


def _gemm(bm: int, bn: int, bk: int, group: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": bm, "BN": bn, "BK": bk, "GROUP": group, "num_warps": warps, "num_stages": stages}


def plain_dot(kernel: Kernel, vendor: str) -> bool:
    """Whether tiles are multiplied by plain sums of products instead of matrix instructions.

    So are integers; and f64 on NVIDIA where a narrower load feeds the product, at which Triton's
    compiler (3.7) aborts: "Currently fp64 don't support largeK MMA".
    """
    part = "a" if kernel.family == "matmul" else "q"
    number = getattr(kernel.provides[part], "number", None)
    dtype = next(s.dtype for s in kernel.parts[part] if getattr(s, "out", None) == number)  # type: ignore[union-attr]
    loads = [s.dtype for part in kernel.parts.values() for s in part if isinstance(s, Load)]
    narrow = any(d.itemsize < 8 for d in loads)
    return not dtype.is_floating_point or (vendor == "nvidia" and dtype.itemsize == 8 and narrow)


def _attention(kernel: Kernel, vendor: str) -> tuple[dict[str, int], str]:
    m, n = (size_or(kernel.axis(a).extent, 4096) for a in "mn")
    interpret = vendor == "interpret"
    width = max(head_widths(kernel).values())
    widest = max(p.type.dtype.itemsize for p in kernel.params if not p.out)
    if interpret:
        bm, bn, why = 256, 256, "large for the interpreter"
    elif plain_dot(kernel, vendor):
        bm, bn, why = 16, 16, "plain sums: a small tile"
    elif widest >= 4:
        bm, bn, why = 32, 32 if width <= 64 else 16, "full precision: bound by registers"
    else:
        bm, bn, why = (128, 64, "wide in queries") if width <= 128 else (64, 32, "small: the heads are wide")
        if vendor == "amd" and width > 64:
            bn = 32  # 64 spills
    bm, bn = min(max(16, next_power(m)), bm), min(max(16, next_power(n)), bn)
    warps = 1 if interpret else 8 if bm >= 128 else 4
    return {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": 1 if interpret else 2}, why


def reads_across(kernel: Kernel) -> bool:
    """Whether most loads step by one element along x and not along r (a reduction over columns)."""
    axes: dict[str, Index] = {}
    for kind in ("x", "r"):
        mine = of_kind(kernel, kind)
        flat = var(kind, product(a.extent for a in mine))
        axes.update(zip((a.name for a in mine), delinearize(flat, [a.extent for a in mine]), strict=True))
    votes = 0
    for stmt in kernel.body:
        if not isinstance(stmt, Load | Store):
            continue
        address = stmt.access.address(kernel.params[stmt.access.param])
        address = substitute(address, lambda a: axes.get(a.name) if a.kind == "var" else None)
        step = {kind: _unit_step(address, kind) for kind in ("x", "r")}
        if step["x"] != step["r"]:
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
