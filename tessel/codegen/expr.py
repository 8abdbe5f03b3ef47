"""Statements of a tile program as lines of Triton.

An ``Emitter`` knows the tile it writes for: which variable stands for which axis, and along
which dims of the tile each variable runs. Every value then has *dims*, the tile dims it
varies along (none for a scalar), which decide what must be broadcast and which bounds a mask
must hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import sympy
import torch

from ..errors import check
from ..ir.node import Op
from ..ir.types import simplify_dim
from ..ops import OPS
from ..tiles.index import Atom, Cond, Index, bounds, nonnegative, substitute
from ..tiles.kernel import Access, Check, Compute, IndexOf, Kernel, Load, Ref, Stmt, Store, Test
from .dialect import cast, compute_dtype, literal, narrow, rounded, size_text, triton_dtype, widen
from .names import NONE, Dims, Lane, Names

# Arithmetic of booleans as torch has it; one-bit integers would wrap.
_BOOL_CODE = {
    "add": "({0} | {1})",
    "maximum": "({0} | {1})",
    "mul": "({0} & {1})",
    "minimum": "({0} & {1})",
    "abs": "{0}",
    "sign": "{0}",
    "relu": "{0}",
}

Scope: TypeAlias = "tuple[dict[int, tuple[str, Dims, torch.dtype]], dict[Atom, tuple[str, Dims]], dict[str, str]]"


class Emitter:
    """Writes statements for one tile.

    Args:
        kernel: whose statements.
        names: shared by all emitters of the kernel.
        axes: the kernel's axis names as indices over tile variables; an axis that is a
            tile variable itself is left out.
        lanes: the tile variables by name.
        shape: the size of each tile dim, as text.
        interpret: write for Triton's interpreter.
    """

    def __init__(
        self,
        kernel: Kernel,
        names: Names,
        axes: Mapping[str, Index],
        lanes: Mapping[str, Lane],
        shape: Sequence[str],
        interpret: bool,
    ) -> None:
        self.kernel, self.names, self.axes, self.lanes = kernel, names, dict(axes), dict(lanes)
        self.shape, self.interpret = tuple(shape), interpret
        # The interpreter broadcasts a scalar comparison wrongly, so there everything is a block.
        self.unit = ", ".join("1" for _ in shape) if interpret else ""
        self.lines: list[str] = []
        self.values: dict[int, tuple[str, Dims, torch.dtype]] = {}  # by number
        self.atoms: dict[Atom, tuple[str, Dims]] = {}  # hoisted pieces of indices
        self.masks: dict[str, str] = {}  # hoisted masks by text
        self.raw: set[int] = set()  # loads kept in memory's dtype: operands of a dot
        self._indices: dict[Index, Index] = {}

    def define(self, number: int, text: str, dims: Dims, dtype: torch.dtype) -> None:
        """Make a value known under a name (an accumulator, a reduced value)."""
        self.values[number] = (text, dims, dtype)

    def scope(self) -> Scope:
        """What is known now, for ``restore`` at the end of a loop."""
        return dict(self.values), dict(self.atoms), dict(self.masks)

    def restore(self, scope: Scope) -> None:
        values, atoms, masks = scope
        self.values, self.atoms, self.masks = dict(values), dict(atoms), dict(masks)

    def take(self) -> list[str]:
        """The lines written so far, which are then forgotten."""
        lines, self.lines = self.lines, []
        return lines

    # ------------------------------------------------------------ indices

    def resolve(self, index: Index) -> Index:
        """The index over tile variables."""
        got = self._indices.get(index)
        if got is None:
            got = substitute(index, lambda a: self.axes.get(a.name) if a.kind == "var" else None)
            self._indices[index] = got
        return got

    def index(self, index: Index) -> tuple[str, Dims]:
        """Text and dims of an index over the kernel's axes."""
        return self._affine(self.resolve(index))

    def hoist(self, indices: Iterable[Index], dims: Dims) -> None:
        """Name those divisions and remainders of indices that vary along ``dims`` only, ahead of a loop."""
        for index in indices:
            todo = [self.resolve(index)]
            while todo:
                for atom, _ in todo.pop().terms:
                    if atom.arg is None:
                        continue
                    if not any(a.kind == "value" for a in atom.arg.atoms()) and self._dims(atom) <= dims:
                        named = self._atom(atom)
                        if not named[1]:
                            self.names.shared[atom] = named
                    else:
                        todo.append(atom.arg)

    def _dims(self, atom: Atom) -> Dims:
        assert atom.arg is not None
        return frozenset(d for a in atom.arg.atoms() if a.kind == "var" for d in self.lanes[a.name].dims)

    def _affine(self, index: Index) -> tuple[str, Dims]:
        parts: list[str] = []
        dims = NONE
        for atom, c in sorted(index.terms, key=lambda t: t[1] == 1):  # the contiguous axis last
            text, d = self._atom(atom)
            dims |= d
            minus = isinstance(c, int) and c < 0
            factor = -c if minus else c
            if factor != 1:
                text = f"{text} * {size_text(factor)}"
            parts.append(f"- {text}" if minus else f"+ {text}")
        if index.const != 0 or not parts:
            minus = isinstance(index.const, int) and index.const < 0
            text = size_text(-index.const if minus else index.const)
            parts.append(f"- {text}" if minus else f"+ {text}")
        if parts[0].startswith("+ "):
            parts[0] = parts[0][2:]
        elif len(index.terms) > 0:  # lead with a term that is added, or negate the first
            lead = next((i for i, p in enumerate(parts) if p.startswith("+")), None)
            if lead is not None:
                first = parts.pop(lead)
                parts.insert(0, first[2:])
            else:
                parts[0] = "-" + parts[0][2:]
        return " ".join(parts), dims

    def _atom(self, atom: Atom) -> tuple[str, Dims]:
        if atom.kind == "var":
            check(atom.name in self.lanes, lambda: f"{self.kernel.name}: no axis {atom.name!r} at this place")
            lane = self.lanes[atom.name]
            return lane.text, lane.dims
        for known in (self.atoms, self.names.shared):
            if atom in known:
                return known[atom]
        if atom.kind == "value":
            text, dims, _ = self.values[int(atom.name)]
            name = self._named(atom, f"{text}_at")
            self.lines.append(f"{name} = {text}.to(INDEX)")
        else:
            assert atom.arg is not None
            text, dims = self._affine(atom.arg)
            name = self._named(atom, "i")
            inner = text if text.isidentifier() else f"({text})"
            n = size_text(atom.n)
            least = bounds(atom.arg)
            if least is None or not nonnegative(least[0]):  # the machine rounds towards zero, an index down
                rest = f"({inner} % {n} + {n}) % {n}"
                self.lines.append(f"{name} = " + (f"({inner} - {rest}) // {n}" if atom.kind == "div" else rest))
            else:
                self.lines.append(f"{name} = {inner} {'//' if atom.kind == 'div' else '%'} {n}")
        self.atoms[atom] = name, dims
        return name, dims

    def _named(self, key: object, base: str) -> str:
        """The name of ``key``, the same in every loop that writes it."""
        key = (id(self), key)
        if key not in self.names.known:
            self.names.known[key] = self.names.numbered(base) if base == "i" else self.names.fresh(base)
        return self.names.known[key]

    # ------------------------------------------------------------ conditions

    def conds(self, conds: Iterable[Cond]) -> tuple[list[str], Dims]:
        """Texts whose conjunction is the conditions; what is provable is left out."""
        texts: list[str] = []
        dims = NONE
        for cond in conds:
            index = self.resolve(cond.index)
            if Cond(index, cond.low, cond.high).always():
                continue
            text, d = self._affine(index)
            dims |= d
            if self.interpret and not index.terms:
                text = f"tl.full([{self.unit}], {text}, INDEX)"
            text = text if text.isidentifier() else f"({text})"
            low, high = cond.low, cond.high
            got = bounds(index)
            if low is not None and not (got is not None and nonnegative(simplify_dim(got[0] - low))):
                texts.append(f"({text} >= {size_text(low)})")
            if high is not None and not (got is not None and nonnegative(simplify_dim(high - 1 - got[1]))):
                texts.append(f"({text} < {size_text(high)})")
        return list(dict.fromkeys(texts)), dims

    def mask(self, conds: Iterable[Cond], dims: Dims) -> tuple[str | None, Dims]:
        """A mask of conditions and of the tile's bounds along all dims that an access varies along."""
        texts, own = self.conds(conds)
        dims |= own
        if texts:
            text = " & ".join(texts)
            if text not in self.masks:
                name = self._named(("mask", text), "mask")
                self.lines.append(f"{name} = {_bare(text)}")
                self.masks[text] = name
            texts = [self.masks[text]]
        bound = [lane.ok for lane in self.lanes.values() if lane.ok and lane.dims & dims]
        whole = list(dict.fromkeys([*bound, *texts]))
        return (" & ".join(whole) if whole else None), dims

    def spread(self, text: str, have: Dims, want: Dims) -> str:
        """A value given every dim of ``want``."""
        if want <= have:
            return text
        return f"tl.broadcast_to({text}, [{self.shape_of(want)}])"

    def shape_of(self, dims: Dims) -> str:
        """The shape of a block that runs along ``dims`` only."""
        return ", ".join(s if i in dims else "1" for i, s in enumerate(self.shape))

    def pointer(self, access: Access, want: Dims) -> str:
        """The address of an access as a block along ``want``."""
        param = self.kernel.params[access.param]
        index = self.resolve(access.address(param))
        text, have = self._affine(index)
        if not index.terms and (want or self.interpret):
            text = f"tl.full([{self.shape_of(want)}], {text}, INDEX)"
        else:
            text = self.spread(text, have, want)
        if text == "0":
            return f"{param.name}_ptr"
        return f"{param.name}_ptr + " + (text if text.isidentifier() or text.startswith("tl.") else f"({text})")

    # ------------------------------------------------------------ statements

    def emit(self, stmt: Stmt) -> None:
        """Append the lines of one statement (reductions are the template's business)."""
        if isinstance(stmt, Load):
            self._load(stmt)
        elif isinstance(stmt, Store):
            self._store(stmt)
        elif isinstance(stmt, Compute):
            self._compute(stmt)
        elif isinstance(stmt, IndexOf):
            text, dims = self.index(stmt.index)
            if self.resolve(stmt.index).terms:
                text = f"{text if text.isidentifier() else f'({text})'}.to({triton_dtype(compute_dtype(stmt.dtype))})"
            else:
                text = f"tl.full([{self.unit}], {text}, {triton_dtype(compute_dtype(stmt.dtype))})"
            self.assign(stmt.out, "iota", rounded(text, stmt.dtype, self.interpret), dims, stmt.dtype)
        elif isinstance(stmt, Test):
            texts, dims = self.conds(stmt.conds)
            text = " & ".join(texts) or literal(True, torch.bool, True, self.unit)
            self.assign(stmt.out, "test", _bare(text), dims, torch.bool)
        elif isinstance(stmt, Check):
            self._check(stmt)
        else:
            check(False, lambda: f"{self.kernel.name}: {type(stmt).__name__} at a place that has no reduced axis")

    def assign(self, number: int, base: str, text: str, dims: Dims, dtype: torch.dtype) -> None:
        name = self.value_name(number, base)
        self.lines.append(f"{name} = {text}")
        self.values[number] = name, dims, dtype

    def value_name(self, number: int, base: str) -> str:
        """The name of a value, made from ``base`` the first time."""
        key = (id(self), number)
        if key not in self.names.known:
            self.names.known[key] = self.names.numbered(base)
        return self.names.known[key]

    def _load(self, stmt: Load) -> None:
        access, param = stmt.access, self.kernel.params[stmt.access.param]
        _, dims = self.index(access.address(param))
        mask, wide = self.mask(access.mask, dims)
        pointer = self.pointer(access, wide)
        text = f"tl.load({pointer})"
        if mask is not None:
            text = f"tl.load({pointer}, mask={mask}, other={_other(access, param.type.dtype)})"
        if stmt.out not in self.raw:
            text = widen(text, param.type.dtype, self.interpret)
            if stmt.dtype != param.type.dtype:
                text = cast(text, param.type.dtype, stmt.dtype, self.interpret)
        key = (id(self), stmt.out)
        if key not in self.names.known:
            self.names.known[key] = self.names.fresh(param.name)
        name = self.names.known[key]
        self.lines.append(f"{name} = {text}")
        self.values[stmt.out] = name, wide, stmt.dtype

    def operand(self, arg: object, dtype: torch.dtype, typed: bool) -> tuple[str, Dims]:
        """An operand's text and dims."""
        if isinstance(arg, Ref):
            text, dims, _ = self.values[arg.number]
            return text, dims
        return literal(arg, dtype, typed, self.unit), NONE

    def _compute(self, stmt: Compute) -> None:
        if stmt.op == "cast":
            held, dims = self.operand(stmt.args[0], stmt.arg_dtype, True)
            text = cast(held, stmt.arg_dtype, stmt.dtype, self.interpret)
            if text == held and held.isidentifier():  # widened already
                self.values[stmt.out] = held, dims, stmt.dtype
            else:
                self.assign(stmt.out, "cast", text, dims, stmt.dtype)
            return
        op: Op = OPS[stmt.op]
        code = _BOOL_CODE.get(stmt.op) if stmt.arg_dtype == torch.bool else None
        code = code or op.code.get("triton")
        check(code is not None, lambda: f"op {op.name} has no Triton code; keep it a library call")
        assert code is not None
        values = stmt.args[1:] if stmt.op == "where" else stmt.args
        # A bare number takes its dtype from the value beside it; a helper function asks for its dtype.
        typed = "tessel_" in code or not any(isinstance(a, Ref) for a in values)
        texts: list[str] = []
        dims = NONE
        for i, arg in enumerate(stmt.args):
            dtype = torch.bool if stmt.op == "where" and i == 0 else stmt.arg_dtype
            text, d = self.operand(arg, dtype, typed)
            texts.append(f"({text})" if text.startswith("-") else text)
            dims |= d
        self.assign(stmt.out, stmt.op, _bare(code.format(*texts)), dims, stmt.dtype)

    def _check(self, stmt: Check) -> None:
        text, dims, _ = self.values[stmt.arg.number]
        mask, _ = self.mask(stmt.mask, dims)
        good = f"({text} >= 0) & ({text} < {size_text(stmt.high)})"
        if mask is not None:
            good = f"({good}) | ({mask if mask.isidentifier() else f'({mask})'} == 0)"
        fn = "check_bound" if self.interpret else "tl.device_assert"
        self.lines.append(f"{fn}({good}, {_message(stmt.message)})")

    def _store(self, stmt: Store) -> None:
        access, param = stmt.access, self.kernel.params[stmt.access.param]
        _, have = self.index(access.address(param))
        text, dims = self.operand(stmt.arg, stmt.dtype, True)
        _, dims_of_mask = self.conds(access.mask)
        want = have | dims | dims_of_mask
        mask, want = self.mask(access.mask, want)
        pointer = self.pointer(access, want)
        if stmt.dtype != param.type.dtype:
            text = cast(text, stmt.dtype, compute_dtype(param.type.dtype), self.interpret)
        text = narrow(text, param.type.dtype, self.interpret)
        self.lines.append(f"tl.store({pointer}, {text}{f', mask={mask}' if mask else ''})")


def _other(access: Access, dtype: torch.dtype) -> str:
    """What a masked-off element of a load is, a number that memory's dtype holds."""
    value = access.other if access.mask else 0
    if not isinstance(value, sympy.Basic) and dtype.is_floating_point:
        value = float(torch.tensor(value, dtype=torch.float64).to(dtype))
    return literal(value, dtype, False)


def _bare(text: str) -> str:
    """Without one pair of brackets that encloses everything."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1]


def _message(text: str) -> str:
    """A string literal: plain ASCII, and without the place in brackets, which the header names.

    So no user's text reaches code, and equal kernels stay equal.
    """
    text = text.split(" (")[0]
    kept = "".join(c if c.isascii() and c.isprintable() and c not in '"\\{}%' else "?" for c in text)
    return f'"{kept}"'
