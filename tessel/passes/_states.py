"""Linear attention whose tokens are split: ranks exchange the states that their tokens make, whatever the length.

    rank i    the state of its own tokens, from zeros      all ranks gather these, and by how much each decays
              what lies before its tokens: those of the ranks before, decayed       and with it the results

(LASP-2, Sun et al. 2025, arXiv 2502.07563). The backward does the same with the states' gradients, from the end.
With a delta rule a state is no sum of parts; such attention is not split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..ir.node import Builder, Node, Value
from ..ops import OPS
from ._factors import Axes

STATES = frozenset({"linear_attention", "linear_attention_backward"})


def adds_up(node: Node) -> bool:
    """Whether states of parts of the tokens add up to those of all."""
    beta = node.args[4 if node.op.name == "linear_attention" else 6 :][:1]
    return node.op.name in STATES and not any(isinstance(b, Value) for b in beta)


@dataclass
class States:
    """One rank's part: place ``index`` among ``parts``."""

    b: Builder
    axes: Axes
    parts: int
    index: int

    def forward(self, q: Value, k: Value, v: Value, decay: Value | None = None, beta: None = None,
                start: Value | None = None) -> tuple[Value, ...]:  # fmt: skip
        """o of this rank's tokens, and the state after the last token of all."""
        b = self.b
        out, own = b.node(OPS["linear_attention"], q, k, v, decay).outs
        parts, factors = self.gathered(own), self.factors(decay)
        before = self.folded(start, parts, factors, range(self.index))
        total = self.folded(before, parts, factors, range(self.index, self.parts))
        assert total is not None
        if before is None:
            return out, total
        if decay is not None:
            return b.node(OPS["linear_attention"], q, k, v, decay, None, before).outs[0], total
        more = b.add(OPS["matmul"], self.cast(q, before), before)
        return self.cast(b.add(OPS["add"], self.cast(out, before), more), out), total

    def backward(self, grad: Value, last: Value | None, q: Value, k: Value, v: Value, decay: Value | None = None,
                 beta: None = None, start: Value | None = None) -> tuple[Value, ...]:  # fmt: skip
        """Gradients of this rank's tokens, and of the first state."""
        b = self.b
        own = b.node(OPS["linear_attention"], q, k, v, decay).outs[1]
        factors = self.factors(decay)
        before = self.folded(start, self.gathered(own), factors, range(self.index))
        zeros = b.add(OPS["full"], shape=own.shape, value=0.0, dtype=own.dtype)
        if decay is None:
            turned = b.add(OPS["permute"], self.cast(q, own), dims=(0, 1, 3, 2))
            reaches = b.add(OPS["matmul"], turned, self.cast(grad, own))
        else:
            reaches = b.node(OPS["linear_attention_backward"], grad, None, q, k, v, decay, None, zeros).outs[5]
        parts = self.gathered(reaches)
        late = self.folded(last, parts, factors, range(self.parts - 1, self.index, -1))
        first = self.folded(late, parts, factors, range(self.index, -1, -1))
        begun = zeros if before is None else before
        *found, _ = b.node(OPS["linear_attention_backward"], grad, late, q, k, v, decay, None, begun).outs
        none = b.add(OPS["full"], shape=(0,), value=0.0, dtype=own.dtype)
        assert first is not None
        return *found, none if start is None else first

    def gathered(self, x: Value) -> list[Value]:
        """What every rank has, in order."""
        b = self.b
        one = b.add(OPS["reshape"], x, shape=(1, *x.shape))
        all_ = b.add(OPS["all_gather"], one, axes=self.axes, parts=self.parts, dim=0)
        rows = (b.add(OPS["slice"], all_, dim=0, start=j, size=1, step=1) for j in range(self.parts))
        return [b.add(OPS["reshape"], row, shape=x.shape) for row in rows]

    def factors(self, decay: Value | None) -> list[Value] | None:
        """By how much the tokens of each rank let a state decay, to be multiplied with it."""
        if decay is None:
            return None
        whole = self.b.add(OPS["prod"], decay, dims=(2,), keepdim=False)
        wide = (*whole.shape, *(1,) * (4 - whole.type.rank))
        return [self.b.add(OPS["reshape"], x, shape=wide) for x in self.gathered(whole)]

    def folded(
        self, state: Value | None, parts: list[Value], factors: list[Value] | None, places: Iterable[int]
    ) -> Value | None:
        """A state (None: zeros) after the tokens of these places."""
        for j in places:
            if state is None:
                state = parts[j]
                continue
            decayed = state if factors is None else self.b.add(OPS["mul"], state, factors[j])
            state = self.b.add(OPS["add"], decayed, parts[j])
        return state

    def cast(self, x: Value, like: Value) -> Value:
        return x if x.dtype == like.dtype else self.b.add(OPS["cast"], x, dtype=like.dtype)


def write_states(b: Builder, axes: Axes, parts: int, index: int, name: str, args: Iterable[Any]) -> tuple[Value, ...]:
    """This rank's results of a linear attention, or of its backward."""
    run = States(b, axes, parts, index)
    return run.forward(*args) if name == "linear_attention" else run.backward(*args)


__all__ = ["STATES", "adds_up", "write_states"]
