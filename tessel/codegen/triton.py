"""Tile programs as Triton source, and their compilation for GPUs that need not be there.

    source = render(kernel, get_target("h100"))
    print(source.text)                            # a Python module
    offline_compile([source], "sm_90")[0].ok      # True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy

from ..ir.types import Dim, product, simplify_dim
from ..targets import Target
from ..tiles.default import batch_axes, choose, formula_values, head_widths, of_kind
from ..tiles.header import load_header
from ..tiles.index import bounds
from ..tiles.kernel import Check, IndexOf, Kernel
from .contract import attention, matmul
from .families import arguments, pointwise, reduction
from .helpers import helpers_for
from .source import INT32_LIMIT, Source

_CONTEXT: dict[str, Callable[[Kernel, Mapping[str, int], bool], dict[str, Any]]] = {
    "pointwise": pointwise,
    "reduction": reduction,
    "matmul": matmul,
    "attention": attention,
}
_IMPORTS = "import triton\nimport triton.language as tl\n"


def render(kernel: Kernel, target: Target, knobs: Mapping[str, int] | None = None) -> Source:
    """The source of a kernel.

    Args:
        kernel: the tile program.
        target: what it is for; ``triton-interpret`` gets the plain twins of what the interpreter lacks.
        knobs: the template's knobs; the target's default if not given.

    Raises:
        TesselError: unknown family, an illegal knob, or a value that has no Triton form.
    """
    header = load_header(kernel.family)
    chosen = choose(kernel, target, knobs)
    header.check_knobs(chosen.knobs)
    interpret = target.vendor == "interpret"
    context = _CONTEXT[kernel.family](kernel, chosen.knobs, interpret)
    code = header.module.kernel({"name": kernel.name, "args": arguments(kernel), **context})
    code = "\n".join(line for line in str(code).strip("\n").split("\n") if line.strip()) + "\n"
    parts = [_IMPORTS, *(h + "\n" for h in helpers_for(code, interpret)), code]
    sizes = {**chosen.knobs, **(head_widths(kernel) if kernel.family == "attention" else {})}
    tiles = {n: v for n, v in sizes.items() if f" {n}: tl.constexpr" in code}
    launch = {n: v for n, v in chosen.knobs.items() if n in ("num_warps", "num_stages")}
    known, symbolic = _extents(kernel, chosen.knobs)
    lines = [*kernel.notes, f"tile: {', '.join(f'{n}={v}' for n, v in chosen.knobs.items())} ({chosen.why})"]
    return Source(
        name=kernel.name,
        header="".join(f"# {_comment(line)}\n" for note in lines for line in note.split("\n")),
        body="\n\n".join(parts),
        args=tuple(arguments(kernel)),
        sizes=kernel.symbols(),
        grid=grid_of(kernel, chosen.knobs),
        constexprs={**tiles, **launch},
        knobs=chosen.knobs,
        smem_bytes=header.smem(target.arch, formula_values(kernel, chosen.knobs)),
        extents=symbolic,
        always_wide=known > INT32_LIMIT,
        checks=any(isinstance(s, Check) for s in kernel.statements()),
        interpret=interpret,
        kernel=kernel,
    )


def _comment(line: str) -> str:
    """A line that stays one comment line whatever a user's file is called."""
    return "".join(c if c.isprintable() else "?" for c in line)


def ceil_div(a: Dim, b: int) -> Dim:
    """``a / b`` rounded up, also of a symbolic size."""
    return -(-a // b) if isinstance(a, int) else sympy.floor((a + b - 1) / sympy.Integer(b))


def grid_of(kernel: Kernel, knobs: Mapping[str, int]) -> tuple[Dim, ...]:
    """Number of programs, all along one grid axis (the others hold only 65535)."""
    if kernel.family in ("pointwise", "reduction"):
        return (ceil_div(product(a.extent for a in of_kind(kernel, "x")), knobs["XB"]),)
    programs = product(a.extent for a in batch_axes(kernel)) * ceil_div(kernel.axis("m").extent, knobs["BM"])
    if kernel.family == "matmul":
        programs = programs * ceil_div(kernel.axis("n").extent, knobs["BN"])
    return (programs,)


def _extents(kernel: Kernel, knobs: Mapping[str, int]) -> tuple[int, tuple[Dim, ...]]:
    """The largest known number that an index may reach, and the symbolic ones."""
    slack = max(v for n, v in knobs.items() if n not in ("num_warps", "num_stages"))
    groups = [of_kind(kernel, "x"), of_kind(kernel, "r")]
    if kernel.family in ("matmul", "attention"):
        groups = [batch_axes(kernel), *([a] for a in kernel.axes)]
    dims: list[Dim] = [product(a.extent for a in axes) + slack for axes in groups]
    for p in kernel.params:
        dims.append(sum((n - 1) * s for n, s in zip(p.type.shape, p.type.strides)) + 1)
    for stmt in kernel.statements():
        if isinstance(stmt, IndexOf) and (got := bounds(stmt.index)) is not None:
            dims += [got[1], -got[0]]
    dims = [simplify_dim(d) for d in dims]
    known = max(d for d in dims if isinstance(d, int))
    return known, tuple(dict.fromkeys(d for d in dims if not isinstance(d, int)))


__all__ = ["Source", "ceil_div", "grid_of", "render"]
