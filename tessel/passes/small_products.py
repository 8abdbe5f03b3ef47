"""Open products that have a better form: most become pointwise work and sums, which fuse with what is around.

    %2 = matmul(%0, %1)         becomes      %3 = mul(%0, permute(%1))      (a batch, one column)
                                             %2 = sum(%3, dims=(2,))

    %2 = convolution(%0, %1)    becomes      %2 = mul(%0 moved by 1, %1[0]) + mul(%0, %1[1]) + ...
                                             (as many groups as channels, few taps)

    %2 = convolution(%0, %1)    becomes      %2 = matmul(patches of %0, %1)     (windows side by side: each place
                                                                               is read by one window)

A matrix that a kernel makes for one product is then never stored. Halves are multiplied and summed in f32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product as places

from ..ir.node import Builder, Graph, Node, Value, map_values
from ..ir.types import TensorType, product
from ..ops import OPS
from ..ops.emit import Emit

__all__ = ["run"]

_TAPS = 8  # of a convolution
_ROW = 4096  # terms of a dot product
_MADE = frozenset({"pointwise", "index", "scan"})


def run(graph: Graph, windows: bool = True) -> Graph:
    """The graph with such products opened; ``windows``: convolutions whose windows lie side by side too."""
    uses = graph.uses()
    convolutions = {c.node: c for n in graph.nodes if (c := _depthwise(n, graph, uses)) is not None}
    replaced = {c.result for c in convolutions.values()}
    columns = {n for n in graph.nodes if _one_column(n, uses)}
    patches = {n for n in graph.nodes if windows and _side_by_side(n)} - convolutions.keys()
    patches -= {n for n in patches if _leaves(n.out, graph)}
    if not convolutions and not columns and not patches:
        return graph
    by_result = {c.result: c for c in convolutions.values()}
    builder = Builder(graph.inputs)
    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    for old in graph.nodes:
        builder.loc = old.loc
        if old in columns:
            new[old.out] = _dot(Emit(builder), new[old.args[0]], new[old.args[1]], old.type)
            continue
        if old.types and old.out in replaced:
            new[old.out] = _taps(Emit(builder), by_result[old.out], new)
            continue
        if old in patches:
            new[old.out] = _patches(Emit(builder), map_values(old.args, new.__getitem__), old.type)
            continue
        if old in convolutions:  # only a part of it is read
            continue
        args = map_values(old.args, new.__getitem__)
        if old.op.kind == "view" and args != old.args:  # of what may lie otherwise now
            new[old.out] = builder.add(old.op, *args, **old.attrs)
            continue
        node = old if args == old.args else old.replace(args=args)
        new.update(zip(old.outs, builder.append(node).outs, strict=True))
    return builder.finish(
        map_values(graph.outputs, new.__getitem__), tuple((i, new[v]) for i, v in graph.effects), graph.name
    ).live()


# ---------------------------------------------------------------- a batch of matrices, each times one column


def _one_column(node: Node, uses: Mapping[Value, int]) -> bool:
    if node.op.name != "matmul" or node.type.rank < 3 or not node.type.dtype.is_floating_point:
        return False
    a, b = node.operands
    k = a.shape[-1]
    if b.shape[-1] != 1 or not isinstance(k, int) or not 1 < k <= _ROW or product(a.shape[:-2]) == 1:
        return False
    while a.op.kind == "view" and uses[a] == 1:
        a = a.node.operands[0]
    return uses[a] == 1 and a.op.kind in _MADE


def _dot(e: Emit, a: Value, b: Value, t: TensorType) -> Value:
    rank = t.rank
    swap = (*range(rank - 2), rank - 1, rank - 2)
    row = e("permute", e.wide(b), dims=swap)
    total = e("sum", e("mul", e.wide(a), row), dims=(rank - 1,), keepdim=True)
    if total.dtype == t.dtype:
        return total
    return e.b.node(OPS["cast"], total, types=(t,), dtype=t.dtype).out


# ---------------------------------------------------------------- convolutions of each channel by itself


@dataclass(frozen=True)
class _Depthwise:
    """A convolution of which ``result`` (itself, or the one slice of it that is read) is wanted."""

    node: Node
    result: Value
    starts: tuple[int, ...]  # of the result within the convolution's, a spatial dim each


def _depthwise(node: Node, graph: Graph, uses: Counter[Value]) -> _Depthwise | None:
    if node.op.name != "convolution":
        return None
    x, w, _, stride, padding, dilation, transposed, _, groups = node.args
    sizes = (*x.shape, *w.shape, *stride, *padding, *dilation, groups)
    if transposed or not all(isinstance(n, int) for n in sizes) or not x.dtype.is_floating_point:
        return None
    if groups != x.shape[1] or w.shape[:2] != (x.shape[1], 1) or any(s != 1 for s in stride):
        return None
    if product(w.shape[2:]) > _TAPS or x.type.device is not None:
        return None
    result, starts = node.out, [0] * len(stride)
    if uses[node.out] == 1:
        reader = next((n for n in graph.nodes if node.out in n.operands), None)
        if reader is not None and reader.op.name == "slice" and reader.attrs.get("step", 1) == 1:
            dim, start = reader.attrs["dim"] % node.type.rank, reader.attrs["start"]
            if dim >= 2 and isinstance(start, int) and isinstance(reader.attrs["size"], int):
                result, starts[dim - 2] = reader.out, start
    return _Depthwise(node, result, tuple(starts))


def _taps(e: Emit, c: _Depthwise, new: Mapping[Value, Value]) -> Value:
    """The sum over the taps of the operand moved by each, times its weight."""
    x, w, bias, _, padding, dilation, *_ = map_values(c.node.args, new.__getitem__)
    spatial = range(len(padding))
    flat = (x.shape[1], *(1 for _ in spatial))  # of what is the same at every place
    total = None if bias is None else e("reshape", e.wide(bias), shape=flat)
    for at in places(*(range(n) for n in w.shape[2:])):
        offsets = [c.starts[d] + at[d] * dilation[d] - padding[d] for d in spatial]
        moved = _moved(e, x, offsets, c.result.shape[2:])
        if moved is None:
            continue
        weight = w
        for d in spatial:
            weight = e("slice", weight, dim=2 + d, start=at[d], size=1, step=1)
        term = e("mul", e.wide(moved), e("reshape", e.wide(weight), shape=flat))
        total = term if total is None else e("add", term, total)
    t = c.result.type
    if total is None or total.shape != t.shape:  # every tap reads nothing but padding
        zero = e("full", shape=t.shape, value=0.0, dtype=e.wide(x).dtype)
        total = zero if total is None else e("add", zero, total)
    if total.dtype == t.dtype:
        return total if total.type.strides == t.strides else e.b.node(total.op, *total.node.args, types=(t,)).out
    return e.b.node(OPS["cast"], total, types=(t,), dtype=t.dtype).out


def _moved(e: Emit, x: Value, offsets: Sequence[int], sizes: Sequence[int]) -> Value | None:
    """The operand where place p is its place p + offset, zero outside; ``None`` where all is outside."""
    low, high = [0] * x.type.rank, [0] * x.type.rank
    for d, (offset, size) in enumerate(zip(offsets, sizes, strict=True), 2):
        first, last = max(0, -offset), min(size, x.shape[d] - offset)
        if first >= last:
            return None
        if (first + offset, last - first) != (0, x.shape[d]):
            x = e("slice", x, dim=d, start=first + offset, size=last - first, step=1)
        low[d], high[d] = first, size - last
    return e("pad", x, low=tuple(low), high=tuple(high), value=0.0) if any((*low, *high)) else x


# ---------------------------------------------------------------- convolutions whose windows do not overlap


def _side_by_side(node: Node) -> bool:
    if node.op.name != "convolution":
        return False
    x, w, _, stride, padding, dilation, transposed, _, groups = node.args
    sizes = (*x.shape, *w.shape, *stride, *padding, *dilation)
    if transposed or groups != 1 or not all(isinstance(n, int) for n in sizes):
        return False
    if product(window := tuple(stride)) == 1:  # a product over channels, which lie apart: the library knows better
        return False
    if any(padding) or any(d != 1 for d in dilation) or window != tuple(w.shape[2:]):
        return False
    return bool(x.dtype.is_floating_point and x.type.device is None and product(node.type.shape) > 0)


def _leaves(v: Value, graph: Graph) -> bool:
    """Whether a value or a view of it is a result, whose layout is not ours to choose."""
    for r in graph.results():
        while r.op.kind == "view" and r != v:
            r = r.node.operands[0]
        if r == v:
            return True
    return False


def _patches(e: Emit, args: tuple, t: TensorType) -> Value:
    """Every window a row of a matrix, the result seen with its channels as the second dim."""
    x, w, bias, window, *_ = args
    count = t.shape[2:]
    rank = len(window)
    for d, (n, size) in enumerate(zip(count, window, strict=True), 2):
        if x.shape[d] != n * size:
            x = e("slice", x, dim=d, start=0, size=n * size, step=1)
    split = (*x.shape[:2], *(m for pair in zip(count, window, strict=True) for m in pair))
    x = e("reshape", x, shape=split)
    x = e("permute", x, dims=(0, *(2 + 2 * d for d in range(rank)), 1, *(3 + 2 * d for d in range(rank))))
    row = product(w.shape[1:])
    x = e("reshape", x, shape=(product((t.shape[0], *count)), row))
    y = e("matmul", x, e("permute", e("reshape", w, shape=(t.shape[1], row)), dims=(1, 0)))
    if bias is not None:
        y = e("add", y, bias)
    y = e("reshape", y, shape=(t.shape[0], *count, t.shape[1]))
    return e("permute", y, dims=(0, 1 + rank, *range(1, 1 + rank)))
