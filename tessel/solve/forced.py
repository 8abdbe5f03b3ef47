"""Tiles that the user forces: ``Options(tile="128x128x64")``.

    128x128x64                              every matrix product
    matmul: 128x128x64 warps=8 stages=3     the same, with more of its knobs
    attention: 128x64; matmul_3: BM=256     entries for families or kernels, a kernel's own last word

Sides are the template's block sizes in order (BM x BN x BK of a product, BM x BN of attention, XB x RB of a
reduction or a scan, XB of a pointwise kernel). What is not given is solved.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..config import tile_entries
from ..errors import TesselError, did_you_mean
from ..tiles.header import FAMILIES, load_header
from ..tiles.kernel import Kernel

__all__ = ["SIDES", "TileRefused", "forced_knobs", "is_for", "unused_entries"]

SIDES = {
    "matmul": ("BM", "BN", "BK"),
    "attention": ("BM", "BN"),
    "attention_backward": ("BM", "BN"),
    "reduction": ("XB", "RB"),
    "pointwise": ("XB",),
    "scan": ("XB", "RB"),
}
"""What the sides of a tile are called, family by family."""


class TileRefused(TesselError):
    """A tile that the user forced, and that cannot be."""


_SHORT = {"warps": "num_warps", "stages": "num_stages", "group": "GROUP"}


def is_for(where: str, kernel: Kernel) -> bool:
    """Whether an entry is about a kernel: its family, its name, or its name's first words (``matmul_3``)."""
    return where == kernel.family or kernel.name == where or kernel.name.startswith(f"{where}_")


def unused_entries(text: str | None, kernels: Iterable[Kernel]) -> list[str]:
    """The kernels that ``Options.tile`` names and that are not there."""
    known = list(kernels)
    names = [where for where, _, _ in tile_entries(text)] if text else []
    return [n for n in names if n not in FAMILIES and not any(is_for(n, k) for k in known)]


def forced_knobs(text: str | None, kernel: Kernel) -> dict[str, int]:
    """The knobs of a kernel that ``Options.tile`` decides.

    Raises:
        TesselError: more sides than the template has, an unknown knob, or a value that it cannot have.
    """
    out: dict[str, int] = {}
    entries = tile_entries(text) if text else ()
    for where, sides, knobs in sorted(entries, key=lambda e: e[0] not in FAMILIES):
        if not is_for(where, kernel):
            continue
        names = SIDES[kernel.family]
        if sides and len(sides) != len(names):
            shown = "x".join(map(str, sides))
            raise TileRefused(f"{kernel.name}: a {kernel.family} tile is {' x '.join(names)}, not {shown}")
        own = dict(zip(names, sides)) | {_SHORT.get(n, n): v for n, v in knobs.items()}
        known = load_header(kernel.family).knobs
        for name, value in own.items():
            if name not in known:
                words = did_you_mean(name, [*known, *_SHORT])
                raise TileRefused(f"{kernel.name}: the {kernel.family} template has no knob {name!r}; {words}")
            if value not in known[name]:
                raise TileRefused(
                    f"{kernel.name}: {name}={value} is none of the template's {', '.join(map(str, known[name]))}"
                )
        out |= own
    if "part_of" in kernel.attrs:  # it is one of the parts that SPLIT asked for
        out.pop("SPLIT", None)
    return out
