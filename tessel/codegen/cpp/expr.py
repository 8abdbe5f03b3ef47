"""Statements of a tile program as lines of C++, each at the outermost loop where it can stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...errors import TesselError, check
from ...ir.types import simplify_dim
from ...ops import OPS
from ...tiles.index import Atom, Cond, Index, bounds, nonnegative
from ...tiles.kernel import Access, Check, Compute, IndexOf, Kernel, Load, Ref, Stmt, Store, Test, refs
from ..dialect import compute_dtype
from .space import Space
from .vector import KINDS, rough, wide_cast
from .words import cast, literal, loaded, memory_type, size_text, stored, value_type

__all__ = ["Emitter"]

# Arithmetic of booleans as torch has it.
_BOOL_CODE = {
    "add": "({0} | {1})",
    "maximum": "({0} | {1})",
    "mul": "({0} & {1})",
    "minimum": "({0} & {1})",
    "abs": "{0}",
    "sign": "{0}",
    "relu": "{0}",
}
# Powers that eager computes without a power function.
_POWERS = {
    0.0: "({one})",
    0.5: "tessel::sqrt({x})",
    -0.5: "({one} / tessel::sqrt({x}))",
    1.0: "({x})",
    -1.0: "({one} / {x})",
    2.0: "({x} * {x})",
    -2.0: "({one} / ({x} * {x}))",
    3.0: "({x} * {x} * {x})",
}
_DIVIDES = frozenset({"floor_div", "trunc_div", "fmod", "remainder"})

Dims = frozenset[str]


class Emitter:
    """Writes statements into the blocks of one loop nest at a time.

    Attributes:
        blocks: lines per depth of the nest; block 0 stands before its first loop.
        values: number of a value -> its text, the loops it varies along, its dtype.
        flags: whether statements written since ``nest`` set ``bad``.
        lane: the loop along which values are vectors, of which ``n`` tells how many lanes count.
    """

    def __init__(self, kernel: Kernel, space: Space) -> None:
        self.kernel, self.space = kernel, space
        self.values: dict[int, tuple[str, Dims, torch.dtype]] = {}
        self.blocks: list[list[str]] = [[]]
        self.known: list[Dims] = [frozenset()]
        self.flags = False
        self.lane: str | None = None  # the loop whose values are vectors
        self.copies: dict[str, str] = {}  # elements of memory that lie in a local copy, by text
        self.read: set[int] = set()  # values that are elements of memory, at most converted
        self.past: frozenset[int] = frozenset()  # parameters that are too large for any cache
        self.pairs = False  # whether vectors of the loop ``lane`` may come in pairs
        self.rough = rough(kernel)  # values that need few digits
        floats = {p.type.dtype for p in kernel.params if p.type.dtype.is_floating_point}
        self.upper_nans = floats == {torch.bfloat16}  # no NaN has anything in its lower 16 bits

    def nest(self, outer: Iterable[str], loops: Sequence[str], wide: bool = False, pairs: bool = False) -> None:
        """Start a nest of loops over the variables ``loops``; those in ``outer`` have a value already.

        With ``wide`` the last loop goes in steps of a vector, and with ``pairs`` in steps of two; see
        ``vector.Along.all_wide`` and ``in_pairs``.
        """
        self.lane, self.pairs = loops[-1] if wide else None, pairs
        known = frozenset(outer)
        self.blocks, self.known, self.flags = [[]], [known], False
        for name in loops:
            known |= {name}
            self.blocks.append([])
            self.known.append(known)

    def line(self, text: str, dims: Dims) -> None:
        """Put a line into the outermost block where all of ``dims`` are known."""
        for block, known in zip(self.blocks, self.known, strict=True):
            if dims <= known:
                block.append(text)
                return
        raise TesselError(f"{self.kernel.name}: no loop over {sorted(dims - self.known[-1])} at this place")

    # ------------------------------------------------------------ indices

    def index(self, index: Index) -> tuple[str, Dims]:
        """Text and loops of an index over the tile program's axes."""
        return self.affine(self.space.at(index))

    def affine(self, index: Index) -> tuple[str, Dims]:
        """Text and loops of an index over the kernel's loops."""
        parts: list[str] = []
        dims: Dims = frozenset()
        for atom, c in index.terms:
            text, d = self._atom(atom)
            dims |= d
            parts.append(text if c == 1 else f"{text} * {size_text(c)}")
        if index.const != 0 or not parts:
            parts.append(size_text(index.const))
        return " + ".join(parts), dims

    def _atom(self, atom: Atom) -> tuple[str, Dims]:
        if atom.kind == "var":
            return atom.name, frozenset({atom.name})
        if atom.kind == "value":
            text, dims, _ = self.values[int(atom.name)]
            return f"within({text}, {size_text(atom.n)})", dims
        assert atom.arg is not None
        inner, dims = self.affine(atom.arg)
        n = size_text(atom.n)
        least = bounds(atom.arg)
        if least is None or not nonnegative(least[0]):  # the machine rounds towards zero, an index down
            rest = f"((({inner}) % {n} + {n}) % {n})"
            return (rest if atom.kind == "mod" else f"((({inner}) - {rest}) / {n})"), dims
        return f"(({inner}) {'/' if atom.kind == 'div' else '%'} {n})", dims

    def conds(self, conds: Iterable[Cond]) -> tuple[str, Dims]:
        """The conjunction of conditions, empty where it is known to hold."""
        texts: list[str] = []
        dims: Dims = frozenset()
        for cond in conds:
            index = self.space.at(cond.index)
            got = bounds(index)
            text, d = self.affine(index)
            if cond.low is not None and not (got and nonnegative(simplify_dim(got[0] - cond.low))):
                texts.append(f"({text} >= {size_text(cond.low)})")
                dims |= d
            if cond.high is not None and not (got and nonnegative(simplify_dim(cond.high - 1 - got[1]))):
                texts.append(f"({text} < {size_text(cond.high)})")
                dims |= d
        return " & ".join(dict.fromkeys(texts)), dims

    def element(self, access: Access) -> tuple[str, Dims]:
        param = self.kernel.params[access.param]
        text, dims = self.index(access.address(param))
        return f"{param.name}[{text}]", dims

    # ------------------------------------------------------------ statements

    def define(self, number: int, base: str, text: str, dims: Dims, dtype: torch.dtype) -> None:
        """A new value, held in a constant."""
        name = f"{base}{number}"
        vector = "auto" if self.pairs else "vi" if dtype == torch.bool else "vf"
        type_ = vector if self.wide(dims) else value_type(dtype)
        self.line(f"const {type_} {name} = {text};", dims)
        self.values[number] = name, dims, dtype

    def wide(self, dims: Dims) -> bool:
        """Whether a value that varies along these loops is a vector."""
        return self.lane is not None and self.lane in dims

    def pointer(self, access: Access) -> tuple[str, Dims]:
        param = self.kernel.params[access.param]
        text, dims = self.index(access.address(param))
        return f"{param.name} + {text}", dims

    def operand(self, arg: object, dtype: torch.dtype) -> tuple[str, Dims]:
        if isinstance(arg, Ref):
            text, dims, _ = self.values[arg.number]
            return text, dims
        return literal(arg, dtype), frozenset()

    def emit(self, stmt: Stmt) -> None:
        """Write one statement (reductions are the caller's business)."""
        if isinstance(stmt, Load):
            self._load(stmt)
        elif isinstance(stmt, Store):
            self._store(stmt)
        elif isinstance(stmt, Compute):
            self._compute(stmt)
        elif isinstance(stmt, IndexOf):
            text, dims = self.index(stmt.index)
            self.define(stmt.out, "at", cast(text, torch.int64, stmt.dtype), dims, stmt.dtype)
        elif isinstance(stmt, Test):
            text, dims = self.conds(stmt.conds)
            self.define(stmt.out, "test", text or "true", dims, torch.bool)
        elif isinstance(stmt, Check):
            text, dims, _ = self.values[stmt.arg.number]
            mask, more = self.conds(stmt.mask)
            wrong = f"((u64){text} >= (u64){size_text(stmt.high)})"
            self._flag(f"{mask} & {wrong}" if mask else wrong, "OUT_OF_RANGE", dims | more)
        else:
            check(False, lambda: f"{self.kernel.name}: {type(stmt).__name__} at a place that has no reduced loop")

    def _flag(self, when: str, reason: str, dims: Dims) -> None:
        self.line(f"bad |= ({when}) ? {reason} : 0;", dims)
        self.flags = True

    def _load(self, stmt: Load) -> None:
        access = stmt.access
        dtype = self.kernel.params[access.param].type.dtype
        text, dims = self.element(access)
        wide = self.wide(dims)
        if wide:
            place = f"&{self.copies[text]}" if text in self.copies else self.pointer(access)[0]
            text = f"get_{KINDS[dtype]}({place}, n)"
        else:
            text = loaded(self.copies.get(text, text), dtype)
        mask, more = self.conds(access.mask)
        if mask:
            other = access.other
            if dtype.is_floating_point and isinstance(other, int | float):
                other = float(torch.tensor(other, dtype=torch.float64).to(dtype))
            rest = literal(other, dtype)
            text = f"({mask}) ? {text} : {f'all({rest})' if wide else rest}"
        if stmt.dtype != dtype:
            text = (wide_cast if wide else cast)(f"({text})", dtype, stmt.dtype)
        self.read.add(stmt.out)
        self.define(stmt.out, "v", text, dims | more, stmt.dtype)

    def _computed(self, arg: object) -> bool:
        """Whether a value is the result of arithmetic, and so need not be rounded bit by bit as a copy must."""
        return isinstance(arg, Ref) and arg.number not in self.read

    def _store(self, stmt: Store) -> None:
        dtype = self.kernel.params[stmt.access.param].type.dtype
        place, dims = self.element(stmt.access)
        found = [self.values[int(a.name)][1] for c in stmt.access.coords for a in c.atoms() if a.kind == "value"]
        if found:  # nothing is written where it does not belong
            self.line("if (bad) return bad;", frozenset().union(*found))
        text, more = self.operand(stmt.arg, stmt.dtype)
        mask, last = self.conds(stmt.access.mask)
        guard = f"if ({mask}) " if mask else ""
        if self.wide(dims | more):
            text = text if self.wide(more) else f"all({text})"
            text = wide_cast(text, stmt.dtype, compute_dtype(dtype))
            near = "near_" if dtype == torch.bfloat16 and self._computed(stmt.arg) else ""
            past = "past_" if stmt.access.param in self.past else ""
            put = f"put_{past}{near}{KINDS[dtype]}({self.pointer(stmt.access)[0]}, {text}, n);"
            self.line(f"{guard}{put}", dims | more | last)
            return
        if stmt.dtype != dtype:
            text = cast(text, stmt.dtype, compute_dtype(dtype))
        self.line(f"{guard}{place} = ({memory_type(dtype)}){stored(text, dtype)};", dims | more | last)

    def _compute(self, stmt: Compute) -> None:
        texts: list[str] = []
        dims: Dims = frozenset()
        every: list[Dims] = []
        for i, arg in enumerate(stmt.args):
            text, d = self.operand(arg, torch.bool if stmt.op == "where" and i == 0 else stmt.arg_dtype)
            texts.append(text)
            every.append(d)
            dims |= d
        if self.wide(dims):
            texts = [t if self.wide(d) else f"all({t})" for t, d in zip(texts, every, strict=True)]
        if stmt.op == "cast":
            text = (wide_cast if self.wide(dims) else cast)(texts[0], stmt.arg_dtype, stmt.dtype)
            if not self._computed(stmt.args[0]):
                self.read.add(stmt.out)
            elif self.wide(dims) and text.startswith("round_bf16("):
                how = "rough" if self.upper_nans and self.rough.made.issuperset(refs(stmt)) else "near"
                text = text.replace("round_", f"round_{how}_", 1)
            if text == texts[0]:
                self.values[stmt.out] = text, dims, stmt.dtype
            else:
                self.define(stmt.out, "cast", text, dims, stmt.dtype)
            return
        whole = not stmt.arg_dtype.is_floating_point
        if stmt.op in _DIVIDES and whole and stmt.args[1] in (0, *(a for a in stmt.args[1:] if isinstance(a, Ref))):
            self._flag(f"{texts[1]} == 0", "DIVIDED_BY_ZERO", dims)
        text = self._expression(stmt, texts)
        if self.wide(dims) and stmt.out in self.rough.bits:
            text = f"rough{self.rough.bits[stmt.out]}_{stmt.op}({texts[0]})"
        self.define(stmt.out, f"{stmt.op}_", text, dims, stmt.dtype)

    def _expression(self, stmt: Compute, texts: list[str]) -> str:
        type_ = value_type(stmt.dtype)
        if stmt.op == "pow" and type_ in ("float", "double") and isinstance(stmt.args[1], int | float):
            code = _POWERS.get(float(stmt.args[1]))
            if code is not None:
                return code.format(x=texts[0], one=literal(1, stmt.dtype))
        code = _BOOL_CODE.get(stmt.op) if stmt.arg_dtype == torch.bool else None
        code = code or OPS[stmt.op].code.get("cpp")
        check(code is not None, lambda: f"op {stmt.op} has no C++ code; keep it a library call")
        assert code is not None
        text = code.format(*texts)
        narrow = type_ in ("i8", "i16", "u8") or (type_ == "i32" and stmt.op != "where")
        return f"({type_}){text}" if narrow else text
