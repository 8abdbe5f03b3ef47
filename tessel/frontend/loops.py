"""Loops over time in a Dynamo graph: a step as a graph of its own, and what is put in place of the whole loop.

    h, y = step(h, x[t], w)  for every t          (``Step``)

becomes, where the step is ``h = a * h + b`` with a and b free of h,

    a, b = everything before the recurrence, for all t at once
    h = tessel::linear_scan(a, b)
    y = everything after it, for all t at once

and else torch's higher-order operator ``scan``, which has the step as a region and knows its gradient. Either way the
graph has as many nodes for 2048 steps as for 16. Every tensor of all steps has time as its first dimension.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .compat import SCAN_CUTS_CARRY, FakeTensor
from .scan_op import linear_scan

__all__ = [
    "WITH_START",
    "NotAffine",
    "Step",
    "Written",
    "affine_plan",
    "complete_examples",
    "emit",
    "emit_affine",
    "erase_unused",
    "example",
    "filled",
    "fixed",
    "has_side_effects",
    "keep_first_factors",
]

_MOST_PARTS = 4096
_FROM_ZEROS = "tessel_from_zeros"  # metadata of a recurrence: its first factor is not a number, its start is zero
WITH_START = "tessel_with_start"  # metadata of all states of a carry: its start, and the node that has both


@dataclass(frozen=True)
class Step:
    """One step of a loop, and what it is applied to.

    Attributes:
        gm: its graph: takes carries, slices and extras, in this order, and returns new carries, then results.
        init: where each carry starts, nodes of the host graph.
        xs: what each slice is a step of (time first), nodes of the host graph.
        extras: the same at every step, nodes of the host graph.
        length: how many steps.
    """

    gm: fx.GraphModule
    init: tuple[fx.Node, ...]
    xs: tuple[fx.Node, ...]
    extras: tuple[fx.Node, ...]
    length: int

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.gm.graph.nodes if n.op == "placeholder"]

    def outputs(self) -> list[Any]:
        (out,) = (n for n in self.gm.graph.nodes if n.op == "output")
        return list(out.args[0]) if isinstance(out.args[0], tuple | list) else [out.args[0]]


def example(x: Any) -> Any:
    """What Dynamo saw for a node: a fake tensor, a tuple of these, a number."""
    return x.meta.get("example_value", x.meta.get("val")) if isinstance(x, fx.Node) else x


def fixed(x: Any) -> bool:
    """Whether all sizes of what Dynamo saw are numbers."""
    return not isinstance(x, torch.Tensor) or all(isinstance(n, int) for n in x.shape)


def complete_examples(gm: fx.GraphModule, nodes: Iterable[fx.Node] | None = None) -> None:
    """Give nodes that were put into a Dynamo graph the fake results that Dynamo's own nodes have.

    Args:
        nodes: which, in order; all if left out.
    """
    among = gm.graph.nodes if nodes is None else nodes
    missing = [n for n in among if n.op in ("call_function", "call_method") and example(n) is None]
    known = [example(n) for n in gm.graph.nodes if n.op == "placeholder"] if missing else []
    mode = next((x.fake_mode for x in known if isinstance(x, FakeTensor)), None)
    if mode is None:
        return
    with mode, torch.no_grad():
        for node in missing:
            if any(example(n) is None for n in node.all_input_nodes):
                continue  # a region's result
            args: Any = fx.node.map_arg(node.args, example)
            kwargs: Any = fx.node.map_arg(node.kwargs, example)
            if node.op == "call_method":
                made = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                made = node.target(*args, **kwargs)  # type: ignore[operator]
            node.meta["example_value"] = made


def erase_unused(nodes: Iterable[fx.Node]) -> None:
    """Erase what nothing reads among these nodes and what they read, as far as it only computes."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        made = node.op in ("call_function", "call_method", "get_attr")
        if made and not node.users and not node._erased and not _writes(node):
            stack += node.all_input_nodes
            node.graph.erase_node(node)


def emit(root: fx.GraphModule, step: Step) -> tuple[list[fx.Node], list[fx.Node]]:
    """Write the loop at the host graph's insertion point: the last carries, and the results of all steps."""
    try:
        return emit_affine(root, step)
    except NotAffine:
        return _as_scan(root, step)


def emit_affine(root: fx.GraphModule, step: Step) -> tuple[list[fx.Node], list[fx.Node]]:
    """``emit`` for a step whose carries are linear recurrences.

    Raises:
        NotAffine: they are not; the graph is as it was.
    """
    return Written(root.graph, step, affine_plan(step)).write()


