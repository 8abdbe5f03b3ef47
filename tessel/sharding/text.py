"""Plans in words: the report on a terminal, one node, the difference of two plans, what lint finds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from ..errors import TesselError, did_you_mean
from ..ir.sharding import Sharding
from .plan_file import ShardingPlan
from .recipe import recipe_lines
from .words import pattern, size_text, time_text

__all__ = [
    "KINDS",
    "TERMS",
    "call_lines",
    "diff_text",
    "findings",
    "node_text",
    "on_stage",
    "plan_text",
    "slowest_stage",
]

KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries", "inputs")
TERMS = {
    "forward": "work of the forward",
    "backward": "work of the backward",
    "again": "work done again instead of kept",
    "exposed": "communication that no work hides",
    "bubble": "the slowest stage waits for the others",
}


def plan_text(plan: ShardingPlan) -> str:
    """The report."""
    d = plan.data
    s, mesh, memory, times, proof = d["settings"], d["mesh"], d["memory"], d["time"], d["certificate"]
    what = f"training, {s['optimizer']}, remat {s['remat']}" if s["train"] else "inference"
    size = "".join(f", {n} {s[k]}" for k, n in (("global_batch", "batch"), ("seq", "sequence")) if s[k])
    lines = [
        f"{d['model']['name']}: {d['model']['parameters'] / 1e9:.3g} billion parameters, {what}{size}"
        + (f", {s['microbatches']} microbatches" if s["microbatches"] > 1 else ""),
        f"{mesh['world']} × {mesh['target']}: " + ", ".join(a["wires"] for a in mesh["axes"]),
        "",
        f"a step takes {time_text(times['step'])}",
    ]
    lines += [f"  {time_text(times[k]):>10}  {words}" for k, words in TERMS.items() if times.get(k, 0) > 0]
    lines.append(f"  of {time_text(times['communication'])} of communication")
    exact = "the best of all plans" if proof["exact"] else f"at most {proof['gap']:.2%} from the best plan"
    lines += ["", f"memory a device: {size_text(memory['total'])} of {size_text(s['memory_limit'])} ({exact})"]
    lines += [f"  {size_text(memory[k]):>10}  {k}" for k in KINDS if memory[k] > 0]
    lines += _pipeline_lines(d)
    lines += ["", "parameters (major to minor axes of each dimension)"]
    lines += _table(_parameter_rows(d))
    lines += ["", "products (axis: the factor of the dims string that it splits)"]
    lines += _table(_product_rows(d))
    lines += [f"  {line}" for line in recipe_lines(d)]
    slow = slowest_stage(d)
    of = "" if slow is None else f" of stage {slow}, the slowest"
    lines += ["", f"communication of one device{of} in a step"]
    lines += _table(_collective_rows(d, slow))
    lines += [f"  {line}" for line in call_lines(d)]
    keeps = Counter(n["keep"] for n in d["nodes"])
    if s["train"] and set(keeps) != {"none"}:
        parts = ", ".join(f"{k} {n / len(d['nodes']):.0%}" for k, n in sorted(keeps.items()))
        lines += ["", f"activations kept or computed again, part of all nodes: {parts}"]
    took = d["provenance"]["seconds"]
    lines += ["", "notes"] + [f"  {n}" for n in d["provenance"]["notes"]]
    lines.append("  " + ", ".join(f"{k} {time_text(v)}" for k, v in took.items()))
    return "\n".join(lines)


def slowest_stage(d: Mapping[str, Any]) -> int | None:
    """The stage that works longest; None without a pipeline."""
    stages = d["pipeline"]["stages"] if "pipeline" in d else []
    return max(range(len(stages)), key=lambda i: stages[i]["seconds"]) if stages else None


def on_stage(d: Mapping[str, Any], c: Mapping[str, Any], stage: int | None) -> bool:
    """Whether a node or a collective is of a stage; of None everything is."""
    return stage is None or d["pipeline"]["parts"][c["part"]]["stage"] == stage


def _pipeline_lines(d: Mapping[str, Any]) -> list[str]:
    if "pipeline" not in d:
        return []
    p = d["pipeline"]
    chunks = f" of {p['chunks']} chunks" if p["chunks"] > 1 else ""
    lines = [
        "",
        f"{len(p['stages'])} stages over {p['axis']}{chunks}, {p['schedule']}, {d['settings']['microbatches']} "
        f"microbatches: the slowest waits {p['bubble']:.1%} of the time that it works",
    ]

    def rows() -> Iterator[tuple[str, ...]]:
        for i, s in enumerate(p["stages"]):
            own = [x for x in p["parts"] if x["stage"] == i]
            held = f"holds {s['in_flight']:g} microbatches"
            spans = "; ".join(f"{x['first']} to {x['last']}" for x in own)
            yield f"stage {i}", time_text(s["seconds"]), size_text(s["memory"]["total"]), held, spans

    lines += _table(rows())
    lines += ["", "handed from part to part, for each microbatch (and its gradient back)"]
    for s in p["sends"]:
        what = f"{s['tensor']}  {s['shape']}{s['layout']}  {size_text(s['bytes'])}  {time_text(s['seconds'])}"
        lines.append(f"  {s['from']} to {s['from'] + 1}  {what}")
    for t in p["tied"]:
        stages = sorted({p["parts"][i]["stage"] for i in t["parts"]})
        lines.append(f"  {t['tensor']} is kept by stages {', '.join(map(str, stages))}, which add up its gradients")
    lines += ["", "compared (seconds that no cut beats)"]
    lines += _table((t["what"], time_text(t["seconds"])) for t in p["tried"])
    return lines


def _parameter_rows(d: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    rows: Counter[tuple[str, ...]] = Counter()
    for name, t in d["tensors"].items():
        levels = ", ".join(f"{a}: {_LEVEL[n]}" for a, n in t.get("level", {}).items())
        used = f"used as {t['use']}" if "use" in t else ""
        rows[pattern(name), t["sharding"], used, levels] += 1
    for row, n in rows.items():
        yield (f"{n} ×", *row)


_LEVEL = {0: "whole", 1: "optimizer state apart", 2: "state and gradients apart", 3: "gathered for use"}


def _product_rows(d: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    rows: Counter[tuple[str, ...]] = Counter()
    why: dict[tuple[str, ...], str] = {}
    for n in d["nodes"]:
        if n["op"] in ("matmul", "attention", "grouped_mm", "linear_cross_entropy", "embedding"):
            key = (pattern(n["name"]), ", ".join(f"{a}: {f}" for a, f in n["splits"].items()))
            rows[key] += 1
            other = n.get("instead", [])
            if other and key not in why:
                splits = ", ".join(f"{a}: {f}" for a, f in other[0]["splits"].items())
                why[key] = f"next best {splits or 'whole'}: +{time_text(other[0]['seconds'])}"
    for row, count in rows.items():
        yield (f"{count} ×", *row, why.get(row, ""))


def _collective_rows(d: Mapping[str, Any], stage: int | None = None) -> Iterator[tuple[str, ...]]:
    groups: dict[tuple[str, str, str], list[float]] = {}
    for c in d["collectives"]:
        if not on_stage(d, c, stage):
            continue
        total = groups.setdefault((c["phase"], c["kind"], c["axis"]), [0, 0.0, 0.0])
        total[0] += c["times"]
        total[1] += c["times"] * c["bytes"]
        total[2] += c["times"] * c["seconds"]
    for (phase, kind, axis), (n, nbytes, seconds) in sorted(groups.items(), key=lambda x: -x[1][1]):
        yield f"{n:.0f} ×", kind, f"over {axis}", phase, size_text(nbytes), time_text(seconds)


def call_lines(d: Mapping[str, Any]) -> list[str]:
    """How the collectives of the program are called: merged, and beside what is computed."""
    s, rows = d["settings"], d.get("program", {}).get("collectives", [])
    if "bucket_bytes" not in s or not rows:
        return []
    sent = sum(c["bytes"] * c.get("times", 1) for c in rows)
    beside = sum(c["bytes"] * c.get("times", 1) for c in rows if c.get("beside"))
    calls = len({(c["phase"], c.get("call", -i)) for i, c in enumerate(rows, 1)})
    return [
        f"the program has {len(rows)} collectives in {calls} calls (a call of several carries up to "
        f"{size_text(s['bucket_bytes'])}); {beside / sent if sent else 0:.0%} of the bytes go on beside computation "
        f"(up to {size_text(s['in_flight_bytes'])} on their way)"
    ]


def _table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    found = list(rows)
    if not found:
        return ["  none"]
    wide = [max(len(r[i]) for r in found) for i in range(len(found[0]))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(r, wide)).rstrip() for r in found]


# ---------------------------------------------------------------- one node


def node_text(plan: ShardingPlan, text: str) -> str:
    """What a plan says of a node: by its name, the end of it, or a part of it.

    Raises:
        TesselError: there is no such node.
    """
    d = plan.data
    node = next(nodes_named(d, text), None)
    if node is None:
        raise TesselError(f"no node {text!r}; {did_you_mean(text, [n['name'] for n in d['nodes']])[:300]}")
    lines = [f"{node['name']} ({node['op']}) at {node['where']}"]
    splits = ", ".join(f"{a} splits {f}" for a, f in node["splits"].items())
    lines.append(
        f"  {splits or 'whole on every device'}; work {time_text(node['seconds'])} a step; keeps: {node['keep']}"
    )
    lines += [f"  reads {t}" for t in node["reads"] if t] + [f"  makes {t}" for t in node["makes"]]
    own = [c for c in d["collectives"] if c["node"] == node["name"]]
    for c in own:
        times = f"{c['times']} × " if c["times"] > 1 else ""
        lines.append(
            f"  {c['phase']}: {times}{c['kind']} of {c['tensor']} over {c['axis']}, {size_text(c['bytes'])} a device, "
            f"{time_text(c['seconds'])}: {c['why']}"
        )
    same = [n for n in d["nodes"] if "instead" in n and pattern(n["name"]) == pattern(node["name"])]
    said = node if "instead" in node else next((n for n in same if n["splits"] == node["splits"]), None)
    for other in said["instead"] if said is not None else ():
        splits = ", ".join(f"{a} splits {f}" for a, f in other["splits"].items())
        lines.append(f"  instead: {splits or 'whole'}: the step takes {time_text(other['seconds'])} more")
    return "\n".join(lines)


def nodes_named(data: Mapping[str, Any], text: str) -> Iterator[Mapping[str, Any]]:
    """The nodes whose name is, or ends in, or holds a text, in this order of preference."""
    for test in (str.__eq__, str.endswith, str.__contains__):
        found = [n for n in data["nodes"] if test(n["name"], text)]
        if found:
            yield from found
            return


# ---------------------------------------------------------------- two plans


def diff_text(a: ShardingPlan, b: ShardingPlan) -> str:
    """What differs between two plans; layers that differ alike stand once."""
    lines = []
    for section in ("model", "mesh", "settings"):
        for key in a.data[section]:
            x, y = a.data[section][key], b.data[section].get(key)
            if x != y:
                lines.append(f"{section}.{key}: {_value(x)} -> {_value(y)}")
    for section, show in (("time", time_text), ("memory", size_text)):
        for key in a.data[section]:
            x, y = a.data[section][key], b.data[section].get(key, 0)
            if x != y:
                lines.append(f"{section}.{key}: {show(x)} -> {show(y)}" + (f" ({y / x - 1:+.1%})" if x else ""))
    both = (("", {n: t["sharding"] for n, t in p.data["tensors"].items()}) for p in (a, b))
    lines += _changed(*(x for _, x in both))
    lines += _changed(*({n["name"]: _splits(n) for n in p.data["nodes"]} for p in (a, b)))
    lines += _changed(*({f"keep {n['name']}": n["keep"] for n in p.data["nodes"]} for p in (a, b)))
    return "\n".join(lines) if lines else "the plans are the same"


def _splits(node: Mapping[str, Any]) -> str:
    return ", ".join(f"{x}: {f}" for x, f in node["splits"].items()) or "whole"


def _changed(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    rows: Counter[tuple[str, str, str]] = Counter()
    for name in dict.fromkeys([*a, *b]):
        x, y = a.get(name, "absent"), b.get(name, "absent")
        if x != y:
            rows[pattern(name), x, y] += 1
    return [f"{n} × {name}: {x} -> {y}" for (name, x, y), n in rows.items()]


def _value(x: Any) -> str:
    if isinstance(x, list) and x and isinstance(x[0], dict):  # the mesh's axes
        return ",".join(f"{a['name']}={a['size']}" for a in x)
    return str(x)


# ---------------------------------------------------------------- lint


def findings(
    plan: ShardingPlan, parameters: Sequence[tuple[str, tuple[int, ...], str]], config: Mapping[str, Any],
    group_size: int | None = None,
) -> list[str]:  # fmt: skip
    """What is wrong with a plan for a model; an empty list for nothing.

    Args:
        parameters: of the model: name, shape, dtype.
        config: of the model, as far as it has one: ``num_key_value_heads``.
        group_size: elements along the summed dimension that share a scale, in a quantized model.
    """
    d, mesh = plan.data, plan.mesh
    s = d["settings"]
    out = []
    memory = d["memory"]["total"]
    if memory > s["memory_limit"]:
        out.append(f"memory: {size_text(memory)} a device, more than the limit of {size_text(s['memory_limit'])}")
    elif memory + s.get("in_flight_bytes", 0) > s["memory_limit"] + 1:
        out.append(
            f"memory: {size_text(memory)} a device and {size_text(s['in_flight_bytes'])} of collectives on their way, "
            f"more than the limit of {size_text(s['memory_limit'])}"
        )
    own = {n: (list(shape), dtype) for n, shape, dtype in parameters}
    for name, t in d["tensors"].items():
        if name not in own:
            out.append(f"{name}: in the plan, not in the model")
        elif (t["shape"], t["dtype"]) != own[name]:
            out.append(f"{name}: {t['dtype']}{t['shape']} in the plan, {own[name][1]}{own[name][0]} in the model")
    missing = [n for n in own if n not in d["tensors"]]
    out += [f"{n}: in the model, not in the plan" for n in missing[:5]]
    heads = config.get("num_key_value_heads")
    for name, t in d["tensors"].items():
        use = Sharding.parse(t.get("use", t["sharding"]))
        parts = prod(mesh[a] for a in use.dims[0]) if use.rank == 2 else 1
        if isinstance(heads, int) and re.search(r"\.[kv]_proj\.weight$", name) and heads % parts:
            over = ", ".join(f"{a}={mesh[a]}" for a in use.dims[0])
            out.append(f"{name}: split in {parts} ({over}), the model has {heads} key and value heads")
        if group_size and use.rank == 2:
            width = t["shape"][1] // prod(mesh[a] for a in use.dims[1])
            if use.dims[1] and width % group_size:
                out.append(f"{name}: shards of {width} columns cut groups of {group_size} that share a scale")
    for what, axes, n in (
        ("sequence", s.get("sequence_axes", []), s["seq"]),
        ("batch", s.get("batch_axes", []), s["global_batch"] and s["global_batch"] // s["microbatches"]),
    ):
        parts = prod(mesh[a] for a in axes if a in mesh)
        if n and n % parts:
            out.append(f"{what}: {n} does not divide by {parts} ({', '.join(axes)})")
    return out
