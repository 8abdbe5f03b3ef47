"""A sharding plan as a file: versioned JSON, data only, checked against a published schema when it is read.

    plan = read_plan("plan.json")             # refuses what is damaged, hostile or contradicts itself
    plan.check_model(parameters, world=8)     # refuses another model or another number of devices

The schema is ``tessel/sharding/plan_schema.json``. Nothing in a plan is ever run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

from ..errors import TesselError, check, did_you_mean
from ..ir.sharding import Sharding
from ..solve.pipeline import stage_of

__all__ = ["VERSION", "ShardingPlan", "fingerprint_of", "parse_plan", "read_plan", "schema"]

VERSION = 2  # 2 says how collectives are called; plans of version 1 call them one by one

_MOST_BYTES = 2**28
_DEEPEST = 16
_TYPES: Mapping[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float),
    "integer": int,
}  # fmt: skip


@cache
def schema() -> dict[str, Any]:
    """The published JSON Schema of a plan."""
    return json.loads((files("tessel") / "sharding/plan_schema.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def fingerprint_of(parameters: Iterable[tuple[str, Sequence[int], str]], structure: str = "") -> str:
    """A digest of a model: names, shapes and dtypes of its parameters, and the structure of its graph.

    >>> fingerprint_of([("w", (2, 3), "f32")])[:12] == fingerprint_of([("w", (2, 3), "f32")])[:12]
    True
    """
    lines = sorted(f"{name} {dtype}{list(shape)}" for name, shape, dtype in parameters)
    return hashlib.sha256("\n".join([*lines, structure]).encode()).hexdigest()


@dataclass(frozen=True)
class ShardingPlan:
    """A checked plan; ``data`` is what the file holds, see the schema."""

    data: Mapping[str, Any]

    @property
    def mesh(self) -> dict[str, int]:
        """Axis to size, outermost first."""
        return {a["name"]: a["size"] for a in self.data["mesh"]["axes"]}

    @property
    def world(self) -> int:
        return int(self.data["mesh"]["world"])

    @property
    def step_seconds(self) -> float:
        return float(self.data["time"]["step"])

    def sharding(self, tensor: str) -> Sharding:
        """How a device holds a parameter or an input.

        Raises:
            TesselError: the plan has no such tensor; the nearest name is given.
        """
        tensors = self.data["tensors"]
        check(tensor in tensors, lambda: f"the plan has no tensor {tensor!r}; {did_you_mean(tensor, tensors)[:300]}")
        return Sharding.parse(tensors[tensor]["sharding"])

    def check_model(
        self, parameters: Sequence[tuple[str, Sequence[int], str]] | None = None, world: int | None = None
    ) -> None:
        """Refuse another model, or another number of devices.

        Args:
            parameters: of the model: name, shape and dtype (``f32``) of each.

        Raises:
            TesselError: both numbers are named; of a model the first parameter that differs, as either has it.
        """
        if world is not None and world != self.world:
            raise TesselError(
                f"the plan is for {self.world} devices ({self._mesh_text()}), this run has {world}; make a plan for "
                f"{world}, or start {self.world} processes"
            )
        if parameters is not None and fingerprint_of(parameters) != self.data["model"]["fingerprint"]:
            raise TesselError(
                f"the plan is for {self.data['model']['name']}, this model is another: {self._other(parameters)}; give "
                "the model as it was planned, or make the plan again"
            )

    def _other(self, parameters: Sequence[tuple[str, Sequence[int], str]]) -> str:
        """The first parameter that a model has otherwise than the plan, in words."""
        tensors = self.data["tensors"]
        for name, shape, dtype in parameters:
            t = tensors.get(name)
            if t is not None and (t["shape"], t["dtype"]) != (list(shape), dtype):
                return f"{name} is {t['dtype']}{t['shape']} in the plan and {dtype}{list(shape)} in the model"
        own = {name for name, _, _ in parameters}
        lost = next((f"{n} is in the plan and not in the model" for n in tensors if n not in own), None)
        more = next((f"{n} is in the model and not in the plan" for n, _, _ in parameters if n not in tensors), None)
        return lost or more or "it has other parameters that it does not use"

    def _mesh_text(self) -> str:
        return ",".join(f"{a}={n}" for a, n in self.mesh.items())

    def text(self) -> str:
        """The file's text."""
        return json.dumps(self.data, indent=1, ensure_ascii=False) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the file.

        Raises:
            TesselError: it cannot be written.
        """
        try:
            Path(path).write_text(self.text(), encoding="utf-8")
        except OSError as e:
            raise TesselError(f"plan {str(path)!r}: cannot write: {e.strerror}") from e


def read_plan(path: str | Path) -> ShardingPlan:
    """The plan in a file.

    Raises:
        TesselError: it cannot be read, is no plan, of another version, damaged, or contradicts itself.
    """
    where = Path(path)
    try:
        size = where.stat().st_size
        check(size <= _MOST_BYTES, lambda: f"plan {str(path)!r}: {size} bytes, more than {_MOST_BYTES}")
        text = where.read_text(encoding="utf-8")
    except OSError as e:
        raise TesselError(f"plan {str(path)!r}: cannot read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise TesselError(f"plan {str(path)!r}: no text: {e.reason} at byte {e.start}") from e
    try:
        return parse_plan(text)
    except TesselError as e:
        raise TesselError(f"plan {str(path)!r}: {e}") from e


def parse_plan(text: str) -> ShardingPlan:
    """The plan in a text.

    Raises:
        TesselError: as ``read_plan``.
    """
    _check_depth(text)
    try:
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_twice, parse_int=_number)
    except TesselError:
        raise
    except (ValueError, RecursionError) as e:
        raise TesselError(f"no JSON: {e}. Is the file cut off?") from e
    check(isinstance(data, dict), lambda: f"a plan is an object, this is a {type(data).__name__}")
    check(data.get("format") == "tessel-plan", lambda: f"no plan of Tessel: format is {str(data.get('format'))[:50]!r}")
    version = data.get("version")
    if version not in range(1, VERSION + 1) or isinstance(version, bool):
        raise TesselError(f"version {str(version)[:20]} of the format; this Tessel reads versions 1 to {VERSION}")
    wrong = mismatch(data, schema())
    check(wrong is None, lambda: str(wrong))
    plan = ShardingPlan(data)
    _check_consistent(plan)
    return plan


def _check_depth(text: str) -> None:
    """Brackets nested deeper than any plan's never reach the parser."""
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text):
        c = match.group()
        depth += 1 if c in "[{" else -1 if c in "]}" else 0
        check(depth <= _DEEPEST, lambda: f"nested deeper than {_DEEPEST}: no plan is")


