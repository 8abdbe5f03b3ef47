"""How a tensor lies on a mesh: which mesh axes split which dimension, and what is still to be combined.

>>> s = Sharding((("dp",), ()), partial=(("tp", "sum"),))
>>> str(s)
'{dp,·|tp:sum}'
>>> Sharding.parse("{dp,·|tp:sum}") == s
True
>>> s.local_shape((8, 6), {"dp": 2, "tp": 4})
(4, 6)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..errors import TesselError, check
from .types import Dim, try_divide

COMBINES = ("sum", "max", "min")
"""How partial values are put together: what an all-reduce can do."""

AXIS = re.compile(r"[A-Za-z_]\w*\Z")


@dataclass(frozen=True, slots=True)
class Sharding:
    """The layout of one tensor on a mesh; a value.

    The devices along an axis that is named nowhere hold copies.

    Attributes:
        dims: for each dimension of the tensor the mesh axes that split it, major to minor.
        partial: pairs (mesh axis, ``sum``, ``max`` or ``min``): the tensor is what these combine to,
            each device along the axis holds one term. In the order of the axes' names.
        open: dimensions that propagation may split further; the others stay as they are.

    Raises:
        TesselError: an axis is used twice, a combine is unknown, a dimension of ``open`` does not exist.
    """

    dims: tuple[tuple[str, ...], ...]
    partial: tuple[tuple[str, str], ...] = ()
    open: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(map(tuple, self.dims)))
        object.__setattr__(self, "partial", tuple(sorted((a, c) for a, c in self.partial)))
        object.__setattr__(self, "open", frozenset(self.open))
        seen: set[str] = set()
        for axis in (*(a for axes in self.dims for a in axes), *(a for a, _ in self.partial)):
            check(axis not in seen, lambda a=axis: f"mesh axis {a!r} is used twice in {self}")  # type: ignore[misc]
            seen.add(axis)
        for axis, combine in self.partial:
            check(
                combine in COMBINES,
                lambda a=axis, c=combine: f"partial over {a!r}: {c!r} is none of {', '.join(COMBINES)}",  # type: ignore[misc]
            )
        for d in self.open:
            check(0 <= d < len(self.dims), lambda d=d: f"dim {d} is said to be open, {self} has {len(self.dims)}")  # type: ignore[misc]

    @classmethod
    def replicated(cls, rank: int) -> Sharding:
        """A whole copy on every device, of a tensor of ``rank`` dimensions."""
        return cls(((),) * rank)

    @property
    def rank(self) -> int:
        """The number of dimensions of the tensor."""
        return len(self.dims)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that split a dimension, in the order of dimensions."""
        return tuple(a for axes in self.dims for a in axes)

    def dim_of(self, axis: str) -> int | None:
        """The dimension that ``axis`` splits, ``None`` where it splits none."""
        return next((d for d, axes in enumerate(self.dims) if axis in axes), None)

    def parts(self, mesh: Mapping[str, int]) -> tuple[int, ...]:
        """Into how many parts each dimension is split."""
        return tuple(prod(mesh[a] for a in axes) for axes in self.dims)

    def local_shape(self, shape: Sequence[Dim], mesh: Mapping[str, int]) -> tuple[Dim, ...]:
        """The shape of one device's share.

        Args:
            shape: of the whole tensor.
            mesh: the size of each mesh axis (a ``Mesh`` is such a mapping).

        Raises:
            TesselError: what ``check`` raises.
        """
        self.check(shape, mesh)
        local = (try_divide(n, p) for n, p in zip(shape, self.parts(mesh), strict=True))
        return tuple(n for n in local if n is not None)

    def check(self, shape: Sequence[Dim], mesh: Mapping[str, int], what: str = "the tensor") -> None:
        """Raise ``TesselError`` unless this is a sharding of a tensor of ``shape`` on ``mesh``.

        Args:
            what: the tensor's name for the message.
        """
        check(len(shape) == self.rank, lambda: f"{what}: {self} has {self.rank} dims, the tensor has {len(shape)}")
        for axis in (*self.axes, *(a for a, _ in self.partial)):
            if axis not in mesh:
                raise TesselError(f"{what}: {self} names mesh axis {axis!r}; the mesh has {', '.join(mesh)}")
        for d, (n, parts) in enumerate(zip(shape, self.parts(mesh), strict=True)):
            if try_divide(n, parts) is None:
                over = " x ".join(f"{a}={mesh[a]}" for a in self.dims[d])
                raise TesselError(f"{what}: dim {d} of size {n} does not divide by {parts} ({over})")

    def with_dim(self, d: int, axes: Iterable[str]) -> Sharding:
        """The same with the axes of dimension ``d`` replaced."""
        return Sharding((*self.dims[:d], tuple(axes), *self.dims[d + 1 :]), self.partial, self.open)

    def closed(self) -> Sharding:
        """The same with no open dimension: what a plan holds once it is settled."""
        return Sharding(self.dims, self.partial) if self.open else self

    def finished(self) -> Sharding:
        """The same with nothing left to combine."""
        return Sharding(self.dims, (), self.open) if self.partial else self

    def __str__(self) -> str:
        dims = ",".join((".".join(axes) + "?" * (d in self.open)) or "·" for d, axes in enumerate(self.dims))
        return "{" + dims + "".join(f"|{a}:{c}" for a, c in self.partial) + "}"

    @classmethod
    def parse(cls, text: str) -> Sharding:
        """Read what ``str`` writes: ``{dp.tp,·,?|sp:sum}``.

        One word a dimension: ``·`` (or ``.`` or ``-``) for no axis, axes joined by ``.``, a ``?`` at the
        end where the dimension is open; then ``|axis:combine`` for what is partial. A 0-d tensor is ``{}``.

        Raises:
            TesselError: the text cannot be read; it names the word that is wrong.
        """
        body = text.strip()
        check(
            body.startswith("{") and body.endswith("}"),
            lambda: f"sharding {text!r}: write it in braces, as {{dp,·}}",
        )
        head, *tail = body[1:-1].split("|")
        words = [w.strip() for w in head.split(",")] if head.strip() else []
        dims, open_ = [], set()
        for d, word in enumerate(words):
            if word.endswith("?"):
                open_.add(d)
                word = word[:-1]
            elif word in ("·", ".", "-"):
                word = ""
            elif not word:
                raise TesselError(f"sharding {text!r}: dim {d} is empty; write · for no axis")
            axes = tuple(word.split(".")) if word else ()
            for axis in axes:
                if not AXIS.match(axis):
                    raise TesselError(f"sharding {text!r}: {axis!r} is no name of a mesh axis")
            dims.append(axes)
        partial = []
        for word in tail:
            axis, colon, combine = word.strip().partition(":")
            if not (colon and AXIS.match(axis)):
                raise TesselError(f"sharding {text!r}: {word!r} is not <axis>:<combine>")
            partial.append((axis, combine))
        return cls(tuple(dims), tuple(partial), frozenset(open_))


__all__ = ["COMBINES", "Sharding"]
