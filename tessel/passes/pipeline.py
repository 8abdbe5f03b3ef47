"""The passes and their order.

A pass takes a graph (and the options) and gives a graph. To add one, write its file and put a
line in ``PASSES``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..config import Options
from ..errors import TesselError
from ..ir.node import Graph
from ..ir.text import print_graph
from ..ir.verify import verify
from ..ops import OPS
from . import (
    canonicalize,
    decode,
    decompose,
    gradients,
    inplace,
    layouts,
    masks,
    quantize,
    recurrences,
    running,
    small_products,
    writes,
)

Pass: TypeAlias = "Callable[[Graph, Options], Graph]"


@dataclass(frozen=True)
class Step:
    """What one pass did: its wall-clock seconds, nodes before and after, and the graph's text if kept."""

    name: str
    seconds: float
    before: int
    after: int
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.name:<16}{self.seconds * 1e3:9.2f} ms {self.before:6} -> {self.after} nodes"


@dataclass
class Trace:
    """A record of a pipeline run.

    Attributes:
        keep_text: keep each pass's graph as text, and the first as ``text``.
        check: verify the graph before the first pass and after each.
        steps: one a pass, in order.
    """

    keep_text: bool = False
    check: bool = False
    steps: list[Step] = field(default_factory=list)
    text: str | None = None


def _fuse(graph: Graph, options: Options) -> Graph:
    from .fuse import run

    return run(graph, options)


PASSES: tuple[tuple[str, Pass], ...] = (
    ("canonicalize", lambda graph, options: canonicalize.run(graph)),
    ("decompose", lambda graph, options: decompose.run(graph)),
    ("packed", lambda graph, options: quantize.run(graph, native=True)),
    ("unpack", lambda graph, options: quantize.run(graph, native=False)),
    ("masks", lambda graph, options: masks.run(graph)),
    ("decode", lambda graph, options: decode.run(graph, options)),
    ("gradients", lambda graph, options: gradients.run(graph, options)),
    ("recurrences", lambda graph, options: recurrences.run(graph)),
    ("running", lambda graph, options: running.run(graph)),
    ("small_products", lambda graph, options: small_products.run(graph)),
    ("narrow_products", lambda graph, options: small_products.run(graph, windows=False)),
    # opening composites leaves identities and doubles behind
    ("canonicalize", lambda graph, options: canonicalize.run(graph)),
    ("layouts", lambda graph, options: layouts.run(graph)),
    ("inplace", lambda graph, options: inplace.run(graph)),
    ("fuse", _fuse),
    ("writes", lambda graph, options: writes.run(graph)),
)

# What a graph goes through before it is laid out on a mesh: composites opened, so that every axis may be split.
BEFORE_SHARD: tuple[tuple[str, Pass], ...] = PASSES[:2] + PASSES[:1]

# Passes whose results only the C++ templates, or only the Triton ones, have kernels for.
CPU_ONLY = frozenset({"packed", "small_products", "layouts", "writes"})
GPU_ONLY = frozenset({"unpack", "decode", "gradients", "narrow_products"})


def run_pipeline(
    graph: Graph,
    options: Options | None = None,
    trace: Trace | None = None,
    passes: Sequence[tuple[str, Pass]] = PASSES,
) -> Graph:
    """The graph after all passes.

    Args:
        trace: is filled with a step a pass, and says whether to verify in between.
        passes: pairs of a name and a pass, in order.

    Raises:
        TesselError: ``trace.check`` is on and a pass broke the graph; the message names the pass.
    """
    options = Options() if options is None else options
    trace = Trace() if trace is None else trace
    if trace.keep_text:
        trace.text = print_graph(graph)
    if trace.check:
        verify(graph, OPS)
    for name, run in passes:
        before = len(graph.nodes)
        start = time.perf_counter()
        graph = run(graph, options)
        seconds = time.perf_counter() - start
        text = print_graph(graph) if trace.keep_text else None
        trace.steps.append(Step(name, seconds, before, len(graph.nodes), text))
        if trace.check:
            try:
                verify(graph, OPS)
            except TesselError as e:
                raise TesselError(f"the pass {name} broke the graph: {e}") from e
    return graph
