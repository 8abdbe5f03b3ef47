"""From an imported graph to a callable: verify, passes, kernels, host program; all of it recorded.

compile_graph(imported, info, session) -> callable(list of inputs) -> list of outputs
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .autotune.tuned import tuned
from .codegen.cpp.attention import refusal as attention_refusal
from .codegen.steps import Called, Launch
from .codegen.triton import render
from .config import Options
from .errors import TesselError
from .frontend.capture import GraphInfo
from .frontend.compat import without_modes
from .frontend.importer import Imported
from .ir.node import Graph, Node
from .ops.inplace import INPLACE
from .passes import inplace, quantize, writes
from .passes._groups import ATTENTION, refusal
from .passes._products import to_library
from .passes.pipeline import CPU_ONLY, GPU_ONLY, PASSES, Trace, run_pipeline
from .passes.pipeline import Pass as PassFunction
from .place import Place, place_for
from .report import Call, Compilation, Fused, Kernel, Pass, Report, Resource
from .runtime.kernels import Kernels, Pick, by_torch
from .runtime.launch import interpreting, load
from .runtime.library import called
from .runtime.loop import Loop, LoopKernel
from .runtime.matmul_cpu import Product, by_library, grouped
from .runtime.native_kernels import NativeKernels
from .runtime.program import build
from .runtime.replay import Replayed, check_replayable
from .runtime.results import LEAST, MAPPED, keep_freed_memory
from .runtime.whole import WHOLE, whole
from .solve import tile
from .solve.forced import TileRefused, forced_knobs, unused_entries
from .tiles.attention_io import least_bytes, moved_bytes
from .tiles.cost import base_values, bytes_moved, node_bytes
from .tiles.kernel import Kernel as TileProgram
from .tiles.loops import loop_kernel
from .tiles.lower import lower

__all__ = ["Session", "compile_graph"]


@dataclass
class Session:
    """One compiled function: what was asked for, and the record of what was done.

    Attributes:
        target: a target's name, "auto" or "cuda".
        options: see ``Options``.
        report: filled by every compilation.
        compiled: how many times each function has been handed to the backend.
    """

    target: str = "auto"
    options: Options = field(default_factory=Options)
    report: Report = field(default_factory=Report)
    compiled: Counter[str] = field(default_factory=Counter)

    def __reduce__(self) -> Any:
        """A copy of a compiled module starts its own record."""
        return _new_session, (self.target, self.options, self.report.name)


def _new_session(target: str, options: Options, name: str) -> Session:
    return Session(target, options, Report(name, target))


def compile_graph(
    imported: Imported,
    info: GraphInfo,
    session: Session,
    *,
    place: Place | None = None,
    optimized: bool = False,
    pick: Pick | None = None,
) -> Callable[[list[Any]], list[Any]]:
    """Compile one graph; the result takes a list of inputs, which it empties, and returns a list.

    Args:
        imported: the graph.
        info: how it was captured.
        session: what was asked for; gets the record.
        place: where it is to run, if that is not where its tensors are (a GPU that is not here).
        optimized: the passes have run already, on the graph as it is.
        pick: the tile of a kernel, see ``Kernels.pick``.

    Raises:
        TesselError: the request cannot be met, or Tessel itself failed; the message says which graph,
            and what to do.
    """
    record = Compilation(imported.graph.name, info.kind, session.target, captured=len(imported.graph.nodes))
    started = time.perf_counter()
    stage = ["import"]
    try:
        run = _compile(imported, info, session, record, stage, place, optimized, pick)
    except TesselError:
        raise
    except Exception as e:
        raise TesselError(
            f"internal error while compiling the {info.kind} graph {imported.graph.name} ({stage[0]}): "
            f"{type(e).__name__}: {e}. This is a fault of Tessel. Run the function without it for now "
            "(call the original), or leave out the part: options={'fusion': False} compiles without the "
            "fuse pass. To report it, add the output of TESSEL_DEBUG=3."
        ) from e
    record.seconds = time.perf_counter() - started
    session.report.compilations.append(record)
    return run


def _compile(
    imported: Imported,
    info: GraphInfo,
    session: Session,
    record: Compilation,
    stage: list[str],
    place: Place | None,
    optimized: bool,
    pick: Pick | None,
) -> Callable[[list[Any]], list[Any]]:
    options, device = session.options, imported.device
    place = place or place_for(session.target, device)
    record.target = place.target.name
    record.passes.append(Pass("import", 0.0, len(imported.graph.nodes), imported.graph))
    record.notes.extend(info.notes)
    record.fallbacks = [Call(f.target, f.loc.short, f.reason) for f in imported.fallbacks]
    if options.cuda_graphs and info.is_inference:
        check_replayable(imported.graph, device)

    graph = imported.graph
    if not optimized:
        graph = _run_passes(imported, options, place, record, stage)

    stage[0] = "rendering kernels"
    maker = NativeKernels if place.how == "native" else Kernels
    kernels = maker(place.target, options.source_dir(), pick or _pick(place, options, imported.hints))
    if place.how != "torch":
        kernels.render_all(graph)
        with ThreadPoolExecutor(1) as pool:  # kernels outside the graph's file are compiled beside it
            if place.how == "native":
                for node in (n for n in graph.nodes if n.op.name in WHOLE):
                    pool.submit(_whole, node, place, options)  # what it raises, it raises again where it is needed
            kernels.load()
    if options.tile is not None and place.how not in ("launch", "interpret"):
        record.notes.append(f"options.tile is not used: tiles are for GPUs, this is {place.target.name}")
    for name in unused_entries(options.tile, (s.kernel for s in kernels.sources.values())):
        record.notes.append(f"options.tile: no kernel of this graph is called {name!r}")
    loops = {n: _loop_kernel(n, imported, options, place, record, stage) for n in graph.nodes if n.op.name == "loop"}
    stage[0] = "host program"
    product = Product(options.deterministic) if place.how == "native" else None

    def call(node: Node) -> Called | Launch:
        if node in kernels.at:
            return kernels.at[node]
        if node.op.kind == "kernel":
            return by_torch(node, call, options.source_dir(), device)
        if node.op.name == "grouped_mm" and (own := _grouped(node, place, options)[0]) is not None:
            return Called("grouped_mm", own, dict(node.attrs), owned=True)
        if node.op.name == "loop":
            if (whole_loop := loops[node][0]) is not None:
                return Called("loop", whole_loop, owned=True, flat=True)
            return Called("loop", _loop(node, imported, session, record, stage, place, pick), owned=True, flat=True)
        if node.op.name in WHOLE and (own := _whole(node, place, options)[0]) is not None:
            return Called(node.op.name, own, dict(node.attrs), owned=True, flat=True)
        return called(node, options.attention, device, product)

    _describe(graph, kernels, place, options, imported, record, {n: why for n, (_, why) in loops.items()})
    keep = None
    if place.how == "native" and options.keep_results:
        keep = LEAST if info.is_inference else MAPPED
    program = build(
        graph,
        call,
        kernels.launchers,
        options.source_dir(),
        constants=imported.constants,
        device=device,
        hints=imported.hints,
        about=_about(graph, record),
        around=_around(place, device),
        keep=keep,
    )
    record.host, record.host_file = program.source.text, str(program.path)
    record.peak_bytes = program.buffers.peak_bytes
    if keep == MAPPED:  # what a forward graph saved and what a backward graph made is freed at once, after the step
        keep_freed_memory(2 * record.peak_bytes)
    if options.debug >= 4:
        for kernel in record.kernels:
            print(f"# {kernel.file}\n{kernel.source}", file=sys.stderr)
        print(f"# {record.host_file}\n{record.host}", file=sys.stderr)
    if options.cuda_graphs:
        if info.is_inference:
            return Replayed(program.run, info.static_inputs)
        record.notes.append("cuda_graphs: gradients would live in memory that is overwritten; run as it is")
    return program.run


def _loop(
    node: Node,
    imported: Imported,
    session: Session,
    record: Compilation,
    stage: list[str],
    place: Place,
    pick: Pick | None,
) -> Loop:
    """A loop with its step compiled, which is recorded with the graph that it stands in."""
    step = Imported(node.regions[0], {}, (), imported.hints, imported.device)
    inner = Compilation(f"{record.name}, the step of a loop", record.kind, captured=len(step.graph.nodes))
    run = _compile(step, GraphInfo("inference"), session, inner, stage, place, False, pick)
    record.steps.append(inner)
    return Loop(run)


def _loop_kernel(
    node: Node, imported: Imported, options: Options, place: Place, record: Compilation, stage: list[str]
) -> tuple[LoopKernel | None, str]:
    """One kernel for all steps of a loop (None: it goes step by step), and why."""
    if place.how not in ("launch", "interpret"):
        return None, "a loop over time: its step is compiled, see below"
    step = Imported(node.regions[0], {}, (), imported.hints, imported.device)
    graph = _run_passes(step, options, place, Compilation(record.name, record.kind), stage)
    try:
        kernel = loop_kernel(*_one_kernel(graph), node=node)
        knobs = forced_knobs(options.tile, kernel) or None
        source = render(kernel, place.target, tile(kernel, place.target, options) if place.how == "launch" else knobs)
    except TileRefused:
        raise  # the user's word: no quiet way around it
    except TesselError as e:
        return None, f"a loop over time, step by step from Python ({e}); its step is compiled, see below"
    launcher = load(source, options.source_dir())
    where = node.loc.short
    record.kernels.append(
        Kernel(source.name, "scan", str(launcher.path), source.text, [where], "triton", rendered=source)
    )
    record.launches += 1
    return LoopKernel(kernel, launcher, source.grid_for({})), "Tessel's kernel: all steps in one launch"


def _one_kernel(graph: Graph) -> tuple[TileProgram, list[int], list[list[int]]]:
    """The one kernel that a step is, which inputs of the step it reads, and which outputs its results are.

    Raises:
        TesselError: the step is more than that.
    """
    nodes = [n for n in graph.nodes if n.op.kind != "view"]
    place = {n.out: i for i, n in enumerate(graph.inputs)}
    if len(nodes) != 1 or nodes[0].op.kind != "kernel" or any(v not in place for v in nodes[0].operands):
        raise TesselError(f"its step is {len(nodes)} kernels and calls, not one kernel of what it is given")
    made = [[i for i, v in enumerate(graph.outputs) if v == out] for out in nodes[0].outs]
    return lower(nodes[0]), [place[v] for v in nodes[0].operands], made


def _pick(place: Place, options: Options, hints: Mapping[str, int]) -> Pick | None:
    """Who says which tile a kernel gets: for a GPU what is kept, else the solver; the user and the defaults in the
    interpreter."""
    if place.target.gpu_target is not None:
        return lambda kernel: tuned(kernel, place.target, options, hints=hints)
    if place.how == "interpret":
        return lambda kernel: forced_knobs(options.tile, kernel) or None
    return None


def _around(place: Place, device: str) -> Callable[[], AbstractContextManager[Any]] | None:
    """What every call of a program runs in."""
    if place.how == "interpret":
        return interpreting
    if place.how == "launch" and torch.cuda.device_count() > 1:
        return lambda: torch.cuda.device(device)  # Triton launches on the current device
    return None


def _resolved(options: Options, place: Place, graph: Graph) -> Options:
    """What "auto" means at a place: products and attention go to the vendor's library on a GPU, which is
    faster than a template without tuning; through the interpreter the templates are what is tested. On the
    CPU every product is decided for itself (``_library_product``), and attention where it has a template."""
    choice: Literal["library", "template"] = "template" if place.how == "interpret" else "library"
    changes = {n: choice for n in ("matmul", "attention") if getattr(options, n) == "auto"}
    if place.how == "native":
        if "matmul" in changes:
            changes["matmul"] = "template"
        if "attention" in changes and not any(_no_attention(n, place) for n in graph.nodes):
            changes["attention"] = "template"
    return dataclasses.replace(options, **changes)  # type: ignore[arg-type]


def _library_product(node: Node, place: Place, options: Options) -> str | None:
    """Why the vendor's library runs a product on the CPU; ``options`` are what the user asked for."""
    if options.matmul == "library":
        return "options.matmul is 'library': the vendor's library"
    return by_library(node, place.target.features, wanted=options.matmul == "template")


