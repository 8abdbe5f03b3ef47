"""The tile that a compilation uses: the one that is kept for the kernel, if it is legal, else the solver's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..config import Options
from ..solve import Choice, tile
from ..solve.forced import forced_knobs
from ..targets import Target
from ..tiles.kernel import Kernel
from .cache import Cache
from .known import Hit, lookup

__all__ = ["tuned"]


def tuned(
    kernel: Kernel,
    target: Target,
    options: Options | None = None,
    *,
    hints: Mapping[str, int] | None = None,
    cache: Cache | None = None,
) -> Choice:
    """The tile of a kernel on a GPU: forced by ``options.tile``, kept from ``tessel tune``, or solved now.

    What is kept is checked again (see ``legal_tile``). A prediction that another version of the solver made is made
    anew; a measurement under another driver, torch or Triton counts, and ``why`` says that it should be checked.

    Args:
        kernel, target, options, hints: as for ``tessel.solve.tile``.
        cache: the user's own if not given.

    Raises:
        TesselError: as ``tile``; never for what the cache holds.
    """
    if not forced_knobs(options.tile if options is not None else None, kernel):
        hit = lookup(kernel, target, cache=cache)
        if hit is not None and (hit.entry.measured or not hit.recheck):
            numbers = {n: v for n, v in hit.knobs.items() if isinstance(v, int)}
            choice = tile(kernel, target, hints=hints, given=numbers)
            return dataclasses.replace(choice, why=_why(hit))
    return tile(kernel, target, options, hints=hints)


def _why(hit: Hit) -> str:
    entry = hit.entry
    took = "" if entry.seconds is None else f"{entry.seconds * 1e6:,.1f} µs "
    check = f"; to be checked again, {', '.join(hit.recheck)}" if hit.recheck else ""
    return f"kept: {took}{entry.kind}{check}"
