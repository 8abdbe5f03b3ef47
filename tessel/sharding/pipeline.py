"""A plan with a mesh axis ``pp``: the model cut into stages, each laid out over the other axes.

What is asked of stages, and an answer (``Staged``) with its figures. A step takes what the slowest stage works, what
the others work before it begins and after it ends, and the messages on that way. ``pipeline_search.py`` finds the
answer, ``pipeline_sections.py`` writes it into the plan file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from ..errors import TesselError, check
from ..solve.comm import MeshAxis, State
from ..solve.memory import kept_of
from ..solve.pipeline import SCHEDULES, bubble, stage_of, step_seconds
from ..solve.shard_choice import Weight
from ..solve.shard_price import Pricer
from ..solve.shard_search import Answer
from ..solve.shortage import kinds_of
from ..solve.units import Param, Tensor, Unit

__all__ = ["AXIS", "Staged", "Way", "gives_weights", "microbatch_choices", "schedules_for"]

AXIS = "pp"
# the zero-bubble schedules only on request: they hold more (gradients that wait), and cut a backward where it was fused
_AUTO = ("1f1b", "interleaved")
_CHUNKS = {"interleaved": 2, "zbv": 2}
_MOST_MICROBATCHES = 3  # numbers of microbatches that are compared


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
        """How many there are."""
        return self.axis.size

    def stage(self, part: int) -> int:
        """That of a part."""
        return stage_of(self.way.schedule, part, self.stages)

    def parts_of(self, stage: int) -> list[int]:
        """The parts that a stage holds."""
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
        return sum(self.tie_seconds(parts, w) for _, parts, w in self.tied)

    def tie_bytes(self, w: Weight) -> float:
        """Bytes of the gradient of a parameter that several stages keep, on one device."""
        parts = prod(a.size for a, c in zip(self.pricer.axes, w.state, strict=True) if c >= 0)
        apart = prod(a.size for a, n in zip(self.pricer.axes, w.levels, strict=True) if n >= 2)
        return float(w.param.type.nbytes) / (parts * apart)

    def tie_seconds(self, parts: Sequence[int], w: Weight) -> float:
        """Seconds of adding up a gradient over the stages that hold ``parts``."""
        n = len({self.stage(i) for i in parts})
        over = replace(self.axis, size=n, inside=1 if self.axis.nodes > 1 else n)
        return over.seconds("all-reduce", self.tie_bytes(w))

    @property
    def weights(self) -> float:
        """The part of the slowest stage's work that gives gradients of parameters: half of a product's backward."""
        made = 0.0
        for i in self.parts_of(self.slowest):
            for picked in self.answers[i].segments:
                made += sum(c.backward / 2 for u, c in picked.choices.items() if gives_weights(u))
        return self.microbatches * made / self.work(self.slowest)

    @property
    def waits(self) -> float:
        """Seconds that the slowest stage waits for the others' work."""
        works = [self.work(s) for s in range(self.stages)]
        whole = step_seconds(self.way.schedule, works, self.microbatches, self.way.chunks, self.weights)
        return whole - max(works)

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
        """The stage that holds the most."""
        return max(range(self.stages), key=lambda s: sum(self.memory(s).values()))

    @property
    def slowest(self) -> int:
        """The stage that works the longest."""
        return max(range(self.stages), key=self.work)

    def merged(self) -> Answer:
        """All parts as one answer, for what is said of every node."""
        return Answer(
            [p for a in self.answers for p in a.segments], self.seconds, max(a.nbytes for a in self.answers),
            min(self.bound, self.seconds), max(a.price for a in self.answers), max(a.least for a in self.answers),
            False, self.took,
        )  # fmt: skip

    def worked(self, part: int) -> tuple[float, float, float]:
        """Seconds of work of a part in a step: forward, backward, again."""
        k, train = self.microbatches, self.pricer.setting.train
        picked = self.answers[part].segments
        again = 0.0
        for p in picked if train else ():
            again += sum(p.choices[u].forward for u in kept_of(p.segment.units, p.segment.before, p.mode).again)
        choices = [c for p in picked for c in p.choices.values()]
        return k * sum(c.forward for c in choices), k * sum(c.backward for c in choices), k * again


def gives_weights(unit: Unit) -> bool:
    """Whether a unit is a product with a parameter, whose gradient is a product of its own."""
    return unit.op == "matmul" and any(isinstance(u.source, Param) for u in unit.uses)


assert set(_AUTO) < set(SCHEDULES)
