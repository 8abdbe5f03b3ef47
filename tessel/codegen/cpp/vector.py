"""Which loops are written with vectors, not left to the compiler's vectorizer, and the words for it.

A loop is where every value that varies along it is a float of at most 32 bits or a condition, and memory is read
and written side by side. The compiler then has nothing to find out, tails are masked, and functions are those of
the header's vectors: about half the instructions of what a vectorizer makes of the scalar ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from ...ir.types import Dim, product
from ...ops import OPS
from ...targets import get_target
from ...tiles.index import Cond, Index
from ...tiles.kernel import Check, Compute, IndexOf, Kernel, Load, Param, Reduce, Ref, Scan, Stmt, Store, Test, refs
from .space import Space

__all__ = [
    "FOLDS",
    "KINDS",
    "Along",
    "Rough",
    "asked_into",
    "first_cache",
    "fold_step",
    "from_memory",
    "last_cache",
    "rough",
    "too_large",
    "unroll",
    "wide_cast",
]

_OWN_CACHE = 16 * 2**20  # bytes of it a CPU; the largest (3D V-Cache) have 12 MiB a core
KINDS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16", torch.bool: "bool"}
_FUNCTIONS = """abs sign maximum minimum relu exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tanh
erf sigmoid floor ceil round trunc copysign isnan isinf floor_pow2"""
_OPERATORS = "add sub mul div neg eq ne lt le gt ge logical_and logical_or logical_xor logical_not where cast copy"
_OPS = frozenset((_FUNCTIONS + " " + _OPERATORS).split())
_OF_BOOL = frozenset(
    """add mul maximum minimum abs relu eq ne logical_and logical_or logical_xor logical_not bitwise_and bitwise_or
    bitwise_xor bitwise_not cast copy""".split()
)
_OF_PAIRS = frozenset(
    """abs maximum minimum relu exp exp2 sqrt rsqrt reciprocal tanh erf sigmoid floor ceil round trunc copysign add sub
    mul div neg cast copy pow floor_pow2""".split()
)
_KEEP_PARTS = frozenset("mul div neg abs cast copy".split())  # the result is as far off, in parts of it, as an operand
_ROUGH = frozenset({"exp", "exp2", "sigmoid"})
FOLDS = {"sum": "total", "amax": "most", "amin": "least"}  # a vector of partial results made one


@dataclass
class Along:
    """What varies along the innermost loop.

    Attributes:
        dims: number of a value -> the loops it varies along; those of this loop's statements are added.
        copied: loads that find their elements in a local copy, side by side.
    """

    kernel: Kernel
    space: Space
    lane: str
    dims: dict[int, frozenset[str]]
    copied: frozenset[int] = frozenset()

    def all_wide(self, stmts: Iterable[Stmt], extent: Dim) -> bool:
        """Whether the statements of a loop can be written with vectors, and are worth it."""
        if isinstance(extent, int) and extent < 16:
            return False
        each = [self._wide(s) for s in stmts]  # of every one: later ones need to know what it varies along
        return all(each)

    def in_pairs(self, stmts: Iterable[Stmt]) -> bool:
        """Whether a loop for which ``all_wide`` holds is best done two vectors at a time, even and odd elements apart.

        All that lies along it in memory is bfloat16, and no value is a condition.
        """
        some = False
        for s in stmts:
            along = self.lane in (self.dims.get(s.out, ()) if hasattr(s, "out") else (self.lane,))
            if isinstance(s, Load | Store) and along:
                if (
                    self.kernel.params[s.access.param].type.dtype != torch.bfloat16
                    or getattr(s, "out", -1) in self.copied
                ):
                    return False
                some = True
            elif isinstance(s, Compute) and along:
                floats = {s.dtype, s.arg_dtype} <= {torch.float32, torch.bfloat16}
                if not floats or s.op not in _OF_PAIRS:
                    return False
            elif isinstance(s, Scan):
                return False
        return some

    def step(self, index: Index) -> int | None:
        """How far memory moves from one point to the next: 0, 1, or another distance (None)."""
        step = 0
        for atom, c in self.space.at(index).terms:
            if atom.kind == "var" and atom.name == self.lane:
                if c != 1:
                    return None
                step = 1
            elif self.lane in self._varies(atom):
                return None
        return step

    def _varies(self, atom: object) -> frozenset[str]:
        kind, name, arg = atom.kind, atom.name, atom.arg  # type: ignore[attr-defined]
        if kind == "var":
            return frozenset({name})
        if kind == "value":
            return self.dims.get(int(name), frozenset())
        return self._index(arg)

    def _index(self, index: Index) -> frozenset[str]:
        return frozenset().union(*(self._varies(a) for a, _ in index.terms))

    def _conds(self, conds: Iterable[Cond]) -> frozenset[str]:
        return frozenset().union(*(self._index(self.space.at(c.index)) for c in conds))

    def _wide(self, s: Stmt) -> bool:
        dims = frozenset().union(*(self.dims.get(n, frozenset()) for n in refs(s)))
        if isinstance(s, Load | Store):
            param = self.kernel.params[s.access.param]
            index = s.access.address(param)
            masks = self._conds(s.access.mask)
            dims |= self._index(self.space.at(index)) | masks
            step = self.step(index)
            if isinstance(s, Load):
                self.dims[s.out] = dims
                if self.lane not in dims:
                    return True
                step = 1 if s.out in self.copied else step
            plain = step == 1 and self.lane not in masks
            return plain and param.type.dtype in KINDS and s.dtype in KINDS
        if isinstance(s, IndexOf):
            self.dims[s.out] = self._index(self.space.at(s.index))
            return self.lane not in self.dims[s.out]
        if isinstance(s, Test):
            self.dims[s.out] = self._conds(s.conds)
            return self.lane not in self.dims[s.out]
        if isinstance(s, Check):
            return self.lane not in dims | self._conds(s.mask)
        if isinstance(s, Reduce):
            return s.op in FOLDS and s.arg_dtype in KINDS and s.arg_dtype != torch.bool and s.dtype in KINDS
        if isinstance(s, Scan):  # there is a state for every lane, whatever its operands vary along
            self.dims[s.out] = dims | {self.lane}
            return s.dtype == torch.float32 and s.fold in ("", "amax", "amin")  # others keep more digits
        assert isinstance(s, Compute)
        self.dims[s.out] = dims
        if self.lane not in dims:
            return True
        if s.dtype not in KINDS or s.arg_dtype not in KINDS:
            return False
        if s.op == "pow":
            power = s.args[1]
            return not isinstance(power, Ref) and power in (0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0, 3.0)
        return s.op in (_OF_BOOL if s.arg_dtype == torch.bool and s.op != "where" else _OPS)


@dataclass(frozen=True)
class Rough:
    """What of a kernel need not be exact, because all that is made of it is rounded to 8 or 11 bits.

    Such values reach the rounding through products and quotients alone, few of them at a time: a sum of two could be
    much smaller than either, and a product is off by as much as its factors together.

    Attributes:
        bits: number of a value by a function that has a rough form -> the bits it is rounded to, 8 or 11.
        made: those values, and what is made of them on the way to the rounding.
    """

    bits: dict[int, int]
    made: frozenset[int]


_BITS = {torch.bfloat16: 8, torch.float16: 11}
_FACTORS = ((8, 2), (11, 8))  # rounded to so many bits, so many rough factors are lost in it
_EXACT = 24  # bits of a value that is not rounded, or by way of a sum


def rough(kernel: Kernel) -> Rough:
    """See ``Rough``."""
    users: dict[int, list[Stmt]] = {}
    factors: dict[int, int] = {}  # of a value, those that may be rough
    for s in kernel.body:
        for n in refs(s):
            users.setdefault(n, []).append(s)
        if isinstance(s, Compute) and s.op in _ROUGH and s.arg_dtype == torch.float32:
            factors[s.out] = 1
        elif isinstance(s, Compute) and s.op in _KEEP_PARTS and not _rounds(s):
            factors[s.out] = sum(factors.get(a.number, 0) for a in s.args if isinstance(a, Ref))

    def kept(s: Stmt, n: int) -> int:
        """The bits of an operand that matter to a statement."""
        if isinstance(s, Store) or (isinstance(s, Compute) and _rounds(s)):
            to = s.dtype if isinstance(s, Compute) else kernel.params[s.access.param].type.dtype
            fit = (b for b, most in _FACTORS if b >= _BITS.get(to, _EXACT) and factors.get(n, 0) <= most)
            return next(fit, _EXACT)
        return needed(s.out) if isinstance(s, Compute) and s.op in _KEEP_PARTS else _EXACT

    @cache
    def needed(n: int) -> int:
        return max((kept(s, n) for s in users.get(n, ())), default=_EXACT)

    made = {n for n, count in factors.items() if count and needed(n) < _EXACT}
    ours = (s for s in kernel.body if isinstance(s, Compute) and s.op in _ROUGH and s.out in made)
    return Rough({s.out: needed(s.out) for s in ours}, frozenset(made))


def _rounds(s: Compute) -> bool:
    return s.op == "cast" and s.dtype in _BITS


PAGE = 4096  # bytes


@cache
def first_cache() -> int:
    """Bytes of this machine's first cache of a core, 0 where the system does not tell."""
    return min(_caches(), default=0)