def _no_attention(node: Node, place: Place) -> str | None:
    """Why the CPU's kernel does not take a node of attention."""
    return attention_refusal(node.type.dtype, place.target.features) if node.op.kind in ATTENTION else None


def _grouped(node: Node, place: Place, options: Options) -> tuple[Any, str]:
    """What runs a grouped product (None: its definition), and why."""
    if place.how != "native" or options.matmul == "library":
        return None, f"options.matmul is {options.matmul!r}: one library call a group"
    return grouped(node, place.target.features, wanted=options.matmul == "template")


def _whole(node: Node, place: Place, options: Options) -> tuple[Any, str]:
    """What runs an operator of several products that stays whole (None: its reference), and why."""
    if options.matmul == "library":
        return None, "options.matmul is 'library': its reference in torch, a chunk at a time"
    return whole(node, place.how, place.target, options.source_dir(), wanted=options.matmul == "template")


def _run_passes(imported: Imported, options: Options, place: Place, record: Compilation, stage: list[str]) -> Graph:
    """The passes; where torch runs every operator, composites stay whole and nothing is fused."""
    wanted = [p for p in PASSES if p[0] not in (GPU_ONLY if place.how == "native" else CPU_ONLY)]
    if place.how == "native":
        at = [n for n, _ in wanted].index("fuse")
        wanted.insert(at, ("products", lambda g, _: to_library(g, lambda n: _library_product(n, place, options))))
    chosen = wanted if place.how != "torch" else wanted[:1]
    hints = imported.hints

    def recorded(name: str, run: PassFunction) -> tuple[str, PassFunction]:
        def wrapped(graph: Graph, options: Options) -> Graph:
            stage[0] = f"pass {name}"
            if name == "inplace":
                record.bytes_before = bytes_moved(graph, hints)
                record.notes.extend(inplace.notes(graph))
            if name == "decompose":
                record.notes.extend(quantize.said_of_floats(graph))
            if name in ("packed", "unpack"):
                record.notes.extend(quantize.notes(graph, native=name == "packed"))
            start = time.perf_counter()
            got = run(graph, options)
            done = Pass(name, time.perf_counter() - start, len(got.nodes), got)
            record.passes.append(done)
            _debug(options, done, graph)
            return got

        return name, wrapped

    trace = Trace(check=options.debug >= 3)
    resolved = _resolved(options, place, imported.graph)
    with without_modes():  # a pass may compute with constants
        graph = run_pipeline(imported.graph, resolved, trace, [recorded(*p) for p in chosen])
    record.bytes_after = bytes_moved(graph, hints)
    record.bytes_before = record.bytes_before or record.bytes_after
    return graph


