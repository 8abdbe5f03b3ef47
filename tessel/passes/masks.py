"""Tell a mask's structure from its own arithmetic, so that attention's kernels skip what it hides.

    %3 = le(%j, %i)                             %6 = attention(%q, %k, %v, causal=True)
    %4 = where(%3, 0.0, -inf)        becomes
    %6 = attention(%q, %k, %v, %4)

``%i`` and ``%j`` are places of queries and keys: iotas, through views, casts, sums and gathers from other iotas. What
bounds ``j - i`` from above or below becomes ``causal``, ``offset`` and ``window``; a condition that holds everywhere
is dropped; other conditions and what else is added stay the mask.

A mask that hides by a large finite number gives a row that sees nothing the mean of all values. So its bounds are only
taken out where every row is known to see a key; by -inf such a row is zeros in any case.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.node import Builder, Graph, Node, Value
from ..ir.types import Dim, TensorType, simplify_dim
from ..ops.emit import Emit
from ..tiles.index import Index, add, bounds, constant, nonnegative, scale, var
from ..tiles.places import broadcast, through_view
from ._known import Known

__all__ = ["run"]

_HIDDEN = -1e30  # what is added to a score that shall weigh nothing
_FLIPPED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}
_NEGATED = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt"}
_COMPARE = {name: getattr(operator, name) for name in ("le", "lt", "ge", "gt", "eq", "ne")}
_MASK_AT = {"attention": 3, "attention_backward": 4}


@dataclass(frozen=True)
class _Found:
    """Bounds of ``j - i`` (``at_most``, ``at_least``), and the conditions that remain, each with what it must be."""

    at_most: tuple[Dim, ...] = ()
    at_least: tuple[Dim, ...] = ()
    rest: tuple[tuple[Value, bool], ...] = ()

    def __and__(self, other: _Found) -> _Found:
        return _Found(self.at_most + other.at_most, self.at_least + other.at_least, self.rest + other.rest)

    @property
    def bounded(self) -> bool:
        return bool(self.at_most or self.at_least)


def run(graph: Graph) -> Graph:
    """The graph with masks taken apart; nodes that then have no reader are gone."""
    if not any(n.op.name in _MASK_AT for n in graph.nodes):
        return graph
    known = Known()
    return graph.rewrite(lambda builder, node: _rewrite(builder, node, known)).live()


def _rewrite(builder: Builder, node: Node, known: Known) -> tuple[Value, ...] | None:
    at = _MASK_AT.get(node.op.name)
    if at is None or len(node.args) <= at or node.args[at] is None:
        return None
    if node.attrs.get("causal") or node.attrs.get("window") is not None:
        return None
    q, k = node.args[at - 3], node.args[at - 2]
    reader = _Reader((q.shape[0], q.shape[1], q.shape[2], k.shape[2]), known)
    got = reader.mask(node.args[at])
    if got is None:
        return None
    found, terms, fill = got
    attrs = _attributes(found, reader.sizes, fill)
    if attrs is None:
        return None
    mask = _joined(Emit(builder), found.rest, terms, fill)
    if node.attrs.get("mask_grad") and (mask is None or mask.type.shape != node.args[at].type.shape):
        return None
    args = (*node.args[:at], mask, *node.args[at + 1 :])
    return builder.node(node.op, *args, types=node.types, **{**node.attrs, **attrs}).outs


def _attributes(found: _Found, sizes: Sequence[Dim], fill: float) -> dict[str, Any] | None:
    """The attributes that say the bounds; None where there are none, or where a row might then see nothing."""
    if not found.bounded:
        return None
    queries, keys = sizes[2:]
    least = _extreme(found.at_least, largest=True)
    most = _extreme(found.at_most or (simplify_dim(keys - 1),), largest=False)
    if most is None or (found.at_least and least is None):
        return None
    if fill != -math.inf:
        sees = not found.rest and nonnegative(most)
        if least is not None:
            sees = (
                sees and nonnegative(simplify_dim(keys - queries - least)) and nonnegative(simplify_dim(most - least))
            )
        if not sees:
            return None
    attrs: dict[str, Any] = {"causal": True, "offset": most}
    if least is not None:
        window = simplify_dim(most - least + 1)
        if not isinstance(window, int) or window < 1:
            return None
        attrs["window"] = window
    return {name: x for name, x in attrs.items() if not (name == "offset" and isinstance(x, int) and x == 0)}


def _extreme(values: Sequence[Dim], largest: bool) -> Dim | None:
    """The largest or smallest of some sizes, if one is known to be."""
    for a in values:
        if all(nonnegative(simplify_dim(a - b if largest else b - a)) for b in values):
            return a
    return None


def _joined(e: Emit, rest: Sequence[tuple[Value, bool]], terms: Sequence[Value], fill: float) -> Value | None:
    """The mask that remains."""
    shown: Value | None = None
    for v, wanted in rest:
        cond = v if wanted else e("logical_not", v)
        shown = cond if shown is None else e("bitwise_and", shown, cond)
    total: Value | None = None
    for term in terms:
        total = term if total is None else e("add", *_alike(e, total, term))
    if shown is None:
        return total
    if total is None and fill == -math.inf:
        return shown
    dtype = torch.float32 if total is None else total.dtype
    hidden = e("where", shown, e("full", shape=(), value=0.0, dtype=dtype), fill)
    return hidden if total is None else e("add", total, hidden)


def _alike(e: Emit, a: Value, b: Value) -> tuple[Value, Value]:
    wide = torch.promote_types(a.dtype, b.dtype)
    return e.cast(a, wide), e.cast(b, wide)


class _Reader:
    """Reads masks of one shape ``[b, h, queries, keys]``."""

    def __init__(self, sizes: Sequence[Dim], known: Known) -> None:
        self.sizes, self.known = tuple(sizes), known
        self.places = tuple(var(name, size) for name, size in zip("bhmn", sizes, strict=True))

    def mask(self, mask: Value) -> tuple[_Found, tuple[Value, ...], float] | None:
        """The conditions of a mask, what else it adds, and what it adds where a condition fails."""
        place = broadcast(mask.type, self.places)
        if mask.dtype == torch.bool:
            return self.condition(mask, place), (), -math.inf
        found, terms = _Found(), []
        fills: list[float] = []
        stack = [mask]
        while stack:
            term = stack.pop()
            hidden = self._hides(term)
            if hidden is not None:
                cond, wanted, fill = hidden
                got = self.condition(cond, broadcast(cond.type, broadcast(term.type, self.places)), wanted)
                if got.bounded and not got.rest:
                    found, fills = found & got, [*fills, fill]
                    continue
            if term.op.name == "add" and all(isinstance(a, Value) for a in term.node.args):
                stack += term.node.args  # type: ignore[arg-type]
            else:
                terms.append(term)
        if not fills:
            return self._one_choice(mask)
        return found, tuple(reversed(terms)), max(fills)

    def _one_choice(self, mask: Value) -> tuple[_Found, tuple[Value, ...], float] | None:
        """A mask that is one choice between 0 and -inf, whose conditions need not all be bounds."""
        hidden = self._hides(mask)
        if hidden is None or hidden[2] != -math.inf:
            return None
        return (
            self.condition(hidden[0], broadcast(hidden[0].type, broadcast(mask.type, self.places)), hidden[1]),
            (),
            -math.inf,
        )

    @staticmethod
    def _hides(v: Value) -> tuple[Value, bool, float] | None:
        """``where(cond, 0, fill)`` or the other way round: the condition, when the key is seen, and the fill."""
        while (
            v.op.name in ("expand", "cast") and v.dtype.is_floating_point and v.node.operands[0].dtype.is_floating_point
        ):
            v = v.node.operands[0]
        if v.op.name != "where":
            return None
        cond, yes, no = v.node.args
        numbers = [_number(yes), _number(no)]
        for shown, hidden, wanted in ((numbers[0], numbers[1], True), (numbers[1], numbers[0], False)):
            if shown == 0 and hidden is not None and hidden <= _HIDDEN and isinstance(cond, Value):
                return cond, wanted, hidden
        return None

    def condition(self, v: Value, place: Sequence[Index], wanted: bool = True) -> _Found:
        """What a condition (or its opposite) says of ``j - i``."""
        node, name = v.node, v.op.name
        if name in ("bitwise_and", "logical_and") and wanted:
            parts = [self.condition(a, broadcast(a.type, tuple(place))) for a in node.args if isinstance(a, Value)]
            return parts[0] & parts[1] if len(parts) == 2 else _Found(rest=((v, True),))
        if name in ("bitwise_not", "logical_not"):
            return self.condition(node.operands[0], place, not wanted)
        if node.op.kind == "view":
            got = self.condition(node.operands[0], through_view(node, tuple(place)), wanted)
            return _kept(v, wanted, got)
        if name in ("cast", "ne") and (name == "cast" or _number(node.args[1]) == 0):
            hidden = self._hides(node.operands[0])  # a float mask as flags: true where it hides
            if hidden is not None:
                cond, shown, _ = hidden
                return _kept(v, wanted, self.condition(cond, broadcast(cond.type, tuple(place)), shown != wanted))
        if (choice := _choice(node)) is not None and choice[1] != choice[2]:
            cond, yes, _ = choice
            return _kept(v, wanted, self.condition(cond, broadcast(cond.type, tuple(place)), yes == wanted))
        if name in _NEGATED:
            bound = self._bound(node, name if wanted else _NEGATED[name], place)
            if bound is not None:
                return bound
        if self.known.range(v) == ((1, 1) if wanted else (0, 0)):
            return _Found()
        return _Found(rest=((v, wanted),))

    def _bound(self, node: Node, name: str, place: Sequence[Index]) -> _Found | None:
        left, right = node.args
        for a, b, how in ((left, right, name), (right, left, _FLIPPED[name])):
            if isinstance(a, Value) and a.op.name == "abs" and how in ("le", "lt"):
                inner, limit = a.node.operands[0], self.affine(b, place)
                at = self.affine(inner, broadcast(inner.type, broadcast(a.type, tuple(place))))
                if at is None or limit is None:
                    return None
                both = [
                    _difference(add(at, scale(limit, -1)), how),
                    _difference(add(scale(at, -1), scale(limit, -1)), how),
                ]
                return both[0] & both[1] if both[0] and both[1] else None
        a, b = (self.affine(x, place) for x in (left, right))
        return None if a is None or b is None else _difference(add(a, scale(b, -1)), name)

    def affine(self, v: Any, place: Sequence[Index]) -> Index | None:
        """A whole number as a sum of places; ``place`` is where the result of its reader is asked for."""
        if not isinstance(v, Value):
            return constant(v) if isinstance(v, int) and not isinstance(v, bool) else None
        if not isinstance(v.type, TensorType) or v.dtype.is_floating_point or v.dtype == torch.bool:
            return None
        node, name, at = v.node, v.op.name, broadcast(v.type, tuple(place))
        if node.op.kind == "view":
            return self.affine(node.operands[0], through_view(node, at))
        if name == "iota":
            start, step = node.attrs["start"], node.attrs["step"]
            return (
                None
                if isinstance(start, float) or isinstance(step, float)
                else add(scale(at[0], step), constant(start))
            )
        if name == "full":
            return constant(int(node.attrs["value"]))
        if name == "cast":
            return self.affine(node.operands[0], at)
        if name in ("add", "sub"):
            a, b = (self.affine(x, at) for x in node.args)
            return None if a is None or b is None else add(a, b if name == "add" else scale(b, -1))
        if name == "index":
            return self._gathered(node, at)
        return None

    def _gathered(self, node: Node, at: Sequence[Index]) -> Index | None:
        """A value read at places that are whole numbers themselves."""
        x, indices = node.args
        if len(indices) != x.type.rank or any(i is None for i in indices):
            return None
        coords: list[Index] = []
        for index in indices:
            got = self.affine(index, at)
            least = None if got is None else bounds(got)
            if got is None or least is None or not nonnegative(least[0]):  # counted from the end
                return None
            coords.append(got)
        return self.affine(x, tuple(coords))


def _kept(v: Value, wanted: bool, got: _Found) -> _Found:
    """The bounds, if they are all that a condition says; else the condition itself."""
    return _Found(rest=((v, wanted),)) if got.rest else got


def _difference(d: Index, how: str) -> _Found | None:
    """What ``d <= 0`` (or <, >=, >) says, where d is ``j - i`` or ``i - j`` and a number."""
    signs = {atom.name: c for atom, c in d.terms if atom.kind == "var"}
    if len(signs) != len(d.terms) or set(signs) != {"m", "n"} or {*signs.values()} != {1, -1}:
        return None
    if signs["n"] == -1:
        d, how = scale(d, -1), _FLIPPED[how]
    edge = simplify_dim(-d.const)
    if how in ("le", "lt"):
        return _Found(at_most=(edge if how == "le" else simplify_dim(edge - 1),))
    return _Found(at_least=(edge if how == "ge" else simplify_dim(edge + 1),))


def _number(x: Any) -> float | None:
    if isinstance(x, Value) and x.op.name in ("full", "expand", "cast"):
        return float(x.node.attrs["value"]) if x.op.name == "full" else _number(x.node.operands[0])
    return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None


def _choice(node: Node) -> tuple[Value, bool, bool] | None:
    """A comparison of ``where(cond, a, b)`` with a number, as ``tril(ones) > 0``: the condition, and both outcomes."""
    compare = _COMPARE.get(node.op.name)
    if compare is None or not isinstance(node.args[0], Value) or node.args[0].op.name != "where":
        return None
    cond, *numbers = (node.args[0].node.args[0], *map(_number, (*node.args[0].node.args[1:], node.args[1])))
    a, b, limit = numbers
    if a is None or b is None or limit is None or not isinstance(cond, Value):
        return None
    return cond, compare(a, limit), compare(b, limit)
