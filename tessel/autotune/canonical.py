"""What a tile program computes, as text that does not depend on names or on the order things were written in.

    form = canonical(kernel)
    form.computation                      # equal for kernels that do the same work on other sizes
    form.shape                            # 'm=4096/128 n=4096/128 k=12288/128'

A kernel is a graph: parameters and statements, joined by who reads whom. Its nodes are put in an order that only
the graph's own structure decides, by colour refinement (Weisfeiler and Leman, 1968): nodes are sorted by what they
say, then again and again by what their neighbours are, until nothing more comes apart. Nodes that stay together are
as good as always exchangeable, and one of them goes first; where they are not, two writings of one kernel get two
texts. That costs a miss and no more: the whole structure is in the text, so that equal texts mean equal structures.

Sizes are kept out of the structure. A number that an index or a literal shares with the kernel's axes is named after
them; all sizes are told apart by :func:`bucket`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import sympy
import torch

from ..ir.types import DTYPE_NAMES, Dim, TensorType, dim_equal, product, simplify_dim
from ..tiles.header import ATTENTION
from ..tiles.index import Atom, Cond, Index
from ..tiles.kernel import (
    Access,
    Axis,
    Check,
    Compute,
    IndexOf,
    Kernel,
    Load,
    Reduce,
    Ref,
    Scan,
    Stmt,
    Store,
    Test,
)

__all__ = ["Canonical", "bucket", "canonical", "divisor"]

_EXACT = 16  # sizes up to here are told apart one by one
_DIVISOR = 128  # powers of two that matter: vectors of 16, tiles without a mask
_STRIDE_DIVISOR = 16  # elements: whether a row starts where a vector may
_LITERAL = 8  # numbers in indices up to here are never sizes (signs, windows, pairs)
_COMMUTATIVE = frozenset(
    "add mul maximum minimum eq ne logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor".split()
)
_DYNAMIC = "dyn"


def divisor(n: Dim, most: int = _DIVISOR) -> int:
    """The largest power of two up to ``most`` that divides a size whatever its symbols are.

    >>> divisor(4096), divisor(4000), divisor(7), divisor(4000, 16)
    (128, 32, 1, 16)
    """
    if isinstance(n, int):
        known = n
    else:
        known = int(sympy.gcd_terms(sympy.expand(n)).as_coeff_Mul()[0].as_numer_denom()[0])
    return most if known == 0 else min(known & -known, most)


def bucket(n: Dim) -> str:
    """A class of sizes that share a tile: an upper bound and the power of two that divides them.

    Sizes up to 16 stand alone; above, bounds are 2ᵏ and 3·2ᵏ⁻¹, so that one class spans less than a factor 1.5.
    A size with symbols is ``dyn``.

    >>> bucket(4096), bucket(4000), bucket(3072), bucket(7), bucket(5000)
    ('4096/128', '4096/32', '3072/128', '7', '6144/8')
    >>> from tessel.ir.types import symbol
    >>> bucket(symbol("s0") * 64)
    'dyn/64'
    """
    if not isinstance(n, int):
        return f"{_DYNAMIC}/{divisor(n)}"
    if n <= _EXACT:
        return str(n)
    top = 1 << (n - 1).bit_length()
    return f"{top * 3 // 4 if n <= top * 3 // 4 else top}/{divisor(n)}"


@dataclass(frozen=True)
class Canonical:
    """A kernel without its names.

    Attributes:
        computation: SHA-256 of the structure: operators, indices, folds, who reads whom. Types stand in it by number.
        dtypes: those types, as the IR writes them: ``"bf16,f32"``.
        strides: a word a parameter: ``(p/16,1)`` is packed rows of contiguous elements.
        shape: the axes' buckets by name, then those of other sizes the kernel holds.
        text: the structure itself, to look at.
    """

    computation: str
    dtypes: str
    strides: str
    shape: str
    text: str = field(repr=False, compare=False)


@dataclass
class _Node:
    """A parameter, a statement or the list of what parts provide.

    ``says`` is what it is, ``types`` and ``sizes`` what is kept out of that; ``reads`` are labelled edges.
    """

    says: str
    types: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    reads: list[tuple[str, int]] = field(default_factory=list)
    strides: str = ""


def canonical(kernel: Kernel) -> Canonical:
    """The kernel's structure, types, strides and sizes, each as text of its own."""
    axes = _axes(kernel)
    nodes = _nodes(kernel, _Names(kernel, axes))
    order = _order(nodes)
    number = {n: i for i, n in enumerate(order)}
    types: dict[str, int] = {}
    lines = [f"{kernel.family}({', '.join(f'{axes[a.name]}:{a.kind}' for a in kernel.axes if a.name in axes)})"]
    lines += [f"{name}={_attribute(kernel, name)}" for name in sorted(kernel.attrs)]
    for i in order:
        node = nodes[i]
        own = [f"t{types.setdefault(t, len(types))}" for t in node.types]
        reads = sorted(f"{label}:{number[n]}" for label, n in node.reads)
        lines.append(" ".join([node.says, *own, *reads]))
    extents = {axes[a.name]: a.extent for a in kernel.axes if a.name in axes}
    shape = " ".join(f"{name}={bucket(extent)}" for name, extent in extents.items())
    others = " ".join(s for i in order for s in nodes[i].sizes)
    text = "\n".join(lines)
    return Canonical(
        hashlib.sha256(text.encode()).hexdigest(),
        ",".join(types),
        " ".join(nodes[i].strides for i in order if nodes[i].strides),
        f"{shape} | {others}" if others else shape,
        text,
    )


