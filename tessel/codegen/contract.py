"""What the matmul template is given: lines of code, made from a tile program; attention shares its operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ..errors import check
from ..ir.types import product
from ..tiles.default import batch_axes, plain_dot
from ..tiles.descriptors import descriptors
from ..tiles.kernel import ACC, Compute, Kernel, Load, Ref, Stmt, refs
from .descriptors import load_lines, making_lines
from .dialect import compute_dtype, literal, narrow, rounded, size_text, triton_dtype
from .expr import Emitter
from .families import divides, flat_axes, names_for
from .names import NONE, Dims, Lane, Names, depends_on, used_indices

BOTH: Dims = frozenset({0, 1})


Side: TypeAlias = tuple[str, str, bool]  # axis, variable, whether tiles overhang


def emitter(
    kernel: Kernel, names: Names, rows: Side, cols: Side, shape: tuple[str, str], interpret: bool
) -> Emitter:
    """An emitter for a tile whose dim 0 is axis ``rows`` and dim 1 axis ``cols``."""
    lanes = {"x": Lane("x", NONE)}
    for dim, (axis, text, masked) in enumerate((rows, cols)):
        lanes[axis] = Lane(text, frozenset({dim}), f"{text}_ok" if masked else None)
    return Emitter(kernel, names, flat_axes(batch_axes(kernel), "x"), lanes, shape, interpret)


def part(e: Emitter, name: str, moving_axis: str) -> tuple[list[str], list[str]]:
    """Lines of a part that stay outside the loop over ``moving_axis``, and those inside."""
    stmts = e.kernel.parts.get(name, ())
    own = e.kernel.provides.get(name)
    if isinstance(own, Ref) and not e.interpret and _plain_load(stmts, own.number):
        e.raw.add(own.number)
    return around(e, stmts, moving_axis)


def around(e: Emitter, stmts: Sequence[Stmt], moving_axis: str) -> tuple[list[str], list[str]]:
    """Lines of statements that stay outside the loop over ``moving_axis``, and those inside."""
    moving = depends_on(stmts, {moving_axis})
    for i, s in enumerate(stmts):
        if i not in moving:
            e.emit(s)
    still = frozenset(d for axis, lane in e.lanes.items() if axis != moving_axis for d in lane.dims)
    for i in sorted(moving):
        e.hoist(used_indices(e.kernel, stmts[i]), still)
    before = e.take()
    for i, s in enumerate(stmts):
        if i in moving:
            e.emit(s)
    return before, e.take()


def _plain_load(stmts: tuple[Stmt, ...], number: int) -> bool:
    """Whether a value is a load that nothing else reads."""
    return any(isinstance(s, Load) and s.out == number for s in stmts) and not any(
        number in list(refs(s)) for s in stmts
    )


def operand(e: Emitter, part: str, zero: tuple[int, str | None], padded: bool = False) -> tuple[str, torch.dtype]:
    """The tile that a part provides, ready for a dot, and its dtype.

    ``zero`` is the contracted dim and its mask: what overhangs there is made zero, since zero
    times the other side's garbage must vanish on both sides. ``padded`` says that it is zero already.
    """
    provided = e.kernel.provides[part]
    check(isinstance(provided, Ref), lambda: f"{e.kernel.name}: part {part!r} provides {provided!r}, not a value")
    text, dims, dtype = e.values[provided.number]
    stmt = next((s for s in e.kernel.parts[part] if getattr(s, "out", None) == provided.number), None)
    raw = provided.number in e.raw
    clean = isinstance(stmt, Load) and (not stmt.access.mask or stmt.access.other == 0)
    dim, ok = zero
    if dims != BOTH:
        text = e.spread(text, dims, BOTH)
    if ok is not None and not padded and not (clean and dim in dims):
        text = f"tl.where({ok}, {text}, {literal(0, dtype, False)})"
    exact = isinstance(stmt, Load) or (isinstance(stmt, Compute) and stmt.op == "cast")
    if e.interpret:  # its dot wants f32: it would multiply the bits of bf16
        text = text if exact else rounded(text, dtype, True)
    elif not raw:
        text = narrow(text, dtype, False)
    return text, dtype


def dot(a: str, b: str, acc: str | None, dtype: torch.dtype, plain: bool, precision: str = "ieee") -> str:
    """The product of two tiles of ``dtype``, added to ``acc`` if there is one."""
    if plain:
        text = f"dot_plain({a}, {b})"
        if dtype.itemsize < 4:  # small integers are summed in 32 bits and wrap afterwards
            text = f"{text}.to({triton_dtype(dtype)})"
        return f"{acc} + {text}" if acc else text
    args = [a, b] + ([acc] if acc else [])
    out = ", out_dtype=tl.float64" if dtype == torch.float64 else ""
    return f'tl.dot({", ".join(args)}, input_precision="{precision}"{out})'


def batch_index(kernel: Kernel, programs: str, interpret: bool) -> str:
    """Which of the batch a program works on, as text: ``programs`` of them share one."""
    return f"tl.full([1, 1], tile // {programs}, INDEX)" if interpret else f"(tile // {programs}).to(INDEX)"


def matmul(kernel: Kernel, knobs: Mapping[str, int], vendor: str) -> dict[str, Any]:
    """Context of ``matmul.triton.j2``."""
    interpret = vendor == "interpret"
    extents = {n: kernel.axis(n).extent for n in "mnk"}
    over = {n: not divides(knobs[b], extents[n]) for n, b in (("m", "BM"), ("n", "BN"), ("k", "BK"))}
    names = names_for(
        kernel, "BM", "BN", "BK", "GROUP", "m", "n", "ka", "kb", "m_ok", "n_ok", "ka_ok", "kb_ok", "acc",
        "tile", "tiles_m", "tiles_n", "group", "rows", "tile_m", "tile_n", "k_start", "program",
        "a_tma", "b_tma", "x_at",
    )  # fmt: skip
    pieces = knobs.get("PIECES", 1)
    left = emitter(kernel, names, ("m", "m", over["m"]), ("k", "ka", over["k"]), ("BM", "BK"), interpret)
    right = emitter(kernel, names, ("k", "kb", over["k"]), ("n", "n", over["n"]), ("BK", "BN"), interpret)
    columns = "BN" if pieces == 1 else f"BN // {pieces}"
    epilogue = emitter(kernel, names, ("m", "m", over["m"]), ("n", "n", over["n"]), ("BM", columns), interpret)
    described = descriptors(kernel) if knobs.get("TMA") else {}
    scalar = Emitter(kernel, names, flat_axes(batch_axes(kernel), "x"), {"x": Lane("x_at", NONE)}, ("1", "1"), False)
    made = [line for d in described.values() for line in making_lines(d, scalar)]
    a_before, a_loop = ([], load_lines(described["a"], left)) if "a" in described else part(left, "a", "k")
    b_before, b_loop = ([], load_lines(described["b"], right)) if "b" in described else part(right, "b", "k")
    a, dtype = operand(left, "a", (1, "ka_ok" if over["k"] else None), padded="a" in described)
    b, other = operand(right, "b", (0, "kb_ok" if over["k"] else None), padded="b" in described)
    check(dtype == other, lambda: f"{kernel.name}: a product of {dtype} and {other}; cast one operand first")
    acc_dtype = compute_dtype(dtype)
    epilogue.define(ACC, "acc", BOTH, acc_dtype)
    for stmt in kernel.body:
        epilogue.emit(stmt)
    batched = product(a.extent for a in batch_axes(kernel)) != 1
    return {
        **{n: size_text(d) for n, d in extents.items()},
        **{f"{n}_masked": v for n, v in over.items()},
        "batched": batched,
        "described": bool(made),
        "described_params": tuple(sorted({d.param for d in described.values()})),
        "batch_index": batch_index(kernel, "(tiles_m * tiles_n)", interpret),
        "persistent": knobs.get("PERSIST", 0) > 0,
        "programs": _programs(kernel, interpret),
        "ahead": [] if batched else made,
        "before": (made if batched else []) + a_before + b_before,
        "loop": a_loop + b_loop,
        "steps": _steps(size_text(extents["k"]), bool(knobs.get("SPECIALIZE"))),
        "loop_indices": len(described) < 2,
        "pieces": _pieces(pieces, over["n"], size_text(extents["n"])),
        "acc_dtype": triton_dtype(acc_dtype),
        "product": dot(a, b, "acc", dtype, plain_dot(kernel, vendor), kernel.attrs.get("precision", "ieee")),
        "body": epilogue.take(),
    }


def _steps(k: str, specialize: bool) -> str:
    """The steps along k; with warps of their own for the loads if asked for."""
    return f"tl.range(0, {k}, BK, warp_specialize=True)" if specialize else f"range(0, {k}, BK)"


def _programs(kernel: Kernel, interpret: bool) -> str:
    """The tiles that a program of a persistent grid computes."""
    tiles = "tiles_m * tiles_n"
    for axis in batch_axes(kernel):
        tiles += f" * {size_text(axis.extent)}"
    more = "" if interpret else ", flatten=True"
    return f"tl.range(tl.program_id(0), {tiles}, tl.num_programs(0){more})"


def _pieces(count: int, masked: bool, n: str) -> list[list[str]]:
    """What comes before each copy of the epilogue: the columns it is about, and their part of the sums."""
    if count == 1:
        return [[]]
    names = ["acc"]
    lines: list[str] = []
    while len(names) < count:
        half = f"BN // {2 * len(names)}"
        for name in names:
            halves = f"{name}.reshape(BM, 2, {half}).permute(0, 2, 1).split()"
            lines.append(f"{name}_0, {name}_1 = {halves}")
        names = [f"{name}_{i}" for name in names for i in (0, 1)]
    pieces = []
    for i, name in enumerate(names):
        own = [
            f"acc = {name}",
            f"n = (tile_n.to(INDEX) * BN + {i} * (BN // {count}) + tl.arange(0, BN // {count}))[None, :]",
        ]
        pieces.append((lines if i == 0 else []) + own + ([f"n_ok = n < {n}"] if masked else []))
    return pieces
