"""The host program: one Python function per graph that allocates, launches, calls torch and returns.

    def forward(args):
        x, weight = args
        args.clear()
        s0 = x.size(0)
        # layer_norm, add   model.py:12 in layers.0
        v3 = empty((s0, 128), (128, 1), f32)
        k_norm((cdiv(s0, 4),), x, weight, v3, s0)
        return [v3]

The text is what runs: what it calls by name is listed in ``HostSource.names`` and supplied by the
runtime. Values are called ``v<n>``, inputs ``a<n>``: no user's name reaches the text outside comments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from ..ir.node import Graph, Node, Value, values_in
from ..ir.types import Dim, TensorType, dim_equal
from ..ops.inplace import INPLACE, written_memory
from .bindings import bindings
from .sizes import size_text
from .steps import Called, Launch, Run, Storage
from .views import view_text

__all__ = ["HostSource", "render_host"]


@dataclass(frozen=True)
class HostSource:
    """Text of the host program, everything it calls by name, and the runs of launches among that."""

    name: str
    text: str
    names: Mapping[str, Any]
    runs: Mapping[str, Run] = field(default_factory=dict)


class _Writer:
    def __init__(self, graph: Graph, call: Callable[[Node], Called | Launch], storage: Storage) -> None:
        self.graph = graph
        self.call = call
        self.storage = storage
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self.value: dict[Value, str] = {}
        self.count = 0
        self.bound: set[str] = set()
        self.checked = _strides_that_matter(graph)
        self.runs: dict[str, Run] = {}

    # ------------------------------------------------------------ pieces of text

    def line(self, text: str) -> None:
        self.lines.append("    " + text)

    def fresh(self, v: Value) -> str:
        self.value[v] = f"v{self.count}"
        self.count += 1
        return self.value[v]

    def bind(self, name: str, thing: Any) -> str:
        """Make ``thing`` known to the program as ``name``; another thing of that name gets a number."""
        wanted, n = name, 1
        while name in self.names and self.names[name] is not thing:
            n += 1
            name = f"{wanted}_{n}"
        self.names[name] = thing
        return name

    def literal(self, x: Any) -> str:
        if isinstance(x, Value):
            return self.value[x]
        if isinstance(x, tuple | list):
            inner = ", ".join(self.literal(y) for y in x)
            return f"({inner},)" if len(x) == 1 else f"({inner})"
        if isinstance(x, sympy.Basic):
            return size_text(x)
        if isinstance(x, float) and not math.isfinite(x):
            return f'float("{x}")'
        if x is None or isinstance(x, bool | int | float | str):
            return repr(x)
        if isinstance(x, torch.dtype):
            return str(x)
        if isinstance(x, torch.layout | torch.memory_format | complex):
            return repr(x)
        if isinstance(x, torch.device):
            return f"torch.{x!r}"
        return self.bind(f"c_{type(x).__name__.lower()}", x)

    def sizes(self, dims: Iterable[Dim]) -> str:
        """A shape, strides or a grid as a tuple."""
        inner = [size_text(d, whole=True) for d in dims]
        return f"({inner[0]},)" if len(inner) == 1 else f"({', '.join(inner)})"

    # ------------------------------------------------------------ the program

    def header(self) -> None:
        inputs = [n for n in self.graph.inputs if n.attrs.get("role") != "constant"]
        held = [n for n in self.graph.inputs if n.attrs.get("role") == "constant"]
        for i, node in enumerate(inputs):
            self.value[node.out] = f"a{i}"
        for i, node in enumerate(held):
            self.value[node.out] = f"k{i}"
        if inputs:
            names = [self.value[i.out] for i in inputs]
            for at in range(0, len(names), 16):  # short lines, and a comment where people look for a name
                part = ", ".join(names[at : at + 16])
                self.line(f"{part}{',' if len(names[at:]) == 1 else ''} = args[{at}:{at + 16}]")
        self.line("args.clear()")
        for name, text in bindings(self.graph, self.value):
            self.line(f"{name} = {text}")
            self.bound.add(name)
        for node in inputs:
            t = node.types[0]
            if isinstance(t, TensorType) and node.attrs.get("role", "input") == "input" and t.rank:
                name = self.value[node.out]
                if any(node is target for target, _ in self.graph.effects):
                    self.line(f"{name}_in = {name}")
                self.line(f"if {name}.stride() != {self.sizes(t.strides)}:")
                self.line(f"    {name} = fit({name}, {self.sizes(t.strides)})")

    def write(self, at: int, node: Node, told: str) -> str:
        """Write one node; returns the comment last written, so that it is not repeated."""
        kind = node.op.kind
        what = self.call(node) if kind != "view" and node.op.name not in _INLINE else None
        comment = _comment(node)
        if comment != told and comment:
            self.line(f"# {comment}")
        if kind == "view":
            self.view(node)
        elif node.op.name in _INLINE:
            self.inline(node)
        elif isinstance(what, Launch):
            self.launch(node, what)
        else:
            assert isinstance(what, Called)
            self.callable(node, what)
        return comment or told

    def view(self, node: Node) -> None:
        source = node.args[0]
        text, strides = view_text(node, self.value[source])
        if node.out in self.checked and not _same_strides(strides, node.type):
            text = f"fit({text}, {self.sizes(node.type.strides)})"
        self.line(f"{self.fresh(node.out)} = {text}")

    def inline(self, node: Node) -> None:
        if node.op.name == "item":
            name = node.attrs["symbol"]
            self.line(f"{name} = {self.literal(node.args[0])}.item()")
            self.bound.add(name)
        else:  # assert_scalar
            message = node.attrs.get("message") or "a condition of the program does not hold"
            self.line(f"if not ({self.literal(node.args[0])}):")
            self.line(f"    raise RuntimeError({message!r})")

    def launch(self, node: Node, what: Launch) -> None:
        outs = self.results(node)
        operands = list(values_in(node.args))
        held = what.buffer
        if held is not None:
            layout = f"{self.sizes(held.shape)}, {self.sizes(held.strides)}, {self.literal(held.dtype)}"
            self.line(f"between = empty({layout})")
        names = {"in": lambda i: self.value[operands[i]], "out": lambda i: outs[i], "buffer": lambda i: "between"}
        for one in (what,) if what.first is None else (what.first, what):
            args = [names[how](i) for how, i in one.params]
            self.line(f"{one.name}({', '.join([self.sizes(one.grid), *args, *one.sizes])})")
        if held is not None:
            self.line("del between")

    def results(self, node: Node) -> dict[int, str]:
        """Lines that make the memory a launch writes to, except where it has a place; names by position."""
        if node.op.name in INPLACE:
            self.value[node.out] = self.value[node.operands[0]]
            return {0: self.value[node.out]}
        outs = {}
        for i, (v, t) in enumerate(zip(node.outs, node.types, strict=True)):
            assert isinstance(t, TensorType)
            if v in self.storage.places:
                continue
            if v in self.storage.kept:
                outs[i] = self.value[v]
                continue
            old = self.storage.reuse.get(v)
            layout = self.layout(t)
            if v in self.storage.parts:
                base, offset = self.storage.parts[v]
                text = f"part({self.value[base]}, {offset}, {layout})"
            elif old is None:
                text = f"empty({layout})"
            elif old.type.dtype == t.dtype and _same_layout(old.type, t):
                text = f"again({self.value[old]})"
            else:
                text = f"reuse({self.value[old]}, {layout})"
            outs[i] = self.fresh(v)
            self.line(f"{outs[i]} = {text}")
        return outs

    def layout(self, t: TensorType) -> str:
        return f"{self.sizes(t.shape)}, {self.sizes(t.strides)}, {self.literal(t.dtype)}"

    def results_first(self) -> None:
        """The results whose memory is there from the beginning."""
        for v in self.storage.kept:
            assert isinstance(v.type, TensorType)
            self.line(f"{self.fresh(v)} = result({self.layout(v.type)})")

    def run(self, nodes: Sequence[Node], told: str) -> str:
        """Launches that one call makes; the comments say which, and where in the block their values lie."""
        tensors: dict[str, int] = {}
        steps = []
        for node in nodes:
            what = self.call(node)
            assert isinstance(what, Launch)
            comment = _comment(node)
            if comment != told and comment:
                self.line(f"# {comment}")
                told = comment
            self.results(node)
            operands = list(values_in(node.args))
            args, shown = [], []
            for how, i in what.params:
                v = operands[i] if how == "in" else node.outs[i]
                offset = self.storage.places.get(v)
                name = self.value[v] if offset is None else "block"
                args.append((tensors.setdefault(name, len(tensors)), offset or 0))
                shown.append(name if offset is None else f"block+{offset}")
            self.line(f"#   {what.name}({', '.join(shown)})")
            steps.append((what.name, tuple(args)))
        name = f"run{len(self.runs)}"
        self.runs[name] = Run(tuple(steps), len(tensors))
        self.line(f"{name}({', '.join(tensors)})")
        return told

    def callable(self, node: Node, what: Called) -> None:
        name = self.bind(what.name, what.fn)
        args = [self.literal(a) for a in node.args]
        if what.names:
            at = len(args) - len(what.names)
            args[at:] = [f"{k}={a}" for k, a in zip(what.names, args[at:], strict=True)]
        args += [f"{k}={self.literal(v)}" for k, v in what.attrs.items()]
        text = f"{name}({', '.join(args)})"
        if node.op.name in INPLACE:
            self.value[node.out] = self.value[node.operands[0]]
        if not node.types or node.out in self.value:
            self.line(text)
            return
        outs = [self.fresh(v) for v in node.outs]
        fits = [v in self.checked and isinstance(v.type, TensorType) and v.type.rank > 0 for v in node.outs]
        if what.flat:
            text = f"tensors_in({text})" + ("[0]" if len(outs) == 1 else "")
        if len(outs) == 1 and fits[0] and not node.attrs.get("symbol"):
            text, fits[0] = f"fit({text}, {self.sizes(node.type.strides)})", False
        self.line(f"{', '.join(outs)} = {text}")
        if node.attrs.get("symbol"):
            self.sizes_of_results(node, outs)
        for v, out, wanted in zip(node.outs, outs, fits, strict=True):
            if wanted:
                self.line(f"{out} = fit({out}, {self.sizes(v.type.strides)})")

    def sizes_of_results(self, node: Node, outs: Sequence[str]) -> None:
        """Symbols that stand for sizes only known now (``nonzero``)."""
        for t, out in zip(node.types, outs, strict=True):
            for i, d in enumerate(t.shape if isinstance(t, TensorType) else ()):
                if isinstance(d, sympy.Symbol) and d.name not in self.bound:
                    self.line(f"{d.name} = {out}.size({i})")
                    self.bound.add(d.name)

    def footer(self) -> None:
        """Effects in order, then the results.

        A result that is, or may share memory with, an input that an effect overwrites is copied
        first: results are the values from before the effects.
        """
        targets = [node for node, _ in self.graph.effects]
        safe: dict[Value, str] = {}

        def before(v: Value, until: Sequence[Node]) -> str:
            touched = self.aliased(v)
            if v not in safe and any(t.out in touched for t in until):
                safe[v] = f"{self.value[v]}_old"
                self.line(f"{safe[v]} = {self.value[v]}.clone()")
            return safe.get(v, self.value[v])

        if targets:
            for v in dict.fromkeys(values_in(self.graph.outputs)):
                before(v, targets)
            for i, (_, v) in enumerate(self.graph.effects):
                before(v, targets[:i])
        for node, v in self.graph.effects:
            name = self.value[node.out]
            has_original = node.attrs.get("role", "input") == "input" and node.type.rank
            if written_memory(v) == node.out:  # done in place
                if has_original:
                    self.line(f"if {name}_in is not {name}:")
                    self.line(f"    {name}_in.copy_({name})")
                continue
            self.line(f"{name}{'_in' if has_original else ''}.copy_({safe.get(v, self.value[v])})")
        results = [safe[o] if isinstance(o, Value) and o in safe else self.literal(o) for o in self.graph.outputs]
        self.line(f"return [{', '.join(results)}]")

    def aliased(self, v: Value) -> set[Value]:
        """The inputs whose memory a value may share."""
        found: set[Value] = set()
        seen: set[Value] = set()
        stack = [v]
        while stack:
            v = stack.pop()
            if v in seen:
                continue
            seen.add(v)
            if v.op.kind == "input":
                found.add(v)
            elif v.op.name in INPLACE:
                stack.append(v.node.operands[0])
            elif v.op.kind == "view" or (v.op.kind != "kernel" and self.shares(v.node)):
                stack.extend(v.node.operands)
        return found

    def shares(self, node: Node) -> bool:
        if node.op.name in _INLINE:
            return False
        what = self.call(node)
        return isinstance(what, Called) and not what.owned


_INLINE = frozenset({"item", "assert_scalar"})


def render_host(
    graph: Graph,
    call: Callable[[Node], Called | Launch],
    storage: Storage | None = None,
    about: Iterable[str] = (),
) -> HostSource:
    """The host program of a graph.

    Args:
        graph: kernels, views, library calls, effects: any node that ``call`` knows.
        call: what to run at a node (not asked for views, ``item`` and ``assert_scalar``).
        storage: reuse and frees; without it every value lives to the end of the call.
        about: lines for the docstring.

    Raises:
        TesselError: a size symbol that no input tells.
    """
    w = _Writer(graph, call, storage or Storage())
    w.header()
    if w.storage.block:
        w.line(f"block = empty(({w.storage.block},), (1,), torch.uint8)")
    w.results_first()
    told, at = "", 0
    while at < len(graph.nodes):
        end = w.storage.runs.get(at, at + 1)
        told = w.run(graph.nodes[at:end], told) if at in w.storage.runs else w.write(at, graph.nodes[at], told)
        dead = [w.value[v] for i in range(at, end) for v in w.storage.frees.get(i, ()) if v in w.value]
        if dead:
            w.line(f"del {', '.join(dead)}")
        at = end
    w.footer()
    doc = "\n".join(line.replace("\\", "/").replace('"""', "'''") for line in about)
    names = [f"    #   {w.value[n.out]}: {_safe(n.attrs['name'])} {n.types[0]}" for n in graph.inputs]
    text = "\n".join(
        [f'"""{doc}\n"""\n' if doc else "", f"def {_identifier(graph.name)}(args):", *names, *w.lines, ""]
    ).lstrip("\n")
    return HostSource(_identifier(graph.name), text, w.names, w.runs)


