"""A captured fx graph read and written: one name for what a node does, sizes, constants, new nodes in the place of old.

Functions, methods, in-place forms and ATen operators go by one name (``op_name``), so that what looks for a pattern
says each operator once. Whatever is no such pattern is ``Refused``, with a reason, and the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .compat import FakeTensor, OpOverload

CASTS = frozenset({"to", "_to_copy", "type", "type_as", "float", "double", "half", "bfloat16"})
SAME = CASTS | {"contiguous", "clone", "alias"}
VIEWS = frozenset({"view", "reshape", "_unsafe_view"})
_NAMES = dict(
    pair.split(":")
    for pair in "iadd:add isub:sub imul:mul __rmul__:mul multiply:mul divide:div itruediv:div truediv:div "
    "true_divide:div bmm:matmul __matmul__:matmul _softmax:softmax concat:cat slice:getitem".split()
)


class Refused(Exception):
    """Why something that looks like attention is left as it is, in words."""


def value_of(x: Any) -> Any:
    """What a node holds, as an example (a fake tensor, a size); anything else as it is."""
    return x.meta.get("example_value", x.meta.get("val")) if isinstance(x, fx.Node) else x


def fixed(x: Any) -> bool:
    """Whether all sizes of what a node holds are numbers."""
    return not isinstance(x, torch.Tensor) or all(isinstance(n, int) for n in x.shape)


def complete_examples(gm: fx.GraphModule, nodes: Iterable[fx.Node] | None = None) -> None:
    """Give nodes that were put into a Dynamo graph the fake results that Dynamo's own nodes have.

    Args:
        nodes: which, in order; all if left out.
    """
    among = gm.graph.nodes if nodes is None else nodes
    missing = [n for n in among if n.op in ("call_function", "call_method") and value_of(n) is None]
    known = [value_of(n) for n in gm.graph.nodes if n.op == "placeholder"] if missing else []
    mode = next((x.fake_mode for x in known if isinstance(x, FakeTensor)), None)
    if mode is None:
        return
    with mode, torch.no_grad():
        for node in missing:
            if any(value_of(n) is None for n in node.all_input_nodes):
                continue  # a region's result
            args: Any = fx.node.map_arg(node.args, value_of)
            kwargs: Any = fx.node.map_arg(node.kwargs, value_of)
            if node.op == "call_method":
                made = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                made = node.target(*args, **kwargs)  # type: ignore[operator]
            node.meta["example_value"] = made


def call_name(node: fx.Node) -> str:
    """The bare name of the function or method that a node calls, as it is written."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.rsplit("::", 1)[-1]
    return str(getattr(node.target, "__name__", node.target)).rsplit(".", 1)[-1]


def op_name(node: Any) -> str:
    """What a node does, one name for the function, the method, the in-place form and the ATen operator; "" if unknown.

    >>> import operator
    >>> g = fx.Graph()
    >>> op_name(g.call_function(operator.iadd, (1, 2))), op_name(g.call_function(torch.ops.aten.bmm.default))
    ('add', 'matmul')
    """
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        namespace, _, name = packet._qualified_op_name.partition("::")
        if namespace != "aten":
            return ""
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
    name = name.rstrip("_") if not name.startswith("__") else name
    return _NAMES.get(name, name)


def shape_of(x: Any) -> tuple[Any, ...]:
    """The sizes of a node that holds a tensor. Raises ``Refused`` for anything else."""
    value = value_of(x)
    if not isinstance(value, torch.Tensor):
        raise Refused("something between the products is no tensor")
    return tuple(value.shape)


def same_size(a: Any, b: Any) -> bool:
    """Equal, without asking for a new guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and bool(a.node.expr == b.node.expr)


def constant(x: Any) -> float | None:
    """The number that an argument is: a Python number, or a 0-d tensor filled with one."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, fx.Node):
        name = op_name(x)
        if name in SAME and x.args:
            return constant(x.args[0])
        if name in ("tensor", "scalar_tensor", "lift_fresh_copy") and x.args:
            return constant(x.args[0])
        if name == "full" and not tuple(x.args[0] if len(x.args) > 1 else x.kwargs.get("size", (1,))):  # type: ignore[arg-type]
            return constant(x.args[1] if len(x.args) > 1 else x.kwargs.get("fill_value"))
    return None


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by place or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads a node's numbers; assertions of its type, which torch.export adds, do not."""
    return [u for u in node.users if op_name(u) != "_assert_tensor_metadata"]


def only_reader(node: fx.Node) -> fx.Node:
    users = readers(node)
    if len(users) != 1:
        raise Refused("something else reads the weights (a result of the model?)")
    return users[0]


def same_matrix(a: fx.Node, b: fx.Node) -> bool:
    """Whether a view leaves the last two dims alone."""
    x, y = shape_of(a), shape_of(b)
    return len(x) >= 2 and len(y) >= 2 and all(map(same_size, x[-2:], y[-2:]))


@dataclass
class Maker:
    """Adds nodes to a graph, each with the source lines of the node that it stands for."""

    graph: fx.Graph
    like: fx.Node
    made: list[fx.Node] = field(default_factory=list)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        method = isinstance(target, str)
        new = self.graph.call_method(target, args, kwargs) if method else self.graph.call_function(target, args, kwargs)
        new.meta.update({k: m for k, m in self.like.meta.items() if k not in ("example_value", "val")})
        self.made.append(new)
        return new
