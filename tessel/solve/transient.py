"""What a device holds for a moment: recomputed activations, gradients on their way, gathered parameters, inputs.

The search counts what adds up over the whole model. What is transient is the most that any stretch of it needs at a
time, read off the answer.
"""

from __future__ import annotations

from math import prod

from .memory import kept_of
from .shard_price import Pricer
from .shard_search import Answer
from .shard_tables import Picked
from .units import Tensor, Unit, numel

__all__ = ["transient_bytes"]

_CHUNK = 2 * 4 * 2**22  # the cross-entropy's logits, held a chunk at a time: two of 2²² elements of 4 bytes


def transient_bytes(answer: Answer, pricer: Pricer) -> dict[str, float]:
    """Bytes on one device: ``temporaries``, the most at a time, and ``inputs`` with all masks and positions."""
    most = 0.0
    inputs: dict[str, float] = {}
    seen: set[object] = set()
    for picked in answer.segments:
        key = (picked.segment, picked.mode, tuple(id(c) for c in picked.choices.values()))
        if key in seen:
            continue
        seen.add(key)
        most = max(most, _segment(picked, pricer))
        for unit, choice in picked.choices.items():
            for use, shape in zip(unit.uses, unit.dims.operands, strict=True):
                if use.source is None:
                    own = {f.name for term in shape for f in term}
                    parts = prod(a.size for a, s in zip(pricer.axes, choice.splits) if s and s.factor in own)
                    inputs[use.name] = max(inputs.get(use.name, 0.0), int(use.type.nbytes) / parts)
    return {"temporaries": most, "inputs": sum(inputs.values())}


def _segment(picked: Picked, pricer: Pricer) -> float:
    """The most that one segment needs for a moment."""
    local = {t: pricer.layouts(t).local_bytes(s) for u, c in picked.choices.items() for t, s in zip(u.results, c.outs)}
    largest = max(local.values(), default=0.0)
    before = picked.segment.before
    if not pricer.setting.train:
        held = []
        for unit in picked.choices:
            operands = (local.get(use.source, 0.0) for use in unit.uses if isinstance(use.source, Tensor))
            held.append(sum(operands) + sum(local[t] for t in unit.results))
        entry = pricer.layouts(before).local_bytes(picked.entry) if before and picked.entry else 0.0
        return max(held, default=0.0) + entry
    again = 0.0
    if picked.mode != "none":
        units = picked.segment.units
        more = kept_of(units, before, "none").saved - kept_of(units, before, picked.mode).saved
        again = sum(local.get(t, 0.0) for t in more)
    gathered, grads = [0.0], [0.0]
    for choice in picked.choices.values():
        for w in choice.weights:
            split = prod(a.size for a, c in zip(pricer.axes, w.state) if c >= 0)
            nbytes = numel(w.param.type) * w.param.type.dtype.itemsize / split
            gathered.append(nbytes if 3 in w.levels else 0.0)
            grads.append(nbytes if max(w.levels, default=0) >= 2 else 0.0)
    ahead = sum(sorted(gathered)[-2:])  # one in use, the next on its way
    chunk = max((_logits(u) for u in picked.choices if u.op == "linear_cross_entropy"), default=0.0)
    return again + 2 * largest + ahead + max(grads) + chunk


def _logits(unit: Unit) -> float:
    """Bytes of logits and their gradients that a fused cross-entropy holds at a time."""
    return min(_CHUNK, 8.0 * unit.sizes["n"] * unit.sizes["v"])
