"""What can be chosen for a unit, and what the names of mesh axes ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..ir.sharding import Sharding
from .comm import R, State, Step
from .units import Param, Place, Unit

__all__ = ["NO_PINS", "Choice", "Pins", "Role", "Setting", "Split", "Weight", "agrees", "matches", "may_lie", "role_of"]


@dataclass(frozen=True)
class Pins:
    """What the user asked of single tensors, by name.

    Attributes:
        kept, used: parameters, as they are kept and as they are used; an open dimension may be split further.
        inputs: of the model.
        results: of units, by ``Tensor.name``: for each mesh axis the part that it splits, None for a copy on each of
            its devices; an axis that is not named may do as it likes.
        said: the annotations in words, for messages.
    """

    kept: Mapping[str, Sharding] = field(default_factory=dict)
    used: Mapping[str, Sharding] = field(default_factory=dict)
    inputs: Mapping[str, Sharding] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Place | None]] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)

    def apart(self, name: str) -> int | None:
        """The dimension of a parameter that is split where it is kept and not where it is used."""
        kept, used = self.kept.get(name), self.used.get(name)
        if kept is None or used is None:
            return None
        return next((d for d, (a, b) in enumerate(zip(kept.dims, used.dims, strict=True)) if a != b), None)

    def of_unit(self, unit: Unit) -> list[str]:
        """The annotations, in words, of what a unit reads and makes."""
        names = [u.source.name if isinstance(u.source, Param) else u.name for u in unit.uses]
        return [self.said[n] for n in dict.fromkeys([*names, *(t.name for t in unit.results)]) if n in self.said]


NO_PINS = Pins()


def agrees(asked: Sharding, got: Sharding) -> bool:
    """Whether a layout is what was asked for: closed dimensions as they are, open ones as far as they were said.

    >>> agrees(Sharding.parse("{dp?,·}"), Sharding.parse("{dp.tp,·}"))
    True
    >>> agrees(Sharding.parse("{·}"), Sharding.parse("{tp}"))
    False
    """
    pairs = zip(asked.dims, got.dims, strict=True)
    return all(g[: len(a)] == a if d in asked.open else g == a for d, (a, g) in enumerate(pairs))


def may_lie(parts: Iterable[tuple[int, int]]) -> bool:
    """Whether a sharding can say it that parts ``(elements outside, pieces)`` of one dimension are split.

    An inner part is only split where all outside it is split to the end.

    >>> may_lie([(1, 2), (2, 4)]), may_lie([(1, 2), (4, 4)]), may_lie([(8, 2)])
    (True, False, False)
    """
    outside = 1
    for major, pieces in sorted(parts):
        if major > 1 and outside != major:
            return False
        outside *= pieces
    return True


@dataclass(frozen=True)
class Setting:
    """What is planned: training or not, and how a step is cut.

    Attributes:
        microbatches: how often forward and backward run in a step; the graph's batch is one of them.
        remat: which modes of ``memory.MODES`` a block may have; ``auto`` all.
        in_flight: how many microbatches' activations are held at once, on a pipeline's stage.
        levels: which levels a parameter may have that can be kept apart; others have none.
        roles: whether an axis's name says what it may split, see ``Role``.
        pinned: pairs (name of parameters, ``*`` for any part of it; the sharding that they must be kept in).
        pins: what the user asked of tensors.
        runs: only what ``passes/partition.py`` can lay out: no layouts that a sharding cannot say.
        capacity: times the even share of tokens that a device may send to another one's experts; None never sends them.
        merged: collectives of small parameters share calls.
        overlap: those of parameters go on while a device works; else it waits for each.
    """

    train: bool = False
    optimizer: str = "adamw"
    microbatches: int = 1
    remat: str = "auto"
    in_flight: float = 1.0
    levels: tuple[int, ...] = (0, 1, 2, 3)
    roles: bool = True
    pinned: tuple[tuple[str, Sharding], ...] = ()
    pins: Pins = NO_PINS
    runs: bool = False
    capacity: float | None = None
    merged: bool = True
    overlap: bool = True


@dataclass(frozen=True)
class Role:
    """What an axis's name asks for.

    Attributes:
        only: the only part of the model that it splits; any if empty. A sequence axis splits heads too, in attention.
        never: a part that it does not split.
        gathers: whether parameters may be kept apart along it and gathered for use.
        attention: what becomes of sequences that it splits where they meet: keys go round a ``ring``, or it changes to
            ``heads`` (Ulysses); the cheaper if empty.
    """

    only: str = ""
    never: str = ""
    gathers: bool = True
    attention: str = ""

    def allows(self, unit: Unit, part: str) -> bool:
        """Whether the axis may split a factor of ``unit`` that is ``part`` of the model: batch, sequence or neither."""
        if part and part == self.never:
            return False
        return not self.only or part == self.only or (self.only == "sequence" and unit.op == "attention" and not part)


_ROLES = {
    **dict.fromkeys(("dp", "ddp", "data", "fsdp", "hsdp", "zero", "replica"), Role(only="batch")),
    **dict.fromkeys(("tp", "tensor", "mp"), Role(never="batch", gathers=False)),
    **dict.fromkeys(("sp", "cp", "seq", "sequence", "context"), Role(only="sequence")),
    "ring": Role(only="sequence", attention="ring"),
    "ulysses": Role(only="sequence", attention="heads"),
}


def role_of(axis: str) -> Role:
    """The role of an axis by its name, digits at the end aside; other names may split anything.

    >>> role_of("dp").only, role_of("tp2").gathers, role_of("x")
    ('batch', False, Role(only='', never='', gathers=True, attention=''))
    """
    return _ROLES.get(axis.rstrip("0123456789_"), Role())


_HOW = {"ring": "t", "sent": "e", "states": "states"}


@dataclass(frozen=True)
class Split:
    """What one axis does to a unit: splits ``factor`` in parts that lie ``major`` elements inside it.

    ``both`` is another factor that it splits as well, while what belongs together travels: ``s`` of attention and
    ``t``, its keys (a ring), ``t`` of experts and ``e`` (tokens are sent to the devices of their experts). ``states``
    is no factor: of ``t``, the tokens of linear attention, what each share makes is gathered.
    """

    factor: str
    major: int = 1
    both: str = ""

    def __str__(self) -> str:
        how = next((f"({word})" for word, both in _HOW.items() if both == self.both), "")
        return self.factor + (f"/{self.major}" if self.major > 1 else "") + how

    @classmethod
    def parse(cls, text: str) -> Split | None:
        """What ``str`` gave; None for anything else.

        >>> Split.parse("m/8"), str(Split.parse("s(ring)"))
        (Split(factor='m', major=8, both=''), 's(ring)')
        """
        match = re.fullmatch(r"([^\W\d_]\w*)(?:/(\d{1,18}))?(?:\((ring|sent|states)\))?", text)
        if match is None:
            return None
        return cls(match[1], int(match[2] or 1), _HOW.get(match[3] or "", ""))

    @property
    def factors(self) -> tuple[Split, ...]:
        """The splits of one factor each."""
        return (Split(self.factor, self.major), *((Split(self.both),) if self.both in ("t", "e") else ()))


@dataclass(frozen=True)
class Weight:
    """How a parameter lies: per axis an atom that splits it, or R or V and then a level.

    ``seconds`` of communication in the forward and the backward that work does not hide; ``nbytes`` all that it holds
    on one device; ``steps`` the collectives of one step.
    """

    param: Param
    state: State
    levels: tuple[int, ...]
    exposed: float
    seconds: float
    nbytes: float
    steps: tuple[Step, ...]

    @property
    def storage(self) -> tuple[tuple[int, int], ...]:
        """What every user of a shared parameter must agree on."""
        return tuple((c, 0) if c >= 0 else (R, level) for c, level in zip(self.state, self.levels))


@dataclass(frozen=True)
class Choice:
    """One way to run a unit.

    Attributes:
        splits: for each mesh axis.
        needs: the layout of each operand that is a tensor; None for others.
        outs: the layout of each result.
        forward, backward: seconds of work for one microbatch.
        inner: collectives of its own for one microbatch, and ``inner_seconds`` what of them is exposed.
        weights: its parameters.
    """

    splits: tuple[Split | None, ...]
    needs: tuple[State | None, ...]
    outs: tuple[State, ...]
    forward: float
    backward: float
    inner: tuple[Step, ...] = ()
    inner_seconds: float = 0.0
    weights: tuple[Weight, ...] = ()

    def seconds(self, microbatches: int) -> float:
        """Of a step, all microbatches."""
        per = self.forward + self.backward + self.inner_seconds
        return microbatches * per + sum(w.exposed for w in self.weights)

    @property
    def nbytes(self) -> float:
        return sum(w.nbytes for w in self.weights)


def matches(pattern: str, name: str) -> bool:
    """Whether a name, or its end, is what a pattern with ``*`` says.

    >>> matches("layers.*.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight")
    True
    """
    inner = re.escape(pattern).replace(r"\*", "[^.]+")
    return re.search(rf"(^|\.){inner}$", name) is not None
