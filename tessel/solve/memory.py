"""What training holds in memory: parameters with their gradients and optimizer state, and activations by liveness.

A parameter that is split in its use has its share on every device. Along the axes where every device uses the same
part, a level says what of it is kept apart (ZeRO's stages; level 3 is fully sharded data parallel):

    0  nothing; gradients meet in an all-reduce
    1  optimizer state: gradients meet in a reduce-scatter once a step, parameters in an all-gather
    2  and gradients: a reduce-scatter for every microbatch
    3  and parameters: gathered before forward and again before backward

Which activations live until the backward is read off the graph: what an operator's derivative needs (``saved_by``).
Values that fused pointwise kernels can compute again from what is kept anyway are not kept. A block can also

    none       keep what its derivatives need
    selective  keep results of products and attention only; pointwise work is done again
    full       keep its input; everything in it is done again, communication too
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..errors import TesselError, did_you_mean
from .units import Tensor, Unit

__all__ = [
    "MODES",
    "OPTIMIZERS",
    "Kept",
    "ParamBytes",
    "is_cheap",
    "kept_of",
    "optimizer_bytes",
    "param_bytes",
    "saved_by",
]

MODES = ("none", "selective", "full")
OPTIMIZERS = {"adamw": 2, "sgd-momentum": 1, "sgd": 0}
"""Optimizer -> moments of 4 bytes an element (ZeRO, arXiv 1910.02054, section 3.1); halves keep a master copy too."""


def optimizer_bytes(optimizer: str, itemsize: int) -> int:
    """Bytes of optimizer state an element of a parameter of ``itemsize`` bytes.

    >>> optimizer_bytes("adamw", 2), optimizer_bytes("adamw", 4), optimizer_bytes("sgd", 2)
    (12, 8, 4)

    Raises:
        TesselError: an unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise TesselError(f"unknown optimizer {optimizer!r}; {did_you_mean(optimizer, OPTIMIZERS)}")
    return 4 * OPTIMIZERS[optimizer] + (4 if itemsize < 4 else 0)


@dataclass(frozen=True)
class ParamBytes:
    """Bytes on one device."""

    params: float
    grads: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.params + self.grads + self.optimizer


def param_bytes(elements: float, itemsize: int, levels: Sequence[tuple[int, int]], optimizer: str | None) -> ParamBytes:
    """What ``elements`` of a parameter (the share in use) take, given ``(level, size)`` of every axis that has copies.

    ``optimizer`` None: no training.

    >>> b = param_bytes(7.5e9, 2, [(2, 64)], "adamw")  # ZeRO-2, 7.5 billion on 64 devices
    >>> b.params / 1e9, round(b.total / 1e9, 1)
    (15.0, 16.6)
    """

    def parts(level: int) -> int:
        return prod(size for own, size in levels if own >= level)

    params = itemsize * elements / parts(3)
    if optimizer is None:
        return ParamBytes(params, 0.0, 0.0)
    state = optimizer_bytes(optimizer, itemsize)
    return ParamBytes(params, itemsize * elements / parts(2), state * elements / parts(1))


# ---------------------------------------------------------------- activations

# What a derivative needs, by operator: "in" operands, "out" results, "" nothing. Other pointwise operators: operands.
_NEEDS = {
    **dict.fromkeys("add sub neg cast copy slice flip cat pad sum mean where clone floor ceil round sign".split(), ""),
    **dict.fromkeys("exp sigmoid tanh sqrt rsqrt reciprocal softmax log_softmax relu".split(), "out"),
    **dict.fromkeys("embedding gather index index_select iota full".split(), ""),
}
_MATERIAL = frozenset({"contract", "attention", "library", "scan"})  # kinds whose operands stand in memory
_CHEAP = frozenset({"pointwise", "composite", "view", "index"})  # kinds that a fused kernel computes again
_NOT_CHEAP = frozenset({"embedding", "cross_entropy"})
_SMALL = 16  # a reduction whose result is this much smaller than its operand is kept


