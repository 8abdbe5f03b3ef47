"""Attention of one query: rows for the heads that share keys, and parts of the keys that run side by side.

    %4 = attention(%q[b, hk * r, 1, d], %k, %v)
becomes, with s parts of the keys, each a head of its own,
    %1 = attention(%q as [b, hk * s, r, d], %k as [b, hk * s, n / s, d], %v alike)    (out, lse) of each part
    %top = amax(%lse); %w = exp(%lse - %top);  %4 = sum(%w * %out) / sum(%w)

One query a head would leave fifteen of sixteen rows of a tile empty, and a batch of few heads most of a GPU. Views
cost nothing: a kernel reads queries, keys and mask where they lie. Parts are merged in a fixed order, so the bits are
those of every run (Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023).
"""

from __future__ import annotations

import math

from ..config import Options
from ..ir.node import Builder, Graph, Node, Value
from ..ir.types import Dim, try_divide
from ..ops import OPS
from ..ops.emit import Emit

__all__ = ["run", "split_attention_keys"]

_PROGRAMS = 128  # about the units of a large GPU: more programs than this need no parts
_LEAST = 256  # keys of a part: below, its merge costs more than it gains


def run(graph: Graph, options: Options) -> Graph:
    """The graph with attention of single queries rewritten; as it is where a library computes it."""
    if options.attention == "library":
        return graph
    return graph.rewrite(_rewrite)


def _rewrite(builder: Builder, node: Node) -> tuple[Value, ...] | None:
    if node.op.name != "attention" or not _one_query(node):
        return None
    q, k = node.args[:2]
    batch, heads, keys = (int(n) if isinstance(n, int) else 1 for n in (q.shape[0], k.shape[1], k.shape[2]))
    parts = 1
    while batch * heads * parts < _PROGRAMS and keys % (2 * parts) == 0 and keys // (2 * parts) >= _LEAST:
        parts *= 2
    if parts == 1 and q.shape[1] == k.shape[1]:
        return None
    return split_attention_keys(builder, node, parts)


def _one_query(node: Node) -> bool:
    """Whether the only row sees all keys as far as the attributes say, and no score stands beside them."""
    q, k, *rest = node.args
    sizes = (*q.shape[1:3], *k.shape[1:3])
    if not all(isinstance(n, int) for n in sizes) or q.shape[2] != 1 or (len(rest) > 2 and rest[2] is not None):
        return False
    offset, window = node.attrs.get("offset", 0), node.attrs.get("window")
    if not isinstance(offset, int):
        return False
    reach = k.shape[2] - 1
    if node.attrs.get("causal"):
        return bool(offset >= reach and (window is None or offset - window < 0))
    return window is None or bool(offset - window < 0 and offset + window > reach)


def split_attention_keys(builder: Builder, node: Node, parts: int) -> tuple[Value, Value]:
    """``(out, lse)`` of attention with one query from parts of the keys, which must be a multiple of ``parts``."""
    e = Emit(builder)
    q, k, v, *rest = node.args
    b, heads, _, d = q.shape
    shared, keys, width = k.shape[1], k.shape[2], v.shape[3]
    group, each = heads // shared, keys // parts
    spread = (b, shared, parts, group, d)
    rows = e("expand", e("reshape", q, shape=(b, shared, 1, group, d)), shape=spread)
    rows = e.reshape(rows, (b, shared * parts, group, d))
    kk, vv = (e.reshape(x, (b, shared * parts, each, x.shape[3])) for x in (k, v))
    mask = rest[0] if rest else None
    if mask is not None:
        mask = _parts_of_mask(e, mask, shared, group, parts)
    attrs = {n: x for n, x in node.attrs.items() if n in ("scale", "softcap")}
    out, lse = builder.node(OPS["attention"], rows, kk, vv, mask, causal=False, **attrs).outs
    if parts > 1:
        lse = e.reshape(lse, (b, shared, parts, group))
        top = e("amax", lse, dims=(2,), keepdim=True)
        weight = e("exp", e("sub", lse, e("where", e("eq", top, -math.inf), 0.0, top)))
        total = e("sum", weight, dims=(2,), keepdim=True)
        wide = e.cast(e.reshape(out, (b, shared, parts, group, width)), lse.dtype)
        merged = e(
            "sum", e("mul", wide, e("reshape", weight, shape=(b, shared, parts, group, 1))), dims=(2,), keepdim=True
        )
        kept = e("reshape", e("where", e("eq", total, 0.0), 1.0, total), shape=(b, shared, 1, group, 1))
        out = e.cast(e("div", merged, kept), q.dtype)
        lse = e("add", top, e("log", total))  # log 0 is the -inf of a row that sees nothing
    return e.reshape(out, (b, heads, 1, width)), e.reshape(lse, (b, heads, 1))


def _parts_of_mask(e: Emit, mask: Value, shared: Dim, group: Dim, parts: int) -> Value:
    """A mask ``[b|1, h|1, 1, n|1]`` as ``[b|1, hk * s, r|1, n / s|1]``."""
    shape: list[Dim] = [1] * (4 - len(mask.shape)) + list(mask.shape)
    alone = shape[1] == 1
    heads, rows = (1, 1) if alone else (shared, group)
    cut = 1 if shape[3] == 1 else parts
    each = try_divide(shape[3], cut)
    assert each is not None
    x = e.reshape(mask, (shape[0], heads, rows, cut, each))
    x = e("permute", x, dims=(0, 1, 3, 2, 4))
    x = e("expand", x, shape=(shape[0], shared, parts, rows, each))
    return e.reshape(x, (shape[0], shared * parts, rows, each))
