"""How a joint graph is parted; what the backward computes again instead of reading it: masks made of places alone.

A mask that depends on no input costs nothing to save for the backward but memory; computed again there, its structure
is in the backward graph as well, and attention's gradients skip what it hides (``passes/masks.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from . import compat

_MASK_AT = {torch.ops.tessel.attention.default: 3, torch.ops.tessel.attention_backward.default: 4}
_MOST = 64  # nodes that a mask may be made of


def partition(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward graph of a joint one, as ``min_cut_rematerialization_partition`` gives them."""
    for node in joint.graph.nodes:
        at = _MASK_AT.get(node.target)
        mask = node.args[at] if at is not None and len(node.args) > at else None
        if isinstance(mask, fx.Node):
            for made in _made_of_places(mask):
                made.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
    return compat.min_cut_rematerialization_partition(joint, inputs, **options)  # type: ignore[no-any-return]


def _made_of_places(mask: fx.Node) -> list[fx.Node]:
    """The nodes that a mask is made of; none of them if it reads an input, or draws numbers."""
    found: dict[fx.Node, None] = {}
    stack = [mask]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or random or len(found) == _MOST:
            return []
        found[node] = None
        stack += node.all_input_nodes
    return list(found)


__all__ = ["partition"]
