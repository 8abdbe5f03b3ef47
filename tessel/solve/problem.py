"""What of a kernel matters for its tile: sizes, bytes and counts, as one value that compares and hashes.

Two kernels with the same ``Problem`` get the same tile, so an answer is computed once for every shape class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TesselError, did_you_mean
from ..ir.exprs import evaluate
from ..ir.types import Dim, product
from ..targets import Target
from ..tiles.cost import stored_bytes
from ..tiles.default import (
    batch_axes,
    formula_values,
    head_widths,
    of_kind,
    plain_dot,
    reads_across,
    score_bytes,
    staged_bytes,
)
from ..tiles.descriptors import descriptors
from ..tiles.header import ATTENTION
from ..tiles.kernel import Carry, Compute, Kernel, Load, Reduce, Scan, Stmt, Store, axes_read
from ..tiles.split import splittable

__all__ = ["Problem", "problem_of"]

UNKNOWN_SIZE = 2048  # what a size that is only known at run time counts as
_SLOW = frozenset({"exp", "exp2", "log", "sin", "cos", "tan", "tanh", "erf", "sigmoid", "silu", "gelu", "pow", "rsqrt"})
_FLOPS = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "i8",
}


_BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8": 1, "i8": 1}


@dataclass(frozen=True)
class Problem:
    """A kernel as the solver sees it. Sizes are elements, ``*_bytes`` are bytes.

    Attributes:
        family: of templates.
        batch, m, n, k: of a product; for attention m queries and n keys.
        d, e: widths of keys and values, as powers of two.
        x, r: points of a pointwise kernel or reduction, and how many are folded into each.
        steps: of a scan, one after the other; x recurrences run side by side, each with a state of r places.
        lines: of a scan: steps can be joined, as those of a loop of any other kind cannot.
        ordered: of a scan: a recurrence among them whose steps eager takes in order, no running fold.
        itemsize, out_itemsize, widest: bytes of the widest input, output and either (at least 4).
        dtype: of a product's operands, as ``Target.flops`` names it.
        plain: multiplied without matrix instructions.
        tf32: single precision may go through tf32.
        causal: attention that hides later keys.
        by_keys: the pass of attention's gradients that holds tiles of keys and streams queries.
        a_bytes, b_bytes: loaded for one element of a product's operands; less than one where words hold several.
        a_ops, b_ops: operators that unpack one element of an operand whose words hold several; 0 where none do.
        staged: bytes that the loop holds for one element of an operand that is unpacked there; 0 where none is.
        a_along_k, b_along_k: whether an operand is contiguous along k, not along m or n.
        splits: whether k may be cut into parts that a second kernel adds up.
        described: operands, none to two, that tensor descriptors can load: they lie in memory as they are, 16-bit or
            narrower floats, contiguous along one axis, all else at multiples of 16 bytes.
        aligned: rows of the operands start at multiples of 16 bytes, so that they are copied asynchronously.
        point_bytes: loaded at each point: (m, n) of an epilogue or a score, (x, r) of a reduction or a step of a scan,
            x otherwise.
        total_bytes: of all inputs, each read once.
        out_bytes: of all outputs.
        ops, slow_ops: operators at each point, and those of them that take the special-function unit.
        loads: loads at each point that are live together.
        folds: folds over r; loops: passes over r that a looped form makes.
        across: x, not r (of a scan: not time), runs along memory.
        symbolic: a size is known at run time only.
        r_known: the folded extent is known.
    """

    family: str
    batch: int = 1
    m: int = 1
    n: int = 1
    k: int = 1
    d: int = 1
    e: int = 1
    x: int = 1
    r: int = 1
    steps: int = 1
    lines: bool = True
    ordered: bool = True
    itemsize: int = 4
    out_itemsize: int = 4
    widest: int = 4
    dtype: str = "f32"
    plain: bool = False
    tf32: bool = False
    causal: bool = False
    by_keys: bool = False
    a_bytes: float = 0
    b_bytes: float = 0
    a_ops: int = 0
    b_ops: int = 0
    staged: int = 0
    a_along_k: bool = True
    b_along_k: bool = True
    described: int = 0
    splits: bool = True
    aligned: bool = True
    point_bytes: int = 0
    total_bytes: int = 0
    out_bytes: int = 0
    ops: int = 0
    slow_ops: int = 0
    loads: int = 1
    folds: int = 0
    loops: int = 1
    across: bool = False
    symbolic: bool = False
    r_known: bool = True

    @classmethod
    def product(cls, m: int, n: int, k: int, dtype: str = "bf16", batch: int = 1) -> Problem:
        """A plain product of rows along k, as ``linear`` makes it: no epilogue, the output like the operands.

        >>> str(Problem.product(4096, 11008, 4096))
        '4096×11008×4096 bf16'

        Raises:
            TesselError: no such type.
        """
        if dtype not in _BYTES:
            raise TesselError(f"product: unknown type {dtype!r}; {did_you_mean(dtype, _BYTES)}")
        size = _BYTES[dtype]
        return cls(
            "matmul",
            batch=batch,
            m=m,
            n=n,
            k=k,
            itemsize=size,
            out_itemsize=size,
            widest=max(size, 4),
            dtype=dtype,
            a_bytes=size,
            b_bytes=size,
            aligned=k * size % 16 == 0,
            splits=dtype != "i8",
            described=2 if k * size % 16 == 0 and size <= 2 and dtype != "i8" else 0,
            total_bytes=batch * (m * k + k * n) * size,
            out_bytes=batch * m * n * size,
        )

    @property
    def flops(self) -> float:
        """Operations of the contraction; 0 for other families."""
        if self.family == "matmul":
            return 2.0 * self.batch * self.m * self.n * self.k
        if self.family == "attention":
            return 2.0 * self.batch * self.m * self.n * (self.d + self.e) * (0.5 if self.causal else 1.0)
        if self.family == "attention_backward":
            widths = 2 * self.d + 2 * self.e if self.by_keys else 2 * self.d + self.e
            return 2.0 * self.batch * self.m * self.n * widths * (0.5 if self.causal else 1.0)
        return 0.0

    @property
    def matrix(self) -> bool:
        """Whether matrix instructions multiply."""
        return not self.plain and (self.dtype not in ("f32", "f64") or (self.dtype == "f32" and self.tf32))

    def __str__(self) -> str:
        if self.family == "matmul":
            batch = f"{self.batch}×" if self.batch > 1 else ""
            return f"{batch}{self.m}×{self.n}×{self.k} {self.dtype}"
        if self.family in ATTENTION:
            what = f"{self.batch} heads, {self.m}×{self.n}, width {self.d} {self.dtype}{', causal' * self.causal}"
            of = "" if self.family == "attention" else f"gradients of {'keys' if self.by_keys else 'queries'}, "
            return f"{of}{what}"
        points = f"{self.x} points" + (f" of {self.r} each" if self.r > 1 or self.family == "reduction" else "")
        return f"{points}, {self.steps} steps" if self.family == "scan" else points

    @property
    def point_weight(self) -> float:
        """Registers that an epilogue takes for one sum, as compiled for sm_90; 0 without an epilogue of its own."""
        if not self.point_bytes and self.ops < 2:
            return 0.0
        return 0.25 + self.point_bytes / 4 + 0.03 * self.ops

    def sizes(self) -> dict[str, Any]:
        """What the formulas of a header may name, beside the knobs."""
        held = max(self.itemsize, self.staged)
        out: dict[str, Any] = {"itemsize": held, "out_itemsize": self.out_itemsize, "widest": self.widest}
        if self.family in ATTENTION:
            out |= {"BD": self.d, "BE": self.e, "score_bytes": self.point_bytes, "by_keys": int(self.by_keys)}
        if self.family == "matmul":
            out |= {"point_weight": self.point_weight}
            out |= {"a_unpacked": int(self.a_ops > 0), "b_unpacked": int(self.b_ops > 0)}
        return {**out, "plain": int(self.plain)}


def problem_of(kernel: Kernel, target: Target, hints: Mapping[str, int] | None = None) -> Problem:
    """The problem a kernel poses on a target; sizes known only at run time take ``hints`` or count as 2048."""
    sizes = _Sizes(hints or {})
    common = formula_values(kernel, {}, target.vendor)
    ins = [p for p in kernel.params if not p.out]
    base: dict[str, Any] = {
        "family": kernel.family,
        "itemsize": common["itemsize"],
        "out_itemsize": common["out_itemsize"],
        "widest": common["widest"],
        "total_bytes": sum(sizes.of(stored_bytes(p.type)) for p in ins),
        "out_bytes": sum(sizes.of(stored_bytes(p.type)) for p in kernel.params if p.out),
    }
    if kernel.family == "matmul":
        own = _matmul(kernel, target, sizes)
        base["itemsize"] = max(p.type.dtype.itemsize for p in ins)
    elif kernel.family in ATTENTION:
        own = _attention(kernel, target, sizes)
    else:
        own = _points(kernel, sizes)
        base["total_bytes"] = min(base["total_bytes"], own.pop("loaded"))
    return Problem(**{**base, **own}, symbolic=sizes.guessed)


class _Sizes:
    """Sizes as numbers; remembers whether one had to be guessed."""

    def __init__(self, hints: Mapping[str, int]) -> None:
        self.hints = hints
        self.guessed = False

    def of(self, d: Dim) -> int:
        if isinstance(d, int):
            return d
        names = {s.name for s in d.free_symbols}
        self.guessed = self.guessed or not names <= set(self.hints)
        return max(1, int(evaluate(d, {n: self.hints.get(n, UNKNOWN_SIZE) for n in names})))


def _bytes(stmts: Iterable[Stmt], kinds: type[Load] | type[Store], axes: frozenset[str]) -> int:
    """Bytes that loads or stores move at each point of ``axes``; those that leave one of them out are shared."""
    return sum(s.dtype.itemsize for s in stmts if isinstance(s, kinds) and axes <= axes_read(s))


@dataclass(frozen=True)
class _Operand:
    """What one element of a product's operand takes: bytes, and operators if it is unpacked out of a word."""

    bytes: float
    ops: int
    unpacked: bool


