"""Tessel against eager and torch.compile on the CPU: models, micro-cases, starts, training, memory.

    python benchmarks/cpu.py [models micro bandwidth cold warm training memory] [--dtype float32] [--only NAME]

Every case runs in a process of its own with a time limit, and in it eager, torch.compile, torch.compile with
freezing and Tessel take turns, so that a disturbance hits all of them. "times" is the better of the two torch.compile
over Tessel, by medians. A case that fails is a row that says so. Writes ``results/cpu-<date>.json`` when nothing is
left out, or the file named by ``--out``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, table, today
from cpu_cases import BOUND, MICRO, MODELS, TRAINING

PARTS = ("models", "micro", "bandwidth", "cold", "warm", "training", "memory")
DTYPES = ("float32", "bfloat16")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
# Seconds until a process is given up, and until one compilation in it is. Dynamo unrolls Mamba's loop over tokens.
LIMIT, PATIENCE = 900, 400
PROCESSES = 3  # for a micro-case and for a bandwidth
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TESSEL_CACHE_DIR")
Row = dict[str, Any]


# ---------------------------------------------------------------- one case, in a process of its own


def child(given: argparse.Namespace) -> Row:
    import cpu_measure as m

    m.quiet()
    dtype = getattr(torch, given.dtype[0])
    if given.child in ("models", "micro"):
        return m.inference(given.only, dtype, given.seconds, PATIENCE)
    if given.child == "training":
        return m.training(given.only, dtype, given.seconds, PATIENCE)
    if given.child == "bandwidth":
        return m.bandwidth(given.only, dtype, given.seconds)
    if given.child == "memory":
        return m.memory(given.way, given.only, dtype)
    return {"s": round(m.startup(given.way, given.only, dtype), 3)}


def in_a_process(kind: str, name: str, dtype: str, seconds: float, way: str = "", caches: str = "") -> Row:
    """The row that a child prints; ``{"failed": words}`` where there is none."""
    env = {k: v for k, v in os.environ.items() if k not in ("TESSEL_DUMP", "TESSEL_DEBUG")}
    if caches:
        env |= {n: os.path.join(caches, n.lower()) for n in CACHES}
    command = [sys.executable, __file__, "--child", kind, "--only", name, "--dtype", dtype]
    command += ["--seconds", str(seconds), "--way", way]
    with tempfile.TemporaryFile("w+") as noise:
        try:
            got = subprocess.run(
                command, env=env, stdout=subprocess.PIPE, stderr=noise, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"no result after {LIMIT} s, in: {_last_line(noise)}"}
        if got.returncode:
            return {"failed": f"exit {got.returncode}: {_last_line(noise)}"}
    return json.loads(got.stdout.splitlines()[-1])


def in_processes(kind: str, name: str, dtype: str, seconds: float, key: str) -> Row:
    """The row with the median of ``key`` of a few processes, with what it was in all of them.

    Which pages the arrays of a kernel of some tenths of a millisecond lie in decides how much of them the last cache
    keeps, and with that some 5% of its time; they stay where they are as long as a process lives. And for seconds at a
    time a memory that others use too gives half as much again as it does most of the time.
    """
    rows = [in_a_process(kind, name, dtype, seconds) for _ in range(PROCESSES)]
    if any("failed" in r or key not in r for r in rows):
        return next(r for r in rows if "failed" in r or key not in r)
    rows.sort(key=lambda r: r[key])
    return {**rows[len(rows) // 2], f"{key}_all": [r[key] for r in rows]}


def _last_line(file: Any) -> str:
    file.seek(0)
    lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def starts(name: str, dtype: str, repeat: int) -> Row:
    """Cold starts with empty caches, each followed by a warm one that finds them filled; the two take turns."""
    times: dict[str, list[float]] = {f"{w}_{k}": [] for k in ("cold", "warm") for w in ("tessel", "compile")}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as empty:
            for kind in ("cold", "warm"):
                for way in ("tessel", "compile"):
                    got = in_a_process("start", name, dtype, 0, way, os.path.join(empty, way))
                    if "failed" in got:
                        return {"failed": f"{way}, {kind}: {got['failed']}"}
                    times[f"{way}_{kind}"].append(got["s"])
    out: Row = {}
    for key, found in times.items():
        out |= {f"{key}_s": round(statistics.median(found), 3), f"{key}_all_s": found}
    for kind in ("cold", "warm"):
        out[f"{kind}_part"] = round(out[f"tessel_{kind}_s"] / out[f"compile_{kind}_s"], 3)
    return out


def peak_memory(name: str, dtype: str) -> Row:
    out: Row = {}
    for way in ("tessel", "compile", "eager"):
        got = in_a_process("memory", name, dtype, 0, way)
        if "failed" in got:
            return {"failed": f"{way}: {got['failed']}"}
        out |= {f"{way}_held": got["held"], f"{way}_peak": got["held"] + got["call"], f"{way}_rss": got["resident"]}
    out["part"] = round(out["tessel_peak"] / max(out["compile_peak"], 1), 3)
    return out


# ---------------------------------------------------------------- all cases


def run(parts: Sequence[str], dtypes: Sequence[str], only: str | None, seconds: float, repeat: int) -> dict[str, Any]:
    """The rows of every part asked for, printed as they come."""
    found: dict[str, list[Row]] = {}

    def add(part: str, name: str, dtype: str, row: Row) -> None:
        row = {"case": name, "dtype": dtype, **row}
        found.setdefault(part, []).append(row)
        print(f"{part}: {name} {SHORT[dtype]}: {brief(row)}", file=sys.stderr, flush=True)

    def wanted(names: Iterable[str]) -> list[str]:
        return [n for n in names if only is None or only.lower() in n.lower()]

    for dtype in dtypes:
        if "models" in parts:
            for name in wanted(MODELS):
                add("models", name, dtype, in_a_process("models", name, dtype, seconds))
        if "micro" in parts and (dtype == "float32" or len(dtypes) == 1):
            for name in wanted(MICRO):
                add("micro", name, dtype, in_processes("micro", name, dtype, seconds / 4, "ratio"))
        if "bandwidth" in parts:
            for name in wanted(BOUND):
                add("bandwidth", name, dtype, in_processes("bandwidth", name, dtype, seconds / 4, "part"))
        if "training" in parts:
            for name in wanted(TRAINING):
                add("training", name, dtype, in_a_process("training", name, dtype, seconds))
        if {"cold", "warm"} & set(parts) and (dtype == "float32" or len(dtypes) == 1):
            for name in wanted(MODELS):
                add("starts", name, dtype, starts(name, dtype, repeat))
        if "memory" in parts and (dtype == "float32" or len(dtypes) == 1):
            for name in wanted(MODELS):
                add("memory", name, dtype, peak_memory(name, dtype))
    return found


def brief(row: Row) -> str:
    if "failed" in row:
        return f"FAILED, {row['failed']}"
    keys = [
        k
        for k in row
        if k in ("ratio", "of_copy") or k.endswith(("_ms", "_s", "_peak", "_failed", "part", "same_bits", "gb_s"))
    ]
    return ", ".join(f"{k} {row[k]}" for k in keys)


# ---------------------------------------------------------------- tables


def summary(rows: Iterable[Row], key: str) -> dict[str, float]:
    """Geometric mean, median, least and largest of what did not fail, and how many there are."""
    rows = list(rows)
    values = [r[key] for r in rows if key in r]
    out: dict[str, float] = {"cases": len(values), "failed": len(rows) - len(values)}
    if values:
        out |= {
            "geometric mean": round(math.exp(statistics.fmean(map(math.log, values))), 3),
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
        }
    return out


def _said(name: str, s: dict[str, float]) -> str:
    return f"{name}: " + ", ".join(f"{k} {v}" for k, v in s.items())


def _number(row: Row, key: str, form: str = ".2f") -> str:
    return format(row[key], form) if key in row else "-"


def _time(row: Row, way: str) -> str:
    if f"{way}_failed" in row:
        return "failed"
    return f"{row[f'{way}_ms']:.3g} ±{row[f'{way}_iqr'] / 2:.0%}" if f"{way}_ms" in row else "-"


def times_table(rows: list[Row], products: bool, freeze: bool = True) -> str:
    """Milliseconds with half the interquartile range, ratio, ceiling, bits and errors."""
    head = ["case", "eager", "torch.compile", *(["freezing"] if freeze else []), "Tessel", "times"]
    head += ["products alone", "at most"] if products else []
    head += ["same bits", "error, eager's"]
    lines = []
    for r in rows:
        name = f"{r['case']} {SHORT[r['dtype']]}"
        if "failed" in r:
            lines.append([name, *(["failed"] + [""] * (len(head) - 2))])
            continue
        ways = ["eager", "compile", *(["freeze"] if freeze else []), "tessel"]
        line = [name, *(_time(r, w) for w in ways), _number(r, "ratio")]
        if products:
            best = min((r[f"{p}_ms"] for p in ("compile", "freeze") if f"{p}_ms" in r), default=math.nan)
            line += [_number(r, "products_ms", ".3g"), f"{best / r.get('products_ms', math.nan):.2f}"]
        same = {True: "yes", False: "NO", None: "-"}[r.get("same_bits")]
        lines.append([*line, same, f"{_number(r, 'tessel_error', '.1e')}, {_number(r, 'eager_error', '.1e')}"])
    return table(head, lines)


def starts_table(rows: list[Row], kinds: Sequence[str]) -> str:
    head = ["case", *(h for k in kinds for h in (f"Tessel, {k}", f"torch.compile, {k}", "part"))]
    keys = [(f"tessel_{k}_s", f"compile_{k}_s", f"{k}_part") for k in kinds]
    lines = [[f"{r['case']} {SHORT[r['dtype']]}", *(_number(r, x) for k in keys for x in k)] for r in rows]
    return table(head, lines)


def memory_table(rows: list[Row]) -> str:
    head = ["case", "eager", "torch.compile", "Tessel", "of them held between calls", "part"]
    head += [f"resident: {w}" for w in ("eager", "torch.compile", "Tessel")]

    def mib(r: Row, key: str) -> str:
        return f"{r[key] / 2**20:.1f}" if key in r else "failed"

    return table(
        head,
        [
            [
                f"{r['case']} {SHORT[r['dtype']]}",
                *(mib(r, f"{w}_peak") for w in ("eager", "compile", "tessel")),
                mib(r, "tessel_held"),
                _number(r, "part"),
                *(mib(r, f"{w}_rss") for w in ("eager", "compile", "tessel")),
            ]
            for r in rows
        ],
    )


def bandwidth_table(rows: list[Row]) -> str:
    head = ["case", "GB/s", "copy, GB/s", "reading, GB/s", "the same mix, GB/s", "part of the mix", "of the copy"]
    lines = []
    for r in rows:
        rates = [
            f"{r[f'{w}_gb_s']:.1f} ±{r[f'{w}_iqr'] / 2:.0%}" if "part" in r else "failed"
            for w in ("kernel", "copy", "read", "mix")
        ]
        lines.append([f"{r['case']} {SHORT[r['dtype']]}", *rates, _number(r, "part"), _number(r, "of_copy")])
    return table(head, lines)


def report(found: dict[str, list[Row]], kinds: Sequence[str] = ("cold", "warm")) -> tuple[str, dict[str, Any]]:
    """Every table as text, and the figures of each group."""
    text: list[str] = [f"{machine()['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    sums: dict[str, Any] = {}

    def group(rows: list[Row], name: str, key: str) -> None:
        sums[name] = summary(rows, key)
        text.append(_said(name, sums[name]))

    for part in ("models", "micro", "training"):
        if rows := found.get(part):
            unit = "milliseconds (median ± half the interquartile range)"
            text.append(f"\n{part}, {unit}\n\n{times_table(rows, part == 'models', part != 'training')}\n")
            for dtype in DTYPES:
                if some := [r for r in rows if r["dtype"] == dtype]:
                    group(some, f"{part} {SHORT[dtype]}", "ratio")
    if rows := found.get("bandwidth"):
        what = "bandwidth of kernels on arrays that no cache holds, and of streams with nothing to compute in turns"
        text.append(f"\n{what}\n\n{bandwidth_table(rows)}\n")
        for dtype in DTYPES:
            if some := [r for r in rows if r["dtype"] == dtype]:
                group(some, f"bandwidth {SHORT[dtype]}", "part")
    if rows := found.get("starts"):
        text.append(f"\nseconds to the first result in a fresh process\n\n{starts_table(rows, kinds)}\n")
        for kind in kinds:
            group(rows, kind, f"{kind}_part")
    if rows := found.get("memory"):
        text.append(f"\npeak of a call, MiB from torch's allocator, weights not counted\n\n{memory_table(rows)}\n")
        group(rows, "memory", "part")
    bad = [(p, r, k) for p, rows in found.items() for r in rows for k in r if k.endswith("failed")]
    text += [f"failed: {p}, {r['case']} {SHORT[r['dtype']]}, {k}: {r[k]}" for p, r, k in bad]
    return "\n".join(text), sums


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all if none is named")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="both if not given; starts, memory and micro: fp32"
    )
    parser.add_argument("--only", help="cases with this in their name")
    parser.add_argument("--seconds", type=float, default=15.0, help="to time a model")
    parser.add_argument("--repeat", type=int, default=1, help="cold starts of each kind")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(child(given)))
        return
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    begin = time.perf_counter()
    found = run(given.parts or PARTS, given.dtype or DTYPES, given.only, given.seconds, given.repeat)
    kinds = [k for k in ("cold", "warm") if k in (given.parts or PARTS)]
    text, sums = report(found, kinds)
    took = round(time.perf_counter() - begin)
    print(text, f"\ntook {took // 60} min {took % 60} s")
    out = given.out or (None if given.parts or given.only or given.dtype else RESULTS / f"cpu-{today()}.json")
    if out:
        out.parent.mkdir(exist_ok=True, parents=True)
        data = {"machine": machine(), "threads": torch.get_num_threads(), "seconds": took, "summary": sums, **found}
        out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"written: {out}")


if __name__ == "__main__":
    main()
