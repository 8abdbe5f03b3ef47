"""What a compilation did and why: a record filled while compiling, shown as text, HTML or a dict.

report = tessel.explain(model, x)
print(report)                  # a page of text
report.html()                  # one self-contained page
report.to_dict()               # plain data, ready for json.dumps
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .ir.node import Graph
from .report_html import page

__all__ = ["Call", "Compilation", "Fused", "Kernel", "Pass", "Recompile", "Report", "Resource"]


@dataclass
class Pass:
    """One pass: its name, how long it took, and the graph after it (text made when asked for)."""

    name: str
    seconds: float
    nodes: int
    graph: Graph | None = None

    @property
    def text(self) -> str:
        return str(self.graph) if self.graph is not None else ""


@dataclass
class Resource:
    """What a kernel needs of something that is limited: predicted, said by the compiler, and the most there is.

    None where that is not known.
    """

    name: str
    predicted: int | None
    compiled: int | None = None
    limit: int | None = None

    @property
    def over(self) -> bool:
        """Whether the compiler's number, or else the predicted one, is above the limit."""
        needed = self.predicted if self.compiled is None else self.compiled
        return self.limit is not None and needed is not None and needed > self.limit


@dataclass
class Kernel:
    """One generated kernel.

    Attributes:
        name, family: of the kernel; its template.
        file: where its text lies.
        source: its text.
        sites: the places in the graph that launch it.
        language: ``triton`` or ``cpp``.
        knobs: the template's knobs it was rendered with.
        resources: of a kernel for a GPU: shared memory (bytes) and, once compiled, registers a thread and spills
            (bytes).
        fault: why the device will not run it; empty as far as is known.
        moved_bytes, least_bytes: of attention on a GPU: what its tiles move, and the least that any schedule could, up
            to a constant (``tiles/attention_io.py``); None of others and of sizes known only at run time.
        rendered: the record of the text; no part of ``to_dict``.
    """

    name: str
    family: str
    file: str
    source: str
    sites: list[str] = field(default_factory=list)
    language: str = "triton"
    knobs: dict[str, int] = field(default_factory=dict)
    resources: list[Resource] = field(default_factory=list)
    fault: str = ""
    moved_bytes: int | None = None
    least_bytes: int | None = None
    rendered: Any = field(default=None, repr=False)


@dataclass
class Fused:
    """One group that the fuse pass made: what is in it, the bytes it saves, and why it is one group."""

    kernel: str
    operators: list[str]
    saved_bytes: int
    why: str
    where: str = ""


@dataclass
class Call:
    """An operator that torch runs, with the reason that no kernel is generated for it."""

    operator: str
    where: str
    reason: str


@dataclass
class Recompile:
    """One more compilation of a function, and the guard that failed."""

    function: str
    number: int
    reason: str


@dataclass
class Compilation:
    """One graph, from capture to callable.

    Attributes:
        name: of the graph.
        kind: ``inference``, ``forward`` or ``backward``.
        target: the target it was compiled for.
        captured: nodes that came from capture.
        passes: in order, the import first.
        kernels: distinct generated kernels.
        launches: kernel launches in one call.
        groups: what fused and why.
        calls: library calls: operators that torch runs by choice or for want of a kernel.
        fallbacks: operators that the importer could not express, with reasons.
        bytes_before, bytes_after: distinct inputs and outputs of every operator before fusion, of every
            kernel and library call after it, at the example sizes.
        splits: products whose k is cut into parts, by name, with their number.
        steps: the steps of loops, each compiled as a graph of its own.
        peak_bytes: most bytes of intermediate values alive at once, at the example sizes.
        host: text of the host program; ``host_file`` where it lies.
        seconds: from the captured graph to the callable.
    """

    name: str
    kind: str = "inference"
    target: str = ""
    captured: int = 0
    passes: list[Pass] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    launches: int = 0
    groups: list[Fused] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    fallbacks: list[Call] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    peak_bytes: int = 0
    host: str = ""
    host_file: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    steps: list[Compilation] = field(default_factory=list)


class Report:
    """Everything that happened to one compiled function."""

    def __init__(self, name: str = "", target: str = "auto") -> None:
        self.name = name
        self.target = target
        self.compilations: list[Compilation] = []
        self.recompiles: list[Recompile] = []
        self.notes: list[str] = []

    # ------------------------------------------------------------ what people ask first

    @property
    def kernels(self) -> list[Kernel]:
        """All distinct kernels of all graphs."""
        return [k for c in self.compilations for k in c.kernels]

    @property
    def fallbacks(self) -> list[Call]:
        """All operators that run as opaque calls, with reasons."""
        return [f for c in self.compilations for f in c.fallbacks]

    @property
    def captured(self) -> int:
        return sum(c.captured for c in self.compilations)

    # ------------------------------------------------------------ shapes of it

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "name": self.name,
            "target": self.target,
            "notes": list(self.notes),
            "recompiles": [vars(r).copy() for r in self.recompiles],
            "compilations": [_compilation_dict(c) for c in self.compilations],
        }

    def html(self) -> str:
        """One HTML page that needs nothing else: styles inside, no scripts, no links."""
        return page(self.to_dict())

    def __str__(self) -> str:
        out = [f"Tessel report: {self.name or '(function)'}, target {self.target}"]
        if not self.compilations:
            out.append("Nothing has been compiled yet: call the function once.")
        for c in self.compilations:
            for one in (c, *c.steps):
                out += ["", *_compilation_lines(one)]
        out += ["", *_recompile_lines(self.recompiles)]
        out += [f"note: {n}" for n in self.notes]
        return "\n".join(out) + "\n"

    def __repr__(self) -> str:
        return f"<tessel report: {len(self.compilations)} graphs, {len(self.kernels)} kernels; print() shows it>"


