"""A plan with a mesh axis ``pp``: the model cut into stages, each laid out over the other axes.

The chain of segments that the search of one stage takes is cut where a single tensor is alive. What every stretch of
it costs within the memory of a device, for the microbatches that its stage holds at once, comes from
``solve/pipeline_search.py``; ``solve/pipeline.py`` cuts exactly by these; then each part is searched on its own, with
the layout in which the one before hands its result on. A step takes what the slowest stage works, what the others
work before it begins and after it ends, and the messages on that way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf, prod
from typing import Any

import numpy as np

from ..errors import TesselError, check
from ..solve.comm import MeshAxis, State, bytes_sent
from ..solve.memory import kept_of, param_bytes
from ..solve.pipeline import SCHEDULES, Array, bubble, cut, fill, held, stage_of, step_seconds
from ..solve.pipeline_search import Spans, spans_of
from ..solve.shard_choice import Weight
from ..solve.shard_price import Pricer
from ..solve.shard_search import Answer, Search
from ..solve.shortage import kinds_of
from ..solve.transient import transient_bytes
from ..solve.units import Param, Segment, Tensor, numel
from .entries import Entries, layout_text

__all__ = ["AXIS", "Staged", "microbatch_choices", "schedules_for", "search_stages"]

AXIS = "pp"
_TRIES = 6  # cuts that are searched through before a candidate is given up
# the zero-bubble schedules only on request: a part's backward runs as one piece (runtime/schedules.py), so that they
# do not reach the bubble that they are priced with
_AUTO = ("1f1b", "interleaved")
_CHUNKS = {"interleaved": 2, "zbv": 2}
_MOST_MICROBATCHES = 3  # numbers of microbatches that are compared
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """A schedule: its name and how many chunks of the model a stage holds."""

    schedule: str
    chunks: int = 1

    def __str__(self) -> str:
        return self.schedule + (f" of {self.chunks} chunks" if self.chunks > 1 else "")


def schedules_for(asked: str, train: bool, stages: int, microbatches: int) -> list[Way]:
    """The schedules to compare.

    Raises:
        TesselError: what was asked for does not go with the stages and microbatches.
    """
    if not train:
        check(asked in ("auto", "gpipe"), lambda: f"schedule {asked!r} orders backwards; without training it is gpipe")
        return [Way("gpipe")]
    ways = [Way(s, _CHUNKS.get(s, 1)) for s in (_AUTO if asked == "auto" else (asked,))]
    found = []
    for way in ways:
        try:
            bubble(way.schedule, stages, microbatches, way.chunks)
        except TesselError:
            if asked != "auto":
                raise
        else:
            found.append(way)
    return found


def microbatch_choices(batch: int | None, stages: int, apart: int) -> list[int]:
    """Numbers of microbatches worth comparing: divisors of the batch that leave a row to each of ``apart`` devices.

    >>> microbatch_choices(64, 4, 8), microbatch_choices(64, 4, 1), microbatch_choices(2, 4, 1)
    ([8, 4], [64, 32, 16], [2])
    """
    if batch is None:
        return [1]
    fits = [m for m in range(1, batch + 1) if batch % m == 0 and batch // m % apart == 0] or [1]
    return [m for m in reversed(fits) if m >= stages or m == fits[-1]][:_MOST_MICROBATCHES]


@dataclass
class Candidate:
    """A schedule with the cut that its bounds on every stretch ask for."""

    way: Way
    spans: list[list[Spans]]  # by way to keep shared parameters, by part
    bound: float


@dataclass
class Staged:
    """An answer for all stages.

    Attributes:
        axis: the mesh's axis of stages.
        way: the schedule.
        starts: where in the chain parts begin.
        answers, transients: of each part.
        shared: memory of a part that keeps a copy of a parameter whose first user is elsewhere.
        tied: parameters with users in parts of several stages, and these parts.
        tried: what was compared: words and seconds that no cut under it beats.
    """

    axis: MeshAxis
    way: Way
    microbatches: int
    starts: tuple[int, ...]
    answers: list[Answer]
    transients: list[dict[str, float]]
    pricer: Pricer
    shared: list[dict[str, float]]
    tied: list[tuple[Param, tuple[int, ...], Weight]]
    bound: float
    took: float = 0.0
    tried: list[tuple[str, float]] = field(default_factory=list)

    # ---------------------------------------------------------------- figures

    @property
    def stages(self) -> int:
        return self.axis.size

    def stage(self, part: int) -> int:
        return stage_of(self.way.schedule, part, self.stages)

    def parts_of(self, stage: int) -> list[int]:
        return [i for i in range(len(self.answers)) if self.stage(i) == stage]

    def work(self, stage: int) -> float:
        """Seconds that a stage works in a step."""
        return sum(self.answers[i].seconds for i in self.parts_of(stage))

    def handed(self) -> list[tuple[Tensor, State, float, float]]:
        """What each part but the last hands on: tensor, layout, bytes of a device and seconds of one microbatch."""
        out = []
        for answer in self.answers[:-1]:
            last = answer.segments[-1]
            assert last.segment.after is not None and last.exit is not None, "parts meet at a tensor"
            nbytes = self.pricer.layouts(last.segment.after).local_bytes(last.exit)
            out.append((last.segment.after, last.exit, nbytes, self.axis.seconds("permute", nbytes)))
        return out

    def crosses(self, i: int) -> bool:
        """Whether the parts ``i`` and ``i + 1`` are on different stages."""
        return self.stage(i) != self.stage(i + 1)

    @property
    def messages(self) -> float:
        """Seconds of the messages that a microbatch waits for, there and back."""
        ways = 2 if self.pricer.setting.train else 1
        return ways * sum(s for i, (_, _, _, s) in enumerate(self.handed()) if self.crosses(i))

    @property
    def ties(self) -> float:
        """Seconds of adding up the gradients of parameters that several stages keep."""
        return sum(self._tie_seconds(parts, w) for _, parts, w in self.tied)

    def _tie_bytes(self, w: Weight) -> float:
        parts = prod(a.size for a, c in zip(self.pricer.axes, w.state, strict=True) if c >= 0)
        apart = prod(a.size for a, n in zip(self.pricer.axes, w.levels, strict=True) if n >= 2)
        return float(w.param.type.nbytes) / (parts * apart)

    def _tie_seconds(self, parts: Sequence[int], w: Weight) -> float:
        n = len({self.stage(i) for i in parts})
        over = replace(self.axis, size=n, inside=1 if self.axis.nodes > 1 else n)
        return over.seconds("all-reduce", self._tie_bytes(w))

    @property
    def waits(self) -> float:
        """Seconds that the slowest stage waits for the others' work."""
        works = [self.work(s) for s in range(self.stages)]
        return step_seconds(self.way.schedule, works, self.microbatches, self.way.chunks) - max(works)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.work(s) for s in range(self.stages)) + self.waits + self.messages + self.ties

    def memory(self, stage: int) -> dict[str, float]:
        """Bytes of a device of a stage, by kind."""
        out: dict[str, float] = {}
        for i in self.parts_of(stage):
            for kinds in (kinds_of(self.answers[i], self.pricer), self.shared[i]):
                for k, v in kinds.items():
                    out[k] = out.get(k, 0.0) + v
        own = [self.transients[i] for i in self.parts_of(stage)]
        out["temporaries"] = max(t["temporaries"] for t in own)
        out["inputs"] = sum(t["inputs"] for t in own)
        return out

    @property
    def fullest(self) -> int:
        return max(range(self.stages), key=lambda s: sum(self.memory(s).values()))

    @property
    def slowest(self) -> int:
        return max(range(self.stages), key=self.work)

    def merged(self) -> Answer:
        """All parts as one answer, for what is said of every node."""
        return Answer(
            [p for a in self.answers for p in a.segments], self.seconds, max(a.nbytes for a in self.answers),
            min(self.bound, self.seconds), max(a.price for a in self.answers), max(a.least for a in self.answers),
            False, self.took,
        )  # fmt: skip

    # ---------------------------------------------------------------- the plan file

    def sections(self, entries: Entries) -> dict[str, Any]:
        """The sections of the file; marks what stands in ``entries`` with the part that it belongs to."""
        part_of = self._mark(entries)
        self._sends(entries)
        slow, full = self.slowest, self.fullest
        memory = self.memory(full)
        forward, backward, again = (sum(self._work(i)[j] for i in self.parts_of(slow)) for j in range(3))
        mine = [c for c in entries.collectives if self.stage(c["part"]) == slow]
        parts = []
        for i, answer in enumerate(self.answers):
            own = [n for n in entries.nodes if n["part"] == i]
            parts.append(
                {
                    "stage": self.stage(i),
                    "first": own[0]["name"],
                    "last": own[-1]["name"],
                    "seconds": answer.seconds,
                    "forward": self._work(i)[0] / self.microbatches,
                    "backward": sum(self._work(i)[1:]) / self.microbatches,
                }
            )
        sends = [
            {"from": i, "tensor": part_of[i], "layout": layout_text(t, s, self.pricer), "shape": list(t.type.shape),
             "bytes": nbytes if self.crosses(i) else 0, "seconds": seconds if self.crosses(i) else 0.0}
            for i, (t, s, nbytes, seconds) in enumerate(self.handed())
        ]  # fmt: skip
        return {
            "tensors": entries.tensors,
            "nodes": entries.nodes,
            "collectives": entries.collectives,
            "memory": {**memory, "total": sum(memory.values())},
            "time": {
                "forward": forward,
                "backward": backward,
                "again": again,
                "bubble": self.waits,
                "communication": sum(c["seconds"] * c["times"] for c in mine),
                "exposed": max(0.0, self.seconds - self.waits - forward - backward - again),
                "step": self.seconds,
            },
            "pipeline": {
                "axis": self.axis.name,
                "schedule": self.way.schedule,
                "chunks": self.way.chunks,
                "bubble": self.waits / max(self.work(s) for s in range(self.stages)),
                "parts": parts,
                "stages": [self._stage(s) for s in range(self.stages)],
                "sends": sends,
                "tied": [{"tensor": p.name, "parts": list(own)} for p, own, _ in self.tied],
                "tried": [{"what": what, "seconds": s} for what, s in self.tried],
            },
        }

    def _stage(self, stage: int) -> dict[str, Any]:
        kinds = self.memory(stage)
        return {
            "seconds": self.work(stage),
            "in_flight": held(self.way.schedule, self.stages, self.microbatches, stage, self.way.chunks),
            "memory": {**kinds, "total": sum(kinds.values())},
        }

    def _work(self, part: int) -> tuple[float, float, float]:
        """Seconds of work of a part in a step: forward, backward, again."""
        k, train = self.microbatches, self.pricer.setting.train
        picked = self.answers[part].segments
        again = 0.0
        for p in picked if train else ():
            again += sum(p.choices[u].forward for u in kept_of(p.segment.units, p.segment.before, p.mode).again)
        choices = [c for p in picked for c in p.choices.values()]
        return k * sum(c.forward for c in choices), k * sum(c.backward for c in choices), k * again

    def _mark(self, entries: Entries) -> list[str]:
        """Give nodes, collectives and tensors their part; the names of what parts end in."""
        at, ends = 0, []
        for i, answer in enumerate(self.answers):
            n = sum(len(p.choices) for p in answer.segments)
            for node in entries.nodes[at : at + n]:
                node["part"] = i
            at += n
            ends.append(entries.nodes[at - 1]["name"])
        part = {n["name"]: n["part"] for n in entries.nodes}
        for c in entries.collectives:
            c["part"] = part[c["node"]]
        tied = {p.name: own for p, own, _ in self.tied}
        for name, first in entries.first_reader.items():
            entries.tensors[name]["parts"] = list(tied.get(name, (part[first],)))
        return ends

    def _sends(self, entries: Entries) -> None:
        names = {n["part"]: n["name"] for n in entries.nodes}  # the last of each part
        for i, (_, _, nbytes, seconds) in enumerate(self.handed()):
            if not self.crosses(i):
                continue
            for phase, part in (("forward", i), ("backward", i + 1))[: 2 if self.pricer.setting.train else 1]:
                to = self.stage(i + 1 if phase == "forward" else i)
                what = "its result" if phase == "forward" else "its operand's gradient"
                entries.collectives.append(
                    {
                        "kind": "send", "axis": self.axis.name, "bytes": nbytes, "times": self.microbatches,
                        "seconds": seconds, "phase": phase, "tensor": names[i], "node": names[part], "part": part,
                        "why": f"stage {self.stage(part)} hands {what} to stage {to}",
                    }
                )  # fmt: skip
        for param, parts, w in self.tied:
            stages = sorted({self.stage(i) for i in parts})
            size = self._tie_bytes(w)
            for stage in stages:
                part = next(i for i in parts if self.stage(i) == stage)
                entries.collectives.append(
                    {
                        "kind": "all-reduce", "axis": self.axis.name, "phase": "gradients", "times": 1,
                        "bytes": bytes_sent("all-reduce", size, len(stages)),
                        "seconds": self._tie_seconds(parts, w), "tensor": param.name, "node": names[part], "part": part,
                        "why": f"stages {', '.join(map(str, stages))} keep a copy; its gradient is their sum",
                    }
                )  # fmt: skip


