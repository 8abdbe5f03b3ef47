"""A simple legal tile for every kernel: powers of two that fit the target. Nothing is measured or modelled.

For Triton's interpreter tiles are large, since a program costs milliseconds there and numpy does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import check
from ..ir.types import Dim, product
from ..targets import Target
from .header import Header, load_header
from .index import Index, delinearize, substitute, var
from .kernel import Kernel, Load, Store

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
    rule = {"pointwise": _pointwise, "reduction": _reduction}
    got, why = rule[kernel.family](kernel, target.vendor == "interpret")
    if knobs:
        return Choice({**got, **knobs}, f"given: {', '.join(knobs)}; others by default")
    return Choice(fit(kernel, target, load_header(kernel.family), got), why)


def fit(kernel: Kernel, target: Target, header: Header, knobs: dict[str, int]) -> dict[str, int]:
    """The knobs, made smaller until the header's formula fits the target's shared memory."""
    if target.limits is None or target.vendor == "interpret":
        return knobs
    limit = target.limits.shared_bytes_per_block
    order = ("num_stages", "RB", "XB", "BK", "BN", "BM")
    while header.smem(target.arch, formula_values(kernel, knobs)) > limit:
        smaller = [(n, v) for n in order if n in knobs for v in header.knobs[n] if v < knobs[n]]
        check(bool(smaller), lambda: f"{kernel.name}: no tile fits {limit} bytes of shared memory on {target.name}")
        name = smaller[0][0]
        knobs = {**knobs, name: max(v for n, v in smaller if n == name)}
    return knobs


def formula_values(kernel: Kernel, knobs: Mapping[str, int]) -> dict[str, int]:
    """What the formulas of a header may name: knobs, item sizes in bytes, head widths."""
    ins = [p.type.dtype.itemsize for p in kernel.params if not p.out] or [4]
    outs = [p.type.dtype.itemsize for p in kernel.params if p.out] or [4]
    return {**knobs, "itemsize": max(ins), "out_itemsize": max(outs), "widest": max(*ins, *outs, 4)}


def next_power(n: int) -> int:
    """The least power of two that is not below ``n``.

    >>> next_power(1), next_power(17)
    (1, 32)
    """
    return 1 << max(0, n - 1).bit_length()


def size_or(d: Dim, unknown: int = UNKNOWN) -> int:
    """A size as a number, symbols counting as large."""
    return d if isinstance(d, int) else unknown


def _pointwise(kernel: Kernel, interpret: bool) -> tuple[dict[str, int], str]:
    size = size_or(product(a.extent for a in kernel.axes if a.kind == "x"))
    block = min(next_power(size), INTERPRET_TILE if interpret else 1024)
    warps = 1 if interpret else 4 if block >= 512 else 1
    why = "large for the interpreter" if interpret else "1024 elements a program, or all there are"
    return {"XB": block, "num_warps": warps, "num_stages": 1}, why


def _reduction(kernel: Kernel, interpret: bool) -> tuple[dict[str, int], str]:
    x_size = size_or(product(a.extent for a in kernel.axes if a.kind == "x"))
    r_extent = product(a.extent for a in kernel.axes if a.kind == "r")
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


def reads_across(kernel: Kernel) -> bool:
    """Whether most loads step by one element along x and not along r (a reduction over columns)."""
    axes: dict[str, Index] = {}
    for kind in ("x", "r"):
        mine = [a for a in kernel.axes if a.kind == kind]
        flat = var(kind, product(a.extent for a in mine))
        axes.update(zip((a.name for a in mine), delinearize(flat, [a.extent for a in mine]), strict=True))
    votes = 0
    for stmt in kernel.body:
        if not isinstance(stmt, Load | Store):
            continue
        address = substitute(
            stmt.access.address(kernel.params[stmt.access.param]), lambda a: axes.get(a.name) if a.kind == "var" else None
        )
        step = {kind: _unit_step(address, kind) for kind in ("x", "r")}
        if step["x"] != step["r"]:
            votes += 1 if step["x"] else -1
    return votes > 0


def _unit_step(address: Index, name: str) -> bool:
    """Whether moving one along ``name`` moves one element, as far as the outermost term tells."""
    return any(
        c == 1 and ((a.kind == "var" and a.name == name) or (a.kind == "mod" and a.arg is not None and _unit_step(a.arg, name)))
        for a, c in address.terms
    )
