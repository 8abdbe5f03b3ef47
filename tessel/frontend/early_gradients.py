"""Make the gradients of a loss where the loss is made, in the joint graph.

    loss, lse = linear_cross_entropy(x, weight, bias, target, ...)
    dx, dweight, dbias = linear_cross_entropy_backward(expand(by, [n]), x, weight, bias, target, lse, ...)
becomes
    loss, one, two, three = linear_cross_entropy_gradients(x, weight, bias, target, ...)
    dx, dweight, dbias = scaled_gradients(one, two, three, by)

where every token's loss has the same gradient, as in a sum or a mean: what is multiplied by it can be known before it
is. The logits are then made once instead of twice (the idea of Hsu et al. 2024, "Liger kernel"). A loss that is
asked for with gradients and never differentiated pays for them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .loss_op import linear_cross_entropy, linear_cross_entropy_gradients, scaled_gradients

_BACKWARD = torch.ops.tessel.linear_cross_entropy_backward.default
_DTYPES = (torch.float32, torch.bfloat16)


def make_early(joint: fx.GraphModule) -> int:
    """Rewrite the joint graph in place; how many losses were."""
    count = 0
    for node in list(joint.graph.nodes):
        if node.target is _BACKWARD and (found := _found(node)) is not None:
            _replace(node, *found)
            count += 1
    if count:
        joint.graph.lint()
        joint.recompile()
    return count


def _found(back: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The loss whose gradient this is, and the one number that all its tokens' losses are multiplied by."""
    grad, *operands = back.args
    lse, attrs = operands[4], operands[5:8]
    if not isinstance(lse, fx.Node) or lse.target is not operator.getitem:
        return None
    loss: Any = lse.args[0]
    same = loss.target is linear_cross_entropy and loss.args == (*operands[:4], *attrs)
    _, smoothing, softcap = attrs
    if not same or len(lse.users) > 1 or (smoothing and softcap) or operands[0].meta["val"].dtype not in _DTYPES:  # type: ignore[union-attr]
        return None
    spread = isinstance(grad, fx.Node) and grad.target is torch.ops.aten.expand.default
    by = grad.args[0] if spread else None  # type: ignore[union-attr]
    return (loss, by) if isinstance(by, fx.Node) and by.meta["val"].dim() == 0 else None


def _replace(back: fx.Node, loss: fx.Node, by: fx.Node) -> None:
    graph, wanted = back.graph, back.args[-1]
    with graph.inserting_before(loss):
        made = _call(graph, linear_cross_entropy_gradients, (*loss.args, wanted), loss)
        items = [_item(graph, made, i, loss) for i in range(4)]
    with graph.inserting_before(back):
        scaled = _call(graph, scaled_gradients, (*items[1:], by), back)
    for user in list(loss.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(items[0])
    back.replace_all_uses_with(scaled)
    graph.erase_node(back)
    for user in list(loss.users):
        graph.erase_node(user)
    graph.erase_node(loss)


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": target(*fx.node.map_arg(args, lambda n: n.meta["val"]))}
    return node


def _item(graph: fx.Graph, made: fx.Node, i: int, like: fx.Node) -> fx.Node:
    node = graph.call_function(operator.getitem, (made, i))
    node.meta = {**like.meta, "val": made.meta["val"][i]}
    return node


__all__ = ["make_early"]
