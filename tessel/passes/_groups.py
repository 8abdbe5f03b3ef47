"""Groups of nodes that will be one kernel: what the fuse pass joins."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..ir.node import CHEAP, Node, Value
from ..ir.types import TensorType
from ..tiles.axes import Axes, axes_of, join
from ..tiles.header import ATTENTION
from ._scans import scan_axis

MAX_NODES = 48  # of one kernel; longer chains gain nothing and cost registers
MAX_TENSORS = 24  # tensors a kernel reads and writes
SMALL_TABLE = 256  # numbers: one of every code of eight bits
MAX_INLINE_COST = 4 * CHEAP  # of values computed where they are read, per element
FEW_QUERIES = 16  # a head's, for which attention unpacks keys and values itself: one tile of queries on a GPU
FREE = frozenset({"view", "generate"})
TEMPLATED = frozenset({"pointwise", "index", "reduce", "scan", "contract", *ATTENTION})
FAMILIES = {"reduce": "reduction", "scan": "scan", "contract": "matmul", **{kind: kind for kind in ATTENTION}}
KERNEL_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


@dataclass(eq=False)
class Group:
    """One kernel to be, or one call to torch (``axes`` is ``None``).

    Attributes:
        nodes: computing nodes in graph order.
        free: views and generated values that are repeated inside each kernel that reads them.
        reads: values from outside that it needs (graph inputs or values of other groups).
        inlined: values computed where they are read, not stored.
        operand_bases: what a matmul's own operands are made of.
        first, last: places of its nodes in the graph.
        reason: why it is a call to torch.
        reach: the largest ``last`` of it and of all that must run before it.
    """

    nodes: list[Node]
    free: dict[Node, None]
    reads: dict[Value, None]
    axes: Axes | None
    first: int
    last: int
    family: str = "library"
    inlined: frozenset[Value] = frozenset()
    operand_bases: frozenset[Value] = frozenset()
    reason: str = ""
    joined: list[str] = field(default_factory=list)
    after: dict[Node, None] = field(default_factory=dict)  # nodes that must run before, without a value
    reach: int = -1

    def __post_init__(self) -> None:
        self.reach = max(self.reach, self.last)

    @property
    def values(self) -> set[Value]:
        return {v for n in self.nodes for v in n.outs}


def refusal(node: Node) -> str | None:
    """Why there is no generated kernel for a node, or ``None`` if there is one."""
    if node.op.kind not in TEMPLATED:
        return f"{node.op.name} has no template"
    if node.op.kind == "pointwise" and "triton" not in node.op.code:
        return f"{node.op.name} has no expression in the generated language"
    for t in (*node.types, *(v.type for v in node.operands)):
        if not isinstance(t, TensorType):
            return f"{node.op.name} works on host numbers"
        if t.dtype not in KERNEL_DTYPES:
            return f"no kernels for {t.dtype}"
        if t.device is not None:
            return f"a tensor lives on {t.device}, not on the graph's device"
        if any(isinstance(n, int) and n == 0 for n in t.shape):
            return "a tensor has no elements"
    if node.op.kind in ("contract", *ATTENTION) and not node.type.dtype.is_floating_point:
        return f"{node.op.name} of {node.type.dtype} has no matrix instruction here"
    if node.op.kind in ATTENTION and not all(isinstance(v.shape[-1], int) for v in node.operands[:3]):
        return "a head width of attention is not a known number"
    return None


def start(node: Node, place: int, reason: str | None) -> Group:
    """The group of a single node, with the views and generated values it reads."""
    if reason is not None:
        reads = dict.fromkeys(v for v in node.operands)
        return Group([node], {}, reads, None, place, place, reason=reason)
    axes = axes_of(node)
    free: dict[Node, None] = {}
    for maker in reversed(_free_operands(node)):  # a view after all that read it
        view = axes_of(maker)
        got = join(view, axes, (maker.out,), inline=node.op.kind in ATTENTION)
        cut = isinstance(got, Axes) and node.op.kind == "scan" and scan_axis(node, got) is None
        if cut or isinstance(got, str):  # one view read at two places, as in x @ x.T: a read of its own at each
            got = join(view, axes, (maker.out,), inline=True)
        assert isinstance(got, Axes)
        axes = got
        free[maker] = None
    family = FAMILIES.get(node.op.kind, "pointwise")
    group = Group([node], free, {}, axes, place, place, family)
    group.reads = outside_reads(group)
    if family == "matmul":
        group.operand_bases = frozenset(group.reads)
    return group


def _free_operands(node: Node) -> list[Node]:
    """The views and generated values that a node reads, also through others, each after its operands."""
    found: dict[Node, None] = {}
    stack = [(node, iter(node.operands))]
    while stack:
        reader, rest = stack[-1]
        maker = next((v.node for v in rest if v.node.op.kind in FREE and v.node not in found), None)
        if maker is not None:
            stack.append((maker, iter(maker.operands)))
            continue
        stack.pop()
        if reader is not node:
            found[reader] = None
    return list(found)


def outside_reads(group: Group) -> dict[Value, None]:
    """The values a group reads that neither it nor its free nodes make."""
    inside = group.values | {v for n in group.free for v in n.outs}
    every = (v for n in (*group.nodes, *group.free) for v in n.operands)
    return dict.fromkeys(v for v in every if v not in inside)


def only_mask(group: Group, values: list[Value]) -> bool:
    """Whether a group of attention reads values for its mask alone, where they are computed score by score."""
    (node,) = (n for n in group.nodes if n.op.kind in ATTENTION)
    return _only_at(group, node, values, {3 if node.op.kind == "attention" else 4})


def pages(producer: Group, consumer: Group, values: list[Value]) -> bool:
    """Whether a group only looks up rows of keys or values for an attention: pages of a cache, by their table."""
    (node,) = (n for n in consumer.nodes if n.op.kind in ATTENTION)
    rows = all(_whole_rows(n) for n in producer.nodes)
    return rows and node.op.kind == "attention" and _only_at(consumer, node, values, {1, 2})


def unpacks(producer: Group, consumer: Group, values: list[Value]) -> str | None:
    """Why a group is not one that takes the keys or values of an attention out of their words, or ``None`` if it is."""
    (node,) = (n for n in consumer.nodes if n.op.kind in ATTENTION)
    if not {"shift_right", "bitwise_and"} <= {n.op.name for n in producer.nodes}:
        return "attention loads its operands as they are"
    if node.op.kind != "attention" or not _only_at(consumer, node, values, {1, 2}):
        return "packed keys and values are written whole: only attention's forward unpacks them itself"
    queries = node.args[0].shape[2]
    if not isinstance(queries, int) or queries > FEW_QUERIES:
        return f"packed keys and values are written whole: {queries} queries, and not {FEW_QUERIES} at most, read them"
    return None


def _whole_rows(node: Node) -> bool:
    """Whether a gather leaves the last dim alone."""
    x = node.args[0]
    if node.op.name == "index_select":
        return bool(node.attrs["dim"] % x.type.rank != x.type.rank - 1)
    if node.op.name != "index":
        return False
    indices = node.args[1]
    return len(indices) < x.type.rank or indices[-1] is None


def _only_at(group: Group, node: Node, values: list[Value], places: set[int]) -> bool:
    """Whether a node of a group reads values at these of its arguments and nowhere else."""
    read: dict[Value, None] = {}
    stack = [a for i, a in enumerate(node.args) if i not in places and isinstance(a, Value)]
    while stack:
        v = stack.pop()
        read[v] = None
        if v.node in group.free:
            stack += v.node.operands
    return not any(v in read for v in values)


def _small_table(node: Node) -> bool:
    """Whether numbers are looked up in a table that stays in the nearest cache, as those of 4-bit codes are."""
    x = node.args[0]
    if node.op.name != "index_select" or x.type.rank != 1:
        return False
    (size,) = x.type.shape
    return isinstance(size, int) and size <= SMALL_TABLE


def inline_problem(producer: Group, consumer: Group) -> str | None:
    """Why a producer's values cannot be computed where the consumer reads them."""
    if producer.family != "pointwise":
        return f"its value is read at other places, and a {producer.family} is not computed twice"
    gathers = any(n.op.kind == "index" and not _small_table(n) for n in producer.nodes)
    if gathers and consumer.family == "matmul":
        return "a gather is not repeated inside a matrix product"
    cost = sum(n.op.cost for n in producer.nodes)
    if cost > MAX_INLINE_COST or any(n.op.cost > CHEAP for n in producer.nodes):
        return f"computing it again at each read costs {cost} a time"
    return None
