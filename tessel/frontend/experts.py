"""Join the calls of a layer of experts, in a Dynamo or an exported graph, into ``tessel::experts``.

    rows = x[perm // choices]                        perm, offsets: slots sorted by expert
    pre = grouped_mm(rows, gate_up, offsets)         or: bmm of the matrices gathered by expert
    h = act(gate) * up                               halves, or alternating columns of pre
    y = grouped_mm(h, down, offsets) * scale[perm, None]
    out = y[inverse].view(tokens, choices, width).sum(1)
becomes
    out = tessel.experts(x, gate_up, bias, down, bias, index, scale, ...)[0]

These are the "grouped_mm" and "batched_mm" implementations of transformers. (Its "eager" one loops over the experts
that were hit, which Dynamo does not capture: ``library_functions`` has the first traced for it.) A layer with a step
between that is not known here, such as a norm of the experts' results, stays as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .experts_op import experts
from .fx_effects import erase_unread
from .fx_words import Maker, argument, call_name, value_of

F = torch.nn.functional
_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
_ACTS = {"silu": "silu", "gelu": "gelu", "relu": "relu"}
_STRIDED = {0: slice(None, None, 2), 1: slice(1, None, 2)}


class _Other(Exception):
    """Not the pattern; the text says what is missing."""


@dataclass
class _Product:
    """One product by expert: what it multiplies, and by which order of the slots."""

    rows: Any
    weight: Any
    turned: bool
    bias: Any
    index: Any  # [slots]: the experts, before sorting
    perm: Any  # None: slots in their own order


def join_experts(gm: fx.GraphModule, train: bool = True) -> tuple[int, list[str]]:
    """Rewrite ``gm`` in place: how many layers were joined, and why grouped products were left, in words.

    Args:
        gm: a Dynamo graph, or one of ``torch.export``, in operators of ATen.
        train: gradients may be asked for; of an exported graph they are not.
    """
    count, notes = 0, []
    for node in list(gm.graph.nodes):
        if _is(node, "sum"):
            try:
                found = _layer(node)
            except _Other:
                continue
            _replace(node, found, train)
            count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    left = [n for n in gm.graph.nodes if n.op == "call_function" and call_name(n) in _GROUPED]
    if left:
        notes.append(f"{len(left)} grouped products are not part of a known layer of experts: each is a call")
    return count, notes


def _is(node: Any, *names: str) -> bool:
    """Whether a node calls a function or a method of one of these names."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and call_name(node) in names


def _need(test: bool, what: str) -> None:
    if not test:
        raise _Other(what)


def _uncast(node: Any) -> Any:
    """Through casts that leave the dtype as it is."""
    while _is(node, "to", "contiguous") and value_of(node).dtype == value_of(node.args[0]).dtype:
        node = node.args[0]
    return node


def _taken(node: Any, what: str) -> tuple[Any, Any]:
    """What rows are taken of, and by which numbers."""
    if _is(node, "getitem") and isinstance(node.args[1], fx.Node):
        return node.args[0], node.args[1]
    _need(_is(node, "index") and len(node.args[1]) == 1, what)
    return node.args[0], node.args[1][0]


def _item(node: Any, index: Any) -> Any:
    """What ``node`` takes the item ``index`` of."""
    _need(_is(node, "getitem") and node.args[1] == index, f"an item {index}")
    return node.args[0]


def _flattened(node: Any) -> Any:
    _need(_is(node, "reshape", "view", "flatten"), "a flattened tensor")
    _need(value_of(node).dim() == 1 and value_of(node.args[0]).dim() == 2, "a flattened matrix")
    return node.args[0]


def _with_bias(node: Any) -> tuple[Any, Any, list[Any]]:
    """A product, the bias of each expert that is added to it in place, and that addition."""
    if _is(node, "add_"):
        node = node.args[0]
    added = [u for u in node.users if _is(u, "add_") and u.args[0] is node]
    if not added:
        return node, None, []
    _need(len(added) == 1 and len(added[0].args) == 2, "one addition of a bias")
    bias = _taken(added[0].args[1], "a bias by expert")
    _need(value_of(bias[0]).dim() == 2, "a bias by expert")
    return node, bias, added


