"""The cheapest way from one sharding of a tensor to another.

    {dp,tp|·} to {dp,·}         all_gather over tp
    {dp,·|tp:sum} to {dp,tp}    reduce_scatter over tp
    {tp,·} to {·,tp}            all_to_all over tp

A shortest path over shardings (Dijkstra): the steps are the collectives and the local slice, a step costs the
bytes that a device sends, or what the caller's cost function says. So the answer is exact, and never worse
than going through a third sharding over the same axes (the triangle inequality). Copies along other axes take
no part: to cut them up for the way would cost less by bytes and more by calls. Of equal costs the fewer steps
win, then the fixed order of steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations, product
from math import prod
from typing import TypeAlias

from ..errors import TesselError
from ..ir.sharding import Sharding
from ..ops.collective import payload

Shape: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a reshard.

    Attributes:
        kind: the name of a collective operator, or ``slice``.
        axes: the mesh axes that take part, major to minor.
        before, after: the shardings.
        dim: the dimension that is gathered, scattered, sliced or joined.
        split: of an all-to-all, the dimension that is split.
        combine: of a reduction.
        bytes: what a device sends.
    """

    kind: str
    axes: tuple[str, ...]
    before: Sharding
    after: Sharding
    dim: int = -1
    split: int = -1
    combine: str = ""
    bytes: int = 0


Price: TypeAlias = "Callable[[str, tuple[str, ...], int], float]"
"""``price(kind, axes, local bytes)``: what a step costs, in units of the caller."""


def by_bytes(mesh: Mapping[str, int]) -> Price:
    """The bytes that a device sends."""
    return lambda kind, axes, nbytes: (
        0.0 if kind == "slice" else float(payload(kind, nbytes, prod(mesh[a] for a in axes)))
    )


def reshard(
    shape: Shape, itemsize: int, before: Sharding, after: Sharding, mesh: Mapping[str, int], price: Price | None = None
) -> tuple[Step, ...]:
    """The steps from one sharding to another.

    Args:
        shape: of the whole tensor.
        itemsize: bytes an element.
        before: how it lies; may be partial.
        after: how it should lie. It may be partial only over axes that ``before`` is partial over.
        mesh: axis to size.
        price: what a step costs; the bytes sent if not given.

    Raises:
        TesselError: ``after`` is partial where ``before`` is not, or does not fit the tensor.
    """
    before, after = before.closed(), after.closed()
    if before == after:
        return ()
    if not set(after.partial) <= set(before.partial):
        raise TesselError(f"a finished tensor {before} cannot become the partial {after}")
    after.check(shape, mesh)
    if price is None:
        return _by_bytes(shape, itemsize, before, after, tuple(mesh.items()))
    return _search(shape, itemsize, before, after, mesh, price)


@lru_cache(maxsize=65536)
def _by_bytes(
    shape: Shape, itemsize: int, before: Sharding, after: Sharding, mesh: tuple[tuple[str, int], ...]
) -> tuple[Step, ...]:
    return _search(shape, itemsize, before, after, dict(mesh), by_bytes(dict(mesh)))


def _search(
    shape: Shape, itemsize: int, before: Sharding, after: Sharding, mesh: Mapping[str, int], price: Price
) -> tuple[Step, ...]:
    best: dict[Sharding, tuple[float, int]] = {before: (0.0, 0)}
    came: dict[Sharding, Step] = {}
    heap: list[tuple[float, int, int, Sharding]] = [(0.0, 0, 0, before)]
    count = 0
    while heap:
        cost, length, _, at = heapq.heappop(heap)
        if at == after:
            break
        if (cost, length) > best[at]:
            continue
        nbytes = itemsize * prod(at.local_shape(shape, mesh))  # type: ignore[arg-type]
        for step in _steps(at, after, shape, mesh, nbytes):
            new = (cost + price(step.kind, step.axes, nbytes), length + 1)
            if step.after not in best or new < best[step.after]:
                best[step.after] = new
                came[step.after] = step
                count += 1
                heapq.heappush(heap, (*new, count, step.after))
    steps: list[Step] = []
    at = after
    while at != before:
        steps.append(came[at])
        at = came[at].before
    return tuple(reversed(steps))


