"""What is put in place of a loop, given its step: no loop where the step is known, else torch's ``scan``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..compat import SCAN_CUTS_CARRY, FakeTensor, make_fx
from ..decomp import decompositions
from ..fx_words import value_of
from .affine import NotAffine, affine_plan
from .linear_match import LinearAttention
from .step import Step
from .written import Written

__all__ = ["emit", "emit_known", "is_known", "own_results", "scan_takes"]

_MOST_REGIONS = 4096


def emit(root: fx.GraphModule, step: Step) -> tuple[list[fx.Node], list[fx.Node]]:
    """Write the loop at the host graph's insertion point: the last carries, and the results of all steps."""
    try:
        return emit_known(root.graph, step)
    except NotAffine:
        return _as_scan(root, step)


def emit_known(graph: fx.Graph, step: Step) -> tuple[list[fx.Node], list[fx.Node]]:
    """``emit`` for a step that needs no loop.

    Raises:
        NotAffine: it does; the graph is as it was.
    """
    return _writer(step)(graph)


def is_known(step: Step) -> bool:
    """Whether a step is linear attention or a linear recurrence, which ``emit`` writes without a loop."""
    try:
        _writer(step)
    except NotAffine:
        return False
    return True


def _writer(step: Step) -> Callable[[fx.Graph], tuple[list[fx.Node], list[fx.Node]]]:
    try:
        return LinearAttention(step).write
    except NotAffine:
        plan = affine_plan(step)
        return lambda graph: Written(graph, step, plan).write()


def _as_scan(root: fx.GraphModule, step: Step) -> tuple[list[fx.Node], list[fx.Node]]:
    """The loop as torch's higher-order operator."""
    graph, count = root.graph, len(step.outputs())
    step = _with_sizes(graph, step)
    own_results(step.gm)
    name = next(n for i in range(_MOST_REGIONS) if not hasattr(root, n := f"tessel_step_{i}"))
    root.add_submodule(name, step.gm)
    region = graph.get_attr(name)
    init = tuple(graph.call_method("contiguous", (v,)) for v in step.init)
    if SCAN_CUTS_CARRY:
        init = _needing_gradients(graph, init, (*step.xs, *step.extras), step.init)
    got = graph.call_function(torch.ops.higher_order.scan, (region, init, step.xs, step.extras))
    parts = [graph.call_function(operator.getitem, (got, i)) for i in range(count)]
    return parts[: len(init)], parts[len(init) :]


def scan_takes(graph: fx.Graph, step: Step, slices: Sequence[torch.Tensor]) -> bool:
    """Whether torch's ``scan`` takes a step with sizes that are symbols, with gradients.

    Its own tracing is what knows, so it is tried on fake tensors, with the decompositions that AOTAutograd will have:
    without them a gradient that expands to a size that is a symbol is more than the tracing can do.

    Args:
        graph: the host graph; nothing is added to it.
        slices: for each of the step's ``xs`` what one step takes of it.
    """
    step = _with_sizes(graph, step)
    starts, extras = ([value_of(n) for n in nodes] for nodes in (step.init, step.extras))
    mode = next((x.fake_mode for x in (*starts, *slices) if isinstance(x, FakeTensor)), None)
    if mode is None:
        return False
    own_results(step.gm)

    def like(x: Any, *more: int) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        made = torch.empty((*more, *x.shape), dtype=x.dtype, device=x.device)
        return made.requires_grad_(x.requires_grad)

    def loop(*given: Any) -> Any:
        n, m = len(starts), len(starts) + len(slices)
        return torch.ops.higher_order.scan(step.gm, given[:n], given[n:m], given[m:])

    try:
        with mode, torch.set_grad_enabled(True):
            given = [*map(like, starts), *(like(x, step.length) for x in slices), *map(like, extras)]
            make_fx(loop, decomposition_table=decompositions())(*given)
    except Exception:  # whatever tracing stumbles over: the loop is then left as it is
        return False
    return True


def _with_sizes(graph: fx.Graph, step: Step) -> Step:
    """The step with the symbols of its sizes as extras.

    What the gradient of a step needs to know of sizes is then the same at every step; torch's ``scan`` would keep it
    step by step, and only tensors can be kept so.
    """
    given = [value_of(n) for n in step.placeholders()]
    had = {x.node.expr for x in given if isinstance(x, torch.SymInt)}
    shapes: list[Any] = [n for x in given if isinstance(x, torch.Tensor) for n in x.shape]
    wanted = {s for n in shapes if isinstance(n, torch.SymInt) for s in n.node.expr.free_symbols} - had
    inputs = [n for n in graph.nodes if n.op == "placeholder" and isinstance(value_of(n), torch.SymInt)]
    sizes = [n for n in inputs if value_of(n).node.expr in wanted]
    if not sizes:
        return step
    first = next(n for n in step.gm.graph.nodes if n.op != "placeholder")
    with step.gm.graph.inserting_before(first):
        for i, node in enumerate(sizes):
            step.gm.graph.placeholder(f"size{i}").meta["example_value"] = value_of(node)
    step.gm.recompile()
    return replace(step, extras=(*step.extras, *sizes))


def own_results(gm: fx.GraphModule) -> None:
    """Make the results of a step share no memory with one another, with what it is given or with what its gradient
    keeps: torch's ``scan`` wants that."""
    (out,) = (n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(out):
        kept: dict[str, Any] = {"memory_format": torch.contiguous_format}
        copies = [gm.graph.call_method("clone", (v,), kept) for v in out.args[0]]  # type: ignore[union-attr]
    out.args = (tuple(copies),)
    gm.recompile()


def _needing_gradients(
    graph: fx.Graph, values: tuple[fx.Node, ...], others: Sequence[Any], like: Sequence[Any]
) -> tuple[fx.Node, ...]:
    """The same values, which need gradients if any of the others does: the sum of none of its elements is added."""
    zeros = [
        graph.call_method("sum", (graph.call_function(operator.getitem, (x, slice(0, 0))),))
        for x in others
        if isinstance(value_of(x), torch.Tensor) and value_of(x).is_floating_point() and value_of(x).dim()
    ]
    floats = [isinstance(value_of(x), torch.Tensor) and value_of(x).is_floating_point() for x in like]
    for zero in zeros:
        values = tuple(
            graph.call_function(operator.add, (v, graph.call_method("type_as", (zero, v)))) if f else v
            for v, f in zip(values, floats, strict=True)
        )
    return values
