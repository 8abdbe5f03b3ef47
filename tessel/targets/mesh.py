"""A mesh of devices: named axes with sizes, the coordinates of a rank, the groups along an axis.

>>> mesh = Mesh({"dp": 2, "tp": 4})
>>> mesh.devices, mesh["tp"], str(mesh)
(8, 4, 'dp=2,tp=4')
>>> mesh.coordinates(6)
{'dp': 1, 'tp': 2}
>>> mesh.groups("dp")
((0, 4), (1, 5), (2, 6), (3, 7))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from ..errors import TesselError, check
from ..ir.sharding import AXIS

_MOST = 1_000_000  # devices: what a plan file may say


@dataclass(frozen=True, slots=True)
class Link:
    """What connects the devices along one axis, in the terms of the alpha-beta model.

    Attributes:
        latency: seconds until the first byte of a collective arrives.
        bandwidth: bytes a second that one device sends (and receives) at once.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True, init=False)
class Mesh(Mapping[str, int]):
    """Ordered axes and their sizes; a mapping from an axis's name to its size.

    Ranks are numbered row-major: the last axis's neighbours are neighbouring ranks.

    Args:
        axes: name to size, outermost (slowest links) first.
        links: axis to its link; axes without one have no predicted time.

    Raises:
        TesselError: no axis, a name that is none, a size that is no positive whole number, a link of no axis.
    """

    axes: tuple[tuple[str, int], ...]
    links: tuple[tuple[str, Link], ...] = ()

    def __init__(self, axes: Mapping[str, int], links: Mapping[str, Link] | None = None) -> None:
        check(len(axes) > 0, lambda: "a mesh needs at least one axis, as Mesh({'dp': 2})")
        for name, size in axes.items():
            check(
                isinstance(name, str) and AXIS.match(name),
                lambda n=name: f"mesh axis {n!r} is no name: use letters, digits and _",  # type: ignore[misc]
            )
            whole = isinstance(size, int) and not isinstance(size, bool)
            check(
                whole and size > 0,
                lambda n=name, s=size: f"mesh axis {n!r} has size {s!r}; a size is a whole number of at least 1",  # type: ignore[misc]
            )
        count = prod(axes.values())
        check(count <= _MOST, lambda: f"a mesh of {count:,} devices, more than {_MOST:,}")
        for name in links or {}:
            check(
                name in axes,
                lambda n=name: f"a link is given for axis {n!r}; the mesh has {', '.join(axes)}",  # type: ignore[misc]
            )
        object.__setattr__(self, "axes", tuple(axes.items()))
        object.__setattr__(self, "links", tuple((links or {}).items()))

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read ``dp=2,tp=4``.

        Raises:
            TesselError: a word is not ``name=size``, or an axis is named twice.
        """
        axes: dict[str, int] = {}
        for word in text.split(","):
            name, equals, size = (w.strip() for w in word.partition("="))
            if not equals or not size.lstrip("-").isdecimal():
                raise TesselError(f"mesh {text!r}: {word.strip()!r} is not <axis>=<size>, as in dp=2,tp=4")
            check(name not in axes, lambda n=name: f"mesh {text!r}: axis {n!r} is named twice")  # type: ignore[misc]
            axes[name] = int(size)
        return cls(axes)

    def __getitem__(self, axis: str) -> int:
        for name, size in self.axes:
            if name == axis:
                return size
        raise KeyError(axis)

    def __iter__(self) -> Iterator[str]:
        return iter(name for name, _ in self.axes)

    def __len__(self) -> int:
        """The number of axes (not of devices)."""
        return len(self.axes)

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return prod(size for _, size in self.axes)

    def link(self, axis: str) -> Link | None:
        """What connects the devices along ``axis``, if it is known."""
        return dict(self.links).get(axis)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands along each axis.

        Raises:
            TesselError: there is no such rank; both numbers are named.
        """
        check(
            0 <= rank < self.devices,
            lambda: f"rank {rank} is not in the mesh {self} of {self.devices} devices",
        )
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in self}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The rank at these coordinates; axes that are left out stand at 0."""
        found = 0
        for name, size in self.axes:
            found = found * size + coordinates.get(name, 0)
        return found

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """The ranks that differ only along ``axes``, group by group.

        Within a group ranks are in the order of ``axes``, the first the slowest.
        """
        rest = [a for a in self if a not in axes]
        return tuple(
            tuple(
                self.rank({**dict(zip(rest, fixed, strict=True)), **dict(zip(axes, moving, strict=True))})
                for moving in self._places(axes)
            )
            for fixed in self._places(rest)
        )

    def index(self, rank: int, axes: Iterable[str]) -> int:
        """Which part ``rank`` holds of a dimension split over ``axes``, major to minor."""
        at = self.coordinates(rank)
        found = 0
        for axis in axes:
            found = found * self[axis] + at[axis]
        return found

    def _places(self, axes: Iterable[str]) -> Iterator[tuple[int, ...]]:
        return product(*(range(self[a]) for a in axes))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)


__all__ = ["Link", "Mesh"]
