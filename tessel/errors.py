"""The one exception that Tessel raises on purpose, and two helpers to word it well.

A message says what is wrong, where (a value's name such as ``%5``, a file and line), and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

__all__ = ["TesselError", "check", "did_you_mean", "nearest"]


class TesselError(Exception):
    """A request that Tessel refuses, with a message that says what, where and what to do.

    Whatever eager PyTorch itself raises for a model is passed on as it is and never wrapped in this.
    """


def check(cond: object, message: Callable[[], str]) -> None:
    """Raise :class:`TesselError` with ``message()`` unless ``cond`` holds.

    The message is a function so that it costs nothing when the check passes.

    >>> check(2 > 1, lambda: "never built")
    >>> check(1 > 2, lambda: f"expected a size above 2, got {1}")
    Traceback (most recent call last):
        ...
    tessel.errors.TesselError: expected a size above 2, got 1
    """
    if not cond:
        raise TesselError(message())


def nearest(name: object, names: Iterable[str]) -> str | None:
    """The entry of ``names`` most like ``name`` (case does not count), or None when none is close.

    >>> nearest("Fussion", ["fusion", "matmul"])
    'fusion'
    >>> nearest("zzz", ["fusion", "matmul"]) is None
    True
    """
    by_lower = {n.lower(): n for n in names}
    found = difflib.get_close_matches(str(name).lower(), list(by_lower), n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """The words to put after "unknown X": the nearest match if there is one, then the whole list.

    >>> did_you_mean("h10", ["h100", "cpu"])
    "did you mean 'h100'? known: cpu, h100"
    >>> did_you_mean("zzz", ["h100", "cpu"])
    'known: cpu, h100'
    """
    known = sorted(names)
    close = nearest(name, known)
    return (f"did you mean {close!r}? " if close else "") + "known: " + ", ".join(known)
