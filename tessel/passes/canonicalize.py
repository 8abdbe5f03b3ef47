"""Bring a graph to one plain form: no work that changes nothing, nothing computed twice.

    %1 = permute(%0, dims=(1, 0))
    %2 = permute(%1, dims=(1, 0))
    %3 = mul(%2, 1.0)
    %4 = exp(%3)
    %5 = exp(%0)
    %6 = add(%4, %5)            becomes      %1 = exp(%0)
                                             %2 = add(%1, %1)

Rules are in two tables, views in ``_view_rules.py``, arithmetic in ``_value_rules.py``. Each keeps
every bit (-0.0, NaN and infinities too), dtype and layout of a value. Equal nodes become one, save
random draws, effects and opaque calls; nodes that nothing reads go. Outputs that were storage of
their own stay so, by a ``copy`` where need be.
"""

from __future__ import annotations

from collections import Counter

from ..ir.node import Graph
from ..ir.rewrite import Rule, apply_rules, own_storage, share_key
from ..ops import OPS
from ._value_rules import VALUE_RULES
from ._view_rules import VIEW_RULES

RULES: tuple[Rule, ...] = VIEW_RULES + VALUE_RULES


def run(graph: Graph, stats: Counter[str] | None = None) -> Graph:
    """The graph in canonical form; running it again changes nothing.

    Args:
        stats: counts how often each rule applied, by name.
    """
    after = apply_rules(graph, RULES, stats, share_key)
    apart = own_storage(graph, after, OPS["copy"])
    if apart is not after:  # the views of the copies
        apart = apply_rules(apart, RULES, stats, share_key)
    return apart.live()