@cache
def foresees_little() -> bool:
    """Whether this CPU is to be asked for all that it reads from memory, which others bring by themselves: an Intel's.

    On a Granite Rapids sums of bf16 took 0.7 of the time so, ``silu * gate`` 0.67, both at 0.94 of what streams get.
    """
    return any("Intel" in name for name in get_target("cpu").device_names)


def asked_into(early: int) -> str:
    """What ``__builtin_prefetch`` is told of the cache that a line asked for ``early`` bytes before its turn is to come
    into: the first, where all asked for so far fill no more than a third of it, else the second. In the first they
    would drive each other out: on a Zen 4, 32 KiB, sums over rows ran at half of reading. On an Intel always the
    second: a request for the first takes one of the few places where all that misses it waits."""
    return "" if 3 * early <= first_cache() and not foresees_little() else ", 0, 2"


@cache
def last_cache() -> int:
    """Bytes of this machine's last cache that are its own, 0 where the system does not tell.

    A virtual machine is told of the whole cache of its host, which others use as well: a Granite Rapids of two CPUs
    names 480 MiB.
    """
    return min(max(_caches(), default=0), _OWN_CACHE * get_target("cpu").units)


def _caches() -> list[int]:
    return [level.capacity_bytes for level in get_target("cpu").levels if level.name != "memory"]


