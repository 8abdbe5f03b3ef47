"""What becomes of torch's scan operators in a Dynamo graph.

    associative_scan  (a, b), (c, d) -> (a * c, c * b + d)       tessel::linear_scan
                      a + b, a * b, max(a, b), min(a, b)         cumsum, cumprod, cummax, cummin
                      any other                                  scan, from the first element on
    scan              of a state of keys times values            tessel::linear_attention, see ``linear_match``
                      whose carry is a * carry + b               see ``affine`` and ``written``
                      any other                                  stays: the importer makes a loop of it

A combine function that is not associative gives results that depend on how a scan is cut into pieces, so it is tried
on random numbers first, and refused in words.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ...errors import TesselError
from ..compat import size_hints, without_modes
from ..fx_effects import erase_unread
from ..fx_words import value_of
from ..locs import Locations
from ..scan_op import linear_scan
from .affine import NotAffine
from .emit import emit_known, own_results
from .step import Step

__all__ = ["lower_scans"]

_EXACT, _ROUNDED = 1e-7, 2e-2  # how far two ways of combining may differ, of float64 and of less precise results


def lower_scans(gm: fx.GraphModule) -> int:
    """Rewrite ``gm`` in place; how many scans were replaced.

    Raises:
        TesselError: a combine function is not associative.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.higher_order.scan:
            starts = [n for n in node.args[1] if n.target is _START]
            count += _associative(gm, node, starts) if starts else _affine(gm, node)
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


_START, _RESULT = torch.ops.tessel.scan_start, torch.ops.tessel.scan_result