def affine_plan(step: Step) -> list[Any]:
    """For each carry what it is, see ``_Affine.plan``.

    Raises:
        NotAffine: the carries are no linear recurrences.
    """
    return _Affine(step).plan()


def _as_scan(root: fx.GraphModule, step: Step) -> tuple[list[fx.Node], list[fx.Node]]:
    """The loop as torch's higher-order operator. Its results must share no memory with one another or with inputs."""
    graph = root.graph
    inner = step.gm.graph
    (out,) = (n for n in inner.nodes if n.op == "output")
    with inner.inserting_before(out):
        copies = [inner.call_method("clone", (v,), {"memory_format": torch.contiguous_format}) for v in step.outputs()]
    out.args = (tuple(copies),)
    step.gm.recompile()
    name = next(n for i in range(_MOST_PARTS) if not hasattr(root, n := f"tessel_step_{i}"))
    root.add_submodule(name, step.gm)
    region = graph.get_attr(name)
    init = tuple(graph.call_method("contiguous", (v,)) for v in step.init)
    if SCAN_CUTS_CARRY:
        init = _needing_gradients(graph, init, (*step.xs, *step.extras), step.init)
    got = graph.call_function(torch.ops.higher_order.scan, (region, init, step.xs, step.extras))
    parts = [graph.call_function(operator.getitem, (got, i)) for i in range(len(copies))]
    return parts[: len(init)], parts[len(init) :]


def _needing_gradients(
    graph: fx.Graph, values: tuple[fx.Node, ...], others: Sequence[Any], like: Sequence[Any]
) -> tuple[fx.Node, ...]:
    """The same values, which need gradients if any of the others does: the sum of none of its elements is added."""
    zeros = [
        graph.call_method("sum", (graph.call_function(operator.getitem, (x, slice(0, 0))),))
        for x in others
        if isinstance(example(x), torch.Tensor) and example(x).is_floating_point() and example(x).dim()
    ]
    floats = [isinstance(example(x), torch.Tensor) and example(x).is_floating_point() for x in like]
    for zero in zeros:
        values = tuple(
            graph.call_function(operator.add, (v, graph.call_method("type_as", (zero, v)))) if f else v
            for v, f in zip(values, floats, strict=True)
        )
    return values


# ---------------------------------------------------------------- linear recurrences


class NotAffine(Exception):
    """A carry's new value is not ``a * carry + b``."""


_ADD = {operator.add, torch.add, "add"}
_SUB = {operator.sub, torch.sub, "sub"}
_MUL = {operator.mul, torch.mul, "mul", "multiply", torch.multiply}
_NEG = {operator.neg, torch.neg, "neg"}
_SAME = {"to", "type", "float", "double", "contiguous", "clone", "type_as"}


@dataclass(frozen=True)
class _Line:
    """``a * carry + b``: sums and products of nodes free of any carry; None for one, and for zero."""

    carry: int
    a: Any = None
    b: Any = None


@dataclass(frozen=True)
class _Sum:
    """An expression in nodes of the step: ``op`` of two of these."""

    op: Callable[..., Any]
    args: tuple[Any, ...]


