"""Tile programs as C++ for the CPU: pointwise kernels, and the file that holds a graph's.

    source = render(kernel)
    unit = translation_unit([source])     # one file, to be compiled once

A kernel is ``int name(const i64* args, i64 threads)``: addresses of its tensors, then sizes. It returns the
reasons to stop, as bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...errors import TesselError, check
from ...ir.types import Dim, product
from ...ops import OPS
from ...tiles.header import environment
from ...tiles.index import Index, substitute
from ...tiles.kernel import Axis, Compute, Kernel, Load, Store
from .attention import attention
from .attention_backward import attention_backward
from .expr import Emitter
from .gather import asked_early, asked_in_line, places_of_rows
from .matmul import matmul
from .reduce import reduction
from .running import has_folds
from .scan import scan
from .space import Space, space_of
from .text import SQUARE, coordinates, items, simd, squares, steps
from .vector import Along, foresees_little, too_large
from .words import memory_type, size_text

__all__ = ["CppSource", "render", "translation_unit"]

# The headers of families that have one of their own.
_HEADERS = {"matmul": "gemm", "attention": "attention", "attention_backward": "attention_backward"}


@dataclass(frozen=True, eq=False)
class CppSource:
    """One kernel as C++ text.

    Attributes:
        name: the function's name.
        header: comment lines: nodes computed and the user's lines.
        body: the function.
        sizes: names of the symbols it takes, in order.
        kernel: the tile program.
    """

    name: str
    header: str
    body: str
    sizes: tuple[str, ...]
    kernel: Kernel

    @property
    def text(self) -> str:
        return self.header + self.body

    @cached_property
    def body_key(self) -> str:
        """A digest that two kernels share if they differ only in name and header."""
        return hashlib.sha256(self.body.replace(self.name, "kernel").encode()).hexdigest()


def render(kernel: Kernel) -> CppSource:
    """The source of a kernel.

    Raises:
        TesselError: a family without a C++ template, or a value that has no C++ form.
    """
    makers = {
        "pointwise": _pointwise,
        "reduction": reduction,
        "scan": scan,
    }
    whole = {"matmul": matmul, "attention": attention, "attention_backward": attention_backward}  # no loops to place
    if kernel.family not in makers | whole:
        raise TesselError(f"no C++ template for {kernel.family} kernels")
    space = space_of(kernel) if kernel.family in makers else Space((), (), {})
    made = makers[kernel.family](kernel, space) if kernel.family in makers else whole[kernel.family](kernel)
    params = [(p.name, memory_type(p.type.dtype), p.out) for p in kernel.params]
    context: dict[str, Any] = {
        "name": kernel.name,
        "params": params,
        "sizes": kernel.symbols(),
        "work": _work(kernel),
        **made,
    }
    template = f"{made.get('template', kernel.family)}.cpp.j2"
    code = str(environment().get_template(template).render(k=context))
    code = "\n".join(line.rstrip() for line in code.strip("\n").split("\n") if line.strip()) + "\n"
    loops = ", ".join(f"{a.name}<{a.extent}" for a in (*space.xs, *space.rs) or kernel.axes) or "one point"
    how = " (vectors across rows)" if space.across else ""
    notes = "".join(f"// {_comment(n)}\n" for note in (*kernel.notes, f"loops: {loops}{how}") for n in note.split("\n"))
    return CppSource(kernel.name, notes, code, kernel.symbols(), kernel)


def translation_unit(sources: Iterable[CppSource]) -> str:
    """One file with all kernels; it includes the headers of their families."""
    sources = list(sources)
    families = {s.kernel.family for s in sources}
    names = ["tessel", *(name for family, name in _HEADERS.items() if family in families)]
    if any(has_folds(s.kernel) for s in sources):
        names.append("running")
    includes = "".join(f'#include "{name}.hpp"\n' for name in names)
    return f"{includes}using namespace tessel;\n\n" + "\n".join(s.text for s in sources)


def _comment(line: str) -> str:
    """A line that stays one comment line, whatever a user's file is called."""
    return "".join(c if c.isascii() and c.isprintable() and c != "\\" else "?" for c in line)


def _work(kernel: Kernel) -> str:
    """Roughly how many elements of a plain addition a call is worth."""
    counted = [s for s in kernel.body if isinstance(s, Compute | Load | Store)]
    cost = sum(OPS[s.op].cost if isinstance(s, Compute) else 1 for s in counted)
    total: Dim = product(a.extent for a in kernel.axes)
    return f"{size_text(total)} * {max(1, cost // 4)}"


