"""A loop over time whose step is one kernel becomes one kernel that goes through all steps.

    kernel = loop_kernel(step, given, made, node)       # family "scan": carries stay in registers

The step's loads of slices and its stores of results get time as their first coordinate. A carry that is read only
where its next value is written needs no memory between two steps: every program has its own places of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import TesselError
from ..ir.node import Node
from ..ir.types import TensorType
from .index import var
from .kernel import Access, Axis, Carry, Kernel, Load, Next, Param, Stmt, Store

__all__ = ["loop_kernel"]


def loop_kernel(step: Kernel, given: Sequence[int], made: Sequence[Sequence[int]], node: Node) -> Kernel:
    """The kernel of a whole loop.

    Args:
        step: the tile program of one step, pointwise or a reduction.
        given: for each operand of the step's kernel, which input of the step it is.
        made: for each result of the step's kernel, which outputs of the step it is.
        node: the ``loop`` node.

    Returns:
        A kernel of the carries, slices and extras that it reads; results are all of the node's.

    Raises:
        TesselError: the loop has to go step by step; the message says why.
    """
    init, xs, extras = node.args
    carried, slices = len(init), range(len(init), len(init) + len(xs))
    length = xs[0].type.shape[0]
    if step.family not in ("pointwise", "reduction"):
        raise TesselError(f"its step is a kernel of the family {step.family}")
    if step.symbols() or not isinstance(length, int) or length == 0:
        raise TesselError("its sizes are known at run time only, or it has no steps")
    written = {i for outs in made for i in outs}
    if written != set(range(len(node.types))):
        raise TesselError("a carry or a result of its step is not computed in it")
    operands = [*init, *xs, *extras]
    ins = [p for p in step.params if not p.out]
    params = [Param(p.name, operands[given[p.slot]].type, False, given[p.slot]) for p in ins]
    results = [TensorType(v.shape, v.dtype) for v in node.outs]
    params += [Param(f"out{i}", t, True, i) for i, t in enumerate(results)]
    first_out = len(ins)
    time = var("s", length)
    stored: dict[int, Access] = {}  # carry -> where its next value is written
    for s in step.body:
        if isinstance(s, Store):
            for i in made[step.params[s.access.param].slot]:
                stored[i] = dataclasses.replace(s.access, param=first_out + i)
    body: list[Stmt] = []
    loads = [s for s in step.body if isinstance(s, Load)]
    read = {given[step.params[s.access.param].slot]: s.out for s in loads}
    if not set(range(carried)) <= read.keys():
        raise TesselError("its step does not read one of its carries")
    for s in step.body:
        if isinstance(s, Load):
            source = given[step.params[s.access.param].slot]
            if source < carried:
                if s.access.mask or s.access.coords != stored[source].coords:
                    raise TesselError("its step reads a carry at other places than it writes")
                body.append(Carry(s.out, s.access, s.dtype))
                continue
            coords = (time, *s.access.coords) if source in slices else s.access.coords
            body.append(dataclasses.replace(s, access=dataclasses.replace(s.access, coords=coords)))
        elif isinstance(s, Store):
            for i in made[step.params[s.access.param].slot]:
                access = stored[i]
                if i >= carried:
                    body.append(Store(dataclasses.replace(access, coords=(time, *access.coords)), s.arg, s.dtype))
                else:
                    body.append(Next(read[i], s.arg, access, s.dtype))
        else:
            body.append(s)
    axes = (*step.axes, Axis("s", length, "s"))
    notes = (f"{node.loc.short}: all steps of a loop", *step.notes)
    return Kernel(f"loop_{step.name}", "scan", tuple(params), axes, tuple(body), notes=notes)