def _operand(kernel: Kernel, part: str, axes: str, sizes: _Sizes) -> _Operand:
    """An element of a plain operand takes what is loaded for it. Where words hold several elements, and scales serve
    groups of them, neighbours load the same word: then each counts with its share of what is stored."""
    stmts = kernel.parts[part]
    loads = [s for s in stmts if isinstance(s, Load) and frozenset(axes) <= axes_read(s)]
    if not any(isinstance(s, Compute) and s.op == "shift_right" for s in stmts):
        return _Operand(max(sum(s.dtype.itemsize for s in loads), 1), 0, False)
    points = sizes.of(product([a.extent for a in batch_axes(kernel)] + [kernel.axis(a).extent for a in axes]))
    stored = (sizes.of(stored_bytes(kernel.params[s.access.param].type)) for s in loads)
    own = sum(min(s.dtype.itemsize, n / points) for s, n in zip(loads, stored, strict=True))
    return _Operand(max(own, 0.125), sum(isinstance(s, Compute) for s in stmts), True)


def _matmul(kernel: Kernel, target: Target, sizes: _Sizes) -> dict[str, Any]:
    m, n, k = (sizes.of(kernel.axis(a).extent) for a in "mnk")
    left, right = (_operand(kernel, part, axes, sizes) for part, axes in (("a", "mk"), ("b", "kn")))
    return {
        "batch": sizes.of(product(a.extent for a in batch_axes(kernel))),
        "m": m,
        "n": n,
        "k": k,
        "dtype": _dtype(kernel, "a"),
        "plain": plain_dot(kernel, target.vendor),
        "tf32": kernel.attrs.get("precision", "ieee") != "ieee",
        "a_bytes": left.bytes,
        "b_bytes": right.bytes,
        "a_along_k": left.unpacked or _along(kernel, "a") == "k",
        "b_along_k": right.unpacked or _along(kernel, "b") == "k",
        "staged": staged_bytes(kernel),
        "a_ops": left.ops,
        "b_ops": right.ops,
        "aligned": _aligned(kernel, ("a", "b")),
        "described": len(descriptors(kernel)),
        "splits": splittable(kernel),
        "point_bytes": _bytes(kernel.body, Load, frozenset({"m", "n"})),
        **_counts(kernel.body),
    }