def _debug(options: Options, done: Pass, before: Graph) -> None:
    if options.debug >= 1:
        print(f"tessel: {done.name:<14} {done.seconds * 1e3:8.1f} ms  {done.nodes} nodes", file=sys.stderr)
    if options.debug >= 3:
        old, new = str(before).splitlines(), done.text.splitlines()
        changes = difflib.unified_diff(old, new, f"before {done.name}", f"after {done.name}", lineterm="", n=1)
        print("\n".join(changes), file=sys.stderr)


def _describe(
    graph: Graph,
    kernels: Kernels,
    place: Place,
    options: Options,
    imported: Imported,
    record: Compilation,
    loops: Mapping[Node, str],
) -> None:
    """Write into the record what became of every node of the final graph."""
    known = {f.target for f in imported.fallbacks}
    roots = base_values(graph)
    for node in graph.nodes:
        if node.op.kind in ("view", "input"):
            continue
        if node.op.kind == "kernel":
            region = node.regions[0]
            inside = [n.op.name for n in region.nodes if n.op.kind not in ("view", "generate")]
            saved = bytes_moved(region, imported.hints) - node_bytes(node, roots, imported.hints)
            name = kernels.at[node].name if node in kernels.at else str(node.attrs["name"])
            record.groups.append(Fused(name, inside, saved, "; ".join(node.attrs["why"]), node.loc.short))
            if node in kernels.at:
                record.launches += 1 + (kernels.at[node].first is not None)
            if node in kernels.failed:
                reason = f"no kernel: {kernels.failed[node]}"
                record.calls.append(Call(f"kernel of {len(inside)} operators", node.loc.short, reason))
                record.notes.append(f"{node.attrs['name']} runs operator by operator: {kernels.failed[node]}")
            continue
        target = node.attrs.get("target")
        if target is not None and str(target) in known:
            continue  # listed among the fallbacks, with its own reason
        why = loops[node] if node in loops and place.how != "torch" else _why_torch(node, place, options)
        record.calls.append(Call(str(target or node.op.name), node.loc.short, why))
    for name, source in kernels.sources.items():
        file = str(kernels.launchers[name].path)
        sites = [n.loc.short for n in kernels.sites[name]]
        language = "cpp" if place.how == "native" else "triton"
        kernel = Kernel(name, source.kernel.family, file, source.text, sites, language, rendered=source)
        if place.how == "launch":
            limits = place.target.limits
            kernel.knobs = dict(source.knobs)
            if limits is not None and source.kernel.family in ATTENTION:
                kernel.moved_bytes = moved_bytes(source.kernel, source.knobs)
                kernel.least_bytes = least_bytes(source.kernel, limits.shared_bytes_per_unit)
            kernel.resources = [
                Resource("shared", source.smem_bytes, limit=limits.shared_bytes_per_block if limits else None)
            ]
        record.kernels.append(kernel)
    record.splits = dict(kernels.splits)
    if place.why:
        record.notes.append(place.why)


