"""Which carries of a step are linear recurrences: the new value is ``a * carry + b``, a and b free of any carry."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..fx_words import value_of
from .step import Step

__all__ = ["ADD", "KEEPS_VALUES", "MUL", "NEG", "SUB", "Line", "NotAffine", "Sum", "affine_plan"]


class NotAffine(Exception):
    """A carry's new value is not ``a * carry + b``."""


ADD = {operator.add, torch.add, "add"}
SUB = {operator.sub, torch.sub, "sub"}
MUL = {operator.mul, torch.mul, "mul", "multiply", torch.multiply}
NEG = {operator.neg, torch.neg, "neg"}
KEEPS_VALUES = {"to", "type", "float", "double", "contiguous", "clone", "type_as"}  # methods


def affine_plan(step: Step) -> list[Any]:
    """For each carry what it is, see ``_Affine.plan``.

    Raises:
        NotAffine: the carries are no linear recurrences.
    """
    return _Affine(step).plan()


@dataclass(frozen=True)
class Line:
    """``a * carry + b``: sums and products of nodes free of any carry; None for one, and for zero."""

    carry: int
    a: Any = None
    b: Any = None


@dataclass(frozen=True)
class Sum:
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
        self.lines: dict[fx.Node, Line] = {n: Line(i) for i, n in enumerate(self.carries)}

    def plan(self) -> list[Any]:
        """For each carry a ``Line``, or the node that its new value is, free of carries."""
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

    def line(self, node: fx.Node) -> Line | None:
        val = value_of(node)
        ties = [n for n in node.all_input_nodes if n in self.tied]
        lines = [self.lines.get(n) for n in ties]
        first = lines[0]
        if first is None or any(x is None or x.carry != first.carry for x in lines):
            return None
        like = value_of(self.carries[first.carry])
        fits = isinstance(val, torch.Tensor) and isinstance(like, torch.Tensor)
        if not fits or val.shape != like.shape or val.dtype != like.dtype or not val.dtype.is_floating_point:
            return None
        if node.op == "call_method" and node.target in KEEPS_VALUES:
            return first if node.args[0] in self.tied and val.device == like.device else None
        if node.target in NEG:
            return Line(first.carry, _times(first.a, -1.0), _times(first.b, -1.0))
        if node.kwargs or len(node.args) != 2:
            return None
        x, y = node.args
        u, v = (self.lines.get(n) if isinstance(n, fx.Node) and n in self.tied else None for n in (x, y))
        if node.target in MUL and (u is None) != (v is None):
            line, factor = (u, y) if u is not None else (v, x)
            assert line is not None
            return Line(line.carry, _times(line.a, factor), None if line.b is None else _times(line.b, factor))
        if node.target in ADD or node.target in SUB:
            sign = -1.0 if node.target in SUB else 1.0
            if u is not None and v is not None:
                a = _plus(1.0 if u.a is None else u.a, sign if v.a is None else _times(v.a, sign))
                return Line(u.carry, a, _plus(u.b, _times(v.b, sign)))
            if u is not None:
                return Line(u.carry, u.a, _plus(u.b, _times(y, sign)))
            assert v is not None
            return Line(v.carry, _times(v.a, sign), _plus(_times(v.b, sign), x))
        return None


def _times(x: Any, y: Any) -> Any:
    """A product, where None stands for what a factor of one or a term of zero leaves out."""
    if x is None:
        return None if isinstance(y, float) and y == 1.0 else y
    return x if isinstance(y, float) and y == 1.0 else Sum(operator.mul, (x, y))


def _plus(x: Any, y: Any) -> Any:
    if x is None or y is None:
        return y if x is None else x
    return Sum(operator.add, (x, y))
