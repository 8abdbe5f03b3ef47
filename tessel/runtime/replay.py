"""CUDA graphs: record one call of a host program, replay it afterwards.

Inputs are copied into memory of the recording (parameters stay where they are); results live in memory
that the next call overwrites. Only inference graphs of fixed sizes can be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import check
from ..ir.node import Graph

__all__ = ["Replayed", "check_replayable"]

_WARM_UP = 2  # calls that run as they are: Triton compiles, libraries choose their algorithms


def check_replayable(graph: Graph, device: str) -> None:
    """Refuse what cannot be recorded.

    Raises:
        TesselError: the graph is not on a CUDA device, or has symbolic sizes, host reads or random numbers.
    """
    advice = "compile without the option cuda_graphs"
    check(device.startswith("cuda"), lambda: f"cuda_graphs=True: the graph is on {device}, not on cuda; {advice}")
    symbols = sorted({s for n in (*graph.inputs, *graph.nodes) for s in n.symbols()})
    check(
        not symbols,
        lambda: (
            f"cuda_graphs=True: graph {graph.name} has the symbolic sizes {', '.join(symbols)}, and a recording "
            f"has fixed sizes; compile with dynamic=False, or {advice}"
        ),
    )
    for node in graph.nodes:
        check(
            node.op.kind != "effect" and not node.op.random,
            lambda n=node: f"cuda_graphs=True: {n.op.name} at {n.loc} cannot be recorded; {advice}",  # type: ignore[misc]
        )
    check(
        not graph.effects,
        lambda: f"cuda_graphs=True: graph {graph.name} writes to its inputs, which a recording copies; {advice}",
    )


class Replayed:
    """A host program that records itself after warm-up.

    Args:
        run: the host program.
        fixed: positions of inputs whose memory stays the same from call to call.
    """

    def __init__(self, run: Callable[[list[Any]], list[Any]], fixed: Iterable[int]) -> None:
        self.run = run
        self.fixed = frozenset(fixed)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.addresses: tuple[int, ...] = ()

    def __call__(self, args: list[Any]) -> list[Any]:
        where = tuple(args[i].data_ptr() for i in sorted(self.fixed))
        if self.graph is not None and where != self.addresses:
            self.graph = None  # a parameter has moved
        if self.graph is None:
            self.calls += 1
            if self.calls <= _WARM_UP:
                return self.run(args)
            self.record(args, where)
        for i, (held, new) in enumerate(zip(self.inputs, args, strict=True)):
            if i not in self.fixed and isinstance(held, torch.Tensor):
                held.copy_(new)
        args.clear()
        assert self.graph is not None
        self.graph.replay()
        return list(self.outputs)

    def record(self, args: list[Any], where: tuple[int, ...]) -> None:
        self.inputs = [
            a if i in self.fixed or not isinstance(a, torch.Tensor) else a.clone() for i, a in enumerate(args)
        ]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.outputs = self.run(list(self.inputs))
        self.graph, self.addresses = graph, where
