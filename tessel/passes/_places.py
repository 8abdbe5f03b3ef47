"""Where a rank stands on a mesh: in numbers, or in symbols, so that ranks that do the same have the same program.

    Places(mesh, 5).at(("tp",))                  # 1
    Places(mesh, 5, symbols=True).at(("tp",))    # place0 - 1, and place0 is 2 on this rank

Kernels take symbols as arguments, as they take sizes: the ranks of a mesh then share what is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..ir.types import Dim, symbol
from ..targets.mesh import Mesh
from ._factors import Axes

__all__ = ["Places"]


class Places:
    """The places of one rank.

    Attributes:
        values: what each symbol that was asked for is on this rank; at least 1, as all symbols are. The same names
            stand for the same things on ranks that ask for the same things in the same order.
    """

    def __init__(self, mesh: Mesh, rank: int, symbols: bool = False) -> None:
        self.mesh, self.rank, self.symbols = mesh, rank, symbols
        self.values: dict[str, int] = {}
        self._names: dict[tuple[object, ...], str] = {}

    def at(self, axes: Axes, back: int = 0) -> Dim:
        """The rank's place along axes, or the one ``back`` places before it, round the ring.

        >>> mesh = Mesh({"dp": 2, "tp": 4})
        >>> Places(mesh, 5).at(("tp",)), Places(mesh, 5).at(("tp",), back=2)
        (1, 3)
        """
        parts = prod(self.mesh[a] for a in axes)
        place = (self.mesh.index(self.rank, axes) - back) % parts
        return place if not self.symbols or parts == 1 else self._symbol(("at", axes, back % parts), place + 1) - 1

    def first(self, sets: Sequence[Axes]) -> bool | Dim:
        """Whether the rank is the first along each set of axes; as a symbol that is 1 if it is, else 2."""
        found = all(self.mesh.index(self.rank, axes) == 0 for axes in sets)
        apart = tuple(axes for axes in sets if prod(self.mesh[a] for a in axes) > 1)
        return self._symbol(("first", *apart), 1 if found else 2) if self.symbols and apart else found

    def _symbol(self, what: tuple[object, ...], value: int) -> Dim:
        name = self._names.setdefault(what, f"place{len(self._names)}")
        self.values[name] = value
        return symbol(name)
