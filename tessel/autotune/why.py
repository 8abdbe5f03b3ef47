"""Why a kernel's tile is not in the cache: the nearest entry, and the first field of the key in which it differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

from ..targets import Target
from ..tiles.kernel import Kernel
from .cache import Cache
from .entry import Entry, Key
from .key import distance, key_of
from .known import legal_tile, lookup

__all__ = ["Answer", "why"]


@dataclass(frozen=True)
class Answer:
    """What the cache says of one kernel.

    Attributes:
        kernel: its name; ``key``: what was looked for.
        hit: the entry found, if any.
        illegal: why the entry that is there may not be used, or nothing.
        nearest: the entry closest to the key where there is no hit; None in an empty cache.
        field: the first field of the key that differs in it; ``solver`` if none does, and another version predicted.
    """

    kernel: str
    key: Key
    hit: Entry | None = None
    illegal: str = ""
    nearest: Entry | None = None
    field: str = ""

    def __str__(self) -> str:
        if self.hit is not None:
            return f"hit ({self.hit.kind})"
        if self.illegal:
            return f"miss: the tile kept is not legal: {self.illegal}"
        if self.nearest is None:
            return "miss: the cache is empty"
        if self.field == "solver":
            return "miss: solver: predicted by another version; it is predicted anew"
        ours, theirs = (str(getattr(k, self.field)) for k in (self.key, self.nearest.key))
        if self.field == "computation":
            ours, theirs = ours[:12], theirs[:12]
        return f"miss: {self.field}: wanted {ours}; the nearest entry ({self.nearest.key.short}) has {theirs}"


def why(kernel: Kernel, target: Target, cache: Cache, entries: Sequence[Entry] | None = None) -> Answer:
    """Hit or miss for one kernel, and what makes the difference.

    Args:
        entries: those of ``cache``, if they are at hand already.
    """
    key = key_of(kernel, target)
    legal = partial(legal_tile, kernel, target)
    hit = lookup(kernel, target, legal=legal, cache=cache)
    if hit is not None:
        stale = hit.recheck and not hit.entry.measured
        return (
            Answer(kernel.name, key, nearest=hit.entry, field="solver")
            if stale
            else Answer(kernel.name, key, hit.entry)
        )
    entries = cache.entries() if entries is None else entries
    same = next((e for e in entries if e.key == key), None)
    if same is not None:
        return Answer(kernel.name, key, illegal=legal(same.knobs) or "its file was changed meanwhile", nearest=same)
    if not entries:
        return Answer(kernel.name, key)
    nearest = min(entries, key=lambda e: (*_apart(key, e.key), e.key.digest))
    return Answer(kernel.name, key, nearest=nearest, field=key.first_difference(nearest.key) or "")


def _apart(a: Key, b: Key) -> tuple[bool, bool, bool, int, float]:
    """What they compute comes first, then how many fields differ, then how far the shapes are apart."""
    apart = distance(a, b)
    return (
        a.computation != b.computation,
        a.family != b.family,
        a.dtypes != b.dtypes,
        sum(getattr(a, f.name) != getattr(b, f.name) for f in fields(Key)),
        math.inf if apart is None else apart,
    )