def _no_constant(word: str) -> Any:
    raise TesselError(f"{word} is no number of a plan")


def _number(digits: str) -> int:
    check(len(digits) <= 20, lambda: f"a number of {len(digits)} digits")
    return int(digits)


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise TesselError(f"{twice[:100]!r} stands twice in one object")
    return found


def mismatch(value: Any, rule: Mapping[str, Any], where: str = "plan") -> str | None:
    """The first thing about a value that a JSON Schema (the part of it that ours uses) does not allow, in words."""
    if "const" in rule:
        return None if value == rule["const"] else f"{where}: expected {rule['const']!r}, got {_short(value)}"
    if "enum" in rule and value not in rule["enum"]:
        return f"{where}: expected one of {', '.join(map(str, rule['enum']))}, got {_short(value)}"
    if "type" in rule:
        names = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
        if not any(_is(value, name) for name in names):
            return f"{where}: expected {' or '.join(names)}, got {_short(value)}"
    if isinstance(value, str):
        if len(value) > rule.get("maxLength", 10**9):
            return f"{where}: a text of {len(value)} characters"
        if "pattern" in rule and not re.search(rule["pattern"], value):
            return f"{where}: {_short(value)} does not match {rule['pattern']}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value) or not rule.get("minimum", -math.inf) <= value <= rule.get("maximum", math.inf):
            return f"{where}: {_short(value)} is not from {rule.get('minimum')} to {rule.get('maximum')}"
    elif isinstance(value, list):
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", 10**9):
            return f"{where}: {len(value)} items"
        for i, item in enumerate(value):
            found = mismatch(item, rule.get("items", {}), f"{where}[{i}]")
            if found:
                return found
    elif isinstance(value, dict):
        return _object_mismatch(value, rule, where)
    return None


def _object_mismatch(value: Mapping[str, Any], rule: Mapping[str, Any], where: str) -> str | None:
    known, rest = rule.get("properties", {}), rule.get("additionalProperties", True)
    missing = [n for n in rule.get("required", ()) if n not in value]
    if missing:
        return f"{where}: {missing[0]} is missing"
    if len(value) > rule.get("maxProperties", 10**9):
        return f"{where}: {len(value)} entries"
    for name, item in value.items():
        if name in known:
            found = mismatch(item, known[name], f"{where}.{name}")
        elif rest is False:
            return f"{where}: unknown name {name[:100]!r}; {did_you_mean(name, known)}"
        else:
            found = mismatch(item, rest, f"{where}.{name[:100]}") if isinstance(rest, dict) else None
        if found:
            return found
    return None


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


# ---------------------------------------------------------------- consistency


