"""A plan as one HTML page: no scripts, nothing from elsewhere, everything from a user's program escaped.

The template is ``plan.html.j2``; pictures are SVG that it draws from the numbers made here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..solve.pipeline import timeline
from .plan_file import ShardingPlan
from .text import KINDS, TERMS, call_lines, on_stage, slowest_stage
from .words import pattern, size_text, time_text

__all__ = ["plan_page"]

_WIDE = 1000.0  # units of the pictures' coordinates
_MOST_DEVICES = 64
_MOST_ROWS = 40  # collectives in the table
_MOST_SLOTS = 4000  # boxes in a timeline
_HEAVY = ("matmul", "attention", "grouped_mm", "linear_cross_entropy", "embedding")  # named in the graph


def plan_page(plan: ShardingPlan) -> str:
    """The page's text."""
    return _template().render(_view(plan))


@cache
def _template() -> Any:
    text = (files("tessel") / "sharding/plan.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )


def _view(plan: ShardingPlan) -> dict[str, Any]:
    d = plan.data
    s = d["settings"]
    kinds = list(dict.fromkeys([_splits(n) for n in d["nodes"]]))
    colours = {k: i % 8 for i, k in enumerate(sorted(kinds))}
    return {
        "name": d["model"]["name"],
        "parameters": f"{d['model']['parameters'] / 1e9:.3g} billion parameters",
        "what": f"training with {s['optimizer']}, remat {s['remat']}" if s["train"] else "inference",
        "sizes": [f"{w} {s[k]}" for k, w in (("global_batch", "batch"), ("seq", "sequence")) if s[k]],
        "figures": list(_figures(d)),
        "mesh": _mesh(d),
        "memory": list(_memory(d)),
        "kinds": KINDS,
        "limit": size_text(s["memory_limit"]),
        "terms": list(_terms(d)),
        "lanes": _lanes(d),
        "microbatches": _microbatches(d),
        "sends": [
            {**x, "size": size_text(x["bytes"]), "time": time_text(x["seconds"])}
            for x in d.get("pipeline", {}).get("sends", ())
        ],
        "pipeline": d.get("pipeline"),
        "tried": [(t["what"], time_text(t["seconds"])) for t in d.get("pipeline", {}).get("tried", ())],
        "blocks": list(_blocks(d, colours)),
        "legend": sorted(colours.items(), key=lambda x: x[0]),
        "collectives": list(_collectives(d)),
        "called": call_lines(d),
        "calls": list(_calls(d)),
        "tensors": list(_tensors(d)),
        "notes": d["provenance"]["notes"],
        "took": ", ".join(f"{k} {time_text(v)}" for k, v in d["provenance"]["seconds"].items()),
        "made": f"tessel {d['provenance']['tessel']}, torch {d['provenance']['torch']}",
    }


def _figures(d: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    proof = d["certificate"]
    yield "a step", time_text(d["time"]["step"])
    yield "memory a device", size_text(d["memory"]["total"])
    yield "devices", f"{d['mesh']['world']} × {d['mesh']['target']}"
    yield "from the best plan", "none" if proof["exact"] else f"at most {proof['gap']:.2%}"
    if "pipeline" in d:
        p = d["pipeline"]
        yield "schedule", p["schedule"]
        yield "microbatches", str(d["settings"]["microbatches"])
        yield "bubble", f"{p['bubble']:.1%}"


def _mesh(d: Mapping[str, Any]) -> dict[str, Any]:
    """The axes, and the devices as a grid: the last axis across, all others down."""
    axes = d["mesh"]["axes"]
    across = axes[-1]["size"]
    rows = d["mesh"]["world"] // across
    shown = max(1, min(rows, _MOST_DEVICES // min(across, _MOST_DEVICES)))
    grid = []
    for row in range(shown):
        at, left = [], row
        for a in reversed(axes[:-1]):
            left, x = divmod(left, a["size"])
            at.append(f"{a['name']} {x}")
        grid.append(
            {
                "at": ", ".join(reversed(at)),
                "ranks": list(range(row * across, row * across + min(across, _MOST_DEVICES))),
            }
        )
    return {"axes": axes, "grid": grid, "more": d["mesh"]["world"] - sum(len(r["ranks"]) for r in grid),
            "node": d["mesh"]["gpus_per_node"], "across": axes[-1]["name"]}  # fmt: skip


def _memory(d: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A bar for the devices of each stage."""
    stages = d["pipeline"]["stages"] if "pipeline" in d else [{"memory": d["memory"]}]
    most = max(d["settings"]["memory_limit"], *(s["memory"]["total"] for s in stages)) or 1
    for i, s in enumerate(stages):
        x, parts = 0.0, []
        for n, kind in enumerate(KINDS):
            wide = _WIDE * s["memory"][kind] / most
            parts.append({"x": x, "w": wide, "n": n, "kind": kind, "size": size_text(s["memory"][kind])})
            x += wide
        yield {
            "name": f"stage {i}" if "pipeline" in d else "every device", "parts": parts,
            "total": size_text(s["memory"]["total"]), "limit": _WIDE * d["settings"]["memory_limit"] / most,
            "held": s.get("in_flight"),
        }  # fmt: skip


def _terms(d: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    x, step = 0.0, d["time"]["step"] or 1.0
    for n, (key, words) in enumerate(TERMS.items()):
        seconds = d["time"].get(key, 0.0)
        if seconds > 0:
            yield {"x": x, "w": _WIDE * seconds / step, "n": n, "words": words, "time": time_text(seconds)}
            x += _WIDE * seconds / step


def _lanes(d: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compute and communication of one microbatch on a device, in the order of the nodes: forward, then backward.

    What a node moves stands above its work and begins with it; what is longer than the work shows beyond its end.
    """
    slow, k = slowest_stage(d), d["settings"]["microbatches"]
    moved: dict[tuple[str, str], float] = {}
    for c in d["collectives"]:
        if c["phase"] in ("forward", "backward", "again"):
            phase = "forward" if c["phase"] == "forward" else "backward"
            key = (c["node"], phase)
            moved[key] = moved.get(key, 0.0) + c["seconds"] * c["times"] / k
    nodes = [n for n in d["nodes"] if on_stage(d, n, slow)]
    lanes = []
    for phase in ("forward", "backward") if d["settings"]["train"] else ("forward",):
        share = d["time"][phase] / ((d["time"]["forward"] + d["time"]["backward"]) or 1.0)
        order = nodes if phase == "forward" else nodes[::-1]
        at, work, talk = 0.0, [], []
        for n in order:
            seconds, other = n["seconds"] / k * share, moved.get((n["name"], phase), 0.0)
            work.append((at, seconds, n))
            if other:
                talk.append((at, other, n))
            at += max(seconds, other) if other > seconds else seconds
        total = at or 1.0
        least = total / _WIDE / 2
        lanes.append(
            {
                "phase": phase,
                "time": time_text(total),
                "work": [_box(x, w, total, n) for x, w, n in work if w >= least][:_MOST_SLOTS],
                "talk": [_box(x, w, total, n) for x, w, n in talk if w >= least][:_MOST_SLOTS],
            }
        )
    return lanes


def _box(x: float, w: float, total: float, node: Mapping[str, Any]) -> dict[str, Any]:
    heavy = node["op"] in _HEAVY
    return {
        "x": _WIDE * x / total,
        "w": _WIDE * w / total,
        "n": 0 if heavy else 1,
        "say": f"{node['name']}: {time_text(w)}",
    }


def _microbatches(d: Mapping[str, Any]) -> dict[str, Any] | None:
    """When each stage works on which microbatch."""
    if "pipeline" not in d:
        return None
    p, m = d["pipeline"], d["settings"]["microbatches"]
    shown = min(m, 4 * len(p["stages"]), max(2 * len(p["stages"]), _MOST_SLOTS // (3 * len(p["parts"]))))
    if p["schedule"] == "interleaved":
        shown -= shown % len(p["stages"])
    parts = [(x["forward"], x["backward"]) for x in p["parts"]]
    slots = timeline(p["schedule"], len(p["stages"]), shown, parts, p["chunks"])
    end = max((s.end for s in slots), default=1.0) or 1.0
    boxes = [
        {"x": _WIDE * s.start / end, "w": max(0.5, _WIDE * (s.end - s.start) / end), "y": s.stage, "kind": s.kind,
         "label": str(s.microbatch), "say": f"stage {s.stage}, part {s.part}: {s.words} of microbatch {s.microbatch}"}
        for s in slots[:_MOST_SLOTS]
    ]  # fmt: skip
    return {"boxes": boxes, "stages": len(p["stages"]), "shown": shown, "of": m, "time": time_text(end)}


def _blocks(d: Mapping[str, Any], colours: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """The graph by blocks: stretches of nodes of one layer; equal ones that follow each other stand once."""
    blocks: list[dict[str, Any]] = []
    for n in d["nodes"]:
        path = n["name"].rpartition(":")[0]
        layer = re.match(r"(.*?\.\d+)(\.|$)", path + ".")
        block = layer[1] if layer else path
        name = n["name"].removeprefix(block).lstrip(".")
        splits = _splits(n)
        cell = {
            "name": re.sub(r"#\d+$", "", name) or n["op"], "n": colours[splits], "splits": splits, "where": n["where"],
            "heavy": n["op"] in _HEAVY,
        }  # fmt: skip
        if not blocks or blocks[-1]["block"] != block or blocks[-1]["part"] != n.get("part"):
            blocks.append({"block": block, "part": n.get("part"), "keep": n["keep"], "cells": []})
        blocks[-1]["cells"].append(cell)
    same: list[dict[str, Any]] = []
    for b in blocks:
        key = [(c["name"], c["n"]) for c in b["cells"]], b["keep"], b["part"]
        if same and same[-1]["key"] == key and pattern(same[-1]["block"] + ":") == pattern(b["block"] + ":"):
            same[-1]["last"] = b["block"]
            same[-1]["times"] += 1
        else:
            same.append({**b, "key": key, "last": b["block"], "times": 1})
    yield from same


def _splits(node: Mapping[str, Any]) -> str:
    return ", ".join(f"{a} splits {f}" for a, f in node["splits"].items()) or "whole on every device"


def _collectives(d: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Collectives of the slowest stage's devices; alike ones of equal layers stand once, most bytes first."""
    rows: dict[tuple[str, ...], list[float]] = {}
    slow = slowest_stage(d)
    for c in d["collectives"]:
        if not on_stage(d, c, slow):
            continue
        key = (c["kind"], c["axis"], c["phase"], pattern(c["tensor"]), pattern(c["node"]), c["why"])
        total = rows.setdefault(key, [0, 0.0, 0.0])
        total[0] += c["times"]
        total[1] += c["times"] * c["bytes"]
        total[2] += c["times"] * c["seconds"]
    ordered = sorted(rows.items(), key=lambda x: -x[1][1])
    for (kind, axis, phase, tensor, node, why), (n, nbytes, seconds) in ordered[:_MOST_ROWS]:
        yield {"kind": kind, "axis": axis, "phase": phase, "tensor": tensor, "node": node, "why": why, "times": int(n),
               "size": size_text(nbytes), "time": time_text(seconds)}  # fmt: skip
    if len(ordered) > _MOST_ROWS:
        nbytes = sum(x[1] for _, x in ordered[_MOST_ROWS:])
        empty = dict.fromkeys(("axis", "phase", "tensor", "node", "why", "times", "time"), "")
        yield {**empty, "kind": f"{len(ordered) - _MOST_ROWS} more", "size": size_text(nbytes)}


def _calls(d: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Calls of several collectives, and those that go on beside computation; alike ones stand once."""
    calls: dict[tuple[str, int], list[Any]] = {}
    for c in d.get("program", {}).get("collectives", ()):
        calls.setdefault((c["phase"], c.get("call", len(calls))), []).append(c)
    rows: dict[tuple[Any, ...], list[float]] = {}
    for (phase, _), own in calls.items():
        first, beside = own[0], own[0].get("beside", 0)
        if len(own) > 1 or beside:
            key = (first["kind"], ", ".join(first["axes"]), phase, len(own), beside, pattern(first["where"]))
            total = rows.setdefault(key, [0, 0.0])
            total[0] += first.get("times", 1)
            total[1] += sum(c["bytes"] for c in own) * first.get("times", 1)
    ordered = sorted(rows.items(), key=lambda x: -x[1][1])[:_MOST_ROWS]
    for (kind, axes, phase, n, beside, where), (times, nbytes) in ordered:
        yield {"kind": kind, "axes": axes, "phase": phase, "n": n, "beside": beside, "where": where,
               "times": int(times), "size": size_text(nbytes)}  # fmt: skip


def _tensors(d: Mapping[str, Any]) -> Iterator[tuple[int, str, str, str, str]]:
    rows = Counter(
        (pattern(n), str(t["shape"]), t["sharding"], t.get("use", t["sharding"])) for n, t in d["tensors"].items()
    )
    for row, times in rows.items():
        yield (times, *row)