def _region(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    region: Any = gm
    for part in str(node.args[0].target).split("."):  # type: ignore[union-attr]
        region = getattr(region, part)
    return region  # type: ignore[no-any-return]


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta = {**node.meta, **{k: v for k, v in new.meta.items() if k != "example_value"}}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _affine(gm: fx.GraphModule, node: fx.Node) -> int:
    """A scan whose carries are linear recurrences, written without a loop; any other stays."""
    _, init, xs, extras = node.args
    region, shape = _region(gm, node), value_of(xs[0]).shape if xs else ()  # type: ignore[index,arg-type]
    if not shape or not isinstance(shape[0], int) or any(u.target is not operator.getitem for u in node.users):
        own_results(region)
        return 0
    step = Step(region, tuple(init), tuple(xs), tuple(extras), shape[0])  # type: ignore[arg-type]
    with gm.graph.inserting_before(node):
        try:
            lasts, ys = emit_known(gm.graph, step)
        except NotAffine:
            own_results(region)
            return 0
    results = [*lasts, *ys]
    for user in list(node.users):
        _replace(user, results[user.args[1]])  # type: ignore[index]
    erase_unread([node, *results])
    return 1


def _associative(gm: fx.GraphModule, node: fx.Node, starts: list[fx.Node]) -> int:
    graph, region, extras = gm.graph, _region(gm, node), list(node.args[3])  # type: ignore[arg-type]
    xs: list[Any] = [s.args[0] for s in starts]
    known: list[fx.Node] | None = None
    read = [n for n in region.graph.nodes if n.op == "placeholder"][2 * len(xs) :]
    if not any(n.users for n in read):  # symbolic sizes are handed in whether or not they are read
        with graph.inserting_before(node):
            known = _known(graph, region, xs)
    if known is None:
        _check_associative(region, [value_of(x) for x in xs], [value_of(e) for e in extras], node)
    for user in [u for part in node.users for u in part.users if u.target is _RESULT]:
        part: Any = user.args[1]
        if known is not None:
            _replace(user, known[part.args[1] - len(xs)])
            continue
        with graph.inserting_before(user):
            first = graph.call_function(operator.getitem, (user.args[0], slice(0, 1)))
            _replace(user, graph.call_function(torch.cat, ([first, part],)))
    if known is not None:
        erase_unread([*node.users, *known])
        return 1
    for start in starts:
        with graph.inserting_before(start):
            first = graph.call_function(operator.getitem, (start.args[0], 0))
            _replace(start, graph.call_method("clone", (first,)))
    _affine(gm, node)
    return 1


# ---------------------------------------------------------------- known combine functions


def _known(graph: fx.Graph, region: fx.GraphModule, xs: list[fx.Node]) -> list[fx.Node] | None:
    """The scans of common combine functions."""
    inputs = [n for n in region.graph.nodes if n.op == "placeholder"]
    (out,) = (n for n in region.graph.nodes if n.op == "output")
    outs = list(out.args[0])[: len(xs)]  # type: ignore[arg-type]
    inputs = inputs[: 2 * len(xs)]
    while outs and isinstance(outs[0], fx.Node) and outs[0].target == "clone":
        outs[0] = outs[0].args[0]
    if len(xs) == 1 and isinstance(outs[0], fx.Node):
        target, (x,) = outs[0].target, xs
        of_both = set(outs[0].args) == set(inputs) and not outs[0].kwargs
        if of_both and target in (torch.maximum, "maximum", torch.minimum, "minimum"):
            both = graph.call_function(torch.cummax if "max" in str(target) else torch.cummin, (x, 0))
            return [graph.call_function(operator.getitem, (both, 0))]
    formulas = _formulas(region, inputs, outs)
    if formulas is None:
        return None
    left, right = _SYMBOLS[: len(xs)], _SYMBOLS[len(xs) : 2 * len(xs)]
    dtypes = {value_of(x).dtype for x in xs}
    if len(xs) == 1:
        folds = {left[0] + right[0]: torch.cumsum, left[0] * right[0]: torch.cumprod}
        fold = folds.get(formulas[0])
        return None if fold is None else [graph.call_function(fold, (xs[0], 0), {"dtype": value_of(xs[0]).dtype})]
    if len(xs) == 2 and len(dtypes) == 1 and next(iter(dtypes)).is_floating_point:
        for a, b in ((0, 1), (1, 0)):
            state = sympy.expand(right[a] * left[b] + right[b])
            if formulas[a] == left[a] * right[a] and formulas[b] == state:
                found: list[Any] = [None, None]
                found[a] = graph.call_function(torch.cumprod, (xs[a], 0))
                found[b] = graph.call_function(linear_scan, (xs[a], xs[b], 0, False))
                return found
    return None


_SYMBOLS = sympy.symbols("a b c d")
_ARITHMETIC: dict[Any, Any] = {
    t: getattr(operator, name)
    for name in ("add", "sub", "mul", "neg")
    for t in (name, getattr(operator, name), getattr(torch, name))
}


def _formulas(region: fx.GraphModule, inputs: Sequence[fx.Node], outs: Sequence[Any]) -> list[Any] | None:
    """The results as polynomials in ``_SYMBOLS``, if all there is is arithmetic on tensors of one shape."""
    if len(inputs) > len(_SYMBOLS) or len({str(value_of(n).shape) for n in inputs}) != 1:
        return None
    held: dict[fx.Node, Any] = dict(zip(inputs, _SYMBOLS, strict=False))
    for node in region.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target == "clone":
            held[node] = held[node.args[0]]
            continue
        fn = _ARITHMETIC.get(node.target)
        if fn is None or node.kwargs or any(not isinstance(a, fx.Node) for a in node.args):
            return None
        held[node] = sympy.expand(fn(*(held[a] for a in node.args)))
    return [held.get(o) for o in outs]


# ---------------------------------------------------------------- associative or not


def _check_associative(
    region: fx.GraphModule, like: Sequence[torch.Tensor], extras: Sequence[torch.Tensor], node: fx.Node
) -> None:
    """Try (x . y) . z against x . (y . z) on random numbers: of any sign, and between 0 and 1."""
    worst = ""
    with without_modes(), torch.no_grad():
        for draw in _draws():
            x, y, z = ([draw(t.shape[1:], t.dtype) for t in like] for _ in range(3))
            fixed = [draw(t.shape, t.dtype) if isinstance(t, torch.Tensor) else _size(t) for t in extras]
            try:
                n = len(like)
                one = region(*region(*x, *y, *fixed)[:n], *z, *fixed)
                other = region(*x, *region(*y, *z, *fixed)[:n], *fixed)
            except RuntimeError:  # it wants other types or values than these
                return
            found = [_difference(p, q) for p, q in zip(one[:n], other[:n], strict=True)]
            if not any(found):
                return
            worst = next(f for f in found if f)
    raise TesselError(
        f"{Locations().of(node.meta)}: the combine function of associative_scan is not associative: on random numbers "
        f"combine(combine(x, y), z) and combine(x, combine(y, z)) differ ({worst}). A scan may combine in any order, "
        "so its result would be arbitrary; use torch's scan for a recurrence that must run step by step"
    )


def _draws() -> Iterator[Any]:
    made = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int], dtype: torch.dtype, signed: bool) -> torch.Tensor:
        sizes = tuple(map(_size, shape))
        if dtype == torch.bool:
            return torch.rand(sizes, generator=made) > 0.5
        if not dtype.is_floating_point:
            return torch.randint(0, 100, sizes, generator=made, dtype=dtype)
        make = torch.randn if signed else torch.rand
        return make(sizes, generator=made, dtype=torch.float64)

    for signed in (True, False):
        yield lambda shape, dtype, signed=signed: draw(shape, dtype, signed)


def _size(n: Any) -> Any:
    """A size as the number that it has in the call that is traced."""
    if not isinstance(n, torch.SymInt):
        return n
    known = size_hints(n)
    return int(n.node.expr.xreplace({s: sympy.Integer(known[str(s)]) for s in n.node.expr.free_symbols}))


def _difference(p: torch.Tensor, q: torch.Tensor) -> str:
    """How far two results are apart, in words; empty if they agree."""
    if not p.dtype.is_floating_point:
        return "" if torch.equal(p, q) else "they are not equal"
    far = _EXACT if p.dtype == torch.float64 else _ROUNDED
    p, q = p.double(), q.double()
    largest = float(p.abs().nan_to_num(0, 0, 0).amax()) if p.numel() else 0.0
    if torch.allclose(p, q, rtol=far, atol=far * largest, equal_nan=True):
        return ""
    return f"by up to {float((p - q).abs().nan_to_num(0).amax()):.3g} where values reach {largest:.3g}"
