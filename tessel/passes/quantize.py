"""Open layers of packed or sparse weights that no kernel of their own runs: the product then unpacks what it reads.

    %4 = packed_linear(%0, %1, %2, bits=4)     becomes     %5 = shift_right(%1, iota); ... %8 = mul(%7, %2)
                                                           %9 = matmul(%0, permute(%8))

The fuse pass puts what unpacks into the product's loop, so that the weight is never written.

Experts' matrices are unpacked by a node of their own, all of them at every call. Where no gradient is asked for, the
experts take them as they are stored:

    %5 = unpacked(%1, %2); %6 = unpacked(%3, %4)
    %7 = experts(%0, %5, None, %6, ...)        becomes     %7 = packed_experts(%0, %1, %2, ..., %3, %4, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..ir.node import Builder, Graph, Node, Value
from ..ir.rewrite import Rule, apply_rules, storage_root
from ..ops.packed import KERNEL_DTYPES, has_kernel, open_packed
from ..ops.packed_stacks import join_packed, open_unpacked
from ..ops.sparse import open_sparse

__all__ = ["notes", "run", "said_of_floats"]


def run(graph: Graph, native: bool) -> Graph:
    """The graph with such layers opened; ``native``: it is for the CPU, whose kernel stays."""
    graph = apply_rules(graph, (Rule("packed experts", ("experts",), join_packed),), None).live()
    opened = (
        Rule("packed_linear", ("packed_linear",), partial(_open, native)),
        Rule("sparse_linear", ("sparse_linear",), partial(_open_sparse, native)),
        Rule("unpacked", ("unpacked",), open_unpacked),
    )
    return apply_rules(graph, opened, None).live()


def notes(graph: Graph, native: bool) -> list[str]:
    """What no kernel of the target does with such layers, of the graph before the pass: how many, where, and what is
    done in its place."""
    return _told(graph, lambda node: _without(node, native))


def said_of_floats(graph: Graph) -> list[str]:
    """What inputs rounded to small floats are multiplied as, of a graph whose composites are whole: no kernel of any
    target multiplies small floats themselves."""
    return _told(graph, _as_wide)


def _told(graph: Graph, why_of: Callable[[Node], str]) -> list[str]:
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if why := why_of(node):
            found.setdefault(why, []).append(node)
    first = {why: nodes[0].loc.short or str(nodes[0]) for why, nodes in found.items()}
    return [f"{len(nodes)} layers, the first at {first[why]}: {why}" for why, nodes in found.items()]


def _without(node: Node, native: bool) -> str:
    if node.op.name not in ("packed_linear", "sparse_linear"):
        return ""
    sparse, dtype = node.op.name == "sparse_linear", str(node.operands[0].dtype).removeprefix("torch.")
    if native:
        there = node.operands[0].dtype in KERNEL_DTYPES if sparse else has_kernel(node)
        what = "2:4 weights" if sparse else "weights of few bits"
        return "" if there else f"no kernel for {what} and inputs of {dtype} on the CPU: the weight is written out"
    if sparse:
        return f"no kernel here uses products of 2:4 weights: zeros are put in, {dtype} is multiplied"
    inputs = node.attrs.get("inputs")
    return f"no kernel here multiplies integers: inputs of {inputs} bits are multiplied as {dtype}" if inputs else ""


def _as_wide(node: Node) -> str:
    bits = _small_floats(node)
    if not bits:
        return ""
    dtype = str(node.operands[0].dtype).removeprefix("torch.")
    return f"inputs rounded to floats of {bits} bits are multiplied as {dtype}: no kernel multiplies small floats"


def _small_floats(node: Node) -> int:
    """Bits of the small floats that a layer's inputs are rounded to; 0: they are not."""
    if node.op.name == "packed_experts" and node.attrs.get("floats"):
        _, exponent, mantissa, *_ = node.attrs["floats"]
        return 1 + int(exponent) + int(mantissa)
    if node.op.name == "packed_linear" and (source := storage_root(node.operands[0])).op.name == "rounded":
        return 1 + int(source.node.attrs["exponent"]) + int(source.node.attrs["mantissa"])
    return 0


def _open(native: bool, builder: Builder, node: Node) -> tuple[Value, ...] | None:
    return None if native and has_kernel(node) else open_packed(builder, node)


def _open_sparse(native: bool, builder: Builder, node: Node) -> tuple[Value, ...] | None:
    return None if native and node.operands[0].dtype in KERNEL_DTYPES else open_sparse(builder, node)
