"""All tiles of a template on a target: what each takes, why it is ruled out, how long it would take.

Enumerate the header's knobs, filter by named constraints, rank by predicted time. One table of numpy arrays holds
all tiles (20,000 for a product), so that a kernel takes milliseconds. ``choice.py`` is what others ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import TesselError, did_you_mean
from ..targets import Target
from ..tiles.header import load_header
from ..tiles.split import SPLIT_DEPTH
from .constraints import DESCRIPTORS, Constraint, Learned, constraints_for
from .problem import Problem
from .resources import Resources, estimate
from .time import Time, predict, row

__all__ = ["Candidate", "Table", "solve_table"]

ASKED_FOR = frozenset({"SPECIALIZE"})  # variants that no prediction tells apart: only for those who ask
_VARIED = 48  # tiles whose variants are tried
_FEW_POINTS = 128 * 128  # outputs a unit below which cutting k may pay

_TIE = 0.02  # relative: times that are as good as equal


@dataclass(frozen=True)
class Candidate:
    """One tile: what it takes, and how long it is predicted to take."""

    knobs: Mapping[str, int]
    resources: Resources
    time: Time


@cache
def _grid(family: str, more: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> Mapping[str, np.ndarray]:
    """Every combination of a template's knobs, one array a knob, the first knob slowest; variants are the plain ones
    where ``more`` says nothing else."""
    header = load_header(family)
    knobs = {**header.knobs, **{n: (v,) for n, v in header.plain.items()}, **dict(more)}
    axes = np.meshgrid(*(np.array(v, dtype=np.int64) for v in knobs.values()), indexing="ij")
    return MappingProxyType({n: a.ravel() for n, a in zip(knobs, axes)})


class Table:
    """All tiles of a problem on a target, as arrays.

    Args:
        problem: what the kernel computes.
        target: a GPU.
        given: knobs that are decided already.
        learned: tiles that the compiler refused.
        more: values of variants, which are the plain ones otherwise, or of knobs that the template does not have,
            for example ``{"SPLIT": (1, 2, 4)}``.
        rows: the tiles, one array a knob, instead of all.

    Attributes:
        knobs: name -> values, one a row.
        values: knobs, sizes, what the header derives and the resources, for formulas.
        broken: for every constraint, where it is broken.
        rows: the rows that satisfy all constraints; where there are none, those that the machine allows.
        relaxed: whether it came to that.
        order: positions in ``rows``, fastest first.
        before: the table that this one's tiles were taken from; None where it holds all.

    Raises:
        TesselError: the target is no GPU, or a given knob does not exist or cannot have its value.
    """

    def __init__(
        self,
        problem: Problem,
        target: Target,
        given: Mapping[str, int] = MappingProxyType({}),
        learned: Sequence[Learned] = (),
        more: Mapping[str, Sequence[int]] = MappingProxyType({}),
        rows: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        if target.gpu_target is None or target.limits is None:
            raise TesselError(f"target {target.name} is no GPU: tiles are solved for GPUs only")
        self.problem, self.target, self.given = problem, target, given
        header = load_header(problem.family)
        if rows is None:
            known = {**header.knobs, **more}
            for name, value in given.items():
                if name not in known:
                    raise TesselError(f"{problem.family} template: no knob {name!r}; {did_you_mean(name, known)}")
                if value not in known[name]:
                    allowed = ", ".join(map(str, known[name]))
                    raise TesselError(f"{problem.family} template: {name}={value} is none of {allowed}")
            more = {**more, **{n: (given[n],) for n in header.variants if n in given}}
            grid = _grid(problem.family, tuple((n, tuple(v)) for n, v in more.items()))
            keep = np.ones(len(grid["num_warps"]), dtype=bool)
            for name, value in given.items():
                keep &= grid[name] == value
            rows = {n: a[keep] for n, a in grid.items()} if given else grid
        self.knobs = dict(rows)
        self.before: Table | None = None
        sizes = {**problem.sizes(), "warp_size": target.limits.warp_size, "loads": problem.loads}
        sizes["aligned"] = int(problem.aligned)
        values = header.with_derived({**self.knobs, **sizes})
        self.values: dict[str, Any] = {**values, **estimate(problem.family, target, values)}
        self.constraints = constraints_for(problem, target, learned)
        self.broken = {c: np.broadcast_to(c.broken(self.values), (len(self),)) for c in self.constraints}
        self.rows = self._allowed(self.constraints)
        self.relaxed = not len(self.rows)
        if self.relaxed:
            self.rows = self._allowed([c for c in self.constraints if c.hard])
        chosen = {n: (v[self.rows] if isinstance(v, np.ndarray) and v.ndim else v) for n, v in self.values.items()}
        self.times = predict(problem, target, chosen) if len(self.rows) else {}
        self.order = self._ranked()

    def _allowed(self, constraints: Sequence[Constraint]) -> np.ndarray:
        return np.flatnonzero(~np.any([self.broken[c] for c in constraints], axis=0))

    def __len__(self) -> int:
        return len(self.knobs["num_warps"])

    def _column(self, name: str) -> np.ndarray:
        return np.broadcast_to(np.asarray(self.values[name]), (len(self),))

    def _ranked(self) -> np.ndarray:
        """Positions in ``rows``, fastest first.

        Times are compared in steps of two percent from the best: the model is no finer. Then decide: less traffic,
        less shared memory (a pointwise kernel or a reduction: near eight elements a thread), near four warps (one a
        scheduler), and the knobs in declared order, smaller first.
        """
        if not len(self.rows):
            return self.rows
        total = self.times["total"]
        coarse = np.floor(np.log(total / total.min()) / _TIE + 1e-9)
        keys = [a[self.rows] for a in reversed(list(self.knobs.values()))]
        traffic = (self.times["memory"] + self.times["l2"]) * self.times["steps"] * self.times["waves"]
        drawn = np.round(np.log(np.maximum(traffic, 1e-12)) * 100)
        warps = np.abs(np.log2(self._column("num_warps")[self.rows]) - 2)
        size = self._column("shared")[self.rows]
        if "held" in self.values:
            size = np.abs(np.log2(self._column("held")[self.rows]) - 3)
        keys += [warps, size, drawn, coarse]
        if self.relaxed:  # first of all, break as little as can be
            excess = self._column("registers")[self.rows] / self._column("register_limit")[self.rows]
            keys += [np.round(excess, 1), np.sum([b[self.rows] for b in self.broken.values()], axis=0)]
        return np.lexsort(keys)

    def knobs_of(self, i: int) -> dict[str, int]:
        """The knobs of row ``i``."""
        return {n: int(a[i]) for n, a in self.knobs.items()}

    def resources_of(self, i: int) -> Resources:
        """What row ``i`` takes."""
        v = {n: self._column(n)[i] for n in ("shared", "registers", "register_limit", "spills", "columns", "per_unit")}
        return Resources(
            shared_bytes=int(v["shared"]),
            registers=round(float(v["registers"]), 1),
            register_limit=int(v["register_limit"]),
            spills=bool(v["spills"]),
            tensor_columns=int(v["columns"]),
            per_unit=int(v["per_unit"]),
        )

    def candidate(self, position: int) -> Candidate:
        """The candidate of rank ``position``, 0 the fastest."""
        at = int(self.order[position])
        i = int(self.rows[at])
        return Candidate(self.knobs_of(i), self.resources_of(i), row(self.times, at))


def solve_table(
    problem: Problem,
    target: Target,
    given: Mapping[str, int] = MappingProxyType({}),
    learned: Sequence[Learned] = (),
) -> Table:
    """All tiles of the plain variant, and the other variants of those that do best.

    All combinations would be a third of a million. Whether operands come by descriptors, and whether the epilogue may
    take registers in pieces, decides which tiles fit: these two are in the first table.
    """
    variants = load_header(problem.family).variants
    parts = tuple(
        v for v in variants.get("SPLIT", ()) if v == 1 or (problem.splits and problem.k % (v * SPLIT_DEPTH) == 0)
    )
    free = {n: values for n, values in variants.items() if n not in given and n not in ASKED_FOR}
    first_of = {"TMA": bool(problem.described) and target.arch in DESCRIPTORS, "PIECES": problem.point_weight > 0}
    more = {n: (values[0], values[-1]) for n, values in free.items() if first_of.get(n)}
    first = Table(problem, target, given, learned, more)
    if not free or not len(first.order):
        return first
    tiles = _best_tiles(first, free)
    if len(parts) > 1 and "SPLIT" in free and problem.m * problem.n * problem.batch < target.units * _FEW_POINTS:
        cut = Table(problem, target, given, learned, {**more, "SPLIT": parts[-1:]})  # other tiles are best in parts
        tiles = {n: np.concatenate([a, b]) for (n, a), b in zip(tiles.items(), _best_tiles(cut, free).values())}
        free = {**free, "SPLIT": parts}
    else:
        free = {n: v[:1] if n == "SPLIT" else v for n, v in free.items()}
    axes = np.meshgrid(np.arange(len(tiles["BM"])), *(np.array(v) for v in free.values()), indexing="ij")
    new = {n: a[axes[0].ravel()] for n, a in tiles.items()} | {n: a.ravel() for n, a in zip(free, axes[1:])}
    seen = np.all([np.isin(new[n], more.get(n, values[:1])) for n, values in free.items()], axis=0)
    rows = {n: np.concatenate([a[first.rows], new[n][~seen]]) for n, a in first.knobs.items()}
    table = Table(problem, target, given, learned, rows=rows)
    table.before = first
    return table


def _best_tiles(table: Table, free: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The tiles that do best, each once, however it is written."""
    best = table.rows[table.order[: _VARIED * 4]]
    tiles = {n: a[best] for n, a in table.knobs.items() if n not in free}
    once = {tuple(tile): i for i, tile in reversed(list(enumerate(zip(*tiles.values()))))}
    at = np.sort(np.array(list(once.values()), dtype=np.int64))[:_VARIED]
    return {n: a[at] for n, a in tiles.items()}