def _check_consistent(plan: ShardingPlan) -> None:
    """What the schema cannot say: the parts of the plan agree with each other."""
    mesh, data = plan.mesh, plan.data
    check(len(mesh) == len(data["mesh"]["axes"]), lambda: f"mesh: an axis is named twice in {plan._mesh_text()}")
    devices = prod(mesh.values())
    check(devices == plan.world, lambda: f"mesh {plan._mesh_text()} has {devices} devices, world says {plan.world}")
    for name, t in data["tensors"].items():
        for what in ("sharding", "use", "state"):
            if what in t:
                Sharding.parse(t[what]).check(t["shape"], mesh, f"{name} ({what})")
        _known_axes(t.get("level", {}), mesh, name)
    for name, t in data.get("inputs", {}).items():
        Sharding.parse(t["sharding"]).check(t["shape"], mesh, name)
    if "program" in data:
        check("inputs" in data and "aliases" in data, lambda: "a plan with a program has inputs and aliases")
        sent = sum(c["bytes"] * c.get("times", 1) for c in data["program"]["collectives"])
        said = data["program"]["bytes"]
        check(sent == said, lambda: f"program: the collectives add up to {sent} bytes, bytes says {said}")
        for c in data["program"]["collectives"]:
            _known_axes(c["axes"], mesh, f"{c['kind']} of {c['tensor']}")
        _check_calls(data["program"]["collectives"])
    names = set()
    for node in data["nodes"]:
        check(node["name"] not in names, lambda n=node: f"node {n['name']!r} stands twice")  # type: ignore[misc]
        names.add(node["name"])
        _known_axes(node["splits"], mesh, node["name"])
        for text in (*node["reads"], *node["makes"], *node.get("holds", ())):
            if text is not None:
                layout = Sharding.parse(text.partition(" ")[0])
                _known_axes([*layout.axes, *(a for a, _ in layout.partial)], mesh, node["name"])
    for c in data["collectives"]:
        _known_axes([c["axis"]], mesh, f"{c['kind']} of {c['tensor']}")
    _check_sums(data)
    if "pipeline" in data:
        _check_pipeline(data, mesh)


def _check_calls(rows: Sequence[Mapping[str, Any]]) -> None:
    """A call carries collectives of one kind and group that follow each other; its number is the place of the first."""
    of: dict[str, list[Mapping[str, Any]]] = {}
    for c in rows:
        own = of.setdefault(c["phase"], [])
        i, call = len(own), c.get("call", len(own))
        same = call == i or (
            i > 0 and own[-1].get("call", i - 1) == call
            and all(own[-1].get(k) == c.get(k) for k in ("kind", "axes", "beside"))
        )  # fmt: skip
        if not same:
            raise TesselError(f"program: {c['kind']} {i} of the {c['phase']} is no part of call {call}")
        own.append(c)


def _check_pipeline(data: Mapping[str, Any], mesh: Mapping[str, int]) -> None:
    """The parts of a pipeline: as many as the stages hold, where the schedule puts them, meeting end to end."""
    p = data["pipeline"]
    _known_axes([p["axis"]], mesh, "pipeline")
    n, parts = mesh[p["axis"]], p["parts"]
    want = n * p["chunks"]
    check(len(p["stages"]) == n, lambda: f"pipeline: {len(p['stages'])} stages, the mesh has {n}")
    check(
        len(parts) == want,
        lambda: f"pipeline: {len(parts)} parts, {n} stages of {p['chunks']} chunks hold {want}",
    )
    for i, part in enumerate(parts):
        stage = stage_of(p["schedule"], i, n)
        if part["stage"] != stage:
            raise TesselError(f"pipeline: {p['schedule']} has part {i} on stage {stage}, not {part['stage']}")
    at = [node.get("part", -1) for node in data["nodes"]]
    check(at == sorted(at), lambda: "pipeline: nodes are not in the order of the parts")
    check(sorted(set(at)) == list(range(want)), lambda: f"pipeline: not every part from 0 to {want - 1} has nodes")
    owners = [(name, t.get("parts", [])) for name, t in data["tensors"].items()]
    for name, own in [*owners, *((c["tensor"], [c.get("part", 0)]) for c in data["collectives"])]:
        check(all(0 <= i < want for i in own), lambda n=name: f"pipeline: {n} is in a part that is none")  # type: ignore[misc]
    sends = [s["from"] for s in p["sends"]]
    check(sends == list(range(want - 1)), lambda: f"pipeline: {len(sends)} tensors are handed on between {want} parts")


def _known_axes(axes: Iterable[str], mesh: Mapping[str, int], where: str) -> None:
    for axis in axes:
        check(axis in mesh, lambda a=axis: f"{where}: {a!r} is no axis of the mesh ({', '.join(mesh)})")  # type: ignore[misc]


def _check_sums(data: Mapping[str, Any]) -> None:
    memory, times, proof = data["memory"], data["time"], data["certificate"]
    parts = sum(v for k, v in memory.items() if k != "total")
    same = math.isclose(parts, memory["total"], rel_tol=1e-6, abs_tol=16)
    check(same, lambda: f"memory: the kinds add up to {parts:.0f} bytes, total says {memory['total']:.0f}")
    parts = sum(times.get(k, 0.0) for k in ("forward", "backward", "again", "exposed", "bubble"))
    same = math.isclose(parts, times["step"], rel_tol=1e-6, abs_tol=1e-9)
    check(same, lambda: f"time: the terms add up to {parts:.6g} s, step says {times['step']:.6g}")
    step = times["step"]
    below = proof["bound"] <= step * (1 + 1e-6)
    check(below, lambda: f"certificate: the bound {proof['bound']:.6g} s is above the step's {step:.6g} s")
