"""All tiles of a template on a target: what each takes, why it is ruled out, how long it would take.

Enumerate the header's knobs, filter by named constraints, rank by predicted time. One table of numpy arrays holds
all tiles (20,000 for a product), so that a kernel takes milliseconds; answers are kept by ``Problem``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import TesselError, did_you_mean
from ..targets import Target
from ..tiles.header import load_header
from ..tiles.kernel import Kernel
from .constraints import Constraint, Learned, constraints_for
from .problem import Problem, problem_of
from .resources import Resources, estimate
from .time import Time, predict, row

__all__ = ["Candidate", "Table", "best", "candidates", "solve", "table_for"]


@dataclass(frozen=True)
class Candidate:
    """One tile: what it takes, and how long it is predicted to take or which constraint rules it out."""

    knobs: Mapping[str, int]
    resources: Resources
    time: Time | None
    ruled_out: str = ""

    @property
    def ok(self) -> bool:
        return not self.ruled_out


@cache
def _grid(family: str) -> Mapping[str, np.ndarray]:
    """Every combination of a template's knobs, one array a knob, the first knob slowest."""
    knobs = load_header(family).knobs
    axes = np.meshgrid(*(np.array(v, dtype=np.int64) for v in knobs.values()), indexing="ij")
    return MappingProxyType({n: a.ravel() for n, a in zip(knobs, axes)})


class Table:
    """All tiles of a problem on a target, as arrays.

    Attributes:
        knobs: name -> values, one a row.
        values: knobs, sizes, what the header derives and the resources, for formulas.
        broken: for every constraint, where it is broken.
        order: the rows that satisfy all constraints, fastest first.
    """

    def __init__(
        self,
        problem: Problem,
        target: Target,
        given: Mapping[str, int] | None = None,
        learned: Sequence[Learned] = (),
    ) -> None:
        if target.gpu_target is None or target.limits is None:
            raise TesselError(f"target {target.name} is no GPU: tiles are solved for GPUs only")
        self.problem, self.target = problem, target
        header = load_header(problem.family)
        grid = _grid(problem.family)
        keep = np.ones(len(grid["num_warps"]), dtype=bool)
        for name, value in (given or {}).items():
            if name not in grid:
                raise TesselError(f"{problem.family} template: no knob {name!r}; {did_you_mean(name, grid)}")
            keep &= grid[name] == value
        self.knobs = {n: a[keep] for n, a in grid.items()} if given else dict(grid)
        sizes = {**problem.sizes(), "warp_size": target.limits.warp_size, "loads": problem.loads}
        sizes["aligned"] = int(problem.aligned)
        values = header.with_derived({**self.knobs, **sizes})
        used = estimate(problem.family, target, values)
        self.path = used.pop("path")
        self.values: dict[str, Any] = {**values, **used}
        self.constraints = constraints_for(problem, target, learned)
        self.broken = {c: np.broadcast_to(c.broken(self.values), (len(self),)) for c in self.constraints}
        self.ok = ~np.any(list(self.broken.values()), axis=0) if len(self) else np.zeros(0, dtype=bool)
        self.ok &= self._column("per_unit") >= 1
        self.rows = np.flatnonzero(self.ok)
        chosen = {n: (v[self.ok] if isinstance(v, np.ndarray) and v.ndim else v) for n, v in self.values.items()}
        self.times = predict(problem, target, chosen, chosen) if len(self.rows) else {}
        self.order = self._ranked()

    def __len__(self) -> int:
        return len(self.knobs["num_warps"])

    def _column(self, name: str) -> np.ndarray:
        return np.broadcast_to(np.asarray(self.values[name]), (len(self),))

    def _ranked(self) -> np.ndarray:
        """Positions in ``rows``, fastest first.

        Times are compared in steps of half a percent from the best, finer than the model is. Then decide: less traffic,
        less shared memory (a pointwise kernel or a reduction: near eight elements a thread), near four warps (one a
        scheduler), and the knobs in declared order, smaller first.
        """
        if not len(self.rows):
            return self.rows
        total = self.times["total"]
        coarse = np.floor(np.log(total / total.min()) / 0.005 + 1e-9)
        keys = [a[self.rows] for a in reversed(list(self.knobs.values()))]
        traffic = (self.times["memory"] + self.times["l2"]) * self.times["steps"] * self.times["waves"]
        drawn = np.round(np.log(np.maximum(traffic, 1e-12)) * 100)
        warps = np.abs(np.log2(self._column("num_warps")[self.rows]) - 2)
        size = self._column("shared")[self.rows]
        if "held" in self.values:
            size = np.abs(np.log2(self._column("held")[self.rows]) - 3)
        keys += [warps, size, drawn, coarse]
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
            path=self.path,
        )

    def candidate(self, position: int) -> Candidate:
        """The candidate of rank ``position``, 0 the fastest."""
        at = int(self.order[position])
        i = int(self.rows[at])
        return Candidate(self.knobs_of(i), self.resources_of(i), row(self.times, at))

    def why_not(self, i: int) -> tuple[Constraint, str] | None:
        """The first constraint that rules row ``i`` out and the words; None where none does."""
        for constraint, broken in self.broken.items():
            if broken[i]:
                return constraint, constraint.explain(self.values, i)
        return None

    def find(self, knobs: Mapping[str, int]) -> int | None:
        """The row with these knobs."""
        hit = np.ones(len(self), dtype=bool)
        for name, value in knobs.items():
            hit &= self.knobs[name] == value
        found = np.flatnonzero(hit)
        return int(found[0]) if len(found) else None


@lru_cache(maxsize=512)
def table_for(problem: Problem, target: Target, learned: tuple[Learned, ...] = ()) -> Table:
    """The table of a problem, computed once."""
    return Table(problem, target, learned=learned)


@lru_cache(maxsize=4096)
def solve(problem: Problem, target: Target) -> Candidate:
    """The fastest tile by prediction.

    Raises:
        TesselError: nothing satisfies all constraints; the message names those that clash, with their numbers.
    """
    table = Table(problem, target)
    if not len(table.order):
        from .explain import nothing_fits

        raise TesselError(nothing_fits(table))
    return table.candidate(0)


def best(kernel: Kernel, target: Target, hints: Mapping[str, int] | None = None) -> Candidate:
    """The tile a kernel should have on a target.

    Raises:
        TesselError: no tile fits.
    """
    return solve(problem_of(kernel, target, hints), target)


def candidates(
    kernel: Kernel, target: Target, hints: Mapping[str, int] | None = None, ruled_out: bool = True
) -> list[Candidate]:
    """Every tile of the kernel's template: those that fit, fastest first, then (``ruled_out``) the others and why."""
    table = table_for(problem_of(kernel, target, hints), target)
    found = [table.candidate(i) for i in range(len(table.order))]
    if ruled_out:
        for i in np.flatnonzero(~table.ok):
            why = table.why_not(int(i))
            words = f"{why[0].name}: {why[1]}" if why else "occupancy: not one program fits a unit"
            found.append(Candidate(table.knobs_of(int(i)), table.resources_of(int(i)), None, words))
    return found
