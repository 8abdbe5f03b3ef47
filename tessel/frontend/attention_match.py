"""Attention that a model writes out by hand becomes the attention operator, in the Dynamo graph or an exported one.

    scores = matmul(q, k.transpose(-1, -2)) * scale + bias
    weights = softmax(scores.float(), -1).to(q.dtype)
    out = matmul(dropout(weights, 0.0), v)
becomes
    out = tessel.attention(q, k, v, bias, False, scale)[0]

Before AOTAutograd, so that forward and backward agree on one operator and gradients (a bias' too) come from it. From
a softmax the matcher walks down to the product with the values and up to the product of queries and keys, and keeps
what lies between as the operator says it: one scale, one soft cap, masks, a sink column. It never guesses: whatever
else it meets, or a score that something else reads, is a ``Refused`` with a reason, and the graph stays as it is.

Rows that hide every key by -inf give zeros, as ``scaled_dot_product_attention`` says; by hand they give NaN.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from .attention_op import attention
from .attention_walk import Scores, down, up
from .compat import autocasts
from .fx_words import (
    CASTS,
    SAME,
    VIEWS,
    Maker,
    Refused,
    argument,
    op_name,
    readers,
    same_size,
    shape_of,
    value_of,
)

__all__ = ["join_attention", "rewrite", "shared_heads", "whole_groups"]


def _strip(node: Any, dtype: torch.dtype) -> Any:
    """An operand before it was cast up from ``dtype``, the operator's own arithmetic is wide."""
    while op_name(node) in CASTS and value_of(node).dtype != dtype:
        if not isinstance(node.args[0], fx.Node) or value_of(node.args[0]).dtype != dtype:
            break
        node = node.args[0]
    return node


def _untransposed(node: fx.Node) -> fx.Node | None:
    """The operand of a swap of the last two dims."""
    rank, name = len(shape_of(node)), op_name(node)
    if name in ("transpose", "swapaxes") and {node.args[1] % rank, node.args[2] % rank} == {rank - 2, rank - 1}:  # type: ignore[operator]
        return node.args[0]  # type: ignore[return-value]
    if name == "permute":
        dims = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        if [d % rank for d in dims] == [*range(rank - 2), rank - 1, rank - 2]:  # type: ignore[union-attr,operator]
            return node.args[0]  # type: ignore[return-value]
    return None


def shared_heads(node: fx.Node) -> tuple[fx.Node, int]:
    """Keys or values before their heads were repeated for groups of query heads, and how often; ``(node, 1)`` if not.

    Knows ``x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)`` and ``x.repeat_interleave(n, 1)``.
    """
    name = op_name(node)
    if name == "repeat_interleave" and isinstance(node.args[0], fx.Node):
        times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
        if isinstance(times, int) and dim in (1, -3) and len(shape_of(node)) == 4:
            return node.args[0], times
        return node, 1
    chain: list[fx.Node] = []
    at: Any = node
    while isinstance(at, fx.Node) and op_name(at) in (*VIEWS, "expand", "getitem", "unsqueeze", "clone", "contiguous"):
        if op_name(at) == "getitem" and not isinstance(value_of(at.args[0]), torch.Tensor):
            break
        chain.append(at)
        at = at.args[0]
        wide = [n for n in chain if op_name(n) == "expand"]
        if len(wide) == 1 and len(shape_of(at)) == 4:
            before, spread, after = shape_of(at), shape_of(wide[0]), shape_of(node)
            opened = shape_of(wide[0].args[0])
            fits = len(spread) == 5 and len(after) == 4 and isinstance(spread[2], int) and opened[2] == 1
            fits = (
                fits
                and all(map(same_size, (*spread[:2], *spread[3:]), before))
                and all(map(same_size, (after[0], *after[2:]), (before[0], *before[2:])))
            )
            return (at, spread[2]) if fits else (node, 1)
    return node, 1


def _mask(add: Maker, s: Scores) -> Any:
    """The one mask of a row of terms: added numbers, and -inf or a finite number where a condition fails."""

    def placed(x: Any) -> Any:
        shape = shape_of(x)
        if s.heads is not None and len(shape) == 3:
            one = isinstance(shape[0], int) and shape[0] == 1
            return add("unsqueeze", x, 0) if one else add("unflatten", x, 0, (-1, s.heads))
        return x

    shown = None
    total = None
    for cond, wanted, fill in s.seen:
        one = placed(cond)
        if fill == -math.inf:
            one = one if wanted else add(torch.logical_not, one)
            shown = one if shown is None else add(torch.logical_and, shown, one)
        else:
            # In f32 a fill of a wider range than the scores' own is still one.
            low = add(torch.full, (), fill, dtype=torch.float32, device=value_of(cond).device)
            zero = add(torch.full, (), 0.0, dtype=torch.float32, device=value_of(cond).device)
            one = add(torch.where, one, zero, low) if wanted else add(torch.where, one, low, zero)
            total = one if total is None else add(torch.add, total, one)
    for c, term in s.added:
        one = placed(term)
        one = one if c == 1.0 else add(torch.mul, one, c)
        total = one if total is None else add(torch.add, total, one)
    if total is None or shown is None:
        return shown if total is None else total
    return add("masked_fill", total, add(torch.logical_not, shown), -math.inf)


