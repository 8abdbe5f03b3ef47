"""Canonical views: chains become one view, views that change nothing go away."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.node import Builder, Node, Value
from ..ir.rewrite import Rule, typed
from ..ir.types import Dim, dim_equal, simplify_dim
from ..ops import OPS
from ._rules import adds_ones, constant, equal_shape, instead, make_full, producer, remake


def _is(d: Dim, n: int) -> bool:
    return dim_equal(d, n)


def _whole(node: Node) -> Value | None:
    """A view of everything in the same order."""
    x = node.args[0]
    return instead(x, node) if equal_shape(x.type, node.type) else None


def _reshape(b: Builder, node: Node) -> Value | None:
    inner = producer(node.args[0], "reshape")
    return None if inner is None else remake(b, node, "reshape", inner.args[0], shape=node.attrs["shape"])


def _permute(b: Builder, node: Node) -> Value | None:
    inner = producer(node.args[0], "permute")
    if inner is None:
        return None
    first, second = inner.attrs["dims"], node.attrs["dims"]
    return remake(b, node, "permute", inner.args[0], dims=tuple(first[d] for d in second))


def _permute_nothing(b: Builder, node: Node) -> Value | None:
    dims = [d % node.type.rank for d in node.attrs["dims"]]
    return _whole(node) if dims == sorted(dims) else None


def _permute_ones(b: Builder, node: Node) -> Value | None:
    """Only dims of size 1 move: the elements stay in order, and reshapes compose further."""
    x = node.args[0]
    kept = [d for d in node.attrs["dims"] if not _is(x.shape[d], 1)]
    return remake(b, node, "reshape", x, shape=node.type.shape) if kept == sorted(kept) else None


def _expand(b: Builder, node: Node) -> Value | None:
    inner = producer(node.args[0], "expand")
    return None if inner is None else remake(b, node, "expand", inner.args[0], shape=node.attrs["shape"])


def _expand_ones(b: Builder, node: Node) -> Value | None:
    """Leading dims of size 1 added first are not needed: expand adds them."""
    x = node.args[0]
    return remake(b, node, "expand", x.node.args[0], shape=node.attrs["shape"]) if adds_ones(x) else None


def _slice_parts(node: Node) -> tuple[int, Any, Any, Any]:
    a = node.attrs
    return a["dim"] % node.type.rank, a["start"], a["size"], a.get("step", 1)


def _slice(b: Builder, node: Node) -> Value | None:
    inner = producer(node.args[0], "slice")
    if inner is None:
        return None
    (dim, start, size, step), (dim0, start0, _, step0) = _slice_parts(node), _slice_parts(inner)
    if dim != dim0:
        return None
    start, step = simplify_dim(start0 + start * step0), simplify_dim(step * step0)
    return remake(b, node, "slice", inner.args[0], dim=dim, start=start, size=size, step=step)


def _slice_nothing(b: Builder, node: Node) -> Value | None:
    dim, start, size, _ = _slice_parts(node)
    # the whole size from 0 leaves no room for a step above 1, save at size 1 where it means nothing
    return _whole(node) if _is(start, 0) and dim_equal(size, node.args[0].shape[dim]) else None


def _slice_iota(b: Builder, node: Node) -> Value | None:
    inner = producer(node.args[0], "iota")
    if inner is None or inner.attrs.get("dtype", torch.int64) != torch.int64:
        return None
    _, start, size, step = _slice_parts(node)
    first, by = inner.attrs.get("start", 0), inner.attrs.get("step", 1)
    if isinstance(first, float) or isinstance(by, float):
        return None
    attrs = {
        **inner.attrs,
        "shape": (size,),
        "start": simplify_dim(first + start * by),
        "step": simplify_dim(by * step),
    }
    return remake(b, node, "iota", **attrs)


def _flip(b: Builder, node: Node) -> Value | None:
    inner = producer(node.args[0], "flip")
    if inner is None:
        return None
    rank = node.type.rank
    dims = {d % rank for d in node.attrs["dims"]} ^ {d % rank for d in inner.attrs["dims"]}
    return remake(b, node, "flip", inner.args[0], dims=tuple(sorted(dims)))


def _flip_nothing(b: Builder, node: Node) -> Value | None:
    return instead(node.args[0], node) if not node.attrs["dims"] else None


def _of_constant(b: Builder, node: Node) -> Value | None:
    value = constant(node.args[0])
    return None if value is None else make_full(b, node, value)


def _cat_one(b: Builder, node: Node) -> Value | None:
    return instead(node.args[0][0], node) if len(node.args[0]) == 1 else None


def _cat_empty(b: Builder, node: Node) -> Value | None:
    """Pieces of size 0 along the dim add nothing."""
    pieces, dim = node.args[0], node.attrs["dim"]
    kept = tuple(p for p in pieces if not _is(p.shape[dim], 0))
    if not kept or len(kept) == len(pieces):
        return None
    return b.node(OPS["cat"], kept, types=node.types, dim=dim).out


def _pad_nothing(b: Builder, node: Node) -> Value | None:
    widths = (*node.attrs["low"], *node.attrs["high"])
    return instead(node.args[0], node) if all(_is(w, 0) for w in widths) else None


def _pad(b: Builder, node: Node) -> Value | None:
    inner = producer(node.args[0], "pad")
    if inner is None or typed(inner.attrs.get("value", 0)) != typed(node.attrs.get("value", 0)):
        return None
    low, high = (
        tuple(simplify_dim(m + n) for m, n in zip(inner.attrs[k], node.attrs[k], strict=True))
        for k in ("low", "high")
    )
    attrs = {**node.attrs, "low": low, "high": high}
    return b.node(OPS["pad"], inner.args[0], types=node.types, **attrs).out


def _scatter_whole(b: Builder, node: Node) -> Value | None:
    """A slice written over the whole tensor."""
    x, src = node.args
    dim, start, size, _ = _slice_parts(node)
    return instead(src, node) if _is(start, 0) and dim_equal(size, x.shape[dim]) else None


def _scatter_same(b: Builder, node: Node) -> Value | None:
    """A slice written back where it was taken from."""
    x, src = node.args
    taken = producer(src, "slice")
    if taken is None or taken.args[0] != x or taken.type.rank != node.type.rank:
        return None
    same = all(map(dim_equal, _slice_parts(taken), _slice_parts(node)))
    return instead(x, node) if same else None


def _grouped_heads(b: Builder, node: Node) -> tuple[Value, ...] | None:
    """Attention repeats the heads of keys and values by itself."""
    q, k, v, *rest = node.args
    few = [_unrepeated(b, x) for x in (k, v)]
    if few[0] is None or few[1] is None or not all(map(dim_equal, few[0].shape[:2], few[1].shape[:2])):
        return None
    return b.node(node.op, q, *few, *rest, types=node.types, **node.attrs).outs


def _unrepeated(b: Builder, x: Value) -> Value | None:
    """``[b, g, s, d]`` of which ``x`` ``[b, g * r, s, d]`` repeats each head ``r`` times."""
    expand = producer(x.node.args[0], "expand") if x.op.name == "reshape" else None
    if expand is None or expand.type.rank != 5:
        return None
    few, shape = expand.args[0], expand.type.shape
    if few.type.rank != 5 or not _is(few.shape[2], 1) or not _is(x.shape[1], shape[1] * shape[2]):
        return None
    kept = (0, 1, 3, 4)
    if not all(dim_equal(few.shape[d], shape[d]) for d in kept) or not dim_equal(x.shape[3], shape[4]):
        return None
    if not dim_equal(x.shape[0], shape[0]) or not dim_equal(x.shape[2], shape[3]):
        return None
    return b.node(OPS["reshape"], few, shape=tuple(shape[d] for d in kept)).out


VIEWS = ("reshape", "permute", "expand", "slice", "flip")
VIEW_RULES: tuple[Rule, ...] = (
    Rule("view of a constant", VIEWS, _of_constant),
    Rule("reshape to the same shape", ("reshape",), lambda b, n: _whole(n)),
    Rule("expand to the same shape", ("expand",), lambda b, n: _whole(n)),
    Rule("permute to the same order", ("permute",), _permute_nothing),
    Rule("slice of everything", ("slice",), _slice_nothing),
    Rule("flip of nothing", ("flip",), _flip_nothing),
    Rule("reshape of reshape", ("reshape",), _reshape),
    Rule("permute of permute", ("permute",), _permute),
    Rule("expand of expand", ("expand",), _expand),
    Rule("slice of slice", ("slice",), _slice),
    Rule("slice of iota", ("slice",), _slice_iota),
    Rule("flip of flip", ("flip",), _flip),
    Rule("permute of size-1 dims", ("permute",), _permute_ones),
    Rule("expand of leading size-1 dims", ("expand",), _expand_ones),
    Rule("cat of one", ("cat",), _cat_one),
    Rule("cat with empty pieces", ("cat",), _cat_empty),
    Rule("pad by nothing", ("pad",), _pad_nothing),
    Rule("pad of pad", ("pad",), _pad),
    Rule("attention over repeated heads", ("attention",), _grouped_heads),
    Rule("slice_scatter over everything", ("slice_scatter",), _scatter_whole),
    Rule("slice_scatter of the slice itself", ("slice_scatter",), _scatter_same),
)