def _axes(kernel: Kernel) -> dict[str, str]:
    """Names that say what an axis is for: ``x0 x1 r0`` in order, ``m n k d e`` where the family names them.

    Axes of one element do nothing, save those that the family counts on.
    """
    own = {"matmul": "mnk", **dict.fromkeys(ATTENTION, "mnde")}.get(kernel.family, "")
    out: dict[str, str] = {}
    count = {"x": 0, "r": 0}
    for axis in kernel.axes:
        if axis.name in own:
            out[axis.name] = axis.name
        elif not (isinstance(axis.extent, int) and axis.extent == 1):
            out[axis.name] = f"{axis.kind}{count[axis.kind]}"
            count[axis.kind] += 1
    return out


class _Names:
    """Words for the numbers of a kernel."""

    def __init__(self, kernel: Kernel, axes: dict[str, str]) -> None:
        self.axes = axes
        self.sizes: dict[Dim, str] = {}
        for name, dims in _known(kernel.axes, axes):
            size = product(dims)
            for text, value in ((name, size), (f"{name}-1", simplify_dim(size - 1)), (f"{name}/2", _half(size))):
                if value is not None:
                    self.sizes.setdefault(value, text)
        self.other: set[Dim] = set()  # sizes of tensors that are no axis
        for p in kernel.params:
            for n in (*p.type.shape, *p.type.strides):
                self.other |= {n, simplify_dim(n - 1)}

    def size(self, n: Dim, found: list[str]) -> str:
        """A number of an index; a size that no axis names goes by its bucket to ``found``."""
        if isinstance(n, int) and n < 0:
            return "-" + self.size(-n, found)
        if isinstance(n, int) and n <= _LITERAL:
            return str(n)
        if n in self.sizes:
            return self.sizes[n]
        if not isinstance(n, int) or n in self.other:
            found.append(bucket(n))
            return "size"
        return str(n)

    def index(self, index: Index, found: list[str], reads: list[tuple[str, int]], place: str) -> str:
        """An index as text; the values it reads become edges labelled by their place."""
        terms = sorted((self._term(atom, c) for atom, c in index.terms), key=lambda t: (t[0], t[1]))
        for i, (_, sizes, values) in enumerate(terms):
            found += sizes
            reads += [(f"{place}.{i}{inner}", number) for inner, number in values]
        parts = [text for text, *_ in terms]
        if index.const != 0 or not parts:
            parts.append(self.size(index.const, found))
        return "+".join(parts)

    def _term(self, atom: Atom, c: Dim) -> tuple[str, list[str], list[tuple[str, int]]]:
        """One term of an index: its text, sizes and the values it reads."""
        found: list[str] = []
        reads: list[tuple[str, int]] = []
        if atom.kind == "var":
            text = self.axes.get(atom.name, "0")
        elif atom.kind == "value":
            reads.append(("", int(atom.name)))
            found.append(bucket(atom.n))
            text = "value"
        else:
            assert atom.arg is not None
            inner = self.index(atom.arg, found, reads, "")
            text = f"({inner}){'/' if atom.kind == 'div' else '%'}{self.size(atom.n, found)}"
        return (text if c == 1 else f"{self.size(c, found)}*{text}"), found, reads

    def conds(self, conds: Iterable[Cond], found: list[str], reads: list[tuple[str, int]], place: str) -> str:
        texts = []
        for i, c in enumerate(conds):
            low, high = ("" if d is None else self.size(d, found) for d in (c.low, c.high))
            texts.append(f"{low}<={self.index(c.index, found, reads, f'{place}{i}')}<{high}")
        return " ".join(sorted(texts))

    def literal(self, x: Any, found: list[str]) -> str:
        """A number that takes part in the computation. Sizes (the n of a mean) go by their names."""
        kind = type(x).__name__
        if isinstance(x, bool | str | None | torch.dtype):
            return f"{kind}:{x}"
        if isinstance(x, sympy.Basic):
            return f"size:{self.size(simplify_dim(x), found)}"
        if isinstance(x, int):
            return f"int:{self.sizes.get(x, x) if x > _LITERAL else x}"
        if isinstance(x, float):
            for form, n in (("{}", x), ("1/{}", 1 / x if x else 0.0), ("1/sqrt({})", x**-2 if x > 0 else 0.0)):
                near = round(n) if abs(n) < 2**53 and n == n else 0
                if near > _LITERAL and near in self.sizes and x in (float(near), 1 / near, near**-0.5):
                    return f"float:{form.format(self.sizes[near])}"
            return f"float:{x.hex()}"
        return f"{kind}:{x!r}"


