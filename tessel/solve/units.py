"""A graph as the sharding search sees it: units of work, the tensors between them, and where it repeats.

Views (reshape, permute, expand) are no units: a mesh axis that splits a dimension behind a view splits a part of a
dimension before it, an ``Atom``. What no parameter flows into (masks, positions, token ids) is the same on every
device before it is cut, so it costs nothing to have any part of it.

The units in order are cut wherever a single tensor is alive: at the residual stream of a transformer. Stretches
between cuts that are equal up to names get the same ``signature`` and are solved once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from ..errors import TesselError
from ..ir.node import Graph, Node, Value
from ..ir.types import TensorType
from ..ops.dims import Dims, Shape, dims_of, factor_sizes
from .comm import Atom

__all__ = ["Param", "Place", "Segment", "Tensor", "Unit", "Use", "place_of", "segments_of", "units_of", "view_back"]

VIEWS = frozenset({"reshape", "permute", "expand"})
Place = tuple[int, int]  # a dimension and how many elements lie outside of the part: Atom without its size


@dataclass(eq=False)
class Param:
    """A parameter: its name, type, the units that use it, and the dimension that the user wants kept apart."""

    name: str
    type: TensorType
    users: list[Unit] = field(default_factory=list)
    apart: int | None = None


@dataclass(eq=False)
class Tensor:
    """A value that parameters flow into.

    Attributes:
        name: as in the graph's text, ``%5``.
        atoms: the parts of dimensions that axes may split.
        roles: which parts are the model's ``batch`` or ``sequence``.
        unit: its producer.
        users: who reads it, and as which operand.
        leaves: whether it is a result of the graph.
        cut: whether segments meet at it.
    """

    name: str
    type: TensorType
    unit: Unit
    atoms: tuple[Atom, ...] = ()
    roles: dict[Place, str] = field(default_factory=dict)
    users: list[tuple[Unit, int]] = field(default_factory=list)
    leaves: bool = False
    cut: bool = False

    @property
    def nbytes(self) -> int:
        return int(self.type.nbytes)


@dataclass(frozen=True)
class Use:
    """An operand: what it is before ``views``; ``source`` is None for what no parameter flows into.

    ``roles`` are those of an input of the graph, by its dimensions, whatever its views are; ``name`` that of what no
    parameter flows into.
    """

    source: Tensor | Param | None
    views: tuple[Node, ...]
    type: TensorType
    roles: tuple[tuple[int, str], ...] = ()
    name: str = ""


@dataclass(eq=False)
class Unit:
    """A node that computes.

    Attributes:
        sizes: of the factors of its dims string.
        majors: the parts of each factor that may be split.
        roles: which of these parts are the model's ``batch`` or ``sequence``.
    """

    name: str
    node: Node
    dims: Dims
    sizes: dict[str, int]
    uses: tuple[Use, ...]
    results: tuple[Tensor, ...] = ()
    majors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def op(self) -> str:
        return self.node.op.name


def units_of(graph: Graph, names: dict[Value, str]) -> tuple[list[Unit], list[Param], list[tuple[str, TensorType]]]:
    """Units in order, parameters, and the values that no parameter flows into (name and type).

    Raises:
        TesselError: a size is not known.
    """
    known: dict[Value, Use] = {}
    units: list[Unit] = []
    params: list[Param] = []
    constants: list[tuple[str, TensorType]] = []
    for node in graph.inputs:
        if not isinstance(node.types[0], TensorType):
            raise TesselError(
                f"{node.attrs['name']}: a plan needs sizes that are numbers; capture without dynamic ones"
            )
        if node.attrs["role"] == "param" and node.type.dtype.is_floating_point:
            params.append(Param(node.attrs["name"], node.type))
            known[node.out] = Use(params[-1], (), node.type)
        else:
            roles = _input_roles(node.type) if node.attrs["role"] == "input" else ()
            known[node.out] = Use(None, (), node.type, roles, node.attrs["name"])
            constants.append((node.attrs["name"], node.type))
    leaving = set(graph.results())
    for node in graph.nodes:
        operands = [v for v in node.operands if isinstance(v.type, TensorType)]
        uses = tuple(replace(known[v], type=v.type) for v in operands)
        if len(uses) == 1 and uses[0].roles and (node.op.name in VIEWS or _keeps_places(node)):
            views = (*uses[0].views, node) if node.op.name in VIEWS else uses[0].views
            known[node.out] = replace(uses[0], views=views, type=node.type)
            continue
        if all(u.source is None for u in uses) or node.op.kind == "effect":
            for v in node.outs:
                if isinstance(v.type, TensorType):
                    known[v] = Use(None, (), v.type, (), names[v])
                    constants.append((names[v], v.type))
            continue
        if node.op.name in VIEWS:
            known[node.out] = Use(uses[0].source, (*uses[0].views, node), node.type)
            source = uses[0].source
            if node.out in leaving and isinstance(source, Tensor):
                source.leaves = True
            continue
        dims = dims_of(node)
        sizes = factor_sizes(node, dims)
        if not all(isinstance(n, int) for n in sizes.values()):
            raise TesselError(f"{names[node.out]} ({node.op.name}): a plan needs sizes that are numbers, got {sizes}")
        unit = Unit(names[node.out], node, dims, sizes, uses)  # type: ignore[arg-type]
        unit.majors, unit.roles = _majors(unit)
        outs = [v for v in node.outs if isinstance(v.type, TensorType)]
        unit.results = tuple(
            Tensor(names[v], v.type, unit, _atoms(shape, unit, v.type), _roles(shape, unit), leaves=v in leaving)
            for v, shape in zip(outs, dims.results, strict=True)
        )
        for i, use in enumerate(uses):
            if isinstance(use.source, Tensor):
                use.source.users.append((unit, i))
            elif use.source is not None and unit not in use.source.users:
                use.source.users.append(unit)
        known.update((v, Use(t, (), t.type)) for v, t in zip(outs, unit.results, strict=True))
        units.append(unit)
    return units, params, constants


# ---------------------------------------------------------------- parts of dimensions


def place_of(shape: Shape, name: str, sizes: dict[str, int]) -> Place | None:
    """Where a factor lies in a tensor: the dimension, and how many elements of it lie outside."""
    for d, term in enumerate(shape):
        outside = 1
        for factor in term:
            if factor.name == name:
                return d, outside
            outside *= sizes[factor.name]
    return None


def _factor_at(shape: Shape, place: Place, sizes: dict[str, int], whole: bool = False) -> tuple[str, int] | None:
    """The factor that a part of a dimension falls in, and its part of the factor.

    ``whole``: also one that cannot be split as it is (tokens of linear attention, whose states are gathered).
    """
    d, major = place
    outside = 1
    for factor in shape[d]:
        size = sizes[factor.name]
        if outside <= major < outside * size and major % outside == 0 and size % (major // outside) == 0:
            return (factor.name, major // outside) if whole or factor.kind != "whole" else None
        outside *= size
    return None


def _through(node: Node, place: Place, forward: bool) -> tuple[Place | None, int]:
    """A part of a view's operand in its result, or the other way, and how often it may be split.

    ``(None, n)`` with n > 0: a repeated dimension, which the operand has not; ``(None, 0)``: no part corresponds.
    """
    dims = dims_of(node)
    sizes: dict[str, int] = factor_sizes(node, dims)  # type: ignore[assignment]
    source, to = (dims.operands[0], dims.results[0]) if forward else (dims.results[0], dims.operands[0])
    found = _factor_at(source, place, sizes)
    if found is None:
        return None, 0
    name, inner = found
    at = place_of(to, name, sizes)
    return (None if at is None else (at[0], at[1] * inner)), sizes[name] // inner


def view_back(views: Sequence[Node], place: Place, pieces: int) -> Place | bool | None:
    """The part of the source that ``pieces`` of a part behind views are pieces of.

    True for a repeated dimension (every piece reads all of the source), None where the views are in the way.
    """
    for node in reversed(views):
        found, size = _through(node, place, forward=False)
        if size % pieces or size == 0:
            return None
        if found is None:
            return True
        place = found
    return place


def _input_roles(type_: TensorType) -> tuple[tuple[int, str], ...]:
    """An input's first dimension is the batch, the second of token ids the sequence."""
    names = ("batch", "sequence") if not type_.dtype.is_floating_point else ("batch",)
    return tuple(enumerate(names))[: type_.rank]