def _why_torch(node: Node, place: Place, options: Options) -> str:
    """Why torch runs a node of the final graph."""
    if place.how == "torch":
        return place.why
    if node.op.name in ("matmul", "mm", "addmm") and place.how == "native":
        return _library_product(node, place, options) or refusal(node) or "the vendor's library"
    if node.op.name == "grouped_mm":
        return _grouped(node, place, options)[1]
    if node.op.name in WHOLE:
        return _whole(node, place, options)[1]
    if node.op.kind == "contract":
        return (
            f"options.matmul is {options.matmul!r}: the vendor's library" if not refusal(node) else str(refusal(node))
        )
    if node.op.kind in ATTENTION and not refusal(node):
        why = _no_attention(node, place) if place.how == "native" and options.attention == "auto" else None
        return why or f"options.attention is {options.attention!r}: torch's kernel"
    if node.op.name in INPLACE and place.how == "native":
        return f"written in place by torch: {writes.refusal(node)}"
    if node.op.random:
        return "random numbers are eager's own, drawn in its order"
    if node.op.kind == "effect":
        return "read or checked on the host, in order"
    if node.op.kind == "generate":
        return "made for a torch call or an output"
    return refusal(node) or "no template"


def _about(graph: Graph, record: Compilation) -> list[str]:
    return [
        f"The {record.kind} graph {graph.name} for {record.target}: {record.launches} launches of "
        f"{len(record.kernels)} kernels, {len(record.calls) + len(record.fallbacks)} calls to torch."
    ]
