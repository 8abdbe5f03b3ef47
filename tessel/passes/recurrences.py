"""Find linear recurrences that were written as trees or chains of products and sums.

    %2, %3 = %0[0::2], %0[1::2]           (a, b of shape [n, m], n = 2, 4, 8, ...)
    %4, %5 = %1[0::2], %1[1::2]
    %6 = add(mul(%3, %4), %5)             becomes      %2 = linear_scan(%0, %1, dim=0)
    ... the same on halves, their results interleaved

A parallel scan halves the steps and doubles the memory traffic; where one core runs many steps anyway the plain
recurrence is one pass over memory. Each element along the scanned dimension of each value is named by what it is of
a and b: ``P(s, e)`` the product a[s] * .. * a[e], ``H(s, e)`` what the recurrence over s .. e from zero gives. These
follow the rules

    P(s, m) * P(m + 1, e) = P(s, e)        P(m + 1, e) * H(s, m) + H(m + 1, e) = H(s, e)

so that a value whose elements are H(0, 0), H(0, 1), ... is the recurrence, however the tree was built. What is put
in its place adds in another order, as a sum may.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..ir.node import Builder, Graph, Node, Value, map_values
from ..ir.types import TensorType
from ..ops import OPS

__all__ = ["run"]

_LEAST, _MOST = 8, 1 << 16  # steps worth it, steps that are still looked at
_UNKNOWN = 0
_VIEWS = frozenset({"reshape", "permute", "expand", "slice", "flip"})


def run(graph: Graph) -> Graph:
    """The graph with every such tree replaced, where nothing else reads a part of it."""
    trees: list[_Tree] = []
    inside: set[Value] = set()
    for a, b, dim in _candidates(graph):
        if a in inside or b in inside:
            continue
        tree = _Tree(graph, a, b, dim)
        if tree.results:
            trees.append(tree)
            inside |= {v for v, held in tree.held.items() if held.made}
    return _replace(graph, trees) if trees else graph


def _candidates(graph: Graph) -> Iterator[tuple[Value, Value, int]]:
    """Pairs (a, b) of which slices along one dimension meet in ``slice of a * x + slice of b``, outermost first."""
    seen: dict[tuple[Value, Value, int], None] = {}
    for node in graph.nodes:
        if node.op.name != "add" or len(node.operands) != 2 or not node.type.dtype.is_floating_point:
            continue
        for product, last in (node.operands, node.operands[::-1]):
            if product.op.name != "mul" or (b := _sliced(last)) is None:
                continue
            for factor in product.node.operands:
                a = _sliced(factor)
                if a is not None and a[0] != b[0] and a[1] == b[1] and _fit(a[0].type, b[0].type, b[1]):
                    seen.setdefault((a[0], b[0], b[1]))
    yield from seen


def _sliced(v: Value) -> tuple[Value, int] | None:
    """What a value is a slice of, and along which dimension."""
    while v.op.name in ("reshape", "permute"):
        v = v.node.operands[0]
    return (v.node.operands[0], v.node.attrs["dim"] % v.type.rank) if v.op.name == "slice" else None


def _fit(a: TensorType, b: TensorType, dim: int) -> bool:
    return (
        a.rank == b.rank
        and a.dtype == b.dtype
        and a.device == b.device
        and all(isinstance(n, int) for n in (*a.shape, *b.shape))
        and all(m == n or (m == 1 and d != dim) for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)))
        and _LEAST <= b.shape[dim] <= _MOST
    )


@dataclass(frozen=True)
class _Held:
    """What is known of a value.

    Attributes:
        labels: for each dimension the dimension of b that it is, ``None`` for a scanned one and those of size one.
        terms: numbers of terms; its dimensions are those of the value, the labelled ones of size one.
        made: whether it took arithmetic to make it.
    """

    labels: tuple[int | None, ...]
    terms: np.ndarray
    made: bool = False


Results = dict[Value, tuple[int, int, int]]  # value -> first step, count, stride


class _Tree:
    """What can be said of a graph's values as functions of a and b."""

    def __init__(self, graph: Graph, a: Value, b: Value, dim: int) -> None:
        self.graph, self.a, self.b, self.dim = graph, a, b, dim
        self.numbers: dict[tuple[object, ...], int] = {}
        self.terms: list[tuple[object, ...]] = [("?",)]
        self.inner = frozenset(d for d, n in enumerate(b.shape) if n != 1 and d != dim)
        self.held: dict[Value, _Held] = {}
        for v, kind in ((a, "P"), (b, "H")):
            labels = tuple(d if d in self.inner and n != 1 else None for d, n in enumerate(v.shape))
            terms = np.array([self._number((kind, t, t)) for t in range(b.shape[dim])])
            shape = [1] * b.type.rank
            shape[dim] = -1
            self.held[v] = _Held(labels, terms.reshape(shape))
        for node in graph.nodes:
            if not node.types or node.out in self.held or not any(v in self.held for v in node.operands):
                continue
            if (got := self._of(node)) is not None and (got.terms != _UNKNOWN).any():
                self.held[node.out] = got
        self.results = self._results()

    def _results(self) -> Results:
        """The values that are (some steps of) the recurrence and are read elsewhere; none if anything else is."""
        found: Results = {}
        for v in self._read_outside():
            if (steps := self._steps(v)) is None:
                return {}
            found[v] = steps
        whole = (0, self.b.shape[self.dim], 1)
        return found if whole in found.values() else {}

    def _read_outside(self) -> list[Value]:
        leaving = [v for v in self.graph.results() if v in self.held]
        for node in self.graph.nodes:
            if not node.types or node.out not in self.held:
                leaving += [v for v in node.operands if v in self.held]
        return [v for v in dict.fromkeys(leaving) if self.held[v].made]

    def _steps(self, v: Value) -> tuple[int, int, int] | None:
        """First, count and stride of the steps that a value holds."""
        h = self.held[v]
        if sum(n > 1 for n in h.terms.shape) > 1 or {x for x in h.labels if x is not None} != self.inner:
            return None
        at: list[int] = []
        for number in h.terms.ravel():
            kind, *span = self.terms[number]
            if kind != "H" or span[0] != 0:
                return None
            at.append(span[1])  # type: ignore[arg-type]
        step = at[1] - at[0] if len(at) > 1 else 1
        return (at[0], len(at), step) if step > 0 and at == list(range(at[0], at[-1] + 1, step)) else None

    # ------------------------------------------------------------------ terms

    def _number(self, term: tuple[object, ...]) -> int:
        if term not in self.numbers:
            self.numbers[term] = len(self.terms)
            self.terms.append(term)
        return self.numbers[term]

    def _joined(self, op: str, x: int, y: int) -> int:
        for left, right in ((self.terms[x], self.terms[y]), (self.terms[y], self.terms[x])):
            kinds = f"{left[0]}{right[0]}"
            if op == "mul" and kinds in ("PP", "HP") and left[2] + 1 == right[1]:  # type: ignore[operator]
                if kinds == "PP":
                    return self._number(("P", left[1], right[2]))
                return self._number(("carried", left[1], right[1], right[2]))
            if op == "add" and kinds == "carriedH" and left[2:] == right[1:]:
                return self._number(("H", left[1], right[2]))
        return _UNKNOWN

    # ------------------------------------------------------------------ nodes

    def _of(self, node: Node) -> _Held | None:
        """What a node's result is; ``None`` where nothing can be said."""
        if not all(v in self.held for v in node.operands) or len(node.types) != 1:
            return None
        parts = [self.held[v] for v in node.operands]
        name = node.op.name
        if name in ("add", "mul") and len(parts) == 2 and node.operands == node.args:
            return self._arithmetic(name, *parts)
        if name in _VIEWS:
            labels, terms = parts[0].labels, parts[0].terms
            got = getattr(self, f"_{name}")(node, labels, terms)
            return None if got is None else _Held(got[0], got[1], parts[0].made)
        if name == "copy":
            return parts[0]
        if name == "cat":
            dim = node.attrs["dim"] % node.type.rank
            if any(p.labels != parts[0].labels for p in parts) or parts[0].labels[dim] is not None:
                return None
            return _Held(parts[0].labels, np.concatenate([p.terms for p in parts], dim), any(p.made for p in parts))
        if name == "pad":
            low, high = node.attrs["low"], node.attrs["high"]
            apart = all(x is None or l == h == 0 for x, l, h in zip(parts[0].labels, low, high, strict=True))
            if not apart or not all(isinstance(n, int) and n >= 0 for n in (*low, *high)):
                return None
            padded = np.pad(parts[0].terms, list(zip(low, high, strict=True)), constant_values=_UNKNOWN)
            return _Held(parts[0].labels, padded, parts[0].made)
        return None

    def _arithmetic(self, op: str, x: _Held, y: _Held) -> _Held | None:
        if len(x.labels) != len(y.labels):
            return None
        labels = []
        for d, (p, q) in enumerate(zip(x.labels, y.labels, strict=True)):
            if p != q and not (p is None and x.terms.shape[d] == 1) and not (q is None and y.terms.shape[d] == 1):
                return None
            labels.append(q if p is None else p)
        try:
            left, right = np.broadcast_arrays(x.terms, y.terms)
        except ValueError:
            return None
        terms = [self._joined(op, p, q) for p, q in zip(left.ravel(), right.ravel(), strict=True)]
        return _Held(tuple(labels), np.array(terms).reshape(left.shape), True)

    # Each gives labels and terms after a view.

    def _slice(self, node: Node, labels: tuple[int | None, ...], terms: np.ndarray) -> tuple | None:
        dim = node.attrs["dim"] % len(labels)
        start, size, step = node.attrs["start"], node.attrs["size"], node.attrs.get("step", 1)
        if labels[dim] is not None or not all(isinstance(n, int) for n in (start, size, step)):
            return None
        return labels, terms.take(range(start, start + size * step, step), dim)

    def _flip(self, node: Node, labels: tuple[int | None, ...], terms: np.ndarray) -> tuple | None:
        dims = tuple(d % len(labels) for d in node.attrs["dims"])
        return None if any(labels[d] is not None for d in dims) else (labels, np.flip(terms, dims))

    def _permute(self, node: Node, labels: tuple[int | None, ...], terms: np.ndarray) -> tuple | None:
        dims = [d % len(labels) for d in node.attrs["dims"]]
        return tuple(labels[d] for d in dims), terms.transpose(dims)

    def _expand(self, node: Node, labels: tuple[int | None, ...], terms: np.ndarray) -> tuple | None:
        more = node.type.rank - len(labels)
        old = (*(1 for _ in range(more)), *node.operands[0].shape)
        if any(m != n for m, n in zip(old, node.type.shape, strict=True)):
            return None  # what is repeated has no place of its own
        return (*(None for _ in range(more)), *labels), terms.reshape((1,) * more + terms.shape)

    def _reshape(self, node: Node, labels: tuple[int | None, ...], terms: np.ndarray) -> tuple | None:
        """Labelled dimensions must stay as they are; dimensions of size one come and go."""
        if not all(isinstance(n, int) for n in node.type.shape):
            return None
        old = [(n, x) for n, x in zip(node.operands[0].shape, labels, strict=True) if n != 1]
        new_labels: list[int | None] = []
        i = 0
        wanted, have, held = 1, 1, None  # of the dims of one group
        for n in node.type.shape:
            if n == 1:
                new_labels.append(None)
                continue
            wanted *= n
            held = None
            while have < wanted and i < len(old):
                size, label = old[i]
                if label is not None and (have != 1 or wanted != size):
                    return None
                have, held, i = have * size, label, i + 1
            if have == wanted:
                wanted = have = 1
            elif held is not None:
                return None
            new_labels.append(held)
        shape = [1 if x is not None else n for n, x in zip(node.type.shape, new_labels, strict=True)]
        return tuple(new_labels), terms.reshape(shape)


