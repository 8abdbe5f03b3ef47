"""An answer of the search as the sections of a plan file: tensors, nodes, collectives, memory, time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..ir.sharding import Sharding
from ..ir.types import DTYPE_NAMES
from ..solve.comm import P, State, Step
from ..solve.memory import Kept, kept_of
from ..solve.shard_choice import Choice
from ..solve.shard_price import Pricer
from ..solve.shard_search import Answer, alternatives
from ..solve.shard_tables import Picked
from ..solve.shard_weights import weight_sharding
from ..solve.shortage import kinds_of
from ..solve.units import Param, Segment, Tensor, Unit

__all__ = ["Entries", "entries_of", "layout_text", "renamed", "split_axes"]

_MOST_INSTEAD = 12  # kinds of segments whose alternatives are priced


@dataclass
class Entries:
    """What a plan file says of an answer."""

    answer: Answer
    pricer: Pricer
    tensors: dict[str, Any] = field(default_factory=dict)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    again: float = 0.0
    first_reader: dict[str, str] = field(default_factory=dict)  # parameter -> node

    def sections(self, transient: Mapping[str, float]) -> dict[str, Any]:
        """The sections of the file that an answer decides."""
        k = self.pricer.setting.microbatches
        forward = k * sum(c.forward for p in self.answer.segments for c in p.choices.values())
        backward = k * sum(c.backward for p in self.answer.segments for c in p.choices.values())
        kinds = {**kinds_of(self.answer, self.pricer), **transient}
        return {
            "tensors": self.tensors,
            "nodes": self.nodes,
            "collectives": self.collectives,
            "memory": {**kinds, "total": sum(kinds.values())},
            "time": {
                "forward": forward,
                "backward": backward,
                "again": self.again,
                "communication": sum(c["seconds"] * c["times"] for c in self.collectives),
                "exposed": max(0.0, self.answer.seconds - forward - backward - self.again),
                "step": self.answer.seconds,
            },
        }


def split_axes(answer: Answer, pricer: Pricer, role: str) -> list[str]:
    """The axes that split the model's batch, or its sequence, somewhere."""
    found = set()
    for picked in answer.segments:
        for unit, choice in picked.choices.items():
            for axis, split in zip(pricer.axes, choice.splits):
                if split is not None and unit.roles.get((split.factor, split.major)) == role:
                    found.add(axis.name)
    return [a.name for a in pricer.axes if a.name in found]


def layout_text(tensor: Tensor, state: State, pricer: Pricer) -> str:
    """A layout as a sharding; an axis that splits an inner part of a dimension is named after it: ``tp/64``."""
    dims: list[list[tuple[int, str]]] = [[] for _ in tensor.type.shape]
    partial, inner = [], []
    for axis, code in zip(pricer.axes, state):
        if code >= 0:
            atom = tensor.atoms[code]
            dims[atom.dim].append((atom.major, axis.name))
            inner += [f"{axis.name}/{atom.major}"] if atom.major > 1 else []
        elif code == P:
            partial.append((axis.name, "sum"))
    ordered = tuple(tuple(a for _, a in sorted(d, key=lambda x: x[0])) for d in dims)
    return " ".join([str(Sharding(ordered, tuple(partial))), *inner])


