"""Whether the ranks' shares of one operation make the whole operation's result: proved by z3 at reduced sizes.

    matmul, m k, k n -> m n, k split over tp = 2; the claim: each rank's product is one term of a sum
    global  y[0,0] = x00 w00 + x01 w10 + x02 w20 + x03 w30
    rank 0  a[0,0] = x00 w00 + x01 w10,     rank 1  b[0,0] = x02 w20 + x03 w30
    proved: a + b = y for all real numbers

Every element of an operand is a real variable, every element of a result a term in these (``meaning``); the sizes are
the smallest that the mesh divides. A proof holds for whatever functions stand in the terms; a refutation comes with
numbers, from z3's model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
import z3

from ..ir.node import Node
from ..ir.sharding import Sharding
from ..ops.collective import together
from ..ops.dims import Dims, Term
from ..targets.mesh import Mesh
from .meaning import Meaning, Terms

__all__ = ["Operand", "Verdict", "holds", "moved"]

PROVED, REFUTED, UNKNOWN = "proved", "refuted", "unknown"
MOST_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """``proved``, ``refuted`` (``why`` has the element, the rank and the numbers) or ``unknown``."""

    state: str
    why: str = ""


@dataclass(frozen=True)
class Operand:
    """How the ranks hold an operand.

    Attributes:
        sharding: of its dimensions; may be partial.
        zero: ranks that hold zeros in its place.
        number: the one number of all its elements, if it is a constant.
    """

    sharding: Sharding
    zero: frozenset[int] = frozenset()
    number: float | None = None


def holds(
    whole: Node,
    local: Node,
    dims: Dims,
    sizes: Mapping[str, int],
    split: Mapping[str, tuple[str, ...]],
    operands: Sequence[Operand],
    results: Sequence[Sharding],
    mesh: Mesh,
    milliseconds: int,
) -> Verdict:
    """Whether shares of the operands, computed on by each rank, are shares of the results.

    Args:
        whole: the operation on whole tensors.
        local: what a rank does; its name and literals count, its shapes do not.
        dims, sizes: of ``whole``; the sizes are reduced before anything is written down.
        split: factor to mesh axes.
        operands: how the ranks hold each operand.
        results: the claim.
        mesh: the devices.
        milliseconds: for one question to z3.
    """
    terms = Terms()
    small = _reduced(sizes, split, mesh)
    mine = {f: n // prod(mesh[a] for a in split.get(f, ())) for f, n in small.items()}
    lie = [*(o.sharding for o in operands), *results]
    axes = {a for s in lie for a in (*s.axes, *dict(s.partial))}
    ranks = _ranks(mesh, [*axes, *_telling(operands, mesh)])
    shapes = [_shape(s, small) for s in dims.operands]
    if max(map(prod, [*shapes, *(_shape(s, small) for s in dims.results)]), default=0) > MOST_ELEMENTS:
        return Verdict(UNKNOWN, "too many elements even at the smallest sizes")
    held_by: list[dict[int, torch.Tensor]] = []
    wholes: list[torch.Tensor] = []
    for i, (operand, shape) in enumerate(zip(operands, shapes, strict=True)):
        got = _hold(operand, shape, mesh, ranks, terms, f"operand {i}")
        if got is None:
            return Verdict(REFUTED, f"operand {i} held as {operand.sharding} does not divide at these sizes")
        wholes.append(got[0])
        held_by.append(got[1])
    want = Meaning(whole, whole, dims, terms).run(wholes, small, {})
    made: dict[int, list[torch.Tensor]] = {}
    local_shapes = [_shape(s, mine) for s in dims.operands]
    for r in ranks:
        xs = [shares[r] for shares in held_by]
        for i, (x, shape) in enumerate(zip(xs, local_shapes, strict=True)):
            if tuple(x.shape) != tuple(shape):
                return Verdict(REFUTED, f"operand {i} comes as {operands[i].sharding}, which the others do not fit")
        starts = {f: mesh.index(r, a) * mine[f] for f, a in split.items()}
        made[r] = Meaning(local, whole, dims, terms).run(xs, mine, starts)
    for i, claim in enumerate(results):
        verdict = _together(want[i], {r: m[i] for r, m in made.items()}, claim, mesh, terms, milliseconds, i)
        if verdict.state != PROVED:
            return verdict
    return Verdict(PROVED)


def moved(
    name: str,
    before: Sharding,
    after: Sharding,
    shape: Sequence[int],
    attrs: Mapping[int, Mapping[str, Any]],
    mesh: Mesh,
    milliseconds: int,
) -> Verdict:
    """Whether a collective, or a slice, brings a tensor from one sharding to another.

    Args:
        name: of the operator.
        shape: of the whole tensor; reduced before anything is written down.
        attrs: of every rank.
    """
    terms = Terms()
    involved = [a for a in mesh if a in {*before.axes, *after.axes, *dict(before.partial), *attrs[0].get("axes", ())}]
    ranks = _ranks(mesh, involved)
    small = [
        math.lcm(prod(mesh[a] for a in b), prod(mesh[a] for a in c))
        for b, c in zip(before.dims, after.dims, strict=True)
    ]
    small = [1 if n == 1 else s * (1 if n == s else 2) for n, s in zip(shape, small, strict=True)]
    if prod(small) > MOST_ELEMENTS:
        return Verdict(UNKNOWN, "too many elements even at the smallest sizes")
    got = _hold(Operand(before), small, mesh, ranks, terms, "x")
    if got is None:
        return Verdict(REFUTED, f"{before} does not divide")
    want, have = got
    made: dict[int, torch.Tensor] = {}
    if name == "slice":
        for r in ranks:
            a, d = attrs[r], attrs[r]["dim"]
            share = have[r].shape[d] * a["size"] // _local(shape, before, mesh)[d]
            made[r] = have[r].narrow(d, a["start"] // max(a["size"], 1) * share, share)
    else:
        for group in _groups(mesh, attrs[0]["axes"], ranks):
            xs = [have[r] for r in group]
            a = dict(attrs[group[0]])
            if name in ("all_reduce", "reduce_scatter"):
                total = terms.fold(xs, a["combine"])
                parts = list(total.chunk(len(xs), a["dim"])) if name == "reduce_scatter" else [total] * len(xs)
            else:
                parts = together(name, xs, a)
            made.update(zip(group, parts, strict=True))
    return _together(want, made, after, mesh, terms, milliseconds, 0)


def _local(shape: Sequence[int], sharding: Sharding, mesh: Mesh) -> list[int]:
    return [n // prod(mesh[a] for a in axes) for n, axes in zip(shape, sharding.dims, strict=True)]


def _reduced(sizes: Mapping[str, int], split: Mapping[str, tuple[str, ...]], mesh: Mesh) -> dict[str, int]:
    """The smallest sizes that tell shares apart: two elements a share where there are two."""
    found = {}
    for f, n in sizes.items():
        parts = prod(mesh[a] for a in split.get(f, ()))
        found[f] = n if n <= parts else parts * (2 if parts <= 4 else 1)
    return found


def _shape(shape: tuple[Term, ...], sizes: Mapping[str, int]) -> list[int]:
    return [prod(sizes[f.name] for f in term) for term in shape]


def _telling(operands: Sequence[Operand], mesh: Mesh) -> list[str]:
    """Axes along which ranks differ in holding zeros."""
    zeros = [o.zero for o in operands if o.zero]
    return [
        a
        for a in mesh
        if any((r in z) != (mesh.rank(mesh.coordinates(r) | {a: 0}) in z) for z in zeros for r in range(mesh.devices))
    ]


def _ranks(mesh: Mesh, axes: Sequence[str]) -> list[int]:
    """The ranks that differ along some axes, first along the others."""
    return [r for r in range(mesh.devices) if all(not n or a in axes for a, n in mesh.coordinates(r).items())]


def _groups(mesh: Mesh, axes: Sequence[str], ranks: Sequence[int]) -> list[list[int]]:
    own = set(ranks)
    return [list(g) for g in mesh.groups(*axes) if own.issuperset(g)]


def _hold(
    operand: Operand, shape: Sequence[int], mesh: Mesh, ranks: Sequence[int], terms: Terms, name: str
) -> tuple[torch.Tensor, dict[int, torch.Tensor]] | None:
    """The whole tensor, and what each rank holds of it; ``None`` where it does not divide."""
    sharding = operand.sharding
    parts = [prod(mesh[a] for a in axes) for axes in sharding.dims]
    if any(n % p for n, p in zip(shape, parts, strict=True)):
        return None
    axes = [a for a, _ in sharding.partial]
    if operand.number is not None:
        whole = terms.filled(shape, operand.number)
        pieces: dict[tuple[int, ...], torch.Tensor] = {(): whole}
    else:
        places = list(product(*(range(mesh[a]) for a in axes)))
        pieces = {p: terms.leaves(shape, f"{name} {p}" if axes else name) for p in places}
        whole = _combined(pieces, sharding, terms)
    held = {}
    for r in ranks:
        at = mesh.coordinates(r)
        x = pieces[tuple(at[a] for a in axes) if operand.number is None else ()]
        x = _share(x, sharding, mesh, r)
        held[r] = terms.filled(x.shape, 0) if r in operand.zero else x
    return whole, held


def _combined(pieces: Mapping[tuple[int, ...], torch.Tensor], sharding: Sharding, terms: Terms) -> torch.Tensor:
    """What partial values are partial values of: combined along one axis after the other."""
    left = dict(pieces)
    for _, how in reversed(sharding.partial):
        groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for p, x in left.items():
            groups.setdefault(p[:-1], []).append(x)
        left = {p: terms.fold(xs, how) for p, xs in groups.items()}
    return left[()]


def _share(x: torch.Tensor, sharding: Sharding, mesh: Mesh, rank: int) -> torch.Tensor:
    for d, axes in enumerate(sharding.dims):
        size = x.shape[d] // prod(mesh[a] for a in axes)
        x = x.narrow(d, mesh.index(rank, axes) * size, size)
    return x


def _together(
    want: torch.Tensor,
    made: Mapping[int, torch.Tensor],
    claim: Sharding,
    mesh: Mesh,
    terms: Terms,
    milliseconds: int,
    result: int,
) -> Verdict:
    """Whether what the ranks made is ``claim`` of the whole."""
    axes = [a for a, _ in claim.partial]
    groups: dict[int, dict[tuple[int, ...], int]] = {}
    for r in made:
        at = mesh.coordinates(r)
        groups.setdefault(mesh.rank(at | dict.fromkeys(axes, 0)), {})[tuple(at[a] for a in axes)] = r
    asked: dict[tuple[int, int], Verdict] = {}
    for first, group in groups.items():
        share = _share(want, claim, mesh, first)
        if any(made[r].shape != share.shape for r in group.values()):
            got = list(made[first].shape)
            return Verdict(REFUTED, f"rank {first} makes {got} where {claim} is {list(share.shape)}")
        total = _combined({p: made[r] for p, r in group.items()}, claim, terms)
        for n, pair in enumerate(zip(total.reshape(-1).tolist(), share.reshape(-1).tolist(), strict=True)):
            if pair[0] == pair[1]:
                continue
            if pair not in asked:
                asked[pair] = _equal(terms.known[pair[0]], terms.known[pair[1]], milliseconds)
            verdict = asked[pair]
            if verdict.state != PROVED:
                over = f", combined over {', '.join(axes)}" if axes else ""
                where = f"element {n} of {f'result {result} of ' * bool(result)}rank {first}{over}"
                return Verdict(verdict.state, f"{where}: {verdict.why}")
    return Verdict(PROVED)


def _equal(got: Any, want: Any, milliseconds: int) -> Verdict:
    """Whether two terms are equal for all values of their variables and functions."""
    rest = z3.simplify(got - want, som=True)
    if z3.is_rational_value(rest) and rest.as_fraction() == 0:
        return Verdict(PROVED)
    solver = z3.Solver()
    solver.set("timeout", milliseconds)
    solver.add(got != want)
    answer = solver.check()
    if answer == z3.unsat:
        return Verdict(PROVED)
    if answer == z3.unknown:
        return Verdict(UNKNOWN, f"z3 gave up ({solver.reason_unknown()})")
    model = solver.model()
    numbers = [model.eval(t, model_completion=True) for t in (got, want)]
    return Verdict(REFUTED, f"for some values the ranks have {numbers[0]} where one device has {numbers[1]}")