def _replace(graph: Graph, trees: Sequence[_Tree]) -> Graph:
    builder = Builder(graph.inputs)
    new: dict[Value, Value] = {v: v for i in graph.inputs for v in i.outs}
    owner = {v: tree for tree in trees for v in tree.results}
    scans: dict[_Tree, Value] = {}
    for old in graph.nodes:
        tree = owner.get(old.out) if old.types else None
        if tree is not None:
            builder.loc = old.loc
            if tree not in scans:
                scans[tree] = _scan(builder, tree, new)
            new[old.out] = _steps_of(builder, tree, scans[tree], old.out)
            continue
        args = map_values(old.args, new.__getitem__)
        node = builder.append(old if args == old.args else old.replace(args=args))
        new.update(zip(old.outs, node.outs, strict=True))
    return builder.finish(
        map_values(graph.outputs, new.__getitem__), tuple((i, new[v]) for i, v in graph.effects), graph.name
    ).live()


def _scan(builder: Builder, tree: _Tree, new: dict[Value, Value]) -> Value:
    """The recurrence, laid out in memory as the first value that it is all steps of."""
    a, b = new[tree.a], new[tree.b]
    if a.shape != b.shape:
        a = builder.add(OPS["expand"], a, shape=b.shape)
    whole = next(v for v, (_, count, _) in tree.results.items() if count == b.shape[tree.dim])
    held = tree.held[whole]
    place = {tree.dim if x is None else x: d for d, x in enumerate(held.labels) if whole.shape[d] != 1}
    strides: list[int] = []
    for d in reversed(range(b.type.rank)):
        after = [s * n for s, n in zip(strides, b.shape[:d:-1], strict=True)]
        strides.append(whole.type.strides[place[d]] if d in place else max(after, default=1))
    t = TensorType(b.shape, b.dtype, tuple(reversed(strides)), b.type.device)
    return builder.node(OPS["linear_scan"], a, b, types=(t,), dim=tree.dim).out


def _steps_of(builder: Builder, tree: _Tree, scan: Value, v: Value) -> Value:
    """The view of the recurrence that a value is."""
    dim = tree.dim
    start, count, step = tree.results[v]
    if (start, count, step) != (0, scan.shape[dim], 1):
        scan = builder.add(OPS["slice"], scan, dim=dim, start=start, size=count, step=step)
    labels = tree.held[v].labels
    order = [dim if x is None else x for d, x in enumerate(labels) if v.shape[d] != 1]
    if order != sorted(order):
        order += [d for d in range(scan.type.rank) if d not in order]
        scan = builder.add(OPS["permute"], scan, dims=tuple(order))
    return builder.add(OPS["reshape"], scan, shape=v.shape) if scan.shape != v.shape else scan
