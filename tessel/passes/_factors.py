"""A node's axes seen from the mesh: which mesh axes split which factor of its dims string.

Propagation and partition both work on factors: a dimension of a tensor is one factor or several
(``(a b)``, the first the outermost), and mesh axes that split a dimension split its outer factor first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from ..errors import TesselError
from ..ir.node import Node, Value
from ..ir.sharding import Sharding
from ..ir.types import TensorType
from ..ops.dims import Dims, Halo, Term, dims_of, factor_sizes, window_of

Axes: TypeAlias = "tuple[str, ...]"
Split: TypeAlias = "dict[str, Axes]"
"""Factor -> the mesh axes that split it, major to minor."""

# How the pieces of a reduced axis are put together by a collective, by the combine of the dims string.
COMBINED = {"sum": "sum", "max": "max", "min": "min", "any": "max", "all": "min"}
# Those that take several collectives with work in between (``_exchange.py``).
MERGED = frozenset({"softmax-merge", "nll-merge"})


@dataclass(frozen=True)
class Rule:
    """What a node's dims string says, with sizes.

    Attributes:
        dims: the parsed string.
        sizes: the size of every factor.
        operands, results: the tensor values that the string speaks of, in its order.
    """

    dims: Dims
    sizes: Mapping[str, int]
    operands: tuple[Value, ...]
    results: tuple[Value, ...]

    def may_split(self, factor: str) -> bool:
        """Whether pieces of the factor can be joined or combined by what there is here."""
        f = self.dims.factors[factor]
        joined = f.kind == "map" or (f.kind == "reduce" and (f.combine in COMBINED or f.combine in MERGED))
        return self.sizes[factor] > 1 and (joined or self.halo(factor) is not None)

    def halo(self, factor: str) -> Halo | None:
        """How a window axis may be split: pieces read the edges of those beside them."""
        if self.dims.factors[factor].kind != "window":
            return None
        return window_of(self.results[0].node, self.dims, factor)

    def halos_fit(self, split: Mapping[str, Axes], mesh: Mapping[str, int]) -> bool:
        """Whether the pieces of every window axis have what their neighbours read."""
        parts = ((self.halo(f), prod(mesh[a] for a in axes)) for f, axes in split.items() if axes)
        return all(halo is None or halo.fits(n) for halo, n in parts)

    def combine(self, factor: str) -> str | None:
        """What combines the pieces of a reduced factor."""
        f = self.dims.factors[factor]
        return COMBINED.get(f.combine) if f.kind == "reduce" else None


def rule_of(node: Node) -> Rule:
    """The rule of a node.

    Raises:
        TesselError: a size is not a number; a mesh splits numbers.
    """
    dims = dims_of(node)
    sizes = factor_sizes(node, dims)
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise TesselError(f"{node.op.name} at {node.loc}: axis {name} has size {size}; to split it, fix the sizes")
    operands = tuple(v for v in node.operands if isinstance(v.type, TensorType))
    results = tuple(v for v in node.outs if isinstance(v.type, TensorType))
    return Rule(dims, sizes, operands, results)  # type: ignore[arg-type]


def project(term: Term, axes: Axes, sizes: Mapping[str, int], mesh: Mapping[str, int]) -> tuple[Split, int]:
    """Which factors of a dimension its axes split, and how many of the axes that explains (from the first)."""
    found: Split = {}
    at = 0
    for factor in term:
        left = sizes[factor.name]
        taken: list[str] = []
        while at < len(axes) and left > 1 and left % mesh[axes[at]] == 0:
            taken.append(axes[at])
            left //= mesh[axes[at]]
            at += 1
        if taken:
            found[factor.name] = tuple(taken)
        if left > 1:
            break  # an inner factor is only split once the outer ones are split to the end
    return found, at


def compose(term: Term, split: Mapping[str, Axes], sizes: Mapping[str, int], mesh: Mapping[str, int]) -> Axes | None:
    """The axes of a dimension whose factors are split so; ``None`` where no sharding says it."""
    found: Axes = ()
    whole = True
    for factor in term:
        axes = split.get(factor.name, ())
        size = sizes[factor.name]
        if axes and not whole:
            return None
        parts = prod(mesh[a] for a in axes)
        if size % parts:
            return None
        found += axes
        whole = whole and parts == size
    return found


def layout(shape: tuple[Term, ...], split: Mapping[str, Axes], rule: Rule, mesh: Mapping[str, int]) -> Sharding | None:
    """The sharding of a tensor of a node whose factors are split so; ``None`` where none says it."""
    dims = tuple(compose(term, split, rule.sizes, mesh) for term in shape)
    return None if None in dims else Sharding(dims)  # type: ignore[arg-type]


def follow(rule: Rule, lies: Sharding, mesh: Mapping[str, int]) -> Split | None:
    """The split of a view that reads its operand as it lies; ``None`` where its dims do not say one."""
    found: Split = {}
    for term, axes in zip(rule.dims.operands[0], lies.dims, strict=True):
        some, used = project(term, axes, rule.sizes, mesh)
        if used < len(axes) or any(rule.dims.factors[f].kind != "map" for f in some):
            return None  # a piece of what is cut, or turned, is not a piece of the result
        found |= some
    return found if all(layout(s, found, rule, mesh) is not None for s in rule.dims.results) else None


def through(view: Node, lies: Sharding, mesh: Mapping[str, int]) -> Sharding | None:
    """How the result of a view lies whose operand lies so; ``None`` where no sharding says it."""
    rule = rule_of(view)
    split = follow(rule, lies, mesh)
    return None if split is None else layout(rule.dims.results[0], split, rule, mesh)


__all__ = [
    "COMBINED",
    "MERGED",
    "Axes",
    "Rule",
    "Split",
    "compose",
    "follow",
    "layout",
    "project",
    "rule_of",
    "through",
]
