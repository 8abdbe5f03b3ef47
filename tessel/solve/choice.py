"""The tile of one kernel: what the rest of the compiler asks.

choice = tile(kernel, get_target("h100"))
choice.knobs                 # {"BM": 128, "BN": 256, ...}: every knob of the template
choice.predicted             # its time, term by term
choice.candidates(6)         # the fastest six by prediction, to compile or to measure
choice.ruled_out()           # constraint by constraint, how many tiles and why
print(choice.explain())      # all of it as a page
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..config import Options
from ..errors import TesselError
from ..targets import Target
from ..tiles import default
from ..tiles.kernel import Kernel
from .constraints import Learned
from .explain import RuledOut, nothing_fits, page, reason, ruled_out
from .forced import TileRefused, forced_knobs
from .problem import Problem, problem_of
from .resources import Resources
from .solver import Candidate, Table, solve_table
from .time import Time

__all__ = ["Choice", "tile", "tile_of"]

_SIDES = ("BM", "BN", "XB", "RB")


@dataclass(frozen=True)
class Choice(default.Choice):
    """The solved tile of one kernel.

    Attributes:
        knobs: a value for every knob of the template.
        why: in a few words, for the kernel's header.
        name: of the kernel.
        problem: what of the kernel matters for its tile.
        target: the GPU.
        predicted: its time, term by term.
        resources: what one program takes, as predicted.
        given: the knobs that the user or the caller decided.
        learned: tiles that the compiler refused.
    """

    name: str
    problem: Problem
    target: Target
    predicted: Time
    resources: Resources
    given: Mapping[str, int]
    learned: tuple[Learned, ...] = ()

    def _table(self) -> Table:
        return _table(self.problem, self.target, tuple(self.given.items()), self.learned)

    def candidates(self, top: int | None = None) -> list[Candidate]:
        """The tiles that satisfy all constraints, fastest first; the first is this one."""
        table = self._table()
        return [table.candidate(i) for i in range(len(table.order))[:top]]

    def shortlist(self, top: int = 6) -> list[Candidate]:
        """The first few that are worth measuring: the fastest, no two of which differ in the order of tiles only, and
        at most two with the same sides."""
        table, found, seen = self._table(), [], Counter[tuple[int, ...]]()
        for i in range(len(table.order)):
            c = table.candidate(i)
            alike = tuple(v for n, v in c.knobs.items() if n != "GROUP")
            sides = tuple(sorted(v for n, v in c.knobs.items() if n in _SIDES))
            if not seen[alike] and seen[sides] < 2:
                found.append(c)
                seen.update((alike, sides))
            if len(found) == top:
                break
        return found

    def ruled_out(self) -> list[RuledOut]:
        """What rules the other tiles out: constraint, how many tiles, the nearest one and why."""
        return ruled_out(self._table())

    def explain(self, top: int = 5) -> str:
        """A page: the pick term by term, ``top`` candidates, and what rules the others out."""
        return page(self.name, self._table(), top)


def tile(
    kernel: Kernel,
    target: Target,
    options: Options | None = None,
    *,
    hints: Mapping[str, int] | None = None,
    given: Mapping[str, int] | None = None,
    learned: Sequence[Learned] = (),
) -> Choice:
    """The tile that a kernel should have on a GPU, which need not be there. Milliseconds; the same answer every time.

    Args:
        kernel: the tile program.
        target: the GPU's record.
        options: ``options.tile`` may force knobs of this kernel.
        hints: values for sizes that are known at run time only; without one a size counts as 2048.
        given: knobs that are decided already; they win over ``options.tile``.
        learned: tiles that the compiler refused (see ``Learned``): the answer is another.

    Raises:
        TesselError: the target is no GPU, or no tile that the machine allows has the forced knobs; the message
            names the constraints that clash, with their numbers.
    """
    forced = forced_knobs(options.tile if options is not None else None, kernel)
    try:
        return _solve(kernel.name, problem_of(kernel, target, hints), target, {**forced, **(given or {})}, learned)
    except TesselError as e:
        if forced:
            raise TileRefused(f"options.tile: {e}") from None
        raise


def tile_of(
    problem: Problem,
    target: Target,
    *,
    name: str = "kernel",
    given: Mapping[str, int] | None = None,
    learned: Sequence[Learned] = (),
) -> Choice:
    """The tile of a problem that is no kernel yet: what ``tile`` does, from sizes alone."""
    return _solve(name, problem, target, dict(given or {}), learned)


def forget() -> None:
    """Drop the answers that are kept, to time the solver."""
    _best.cache_clear()
    _table.cache_clear()


def _solve(name: str, problem: Problem, target: Target, given: Mapping[str, int], learned: Sequence[Learned]) -> Choice:
    try:
        best, why = _best(problem, target, tuple(given.items()), tuple(learned))
    except TesselError as e:
        raise TesselError(f"{name}: {e}") from None
    if given:
        why = f"given: {', '.join(given)}; {why}"
    return Choice(best.knobs, why, name, problem, target, best.time, best.resources, given, tuple(learned))


@lru_cache(maxsize=4096)
def _best(
    problem: Problem, target: Target, given: tuple[tuple[str, int], ...], learned: tuple[Learned, ...]
) -> tuple[Candidate, str]:
    table = _table(problem, target, given, learned)
    if not len(table.order):
        raise TesselError(nothing_fits(table))
    return table.candidate(0), reason(table)


@lru_cache(maxsize=8)  # megabytes each
def _table(problem: Problem, target: Target, given: tuple[tuple[str, int], ...], learned: tuple[Learned, ...]) -> Table:
    return solve_table(problem, target, dict(given), learned)
