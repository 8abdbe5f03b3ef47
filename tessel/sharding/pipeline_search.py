"""The search for pipeline stages: numbers of microbatches and schedules compared by bounds, the best cut and searched.

The chain of segments that the search of one stage takes is cut where a single tensor is alive. What every stretch of
it costs within the memory of a device, for the microbatches that its stage holds at once, comes from
``solve/pipeline_search.py``; ``solve/pipeline.py`` cuts exactly by these; then each part is searched on its own, with
the layout in which the one before hands its result on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, prod

import numpy as np

from ..errors import TesselError, check
from ..solve.comm import MeshAxis, State
from ..solve.memory import param_bytes
from ..solve.pipeline import Array, cut, cut_two_laps, fill, held, stage_of, step_seconds
from ..solve.pipeline_search import Spans, spans_of
from ..solve.shard_choice import Weight
from ..solve.shard_price import Pricer
from ..solve.shard_search import Answer, Search
from ..solve.transient import transient_bytes
from ..solve.units import Param, Segment, numel
from .pipeline import Staged, Way, gives_weights, schedules_for
from .words import size_text

__all__ = ["StageSearch", "search_stages"]

_TRIES = 6  # cuts that are searched through before a candidate is given up
Progress = Callable[[str], None]


@dataclass
class Candidate:
    """A schedule with the cut that its bounds on every stretch ask for."""

    way: Way
    spans: list[list[Spans]]  # by way to keep shared parameters, by part
    bound: float


class StageSearch:
    """The search for one number of microbatches: candidates first, with bounds, then the stages of the best.

    Args:
        kinds, order: the chain of segments.
        pricer: of the mesh without the axis of stages.
        axis: of stages.
        limit: bytes of a device.
        asked: a schedule, or "auto".
    """

    def __init__(
        self, kinds: Sequence[Segment], order: Sequence[int], pricer: Pricer, axis: MeshAxis, limit: float, asked: str
    ) -> None:
        self.kinds, self.order, self.pricer, self.axis, self.limit = kinds, list(order), pricer, axis, limit
        self.m, self.p = pricer.setting.microbatches, axis.size
        self.ways = schedules_for(asked, pricer.setting.train, self.p, self.m)
        places = len(self.order)
        self.ways = [w for w in self.ways if self.p * w.chunks <= places]
        check(bool(self.ways), lambda: f"{places} places where the model can be cut do not make {self.p} stages")
        self.users = self._shared_users()
        self.extra = self._extra()
        self._spans: dict[tuple[float, int], list[Spans]] = {}

    def _shared_users(self) -> dict[Param, list[int]]:
        """The places of the chain that use a parameter of several units."""
        found: dict[Param, list[int]] = {}
        for i, kind in enumerate(self.order):
            for unit in self.kinds[kind].units:
                for use in unit.uses:
                    if isinstance(use.source, Param) and len(use.source.users) > 1:
                        found.setdefault(use.source, []).append(i)
        return {p: sorted(set(at)) for p, at in found.items() if len(set(at)) > 1}

    def _extra(self) -> Array:
        """The least that a stretch holds of parameters whose first user is before it."""
        n = len(self.order)
        out = np.zeros((n + 1, n + 1))
        setting = self.pricer.setting
        devices = prod(a.size for a in self.pricer.axes)
        for param, at in self.users.items():
            optimizer = setting.optimizer if setting.train else None
            least = param_bytes(numel(param.type) / devices, param.type.dtype.itemsize, (), optimizer).total
            for a in range(at[0] + 1, n):
                first = next((i for i in at if i >= a), n)
                out[a, first + 1 :] += least
        return out

    def spans(self, way: Way, part: int) -> list[Spans]:
        """What every stretch costs as a part, by the way to keep shared parameters."""
        held_ = self.in_flight(way, part)
        if (held_, way.chunks) not in self._spans:
            search = Search(self.kinds, self.order, self.pricer.in_flight(held_))
            length = max(1, len(self.order) // (self.p * way.chunks))
            self._spans[held_, way.chunks] = spans_of(search, self.limit / way.chunks, length)
        return self._spans[held_, way.chunks]

    def in_flight(self, way: Way, part: int) -> float:
        return held(way.schedule, self.p, self.m, stage_of(way.schedule, part, self.p), way.chunks)

    def candidates(self, progress: Progress) -> list[Candidate]:
        """The schedules under which something fits, the one with the least bound first."""
        found = []
        for way in self.ways:
            progress(f"cutting {self.p} stages, {way}, {self.m} microbatches")
            spans = [self.spans(way, i) for i in range(self.p * way.chunks)]
            pins = [[own[k] for own in spans] for k in range(len(spans[0]))]
            bound = min(self._bound(way, own) for own in pins)
            if bound < inf:
                found.append(Candidate(way, pins, bound))
        return sorted(found, key=lambda c: c.bound)

    def _cost(self, way: Way, spans: Sequence[Spans], spared: float) -> Array:
        # a stage that holds several parts gives each its share of the memory
        return np.stack([s.bound((self.limit - spared) / way.chunks - self.extra) for s in spans])

    def _bound(self, way: Way, spans: Sequence[Spans]) -> float:
        """Seconds that no cut beats.

        For one part a stage by the best cut. For several by Lagrange, with the memory that they share: what all stages
        work, and of laps the slowest.
        """
        weight = fill(way.schedule, way.chunks) / self.m
        sends = self._least_messages(way)
        if way.chunks == 1:
            best = cut(self._cost(way, spans, 0.0), weight)
            return inf if best is None else best.value + sends
        if cut(np.stack([s.bound(self.limit - self.extra) for s in spans])) is None:
            return inf
        cost, spare = self._shared_cost(spans)
        whole = cut(cost, 1.0)
        total = 0.0 if whole is None else max(0.0, whole.value - sum(spare))
        slowest = total / self.p
        if _laps(way):
            slowest = max(slowest, cut_two_laps(cost, spare)[0])
        return (1 - weight) * slowest + weight * total + sends

    def _shared_cost(self, spans: Sequence[Spans]) -> tuple[Array, list[float]]:
        """Seconds and bytes of every stretch as every part, bytes at their usual price; what a stage's memory is worth.

        No stage works less than its parts' costs less that worth.
        """
        cost = np.stack([s.priced + s.usual * self.extra for s in spans])
        return cost, [spans[i].usual * self.limit for i in range(self.p)]  # the first p parts: one of each stage

    def _least_messages(self, way: Way) -> float:
        """The least seconds of the messages that a microbatch waits for, whatever is handed on."""
        parts = self.p * way.chunks
        at = [stage_of(way.schedule, i, self.p) for i in range(parts)]
        between = [s.after.nbytes for s in self.kinds if s.after is not None]
        least = min(between, default=0) / prod(a.size for a in self.pricer.axes)
        ways = 2 if self.pricer.setting.train else 1
        return ways * sum(a != b for a, b in pairwise(at)) * self.axis.seconds("permute", least)

    def settle(self, candidate: Candidate, progress: Progress) -> Staged | None:
        """The stages of a candidate; None where what is transient in them is too much for every cut."""
        way, spared = candidate.way, 0.0
        weight = fill(way.schedule, way.chunks) / self.m
        for _ in range(_TRIES):
            cuts = [cut(self._cost(way, own, spared), weight) for own in candidate.spans]
            fits = [c for c in cuts if c is not None]
            if not fits:
                return None
            best = min(fits, key=lambda c: c.value)
            own = candidate.spans[next(i for i, c in enumerate(cuts) if c is best)]
            begun = [best.starts]
            if way.chunks > 1:
                cost = self._cost(way, own, spared)
                begun = [self._even(way, best.starts, cost)]
                other = cut_two_laps(cost, [0.0] * self.p)[1] if _laps(way) else None
                if other is not None and all(a < b for a, b in pairwise(other)):
                    begun.append(self._even(way, other, cost))
            found = [self._parts(way, starts, progress) for starts in dict.fromkeys(begun)]
            made = [x for x in found if isinstance(x, Staged)]
            if made:
                out = min(made, key=lambda x: x.seconds)
                out.bound = candidate.bound
                return out
            spared += max(0.005 * self.limit, min(x for x in found if not isinstance(x, Staged)))
        return None

    def _even(self, way: Way, starts: tuple[int, ...], cost: Array) -> tuple[int, ...]:
        """A cut whose parts are moved, one end at a time, while the step of stages of several parts gets shorter."""
        places = [*starts, len(self.order)]

        def value(at: Sequence[int]) -> float:
            own = [float(cost[i, a, b]) for i, (a, b) in enumerate(pairwise(at))]
            works = [
                sum(own[i] for i in range(len(own)) if stage_of(way.schedule, i, self.p) == s) for s in range(self.p)
            ]
            return step_seconds(way.schedule, works, self.m, way.chunks) + 1e-6 * sum(w * w for w in works)

        best, before = value(places), inf
        while best < before:
            before = best
            for i in range(1, len(starts)):
                for x in range(places[i - 1] + 1, places[i + 1]):
                    moved = [*places[:i], x, *places[i + 1 :]]
                    if value(moved) < best:
                        best, places = value(moved), moved
        return tuple(places[:-1])

    def _share(self, out: Staged, part: int, count: int) -> float:
        """The memory of a part: an even share of what the searched parts of its stage leave."""
        own = [i for i in range(count) if out.stage(i) == out.stage(part)]
        left = self.limit - sum(_held_by(out, i) for i in own if i < part)
        return left / sum(i >= part for i in own)

    def _parts(self, way: Way, starts: tuple[int, ...], progress: Progress) -> Staged | float:
        """The parts of a cut searched one after the other, or the bytes that one of them is over."""
        ends = (*starts[1:], len(self.order))
        shared: dict[Param, Weight] = {}
        entry: State | None = None
        out = Staged(self.axis, way, self.m, starts, [], [], self.pricer, [], [], 0.0)
        homes: dict[Param, list[int]] = {}
        for i, (a, b) in enumerate(zip(starts, ends)):
            progress(f"stage {i + 1} of {len(ends)}: {b - a} segments")
            more = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0}
            for param, at in self.users.items():
                if any(a <= x < b for x in at):
                    homes.setdefault(param, []).append(i)
                    stages = {out.stage(x) for x in homes[param][:-1]}
                    if stages and out.stage(i) not in stages:
                        for k, v in _held(shared[param], self.pricer).items():
                            more[k] += v
            order = self.order[a:b]
            local = sorted(set(order))
            pricer = self.pricer.in_flight(self.in_flight(way, i))
            own = {u.source for k in local for x in self.kinds[k].units for u in x.uses if isinstance(u.source, Param)}
            search = Search(
                [self.kinds[k] for k in local], [local.index(k) for k in order], pricer, entry=entry,
                shared={p: w.storage for p, w in shared.items() if p in own},
            )  # fmt: skip
            limit = self._share(out, i, len(starts)) - sum(more.values())
            waiting = _waiting(way, out.stage(i), self.p)
            answer, transient = _within(search, pricer, limit, waiting, progress)
            out.took += answer.took
            if not answer.fits or answer.nbytes + sum(transient.values()) > limit:
                return max(sum(transient.values()), answer.least - limit)
            out.answers.append(answer)
            out.transients.append(transient)
            out.shared.append(more)
            entry = answer.segments[-1].exit
            for w in (w for p in answer.segments for c in p.choices.values() for w in c.weights):
                if w.param in self.users:
                    shared.setdefault(w.param, w)
        out.tied = [(p, tuple(own), shared[p]) for p, own in homes.items() if len({out.stage(i) for i in own}) > 1]
        return out


def _held_by(out: Staged, part: int) -> float:
    """Bytes of a part that has been searched."""
    return out.answers[part].nbytes + sum(out.transients[part].values()) + sum(out.shared[part].values())


def _laps(way: Way) -> bool:
    """Whether every stage holds a part of either of two laps over the stages."""
    return way.schedule == "interleaved" and way.chunks == 2


def _within(
    search: Search, pricer: Pricer, limit: float, waiting: float, progress: Progress | None
) -> tuple[Answer, dict[str, float]]:
    """The answer under the cap less what is transient in it; ``waiting`` backwards are done but for parameters."""
    spared = 0.0
    for _ in range(_TRIES):
        answer = search.answer(limit - spared, progress)
        transient = transient_bytes(answer, pricer)
        transient["temporaries"] += waiting * _wanted_later(answer, pricer)
        if not answer.fits or answer.nbytes + sum(transient.values()) <= limit:
            break
        spared = max(1.05 * spared, sum(transient.values()))
    return answer, transient


def _waiting(way: Way, stage: int, stages: int) -> int:
    """The most microbatches whose gradients of parameters a stage still owes: torch's zb1p lets ``stage`` wait."""
    return {"zb1p": stage + 1, "zbv": stages}.get(way.schedule, 0)


