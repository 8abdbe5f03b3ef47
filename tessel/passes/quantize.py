"""Open linear layers of packed weights that no kernel of their own runs: the product then unpacks what it reads.

    %4 = packed_linear(%0, %1, %2, bits=4)     becomes     %5 = shift_right(%1, iota); ... %8 = mul(%7, %2)
                                                           %9 = matmul(%0, permute(%8))

The fuse pass puts what unpacks into the product's loop, so that the weight is never written.
"""

from __future__ import annotations

from functools import partial

from ..ir.node import Builder, Graph, Node, Value
from ..ir.rewrite import Rule, apply_rules
from ..ops.packed import has_kernel, open_packed

__all__ = ["run"]


def run(graph: Graph, native: bool) -> Graph:
    """The graph with such layers opened; ``native``: it is for the CPU, whose kernel stays."""
    return apply_rules(graph, (Rule("packed_linear", ("packed_linear",), partial(_open, native)),), None).live()


def _open(native: bool, builder: Builder, node: Node) -> tuple[Value, ...] | None:
    return None if native and has_kernel(node) else open_packed(builder, node)
