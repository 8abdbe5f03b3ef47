"""A step whose carries are linear recurrences, written for all steps at once, without a loop.

Every node of the step becomes one with time in front: by itself where its operator takes one more dimension as it is,
else through torch's ``vmap``. The recurrences in between are ``tessel::linear_scan``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..fx_words import value_of
from ..scan_op import linear_scan
from .affine import KEEPS_VALUES, Sum
from .step import Step

__all__ = ["WITH_START", "Written", "filled", "keep_first_factors"]

_FROM_ZEROS = "tessel_from_zeros"  # metadata of a recurrence: its first factor is not a number, its start is zero
WITH_START = "tessel_with_start"  # metadata of all states of a carry: its start, and the node that has both


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
        like = value_of(carry)
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
        shape = value_of(start).shape
        return tuple(n if isinstance(n, int) else self.call(torch.Tensor.size, start, d) for d, n in enumerate(shape))

    def full(self, x: Any, shape: tuple[Any, ...], like: torch.Tensor, default: float) -> fx.Node:
        """A factor or addend in the shape of all states."""
        x = default if x is None else x
        if not isinstance(x, _Part):
            return self.call(torch.full, shape, x, dtype=like.dtype, device=like.device)
        return self.call(filled, x.node, shape, like.dtype, x.timed)

    def value(self, x: Any) -> Any:
        """An expression in nodes of the step, for all steps: a number or a ``_Part``."""
        if isinstance(x, Sum):
            values = [self.value(a) for a in x.args]
            parts = [v for v in values if isinstance(v, _Part)]
            if not parts:
                return x.op(*values)
            rank = max(p.rank for p in parts)
            given = [v.ranked(self, rank) if isinstance(v, _Part) else v for v in values]
            return _Part(self.call(x.op, *given), any(p.timed for p in parts), rank)
        if isinstance(x, fx.Node):
            node, timed = self.of(x)
            val = value_of(x)
            if isinstance(val, torch.Tensor):
                return _Part(node, timed, val.dim())
            dtype = torch.int64 if isinstance(val, torch.SymInt) else torch.float64  # of no dimension: promotes nothing
            device = value_of(self.carries[0]).device
            return _Part(self.call(torch.scalar_tensor, node, dtype=dtype, device=device), timed, 0)
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
        val = value_of(node)
        args = node.args
        ranks = {n: value_of(n).dim() for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)}
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
        if node.op == "call_method" and target in KEEPS_VALUES and first in self.batched and len(ranks) == 1:
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
        first.meta.update({**node.meta, "example_value": value_of(b)})
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