class _Affine:
    """Which nodes of a step are lines in a carry."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.inputs = step.placeholders()
        self.carries = self.inputs[: len(step.init)]
        self.tied: set[fx.Node] = set(self.carries)
        self.lines: dict[fx.Node, _Line] = {n: _Line(i) for i, n in enumerate(self.carries)}

    def plan(self) -> list[Any]:
        """For each carry a ``_Line``, or the node that its new value is, free of carries."""
        if not self.carries:
            raise NotAffine
        for node in self.step.gm.graph.nodes:
            if node.op in ("call_function", "call_method"):
                if any(n in self.tied for n in node.all_input_nodes):
                    self.tied.add(node)
                    line = self.line(node)
                    if line is not None:
                        self.lines[node] = line
            elif node.op not in ("placeholder", "output"):
                raise NotAffine
        found: list[Any] = []
        for i, out in enumerate(self.step.outputs()[: len(self.carries)]):
            if not isinstance(out, fx.Node):
                raise NotAffine
            if out not in self.tied:
                found.append(out)
                continue
            line = self.lines.get(out)
            if line is None or line.carry != i:
                raise NotAffine
            found.append(line)
        return found

    def line(self, node: fx.Node) -> _Line | None:
        val = example(node)
        ties = [n for n in node.all_input_nodes if n in self.tied]
        lines = [self.lines.get(n) for n in ties]
        first = lines[0]
        if first is None or any(x is None or x.carry != first.carry for x in lines):
            return None
        like = example(self.carries[first.carry])
        fits = isinstance(val, torch.Tensor) and isinstance(like, torch.Tensor)
        if not fits or val.shape != like.shape or val.dtype != like.dtype or not val.dtype.is_floating_point:
            return None
        if node.op == "call_method" and node.target in _SAME:
            return first if node.args[0] in self.tied and val.device == like.device else None
        if node.target in _NEG:
            return _Line(first.carry, _times(first.a, -1.0), _times(first.b, -1.0))
        if node.kwargs or len(node.args) != 2:
            return None
        x, y = node.args
        u, v = (self.lines.get(n) if isinstance(n, fx.Node) and n in self.tied else None for n in (x, y))
        if node.target in _MUL and (u is None) != (v is None):
            line, factor = (u, y) if u is not None else (v, x)
            assert line is not None
            return _Line(line.carry, _times(line.a, factor), None if line.b is None else _times(line.b, factor))
        if node.target in _ADD or node.target in _SUB:
            sign = -1.0 if node.target in _SUB else 1.0
            if u is not None and v is not None:
                a = _plus(1.0 if u.a is None else u.a, sign if v.a is None else _times(v.a, sign))
                return _Line(u.carry, a, _plus(u.b, _times(v.b, sign)))
            if u is not None:
                return _Line(u.carry, u.a, _plus(u.b, _times(y, sign)))
            assert v is not None
            return _Line(v.carry, _times(v.a, sign), _plus(_times(v.b, sign), x))
        return None


def _times(x: Any, y: Any) -> Any:
    """A product, where None stands for what a factor of one or a term of zero leaves out."""
    if x is None:
        return None if isinstance(y, float) and y == 1.0 else y
    return x if isinstance(y, float) and y == 1.0 else _Sum(operator.mul, (x, y))


def _plus(x: Any, y: Any) -> Any:
    if x is None or y is None:
        return y if x is None else x
    return _Sum(operator.add, (x, y))


@dataclass(frozen=True)
class _Part:
    """A value of every step: a node, whether it has time in front, and the rank it has without."""

    node: fx.Node
    timed: bool
    rank: int

    def ranked(self, writer: Written, rank: int) -> fx.Node:
        """With so many dimensions after time."""
        return writer.call(_deeper, self.node, rank - self.rank) if self.timed and self.rank < rank else self.node


class Written:
    """A step whose carries are lines, written for all steps at once."""

    def __init__(self, graph: fx.Graph, step: Step, plan: list[Any]) -> None:
        self.graph, self.step, self.plan = graph, step, plan
        inputs = step.placeholders()
        self.batched: dict[fx.Node, fx.Node] = {}  # time first
        self.plain: dict[fx.Node, fx.Node] = {}  # the same at every step
        n = len(step.init)
        self.carries = inputs[:n]
        self.batched.update(zip(inputs[n : n + len(step.xs)], step.xs, strict=True))
        self.plain.update(zip(inputs[n + len(step.xs) :], step.extras, strict=True))

    def write(self) -> tuple[list[fx.Node], list[fx.Node]]:
        outs = self.step.outputs()
        n = len(self.carries)
        states = [self.history(*x) for x in zip(self.plan, self.carries, self.step.init, strict=True)]
        for out, state in zip(outs, states, strict=False):
            self.batched.setdefault(out, state)
        results = [self.everywhere(v) for v in outs[n:]]
        for carry in self.carries:
            if not (before := self.batched[carry]).users and before not in results:
                self.graph.erase_node(before)
        return [self.call(operator.getitem, s, -1) for s in states], results

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def history(self, line: Any, carry: fx.Node, start: fx.Node) -> fx.Node:
        """All values of a carry after a step; those before a step are remembered as the carry's own."""
        like = example(carry)
        if isinstance(line, fx.Node):
            states = self.everywhere(line)
            self.batched[carry] = self.call(_before, start, states)
            return states
        shape = (self.step.length, *self.sizes(start))
        factor = self.value(line.a)
        a, b = (self.full(x, shape, like, one) for x, one in ((factor, 1.0), (self.value(line.b), 0.0)))
        if _is_zero(start):
            states = self.call(linear_scan, a, b, 0, False)
            states.meta[_FROM_ZEROS] = isinstance(factor, _Part)
            self.batched[carry] = self.call(_before, start, states)
            return states
        with_start = self.call(linear_scan, *(self.call(_behind, *x) for x in ((start, a), (start, b))), 0, False)
        self.batched[carry] = self.call(operator.getitem, with_start, slice(None, -1))
        states = self.call(operator.getitem, with_start, slice(1, None))
        states.meta[WITH_START] = start, with_start
        return states

    def sizes(self, start: fx.Node) -> tuple[Any, ...]:
        """The shape of a carry, nodes where a size is a symbol."""
        shape = example(start).shape
        return tuple(n if isinstance(n, int) else self.call(torch.Tensor.size, start, d) for d, n in enumerate(shape))

    def full(self, x: Any, shape: tuple[Any, ...], like: torch.Tensor, default: float) -> fx.Node:
        """A factor or addend in the shape of all states."""
        x = default if x is None else x
        if not isinstance(x, _Part):
            return self.call(torch.full, shape, x, dtype=like.dtype, device=like.device)
        return self.call(filled, x.node, shape, like.dtype, x.timed)

    def value(self, x: Any) -> Any:
        """An expression in nodes of the step, for all steps: a number or a ``_Part``."""
        if isinstance(x, _Sum):
            values = [self.value(a) for a in x.args]
            parts = [v for v in values if isinstance(v, _Part)]
            if not parts:
                return x.op(*values)
            rank = max(p.rank for p in parts)
            given = [v.ranked(self, rank) if isinstance(v, _Part) else v for v in values]
            return _Part(self.call(x.op, *given), any(p.timed for p in parts), rank)
        if isinstance(x, fx.Node):
            node, timed = self.of(x)
            val = example(x)
            return _Part(node, timed, val.dim() if isinstance(val, torch.Tensor) else 0)
        return x

    # ------------------------------------------------------------ nodes

    def everywhere(self, v: Any) -> fx.Node:
        """A value of every step, time first."""
        node, timed = self.of(v)
        return node if timed else self.call(_repeated, node, self.step.length)

    def of(self, v: fx.Node) -> tuple[fx.Node, bool]:
        """A node of the step for all steps, and whether it differs between them. Deep chains use a stack."""
        stack = [v]
        while stack:
            node = stack[-1]
            if node in self.batched or node in self.plain:
                stack.pop()
                continue
            missing = [n for n in node.all_input_nodes if n not in self.batched and n not in self.plain]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            timed = any(n in self.batched for n in node.all_input_nodes)
            if timed:
                self.batched[node] = self.timed(node)
            else:
                self.plain[node] = self.graph.node_copy(node, self.plain.__getitem__)
        return (self.batched[v], True) if v in self.batched else (self.plain[v], False)

    def timed(self, node: fx.Node) -> fx.Node:
        """One node for all steps."""
        plain = self.directly(node)
        if plain is not None:
            return plain
        # Whatever else: torch's vmap knows.
        inputs = node.all_input_nodes
        call = _Mapped(node, tuple(0 if n in self.batched else None for n in inputs))
        return self.call(call, *(self.batched.get(n) or self.plain[n] for n in inputs))

    def directly(self, node: fx.Node) -> fx.Node | None:
        """The node as it is with one more dimension in front, where that is the same."""
        val = example(node)
        args = node.args
        ranks = {n: example(n).dim() for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)}
        if not isinstance(val, torch.Tensor) or len(ranks) != len(node.all_input_nodes):
            return None
        target = node.target
        first = args[0] if args and isinstance(args[0], fx.Node) else None

        def again(*given: Any) -> fx.Node:
            return self.graph.create_node(node.op, target, given, dict(node.kwargs))

        def of(a: Any) -> Any:
            return (self.batched.get(a) or self.plain[a]) if isinstance(a, fx.Node) else a

        if target in _ELEMENTWISE and not any(isinstance(x, fx.Node) for x in node.kwargs.values()):
            given = []
            for a in args:
                x = of(a)
                if isinstance(a, fx.Node) and a in self.batched and ranks[a] < val.dim():
                    x = self.call(_deeper, x, val.dim() - ranks[a])
                given.append(x)
            return again(*given)
        if node.op == "call_method" and target in _SAME and first in self.batched and len(ranks) == 1:
            return again(of(first), *args[1:])
        products = (operator.matmul, torch.matmul, torch.Tensor.matmul, "matmul")
        if target in products and len(args) == 2 and not node.kwargs:
            both = all(a in self.batched and ranks[a] == val.dim() for a in args)  # type: ignore[index]
            return again(*map(of, args)) if both and val.dim() >= 2 else None
        if target is operator.getitem and first in self.batched and _is_index(args[1]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return self.call(operator.getitem, of(first), (slice(None), *index))
        below = target in ("unsqueeze", "squeeze", torch.unsqueeze, torch.squeeze) and len(args) == 2
        if below and isinstance(args[1], int) and args[1] < 0 and not node.kwargs and first in self.batched:
            return again(of(first), args[1])
        return None


_ELEMENTWISE: set[Any] = {
    *(getattr(operator, n) for n in "add sub mul truediv neg pow".split()),
    *(getattr(torch, n) for n in "add sub mul div neg exp tanh sigmoid sqrt rsqrt maximum minimum relu".split()),
    *"add sub mul div neg exp tanh sigmoid sqrt rsqrt maximum minimum relu".split(),
    torch.nn.functional.silu,
    torch.nn.functional.softplus,
    torch.nn.functional.relu,
}


def _is_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, int) or _is_slice(p) for p in parts)