def entries_of(answer: Answer, pricer: Pricer, chain: Sequence[Segment], shifts: Sequence[int], held: int) -> Entries:
    """The sections for an answer.

    Args:
        chain: the graph's own segments, which name what the answer's kinds of segments stand for.
        shifts: how many layers after its own each stands for; ``held`` layers were captured.
    """
    out = Entries(answer, pricer)
    count: Counter[str] = Counter()
    last = ""
    instead: dict[Any, dict[Unit, list[tuple[Choice, float]]]] = {}
    for picked, own, shift in zip(answer.segments, chain, shifts, strict=True):
        names: dict[Unit, str] = {}
        params: dict[Param, str] = {}
        if picked.segment.before is not None:
            names[picked.segment.before.unit] = last
        for unit, real in zip(picked.segment.units, own.units, strict=True):
            stem = f"{renamed(real.node.loc.module, held, shift)}:{unit.op}"
            count[stem] += 1
            names[unit] = stem if count[stem] == 1 else f"{stem}#{count[stem]}"
            for use, named in zip(unit.uses, real.uses, strict=True):
                if isinstance(use.source, Param) and isinstance(named.source, Param):
                    params[use.source] = renamed(named.source.name, held, shift)
        after = picked.segment.after
        if after is not None:
            last = names[after.unit]
        key = (picked.segment, picked.mode, tuple(str(c.splits) for c in picked.choices.values()))
        if key not in instead and len(instead) < _MOST_INSTEAD:
            instead[key] = alternatives(picked, pricer, answer.price)
        _Writer(out, picked, names, params).write(instead.pop(key, {}) if key in instead else {})
        instead.setdefault(key, {})  # equal segments: said once
    calls = {u.node: None for p in answer.segments for u, c in p.choices.items() if "target" in u.node.attrs
             if not any(c.splits)}  # fmt: skip
    whole = list(dict.fromkeys(f"{n.attrs['target']} at {n.loc.short}" for n in calls))
    if whole:
        out.notes.append(
            "kept whole on every device, since no dims string says how a custom operator may be split: "
            + ", ".join(whole[:8])
        )
    out.notes.append("products that read one tensor (query, key, value; gate, up) are priced as one wide product")
    return out


def renamed(path: str, held: int, shift: int) -> str:
    """A module or parameter of a captured layer, as that of one ``shift`` layers on.

    The layer is the first number of the path. A stretch that repeats may begin inside a layer, so it may hold two.

    >>> renamed("model.layers.1.mlp.up_proj", 2, 5), renamed("model.norm", 2, 5), renamed("layer.0.output", 2, 5)
    ('model.layers.6.mlp.up_proj', 'model.norm', 'layer.5.output')
    """
    parts = path.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdecimal()), None)
    if not shift or at is None or int(parts[at]) not in (held - 1, held - 2):
        return path
    return ".".join([*parts[:at], str(int(parts[at]) + shift), *parts[at + 1 :]])