def _half(size: Dim) -> Dim | None:
    half = simplify_dim(sympy.Rational(1, 2) * size) if not isinstance(size, int) else size // 2
    return half if dim_equal(simplify_dim(half * 2), size) else None


def _known(axes: Sequence[Axis], names: dict[str, str]) -> Iterator[tuple[str, list[Dim]]]:
    """What sizes follow from the axes: all that is reduced, every axis, runs of neighbours."""
    kept = [a for a in axes if a.name in names]
    reduced = [a.extent for a in kept if a.kind == "r"]
    if reduced:
        yield "r", reduced
    for a in kept:
        yield names[a.name], [a.extent]
    for i in range(len(kept)):
        for j in range(i + 2, len(kept) + 1):
            yield "*".join(names[a.name] for a in kept[i:j]), [a.extent for a in kept[i:j]]


def _attribute(kernel: Kernel, name: str) -> str:
    value = kernel.attrs[name]
    if kernel.family in ATTENTION and name == "scale" and isinstance(value, float):
        d = kernel.axis("d").extent
        if isinstance(d, int) and abs(value * d**0.5 - 1) < 1e-12:  # the usual one, however it was rounded
            return "1/sqrt(d)"
    return _Names(kernel, {}).literal(value, [])


# ---------------------------------------------------------------- nodes


def _nodes(kernel: Kernel, names: _Names) -> list[_Node]:
    nodes = [_param(p.type, p.out, names) for p in kernel.params]
    stmts = [(part, s) for part in sorted(kernel.parts) for s in kernel.parts[part]]
    stmts += [("body", s) for s in kernel.body]
    at = {s.out: len(nodes) + i for i, (_, s) in enumerate(stmts) if not isinstance(s, Check | Store)}
    stored: dict[int, int] = {}
    for part, s in stmts:
        node, values = _statement(s, names)
        if isinstance(s, Store):  # two stores to one tensor keep their order
            stored[s.access.param] = stored.get(s.access.param, -1) + 1
            node.says += f"#{stored[s.access.param]}"
        node.says = f"{part}.{node.says}"
        for label, value in values:
            if value in at:
                node.reads.append((label, at[value]))
            else:  # the accumulator and its like, which no statement makes
                node.says += f" {label}:given{value}"
        nodes.append(node)
    provided = _Node("provides")
    for part in sorted(kernel.provides):
        value = kernel.provides[part]
        if isinstance(value, Ref) and value.number in at:
            provided.reads.append((part, at[value.number]))
        else:
            provided.says += f" {part}={value.number if isinstance(value, Ref) else names.literal(value, [])}"
    return [*nodes, provided]


def _param(t: TensorType, out: bool, names: _Names) -> _Node:
    kept = [(n, s) for n, s in zip(t.shape, t.strides, strict=True) if not (isinstance(n, int) and n == 1)]
    sizes = tuple(bucket(n) for n, _ in kept if n not in names.sizes and not (isinstance(n, int) and n <= _LITERAL))
    node = _Node("out" if out else "in", (DTYPE_NAMES[t.dtype],), sizes, strides=_strides(kept))
    if t.device is not None:
        node.says += f"@{t.device}"
    return node


