"""How long compiling takes: cold, against torch.compile, and by number of nodes.

    python benchmarks/compile_time.py [--repeat N]

Cold: a fresh process with empty caches, torch imported and the model built; from the first call of the compiled
model to the moment that its code would run for the first time. Dynamo's and AOTAutograd's work is in every figure,
and so is what each compiler imports. The kernels are not run. The processes take turns, so that a slow minute of
the machine hits all of them.

    tessel triton-interpret   kernels for Triton's interpreter, ready to be called
    tessel h100               kernels for an absent H100, as source; Triton compiles each at its first launch
    tessel h100, compiled     the same and Triton's compilation of every kernel, one after another
    torch.compile             Inductor for the CPU, ready to be called
    torch.compile, source     the same without its C++ compiler, up to the generated source
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Done, Size, build, captured, spread, stopped_by_done, table

WAYS = ("tessel triton-interpret", "tessel h100", "tessel h100, compiled", "torch.compile", "torch.compile, source")
COLD = Size(layers=2)


# ---------------------------------------------------------------- one cold compile, in a process of its own


def child(way: str) -> dict[str, Any]:
    """Compile a 2-layer Llama one way; seconds, and Tessel's share of them."""
    model, kwargs = build("Llama", COLD)
    report: list[Any] = []
    start = time.perf_counter()
    backend = _tessel(way, report) if way.startswith("tessel") else _inductor(way)

    def stopping(gm: Any, inputs: Any) -> Callable[..., Any]:
        backend(gm, inputs)

        def run(*args: Any) -> Any:
            raise Done("ready")

        return run

    try:
        with torch.no_grad():
            torch.compile(model, backend=stopping, dynamic=False)(**kwargs)
    except Exception as e:
        if not stopped_by_done(e):
            raise
    out: dict[str, Any] = {"seconds": time.perf_counter() - start}
    if report:
        (done,) = report[0].compilations
        out["passes"] = {f"{i} {p.name}": round(p.seconds, 4) for i, p in enumerate(done.passes)}
        out["tessel"] = done.seconds
        out["nodes"], out["kernels"] = done.captured, len(done.kernels)
    return out


def _tessel(way: str, report: list[Any]) -> Callable[..., Any]:
    from tessel import driver
    from tessel.backend import Backend
    from tessel.place import Place
    from tessel.targets import get_target

    name = way.split()[1].rstrip(",")
    session = driver.Session(name)
    report.append(session.report)
    if name != "triton-interpret":  # for a device that is not there: as if it were
        place = Place(get_target(name), "launch")
        driver.place_for = lambda name, device: place
    if way.endswith("compiled"):
        driver.Kernels.load = _loaded_and_compiled(driver.Kernels.load)
    return Backend(session)


def _loaded_and_compiled(load: Callable[[Any], None]) -> Callable[[Any], None]:
    from tessel.codegen.compile_job import compile_job
    from tessel.codegen.triton import job_for

    def loaded(self: Any) -> None:
        load(self)
        for name, source in self.sources.items():
            compile_job(str(self.launchers[name].path), job_for(source), self.target.gpu_target)

    return loaded


def _inductor(way: str) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    if way.endswith("source"):
        from torch._inductor.graph import GraphLowering

        def written(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise Done("source written")

        GraphLowering._compile_to_module_lines = written
    return compile_fx


def cold(repeat: int) -> dict[str, Any]:
    """Every way in turn, ``repeat`` times."""
    got: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeat):
        for way in WAYS:
            got[way].append(_in_a_process(way))
    out: dict[str, Any] = {}
    for way, runs in got.items():
        out[way] = {"seconds": spread([r["seconds"] for r in runs])}
        if "tessel" in runs[0]:
            out[way] |= {"of it in Tessel": spread([r["tessel"] for r in runs]), "passes": runs[-1]["passes"]}
            out[way] |= {k: runs[0][k] for k in ("nodes", "kernels")}
    return out


def _in_a_process(way: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as empty:
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TESSEL_CACHE_DIR")
        env = {**os.environ, **{n: os.path.join(empty, n.lower()) for n in names}}
        env.pop("TESSEL_DUMP", None)
        command = [sys.executable, __file__, "--child", way]
        got = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if got.returncode:
        raise RuntimeError(f"{way}: exit {got.returncode}\n{got.stderr[-3000:]}")
    return json.loads(got.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- by number of nodes


def scaling(layers: tuple[int, ...] = (2, 8, 32)) -> list[dict[str, Any]]:
    """Capture, passes and generation of Llamas of several depths, and of a graph of thousands of nodes."""
    _stages("Llama", Size(layers=1))  # imports and first uses are no part of what grows
    rows = [_stages("Llama", Size(layers=n)) for n in layers]
    large = Size(layers=5, hidden=64, heads=4, batch=1, seq=64, vocab=256)
    return [*rows, _stages("qwen3_next", large, export=True)]


def _stages(name: str, size: Size, export: bool = False) -> dict[str, Any]:
    """Seconds of each stage. ``torch.export`` unrolls a loop of Qwen3-Next that Dynamo captures as one call."""
    from tessel.config import Options
    from tessel.frontend.capture import export_graph
    from tessel.passes.pipeline import Trace, run_pipeline
    from tessel.runtime.kernels import Kernels
    from tessel.targets import get_target

    model, kwargs = build(name, size)
    clock = [time.perf_counter()]
    imported = export_graph(model, (), kwargs) if export else captured(model, **kwargs)
    clock.append(time.perf_counter())
    trace = Trace()
    graph = run_pipeline(imported.graph, Options(), trace)
    clock.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as empty:
        kernels = Kernels(get_target("h100"), Path(empty))
        kernels.render_all(graph)
    clock.append(time.perf_counter())
    capture, passes, generation = (b - a for a, b in itertools.pairwise(clock))
    nodes = len(imported.graph.nodes)
    return {
        "model": name,
        "layers": size.layers,
        "nodes": nodes,
        "kernel nodes": sum(n.op.kind == "kernel" for n in graph.nodes),
        "distinct kernels": len(kernels.sources),
        "failed": len(kernels.failed),
        "capture": round(capture, 3),
        "passes": round(passes, 3),
        "generation": round(generation, 3),
        "ms a node": round((capture + passes) / nodes * 1e3, 3),
        "steps": {f"{i} {s.name}": round(s.seconds, 3) for i, s in enumerate(trace.steps)},
    }


# ---------------------------------------------------------------- tables


def cold_table(results: dict[str, Any]) -> str:
    base = results["torch.compile"]["seconds"]["median"]

    def row(way: str) -> list[str]:
        r = results[way]
        s = r["seconds"]
        own = f"{r['of it in Tessel']['median']:.2f}" if "of it in Tessel" in r else ""
        return [way, f"{s['median']:.2f}", f"{s['min']:.2f} – {s['max']:.2f}", f"{s['median'] / base:.2f}", own]

    head = ["2-layer Llama, cold", "seconds (median)", "least – most", "of torch.compile", "in Tessel's own code"]
    return table(head, map(row, results))


def scaling_table(rows: list[dict[str, Any]]) -> str:
    columns = ["nodes", "kernel nodes", "distinct kernels", "capture", "passes", "generation", "ms a node"]
    head = ["model, layers", *(f"{c} (s)" if c in ("capture", "passes", "generation") else c for c in columns)]
    return table(head, ([f"{r['model']}, {r['layers']}", *(r[c] for c in columns)] for r in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child)))
        return
    print(cold_table(cold(given.repeat)), end="\n\n")
    print(scaling_table(scaling()))


if __name__ == "__main__":
    main()
