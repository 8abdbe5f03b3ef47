"""Keep composites whole: rewrite the Dynamo graph before AOTAutograd decomposes it.

    out = scaled_dot_product_attention(q, k, v, is_causal=True)
becomes
    pair = tessel.attention(q, k, v, None, True, None);  out = pair[0]

so that forward and backward agree on one operator. Calls in a form that the operator does not cover
(dropout, ranks above 4, broadcast batches) stay as they are: AOTAutograd then opens them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .attention_match import whole_groups
from .attention_op import attention
from .fx_words import Maker, same_size, value_of

_SDPA_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
_SDPA = {
    torch.nn.functional.scaled_dot_product_attention,  # torch._C._nn has the same object
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}


def keep_composites(gm: fx.GraphModule) -> int:
    """Rewrite ``gm`` in place, submodules included; how many calls were replaced."""
    count = 0
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        here = 0
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target in _SDPA:
                here += _replace_sdpa(node)
        if here:
            module.graph.lint()
            module.recompile()
        count += here
    return count


def sdpa_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one scaled_dot_product_attention call by name, defaults filled in."""
    return {**_DEFAULTS, **dict(zip(_SDPA_ARGS, args, strict=False)), **kwargs}


def covered(q: Any, k: Any, v: Any, mask: Any, a: dict[str, Any], mixed: bool = False) -> bool:
    """Whether ``tessel::attention`` computes this call; tensors may be fake.

    Args:
        q, k, v, mask: tensors (``mask`` may be None).
        a: the call's other arguments, from ``sdpa_arguments``.
        mixed: q, k and v may differ in dtype, as they do where autocast is about to cast them.
    """
    if not all(isinstance(x, torch.Tensor) for x in (q, k, v)):
        return False
    plain = isinstance(a["dropout_p"], int | float) and a["dropout_p"] == 0
    plain = plain and isinstance(a["is_causal"], bool) and isinstance(a["enable_gqa"], bool)
    plain = plain and (a["scale"] is None or isinstance(a["scale"], int | float))
    if not plain or any(not x.is_floating_point() or x.layout != torch.strided for x in (q, k, v)):
        return False
    rank = q.dim()
    if rank not in (3, 4) or k.dim() != rank or v.dim() != rank:
        return False
    if len({q.dtype, k.dtype, v.dtype}) != 1 and not mixed:
        return False
    if len({q.device, k.device, v.device}) != 1 or any(type(x).__name__ == "NestedTensor" for x in (q, k, v)):
        return False
    if not same_size(q.shape[-1], k.shape[-1]) or not same_size(k.shape[-2], v.shape[-2]):
        return False
    if not same_size(q.shape[0], k.shape[0]) or not same_size(q.shape[0], v.shape[0]):
        return False
    if rank == 4:
        heads = (q.shape[1], k.shape[1], v.shape[1])
        if not same_size(heads[1], heads[2]):
            return False
        if not same_size(heads[0], heads[1]):
            whole = all(isinstance(h, int) for h in heads) and heads[1] > 0 and heads[0] % heads[1] == 0
            if not (a["enable_gqa"] and whole):
                return False
    elif a["enable_gqa"]:
        return False
    if mask is None:
        return True
    if not isinstance(mask, torch.Tensor) or a["is_causal"] or not 2 <= mask.dim() <= rank:
        return False
    return mask.device == q.device and (mask.dtype == torch.bool or mask.is_floating_point())


def _replace_sdpa(node: fx.Node) -> int:
    if any(k not in _SDPA_ARGS for k in node.kwargs):
        return 0
    a = sdpa_arguments(node.args, dict(node.kwargs))
    q, k, v, mask = (value_of(a.get(n)) for n in _SDPA_ARGS[:4])
    if not covered(q, k, v, mask, a, mixed=True):
        return 0
    result = value_of(node)
    with node.graph.inserting_before(node):
        add = Maker(node.graph, node)
        operands = [a["query"], *whole_groups(a["key"], a["value"])]
        if q.dim() == 3:
            # [n, s, d] is one batch of n heads.
            operands = [add("unsqueeze", x, 0) for x in operands]
        scale = None if a["scale"] is None else float(a["scale"])
        pair = add(attention, *operands, a["attn_mask"], a["is_causal"], scale)
        out = add(operator.getitem, pair, 0)
        if q.dim() == 3:
            out = add("squeeze", out, 0)
        if isinstance(result, torch.Tensor) and _row_major(result):
            # Where eager's result is row-major a later .view() may rely on it.
            out = add("contiguous", out)
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    return 1


def _row_major(x: torch.Tensor) -> bool:
    """Row-major and not at the same time what the operator's own layout would give."""
    if any(not isinstance(n, int) for n in (*x.shape, *x.stride())):
        steps = list(x.stride())
        return all(str(a) == str(b) for a, b in zip(steps, _row_strides(x), strict=True))
    return x.is_contiguous()


def _row_strides(x: torch.Tensor) -> list[Any]:
    steps: list[Any] = []
    step: Any = 1
    for n in reversed(x.shape):
        steps.append(step)
        step = step * n
    return steps[::-1]
