"""The ways to keep a parameter on a mesh, whole or apart, and what each costs beside the work that uses it.

The levels are those of ``memory.py``: ZeRO and FSDP are choices of them. A parameter's communication hides behind the
work that uses it (the gather of the next one runs during this one, the reduction of the last gradient during this
gradient): what is longer than that work is exposed. So it is where programs begin calls early
(``passes/collectives.py``); else all of it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from ..ir.sharding import Sharding
from .comm import MeshAxis, R, State, Step, V, bytes_sent
from .memory import param_bytes
from .shard_choice import Choice, Setting, Weight, agrees, matches, role_of
from .units import Param, Unit, numel

__all__ = ["Weights", "shard_dim", "weight_sharding"]

# Parameters below this travel with others: no latency of their own. (DDP's first bucket is 1 MiB, FSDP's whole blocks.)
_BUCKET = 4 * 2**20


@dataclass(frozen=True)
class Weights:
    """How the parameters of units may be kept."""

    axes: tuple[MeshAxis, ...]
    setting: Setting

    def ways(self, unit: Unit, param: Param, state: State, choice: Choice) -> Iterator[Weight]:
        """Every way to keep a parameter that a choice reads in ``state``.

        Args:
            unit: who reads it; the first of its readers pays for what is done once.
            choice: how the unit runs; its seconds hide what is sent.
        """
        train, k = self.setting.train, self.setting.microbatches
        itemsize = param.type.dtype.itemsize
        elements = numel(param.type) / prod(a.size for a, c in zip(self.axes, state) if c >= 0)
        first = param.users[0] is unit
        levels = [level for level in self.setting.levels if train or level in (0, 3)]
        if k == 1:
            levels = [level for level in levels if level != 1] or [2]  # level 2 holds less and sends the same
        asked = self.setting.pins.apart(param.name) is not None  # the user may want what saves no communication apart
        copies = (c == V or (asked and c == R) for c in state)
        may = [copy and a.size > 1 and self._gathers(a) for a, copy in zip(self.axes, copies)]
        if 0 not in levels and not (levels and self._can_shard(param, state, [levels[0] if m else 0 for m in may])):
            levels = [0]
        for picked in product(*(levels if m else [0] for m in may)):
            if any(picked) and not self._can_shard(param, state, picked):
                continue
            stored = weight_sharding(param, state, picked, self.axes, 3)
            if any(matches(n, param.name) and stored != wanted for n, wanted in self.setting.pinned):
                continue
            pins = self.setting.pins
            used = weight_sharding(param, state, picked, self.axes, 4)
            if not agrees(pins.kept.get(param.name, stored), stored):
                continue
            if not agrees(pins.used.get(param.name, used), used):
                continue
            kinds = [(level, a.size) for level, a, c in zip(picked, self.axes, state) if c < 0]
            held = param_bytes(elements, itemsize, kinds, self.setting.optimizer if train else None)
            steps = list(self._steps(elements * itemsize, state, picked, first))
            small = self.setting.merged and elements * itemsize < _BUCKET
            ahead = sum(self._seconds(s, small) for s in steps if not s.backward)
            back = sum(self._seconds(s, small) for s in steps if s.backward)
            beside = (k * choice.forward, k * choice.backward) if self.setting.overlap else (0.0, 0.0)
            exposed = max(0.0, ahead - beside[0]) + max(0.0, back - beside[1])
            yield Weight(param, state, picked, exposed, ahead + back, held.total if first else 0.0, tuple(steps))

    def _gathers(self, axis: MeshAxis) -> bool:
        return not self.setting.roles or role_of(axis.name).gathers

    def _seconds(self, step: Step, small: bool) -> float:
        """Seconds of a step of a parameter, all microbatches in ``size`` of ``step.sent``; without latency if small."""
        axis = next(a for a in self.axes if a.name == step.axis)
        return step.seconds - (axis.seconds(step.kind, 0.0) if small else 0.0)

    def _can_shard(self, param: Param, state: State, levels: Sequence[int]) -> bool:
        """Whether some dimension divides by all that keeps a share apart."""
        return shard_dim(param, state, levels, self.axes) is not None

    def _steps(self, nbytes: float, state: State, levels: Sequence[int], first: bool) -> Iterator[Step]:
        """The collectives of a parameter in one step, each repeated as often as it runs."""
        k = self.setting.microbatches
        copies = [(a, level) for a, c, level in zip(self.axes, state, levels) if c == V and a.size > 1]

        def step(kind: str, axis: MeshAxis, size: float, back: bool, times: int) -> Iterator[Step]:
            for _ in range(times):
                yield Step(kind, axis.name, size, bytes_sent(kind, size, axis.size), axis.seconds(kind, size), back)

        full = [(a, level) for a, c, level in zip(self.axes, state, levels) if c < 0 and a.size > 1 and level == 3]
        for i, (axis, _) in enumerate(full):
            size = nbytes / prod(a.size for a, _ in full[:i])
            yield from step("all-gather", axis, size, False, k)
            if self.setting.train:
                yield from step("all-gather", axis, size, True, k)
        if not self.setting.train or not first:
            return
        size = nbytes
        for axis, level in sorted(((a, lv) for a, lv in copies if lv > 0), key=lambda x: (x[0].nodes, -x[1])):
            yield from step("reduce-scatter", axis, size, True, 1 if level == 1 else k)
            size /= axis.size
        for axis, level in copies:
            if level == 0:
                yield from step("all-reduce", axis, size, True, 1)
        states = [(a, level) for a, level in copies if level in (1, 2)]
        for i, (axis, _) in enumerate(states):
            yield from step("all-gather", axis, nbytes / prod(a.size for a, _ in states[:i]), False, 1)


def shard_dim(param: Param, state: State, levels: Sequence[int], axes: Sequence[MeshAxis]) -> int | None:
    """The dimension that levels 1 to 3 split: the user's, or the first that still divides by all of them."""
    parts = prod(a.size for a, level in zip(axes, levels) if level > 0)
    for d, n in enumerate(param.type.shape):
        if param.apart not in (None, d):
            continue
        taken = prod(a.size for a, c in zip(axes, state) if c == d)
        if n // taken % parts == 0:  # type: ignore[operator]
            return d
    return None


def weight_sharding(
    param: Param, state: State, levels: Sequence[int], axes: Sequence[MeshAxis], least: int
) -> Sharding:
    """How what is kept apart from level ``least`` on lies: 3 the parameter, 2 its gradient, 1 its optimizer state."""
    dims: list[list[str]] = [[] for _ in param.type.shape]
    for axis, code in zip(axes, state):
        if code >= 0:
            dims[code].append(axis.name)
    more = [a.name for a, level in zip(axes, levels) if level >= least and level > 0]
    if more:
        d = shard_dim(param, state, levels, axes)
        assert d is not None
        dims[d] += more
    return Sharding(tuple(map(tuple, dims)))