def _attention(kernel: Kernel, target: Target, sizes: _Sizes) -> dict[str, Any]:
    m, n = (sizes.of(kernel.axis(a).extent) for a in "mn")
    widths = head_widths(kernel)
    score = kernel.parts.get("score", ())
    return {
        "batch": sizes.of(product(a.extent for a in batch_axes(kernel))),
        "m": m,
        "n": n,
        "d": widths["BD"],
        "e": widths["BE"],
        "dtype": _dtype(kernel, "q"),
        "plain": plain_dot(kernel, target.vendor),
        "tf32": kernel.attrs.get("precision", "ieee") != "ieee",
        "causal": bool(kernel.attrs.get("causal", False)),
        "by_keys": kernel.attrs.get("wrt") == "keys",
        "aligned": _aligned(kernel, ("q", "k", "v")),
        "point_bytes": score_bytes(kernel),
        **_counts(score),
    }


def _points(kernel: Kernel, sizes: _Sizes) -> dict[str, Any]:
    x, steps = (sizes.of(product(a.extent for a in of_kind(kernel, kind))) for kind in "xs")
    folded = product(a.extent for a in of_kind(kernel, "r"))
    reduced = frozenset(a.name for a in of_kind(kernel, "r"))
    loads = [s for s in kernel.body if isinstance(s, Load)]
    wide = [s for s in loads if not reduced or axes_read(s) & reduced]
    return {
        "x": x,
        "r": sizes.of(folded),
        "steps": steps,
        "lines": not any(isinstance(s, Carry) for s in kernel.body),
        "ordered": any(isinstance(s, Carry) or (isinstance(s, Scan) and not s.fold) for s in kernel.body),
        # of a table only the rows looked up
        "loaded": x * steps * sizes.of(folded) * sum(s.dtype.itemsize for s in loads),
        "point_bytes": sum(s.dtype.itemsize for s in wide),
        "loads": max(1, len(wide)),
        "folds": sum(isinstance(s, Reduce) for s in kernel.body),
        "loops": max(1, sum(s.loop for s in kernel.segments())) if reduced else 1,
        "across": (bool(reduced) and reads_across(kernel)) or (steps > 1 and reads_across(kernel, "s")),
        "r_known": isinstance(folded, int),
        **_counts(dict.fromkeys(_inner(kernel)) if reduced else kernel.body),
    }