def too_large(kernel: Kernel) -> frozenset[int]:
    """The results that are best stored past the caches.

    They are at least half the last cache, and the kernel moves all that it holds or more: part of them would be gone
    before anyone reads them next, and lines stored past the caches are not read before they are written.
    """
    if kernel.attrs.get("in_order"):
        return frozenset()  # few rows of a large result
    last = last_cache() or 1 << 62
    sizes = [_nbytes(p) for p in kernel.params]
    whole = sum(n for n in sizes if isinstance(n, int))
    return frozenset(
        i
        for i, (p, n) in enumerate(zip(kernel.params, sizes, strict=True))
        if p.out and isinstance(n, int) and n >= last // 2 and whole >= last
    )


def from_memory(kernel: Kernel) -> bool:
    """Whether the last cache does not hold all that a kernel reads and writes, or that is not known."""
    sizes = [_nbytes(p) for p in kernel.params]
    return not all(isinstance(n, int) for n in sizes) or sum(sizes) > last_cache()


def _nbytes(param: Param) -> Dim:
    return product((*param.type.shape, param.type.dtype.itemsize))


def wide_cast(text: str, source: torch.dtype, to: torch.dtype) -> str:
    """A vector converted, as ``words.cast`` does a value."""
    if source == to:
        return text
    if to == torch.bool:
        return f"({text} != 0)"
    if source == torch.bool:
        return f"number({text})"
    return f"round_{KINDS[to]}({text})" if to in (torch.bfloat16, torch.float16) else text


def unroll(stmts: Iterable[Stmt]) -> int:
    """Accumulators side by side: a short loop waits for its sums, a long one has enough else to do."""
    cost = sum(OPS[s.op].cost if isinstance(s, Compute) else 1 for s in stmts)
    return 4 if cost <= 8 else 2 if cost <= 16 else 1


def fold_step(op: str, acc: str, value: str) -> str:
    """A vector folded into the accumulator; lanes past the end leave it."""
    new = f"{acc} + {value}" if op == "sum" else f"{'maximum' if op == 'amax' else 'minimum'}({acc}, {value})"
    return f"{acc} = chosen(n, {new}, {acc});"