def _keeps_places(node: Node) -> bool:
    """Whether a node makes a number of each number of its one operand, as casts and scales of an input do."""
    x = node.operands[0].type
    floats = x.dtype.is_floating_point and node.type.dtype.is_floating_point
    return node.op.kind == "pointwise" and floats and node.type.shape == x.shape


def _majors(unit: Unit) -> tuple[dict[str, tuple[int, ...]], dict[tuple[str, int], str]]:
    """For each factor the parts that its operands' atoms say: 1, and those a flattened dimension keeps; their roles."""
    out: dict[str, set[int]] = {f: {1} for f in unit.dims.factors}
    roles: dict[tuple[str, int], str] = {}
    for use, shape in zip(unit.uses, unit.dims.operands, strict=True):
        known: dict[Place, str] = {(d, 1): role for d, role in use.roles}
        first = use.views[0].args[0].type if use.views else use.type
        places: list[Place] = [(d, 1) for d in range(first.rank)]
        if isinstance(use.source, Tensor):
            known, places = use.source.roles, [(a.dim, a.major) for a in use.source.atoms]
        for place in places:
            here: Place | None = place
            for node in use.views:
                here = _through(node, here, forward=True)[0] if here else None
            found = _factor_at(shape, here, unit.sizes, unit.op == "linear_attention") if here else None
            if found:
                out[found[0]].add(found[1])
                if place in known:
                    roles[found] = known[place]
    return {name: tuple(sorted(parts)) for name, parts in out.items()}, roles