def _steps(at: Sharding, goal: Sharding, shape: Shape, mesh: Mapping[str, int], nbytes: int) -> Iterator[Step]:
    """What can be done from ``at``; slices only over axes that the goal has too."""

    def step(kind: str, axes: tuple[str, ...], after: Sharding, dim: int = -1, split: int = -1, how: str = "") -> Step:
        sent = 0 if kind == "slice" else payload(kind, nbytes, prod(mesh[a] for a in axes))
        return Step(kind, axes, at, after, dim, split, how, sent)

    local = at.local_shape(shape, mesh)

    def divides(d: int, axes: tuple[str, ...]) -> bool:
        return local[d] % prod(mesh[a] for a in axes) == 0  # type: ignore[operator,no-any-return]

    keep = set(goal.partial)
    for how in ("sum", "max", "min"):
        open_ = [a for a, c in at.partial if c == how and (a, c) not in keep]
        for some in _subsets(open_):
            rest = tuple(p for p in at.partial if p[0] not in some)
            yield step("all_reduce", some, Sharding(at.dims, rest), how=how)
            for axes, d in product(permutations(some), range(at.rank)):
                if divides(d, axes):
                    scattered = Sharding(at.dims, rest).with_dim(d, at.dims[d] + axes)
                    yield step("reduce_scatter", axes, scattered, d, how=how)
    used = {*at.axes, *(a for a, _ in at.partial)}
    # dimensions that the goal leaves whole serve too: what is sliced there for nothing an all-to-all carries on
    for axis in (a for axes in goal.dims for a in axes if a not in used):
        for d in range(at.rank):
            if divides(d, (axis,)):
                yield step("slice", (axis,), at.with_dim(d, (*at.dims[d], axis)), d)
    for d, axes in enumerate(at.dims):
        for n in range(1, len(axes) + 1):
            head, tail = axes[:-n], axes[-n:]
            yield step("all_gather", tail, at.with_dim(d, head), d)
            for e in range(at.rank):
                if e != d and divides(e, tail):
                    moved = at.with_dim(d, head).with_dim(e, (*at.dims[e], *tail))
                    yield step("all_to_all", tail, moved, d, split=e)
        for order in permutations(axes):
            if order != axes:
                taking = tuple(a for a in mesh if a in axes)
                yield step("collective_permute", taking, at.with_dim(d, order), d)
    if goal.partial == at.partial and goal != at and goal.local_shape(shape, mesh) == local and used:
        taking = tuple(a for a in mesh if a in {*at.axes, *goal.axes} and not (a in used and a not in at.axes))
        clash = {a for a, _ in at.partial} & set(goal.axes)
        if not clash and at.dims != goal.dims:
            yield step("collective_permute", taking, goal)


def _subsets(axes: list[str]) -> Iterator[tuple[str, ...]]:
    for n in range(1, len(axes) + 1):
        yield from combinations(axes, n)


def sources(before: Sharding, after: Sharding, axes: tuple[str, ...], mesh: Mapping[str, int]) -> tuple[int, ...]:
    """For each rank of a group along ``axes`` (the first the slowest), whose share it takes in a permute.

    A rank that holds the right share keeps it.
    """
    places = _places(axes, mesh)
    have = [_share(before, p, mesh) for p in places]
    want = [_share(after, p, mesh) for p in places]
    found = [i if have[i] == want[i] else -1 for i in range(len(places))]
    free: dict[tuple[int, ...], list[int]] = {}
    for i, share in enumerate(have):
        if found[i] != i:
            free.setdefault(share, []).append(i)
    for i, share in enumerate(want):
        if found[i] < 0:
            found[i] = free[share].pop(0)
    return tuple(found)


def _places(axes: tuple[str, ...], mesh: Mapping[str, int]) -> list[dict[str, int]]:
    places: list[dict[str, int]] = [{}]
    for axis in axes:
        places = [{**p, axis: i} for p in places for i in range(mesh[axis])]
    return places


def _share(sharding: Sharding, place: Mapping[str, int], mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Which part of each dimension a rank holds, as far as ``place`` tells."""
    found = []
    for axes in sharding.dims:
        part = 0
        for axis in axes:
            part = part * mesh[axis] + place.get(axis, 0)
        found.append(part)
    return tuple(found)


def rematerializes(steps: tuple[Step, ...]) -> bool:
    """Whether a tensor that is split before and after lies whole on every device in between."""
    return (
        len(steps) > 1
        and bool(steps[0].before.axes)
        and bool(steps[-1].after.axes)
        and any(not s.after.axes for s in steps[:-1])
    )


__all__ = ["Price", "Step", "by_bytes", "rematerializes", "reshard", "sources"]
