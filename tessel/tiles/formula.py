"""Arithmetic that a template declares about itself, kept as text: ``"num_stages * (BM + BN) * BK * itemsize"``.

The same text is evaluated on integers (one tile), on numpy arrays (every tile at once) and, by whoever
passes other ``functions``, on symbols. ``//``, ``%``, comparisons, ``min``, ``max``, ``ceil`` (a quotient
rounded up) and ``align(n, step)`` may be used; conditions count as 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, reduce
from types import CodeType, MappingProxyType
from typing import Any

import numpy as np

from ..errors import TesselError

__all__ = ["ARRAYS", "evaluate", "names_of"]


def _fold(pair: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *values: reduce(pair, values)


def _least(a: Any, b: Any) -> Any:
    return np.minimum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else min(a, b)


def _most(a: Any, b: Any) -> Any:
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)


ARRAYS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "min": _fold(_least),
        "max": _fold(_most),
        "ceil": lambda a, b: -(-a // b),
        "align": lambda n, step: -(-n // step) * step,
    }
)
"""The functions of a formula on numbers and on numpy arrays of them."""


@cache
def _compiled(text: str) -> CodeType:
    return compile(text, "<formula>", "eval")


def names_of(text: str) -> frozenset[str]:
    """The names a formula reads, its functions left out.

    >>> sorted(names_of("max(BM, 2 * BN)"))
    ['BM', 'BN']
    """
    return frozenset(_compiled(text).co_names) - set(ARRAYS)


def evaluate(text: str, values: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] = ARRAYS) -> Any:
    """The value of a formula.

    >>> evaluate("max(BM * BN, 4 * num_stages)", {"BM": 2, "BN": 3, "num_stages": 2})
    8

    Raises:
        TesselError: the formula names something that ``values`` does not hold.
    """
    try:
        return eval(_compiled(text), {"__builtins__": {}, **functions}, dict(values))
    except NameError as e:
        raise TesselError(f"the formula {text!r} needs a value: {e}") from e
