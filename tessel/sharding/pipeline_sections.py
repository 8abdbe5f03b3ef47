"""The sections of a plan file that say a model's stages, what they hold, and what they hand on."""

from __future__ import annotations

from typing import Any

from ..solve.comm import bytes_sent
from ..solve.pipeline import held
from .entries import Entries, layout_text
from .pipeline import Staged

__all__ = ["sections_of"]


def sections_of(staged: Staged, entries: Entries) -> dict[str, Any]:
    """The sections of the file; marks what stands in ``entries`` with the part that it belongs to."""
    part_of = _mark(staged, entries)
    _sends(staged, entries)
    slow, full = staged.slowest, staged.fullest
    memory = staged.memory(full)
    forward, backward, again = (sum(staged.worked(i)[j] for i in staged.parts_of(slow)) for j in range(3))
    mine = [c for c in entries.collectives if staged.stage(c["part"]) == slow]
    parts = []
    for i, answer in enumerate(staged.answers):
        own = [n for n in entries.nodes if n["part"] == i]
        parts.append(
            {
                "stage": staged.stage(i),
                "first": own[0]["name"],
                "last": own[-1]["name"],
                "seconds": answer.seconds,
                "forward": staged.worked(i)[0] / staged.microbatches,
                "backward": sum(staged.worked(i)[1:]) / staged.microbatches,
            }
        )
    sends = [
        {"from": i, "tensor": part_of[i], "layout": layout_text(t, s, staged.pricer), "shape": list(t.type.shape),
         "bytes": nbytes if staged.crosses(i) else 0, "seconds": seconds if staged.crosses(i) else 0.0}
        for i, (t, s, nbytes, seconds) in enumerate(staged.handed())
    ]  # fmt: skip
    return {
        "tensors": entries.tensors,
        "nodes": entries.nodes,
        "collectives": entries.collectives,
        "memory": {**memory, "total": sum(memory.values())},
        "time": {
            "forward": forward,
            "backward": backward,
            "again": again,
            "bubble": staged.waits,
            "communication": sum(c["seconds"] * c["times"] for c in mine),
            "exposed": max(0.0, staged.seconds - staged.waits - forward - backward - again),
            "step": staged.seconds,
        },
        "pipeline": {
            "axis": staged.axis.name,
            "schedule": staged.way.schedule,
            "chunks": staged.way.chunks,
            "bubble": staged.waits / max(staged.work(s) for s in range(staged.stages)),
            "parts": parts,
            "stages": [_stage(staged, s) for s in range(staged.stages)],
            "sends": sends,
            "tied": [{"tensor": p.name, "parts": list(own)} for p, own, _ in staged.tied],
            "tried": [{"what": what, "seconds": s} for what, s in staged.tried],
        },
    }


def _stage(staged: Staged, stage: int) -> dict[str, Any]:
    kinds = staged.memory(stage)
    return {
        "seconds": staged.work(stage),
        "in_flight": held(staged.way.schedule, staged.stages, staged.microbatches, stage, staged.way.chunks),
        "memory": {**kinds, "total": sum(kinds.values())},
    }


def _mark(staged: Staged, entries: Entries) -> list[str]:
    """Give nodes, collectives and tensors their part; the names of what parts end in."""
    at, ends = 0, []
    for i, answer in enumerate(staged.answers):
        n = sum(len(p.choices) for p in answer.segments)
        for node in entries.nodes[at : at + n]:
            node["part"] = i
        at += n
        ends.append(entries.nodes[at - 1]["name"])
    part = {n["name"]: n["part"] for n in entries.nodes}
    for c in entries.collectives:
        c["part"] = part[c["node"]]
    tied = {p.name: own for p, own, _ in staged.tied}
    for name, first in entries.first_reader.items():
        entries.tensors[name]["parts"] = list(tied.get(name, (part[first],)))
    return ends


def _sends(staged: Staged, entries: Entries) -> None:
    names = {n["part"]: n["name"] for n in entries.nodes}  # the last of each part
    for i, (_, _, nbytes, seconds) in enumerate(staged.handed()):
        if not staged.crosses(i):
            continue
        for phase, part in (("forward", i), ("backward", i + 1))[: 2 if staged.pricer.setting.train else 1]:
            to = staged.stage(i + 1 if phase == "forward" else i)
            what = "its result" if phase == "forward" else "its operand's gradient"
            entries.collectives.append(
                {
                    "kind": "send", "axis": staged.axis.name, "bytes": nbytes, "times": staged.microbatches,
                    "seconds": seconds, "phase": phase, "tensor": names[i], "node": names[part], "part": part,
                    "why": f"stage {staged.stage(part)} hands {what} to stage {to}",
                }
            )  # fmt: skip
    for param, parts, w in staged.tied:
        stages = sorted({staged.stage(i) for i in parts})
        size = staged.tie_bytes(w)
        for stage in stages:
            part = next(i for i in parts if staged.stage(i) == stage)
            entries.collectives.append(
                {
                    "kind": "all-reduce", "axis": staged.axis.name, "phase": "gradients", "times": 1,
                    "bytes": bytes_sent("all-reduce", size, len(stages)),
                    "seconds": staged.tie_seconds(parts, w), "tensor": param.name, "node": names[part], "part": part,
                    "why": f"stages {', '.join(map(str, stages))} keep a copy; its gradient is their sum",
                }
            )  # fmt: skip
