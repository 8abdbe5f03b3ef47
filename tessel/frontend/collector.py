"""Python's garbage collector while torch traces: fewer passes over millions of live objects.

    with fewer_collections():
        ...                     # the call that compiles

Tracing and compiling allocate objects by the million, nearly all of them freed by their counts. At Python's default
thresholds a collection every few thousand of them took 17% of the first call of a small BERT.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["fewer_collections"]

_EVERY = 200_000  # new objects between collections: a few ten MB at most wait longer than usual
_lock = threading.Lock()
_inside: list[tuple[int, int, int]] = []  # what was set before, one for each block that is open


@contextmanager
def fewer_collections() -> Iterator[None]:
    """Raise the threshold of the youngest generation in the block; the last block that ends sets it back.

    Does nothing where the collector is off or rarer already.
    """
    with _lock:
        before = gc.get_threshold()
        _inside.append(_inside[0] if _inside else before)
        if 0 < before[0] < _EVERY:
            gc.set_threshold(_EVERY, *before[1:])
    try:
        yield
    finally:
        with _lock:
            first = _inside.pop()
            if not _inside and gc.get_threshold() == (_EVERY, *first[1:]):  # else somebody else has changed it
                gc.set_threshold(*first)
