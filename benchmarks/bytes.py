"""Kernels and bytes moved: every operator alone, Tessel, torch.compile; all counted by one rule.

    python benchmarks/bytes.py            # prints the table

The rule: for every kernel and library call, its distinct inputs and its outputs. Several views of one tensor
count as the parts read, at most the tensor; an expanded dim counts once; a table that is read through indices
counts whole. What nothing reads outside its kernel is not written. Views, and results that are written in place
by the kernels that make them (torch.compile's concatenations), cost nothing.

torch.compile's figures come from the nodes of Inductor's scheduler after fusion: its own counters leave out the
library calls. Tessel's come from ``tessel.tiles.cost`` on the graph after the fuse pass, at the options that it
uses on a GPU (matrix products and attention by the vendor's library) and with its own templates for both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch._functorch.config
from common import MODELS, Done, Size, build, captured, stopped_by_done, table

from tessel.config import Options
from tessel.ir.node import Graph
from tessel.passes.pipeline import run_pipeline
from tessel.tiles.cost import base_values, bytes_moved, node_bytes, touches_memory

NAMES = ("Llama", "BERT", "ViT", "GPT-2")


@dataclass(frozen=True)
class Count:
    """Generated kernels, library calls and the bytes that they read and write."""

    kernels: int
    calls: int
    bytes: int
    items: tuple[tuple[str, int], ...] = ()  # each kernel and call with its bytes, in order


# ---------------------------------------------------------------- Tessel


def count_graph(graph: Graph, hints: Mapping[str, int] | None = None) -> Count:
    """A Tessel graph: kernel nodes are kernels, other nodes that touch memory are calls."""
    roots = base_values(graph)
    items, kernels = [], 0
    for node in graph.nodes:
        if not touches_memory(node):
            continue
        kernels += node.op.kind == "kernel"
        name = str(node.attrs["name"]) if node.op.kind == "kernel" else str(node.attrs.get("target", node.op.name))
        items.append((name, node_bytes(node, roots, hints)))
    return Count(kernels, len(items) - kernels, bytes_moved(graph, hints), tuple(items))


def count_tessel(model: Callable[..., Any], kwargs: Mapping[str, Any], *args: Any) -> dict[str, Count]:
    """``unfused``, ``tessel`` (library products and attention) and ``templates``."""
    imported = captured(model, *args, **kwargs)
    alone = count_graph(imported.graph, imported.hints)
    out = {"unfused": Count(alone.kernels + alone.calls, 0, alone.bytes, alone.items)}
    for name, how in (("tessel", "library"), ("templates", "template")):
        options = Options(matmul=how, attention=how)  # type: ignore[arg-type]
        out[name] = count_graph(run_pipeline(imported.graph, options), imported.hints)
    return out


# ---------------------------------------------------------------- torch.compile


def count_inductor(model: Callable[..., Any], kwargs: Mapping[str, Any], *args: Any) -> Count:
    """What torch.compile makes of a model, counted in Inductor's scheduler; no code is generated or run."""
    from torch._inductor.scheduler import Scheduler

    counts: list[Count] = []

    def codegen(self: Any) -> None:
        counts.append(count_nodes(self.nodes))
        raise Done("counted")

    old, Scheduler.codegen = Scheduler.codegen, codegen
    torch._dynamo.reset()
    try:
        caches_off = torch._functorch.config.patch(enable_autograd_cache=False)
        with caches_off, torch._inductor.config.patch(fx_graph_cache=False), torch.no_grad():
            torch.compile(model, dynamic=False, fullgraph=True)(*args, **kwargs)
    except Exception as e:
        if not stopped_by_done(e):
            raise
    finally:
        Scheduler.codegen = old
        torch._dynamo.reset()
    if len(counts) != 1:
        raise RuntimeError(f"expected one graph from torch.compile, got {len(counts)}")
    return counts[0]


def count_nodes(nodes: Iterable[Any]) -> Count:
    """Nodes of Inductor's scheduler after fusion."""
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    items, calls = [], 0
    for node in nodes:
        if isinstance(node, NopKernelSchedulerNode):
            continue
        if isinstance(node, ExternKernelSchedulerNode):
            if isinstance(node.node, ir.MultiOutput):
                continue  # one result of a call that is counted already
            calls += 1
            items.append((_call_name(node.node), _reads_of_call(node.node) + _written(node)))
        else:
            items.append((node.get_name(), _reads_of_kernel(node) + _written(node)))
    return Count(len(items) - calls, calls, sum(n for _, n in items), tuple(items))


def _call_name(node: Any) -> str:
    return str(getattr(node, "op_overload", None) or getattr(node, "python_kernel_name", None) or type(node).__name__)


