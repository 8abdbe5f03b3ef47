"""Activations that a plan does not keep: the backward computes them again from what is kept.

    forward  saves x (enters the block), a, b, c           forward  saves x
    backward reads a, b, c                      becomes    backward computes a, b, c from x, each where it is first read

What a block keeps in each mode is that of the search (``solve/memory.py``). Communication of what is computed again
is repeated. Random numbers are kept, so that both times have the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import check
from ..frontend.joint import Step
from ..ir.node import INPUT, Builder, Graph, Node, Value, make_input, map_values
from ..ir.types import TensorType
from ..solve.memory import kept_of
from ..solve.units import Unit, segments_of

__all__ = ["recomputed"]


def recomputed(step: Step, units: Sequence[Unit], modes: Sequence[str]) -> tuple[Step, dict[Node, Node]]:
    """The step with a backward that computes again what the units' modes do not keep.

    Args:
        step: from ``prepared_step``.
        units: of its forward graph, in order, and the mode of each.

    Returns:
        The step, and for each node that the backward runs again that of the forward.

    Raises:
        TesselError: units of one block have several modes.
    """
    if step.backward is None or set(modes) <= {"none"}:
        return step, {}
    mode = dict(zip(units, modes, strict=True))
    again: set[Node] = set()
    kept: set[Value] = set()
    for segment in segments_of(units):
        how = mode[segment.units[0]]
        same = all(mode[u] == how for u in segment.units)
        check(same, lambda n=segment.units[0].name: f"the block that begins at {n} is kept in several ways")  # type: ignore[misc]
        saved = set() if how == "none" else kept_of(segment.units, segment.before, how).saved
        if how != "none":
            again.update(u.node for u in segment.units if not u.node.op.random)
        for t in (*saved, *([segment.before] if segment.before is not None else [])):
            kept.add(_value_of(t.unit, t.unit.results.index(t)))
    return _Again(step, {u.node for u in units}, again, kept).step()


def _value_of(unit: Unit, result: int) -> Value:
    return [v for v in unit.node.outs if isinstance(v.type, TensorType)][result]


class _Again:
    def __init__(self, step: Step, units: set[Node], again: set[Node], kept: set[Value]) -> None:
        assert step.backward is not None
        self.old, self.units, self.again, self.kept = step, units, again, kept
        self.back: Graph = step.backward.graph
        self.saved = list(step.forward.graph.outputs[step.results :])
        self.lost: dict[Value, bool] = {}
        self.saves: dict[Value, Node] = {}  # what the new forward saves -> the backward's input
        self.new: dict[Value, Value] = {}  # a value of the old backward, or of the forward, in the new backward
        self.copies: dict[Node, Node] = {}
        self.b = Builder()

    def step(self) -> tuple[Step, dict[Node, Node]]:
        takes = [n for n in self.back.inputs if n.attrs["role"] != "constant"]
        given = dict(zip((n.out for n in takes), self.saved, strict=False))
        late = {v: source for v, source in given.items() if isinstance(source, Value) and self.is_lost(source)}
        for v, source in given.items():
            if v not in late and isinstance(source, Value):
                self.saves.setdefault(source, v.node)
                self.new[v] = self.saves[source].out
                self.new.setdefault(source, self.new[v])
        rest = [n for n in self.back.inputs if n.out not in given or not isinstance(given[n.out], Value)]
        self.new.update((n.out, n.out) for n in rest)
        numbers = [n for n in rest if n.out in given]

        def value(v: Value) -> Value:
            if v in late:
                return self.remade(late[v])
            return self.new[v]

        for node in self.back.nodes:
            args = map_values(node.args, value)
            self.b.loc = node.loc
            self.new.update(zip(node.outs, self.b.append(node.replace(args=args)).outs, strict=True))
        outputs = map_values(self.back.outputs, value)
        effects = tuple((n, value(v)) for n, v in self.back.effects)
        self.b.inputs = [*self.saves.values(), *numbers, *(n for n in rest if n not in numbers)]
        assert self.old.backward is not None
        forward = self.old.forward.graph
        plain = [given[n.out] for n in numbers]
        outs = (*forward.outputs[: self.old.results], *self.saves, *plain)
        step = replace(
            self.old,
            forward=replace(self.old.forward, graph=forward.replace(outputs=outs).live()),
            backward=replace(self.old.backward, graph=self.b.finish(outputs, effects, self.back.name)),
        )
        return step, self.copies

    def is_lost(self, v: Value) -> bool:
        """Whether a value of the forward is computed again: made in a block that does not keep it, or of nothing."""
        stack = [v]
        while stack:
            v = stack[-1]
            if v in self.lost:
                stack.pop()
                continue
            node = v.node
            if node.op is INPUT or v in self.kept or node.op.random or node.op.kind == "effect":
                self.lost[v] = False
            elif node in self.units:
                self.lost[v] = node in self.again
            else:  # a view, or what only the backward reads
                left = [o for o in node.operands if o not in self.lost]
                if left:
                    stack += left
                    continue
                self.lost[v] = not node.operands or any(self.lost[o] for o in node.operands)
        return self.lost[v]

    def remade(self, v: Value) -> Value:
        """A value of the forward in the backward: kept there, or computed again now."""
        stack = [v]
        while stack:
            v = stack[-1]
            if v in self.new:
                stack.pop()
                continue
            if not self.is_lost(v):
                t = v.type
                if isinstance(t, TensorType):
                    t = TensorType(t.shape, t.dtype, None, t.device)
                self.saves[v] = make_input(f"kept_{len(self.saves)}", t, "input", v.node.loc)
                self.new[v] = self.saves[v].out
                continue
            left = [o for o in v.node.operands if o not in self.new]
            if left:
                stack += left
                continue
            self.b.loc = v.node.loc
            node = self.b.append(v.node.replace(args=map_values(v.node.args, self.new.__getitem__)))
            self.copies[node] = v.node
            self.new.update(zip(v.node.outs, node.outs, strict=True))
        return self.new[v]