class _Writer:
    """Writes one segment."""

    def __init__(self, out: Entries, picked: Picked, names: Mapping[Unit, str], params: Mapping[Param, str]) -> None:
        self.out, self.picked, self.names, self.params = out, picked, names, params
        setting = out.pricer.setting
        nothing = Kept(frozenset(), frozenset(), frozenset())
        segment = picked.segment
        self.kept = kept_of(segment.units, segment.before, picked.mode) if setting.train else nothing
        self.times = setting.microbatches

    def write(self, instead: Mapping[Unit, Sequence[tuple[Choice, float]]]) -> None:
        for unit, choice in self.picked.choices.items():
            self._node(unit)
            if unit in instead:
                self.out.nodes[-1]["instead"] = [
                    {"splits": self._splits(other), "seconds": cost} for other, cost in instead[unit]
                ]
            self._weights(unit)
            for step in choice.inner:
                why = (
                    "keys and values travel round the ring" if step.kind == "permute" else "partial results are merged"
                )
                self._add(step, "backward" if step.backward else "forward", self.times, self.names[unit], unit, why)
            if unit in self.kept.again:
                self.out.again += self.times * choice.forward
            for tensor, own in zip(unit.results, choice.outs):
                if tensor is self.picked.segment.after:
                    self._moves(tensor, own, self.picked.exit, None, False)
                    self._readers(tensor, self.picked.exit)
                elif tensor in self.picked.forms:
                    form = self.picked.forms[tensor]
                    self._moves(tensor, own, form.state, None, form.source or tensor in self.kept.redone)
                    self._readers(tensor, form.state)
                elif tensor.users:
                    user, i = tensor.users[0]
                    self._moves(tensor, own, self.picked.choices[user].needs[i], user, tensor in self.kept.redone)
        if self.picked.segment.before is not None:
            self._readers(self.picked.segment.before, self.picked.entry)

    def _node(self, unit: Unit) -> None:
        pricer, choice = self.out.pricer, self.picked.choices[unit]
        reads = [
            layout_text(use.source, need, pricer) if isinstance(use.source, Tensor) and need is not None else None
            for use, need in zip(unit.uses, choice.needs)
        ]
        self.out.nodes.append(
            {
                "name": self.names[unit],
                "op": unit.op,
                "where": unit.node.loc.short.partition(" in ")[0],
                "splits": self._splits(choice),
                "reads": reads,
                "makes": [layout_text(t, s, pricer) for t, s in zip(unit.results, choice.outs)],
                "keep": self.picked.mode,
                "seconds": self.times * (choice.forward + choice.backward),
            }
        )
        held = [self._held(t) for t in unit.results]
        if any(s is not None for s in held):
            texts = [None if s is None else layout_text(t, s, pricer) for t, s in zip(unit.results, held)]
            self.out.nodes[-1]["holds"] = texts

    def _held(self, tensor: Tensor) -> State | None:
        """The layout in which a result is held for its readers and the backward, where that was a choice."""
        if tensor is self.picked.segment.after:
            return self.picked.exit
        form = self.picked.forms.get(tensor)
        return None if form is None or form.source else form.state

    def _splits(self, choice: Choice) -> dict[str, str]:
        return {a.name: str(s) for a, s in zip(self.out.pricer.axes, choice.splits) if s is not None}

    def _weights(self, unit: Unit) -> None:
        axes = self.out.pricer.axes
        for w in self.picked.choices[unit].weights:
            name = self.params[w.param]
            if w.param.users[0] is unit:
                stored, state, use = (weight_sharding(w.param, w.state, w.levels, axes, n) for n in (3, 1, 4))
                entry: dict[str, Any] = {
                    "shape": list(w.param.type.shape),
                    "dtype": DTYPE_NAMES[w.param.type.dtype],
                    "sharding": str(stored),
                }
                entry |= {"use": str(use)} if use != stored else {}
                entry |= {"state": str(state)} if state != stored and self.out.pricer.setting.train else {}
                level = {a.name: n for a, n in zip(axes, w.levels) if n}
                self.out.tensors[name] = {**entry, **({"level": level} if level else {})}
                self.out.first_reader[name] = self.names[unit]
            for step, times in Counter(replace(s, backward=False) for s in w.steps).items():
                gather = step.kind == "all-gather"
                why = {
                    "all-gather": "kept apart along the axis, gathered for use",
                    "reduce-scatter": "its gradient is the sum over the axis, of which each device keeps its share",
                    "all-reduce": "its gradient is the sum over the axis, and every device keeps it",
                }[step.kind]
                self._add(step, "parameters" if gather else "gradients", times, name, unit, why)

    def _readers(self, tensor: Tensor, state: State | None) -> None:
        for user, i in tensor.users:
            if user in self.picked.choices:
                again = tensor in self.kept.saved or tensor in self.kept.redone
                self._moves(tensor, state, self.picked.choices[user].needs[i], user, again)

    def _moves(self, tensor: Tensor, a: State | None, b: State | None, reader: Unit | None, again: bool) -> None:
        if a == b or a is None or b is None:
            return
        pricer, layouts = self.out.pricer, self.out.pricer.layouts(tensor)
        who = f"{reader.op} reads" if reader is not None else "readers need"
        why = f"{tensor.unit.op} makes {layout_text(tensor, a, pricer)}, {who} {layout_text(tensor, b, pricer)}"
        name = self.names[tensor.unit]
        for step in layouts.steps(a, b):
            self._add(step, "backward" if step.backward else "forward", self.times, name, reader or tensor.unit, why)
            if again and not step.backward:
                self._add(step, "again", self.times, name, reader or tensor.unit, f"again for the backward: {why}")

    def _add(self, step: Step, phase: str, times: int, tensor: str, unit: Unit, why: str) -> None:
        self.out.collectives.append(
            {
                "kind": step.kind, "axis": step.axis, "bytes": step.sent, "times": times, "seconds": step.seconds,
                "phase": phase, "tensor": tensor, "node": self.names[unit], "why": why,
            }
        )  # fmt: skip