def _inner(kernel: Kernel) -> list[Stmt]:
    """The statements at the innermost points: all of them, or those that depend on a reduced axis."""
    return [s for part in kernel.segments() if part.loop for s in part.stmts] or list(kernel.body)


def _counts(stmts: Iterable[Stmt]) -> dict[str, int]:
    names = [s.op for s in stmts if isinstance(s, Compute)]
    return {"ops": len(names), "slow_ops": sum(n in _SLOW for n in names)}


def _terms(kernel: Kernel, load: Load) -> Mapping[str, Dim]:
    """Axis -> elements between neighbours along it, for the axes that stand alone in a load's address."""
    address = load.access.address(kernel.params[load.access.param])
    return {atom.name: c for atom, c in address.terms if atom.kind == "var"}


def _along(kernel: Kernel, part: str) -> str:
    """The axis along which a part's first load is contiguous; "" where none is."""
    for s in kernel.parts[part]:
        if isinstance(s, Load):
            return next((a for a, c in _terms(kernel, s).items() if isinstance(c, int) and c == 1), "")
    return ""


def _aligned(kernel: Kernel, parts: Iterable[str]) -> bool:
    """Whether all steps between rows are known to be multiples of 16 bytes, and one axis is contiguous."""
    for part in parts:
        for s in kernel.parts[part]:
            if not isinstance(s, Load):
                continue
            steps = [c for c in _terms(kernel, s).values() if not (isinstance(c, int) and c == 1)]
            if any(not isinstance(c, int) or c * s.dtype.itemsize % 16 for c in steps):
                return False
    return True


def _dtype(kernel: Kernel, part: str) -> str:
    number = getattr(kernel.provides[part], "number", None)
    dtype = next(s.dtype for s in kernel.parts[part] if getattr(s, "out", None) == number)  # type: ignore[union-attr]
    return _FLOPS.get(dtype, "f8" if dtype.itemsize == 1 else "f32")