def _strides_that_matter(graph: Graph) -> set[Value]:
    """Values whose strides someone relies on: kernels, views, results. Others may differ from their type."""
    out: set[Value] = set(values_in(graph.outputs))
    for node in graph.nodes:
        if node.op.kind in ("kernel", "view"):
            out.update(node.operands)
    return out


def _same_strides(got: Sequence[Dim] | None, want: TensorType) -> bool:
    return got is not None and all(
        dim_equal(a, b) or (isinstance(n, int) and n <= 1)
        for a, b, n in zip(got, want.strides, want.shape, strict=True)
    )


def _same_layout(a: TensorType, b: TensorType) -> bool:
    return a.rank == b.rank and all(map(dim_equal, a.shape, b.shape)) and all(map(dim_equal, a.strides, b.strides))


def _comment(node: Node) -> str:
    loc = node.loc.short
    where = "" if loc.startswith("(no") else f"   {_safe(loc)}"
    if node.op.kind == "kernel":
        inside = list(dict.fromkeys(n.op.name for r in node.regions for n in r.nodes if n.op.kind != "view"))
        shown = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "")
        return f"{shown}{where}"
    return where.strip()


def _safe(text: object) -> str:
    """One printable ASCII line: what users call their things may hold anything."""
    return str(text).encode("ascii", "backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


def _identifier(name: str) -> str:
    text = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
    return text if text and not text[0].isdigit() else f"g_{text}"