# ---------------------------------------------------------------- the search


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
        self._spans: dict[float, list[Spans]] = {}

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

    def spans(self, in_flight: float) -> list[Spans]:
        if in_flight not in self._spans:
            self._spans[in_flight] = spans_of(Search(self.kinds, self.order, self.pricer.in_flight(in_flight)))
        return self._spans[in_flight]

    def in_flight(self, way: Way, part: int) -> float:
        return held(way.schedule, self.p, self.m, stage_of(way.schedule, part, self.p), way.chunks)

    def candidates(self, progress: Progress) -> list[Candidate]:
        """The schedules under which something fits, the one with the least bound first."""
        found = []
        for way in self.ways:
            progress(f"cutting {self.p} stages, {way}, {self.m} microbatches")
            spans = [self.spans(self.in_flight(way, i)) for i in range(self.p * way.chunks)]
            pins = [[own[k] for own in spans] for k in range(len(spans[0]))]
            bound = min(self._bound(way, own) for own in pins)
            if bound < inf:
                found.append(Candidate(way, pins, bound))
        return sorted(found, key=lambda c: c.bound)

    def _cost(self, way: Way, spans: Sequence[Spans], spared: float) -> Array:
        # a stage that holds several parts gives each its share of the memory
        return np.stack([s.bound((self.limit - spared) / way.chunks - self.extra) for s in spans])

    def _bound(self, way: Way, spans: Sequence[Spans]) -> float:
        """Seconds that no cut beats: for one part a stage by the best cut, else by the mean of the stages."""
        weight = fill(way.schedule, way.chunks) / self.m
        sends = self._least_messages(way)
        if way.chunks == 1:
            best = cut(self._cost(way, spans, 0.0), weight)
            return inf if best is None else best.value + sends
        loosest = min(spans, key=lambda s: s.least[0, -1])
        mean = float(loosest.bound(self.p * self.limit)[0, -1]) / self.p
        fits = cut(self._cost(way, spans, 0.0)) is not None
        return mean * (1 + weight * (self.p - 1)) + sends if fits else inf

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
            starts = best.starts
            if way.chunks > 1:
                own = candidate.spans[next(i for i, c in enumerate(cuts) if c is best)]
                starts = self._even(way, starts, self._cost(way, own, spared))
            found = self._parts(way, starts, progress)
            if isinstance(found, Staged):
                found.bound = candidate.bound
                return found
            spared += max(found, 0.005 * self.limit)
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
            limit = self.limit / way.chunks - sum(more.values())
            answer, transient = _within(search, pricer, limit, progress)
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


def _within(search: Search, pricer: Pricer, limit: float, progress: Progress | None) -> tuple[Answer, dict[str, float]]:
    """The answer under the cap less what is transient in it."""
    spared = 0.0
    for _ in range(_TRIES):
        answer = search.answer(limit - spared, progress)
        transient = transient_bytes(answer, pricer)
        if not answer.fits or answer.nbytes + sum(transient.values()) <= limit:
            break
        spared = max(1.05 * spared, sum(transient.values()))
    return answer, transient


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
    least = {w: min(float(x.least[0, n]) for x in s.spans(s.in_flight(w, 0))) for w in s.ways}
    way, need = min(least.items(), key=lambda x: x[1])
    return (
        f"no cut into {s.p} stages fits {s.limit / 2**30:.4g} GiB a device: the whole model holds at least "
        f"{need / 2**30:.4g} GiB on the devices of all stages ({way}), {need / 2**30 / s.p:.4g} GiB a stage if it were "
        "cut evenly, and more where it is not. What helps: more stages, more devices on other axes, more microbatches, "
        "a smaller optimizer"
    )


assert set(_AUTO) < set(SCHEDULES)
