"""Opaque calls: how any operator that has no IR operators still runs, through torch itself.

An ATen, prim or custom operator becomes ``call(args..., target="ns.name.overload", kwargs=...)``. Tensor
keyword arguments come last among ``args`` and ``names`` lists them. A higher-order operator, or a call
with an argument that text has no form for (a submodule, a generator), becomes a ``call`` whose target is
a ``Callee``: its text names it, and it carries the Python function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ..ir.node import Value
from ..ir.types import Loc, TensorType
from .compat import HigherOrderOperator, OpOverload, unbacked_bindings
from .lower import Lowering


class Callee(str):
    """A call's target that is a Python function: equal and printed as its name.

    Attributes:
        fn: takes the call's arguments, flat, and returns a tensor or a nest of results.
    """

    fn: Callable[..., Any]

    def __new__(cls, name: str, fn: Callable[..., Any]) -> Callee:
        made = super().__new__(cls, name)
        made.fn = fn
        return made


class Foreign:
    """Something that is neither tensor nor number (a submodule, a generator) on its way to a call."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"{type(self.held).__name__}"


@dataclass(frozen=True)
class Fallback:
    """One fx node that became an opaque call to torch."""

    node: str
    target: str
    reason: str
    loc: Loc

    def __iter__(self) -> Iterator[Any]:
        return iter((self.node, self.target, self.reason, self.loc))

    def __str__(self) -> str:
        return f"{self.node} = {self.target} at {self.loc}: {self.reason}"


_LITERAL = (int, float, bool, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _writable(a: Any) -> bool:
    """Whether an argument can stand in the IR as it is."""
    if isinstance(a, tuple):
        return all(map(_writable, a))
    return a is None or isinstance(a, (Value, sympy.Basic, *_LITERAL))


def opaque_call(
    c: Lowering,
    node: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    types: tuple[TensorType, ...],
    ordered: bool = False,
) -> tuple[Value, ...]:
    """Append a call to ``target`` and return its tensor results, flat.

    Args:
        c: where it goes.
        node: the fx node it stands for (it may bind symbols).
        target: an operator, a higher-order operator or a Python function.
        args, kwargs: arguments, with values for tensors.
        types: the type of each tensor result.
        ordered: keep its place among other such calls, even if nothing reads its results.
    """
    attrs: dict[str, Any] = {}
    symbols = [str(s) for s in unbacked_bindings(node)]
    if symbols:
        attrs["symbol"] = symbols[0]
    # What has no results is there for what it does.
    op = c.find("call_random" if ordered or not types or must_keep_order(target) else "call")
    plain = isinstance(target, OpOverload) and all(map(_writable, (*args, *kwargs.values())))
    if not plain:
        flat: list[Any] = []
        shape = _flatten((args, dict(kwargs)), flat)
        callee = Callee(c.unique_callee(_name(target)), _Rebuild(target, shape))
        return c.builder.node(op, *flat, types=types, target=callee, **attrs).outs
    tensors: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, a in kwargs.items():
        if any(isinstance(v, Value) for v in (a if isinstance(a, tuple) else (a,))):
            tensors[key] = a
        elif a is not None:
            rest[key] = a
    if tensors:
        attrs["names"] = tuple(tensors)
    if rest:
        attrs["kwargs"] = rest
    return c.builder.node(op, *args, *tensors.values(), types=types, target=str(target), **attrs).outs


def must_keep_order(target: Any) -> bool:
    """Whether a call draws random numbers, or may write to its arguments."""
    if not isinstance(target, OpOverload):
        return True
    return torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable


def _name(target: Any) -> str:
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return str(target) if isinstance(target, OpOverload) else f"python.{getattr(target, '__name__', target)}"


class _Hole:
    """A place in a nest of arguments that the call's next flat argument fills."""


_HOLE = _Hole()


def _flatten(a: Any, flat: list[Any]) -> Any:
    """The nest of arguments with holes for what changes from call to call, which goes to ``flat``."""
    if isinstance(a, Value | sympy.Basic):
        flat.append(a)
        return _HOLE
    if isinstance(a, tuple):
        return tuple(_flatten(x, flat) for x in a)
    if isinstance(a, dict):
        return {k: _flatten(v, flat) for k, v in a.items()}
    return a.held if isinstance(a, Foreign) else a


class _Rebuild:
    """Calls a function with a nest of arguments rebuilt from flat ones."""

    def __init__(self, fn: Callable[..., Any], shape: tuple[Any, dict[str, Any]]) -> None:
        self.fn, self.shape = fn, shape

    def __call__(self, *flat: Any) -> Any:
        values = iter(flat)

        def fill(a: Any) -> Any:
            if a is _HOLE:
                return next(values)
            if isinstance(a, tuple):
                return tuple(fill(x) for x in a)
            return {k: fill(v) for k, v in a.items()} if isinstance(a, dict) else a

        args, kwargs = fill(self.shape)
        return self.fn(*args, **kwargs)


__all__ = ["Callee", "Fallback", "Foreign", "must_keep_order", "opaque_call"]