def _roles(shape: Shape, unit: Unit) -> dict[Place, str]:
    out = {}
    for (factor, major), role in unit.roles.items():
        at = place_of(shape, factor, unit.sizes)
        if at is not None:
            out[at[0], at[1] * major] = role
    return out


def _atoms(shape: Shape, unit: Unit, type_: TensorType) -> tuple[Atom, ...]:
    """The parts of a result's dimensions, each as long as up to the next one."""
    out = []
    for d, (term, n) in enumerate(zip(shape, type_.shape, strict=True)):
        outside, places = 1, []
        for factor in term:
            places += [outside * m for m in unit.majors[factor.name]]
            outside *= unit.sizes[factor.name]
        ends = [*sorted(places)[1:], int(n)]  # type: ignore[arg-type]
        out += [Atom(d, a, b // a) for a, b in zip(sorted(places), ends) if b // a > 1]
    return tuple(out)


# ---------------------------------------------------------------- repetition


@dataclass(eq=False)
class Segment:
    """Units between two places where one tensor (or none) is alive.

    Attributes:
        before, after: these tensors.
        signature: equal for segments that differ only in names.
    """

    units: list[Unit]
    before: Tensor | None
    after: Tensor | None
    signature: str


def segments_of(units: Sequence[Unit]) -> list[Segment]:
    """The units in order, cut where at most one tensor is alive."""
    place = {u: i for i, u in enumerate(units)}
    last = {t: max((place[u] for u, _ in t.users), default=-1) for u in units for t in u.results}
    out: list[Segment] = []
    start, before = 0, None
    alive: set[Tensor] = set()
    for i, unit in enumerate(units):
        alive |= {t for t in unit.results if last[t] > i}
        alive = {t for t in alive if last[t] > i}
        if len(alive) <= 1:
            after = next(iter(alive), None)
            if after is not None:
                after.cut = True
            own = list(units[start : i + 1])
            out.append(Segment(own, before, after, _signature(own, before, after)))
            start, before = i + 1, after
    return out


def _signature(units: Sequence[Unit], before: Tensor | None, after: Tensor | None) -> str:
    """Operators, dims, attributes and types in order, who reads whom by number; parameters by type."""
    number: dict[object, str] = {} if before is None else {before: "in"}
    lines = [] if before is None else [f"in {before.type} {before.atoms} {before.roles}"]
    for unit in units:
        words = []
        for use in unit.uses:
            if isinstance(use.source, Param):
                shared = "" if len(use.source.users) == 1 else f" {use.source.name}"
                what = number.setdefault(use.source, f"w{len(number)}{use.source.type}{shared}")
            else:
                what = f"const{use.roles}" if use.source is None else number[use.source]
            views = "".join(f".{n.op.name}{dict(n.attrs)}" for n in use.views)
            words.append(f"{what}{views}:{use.type}")
        for t in unit.results:
            number[t] = f"t{len(number)}"
            words.append(f"->{t.type} {t.leaves} {t is after or len(t.users)}")
        lines.append(f"{unit.op} {unit.dims} {dict(unit.node.attrs)} {' '.join(words)}")
    return "\n".join(lines)


def repeats(signatures: Sequence[object]) -> tuple[int, int, int]:
    """The longest repeated stretch: ``(start, length, times)``; ``(0, len, 1)`` if nothing repeats.

    >>> repeats("eabababn")
    (1, 2, 3)
    """
    best = (0, len(signatures), 1)
    for length in range(1, len(signatures) // 2 + 1):
        for start in range(len(signatures) - 2 * length + 1):
            unit = signatures[start : start + length]
            times = 1
            while signatures[start + times * length : start + (times + 1) * length] == unit:
                times += 1
            if times > 1 and length * (times - 1) > best[1] * (best[2] - 1):
                best = (start, length, times)
    return best


def numel(type_: TensorType) -> int:
    """Elements of a tensor of known sizes."""
    return prod(int(n) for n in type_.shape)  # type: ignore[arg-type]
