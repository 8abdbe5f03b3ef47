"""Bytes, seconds and names in the words of reports."""

from __future__ import annotations

import re

__all__ = ["pattern", "size_text", "time_text"]


def pattern(name: str) -> str:
    """A name with its layer left open."""
    return re.sub(r"\.\d+(?=[.:])", ".*", re.sub(r"#\d+$", "", name))


def size_text(nbytes: float) -> str:
    """Bytes in words.

    >>> size_text(3 * 2**20)
    '3.00 MiB'
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def time_text(seconds: float) -> str:
    """Seconds in words.

    >>> time_text(0.0021)
    '2.1 ms'
    """
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