def _product(node: Any) -> _Product:
    """The product whose results ``node`` is."""
    node = _uncast(node)
    _need(isinstance(node, fx.Node), "a product")
    made, bias, added = _with_bias(node)
    readers = [u for n in (made, *added) for u in n.users if u not in added]
    _need(1 <= len(readers) <= 2, "a product read by one step")
    if _is(made, *_GROUPED):
        rows, weight, offsets = made.args[0], made.args[1], argument(made, 2, "offs")
        plain = argument(made, 3, "bias") is None and argument(made, 4, "out_dtype") is None
        _need(plain, "a grouped product without bias")
        sort, bins = _sorted(offsets)
        turned = not _is(weight, "transpose")
        weight = weight if turned else _transposed(weight)
        _need(bins == value_of(weight).shape[0], "offsets of all experts")
        by: Any = [u for u in sort.users if _is(u, "getitem") and u.args[1] == 0]
        perm = [u for u in sort.users if _is(u, "getitem") and u.args[1] == 1]
        _need(len(by) == len(perm) == 1, "one order of the slots")
        _need(bias is None or bias[1] in by, "a bias by expert")
        return _Product(_uncast(rows), weight, turned, bias and bias[0], sort.args[0], perm[0])
    return _batched(made, bias)


def _batched(made: Any, bias: Any) -> _Product:
    _need(_is(made, "squeeze") and _is(made.args[0], "bmm"), "a batched product")
    a, b = made.args[0].args
    turned = _is(a, "unsqueeze") and a.args[1] == 1
    rows, weights = (a, b) if turned else (b, a)
    _need(_is(rows, "unsqueeze") and rows.args[1] == (1 if turned else -1), "rows of one batch each")
    _need(made.args[1] == rows.args[1], "rows of one batch each")
    weight, index = _taken(weights, "matrices by expert")
    _need(value_of(weight).dim() == 3, "matrices by expert")
    _need(bias is None or bias[1] is index, "a bias by expert")
    return _Product(_uncast(rows.args[0]), weight, turned, bias and bias[0], index, None)


def _transposed(node: Any) -> Any:
    dims = {d % 3 for d in node.args[1:] if isinstance(d, int)}
    _need(dims == {1, 2}, "matrices turned")
    return node.args[0]


def _sorted(offsets: Any) -> tuple[Any, int]:
    """The sort of the experts' numbers whose counts, summed up, are these offsets; the number of experts."""
    _need(_is(offsets, "cumsum"), "offsets that are running counts")
    counts = offsets.args[0]
    _need(_is(counts, "histc"), "counts of experts")
    bins = argument(counts, 1, "bins")
    ranged = (argument(counts, 2, "min"), argument(counts, 3, "max")) == (0, bins - 1)
    _need(ranged, "counts of all experts")
    numbers = counts.args[0]
    while _is(numbers, "float", "int", "to"):
        numbers = numbers.args[0]
    sort = _item(numbers, 0)
    _need(_is(sort, "sort") and len(sort.args) == 1 and not sort.kwargs, "a sort by expert")
    return sort, bins


def _gate(node: Any) -> tuple[Any, dict[str, Any]]:
    """The product before ``act(gate) * up``, and what is done."""
    node = _uncast(node)
    _need(_is(node, "mul") and len(node.args) == 2, "gate times up")
    a, b = node.args
    if _is(a, "add") or _is(b, "add"):
        return _limited(*((a, b) if _is(a, "add") else (b, a)))
    act, up = (a, b) if _is(a, *_ACTS) else (b, a)
    _need(_is(act, *_ACTS), "a known activation")
    name = _ACTS[call_name(act)]
    how = argument(act, 1, "approximate", "none") if name == "gelu" else "none"
    _need(how in ("none", "tanh"), "a known activation")
    pre, alternating = _halves(act.args[0], up)
    return pre, {"act": "gelu_tanh" if how == "tanh" else name, "interleaved": alternating, "alpha": 1.0, "limit": 0.0}


def _halves(gate: Any, up: Any) -> tuple[Any, bool]:
    """What gate and up are parts of, and whether its columns alternate."""
    if _is(gate, "slice") and _is(up, "slice"):  # an exported graph's spelling of the alternating columns
        source, last = gate.args[0], value_of(gate.args[0]).dim() - 1
        plain = all(s.args[1] in (-1, last) and s.args[3] >= value_of(source).shape[-1] for s in (gate, up))
        _need(plain and up.args[0] is source and (gate.args[2], up.args[2]) == (0, 1), "gate and up of one product")
        _need(argument(gate, 4, "step", 1) == argument(up, 4, "step", 1) == 2, "gate and up of one product")
        return source, True
    _need(_is(gate, "getitem") and _is(up, "getitem"), "gate and up of one product")
    source = gate.args[0]
    _need(up.args[0] is source, "gate and up of one product")
    if (gate.args[1], up.args[1]) == (0, 1) and _is(source, "chunk"):
        _need(argument(source, 1, "chunks") == 2 and argument(source, 2, "dim", 0) in (-1, 1), "two halves")
        return source.args[0], False
    _need((gate.args[1], up.args[1]) == ((..., _STRIDED[0]), (..., _STRIDED[1])), "gate and up of one product")
    return source, True


