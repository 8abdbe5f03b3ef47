"""The record of one rendered kernel: text to write to a file, and how to launch what it defines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from ..ir.types import Dim, substitute
from ..tiles.kernel import Kernel

INT32_LIMIT = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Source:
    """One kernel as a complete Python module.

    Launched as ``name[grid](*args, INDEX=..., **constexprs)``, where ``INDEX`` is ``tl.int64`` if
    ``wide(sizes)`` says so, else ``tl.int32``.

    Attributes:
        name: the function's name in the module.
        header: comment lines: nodes computed, the user's lines, the tile and why.
        body: everything after the header.
        args: runtime arguments in order: a pointer for every parameter, then ``sizes``.
        sizes: names of the symbols the kernel takes as integers.
        grid: number of programs, expressions over the symbols; 0 means there is nothing to launch.
        constexprs: tile sizes that the function takes, and ``num_warps`` and ``num_stages``.
        knobs: the template's knobs it was rendered with.
        smem_bytes: shared memory in bytes that a program takes at most (an estimate from the header).
        extents: sizes and offsets (elements) that must fit the index type, as far as symbols decide
            it; ``always_wide`` says that a known one does not fit 32 bits.
        checks: it holds bound checks: launch with ``debug=True`` and ``sanitize_overflow=False``.
        interpret: rendered for Triton's interpreter; not for a GPU.
        kernel: the tile program.
        described: positions in ``args`` of the tensors that are loaded by descriptors, which must start at a
            multiple of 16 bytes.
        twin: the same kernel with ordinary loads, for a call where one of them does not.
    """

    name: str
    header: str
    body: str
    args: tuple[str, ...]
    sizes: tuple[str, ...]
    grid: tuple[Dim, ...]
    constexprs: Mapping[str, int]
    knobs: Mapping[str, int]
    smem_bytes: int
    extents: tuple[Dim, ...]
    always_wide: bool
    checks: bool
    interpret: bool
    kernel: Kernel
    described: tuple[int, ...] = ()
    twin: Source | None = None

    def __post_init__(self) -> None:
        for name in ("constexprs", "knobs"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def text(self) -> str:
        """The whole module."""
        return self.header + self.body

    @cached_property
    def body_key(self) -> str:
        """A digest that two kernels share if they differ only in name, header and sizes of the grid."""
        neutral = self.body.replace(f"def {self.name}(", "def kernel(")
        launch = (sorted(self.constexprs.items()), self.extents, self.always_wide)
        return hashlib.sha256(repr((neutral, launch)).encode()).hexdigest()

    def wide(self, sizes: Mapping[str, int]) -> bool:
        """Whether some offset needs 64 bits, given the symbols' values."""
        return self.always_wide or any(substitute(e, sizes) > INT32_LIMIT for e in self.extents)

    def grid_for(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The grid in numbers."""
        return tuple(substitute(d, sizes) for d in self.grid)
