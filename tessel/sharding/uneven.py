"""Sizes that do not divide over a mesh: what is left whole for that, in words, and what is refused.

No dimension is padded: a factor whose size an axis does not divide is not split by it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import TesselError
from ..solve.comm import MeshAxis
from ..solve.shard_choice import Setting, role_of
from ..solve.units import Segment, Unit

__all__ = ["left_whole"]

_HEAVY = ("contract", "attention")
_NAMED = {"attention": {"h": "heads", "g": "key heads", "s": "queries", "t": "keys", "b": "rows"},
          "embedding": {"v": "words"}, "linear_cross_entropy": {"v": "classes"}}  # fmt: skip
_MOST = 8


def left_whole(segments: Sequence[Segment], axes: Sequence[MeshAxis], setting: Setting) -> list[str]:
    """What axes do not split because its size does not divide, one line each, at most eight.

    Raises:
        TesselError: an axis is there for the batch or the sequence, and divides it nowhere; both numbers are named.
    """
    units = [u for s in segments for u in s.units]
    found: dict[str, None] = {}
    for axis in axes:
        role = role_of(axis.name) if setting.roles else None
        if role is not None and role.only:
            _check_part(units, axis, role.only)
            if not any(role.only in u.roles.values() for u in units):
                found[_nothing_to_split(axis, role.only)] = None
        for unit in units:
            names = _NAMED.get(unit.op, {})
            if unit.node.op.kind not in _HEAVY and not names:
                continue
            for factor, f in unit.dims.factors.items():
                n = unit.sizes[factor]
                split = f.kind == "map" or (f.kind == "reduce" and unit.op in _NAMED)
                part = unit.roles.get((factor, 1), "")
                if not split or n < axis.size or n % axis.size == 0 or (names and factor not in names):
                    continue
                if role is None or role.allows(unit, part):
                    what = names.get(factor, f"the {factor} of '{unit.dims}'")
                    found[f"{unit.op}: {n} {what} do not divide over {axis.name}={axis.size} and stay whole"] = None
    lines = list(found)
    more = len(lines) - _MOST
    return lines if more <= 0 else [*lines[:_MOST], f"and {more} more that do not divide"]


def _nothing_to_split(axis: MeshAxis, part: str) -> str:
    """What an axis is there for that the model's inputs do not have, and what to do."""
    where = "a first dimension" if part == "batch" else "token ids of two dimensions"
    return (
        f"{axis.name}={axis.size} is there to split the {part}, and no input has one ({where}): it splits little or "
        "nothing. Of what the model makes of its inputs, say what to split (annotate what layers return, and "
        "distribute by the annotations), or let every axis split anything (--free-axes)"
    )


def _check_part(units: Sequence[Unit], axis: MeshAxis, part: str) -> None:
    sizes = set()
    for unit in units:
        for (factor, major), role in unit.roles.items():
            if role == part:
                later = [m for m in unit.majors[factor] if m > major]
                sizes.add((min(later) if later else unit.sizes[factor]) // major)
    if sizes and all(n > 1 and n % axis.size for n in sizes):
        said = ", ".join(map(str, sorted(sizes)))
        better = max(sizes) + -max(sizes) % axis.size
        raise TesselError(
            f"{axis.name}={axis.size} is there to split the {part}, and {said} does not divide by {axis.size}: give a "
            f"{part} of {better} (padded, and masked by the model), or a mesh whose {axis.name} divides {said}"
        )
