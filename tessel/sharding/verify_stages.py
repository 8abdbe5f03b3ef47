"""Proofs of a model in pipeline stages: of each part's programs, and that parts hand on what the next ones take.

That the parts one after the other are the model is not proved here: AOTAutograd made them from pieces of one graph.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..passes.partition import Program
from .parts import CutModel, Laid
from .verify import verify_program
from .verify_report import Report

__all__ = ["faults_between", "handed_inputs", "verify_stages"]


def verify_stages(cut: CutModel, *, seconds: float = 120.0) -> list[tuple[str, Report]]:
    """What was proved of every program of every part, by name, and of what is handed from part to part.

    Args:
        cut: of ``cut_model``.
        seconds: what remains then is not proved.
    """
    until = time.monotonic() + seconds
    named = [(f"part {i}, {p.graph.name}", p) for i, laid in enumerate(cut.laid) for p in laid.spmd.programs()]
    found = []
    for k, (name, program) in enumerate(named):
        left = max(0.0, until - time.monotonic()) / (len(named) - k)
        found.append((name, verify_program(program, seconds=left)))
    between = Report(
        faults=[f for i in range(1, len(cut.laid)) for f in faults_between(i, cut.laid[i - 1], cut.laid[i])]
    )
    return [*found, ("from part to part", between)]


def faults_between(i: int, before: Laid, after: Laid) -> Iterator[str]:
    """Where what part ``i`` takes lies otherwise than the part before leaves it, or its gradient so on the way back."""
    a, b = before.spmd, after.spmd
    gives = [(v, s) for v, s in zip(a.forward.graph.outputs, a.forward.outputs, strict=True)][: a.step.results]
    at = handed_inputs(after)
    for (v, lies), n in zip(gives, at, strict=False):
        node, taken = b.forward.graph.inputs[n], b.forward.inputs[n]
        if tuple(v.shape) != tuple(node.out.shape) or lies != taken:  # type: ignore[union-attr]
            yield f"part {i} takes {node.out.type} as {taken}, part {i - 1} leaves {v.type} as {lies}"  # type: ignore[union-attr]
    if len(gives) != len(at):
        yield f"part {i} takes {len(at)} values, part {i - 1} leaves {len(gives)}"
    if a.backward is None or b.backward is None:
        return
    made = _without_constants(b.forward)
    tangents = a.backward.inputs[len(a.forward.outputs) - a.step.results :]
    for k, lies in zip(a.step.differentiable, tangents, strict=False):
        left = b.backward.outputs[made.index(at[k])]
        if left != lies:
            yield f"part {i - 1} takes the gradient of its result {k} as {lies}, part {i} leaves it as {left}"


def handed_inputs(laid: Laid) -> list[int]:
    """The inputs of a part's forward that the part before hands on, in the order in which it does."""
    places = sorted((at, n) for n, at in laid.spmd.step.positions.items())
    return [n for _, n in places[len(places) - len(laid.handed) :]] if laid.handed else []


def _without_constants(program: Program) -> list[int]:
    """The inputs of a forward of which the backward gives gradients."""
    return [i for i, n in enumerate(program.graph.inputs) if n.attrs["role"] != "constant"]
