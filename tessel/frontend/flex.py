"""``torch.nn.attention.flex_attention``: its score and mask functions written into the graph as pointwise operators.

    flex_attention(q, k, v, score_mod, block_mask, scale)
becomes
    scores = score_mod(matmul(q, k^T) * scale, b, h, i, j)      b .. j: places along the four axes, as tensors
    weights = softmax(where(mask_mod(b, h, i, j), scores, -inf), -1);  out = matmul(weights, v)

which ``attention_match`` then takes for what it is: a bias, a soft cap, a mask whose structure is known because its own
arithmetic is in the graph. The blocks that the caller has computed are not needed. A score function that is no such
edit stays written out, in f32, with the rows that see nothing set to zero, as flex_attention has them.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import torch
from torch import fx

from .attention_match import rewrite
from .fx_words import Maker, Refused, value_of


def join_flex(gm: fx.GraphModule) -> tuple[int, list[str]]:
    """Rewrite ``gm`` in place: how many calls became the attention operator, and why others did not."""
    count, notes, changed = 0, [], False
    flex = getattr(torch.ops.higher_order, "flex_attention", None)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or flex is None or node.target is not flex:
            continue
        try:
            softmax, shown = _write_out(gm, node)
        except Refused as problem:
            notes.append(f"flex_attention at {node.name} stays as it is: {problem}")
            continue
        changed = True
        try:
            rewrite(softmax)
            count += 1
        except Refused as problem:
            notes.append(f"flex_attention at {node.name} is written out: {problem}")
            if shown is not None:
                _zero_empty_rows(softmax, shown)
    if changed:
        gm.graph.lint()
        gm.recompile()
    return count, notes


def _write_out(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Put plain operators in the place of a call; the softmax, and which keys are seen if that is limited."""
    operands: tuple[Any, ...] = (*node.args, *[()] * 9)[:9]
    q, k, v, score_mod, block_mask, scale, _, score_buffers, mask_buffers = operands
    readers = list(node.users)
    if any(u.target is not operator.getitem or (u.args[1] != 0 and u.users) for u in readers):
        raise Refused("its log-sum-exp is read")
    values = [value_of(x) for x in (q, k, v)]
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in values):
        raise Refused("operands that are not [batch, heads, length, width]")
    (b, hq, m, _), (kb, hk, n, _) = values[0].shape, values[1].shape
    if not all(isinstance(x, int) for x in (b, kb, hq, hk, m, n)) or b != kb or hk == 0 or hq % hk:
        raise Refused("sizes that are not known numbers, or a batch that broadcasts")
    functions = [_subgraph(gm, f) for f in (score_mod, block_mask[-1])]
    wide = torch.float64 if values[0].dtype == torch.float64 else torch.float32
    with node.graph.inserting_before(node):
        add = Typed(node.graph, node)
        if hq != hk:
            k, v = (add("repeat_interleave", x, hq // hk, 1) for x in (k, v))
        scores = add(torch.matmul, add("to", q, wide), add("transpose", add("to", k, wide), -1, -2))
        scores = add(operator.mul, scores, float(scale))
        places = []
        for dim, size in enumerate((b, hq, m, n)):
            shape = [1, 1, 1, 1]
            shape[dim] = size
            places.append(add("view", add(torch.arange, size, device=values[0].device), *shape))
        scores = _inline(add, functions[0], [scores, *places, *score_buffers], (b, hq, m, n))
        shown = None
        mask = functions[1]
        if mask is not None and not _always(mask):
            shown = _inline(add, mask, [*places, *mask_buffers], None)
            scores = add(torch.where, shown, scores, -math.inf)
        softmax = add(torch.softmax, scores, -1)
        out = add(torch.matmul, add("to", softmax, values[2].dtype), v)
    for reader in readers:
        if reader.args[1] == 0:
            out.meta = {**reader.meta, "example_value": value_of(out)}
            reader.replace_all_uses_with(out)
        node.graph.erase_node(reader)
    node.graph.erase_node(node)
    return softmax, shown


def _subgraph(gm: fx.GraphModule, node: Any) -> fx.Graph | None:
    """The graph of a score or mask function."""
    if node is None:
        return None
    found = getattr(gm, str(node.target), None) if isinstance(node, fx.Node) and node.op == "get_attr" else node
    if not isinstance(found, fx.GraphModule):
        raise Refused("a score or mask function that is no graph")
    for inner in found.graph.nodes:
        if inner.op in ("get_attr", "call_module"):
            raise Refused("a score or mask function that calls modules")
    return found.graph


def _always(mask: fx.Graph) -> bool:
    """Whether a mask function shows every key: the one of no block mask."""
    calls = [n for n in mask.nodes if n.op not in ("placeholder", "output")]
    return len(calls) == 1 and calls[0].target in ("new_ones", torch.ones, torch.ops.aten.new_ones.default)


class Typed(Maker):
    """Adds nodes that carry an example of what they give, as Dynamo's own do."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = super().__call__(target, *args, **kwargs)
        given, named = fx.map_arg((args, kwargs), value_of)
        mode = getattr(value_of(self.like.args[0]), "fake_mode", None)
        try:
            with mode or contextlib.nullcontext(), torch.no_grad():
                value = (
                    getattr(given[0], target)(*given[1:], **named)
                    if isinstance(target, str)
                    else target(*given, **named)
                )
        except (RuntimeError, TypeError, IndexError, NotImplementedError) as e:
            raise Refused(f"{target} in a score or mask function: {e}") from e
        new.meta["example_value"] = value
        return new


def _inline(add: Typed, graph: fx.Graph | None, args: list[Any], shape: tuple[int, ...] | None) -> Any:
    """The result of a function of single places, computed for all of them by broadcasting, to ``shape`` if given."""
    if graph is None:
        return args[0]
    known: dict[fx.Node, Any] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), args, strict=False))
    result: Any = None
    for node in graph.nodes:
        given, named = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op in ("call_function", "call_method"):
            known[node] = add(node.target, *given, **named)
        elif node.op == "output":
            result = given[0]
    value = value_of(result)
    if not isinstance(value, torch.Tensor):
        raise Refused("a score or mask function that gives no tensor")
    return result if shape is None or tuple(value.shape) == shape else add("expand", result, *shape)


def _zero_empty_rows(softmax: fx.Node, shown: fx.Node) -> None:
    readers = list(softmax.users)
    with softmax.graph.inserting_after(softmax):
        add = Maker(softmax.graph, softmax)
        some = add("any", shown, -1, True)
        softmax.graph.inserting_after(some)
    with softmax.graph.inserting_after(some):
        kept = add(torch.where, some, softmax, 0.0)
    for reader in readers:
        reader.replace_input_with(softmax, kept)


__all__ = ["join_flex"]