def _compilation_dict(c: Compilation) -> dict[str, Any]:
    out: dict[str, Any] = {k: v for k, v in vars(c).items() if isinstance(v, str | int | float)}
    out["passes"] = [{"name": p.name, "seconds": p.seconds, "nodes": p.nodes, "graph": p.text} for p in c.passes]
    out["kernels"] = [_kernel_dict(k) for k in c.kernels]
    for name in ("groups", "calls", "fallbacks"):
        out[name] = [vars(x).copy() for x in getattr(c, name)]
    out["notes"], out["splits"] = list(c.notes), dict(c.splits)
    out["steps"] = [_compilation_dict(s) for s in c.steps]
    return out


def _kernel_dict(k: Kernel) -> dict[str, Any]:
    out = {name: value for name, value in vars(k).items() if name != "rendered"}
    return out | {"knobs": dict(k.knobs), "resources": [vars(r).copy() for r in k.resources]}


def size(n: int) -> str:
    """Bytes in a readable unit.

    >>> size(900), size(20_000), size(3 * 2**20)
    ('900 B', '19.5 KiB', '3.0 MiB')
    """
    if n < 1024:
        return f"{n} B"
    for unit, step in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)):
        if n < step * 1024 or unit == "GiB":
            return f"{n / step:.1f} {unit}"
    raise AssertionError


def _compilation_lines(c: Compilation) -> Iterable[str]:
    head = f"{c.kind} graph {c.name} for {c.target}: {c.captured} nodes captured"
    yield head
    yield "-" * len(head)
    yield (
        f"{len(c.kernels)} kernels ({c.launches} launches), {len(c.calls)} library calls, "
        f"{len(c.fallbacks)} fallbacks; compiled in {c.seconds:.2f} s"
    )
    if c.bytes_before:
        less = 1 - c.bytes_after / c.bytes_before
        yield f"bytes moved: {size(c.bytes_before)} unfused, {size(c.bytes_after)} now ({less:.0%} less)"
    if c.peak_bytes:
        yield f"most intermediate memory at once: {size(c.peak_bytes)}"
    yield from (f"note: {n}" for n in c.notes)
    yield ""
    yield "passes (the graph after each: .compilations[...].passes[...].text, and .html())"
    yield from _table([(p.name, f"{p.seconds * 1e3:.1f} ms", f"{p.nodes} nodes") for p in c.passes])
    if c.kernels:
        yield "kernels"
        yield from _table([(k.name, k.family, f"x{len(k.sites)}", k.file) for k in c.kernels])
    if any(k.resources for k in c.kernels):
        yield "what kernels need: predicted / compiled / limit"
        yield from _table([_resource_row(k) for k in c.kernels if k.resources])
    moved = [(k, k.moved_bytes, k.least_bytes) for k in c.kernels if k.moved_bytes and k.least_bytes]
    if moved:
        yield "what attention moves: bytes of its tiles / lower bound"
        yield from _table([(k.name, size(bytes_), size(least), f"x{bytes_ / least:.1f}") for k, bytes_, least in moved])
    if c.groups:
        yield "what fused and why"
        yield from _table(_group_rows(c.groups))
    yield "what fell back and why" if c.fallbacks else "nothing fell back"
    yield from _counted((f.operator, f.reason, f.where) for f in c.fallbacks)
    if c.calls:
        yield "what torch computes and why"
        yield from _counted((f.operator, f.reason, f.where) for f in c.calls)
    if c.host_file:
        yield f"host program: {c.host_file}"


def _resource_row(k: Kernel) -> tuple[str, ...]:
    def number(n: int | None) -> str:
        return "-" if n is None else str(n)

    cells = [f"{r.name} {number(r.predicted)} / {number(r.compiled)} / {number(r.limit)}" for r in k.resources]
    return (k.name, *cells, k.fault or ("OVER ITS LIMIT" if any(r.over for r in k.resources) else "fits"))


def _group_rows(groups: list[Fused]) -> list[tuple[str, ...]]:
    """Equal groups once, with their number and all that they save."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for g in groups:
        rows.setdefault((g.kernel, _short(g.operators), g.why), []).append(g.saved_bytes)
    return [
        (kernel, operators, f"x{len(saved)}", f"saves {size(sum(saved))}" if sum(saved) > 0 else "", why)
        for (kernel, operators, why), saved in rows.items()
    ]


def _recompile_lines(recompiles: list[Recompile]) -> Iterable[str]:
    if not recompiles:
        yield "no recompiles"
        return
    yield f"{len(recompiles)} recompiles"
    yield from _table([(r.function, f"#{r.number}", " ".join(r.reason.split())) for r in recompiles])


def _counted(rows: Iterable[tuple[str, str, str]]) -> Iterable[str]:
    """Equal (operator, reason) once, with the count and the first place."""
    first: dict[tuple[str, str], str] = {}
    count: Counter[tuple[str, str]] = Counter()
    for operator, reason, where in rows:
        first.setdefault((operator, reason), where)
        count[operator, reason] += 1
    yield from _table([(op, f"x{n}", reason, first[op, reason]) for (op, reason), n in count.items()])


def _short(words: list[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f", ... ({len(words)} in all)" if len(words) > most else "")


def _table(rows: list[tuple[str, ...]]) -> Iterable[str]:
    if not rows:
        return
    wide = [min(max(len(r[i]) for r in rows), 60) for i in range(len(rows[0]))]
    for r in rows:
        yield "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(r, wide, strict=True)).rstrip()
