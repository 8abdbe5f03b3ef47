"""The host program made runnable: names bound, text executed, sizes of the call checked by torch itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..codegen.host import HostSource, render_host
from ..codegen.sizes import HELPERS
from ..codegen.steps import Called, Launch
from ..ir.nested import leaves
from ..ir.node import Graph, Node
from . import results
from .buffers import Buffers, plan_buffers
from .modules import execute, place
from .sequence import all_native, plan_places, sequences

__all__ = ["Program", "build", "fit", "reuse"]


def fit(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The tensor with the given strides: itself where it has them already, else a copy.

    Strides of dimensions of size 1 do not count, nor do those of a tensor without elements.
    """
    if x.stride() == strides or x.layout != torch.strided:
        return x
    if all(n <= 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True)) or x.numel() == 0:
        return x
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    if 0 in strides:  # repeated dimensions are written once
        once = [slice(0, 1) if s == 0 else slice(None) for s in strides]
        out[tuple(once)].copy_(x[tuple(once)])
    else:
        out.copy_(x)
    return out


def reuse(x: torch.Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The memory of a dead tensor as another one; it must be large enough."""
    if x.dtype != dtype:
        span = x.untyped_storage().nbytes() // x.dtype.itemsize
        x = x.as_strided((span,), (1,), 0).view(dtype)
    return x.as_strided(shape, strides, 0)


def tensors_in(got: Any) -> list[torch.Tensor]:
    """The tensors in a nest of results, left to right."""
    return list(leaves(got, torch.Tensor))


@dataclass(frozen=True)
class Program:
    """A graph ready to run: ``program(list of inputs) -> list of outputs``. The list is emptied.

    Attributes:
        source: the host text.
        path: the file it was written to.
        buffers: how memory is used.
        symbols: named things the text calls, for inspection.
    """

    source: HostSource
    path: Path
    buffers: Buffers
    run: Callable[[list[Any]], list[Any]]
    kernels: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, args: list[Any]) -> list[Any]:
        return self.run(args)


def build(
    graph: Graph,
    call: Callable[[Node], Called | Launch],
    launchers: Mapping[str, Any],
    directory: Path,
    *,
    constants: Mapping[str, torch.Tensor] | None = None,
    device: str = "cpu",
    hints: Mapping[str, int] | None = None,
    about: Sequence[str] = (),
    around: Callable[[], AbstractContextManager[Any]] | None = None,
    poison: bool = False,
    keep: int | None = None,
) -> Program:
    """Make a graph runnable.

    Args:
        graph: the final graph.
        call: what to run at a node, see ``render_host``.
        launchers: kernel name -> callable ``(grid, *args)``.
        directory: where the text is written.
        constants: tensors of the inputs of role ``constant``, by name.
        device: where results are allocated.
        hints: typical sizes.
        about: lines for the head of the text.
        around: a context that every call runs in.
        poison: fill memory with garbage before a kernel writes it (for tests).
        keep: results of at least so many bytes live in memory of earlier ones that the caller has dropped, and so do
            values that the C library would map anew, see ``results``. None: nothing is kept.

    Raises:
        TesselError: a size that no input tells, or an operator that cannot be run.
    """
    known: dict[Node, Called | Launch] = {}

    def once(node: Node) -> Called | Launch:
        if node not in known:
            known[node] = call(node)
        return known[node]

    def allocates(node: Node) -> bool:
        return node.op.name == "kernel" and isinstance(once(node), Launch)

    def owned(node: Node) -> bool:
        if node.op.kind == "view" or node.op.name in ("item", "assert_scalar"):
            return False
        what = once(node)
        return isinstance(what, Called) and what.owned

    def asked(node: Node) -> Called | Launch | None:
        return once(node) if node.op.kind == "kernel" else None

    places = plan_places(graph, asked) if all_native(launchers) and not poison else None
    if places is None:
        buffers = plan_buffers(graph, allocates, owned, hints, keep=None if poison else keep)
    else:
        buffers = plan_buffers(graph, allocates, owned, hints, places=places.at, block=places.bytes, runs=places.runs)
    source = render_host(graph, once, buffers, about)
    path = place(source.name, source.text, directory)
    empty = results.empty_on(torch.device(device))
    names = {
        "torch": torch,
        "fit": fit,
        "tensors_in": tensors_in,
        "empty": empty if keep is None else results.empty,
        "reuse": reuse,
        "result": results.result,
        "part": results.part,
        **HELPERS,
        **launchers,
        **sequences(source.runs, launchers),
        **source.names,
    }
    names.update(_constants(graph, constants or {}))
    if poison:
        names.update(empty=_poisoned(empty), reuse=_poisoned(reuse), again=_poisoned(lambda x: x))
    else:
        names["again"] = lambda x: x
    run = execute(source.text, path, names)[source.name]
    if around is not None:
        run = _inside(run, around)
    return Program(source, path, buffers, run, dict(launchers))


def _constants(graph: Graph, constants: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    held = [n for n in graph.inputs if n.attrs.get("role") == "constant"]
    return {f"k{i}": constants[n.attrs["name"]] for i, n in enumerate(held)}


def _inside(
    run: Callable[[list[Any]], list[Any]], around: Callable[[], AbstractContextManager[Any]]
) -> Callable[[list[Any]], list[Any]]:
    def wrapped(args: list[Any]) -> list[Any]:
        with around():
            return run(args)

    return wrapped


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Memory full of a value that shows: NaN, the largest integer, True."""

    def made(*args: Any) -> torch.Tensor:
        x = make(*args)
        with torch.no_grad():
            if x.dtype.is_floating_point or x.dtype.is_complex:
                x.fill_(float("nan"))
            else:
                x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)
        return x

    return made