def _wanted_later(answer: Answer, pricer: Pricer) -> float:
    """Bytes of the gradients of products' results that the gradients of parameters are made of."""
    picks = ((u, c) for p in answer.segments for u, c in p.choices.items() if gives_weights(u))
    return sum(pricer.layouts(t).local_bytes(s) for u, c in picks for t, s in zip(u.results, c.outs, strict=True))


def _held(w: Weight, pricer: Pricer) -> dict[str, float]:
    """Bytes of a copy of a parameter, by kind."""
    setting = pricer.setting
    elements, kinds = float(numel(w.param.type)), []
    for axis, code, level in zip(pricer.axes, w.state, w.levels, strict=True):
        if code >= 0:
            elements /= axis.size
        else:
            kinds.append((level, axis.size))
    got = param_bytes(elements, w.param.type.dtype.itemsize, kinds, setting.optimizer if setting.train else None)
    return {"parameters": got.params, "gradients": got.grads, "optimizer": got.optimizer}


def search_stages(searches: Mapping[int, StageSearch], progress: Progress) -> tuple[int, Staged]:
    """The fastest stages over numbers of microbatches and schedules.

    Args:
        searches: by the number of microbatches.

    Raises:
        TesselError: nothing fits.
    """
    started = time.perf_counter()
    found = [(c.bound, m, c) for m, s in searches.items() for c in s.candidates(progress)]
    found.sort(key=lambda x: x[0])
    best: tuple[int, Staged] | None = None
    for bound, m, candidate in found:
        if best is not None and bound >= best[1].seconds:
            break
        made = searches[m].settle(candidate, progress)
        if made is not None and (best is None or made.seconds < best[1].seconds):
            best = m, made
    if best is None:
        raise TesselError(_shortage(searches))
    best[1].tried = [(f"{c.way}, {m} microbatches", b) for b, m, c in found]
    best[1].took = time.perf_counter() - started
    return best


def _shortage(searches: Mapping[int, StageSearch]) -> str:
    s = next(iter(searches.values()))
    n = len(s.order)
    least = {w: min(float(x.least[0, n]) for x in s.spans(w, 0)) for w in s.ways}
    way, need = min(least.items(), key=lambda x: x[1])
    return (
        f"no cut into {s.p} stages fits {size_text(s.limit)} a device: the whole model holds at least "
        f"{size_text(need)} on the devices of all stages ({way}), {size_text(need / s.p)} a stage if it were "
        "cut evenly, and more where it is not. What helps: more stages, more devices on other axes, more microbatches, "
        "a smaller optimizer"
    )