def _buffer(name: str) -> Any:
    from torch._inductor.virtualized import V

    graph = V.graph
    for held in (graph.name_to_buffer, graph.graph_inputs):
        if name in held:
            return held[name]
    return None


def _whole(name: str) -> int:
    """Bytes of a buffer, an input or a constant of the graph."""
    from torch._inductor.virtualized import V

    if name in V.graph.constants:
        return V.graph.constants[name].nbytes
    found = _buffer(name)
    return 0 if found is None else _size(found)


def _size(x: Any) -> int:
    """Bytes of the distinct elements of a tensor of Inductor's IR."""
    from torch._inductor import ir

    if isinstance(getattr(x, "layout", None), ir.NoneLayout | ir.MultiOutputLayout):
        return 0
    shape = [int(n) for n in x.get_size()]
    try:
        strides = [int(s) for s in x.get_stride()]
    except (AttributeError, NotImplementedError):
        strides = [1] * len(shape)
    total = x.get_dtype().itemsize
    for n, s in zip(shape, strides):
        total *= n if s != 0 else 1
    return total


def _reads_of_kernel(node: Any) -> int:
    """Each buffer from outside: the elements its accesses name, at most the buffer."""
    from torch._inductor.dependencies import MemoryDep, WeakDep
    from torch._inductor.virtualized import V

    own = {b.get_name() for b in node.get_outputs()}
    read: dict[str, int] = {}
    for dep in node.read_writes.reads:
        if dep.name in own or isinstance(dep, WeakDep):
            continue
        whole = _whole(dep.name)
        seen = int(dep.get_numel()) * V.graph.get_dtype(dep.name).itemsize if isinstance(dep, MemoryDep) else whole
        read[dep.name] = min(whole, read.get(dep.name, 0) + seen)
    return sum(read.values())


def _reads_of_call(node: Any) -> int:
    read: dict[str, int] = {}
    stack = list(node.inputs)
    while stack:
        x = stack.pop()
        if isinstance(x, list | tuple):
            stack.extend(x)
        elif hasattr(x, "get_size"):
            name = x.get_name()
            read[name] = min(_whole(name), read.get(name, 0) + _size(x))
    return sum(read.values())


def _written(node: Any) -> int:
    """Results that something outside the kernel reads; of a call with several, each that anything reads."""
    from torch._inductor import ir

    inside = set(node.get_nodes())
    total = 0
    for buf in node.get_outputs():
        layout = buf.node.layout
        if isinstance(layout, ir.MultiOutputLayout):
            users = [u.node for u in buf.users if isinstance(getattr(u.node, "node", None), ir.MultiOutput)]
            total += sum(map(_written, users))
        elif isinstance(layout, ir.NoneLayout):
            total += sum(map(_whole, buf.get_mutations()))
        elif any(u.node not in inside for u in buf.users if not u.is_weak):
            total += _size(buf.node)
    return total


# ---------------------------------------------------------------- the table


def measure(size: Size, names: Iterable[str] = NAMES) -> dict[str, dict[str, Count]]:
    out = {}
    for name in names:
        model, kwargs = build(name, size)
        out[name] = {**count_tessel(model, kwargs), "torch.compile": count_inductor(model, kwargs)}
    return out


_COLUMNS = {
    "unfused": "unfused",
    "torch.compile": "torch.compile",
    "tessel": "Tessel",
    "templates": "Tessel, templates",
}


def as_table(results: Mapping[str, Mapping[str, Count]]) -> str:

    def cell(c: Count) -> str:
        what = f"{c.kernels} + {c.calls}" if c.calls else f"{c.kernels}"
        return f"{what} · {c.bytes / 2**20:.2f} MiB"

    rows = [[name, *(cell(counts[c]) for c in _COLUMNS)] for name, counts in results.items()]
    return table(["kernels + calls · bytes", *_COLUMNS.values()], rows)


def to_dict(results: Mapping[str, Mapping[str, Count]], size: Size) -> dict[str, Any]:
    counts = {
        name: {k: {"kernels": c.kernels, "calls": c.calls, "bytes": c.bytes} for k, c in by.items()}
        for name, by in results.items()
    }
    return {"size": asdict(size), "counts": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=NAMES, help=", ".join(MODELS))
    parser.add_argument("--items", action="store_true", help="also each kernel and call")
    given = parser.parse_args()
    results = measure(Size(), given.models)
    print(as_table(results))
    if given.items:
        for name, by in results.items():
            for how, count in by.items():
                print(f"\n{name}, {how}:")
                print("\n".join(f"  {n:>10}  {what}" for what, n in count.items))


if __name__ == "__main__":
    main()
