"""Shares of tensors: cut one device's out of the whole, put the whole together from all.

>>> import torch
>>> from tessel.ir.sharding import Sharding
>>> from tessel.targets.mesh import Mesh
>>> mesh, s = Mesh({"dp": 2}), Sharding.parse("{dp}")
>>> parts = [share(torch.arange(4), s, mesh, rank) for rank in range(2)]
>>> parts[1], assemble(parts, s, mesh)
(tensor([2, 3]), tensor([0, 1, 2, 3]))
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from ..errors import check
from ..ir.sharding import Sharding
from ..targets.mesh import Mesh


def share(x: torch.Tensor, sharding: Sharding, mesh: Mesh, rank: int) -> torch.Tensor:
    """The part of ``x`` that a rank holds: a view.

    Raises:
        TesselError: a dimension does not divide.
    """
    sharding.check(tuple(x.shape), mesh)
    for d, axes in enumerate(sharding.dims):
        if axes:
            size = x.shape[d] // prod(mesh[a] for a in axes)
            x = x.narrow(d, mesh.index(rank, axes) * size, size)
    return x


def assemble(
    parts: Sequence[torch.Tensor], sharding: Sharding, mesh: Mesh, *, tolerance: float | None = 0.0
) -> torch.Tensor:
    """The whole tensor from the parts of all ranks, in the order of ranks.

    Args:
        tolerance: how far copies on several devices may be apart (the sums of a ring may differ by rank);
            ``None`` does not compare them.

    Raises:
        TesselError: parts are missing, copies differ, or values are still partial.
    """
    check(not sharding.partial, lambda: f"parts that are {sharding} have to be combined, not put together")
    check(len(parts) == mesh.devices, lambda: f"{len(parts)} parts for {mesh.devices} devices")
    counts = sharding.parts(mesh)
    whole = parts[0].new_empty([n * c for n, c in zip(parts[0].shape, counts, strict=True)])
    seen: set[tuple[int, ...]] = set()
    for rank, part in enumerate(parts):
        place = tuple(mesh.index(rank, axes) for axes in sharding.dims)
        at = share(whole, sharding, mesh, rank)
        if place not in seen:
            at.copy_(part)
            seen.add(place)
        elif tolerance is not None:
            apart = (at.double() - part.double()).abs().nan_to_num(0.0).max().item() if part.numel() else 0.0
            check(
                apart <= tolerance,
                lambda r=rank, a=apart: f"rank {r} holds another copy of {sharding}: {a:.3g} apart",  # type: ignore[misc]
            )
    return whole


__all__ = ["assemble", "share"]
