"""The proof of a dims string: split the operands as it says, run ``ref`` on the pieces, put them together.

What is proved is the statement itself: for every factor that may be split, the pieces' results joined
or combined as the string says are the results of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tessel.ir.node import Node, Op, Value, make_input, map_values
from tessel.ir.types import TensorType
from tessel.ops.combine import Part, combine, join_scan
from tessel.ops.dims import Dims, Factor, Piece, Term, dims_of, factor_sizes


class ProofError(AssertionError):
    """A dims string (or an inferred type) that is not true of its operator."""


@dataclass(frozen=True)
class Sample:
    """Arguments to try an operator on: tensors and literals, and attributes."""

    op: Op
    args: tuple[Any, ...]
    attrs: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        def text(a: Any) -> str:
            if isinstance(a, torch.Tensor):
                return str(list(a.shape)).replace(" ", "")
            return f"({','.join(map(text, a))})" if isinstance(a, tuple) else str(a)

        words = [*map(text, self.args), *(f"{k}={text(v)}" for k, v in self.attrs.items())]
        return f"{self.op.name}({', '.join(words)})"


def type_of(x: torch.Tensor) -> TensorType:
    return TensorType(tuple(x.shape), x.dtype)


def tensors_in(arg: Any) -> Iterator[torch.Tensor]:
    if isinstance(arg, torch.Tensor):
        yield arg
    elif isinstance(arg, tuple):
        for a in arg:
            yield from tensors_in(a)


def map_tensors(arg: Any, fn: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(arg, torch.Tensor):
        return fn(arg)
    return tuple(map_tensors(a, fn) for a in arg) if isinstance(arg, tuple) else arg


def run(op: Op, args: Sequence[Any], attrs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    got = op.ref(*args, **attrs)
    return (got,) if isinstance(got, torch.Tensor) else tuple(got)


def node_of(sample: Sample, results: Sequence[torch.Tensor]) -> Node:
    """A node of the sample's types; what ``infer`` says of them must be what ``ref`` gave."""
    args = map_tensors(sample.args, lambda t: make_input("x", type_of(t)).out)
    types = tuple(map(type_of, results))
    if sample.op.infer is not None:
        given = map_values(args, lambda v: v.type)
        inferred = sample.op.infer(*given, **sample.attrs)
        said = [(t.shape, t.dtype) for t in inferred]
        made = [(t.shape, t.dtype) for t in types]
        if said != made:
            raise ProofError(f"{sample}: infer says {said}, ref gives {made}")
        types = inferred
    return Node(sample.op, args, sample.attrs, types)