def saved_by(unit: Unit) -> list[Tensor]:
    """The tensors that a unit's derivative reads."""
    need = _NEEDS.get(unit.op, "out" if unit.op in ("amax", "amin") else "in")
    found = [u.source for u in unit.uses if isinstance(u.source, Tensor)] if need == "in" else []
    if unit.op == "mul" and len(unit.uses) == 2:  # each operand only for the gradient of the other
        other = {0: 1, 1: 0}
        found = [
            u.source
            for i, u in enumerate(unit.uses)
            if isinstance(u.source, Tensor) and unit.uses[other[i]].source is not None
        ]
    if need == "out" or unit.node.op.kind == "attention":
        found += unit.results
    elif unit.op == "linear_cross_entropy":
        found.append(unit.results[1])  # the log-sum-exp of each row
    return list(dict.fromkeys(found))


def is_cheap(unit: Unit) -> bool:
    """Whether a fused kernel computes its results again at the price of reading its operands."""
    if unit.node.op.kind == "reduce" or unit.op == "mean":
        return False
    return unit.node.op.kind in _CHEAP and unit.op not in _NOT_CHEAP


@dataclass(frozen=True)
class Kept:
    """What a stretch of units keeps in one mode.

    Attributes:
        saved: tensors that live until the backward, its input among them where it is needed.
        redone: tensors whose way to their readers is gone again: communication is repeated in the backward.
        again: units that run a second time.
    """

    saved: frozenset[Tensor]
    redone: frozenset[Tensor]
    again: frozenset[Unit]


def kept_of(units: Sequence[Unit], before: Tensor | None, mode: str) -> Kept:
    """What is kept of a segment. ``before`` is the tensor that enters it, which is kept if anything needs it.

    Raises:
        TesselError: an unknown mode.
    """
    if mode not in MODES:
        raise TesselError(f"unknown way to keep activations {mode!r}; {did_you_mean(mode, MODES)}")
    own = {t for u in units for t in u.results}
    needed = {t for u in units for t in saved_by(u)} & (own | ({before} if before else set()))
    if mode == "full" and before is not None:
        return Kept(frozenset({before}), frozenset(own | {before}), frozenset(units))
    material = {
        u.source for unit in units if unit.node.op.kind in _MATERIAL for u in unit.uses if isinstance(u.source, Tensor)
    } & needed
    again: set[Unit] = set()
    stop = material if mode == "none" else set()
    saved = set(stop)
    for t in needed - stop:
        saved |= _sources(t, own, stop, again)
    charged = again if mode != "none" else set()  # what only pointwise derivatives need is recomputed inside them
    only_for_products = {u for u in charged if any(_feeds(t, material - saved, own) for t in u.results)}
    return Kept(frozenset(saved), frozenset(material - saved), frozenset(only_for_products))


def _sources(t: Tensor, own: set[Tensor], stop: set[Tensor], again: set[Unit]) -> set[Tensor]:
    """What has to be kept so that ``t`` can be computed by fused kernels."""
    found: set[Tensor] = set()
    stack, seen = [t], set()
    while stack:
        t = stack.pop()
        if t in seen:
            continue
        seen.add(t)
        inner = [u.source for u in t.unit.uses if isinstance(u.source, Tensor)]
        if t in stop or t not in own or not is_cheap(t.unit) or not inner:
            found.add(t)
        else:
            again.add(t.unit)
            stack += inner
    return found


def _feeds(t: Tensor, targets: set[Tensor], own: set[Tensor]) -> bool:
    """Whether ``t`` is one of the targets or flows into one through cheap units."""
    stack = [t]
    seen: set[Tensor] = set()
    while stack:
        t = stack.pop()
        if t in targets:
            return True
        if t not in seen:
            seen.add(t)
            stack += [r for u, _ in t.users if is_cheap(u) for r in u.results if r in own]
    return False
