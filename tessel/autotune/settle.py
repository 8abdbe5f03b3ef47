"""Tiles that the real compiler accepts: solve, compile for the absent device, and solve again around what it refused.

A prediction has its last word from the compiler. A tile whose kernel aborts it, needs more shared memory than a block
has, or spills, becomes a constraint (``Learned``) of that kernel, and the next best tile is compiled, a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..codegen.offline import Compiled, offline_compile
from ..codegen.source import Source
from ..codegen.triton import render
from ..config import Options
from ..errors import TesselError
from ..solve import Choice, Learned, tile
from ..targets import Target

__all__ = ["Settled", "compile_all", "settle"]

ROUNDS = 4  # tiles tried of one kernel


@dataclass(frozen=True)
class Settled:
    """A kernel with the tile that it ended up with.

    Attributes:
        source: rendered with that tile.
        compiled: what the compiler made of it.
        refused: the tiles tried before, and why not them.
        fault: why the device will not run the kernel, in words; empty if it will.
    """

    source: Source
    compiled: Compiled
    refused: tuple[Learned, ...] = ()
    fault: str = ""


def compile_all(
    sources: Sequence[Source], target: Target, jobs: int = 2, done: Callable[[], None] | None = None
) -> list[Compiled]:
    """Compile sources for a GPU, ``jobs`` of them at the same time; machine code is kept. ``done`` follows each."""
    # Long ones first, and dealt out in turn: no process is left with all of them.
    ordered = sorted(range(len(sources)), key=lambda i: -len(sources[i].body))
    shares = [share for i in range(max(jobs, 1)) if (share := ordered[i :: max(jobs, 1)])]

    def work(share: list[int]) -> list[Compiled]:
        return offline_compile([sources[i] for i in share], target.arch, keep_binaries=True, done=done)

    results: dict[int, Compiled] = {}
    if shares:
        with ThreadPoolExecutor(len(shares)) as pool:
            for share, got in zip(shares, pool.map(work, shares), strict=True):
                results.update(zip(share, got, strict=True))
    return [results[i] for i in range(len(sources))]


def settle(
    sources: Sequence[Source],
    target: Target,
    options: Options | None = None,
    *,
    hints: Mapping[str, int] | None = None,
    jobs: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Settled]:
    """Every kernel compiled for a GPU, with another tile where the compiler refuses the first.

    Args:
        sources: rendered for ``target``, with the tiles to start from.
        target: a GPU, here or not.
        options: ``options.tile`` may force knobs: they stay.
        hints: values for sizes that are known at run time only.
        jobs: compilations at the same time.
        progress: called with how many are done, and of how many.
    """
    tried: list[list[Settled]] = [[] for _ in sources]
    now = dict(enumerate(sources))
    finished, planned = 0, 0

    def tell() -> None:
        nonlocal finished
        finished += 1
        if progress is not None:
            progress(finished, planned)

    for _ in range(ROUNDS):
        planned += len(now)
        again: dict[int, Source] = {}
        for (i, source), compiled in zip(now.items(), compile_all(list(now.values()), target, jobs, tell), strict=True):
            fault = _fault(compiled, target)
            refused = tuple(Learned(t.source.knobs, _why(t), hard=bool(t.fault)) for t in tried[i])
            tried[i].append(Settled(source, compiled, refused, fault))
            if fault or compiled.spills:
                learned = [*refused, Learned(source.knobs, _why(tried[i][-1]), hard=bool(fault))]
                other = _next(source, target, options, hints, learned)
                if other is not None:
                    again[i] = render(source.kernel, target, other)
        now = again
        if not now:
            break
    return [min(t, key=lambda s: (bool(s.fault), s.compiled.spills or 0)) for t in tried]


def _fault(compiled: Compiled, target: Target) -> str:
    if not compiled.ok:
        return compiled.error
    limit = target.limits.shared_bytes_per_block if target.limits is not None else None
    if limit is not None and (compiled.shared_bytes or 0) > limit:
        return f"it needs {compiled.shared_bytes:,} bytes of shared memory; a block has at most {limit:,}"
    return ""


def _why(tried: Settled) -> str:
    return tried.fault or f"it spills {tried.compiled.spills} bytes"


def _next(
    source: Source, target: Target, options: Options | None, hints: Mapping[str, int] | None, learned: list[Learned]
) -> Choice | None:
    """The best tile without those refused; None where there is no other that the judgements accept."""
    try:
        choice = tile(source.kernel, target, options, hints=hints, learned=learned)
    except TesselError:  # no tile is left: the caller keeps the best of those tried
        return None
    same = any(dict(choice.knobs) == dict(item.knobs) for item in learned)
    return None if same or choice.resources.spills else choice