def _limited(plus: Any, glu: Any) -> tuple[Any, dict[str, Any]]:
    """``(clamp(up) + 1) * (clamp(gate) * sigmoid(alpha * clamp(gate)))``."""
    _need(plus.args[1] == 1 and _is(plus.args[0], "clamp") and _is(glu, "mul"), "a limited gate")
    gate, sigmoid = glu.args
    _need(_is(gate, "clamp") and _is(sigmoid, "sigmoid") and _is(sigmoid.args[0], "mul"), "a limited gate")
    scaled, alpha = sigmoid.args[0].args
    up = plus.args[0]
    limit = argument(gate, 2, "max")
    low = argument(gate, 1, "min") is None and argument(up, 1, "min") == -limit and argument(up, 2, "max") == limit
    _need(scaled is gate and low and all(isinstance(n, int | float) for n in (alpha, limit)), "a limited gate")
    pre, alternating = _halves(gate.args[0], up.args[0])
    return pre, {"act": "limited", "interleaved": alternating, "alpha": float(alpha), "limit": float(limit)}


def _layer(node: Any) -> dict[str, Any]:
    """The operands of the layer whose result ``node`` sums up.

    Raises:
        _Other: it is no such sum.
    """
    _need(argument(node, 1, "dim") in (1, [1], (1,)) and not argument(node, 2, "keepdim", False), "a sum over choices")
    view = node.args[0]
    _need(_is(view, "view", "reshape") and value_of(view).dim() == 3, "rows by token and choice")
    weighted = view.args[0]
    inverse = None
    if _is(weighted, "getitem", "index"):
        weighted, inverse = _taken(weighted, "rows in their own order")
    _need(_is(weighted, "mul") and len(weighted.args) == 2, "rows times weights")
    rows, scales = weighted.args if _is(weighted.args[1], "unsqueeze") else weighted.args[::-1]
    _need(_is(scales, "unsqueeze") and scales.args[1] in (-1, 1), "rows times weights")
    second = _product(rows)
    pre, attrs = _gate(second.rows)
    first = _product(pre)
    same = first.index is second.index and first.perm is second.perm and first.turned == second.turned
    _need(same, "both products of one order")
    scale = scales.args[0]
    choices = value_of(view).shape[1]
    if second.perm is not None:
        scale, order = _taken(scale, "weights in the order of the slots")
        _need(order is second.perm, "weights in the order of the slots")
        _inverse(inverse, second.perm)
        x, tokens = _taken(first.rows, "rows of tokens")
        _need(_is(tokens, "floordiv", "floor_divide") and tokens.args == (second.perm, choices), "rows of tokens")
    else:
        _need(inverse is None and _is(first.rows, "repeat_interleave"), "rows of tokens")
        _need(first.rows.args[1] == choices and argument(first.rows, 2, "dim") == 0, "rows of tokens")
        x = first.rows.args[0]
    index, scale = _flattened(second.index), _flattened(scale)
    _need(value_of(index).shape[1] == choices and value_of(x).dim() == 2, "tokens and their choices")
    dtypes = {value_of(t).dtype for t in (x, first.weight, second.weight)}
    _need(len(dtypes) == 1 and value_of(index).dtype == torch.int64, "one dtype")
    return {
        "operands": (x, first.weight, first.bias, second.weight, second.bias, index, scale),
        "attrs": (attrs["act"], attrs["interleaved"], first.turned, attrs["alpha"], attrs["limit"]),
    }


def _inverse(node: Any, perm: fx.Node) -> None:
    """``inverse[perm] = arange``."""
    if _is(node, "index_put_"):
        room, places, values = node.args[:3]
        _need(_is(room, "empty_like") and room.args[0] is perm and len(room.users) == 1, "the inverse order")
        _need(len(places) == 1 and places[0] is perm and _is(values, "arange"), "the inverse order")
        return
    _need(_is(node, "empty_like") and node.args[0] is perm, "the inverse order")
    writes = [u for u in node.users if _is(u, "setitem") and u.args[0] is node]
    _need(len(writes) == 1 and writes[0].args[1] is perm and _is(writes[0].args[2], "arange"), "the inverse order")


def _replace(node: fx.Node, found: dict[str, Any], train: bool) -> None:
    out = value_of(node)
    values = [value_of(t) for t in found["operands"]]
    keep = train and torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)
    with node.graph.inserting_before(node):
        add = Maker(node.graph, node)
        got = add(operator.getitem, add(experts, *found["operands"], *found["attrs"], keep), 0)
        if value_of(found["operands"][0]).dtype != out.dtype:
            got = add("to", got, out.dtype)
    got.meta = dict(node.meta)
    node.replace_all_uses_with(got)
    erase_unread([node])


__all__ = ["join_experts"]
