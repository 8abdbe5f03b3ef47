"""Join a linear layer with the cross-entropy of its results, in the Dynamo graph.

    logits = linear(h, weight, bias)
    loss = cross_entropy(logits.float().view(-1, vocab), target, reduction="mean")
becomes
    rows = tessel.linear_cross_entropy(h.reshape(-1, k), weight, bias, target, ...)[0]
    loss = rows.sum() / (target != ignore_index).sum()

so that the logits are written neither for the forward nor for the backward. Between the two calls there may
be casts to float32, views that keep the last dimension, slices of tokens, and a soft cap
(``tanh(logits / cap) * cap``). Where something else reads the logits they have to be written, and nothing
is changed: the second value of ``join_losses`` says so.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .compat import autocasts
from .fx_effects import erase_unread
from .fx_words import Maker, value_of
from .loss_op import linear_cross_entropy

F = torch.nn.functional
_CROSS_ENTROPY = {F.cross_entropy, torch.ops.aten.cross_entropy_loss.default}
_LINEAR = {F.linear, torch._C._nn.linear, torch.ops.aten.linear.default}
_TANH = {torch.tanh, torch.ops.aten.tanh.default}
_ARGUMENTS = (
    "input",
    "target",
    "weight",
    "size_average",
    "ignore_index",
    "reduce",
    "reduction",
    "label_smoothing",
)
_KNOWN = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


@dataclass
class _Path:
    """From a linear layer to a loss: the layer, what is done to the tokens on the way, first things first."""

    linear: fx.Node
    tokens: list[fx.Node] = field(default_factory=list)
    softcap: float = 0.0


def join_losses(gm: fx.GraphModule) -> tuple[int, list[str]]:
    """Rewrite ``gm`` in place: how many losses were joined, and why others were not, in words."""
    count, notes = 0, []
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _CROSS_ENTROPY:
            continue
        found = _covered(node)
        if isinstance(found, str):
            notes.append(f"cross_entropy: {found}") if found else None
            continue
        _replace(node, *found)
        count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return count, notes


def _covered(node: fx.Node) -> str | tuple[_Path, dict[str, Any]]:
    """How a loss follows from a linear layer, or why it is left alone (nothing: it has no such layer)."""
    a: dict[str, Any] = {**_KNOWN, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    logits, target = value_of(a["input"]), value_of(a["target"])
    if not isinstance(logits, torch.Tensor) or not isinstance(target, torch.Tensor):
        return ""
    path = _path(a["input"])
    if isinstance(path, str):
        return path
    x, weight, bias = _linear_arguments(path.linear)
    if any(a.get(n) is not None for n in ("weight", "size_average", "reduce")):
        return "weights of classes: the logits are written"
    if logits.dim() != 2 or target.dim() != 1 or target.dtype != torch.int64:
        return f"logits {list(logits.shape)} and targets {list(target.shape)} of {target.dtype}: the logits are written"
    plain = isinstance(a["ignore_index"], int) and isinstance(a["label_smoothing"], int | float)
    if not plain or a["reduction"] not in ("mean", "sum", "none"):
        return "an argument that is not a plain number: the logits are written"
    if not 0 <= a["label_smoothing"] <= 1:
        return ""  # eager's error
    values = [value_of(t) for t in (x, weight, bias) if t is not None]
    same = len({t.dtype for t in values}) == 1 or autocasts(values[0].device.type)
    floating = all(t.is_floating_point() and t.layout == torch.strided for t in values)
    if not floating or not same or values[0].dim() < 2 or values[1].dim() != 2:
        return "operands of different dtypes or layouts: the logits are written"
    classes, width = values[1].shape
    if isinstance(classes, int) and isinstance(width, int) and classes < 2 * width:
        return ""  # a classifier: logits take less than what they are made of, and the backward would make them again
    return path, a


def _path(node: Any) -> _Path | str:
    """Back from the logits of a loss to the linear layer that makes them."""
    tokens: list[fx.Node] = []
    cap = 0.0
    while isinstance(node, fx.Node):
        if node.op == "call_function" and node.target in _LINEAR:
            if len(node.users) > 1:
                return "something else reads the logits (a result of the model?): they are written"
            return _Path(node, tokens[::-1], cap)
        if not node.args or not isinstance(node.args[0], fx.Node):
            return ""
        capped = _soft_cap(node) if not cap else None
        if capped is not None:
            node, cap = capped
            continue
        before, after = value_of(node.args[0]), value_of(node)
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            return ""
        if not (_is_upcast(node, before, after) or _keeps_classes(node, before, after)):
            return ""
        if len(node.users) > 1:
            return "something else reads the logits (a result of the model?): they are written"
        if after.shape[:-1] != before.shape[:-1]:
            tokens.append(node)
        node = node.args[0]
    return ""


def _is_upcast(node: fx.Node, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Something that leaves the numbers as they are: a cast upwards, a copy."""
    if node.op != "call_method" or node.target not in ("float", "to", "contiguous", "clone", "double"):
        return False
    same = before.shape == after.shape and before.device == after.device
    return same and torch.promote_types(before.dtype, after.dtype) == after.dtype and after.dtype != torch.float64