def _is_slice(p: Any) -> bool:
    return isinstance(p, slice) and all(x is None or isinstance(x, int) for x in (p.start, p.stop, p.step))


def _is_zero(node: fx.Node) -> bool:
    """Whether a node is made as zeros. ``a * 0`` is left out then; ``keep_first_factors`` puts it in again."""
    while node.op == "call_method" and node.target in ("to", "contiguous", "type", "float"):
        node = node.args[0]  # type: ignore[assignment]
    return node.target in (torch.zeros, torch.zeros_like, "new_zeros") and all(_only_reads(u, node) for u in node.users)


def _only_reads(user: fx.Node, node: fx.Node) -> bool:
    return user.target is not operator.setitem and not (user.op == "call_method" and str(user.target).endswith("_"))


def keep_first_factors(gm: fx.GraphModule) -> None:
    """Give recurrences from zeros that are still there the product of their first factor and zero: a NaN, if that
    factor is not finite, and else nothing. After all rewrites that look for recurrences."""
    found = [n for n in gm.graph.nodes if n.target is linear_scan and n.meta.get(_FROM_ZEROS)]
    for node in found:
        a, b, *rest = node.args
        with gm.graph.inserting_before(node):
            first = gm.graph.call_function(_with_first_factor, (a, b))
        first.meta.update({**node.meta, "example_value": example(b)})
        node.args = (a, first, *rest)
    if found:
        gm.recompile()


