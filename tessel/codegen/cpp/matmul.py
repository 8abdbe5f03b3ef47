"""Matrix products on the CPU: the operands and the epilogue of a tile program as C++ around ``gemm.hpp``.

    c[m, n] = epilogue(sum over k of a[m, k] * b[k, n])

An operand that lies in memory as the tiles want it is read or packed from there, a left one that lies along m is
turned; any other is computed, the right one while it is packed, the left one into rows of its own first. The epilogue
runs on a row of a finished tile, which is still in the first cache. Few rows (or few columns) of operands that both
lie along k are dot products: every element of the larger operand is then read once and nothing is packed.

On a CPU with a matrix unit for bf16, float32 is multiplied by it, too, in three parts (``gemm_split.hpp``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ...errors import check
from ...ir.types import Dim, product
from ...targets import get_target
from ...tiles.default import batch_axes
from ...tiles.index import Index, var
from ...tiles.kernel import ACC, Axis, Kernel, Load, Ref, Stmt, Store
from ..dialect import compute_dtype
from .expr import Emitter
from .gemm import forms, gemm_header, has_matrix_unit, multiplies_bf16
from .space import Space
from .text import points, simd, steps, unit
from .vector import KINDS, Along, first_cache, foresees_little, wide_cast
from .words import memory_type, size_text

__all__ = ["grouped_unit", "matmul", "product_header", "refusal"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The axes of a tile program and the loops' names: ``n`` is how many lanes of a vector count.
_LOOPS = {"m": "row", "n": "col", "k": "dim"}


def refusal(dtype: torch.dtype) -> str | None:
    """Why there is no kernel for products of a dtype, ``None`` where there is one.

    >>> refusal(torch.bfloat16) is None
    True
    >>> refusal(torch.float64)
    'a product of float64: torch has the kernel for it'
    """
    name = str(dtype).removeprefix("torch.")
    return None if dtype in _DTYPES else f"a product of {name}: torch has the kernel for it"


def product_header(features: Collection[str] | None = None) -> str:
    """The text of ``gemm.hpp`` for this machine's CPU, or one with other ``features``."""
    have = get_target("cpu").features if features is None else features
    intel = foresees_little()  # whose second cache falls behind the vectors, too
    l1_bytes = first_cache() if intel else None
    return gemm_header(have, l2_bytes=_second_cache(), l1_bytes=l1_bytes, streams=intel)


def _second_cache() -> int:
    """Bytes of a core's."""
    return next((x.capacity_bytes for x in get_target("cpu").levels if x.name == "l2"), None) or 2**20


def grouped_unit(features: Collection[str] | None = None) -> str:
    """A file with the products of groups of rows: ``grouped_f32_nk``, ``_kn``, and bf16 where the CPU multiplies it.

    Each is ``int f(const i64* args, i64 threads)`` of the addresses and sizes of ``gemm::grouped``, in its order;
    ``nk`` takes right operands that lie along k.
    """
    have = get_target("cpu").features if features is None else features
    types = [("f32", "float"), *([("bf16", "u16")] if multiplies_bf16(have) else [])]
    lines = []
    for name, type_ in types:
        for order, along in (("nk", "true"), ("kn", "false")):
            lines += [
                f"EXPORT int grouped_{name}_{order}(const i64* x, i64 threads) {{",
                f"  return gemm::grouped<{type_}, {along}>((const {type_}*)x[0], x[1], (const {type_}*)x[2], x[3],",
                f"      x[4], (const i32*)x[5], ({type_}*)x[6], x[7], x[8], x[9], x[10], threads);",
                "}",
            ]
    return unit("gemm", lines)


def matmul(kernel: Kernel, features: Collection[str] | None = None) -> dict[str, Any]:
    """Context of ``matmul.cpp.j2``.

    Raises:
        TesselError: products of a dtype that has no kernel, or an operand that reads indices.
    """
    return _Writer(kernel, get_target("cpu").features if features is None else features).context()


