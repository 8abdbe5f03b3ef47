"""Arguments and results as nests: what stands in tuples, lists, slices and the values of dicts, left to right.

What users hand in and get back may hold classes of their own, which torch's pytree knows: see
``frontend.joint.tensors_of``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, overload

__all__ = ["leaves"]

T = TypeVar("T")
_NESTS = (tuple, list)  # asked of every argument of every node


@overload
def leaves(nest: Any) -> Iterator[Any]: ...
@overload
def leaves(nest: Any, kind: type[T]) -> Iterator[T]: ...
def leaves(nest: Any, kind: type = object) -> Iterator[Any]:
    """What stands in a nest, of one type if asked.

    >>> list(leaves(((1, [2.0]), {"k": slice(None, 3)})))
    [1, 2.0, None, 3, None]
    >>> list(leaves(((1, [2.0]), {"k": slice(None, 3)}), int))
    [1, 3]
    """
    if isinstance(nest, _NESTS):
        for x in nest:
            yield from leaves(x, kind)
    elif isinstance(nest, slice):
        yield from leaves((nest.start, nest.stop, nest.step), kind)
    elif isinstance(nest, dict):
        yield from leaves(tuple(nest.values()), kind)
    elif isinstance(nest, kind):
        yield nest
