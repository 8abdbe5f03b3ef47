"""What annotations ask of the search: layouts that single tensors must have."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ..errors import TesselError, check
from ..ir.node import INPUT, Graph, Node, Value
from ..ir.sharding import Sharding
from ..ir.text import value_names
from ..passes._layouts import Seed
from ..solve.shard_choice import Pins
from ..solve.units import VIEWS, Param, Place, Segment, view_back
from ..targets.mesh import Mesh
from .annotate import Annotations, seeds

__all__ = ["asked_of", "pins_of"]


def pins_of(
    annotations: Annotations, graph: Graph, mesh: Mesh, positions: Mapping[int, int] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Pins:  # fmt: skip
    """What annotations say of a graph that is searched.

    Args:
        positions: see ``annotate.seeds``.
        aliases: other names of parameters that are tied, to the name that the search knows.

    Raises:
        TesselError: an annotation fits nothing or does not fit its tensor or the mesh; its line is named.
    """
    names = value_names(graph) if len(annotations) else {}
    kept: dict[str, Sharding] = {}
    used: dict[str, Sharding] = {}
    inputs: dict[str, Sharding] = {}
    results: dict[str, Mapping[str, Place | None]] = {}
    said: dict[str, str] = {}
    for seed in seeds(annotations, graph, mesh, positions):
        v = seed.value
        for sharding in (seed.sharding, seed.stored or seed.sharding):
            sharding.check(v.shape, mesh, seed.why)
        _in_order(seed, mesh)
        if v.op is not INPUT:
            source, asked = _result(seed, v, mesh)
            name = names[source]
            results[name] = asked
        else:
            name = (aliases or {}).get(str(v.node.attrs["name"]), str(v.node.attrs["name"]))
            if v.node.attrs["role"] == "param":
                kept[name], used[name] = seed.stored or seed.sharding, seed.sharding
            else:
                inputs[name] = seed.sharding
        said[name] = seed.why
    return Pins(kept, used, inputs, results, said)


def _in_order(seed: Seed, mesh: Mesh) -> None:
    """Refuse an order of axes that the search does not have: that of the mesh, what is gathered before use inside."""
    stored = seed.stored or seed.sharding
    for axes, used in zip(stored.dims, seed.sharding.dims, strict=True):
        order = tuple(sorted(axes, key=lambda a: (a not in used, list(mesh).index(a))))
        check(
            order == axes,
            lambda a=axes, o=order: (  # type: ignore[misc]
                f"{seed.why}: a plan splits a dimension in the order of the mesh, by what is gathered last: "
                f"{'.'.join(o)}, not {'.'.join(a)}"
            ),
        )


def _result(seed: Seed, v: Value, mesh: Mesh) -> tuple[Value, dict[str, Place | None]]:
    """The value that a unit makes behind views, and the part of it that each axis is to split."""
    views: list[Node] = []
    source = v
    while source.op.name in VIEWS:
        views.insert(0, source.node)
        source = source.node.operands[0]
    check(source.op is not INPUT, lambda: f"{seed.why}: it only shows an input in another shape; annotate the input")
    asked: dict[str, Place | None] = {} if seed.sharding.open else dict.fromkeys(mesh)
    for d, axes in enumerate(seed.sharding.dims):
        at = view_back(views, (d, 1), prod(mesh[a] for a in axes))
        for axis in axes:
            if at is None or isinstance(at, bool):
                raise TesselError(f"{seed.why}: {axis} would split what {source.node.op.name} has not; annotate before")
            asked[axis] = at
    return source, asked


def asked_of(segment: Segment, pins: Pins) -> str:
    """What is asked of a segment's tensors, by their place in it: a part of its signature."""
    found: list[Any] = []
    if segment.before is not None:
        found.append(pins.results.get(segment.before.name))
    for unit in segment.units:
        for use in unit.uses:
            if isinstance(use.source, Param):
                found.append((pins.kept.get(use.source.name), pins.used.get(use.source.name)))
            else:
                found.append(None if use.source is not None else pins.inputs.get(use.name))
        found += [pins.results.get(t.name) for t in unit.results]
    said = any(x is not None and x != (None, None) for x in found)
    return "\n" + " ".join(map(str, found)) if said else ""