def _pointwise(kernel: Kernel, space: Space) -> dict[str, Any]:
    """Context of ``pointwise.cpp.j2``."""
    check(not space.rs, lambda: f"{kernel.name}: a pointwise kernel has no reduced axes")
    outer, lane = (space.xs[:-1], space.xs[-1]) if space.xs else ((), None)
    e = Emitter(kernel, space)
    e.past = too_large(kernel)
    copies = _copies(e, outer[-1].name, lane.name) if space.turned and lane else []
    wide, pairs = _wide(kernel, e, lane) if lane is not None else (False, False)
    e.nest([a.name for a in outer], [lane.name] if lane else [], wide, pairs)
    for stmt in kernel.body:
        e.emit(stmt)
    count, where = items(outer, lane), coordinates(outer, lane)
    before: list[str] = []
    requests: list[str] = []
    if wide and lane is not None and not space.turned:
        where = places_of_rows(kernel, e, outer, lane)
        before, places, requests = asked_early(kernel, e, lane, where, e.blocks[0], pairs)
        e.blocks = [[*e.blocks[0], *places], e.blocks[1]]
        if foresees_little():  # a row from one end
            e.blocks[1][:0] = [*requests, *asked_in_line(kernel, e, lane)]
            requests = []
    elif wide and lane is not None:
        e.blocks[1][:0] = _next_square(e, lane.name)
    pragma = simd({"|": ["bad"]} if e.flags else {})
    loop = _loop(lane, e.blocks[1], wide, pairs, pragma, requests) if lane else []
    if space.turned and lane is not None:
        count, where = squares(outer[:-1], outer[-1], lane)
    return {
        "items": count,
        "threads": "1" if kernel.attrs.get("in_order") else "threads",
        "before": before,
        "coordinates": where,
        "turned": outer[-1].name if space.turned else "",
        "copies": copies,
        "row": e.blocks[0],
        "loop": loop,
    }


def _wide(kernel: Kernel, e: Emitter, lane: Axis) -> tuple[bool, bool]:
    """Whether the innermost loop is written with vectors, and whether with two at a time."""
    # an index read from memory has no text yet, and is in no square
    plain = [s for s in kernel.body if isinstance(s, Load) and e.copies and _plain(e, s)]
    copied = [s.out for s in plain if e.element(s.access)[0] in e.copies]
    along = Along(kernel, e.space, lane.name, {}, frozenset(copied))
    wide = along.all_wide(kernel.body, lane.extent)
    return wide, wide and along.in_pairs(kernel.body)


def _loop(lane: Axis, body: list[str], wide: bool, pairs: bool, pragma: str, requests: list[str]) -> list[str]:
    """The innermost loop of a pointwise kernel."""
    if not body:
        return []
    if wide:
        return steps(lane, body, pairs=pairs, requests=requests)
    head = f"for (i64 {lane.name} = begin; {lane.name} < end; ++{lane.name}) {{"
    return [pragma, head, *("  " + line for line in body), "}"]


def _plain(e: Emitter, load: Load) -> bool:
    index = e.space.at(load.access.address(e.kernel.params[load.access.param]))
    return all(a.kind == "var" for a, _ in index.terms)


def _next_square(e: Emitter, lane: str) -> list[str]:
    """Lines that ask for what the next square reads along the lane: rows of a square end too soon to be foreseen."""
    lines: list[str] = []
    for s in e.kernel.body:
        if isinstance(s, Load) and not s.access.mask and _plain(e, s) and e.element(s.access)[0] not in e.copies:
            index = e.space.at(s.access.address(e.kernel.params[s.access.param]))
            if any(a.name == lane and c == 1 for a, c in index.terms):
                lines.append(f"__builtin_prefetch({e.pointer(s.access)[0]} + {SQUARE[1]});")
    return list(dict.fromkeys(lines))


def _copies(e: Emitter, turned: str, lane: str) -> list[str]:
    """Lines that copy what lies along the loop ``turned`` into a local square that lies along the lane.

    Elements of one row of the square are then side by side, whatever their distance in memory.
    """
    lines: list[str] = []
    for s in e.kernel.body:
        if not isinstance(s, Load) or s.access.mask:
            continue
        param = e.kernel.params[s.access.param]
        index = e.space.at(s.access.address(param))
        steps = {a.name: c for a, c in index.terms if a.kind == "var"}
        plain = all(a.kind == "var" for a, _ in index.terms)
        text, _ = e.element(s.access) if plain else ("", None)
        if not plain or steps.get(turned) != 1 or steps.get(lane, 1) == 1 or text in e.copies:
            continue
        name = f"square{len(e.copies)}"
        corner = substitute(index, lambda a: Index((), 0) if a.kind == "var" and a.name in (turned, lane) else None)
        rest, _ = e.affine(corner)
        step = size_text(steps[lane])
        first = f"{param.name} + {rest} + t_begin + begin * {step}"
        lines += [
            f"alignas(64) {memory_type(param.type.dtype)} {name}[{SQUARE[0] * SQUARE[1]}];",
            f"turn_square({first}, {step}, t_end - t_begin, end - begin, {name}, {SQUARE[1]});",
        ]
        e.copies[text] = f"{name}[({turned} - t_begin) * {SQUARE[1]} + {lane} - begin]"
    return lines
