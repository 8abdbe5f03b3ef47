"""From a softmax down to the product with the values, and up to the product of queries and keys.

What lies between is kept as the attention operator says it: one scale, one soft cap, masks, a sink column. The walk
never guesses: whatever else it meets, or a score that something else reads, is ``Refused``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from .fx_words import (
    SAME,
    VIEWS,
    Refused,
    argument,
    constant,
    only_reader,
    op_name,
    readers,
    same_matrix,
    same_size,
    shape_of,
    value_of,
)

__all__ = ["Scores", "Weights", "down", "up"]

# A score further down than this weighs nothing beside one that is not hidden, and swallows what it is added to.
_HIDDEN = -1e30

# ---------------------------------------------------------------- from the weights to the result


@dataclass(frozen=True)
class Weights:
    """Down from the softmax: the product with the values, whether a last column is dropped on the way."""

    product: fx.Node
    v: fx.Node
    drops_column: bool


def down(softmax: fx.Node) -> Weights:
    """From a softmax to the product with the values.

    Raises:
        Refused: something else is done with the weights, or something else reads them.
    """
    node, drops = softmax, False
    while True:
        user = only_reader(node)
        name = op_name(user)
        if name in ("matmul", "baddbmm", "__matmul__") and user.args and user.args[0] is node and name != "baddbmm":
            v = argument(user, 1, "other", user.kwargs.get("mat2"))
            if not isinstance(v, fx.Node):
                raise Refused("the values are no tensor")
            return Weights(user, v, drops)
        if not user.args or user.args[0] is not node:
            raise Refused(f"the weights are an argument of {name or user.target}")
        if name == "dropout":
            if argument(user, 1, "p", 0.5) != 0 and argument(user, 2, "training", argument(user, 2, "train", True)):
                raise Refused("dropout of the weights")
        elif name == "getitem" and not drops and _drops_last(user, node):
            drops = True
        elif name not in SAME and not (name in VIEWS and same_matrix(user, node)):
            raise Refused(f"{name or user.target} of the weights")
        node = user


def _drops_last(node: fx.Node, of: fx.Node) -> bool:
    """Whether a slice drops one column, the last one."""
    after, before = shape_of(node), shape_of(of)
    index = node.args[1]
    if isinstance(index, int):  # aten.slice(x, dim, start, end)
        full = index in (-1, len(before) - 1) and argument(node, 2, "start", 0) in (0, None)
    else:
        last = index[-1] if isinstance(index, tuple) else index
        full = isinstance(last, slice) and last.start in (0, None) and last.step in (1, None)
    whole = len(after) == len(before) and all(map(same_size, after[:-1], before[:-1]))
    return full and whole and same_size(after[-1] + 1, before[-1])


# ---------------------------------------------------------------- from the weights to queries and keys

# A mask: a coefficient and what is added; or what must be true (+1) or false (-1) for a key to be seen, and what
# is added where it is not.
_Term: TypeAlias = tuple[float, Any]


@dataclass(frozen=True)
class Scores:
    """What has been met on the way up from the softmax.

    Attributes:
        times: what all that is still above is multiplied by.
        added: biases, each with what it is multiplied by.
        seen: masks: the condition, which of its values shows a score, and what is added to those that it hides.
        softcap: of the scores.
        sink: a column that has no value.
        heads: of scores that are computed as ``[batch * heads, queries, keys]``.
        column: the softmax is over one column more than there are keys.
        q, kt: operands of the product, once it is reached; keys transposed.
    """

    times: float = 1.0
    added: tuple[_Term, ...] = ()
    seen: tuple[tuple[fx.Node, bool, float], ...] = ()
    softcap: float | None = None
    sink: fx.Node | None = None
    heads: int | None = None
    column: bool = False
    q: Any = None
    kt: Any = None


def up(node: Any, s: Scores) -> Scores:
    """Up to the product of queries and keys; both sides of an addition are tried."""
    while True:
        if not isinstance(node, fx.Node):
            raise Refused("no product of queries and keys")
        name = op_name(node)
        if len(readers(node)) > 1 and not _only_its_peak(node):
            raise Refused(f"something else reads the scores (the result of {name})")
        if name == "matmul":
            other = argument(node, 1, "other", node.kwargs.get("mat2"))
            return replace(s, q=node.args[0], kt=other)
        if name == "baddbmm":
            return _baddbmm(node, s)
        if name in ("add", "sub"):
            return _sum(node, name, s)
        before = node.args[0] if node.args else None
        if name in SAME:
            pass
        elif name in ("mul", "div"):
            before, factor = _scaled(node, name)
            s = replace(s, times=s.times * factor)
        elif name == "masked_fill":
            fill = constant(argument(node, 2, "value"))
            s = _hide(s, argument(node, 1, "mask"), False, fill)
        elif name == "where":
            before, s = _where(node, s)
        elif name == "tanh":
            if s.softcap is not None:
                raise Refused("a second soft cap")
            s = replace(s, softcap=s.times, times=1.0)
        elif name == "cat":
            before, s = _sink(node, s)
        elif name in VIEWS and isinstance(before, fx.Node) and same_matrix(node, before):
            s = _heads(node, before, s)
        else:
            raise Refused(f"{name or node.op} among the score edits")
        node = before


def _only_its_peak(node: fx.Node) -> bool:
    """Whether the other readers are the greatest score and its subtraction, which change no softmax."""
    users = readers(node)
    return len(users) == 2 and any(op_name(u) in ("max", "amax") for u in users)


def _free_of_rows(node: fx.Node) -> bool:
    """Whether a value is the same for all keys of a row."""
    shape = shape_of(node)
    return len(shape) >= 1 and isinstance(shape[-1], int) and shape[-1] == 1


def _sum(node: fx.Node, name: str, s: Scores) -> Scores:
    if argument(node, 2, "alpha", 1) != 1:
        raise Refused("an addition with a factor")
    left, right = node.args[0], argument(node, 1, "other")
    sign = 1.0 if name == "add" else -1.0
    if name == "sub" and isinstance(right, fx.Node) and s.sink is None and s.softcap is None and _free_of_rows(right):
        width = shape_of(node)[-1]
        if not (isinstance(width, int) and width == 1):
            return up(left, s)  # the same number off every score of a row
    problems: list[Refused] = []
    for path, other, c in ((left, right, sign), (right, left, 1.0)):
        if path is right and name == "sub":
            continue
        if not isinstance(path, fx.Node) or not _full(path, node):
            continue
        try:
            return up(path, _add(s, c, other))
        except Refused as problem:
            problems.append(problem)
    raise problems[-1] if problems else Refused("no product of queries and keys")


def _full(path: fx.Node, node: fx.Node) -> bool:
    a, b = shape_of(path), shape_of(node)
    return len(a) == len(b) and all(map(same_size, a, b))


def _add(s: Scores, c: float, other: Any) -> Scores:
    if s.column or s.softcap is not None:
        raise Refused(f"a bias {'of the scores together with their sink' if s.column else 'inside the soft cap'}")
    if isinstance(other, fx.Node):
        value = value_of(other)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise Refused("something that is no floating tensor is added to the scores")
        return replace(s, added=(*s.added, (c * s.times, other)))
    if constant(other) is None or s.sink is not None:
        raise Refused("a number is added to the scores beside a sink")
    return s  # the same number on every score


def _baddbmm(node: fx.Node, s: Scores) -> Scores:
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        raise Refused("baddbmm with factors that are not numbers")
    q, kt = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    if beta != 0:
        s = _add(s, float(beta), node.args[0])
    return replace(s, times=s.times * float(alpha), q=q, kt=kt)


def _scaled(node: fx.Node, name: str) -> tuple[Any, float]:
    left, right = node.args[0], argument(node, 1, "other")
    if name == "mul" and constant(left) is not None:
        left, right = right, left
    factor = constant(right)
    if factor is None or not math.isfinite(factor) or factor <= 0 or node.kwargs.get("rounding_mode"):
        raise Refused(f"scores that are {'multiplied' if name == 'mul' else 'divided'} by what is no positive number")
    return left, factor if name == "mul" else 1.0 / factor


def _hide(s: Scores, mask: Any, shown: bool, fill: float | None) -> Scores:
    if not isinstance(mask, fx.Node) or value_of(mask).dtype != torch.bool:
        raise Refused("scores hidden by what is no boolean tensor")
    if fill is None or fill > max(_HIDDEN, float(torch.finfo(torch.float16).min)) or math.isnan(fill):
        raise Refused(f"scores replaced by {fill}, which does not hide them")
    if s.column or s.softcap is not None:
        raise Refused(f"a mask {'of the scores together with their sink' if s.column else 'inside the soft cap'}")
    return replace(s, seen=(*s.seen, (mask, shown, fill * s.times)))


def _where(node: fx.Node, s: Scores) -> tuple[Any, Scores]:
    cond, yes, no = node.args[0], argument(node, 1, "self"), argument(node, 2, "other")
    if node.op == "call_method":  # scores.where(cond, other)
        cond, yes = argument(node, 1, "condition"), node.args[0]
    if constant(no) is not None:
        return yes, _hide(s, cond, True, constant(no))
    if constant(yes) is not None:
        return no, _hide(s, cond, False, constant(yes))
    raise Refused("a choice between two scores")


def _sink(node: fx.Node, s: Scores) -> tuple[Any, Scores]:
    """``cat([scores, column], -1)``."""
    parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not s.column or s.sink is not None or dim not in (-1, 3) or len(parts) != 2:
        raise Refused("scores that are joined with others")
    if s.added or s.seen or s.softcap is not None or s.times != 1.0:
        raise Refused("scores that are edited together with their sink")
    scores, column = parts
    while op_name(column) in ("expand", *SAME):
        column = column.args[0]
    shape = shape_of(column)
    heads = shape_of(node)[1]
    if len(shape) != 4 or not all(isinstance(n, int) and n == 1 for n in (shape[0], *shape[2:])) or shape[1] != heads:
        raise Refused("a column of scores that differs by more than the head")
    return scores, replace(s, sink=column, column=False)


def _heads(node: fx.Node, before: Any, s: Scores) -> Scores:
    """``[b * h, q, k]`` seen as ``[b, h, q, k]``."""
    after, flat = shape_of(node), shape_of(before)
    if len(after) == len(flat):
        return s
    if len(after) != 4 or len(flat) != 3 or not isinstance(after[1], int) or s.heads is not None:
        raise Refused(f"scores seen as {list(after)} and {list(flat)}")
    return replace(s, heads=after[1])