def rewrite(softmax: fx.Node) -> fx.Node:
    """Replace the attention around a softmax by the operator; the node of the result.

    Raises:
        Refused: it is something else, or in a form that the operator does not say.
    """
    shape = shape_of(softmax)
    dim = argument(softmax, 1, "dim")
    if dim not in (-1, len(shape) - 1) or len(shape) not in (3, 4):
        raise Refused("a softmax that is not over the keys")
    weights = down(softmax)
    if value_of(softmax).dtype == torch.float64 != value_of(weights.v).dtype:
        raise Refused("weights computed in float64")
    s = up(softmax.args[0], Scores(column=weights.drops_column))
    if s.column:
        raise Refused("a column of weights is dropped that no sink gave")
    q, kt, v = s.q, s.kt, weights.v
    if not all(isinstance(x, fx.Node) for x in (q, kt)):
        raise Refused("queries or keys are no tensor")
    dtype = value_of(v).dtype
    q, kt = _strip(q, dtype), _strip(kt, dtype)
    k = _untransposed(kt)
    k = k if k is None else _strip(k, dtype)
    keys = kt if k is None else k
    types = {value_of(x).dtype for x in (q, keys, v)}
    autocast = autocasts(value_of(v).device.type) or value_of(weights.product).dtype != dtype
    if not dtype.is_floating_point or (len(types) > 1 and not autocast):
        raise Refused(f"operands of different dtypes, {', '.join(sorted(map(str, types)))}")
    if len({value_of(x).device for x in (q, keys, v)}) > 1:
        raise Refused("operands on different devices")
    _check_shapes(q, keys, k is not None, v, s.heads)
    graph, product = weights.product.graph, weights.product
    result = value_of(product)
    with graph.inserting_before(product):
        add = Maker(graph, product)
        k = add("transpose", kt, -1, -2) if k is None else k
        rank = len(shape_of(q))
        if rank == 3:
            heads = s.heads
            opened = [add("unflatten", x, 0, (-1, heads)) if heads else add("unsqueeze", x, 0) for x in (q, k, v)]
        else:
            opened = [q, *whole_groups(k, v)]
        mask = _mask(add, s)
        scale = s.times * (s.softcap or 1.0)
        sink = None if s.sink is None else add("reshape", s.sink, (-1,))
        pair = add(attention, *opened, mask, False, scale, sink, 0, None, s.softcap)
        out = add(operator.getitem, pair, 0)
        if rank == 3:
            out = add("flatten", out, 0, 1) if s.heads else add("squeeze", out, 0)
        if not autocast and result.dtype != dtype:
            out = add("to", out, result.dtype)
        out = add("contiguous", out)  # as a product is: a later view may rely on it
    out.meta = dict(product.meta)
    product.replace_all_uses_with(out)
    _erase(product)
    return out


_CHAIN = frozenset(
    {"matmul", "baddbmm", "add", "sub", "mul", "div", "masked_fill", "where", "tanh", "softmax", "dropout", "cat"}
    | {"getitem", "max", "amax", "expand", "transpose", "permute"}
    | VIEWS
    | SAME
)


def _erase(node: fx.Node) -> None:
    """Take a node and what only it needed out of the graph, as far as it is arithmetic on intermediate values."""
    stack = [node]
    while stack:
        at = stack.pop()
        if readers(at) or op_name(at) not in _CHAIN:
            continue
        for assertion in list(at.users):
            assertion.graph.erase_node(assertion)
        above = at.all_input_nodes
        if any(n.op == "placeholder" for n in above[:1]) and at is not node:
            continue  # an in-place form would change an input
        at.graph.erase_node(at)
        stack += [n for n in above if n not in stack]


def whole_groups(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values with the heads they had before they were repeated for groups, if both were, alike."""
    (kk, n), (vv, m) = shared_heads(k), shared_heads(v)
    return (kk, vv) if n == m and n > 1 else (k, v)


def _check_shapes(q: fx.Node, keys: fx.Node, plain: bool, v: fx.Node, heads: int | None) -> None:
    a, b, c = shape_of(q), shape_of(keys), shape_of(v)
    b = b if plain else (*b[:-2], b[-1], b[-2])
    if not len(a) == len(b) == len(c) or len(a) not in (3, 4):
        raise Refused(f"queries {list(a)}, keys {list(b)} and values {list(c)}")
    same = [(a[0], b[0]), (a[0], c[0]), *zip(b[1:-1], c[1:-1], strict=True), (a[-1], b[-1])]
    if len(a) == 4:
        ok = same_size(a[1], b[1]) or (isinstance(a[1], int) and isinstance(b[1], int) and b[1] and a[1] % b[1] == 0)
        if not ok or (not same_size(a[1], b[1]) and b[1] != 1):  # matmul broadcasts one head, it repeats none
            raise Refused(f"queries {list(a)} and keys {list(b)} broadcast")
    if not all(same_size(*pair) for pair in same):
        raise Refused(f"queries {list(a)}, keys {list(b)} and values {list(c)} broadcast")


def _looks_like_attention(softmax: fx.Node) -> bool:
    """Whether a softmax has a product of two computed tensors above it, near, worth a word if it is left alone."""
    stack: list[tuple[Any, int]] = [(softmax.args[0] if softmax.args else None, 8)]
    while stack:
        node, left = stack.pop()
        if op_name(node) in ("matmul", "baddbmm"):
            return True
        if isinstance(node, fx.Node) and left and op_name(node) not in ("linear", "addmm"):
            stack += [(a, left - 1) for a in node.args if isinstance(a, fx.Node)]
    return False


def join_attention(gm: fx.GraphModule) -> tuple[int, list[str]]:
    """Rewrite ``gm`` in place: how many attentions were found, and why others were left alone."""
    count, notes = 0, []
    for node in list(gm.graph.nodes):
        if op_name(node) != "softmax" or not node.args:
            continue
        try:
            rewrite(node)
            count += 1
        except Refused as problem:
            if _looks_like_attention(node):
                notes.append(f"attention written out at {node.name} stays as it is: {problem}")
    if count:
        gm.graph.lint()
        gm.recompile()
    return count, notes