def prove(sample: Sample) -> set[str]:
    """Prove the dims of a sample; the names of the factors that were split."""
    whole = run(sample.op, sample.args, sample.attrs)
    node = node_of(sample, whole)
    dims = dims_of(node)
    sizes = factor_sizes(node, dims)
    proved = set()
    for factor in dims.factors.values():
        size = sizes[factor.name]
        if factor.kind == "whole" or size < 2:
            continue
        cuts = {1, size - 1} if size <= 3 else {size // 3, size - 1}
        for cut in cuts:
            _prove_cut(sample, node, dims, sizes, factor, [(0, cut), (cut, size - cut)], whole)
        proved.add(factor.name)
    return proved


def _prove_cut(
    sample: Sample,
    node: Node,
    dims: Dims,
    sizes: dict[str, Any],
    factor: Factor,
    spans: list[tuple[int, int]],
    whole: tuple[torch.Tensor, ...],
) -> None:
    where = f"{sample}: dims '{dims}', {factor.name} split as {[n for _, n in spans]}"
    parts = [_part(sample, node, dims, sizes, factor, *span) for span in spans]
    for i, (want, shape) in enumerate(zip(whole, dims.results, strict=True)):
        pieces = [p.results[i] for p in parts]
        places = [d for d, term in enumerate(shape) if factor in term]
        try:
            got = _together(factor, shape, places, pieces, parts, node, sizes, i)
            same(got, want)
        except (AssertionError, RuntimeError, IndexError) as e:
            raise ProofError(f"{where}: result {i} put together is not the whole: {e}") from e


def _part(
    sample: Sample, node: Node, dims: Dims, sizes: dict[str, Any], factor: Factor, start: int, size: int
) -> Part:
    """Run ``ref`` on one piece."""
    piece: Piece = node.op.split(node, factor.name, start, size) if node.op.split else Piece()
    count = iter(range(len(dims.operands)))
    cut: list[torch.Tensor] = []

    def local(x: torch.Tensor) -> torch.Tensor:
        i = next(count)
        for d, term in enumerate(dims.operands[i]):
            if factor not in term:
                continue
            if factor.kind == "window":
                x = read_window(x, d, piece, start, size)
            else:
                x = narrow(x, d, term, sizes, factor, start, size)
        if i in piece.once and start > 0:
            x = torch.zeros_like(x)
        cut.append(x)
        return x

    args = list(map_tensors(sample.args, local))
    for place, literal in piece.args.items():
        args[place] = literal
    attrs = {**sample.attrs, **piece.attrs}
    try:
        got = run(sample.op, args, attrs)
    except (RuntimeError, IndexError, ValueError) as e:
        raise ProofError(f"{sample}: dims '{dims}', the piece of {factor.name} does not run: {e}") from e
    if sample.op.infer is not None:
        node_of(Sample(sample.op, tuple(args), attrs), got)
    return Part(start, size, tuple(cut), got)


def narrow(
    x: torch.Tensor, d: int, term: Term, sizes: dict[str, Any], factor: Factor, start: int, size: int
) -> torch.Tensor:
    """The piece of a dimension that may have several factors."""
    full = [sizes[f.name] for f in term]
    inner = term.index(factor)
    open_ = x.unflatten(d, full).narrow(d + inner, start, size)
    return open_.flatten(d, d + len(full) - 1)


def read_window(x: torch.Tensor, d: int, piece: Piece, start: int, size: int) -> torch.Tensor:
    """What a piece of a window axis reads, filled where that lies outside."""
    w = piece.window
    if w is None:
        raise ProofError("a window axis without a window record")
    first, last = start * w.stride - w.low, (start + size - 1) * w.stride + w.high
    inside = x.narrow(d, max(first, 0), max(min(last, x.shape[d] - 1) - max(first, 0) + 1, 0))
    widths = [0, 0] * (x.dim() - 1 - d) + [max(-first, 0), max(last - x.shape[d] + 1, 0)]
    return torch.nn.functional.pad(inside, widths, value=w.fill)


def _together(
    factor: Factor,
    shape: tuple[Term, ...],
    places: list[int],
    pieces: list[torch.Tensor],
    parts: list[Part],
    node: Node,
    sizes: dict[str, Any],
    i: int,
) -> torch.Tensor:
    if not places:
        if factor.kind == "reduce":
            return combine(factor.combine, parts, node.attrs, i)
        for p in pieces[1:]:
            same(p, pieces[0])
        return pieces[0]
    (d,) = places
    if factor.combine == "scan":
        return join_scan(pieces, d)
    term = shape[d]
    if len(term) == 1:
        return torch.cat(pieces, d)
    inner = term.index(factor)
    opened = []
    for piece, part in zip(pieces, parts, strict=True):
        full = [part.size if f == factor else sizes[f.name] for f in term]
        opened.append(piece.unflatten(d, full))
    return torch.cat(opened, d + inner).flatten(d, d + len(term) - 1)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal: exactly for integers, to rounding for floats (NaN equals NaN)."""
    assert got.dtype == want.dtype, f"{got.dtype} is not {want.dtype}"
    assert got.shape == want.shape, f"shape {tuple(got.shape)} is not {tuple(want.shape)}"
    exact = not (want.dtype.is_floating_point or want.dtype.is_complex)
    tol = 0.0 if exact else 1e-10 if want.dtype in (torch.float64, torch.complex128) else 1e-5
    torch.testing.assert_close(got, want, rtol=tol, atol=tol, equal_nan=True)


def interpret(nodes: Sequence[Node], env: dict[Value, Any], outs: Sequence[Value]) -> list[torch.Tensor]:
    """Run nodes one after another with their refs."""
    for n in nodes:
        got = run(n.op, map_values(n.args, env.__getitem__), dict(n.attrs))
        env.update(zip(n.outs, got, strict=True))
    return [env[v] for v in outs]
