"""Tile programs as Triton source.

    source = render(kernel, get_target("h100"))
    print(source.text)                            # a Python module

``codegen/offline.py`` has sources compiled by another process, which runs ``compile_job.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy

from ..ir.types import Dim, product, simplify_dim
from ..solve import tile
from ..targets import Target
from ..tiles.default import Choice, batch_axes, choose, formula_values, of_kind
from ..tiles.header import ATTENTION, load_header
from ..tiles.index import bounds, exact_div
from ..tiles.kernel import Check, Compute, IndexOf, Kernel
from . import attention
from .contract import matmul
from .dialect import pointer_type
from .families import arguments, pointwise, reduction
from .helpers import helpers_for
from .scans import scan
from .source import INT32_LIMIT, Source

_CONTEXT: dict[str, Callable[[Kernel, Mapping[str, int], str], dict[str, Any]]] = {
    "pointwise": pointwise,
    "reduction": reduction,
    "scan": scan,
    "matmul": matmul,
    "attention": attention.forward,
    "attention_backward": attention.backward,
}
_IMPORTS = "import triton\nimport triton.language as tl\n"


def render(kernel: Kernel, target: Target, knobs: Mapping[str, int] | Choice | None = None) -> Source:
    """The source of a kernel.

    Args:
        kernel: the tile program.
        target: what it is for; ``triton-interpret`` gets the plain twins of what the interpreter lacks.
        knobs: the template's knobs, all of them believed; what is not given is solved for the target.

    Raises:
        TesselError: unknown family, an illegal knob, or a value that has no Triton form.
    """
    header = load_header(kernel.family)
    chosen = knobs if isinstance(knobs, Choice) else _completed(kernel, target, knobs)
    header.check_knobs(chosen.knobs)
    interpret = target.vendor == "interpret"
    context = _CONTEXT[kernel.family](kernel, chosen.knobs, target.vendor)
    code = header.module.kernel({"name": kernel.name, "args": arguments(kernel), "sizes": kernel.symbols(), **context})
    code = "\n".join(line for line in str(code).strip("\n").split("\n") if line.strip()) + "\n"
    parts = [_IMPORTS, *(h + "\n" for h in helpers_for(code, interpret)), code]
    tiles = {n: v for n, v in chosen.knobs.items() if f" {n}: tl.constexpr" in code}
    launch = {n: v for n, v in chosen.knobs.items() if n in ("num_warps", "num_stages")}
    known, symbolic = _extents(kernel, chosen.knobs)
    described = context.get("described_params", ())
    twin = render(kernel, target, {**chosen.knobs, "TMA": 0}) if described else None
    lines = [*kernel.notes, f"tile: {', '.join(f'{n}={v}' for n, v in chosen.knobs.items())} ({chosen.why})"]
    return Source(
        name=kernel.name,
        header="".join(f"# {_comment(line)}\n" for note in lines for line in note.split("\n")),
        body="\n\n".join(parts),
        args=tuple(arguments(kernel)),
        sizes=kernel.symbols(),
        grid=grid_of(kernel, chosen.knobs, target),
        constexprs={**tiles, **launch},
        knobs=chosen.knobs,
        smem_bytes=header.smem(target.arch, formula_values(kernel, chosen.knobs, target.vendor)),
        extents=symbolic,
        always_wide=known > INT32_LIMIT,
        checks=any(isinstance(s, Check) for s in kernel.statements()),
        interpret=interpret,
        kernel=kernel,
        described=described,
        twin=twin,
    )


def _completed(kernel: Kernel, target: Target, knobs: Mapping[str, int] | None) -> Choice:
    """A tile out of the knobs that are given."""
    if target.gpu_target is None:
        return choose(kernel, knobs)
    if knobs is not None and set(load_header(kernel.family).knobs) <= set(knobs):
        return Choice(dict(knobs), "given")
    return tile(kernel, target, given=knobs)


def _comment(line: str) -> str:
    """A line that stays one comment line whatever a user's file is called."""
    return "".join(c if c.isprintable() else "?" for c in line)


def ceil_div(a: Dim, b: int) -> Dim:
    """``a / b`` rounded up, also of a symbolic size."""
    return -(-a // b) if isinstance(a, int) else sympy.floor((a + b - 1) / sympy.Integer(b))


def grid_of(kernel: Kernel, knobs: Mapping[str, int], target: Target) -> tuple[Dim, ...]:
    """Number of programs, all along one grid axis (the others hold only 65535)."""
    if kernel.family in ("pointwise", "reduction", "scan"):
        return (ceil_div(product(a.extent for a in of_kind(kernel, "x")), knobs["XB"]),)
    batch = product(a.extent for a in batch_axes(kernel))
    if kernel.attrs.get("wrt") == "keys":  # of attention's gradients: a tile of keys for each head of keys
        heads, shared = kernel.attrs["heads"]
        groups = exact_div(batch * shared, heads)
        assert groups is not None
        return (groups * ceil_div(kernel.axis("n").extent, knobs["BN"]),)
    programs = batch * ceil_div(kernel.axis("m").extent, knobs["BM"])
    if kernel.family == "matmul":
        programs = programs * ceil_div(kernel.axis("n").extent, knobs["BN"])
        if knobs.get("PERSIST"):
            most = knobs["PERSIST"] * target.units
            return (min(programs, most) if isinstance(programs, int) else sympy.Min(programs, most),)
    return (programs,)


def _extents(kernel: Kernel, knobs: Mapping[str, int]) -> tuple[int, tuple[Dim, ...]]:
    """The largest known number that an index may reach, and the symbolic ones."""
    slack = max(v for n, v in knobs.items() if n not in ("num_warps", "num_stages"))
    groups = [of_kind(kernel, kind) for kind in "xrs"]
    if kernel.family in ("matmul", *ATTENTION):
        groups = [batch_axes(kernel), *([a] for a in kernel.axes)]
    dims: list[Dim] = [product(a.extent for a in axes) + slack for axes in groups]
    for p in kernel.params:
        dims.append(sum((n - 1) * s for n, s in zip(p.type.shape, p.type.strides)) + 1)
    for stmt in kernel.statements():
        if isinstance(stmt, Compute):  # sizes as numbers
            dims += [s for a in stmt.args if isinstance(a, sympy.Basic) for s in a.free_symbols]
        if isinstance(stmt, IndexOf) and (got := bounds(stmt.index)) is not None:
            dims += [got[1], -got[0]]
    dims = [simplify_dim(d) for d in dims]
    known = max((d for d in dims if isinstance(d, int)), default=0)
    return known, tuple(dict.fromkeys(d for d in dims if not isinstance(d, int)))


def job_for(source: Source) -> dict[str, Any]:
    """What ``compile_job`` needs to know beside the module's file, as plain JSON values."""
    pointers = {f"{p.name}_ptr": pointer_type(p.type.dtype) for p in source.kernel.params}
    tiles = {n: v for n, v in source.constexprs.items() if n not in ("num_warps", "num_stages")}
    options: dict[str, Any] = {n: source.constexprs[n] for n in ("num_warps", "num_stages")}
    if source.checks:
        options |= {"debug": True, "sanitize_overflow": False}
    return {
        "name": source.name,
        "signature": pointers | dict.fromkeys(source.sizes, "i64" if source.always_wide else "i32"),
        "tiles": tiles,
        "index": "int64" if source.always_wide else "int32",
        "options": options,
        "features": ["ttg.warp_specialize"] if source.knobs.get("SPECIALIZE") else [],
    }


__all__ = ["Source", "ceil_div", "grid_of", "job_for", "render"]