def _strides(dims: Sequence[tuple[Dim, Dim]]) -> str:
    """How dims lie in memory: ``1`` contiguous, ``0`` repeated, ``p`` packed on the next denser dim (and which one,
    unless it is the next in order), ``g`` with a gap; and what power of two divides the step.

    >>> _strides([(64, 128), (128, 1)]), _strides([(64, 1), (128, 64)]), _strides([(64, 130), (128, 1)])
    ('(p/16,1)', '(1,p0/16)', '(g/2,1)')
    """
    words = []
    for i, (_, s) in enumerate(dims):
        if isinstance(s, int) and s in (0, 1):
            words.append(str(s))
            continue
        over = [
            j for j, (n, inner) in enumerate(dims) if j != i and dim_equal(s, simplify_dim(n * inner)) and inner != 0
        ]
        step = f"/{divisor(s, _STRIDE_DIVISOR)}"
        if not over:
            words.append("g" + step)
        else:
            words.append(("p" if i + 1 in over else f"p{over[0]}") + step)
    return f"({','.join(words)})"


def _statement(s: Stmt, names: _Names) -> tuple[_Node, list[tuple[str, int]]]:
    """A statement's node, with edges to parameters, and the numbers of the values it reads."""
    found: list[str] = []
    values: list[tuple[str, int]] = []
    reads: list[tuple[str, int]] = []
    types: list[torch.dtype] = []

    def access(a: Access) -> str:
        reads.append(("of", a.param))
        at = ",".join(names.index(c, found, values, f"at{i}") for i, c in enumerate(a.coords))
        mask = names.conds(a.mask, found, values, "if")
        return f"[{at}]" + (f" if {mask} else {names.literal(a.other, found)}" if mask else "")

    def operand(x: Any, label: str) -> str:
        if isinstance(x, Ref):
            values.append((label, x.number))
            return "_"
        return names.literal(x, found)

    if isinstance(s, Load):
        says, types = f"load{access(s.access)}", [s.dtype]
    elif isinstance(s, Store):
        says, types = f"store{access(s.access)} {operand(s.arg, 'value')}", [s.dtype]
    elif isinstance(s, IndexOf):
        says, types = f"index {names.index(s.index, found, values, 'at')}", [s.dtype]
    elif isinstance(s, Test):
        says, types = f"test {names.conds(s.conds, found, values, 'if')}", [s.dtype]
    elif isinstance(s, Reduce):
        says, types = f"reduce.{s.op} {operand(s.arg, 'value')}", [s.dtype, s.arg_dtype]
    elif isinstance(s, Scan):
        says = f"scan{s.fold and '.' + s.fold}{' back' * s.reverse} {operand(s.a, 'factor')} {operand(s.b, 'addend')}"
        types = [s.dtype]
    elif isinstance(s, Check):
        high, mask = names.size(s.high, found), names.conds(s.mask, found, values, "if")
        says = f"check {operand(s.arg, 'value')}<{high} if {mask}"
    else:
        assert isinstance(s, Compute)
        swap = s.op in _COMMUTATIVE and len(s.args) == 2
        args = [operand(a, "arg" if swap else f"arg{i}") for i, a in enumerate(s.args)]
        says = f"{s.op}({','.join(sorted(args) if swap else args)})"
        types = [s.dtype, s.arg_dtype]
    return _Node(says, tuple(DTYPE_NAMES[t] for t in types), tuple(found), reads), values


# ---------------------------------------------------------------- order


def _order(nodes: Sequence[_Node]) -> list[int]:
    """The nodes' numbers in an order that the graph alone decides, structure first, then types and sizes."""
    readers: list[list[tuple[str, int]]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for label, n in node.reads:
            readers[n].append((label, i))
    rank = _refined(_ranks([n.says for n in nodes]), nodes, readers)
    rank = _refined(_ranks([(r, n.types, n.strides, n.sizes) for r, n in zip(rank, nodes)]), nodes, readers)
    while True:
        order = sorted(range(len(nodes)), key=rank.__getitem__)
        tied = next((a for a, b in pairwise(order) if rank[a] == rank[b]), None)
        if tied is None:
            return order
        rank = _refined(_ranks([(r, i != tied) for i, r in enumerate(rank)]), nodes, readers)


def _refined(rank: list[int], nodes: Sequence[_Node], readers: Sequence[Sequence[tuple[str, int]]]) -> list[int]:
    """Ranks told apart by the ranks of the neighbours, until that tells nothing new."""
    while True:
        around = [
            (
                rank[i],
                sorted((label, rank[n]) for label, n in node.reads),
                sorted((label, rank[n]) for label, n in readers[i]),
            )
            for i, node in enumerate(nodes)
        ]
        new = _ranks([(r, tuple(a), tuple(b)) for r, a, b in around])
        if max(new) == max(rank):
            return new
        rank = new


def _ranks(keys: Sequence[Any]) -> list[int]:
    """Dense ranks from 0, equal keys sharing one."""
    place = {k: i for i, k in enumerate(sorted(set(keys)))}
    return [place[k] for k in keys]
