"""Open layers of packed or sparse weights that no kernel of their own runs: the product then unpacks what it reads.

    %4 = packed_linear(%0, %1, %2, bits=4)     becomes     %5 = shift_right(%1, iota); ... %8 = mul(%7, %2)
                                                           %9 = matmul(%0, permute(%8))

The fuse pass puts what unpacks into the product's loop, so that the weight is never written.

Experts' matrices are unpacked by a node of their own, all of them at every call. On the CPU, where no gradient is asked
for, the experts take them as they are stored:

    %5 = unpacked(%1, %2); %6 = unpacked(%3, %4)
    %7 = experts(%0, %5, None, %6, ...)        becomes     %7 = packed_experts(%0, %1, %2, ..., %3, %4, ...)
"""

from __future__ import annotations

from functools import partial

from ..ir.node import Builder, Graph, Node, Value
from ..ir.rewrite import Rule, apply_rules
from ..ops.packed import KERNEL_DTYPES, has_kernel, open_packed
from ..ops.packed_stacks import join_packed, open_unpacked
from ..ops.sparse import open_sparse

__all__ = ["run"]


def run(graph: Graph, native: bool) -> Graph:
    """The graph with such layers opened; ``native``: it is for the CPU, whose kernel stays."""
    if native:
        graph = apply_rules(graph, (Rule("packed experts", ("experts",), join_packed),), None).live()
    opened = (
        Rule("packed_linear", ("packed_linear",), partial(_open, native)),
        Rule("sparse_linear", ("sparse_linear",), partial(_open_sparse, native)),
        Rule("unpacked", ("unpacked",), open_unpacked),
    )
    return apply_rules(graph, opened, None).live()


def _open(native: bool, builder: Builder, node: Node) -> tuple[Value, ...] | None:
    return None if native and has_kernel(node) else open_packed(builder, node)


def _open_sparse(native: bool, builder: Builder, node: Node) -> tuple[Value, ...] | None:
    return None if native and node.operands[0].dtype in KERNEL_DTYPES else open_sparse(builder, node)
