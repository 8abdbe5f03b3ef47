"""Tile variables, names of values, and which statements a loop repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..tiles.index import Atom, Index
from ..tiles.kernel import ACC, Check, Kernel, Load, Next, Stmt, Store, axes_read, indices_of, refs

Dims = frozenset[int]
NONE: Dims = frozenset()


@dataclass(frozen=True)
class Lane:
    """A tile variable: its text, the tile dims it runs along, its mask (if a tile can overhang) and zero."""

    text: str
    dims: Dims
    ok: str | None = None


@dataclass
class Names:
    """Names of one kernel's values: unique, and the same each time a value is written."""

    used: set[str] = field(default_factory=set)
    count: int = 0
    known: dict[object, str] = field(default_factory=dict)
    # Pieces of batch coordinates, named ahead of all loops: every tile may use them.
    shared: dict[Atom, tuple[str, Dims]] = field(default_factory=dict)

    def fresh(self, base: str) -> str:
        name, n = base, 0
        while name in self.used:
            n += 1
            name = f"{base}_{n}"
        self.used.add(name)
        return name

    def numbered(self, base: str) -> str:
        self.count += 1
        return self.fresh(f"{base}{self.count}")


def used_indices(kernel: Kernel, stmt: Stmt) -> list[Index]:
    """The indices that a statement's text is made of: an address in place of its coordinates."""
    if isinstance(stmt, Load | Store):
        access = stmt.access
        return [access.address(kernel.params[access.param]), *(c.index for c in access.mask)]
    return list(indices_of(stmt))


def depends_on(stmts: Sequence[Stmt], names: set[str]) -> set[int]:
    """Numbers of the statements (by position) that vary along some axes, directly or through values."""
    moving: set[int] = {ACC}  # a score or a product is new at every step
    found: set[int] = set()
    for i, s in enumerate(stmts):
        if axes_read(s) & names or any(n in moving for n in refs(s)):
            found.add(i)
            if not isinstance(s, Store | Check | Next):
                moving.add(s.out)
    return found
