"""The loops of a C++ kernel: a tile program's axes split, merged and ordered so that addresses are affine.

x0 over 4, x1 over 8, both contiguous      becomes   one loop x over 32
x over 64, read at x // 8 and x % 8        becomes   two loops x over 8 and 8
x0 over 8, x1 over 4, memory lies x1, x0   becomes   the loops x1, x0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...ir.types import Dim, simplify_dim
from ...tiles.index import Atom, Index, exact_div, floordiv, linearize, mod, substitute, var
from ...tiles.kernel import Axis, Kernel, Load, Store
from ..names import used_indices

__all__ = ["Space", "cut", "space_of"]

_SMALL = 8  # a loop this short is no place for vectors where there is another


@dataclass(frozen=True)
class Space:
    """The loops of a kernel.

    Attributes:
        xs: parallel loops, outermost first.
        rs: reduced loops, outermost first.
        place: each axis of the tile program as an index over the loops.
        across: in a reduction, vectors lie along the last parallel loop, not along the last reduced one.
        turned: some memory lies along the last but one loop of a pointwise kernel, so that the last two are
            best walked in squares.
    """

    xs: tuple[Axis, ...]
    rs: tuple[Axis, ...]
    place: dict[str, Index]
    across: bool = False
    turned: bool = False

    def at(self, index: Index) -> Index:
        """An index of the tile program over the loops."""
        return substitute(index, lambda a: self.place.get(a.name) if a.kind == "var" else None)


def space_of(kernel: Kernel) -> Space:
    """The loops of a pointwise or reduction kernel."""
    place = {a.name: var(a.name, a.extent) for a in kernel.axes}
    indices = list(dict.fromkeys(i for s in kernel.body for i in used_indices(kernel, s) if i.terms))
    groups = {kind: [a for a in kernel.axes if a.kind == kind and a.extent != 1] for kind in "xr"}
    for kind in "xr":
        groups[kind], place, indices = _split(groups[kind], place, indices)
    for kind in "xr":
        groups[kind], place, indices = _merge(groups[kind], place, indices)
    space = Space(tuple(groups["x"]), tuple(groups["r"]), place)
    votes = _votes(kernel, space)
    xs, rs = (_ordered(groups[kind], votes) for kind in "xr")
    # Changing the order may bring together what lies together in memory.
    for kind, axes in (("x", xs), ("r", rs)):
        groups[kind], place, indices = _merge(axes, place, indices)
    space = Space(tuple(groups["x"]), tuple(groups["r"]), place)
    votes = _votes(kernel, space)
    across = bool(space.rs) and bool(space.xs) and _lies_across(space, votes)
    if kernel.family == "pointwise" and (turned := _turned(kernel, space)) is not None:
        kept = [a for a in space.xs if a is not turned]
        return Space((*kept[:-1], turned, kept[-1]), (), place, turned=True)
    return Space(space.xs, space.rs, place, across)


def cut(axis: Axis, indices: Sequence[Index]) -> tuple[list[Axis], Index]:
    """An axis as loops, cut where indices divide it, and its place as an index over them."""
    axes, place, _ = _split([axis], {axis.name: var(axis.name, axis.extent)}, list(indices))
    return axes, place[axis.name]


def _pieces(indices: Iterable[Index]) -> int:
    """How many divisions and remainders there are."""
    return sum(1 for i in indices for a in i.atoms() if a.arg is not None)


def _replaced(indices: Iterable[Index], new: dict[str, Index]) -> list[Index]:
    return [substitute(i, lambda a: new.get(a.name) if a.kind == "var" else None) for i in indices]


def _place(place: dict[str, Index], new: dict[str, Index]) -> dict[str, Index]:
    return dict(zip(place, _replaced(place.values(), new), strict=True))


def _split(
    axes: list[Axis], place: dict[str, Index], indices: list[Index]
) -> tuple[list[Axis], dict[str, Index], list[Index]]:
    """Axes cut where addresses divide them."""
    todo = list(axes)
    done: list[Axis] = []
    while todo:
        axis = todo.pop(0)
        cuts = sorted({a.n for i in indices for a in i.atoms() if _divides(a, axis)}, key=str)
        for n in cuts:
            outer = exact_div(axis.extent, n)
            if outer is None or outer == 1:
                continue
            high, low = Axis(f"{axis.name}h", outer, axis.kind), Axis(f"{axis.name}l", n, axis.kind)
            new = {axis.name: linearize((var(high.name, outer), var(low.name, n)), (n, 1))}
            trial = _replaced(indices, new)
            if _pieces(trial) < _pieces(indices):
                indices, place = trial, _place(place, new)
                todo[:0] = [high, low]
                break
        else:
            done.append(axis)
    return done, place, indices


def _divides(atom: Atom, axis: Axis) -> bool:
    """Whether an atom is a division or a remainder of the axis itself."""
    arg = atom.arg
    return (
        arg is not None
        and any(a.kind == "var" and a.name == axis.name for a, _ in arg.terms)
        and (isinstance(atom.n, int) or exact_div(axis.extent, atom.n) is not None)
    )


def _merge(
    axes: Sequence[Axis], place: dict[str, Index], indices: list[Index]
) -> tuple[list[Axis], dict[str, Index], list[Index]]:
    """Neighbours made one loop where that leaves every address affine."""
    kept: list[Axis] = []
    for axis in axes:
        while kept:
            outer = kept[-1]
            whole = Axis(_joint_name(outer, axis), simplify_dim(outer.extent * axis.extent), axis.kind)
            flat = var(whole.name, whole.extent)
            new = {outer.name: floordiv(flat, axis.extent), axis.name: mod(flat, axis.extent)}
            trial = _replaced(indices, new)
            if _pieces(trial) > _pieces(indices):
                break
            indices, place = trial, _place(place, new)
            kept.pop()
            axis = whole
        kept.append(axis)
    return kept, place, indices


def _joint_name(a: Axis, b: Axis) -> str:
    return f"{a.name}_{b.name[1:]}" if len(a.name) + len(b.name) < 16 else f"{a.name}_"


def _votes(kernel: Kernel, space: Space) -> dict[str, int]:
    """How much memory lies along each loop: bytes a point, of accesses with stride 1.

    In a reduction those count most that are made at every r point.
    """
    votes: dict[str, int] = {}
    reduced = {a.name for a in space.rs}
    for s in kernel.body:
        if isinstance(s, Load | Store):
            param = kernel.params[s.access.param]
            index = space.at(s.access.address(param))
            wide = len(index.terms) * (100 if index.variables() & reduced else 1)
            for atom, c in index.terms:
                if atom.kind == "var" and c == 1:
                    weight = param.type.dtype.itemsize * (3 if isinstance(s, Store) else 2)
                    votes[atom.name] = votes.get(atom.name, 0) + weight * wide
    return votes


def _turned(kernel: Kernel, space: Space) -> Axis | None:
    """A loop that some memory lies along, which is far apart along the innermost one; both must be long."""
    if len(space.xs) < 2 or _short(space.xs[-1].extent):
        return None
    lane = space.xs[-1].name
    for s in kernel.body:
        if isinstance(s, Load | Store):
            index = space.at(s.access.address(kernel.params[s.access.param]))
            steps = {a.name: c for a, c in index.terms if a.kind == "var"}
            if steps.get(lane, 1) != 1:
                for axis in space.xs[:-1]:
                    if steps.get(axis.name) == 1 and not _short(axis.extent):
                        return axis
    return None


def _ordered(axes: Sequence[Axis], votes: dict[str, int]) -> list[Axis]:
    """The loop that memory lies along is made the last."""
    if not axes:
        return []

    def worth(item: tuple[int, Axis]) -> tuple[bool, int, int]:
        at, axis = item
        return not _short(axis.extent), votes.get(axis.name, 0), at

    at, _ = max(enumerate(axes), key=worth)
    return [*axes[:at], *axes[at + 1 :], axes[at]]


def _short(extent: Dim) -> bool:
    return isinstance(extent, int) and extent < _SMALL


def _lies_across(space: Space, votes: dict[str, int]) -> bool:
    x, r = space.xs[-1], space.rs[-1]
    if _short(x.extent) or votes.get(x.name, 0) == votes.get(r.name, 0) == 0:
        return False
    if _short(r.extent):  # a vector along it would be mostly empty, whatever memory lies along it
        return votes.get(x.name, 0) > 0
    return votes.get(x.name, 0) > votes.get(r.name, 0)