# What the graph calls. They are plain functions, which AOTAutograd traces through.


def _with_first_factor(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    first = torch.arange(a.shape[0], device=a.device).reshape(-1, *(1 for _ in a.shape[1:])) == 0
    return torch.where(first, b + a * 0.0, b)


def _deeper(x: torch.Tensor, more: int) -> torch.Tensor:
    """Dimensions of size one right after time, so that the rest is aligned to the right."""
    return x.reshape(x.shape[0], *(1 for _ in range(more)), *x.shape[1:])


def filled(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, timed: bool) -> torch.Tensor:
    """Broadcast to the shape of all states."""
    if timed and x.dim() < len(shape):
        x = _deeper(x, len(shape) - x.dim())
    return x.to(dtype).expand(shape)


def _behind(start: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A step more in front of all; what stands there is the start, of factors it is not read."""
    return torch.cat([start.to(x.dtype).expand(x.shape[1:])[None], x])


def _before(start: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The state before each step."""
    return torch.cat([start.to(states.dtype).expand(states.shape[1:])[None], states[:-1]])


def _repeated(x: torch.Tensor, length: int) -> torch.Tensor:
    return x[None].expand(length, *x.shape)


class _Mapped:
    """A node's operator over the first dimension of some operands."""

    def __init__(self, node: fx.Node, dims: tuple[int | None, ...]) -> None:
        self.node, self.dims = node, dims
        self.inputs = node.all_input_nodes
        self.__name__ = f"all_steps_of_{getattr(node.target, '__name__', node.target)}"

    def __call__(self, *tensors: torch.Tensor) -> Any:
        def one(*given: torch.Tensor) -> Any:
            held = dict(zip(self.inputs, given, strict=True))
            args: Any = fx.node.map_arg(self.node.args, held.__getitem__)
            kwargs: Any = fx.node.map_arg(self.node.kwargs, held.__getitem__)
            if self.node.op == "call_method":
                return getattr(args[0], str(self.node.target))(*args[1:], **kwargs)
            return self.node.target(*args, **kwargs)  # type: ignore[operator]

        return torch.vmap(one, in_dims=self.dims)(*tensors)


def has_side_effects(nodes: Iterable[fx.Node]) -> bool:
    """Whether any node writes to its arguments or draws random numbers."""
    return any(_writes(n) for n in nodes)


def _writes(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    if "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    if name.startswith("i") and getattr(operator, name, None) is node.target and hasattr(operator, name[1:]):
        return True  # x += y
    if name.endswith("_") and not name.endswith("__"):
        return True
    return any(word in name for word in ("rand", "dropout", "bernoulli", "multinomial", "setitem", "set_grad"))