def _keeps_classes(node: fx.Node, before: torch.Tensor, after: torch.Tensor) -> bool:
    """A view or a slice of tokens that leaves the last dimension alone."""
    if before.dim() < 2 or after.dim() < 2 or not _equal(before.shape[-1], after.shape[-1]):
        return False
    if node.op == "call_method" and node.target in ("view", "reshape", "flatten"):
        return True
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(i is Ellipsis or isinstance(i, slice) for i in index):
        return False
    last = index[-1]
    whole = last is Ellipsis or (len(index) < before.dim() and Ellipsis not in index)
    return whole or (isinstance(last, slice) and last == slice(None))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and bool(a.node.expr == b.node.expr)


def _number(x: Any) -> float | None:
    return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None


def _soft_cap(node: fx.Node) -> tuple[fx.Node, float] | None:
    """What ``tanh(x / cap) * cap`` caps, and the cap."""
    chain: list[fx.Node] = []
    at: Any = node
    for _ in range(3):
        if not isinstance(at, fx.Node) or len(at.users) > 1 or not at.args:
            return None
        chain.append(at)
        at = at.args[0]
    times, tanh, over = chain
    is_tanh = (tanh.op == "call_function" and tanh.target in _TANH) or (
        tanh.op == "call_method" and tanh.target == "tanh"
    )
    if times.target not in (operator.mul, torch.mul) or over.target not in (operator.truediv, torch.div):
        return None
    cap, other = (_number(n.args[1]) if len(n.args) == 2 else None for n in (times, over))
    if not is_tanh or cap is None or cap != other or cap <= 0 or not isinstance(at, fx.Node):
        return None
    return at, cap


def _linear_arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    a = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
    return a["input"], a["weight"], a.get("bias")


def _replace(node: fx.Node, path: _Path, a: dict[str, Any]) -> None:
    x, weight, bias = _linear_arguments(path.linear)
    width = value_of(weight).shape[1]
    out = value_of(node)
    with node.graph.inserting_before(node):
        add = Maker(node.graph, node)
        for step in path.tokens:
            if step.target is operator.getitem:
                x = add(operator.getitem, x, step.args[1])
        if path.tokens or value_of(x).dim() != 2:
            x = add("reshape", x, -1, width)
        target, ignore = a["target"], a["ignore_index"]
        smoothing = float(a["label_smoothing"])
        pair = add(linear_cross_entropy, x, weight, bias, target, ignore, smoothing, path.softcap)
        loss = add(operator.getitem, pair, 0)
        if a["reduction"] != "none":
            loss = add("sum", loss)
        if a["reduction"] == "mean":
            loss = add(torch.div, loss, add("sum", add(torch.ne, target, ignore)))
        if isinstance(out, torch.Tensor):
            loss = add("to", loss, out.dtype)
    loss.meta = dict(node.meta)
    node.replace_all_uses_with(loss)
    erase_unread([node])


__all__ = ["join_losses"]