class _Writer:
    """Writes the parts of one kernel."""

    def __init__(self, kernel: Kernel, features: Collection[str]) -> None:
        self.kernel, self.features = kernel, features
        self.batches = batch_axes(kernel)
        self.loops = {old: Axis(new, kernel.axis(old).extent, kernel.axis(old).kind) for old, new in _LOOPS.items()}
        place = {a.name: var(a.name, a.extent) for a in self.batches}
        place |= {old: var(a.name, a.extent) for old, a in self.loops.items()}
        self.space = Space((), (), place)
        self.where = points(self.batches, "x")
        self.known = [a.name for a in self.batches]
        self.dtype = self._dtype("a")
        self.half = self.dtype == torch.bfloat16 and multiplies_bf16(features)
        self.kind = torch.bfloat16 if self.half else torch.float32  # of what the tiles multiply
        self.past = _past(kernel) if self.half and has_matrix_unit(features) else frozenset()

    def _dtype(self, part: str) -> torch.dtype:
        provided = self.kernel.provides[part]
        made = [s for s in self.kernel.parts[part] if isinstance(provided, Ref) and _out(s) == provided.number]
        check(bool(made), lambda: f"{self.kernel.name}: part {part!r} provides a value that it does not compute")
        return made[0].dtype  # type: ignore[union-attr]

    def context(self) -> dict[str, Any]:
        kernel = self.kernel
        other = self._dtype("b")
        check(self.dtype in _DTYPES, lambda: f"{kernel.name}: {refusal(self.dtype)}")
        check(
            self.dtype == other, lambda: f"{kernel.name}: a product of {self.dtype} and {other}; cast one operand first"
        )
        m, n, k = (self.loops[x].extent for x in "mnk")
        left = self._direct("a", "k", "m", self.kind)
        turned = None
        if left is None and self.dtype == self.kind:
            turned = self._direct("a", "m", "k", self.kind)
        right = self._direct("b", "k", "n", self.dtype)
        along_k = right is not None
        right = right or self._direct("b", "n", "k", self.dtype)
        in_place = along_k and self.dtype == self.kind
        order = "nk" if along_k else "kn"
        if right is None:
            order = "nk" if self._lies_along_k() else "kn"
        pack = "wide" if not self.half and self.dtype == torch.bfloat16 and right else "bf16" if self.half else "f32"
        return {
            "element": "u16" if self.half else "float",
            "where": self.where,
            "a": left or turned or self._computed("a", "k", "m"),
            "b": right or (self._computed("b", "k", "n") if order == "nk" else self._computed("b", "n", "k")),
            "b_element": memory_type(self.dtype),
            "a_direct": left is not None,
            "a_turned": turned is not None,
            "b_direct": right is not None,
            "pack": f"pack_{pack}_{order}",
            "order": order,
            "forms": forms(self.features, m, n, self.half) if in_place else ["tiles"],
            "store": self._store(),
            "soon": self._soon(),
            "batch": size_text(product(a.extent for a in self.batches)),
            "m": size_text(m),
            "n": size_text(n),
            "k": size_text(k),
        }

    # ------------------------------------------------------------ operands

    def _direct(self, part: str, lane: str, rows: str, dtype: torch.dtype) -> dict[str, str] | None:
        """Where an operand begins, and the distance of its rows, if it lies in memory as wanted along ``lane``."""
        stmts, provided = self.kernel.parts[part], self.kernel.provides[part]
        stmt = next(s for s in stmts if isinstance(provided, Ref) and _out(s) == provided.number)
        if len(stmts) != 1 or not isinstance(stmt, Load) or stmt.access.mask or dtype == torch.float16:
            return None
        param = self.kernel.params[stmt.access.param]
        if not param.type.dtype == stmt.dtype == dtype:
            return None
        index = self.space.at(stmt.access.address(param))
        mine = {self.loops[lane].name, self.loops[rows].name}
        steps_: dict[str, Dim] = {}
        rest = []
        for atom, c in index.terms:
            if atom.kind == "var" and atom.name in mine:
                steps_[atom.name] = c
            elif atom.kind != "var" and (atom.arg is None or atom.arg.variables() & mine):
                return None
            else:
                rest.append((atom, c))
        if steps_.get(self.loops[lane].name, 1 if self.loops[lane].extent == 1 else 0) != 1:
            return None
        text, _ = Emitter(self.kernel, self.space).index(Index(tuple(rest), index.const))
        return {"at": f"{param.name} + {text}", "step": size_text(steps_.get(self.loops[rows].name, 0))}

    def _lies_along_k(self) -> bool:
        """Whether most of what a computed right operand reads lies along k."""
        votes = 0
        for s in self.kernel.parts["b"]:
            if isinstance(s, Load):
                index = self.space.at(s.access.address(self.kernel.params[s.access.param]))
                at = {a.name: c for a, c in index.terms if a.kind == "var"}
                votes += (at.get(_LOOPS["k"]) == 1) - (at.get(_LOOPS["n"]) == 1)
        return votes >= 0

    def _computed(self, part: str, lane: str, rows: str) -> dict[str, Any]:
        """How a row of an operand is computed, as elements of what the tiles multiply."""
        provided = self.kernel.provides[part]
        assert isinstance(provided, Ref)
        along, row = self.loops[lane], self.loops[rows]
        stmts = self.kernel.parts[part]
        e, wide = self._emitter(stmts, along, row.name, {})
        for s in stmts:
            e.emit(s)
        text, dims, dtype = e.values[provided.number]
        place = f"to + ({along.name} - begin)"
        kind = KINDS[self.kind]
        if wide:
            text = text if e.wide(dims) else f"all({text})"
            e.line(f"put_{kind}({place}, {wide_cast(text, dtype, compute_dtype(dtype))}, n);", dims | {along.name})
        else:
            word = f"to_bf16({text})" if self.half else text
            e.line(f"*({place}) = {word};", dims | {along.name})
        return {"row": row.name, "before": e.blocks[0], "loop": _loop(e, along, wide)}

    def _emitter(
        self, stmts: Sequence[Stmt], lane: Axis, row: str, dims: dict[int, frozenset[str]]
    ) -> tuple[Emitter, bool]:
        """An emitter for a loop over ``lane`` at a place ``row``, and whether its values are vectors."""
        wide = Along(self.kernel, self.space, lane.name, dict(dims)).all_wide(stmts, lane.extent)
        e = Emitter(self.kernel, self.space)
        e.nest([*self.known, row], [lane.name], wide)
        return e, wide

    # ------------------------------------------------------------ epilogue

    def _store(self) -> dict[str, Any]:
        lane = self.loops["n"]
        own = frozenset({lane.name})
        e, wide = self._emitter(self.kernel.body, lane, self.loops["m"].name, {ACC: own})
        text = f"sums[{lane.name} - begin]"
        if wide:
            text = f"get_float(sums + ({lane.name} - begin), n)"
        e.define(0, "acc", text, own, torch.float32)
        e.past = self.past
        e.values = {ACC: e.values[0]}
        for s in self.kernel.body:
            e.emit(s)
        return {"before": e.blocks[0], "loop": _loop(e, lane, wide)}

    def _soon(self) -> list[str]:
        """Asks for a row of what the epilogue reads beside the sums, and of what it writes.

        Rows of a tile are a few lines each and lie far apart: no CPU foresees that, and a tile takes microseconds.
        """
        row, lane = self.loops["m"].name, self.loops["n"].name
        asked: dict[str, int] = {}
        for s in self.kernel.body:
            if not isinstance(s, Load | Store) or s.access.mask or s.access.param in self.past:
                continue
            param = self.kernel.params[s.access.param]
            index = self.space.at(s.access.address(param))
            steps_ = {a.name: c for a, c in index.terms if a.kind == "var"}
            if len(steps_) == len(index.terms) and steps_.get(lane) == 1 and row in steps_:
                text, _ = Emitter(self.kernel, self.space).affine(index)
                asked[f"{param.name} + {text}, {int(isinstance(s, Store))}, 2"] = 64 // param.type.dtype.itemsize
        head = f"for (i64 {lane} = begin; {lane} < end; {lane} += "
        return [f"{head}{line}) __builtin_prefetch({at});" for at, line in asked.items()]


def _past(kernel: Kernel) -> frozenset[int]:
    """The results that the second caches do not hold, for products that take hardly longer than to write them.

    Stored past the caches, their lines are not read before they are written.
    """
    held = get_target("cpu").units * _second_cache()
    sizes = {i: product((*p.type.shape, p.type.dtype.itemsize)) for i, p in enumerate(kernel.params) if p.out}
    return frozenset(i for i, n in sizes.items() if isinstance(n, int) and n > held)


def _loop(e: Emitter, lane: Axis, wide: bool) -> list[str]:
    """The loop from ``begin`` to ``end`` over what was emitted."""
    if wide:
        return steps(lane, e.blocks[1])
    name = lane.name
    head = f"for (i64 {name} = begin; {name} < end; ++{name}) {{"
    return [simd({"|": ["bad"]} if e.flags else {}), head, *("  " + line for line in e.blocks[1]), "}"]


def _out(s: Stmt) -> int | None:
    return getattr(s, "out", None)
