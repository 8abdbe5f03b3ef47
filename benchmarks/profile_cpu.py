"""Where the time of a compiled model goes on the CPU: every launch and library call, with bytes and GB/s.

    python benchmarks/profile_cpu.py Mamba --dtype bfloat16 [--calls 20] [--top 25] [--each] [--training]

Runs a case of ``cpu_cases.py`` through Tessel and times each call of its host program from outside, so that a
figure holds the call's own launch cost (about two microseconds of it are the clock's). Bytes are those of
``tessel.tiles.cost``: distinct operands and results. "host" is what is left of the wall time: views, allocation,
Python. With ``--each`` launches of one kernel at several places are not added up. Small kernels that a program runs
by one call are called one by one here. On a machine that does other work too, ``--busy`` with OMP_NUM_THREADS=1
counts the time the thread was running.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import table
from cpu_cases import MICRO, MODELS, TRAINING, load, load_training, tensor_of
from cpu_measure import quiet

from tessel import driver
from tessel.codegen.steps import Called
from tessel.ir.node import Graph, Node
from tessel.tiles.cost import base_values, node_bytes

Clock = Callable[[], float]
_NOT_CALLED = ("item", "assert_scalar")


@dataclass
class Step:
    """One launch or library call of a host program: its times in seconds, one a run of the program."""

    name: str
    what: str
    bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(self.seconds) * 1e3 if self.seconds else 0.0


class Profile:
    """The steps of every program that is built while it is active, by graph."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.programs: list[tuple[str, list[Step]]] = []
        self.texts: list[str] = []
        self.active = False

    def __enter__(self) -> Profile:
        self._build = driver.build
        driver.build = self._watched  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        driver.build = self._build

    def _watched(self, graph: Graph, call: Any, launchers: Any, *args: Any, **kwargs: Any) -> Any:
        roots = base_values(graph)
        steps: list[Step] = []
        at = [0]

        def timed(fn: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if not self.active:
                    return fn(*args, **kwargs)
                start = self.clock()
                got = fn(*args, **kwargs)
                steps[at[0] % len(steps)].seconds.append(self.clock() - start)
                at[0] += 1
                return got

            return run

        known: dict[Node, Any] = {}
        held: dict[int, Callable[..., Any]] = {}

        def watched(node: Node) -> Any:
            if node not in known:
                got = call(node)
                if isinstance(got, Called):  # one wrapper a function: the host program names it once
                    held.setdefault(id(got.fn), timed(got.fn))
                    got = Called(got.name, held[id(got.fn)], got.attrs, got.owned, got.names, got.flat)
                known[node] = got
            return known[node]

        wrapped = {name: timed(run) for name, run in launchers.items()}
        program = self._build(graph, watched, wrapped, *args, **kwargs)
        for node in graph.nodes:
            if node.op.kind != "view" and node.op.name not in _NOT_CALLED:
                steps.append(Step(known[node].name, _what(node), node_bytes(node, roots, kwargs.get("hints"))))
        self.programs.append((graph.name, steps))
        self.texts.append(program.source.text)
        return program


def _what(node: Node) -> str:
    """Operators inside, and the type of the first result."""
    if node.op.kind == "kernel":
        names = [n.op.name for n in node.regions[0].nodes if n.op.kind not in ("view", "generate")]
        words = " ".join(names[:6]) + (f" .. ({len(names)})" if len(names) > 6 else "")
    else:
        words = str(node.attrs.get("target", node.op.name))
    types = [str(v.type) for v in (node.operands[-2:] if node.op.kind == "contract" else ())]
    types += [str(t) for t in node.types[:1]]
    return f"{words} -> {' '.join(types)}"


def profile(fn: Callable[[], Any], calls: int, clock: Clock = time.perf_counter) -> tuple[Profile, float]:
    """The steps of what ``fn`` compiles at its first call, and the median seconds of a call, timing included."""
    with Profile(clock) as seen:
        for _ in range(3):
            fn()
    seen.active = True
    whole = []
    for _ in range(calls):
        start = clock()
        fn()
        whole.append(clock() - start)
    return seen, statistics.median(whole)


def rows(steps: Sequence[Step], each: bool) -> list[tuple[str, str, int, float, int]]:
    """(name, what, times a call, milliseconds, bytes), the slowest first."""
    out: dict[Any, tuple[str, str, int, float, int]] = {}
    for i, s in enumerate(steps):
        key = i if each else (s.name, s.what)
        _, _, n, ms, size = out.get(key, ("", "", 0, 0.0, 0))
        out[key] = (s.name, s.what, n + 1, ms + s.ms, size + s.bytes)
    return sorted(out.values(), key=lambda r: -r[3])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", help=f"part of a name: {', '.join([*MODELS, *MICRO])}")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--each", action="store_true", help="every launch on a line of its own")
    parser.add_argument("--busy", action="store_true", help="time of this thread, not of the clock on the wall")
    parser.add_argument("--training", action="store_true", help="a training step in place of a call without gradients")
    parser.add_argument("--host", help="file for the text of the host programs")
    given = parser.parse_args(arguments)
    quiet()
    cases = TRAINING if given.training else [*MODELS, *MICRO]
    name = next((n for n in cases if given.case.lower() in n.lower()), None)
    if name is None:
        parser.error(f"no case has {given.case!r} in its name: {', '.join(cases)}")

    import tessel

    clock = time.thread_time if given.busy else time.perf_counter
    with torch.set_grad_enabled(given.training):
        case = (load_training if given.training else load)(name, getattr(torch, given.dtype))()
        compiled = tessel.compile(case.fn, target="cpu")

        def call() -> None:
            result = tensor_of(compiled(*case.args, **case.kwargs))
            if given.training:
                case.fn.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
                result.backward()

        seen, whole = profile(call, given.calls, clock)
    if given.host:
        with open(given.host, "w", encoding="utf-8") as f:
            f.write("\n".join(seen.texts))
    spent = sum(s.ms for _, steps in seen.programs for s in steps)
    count = sum(len(steps) for _, steps in seen.programs)
    print(f"{name} {given.dtype}, {torch.get_num_threads()} threads: {whole * 1e3:.2f} ms a call,", end=" ")
    print(f"{spent:.2f} in {count} launches and calls, {whole * 1e3 - spent:.2f} host")
    for graph, steps in seen.programs:
        lines = []
        for kernel, what, n, ms, size in rows(steps, given.each)[: given.top]:
            rate = f"{size / ms / 1e6:.1f}" if ms else "-"
            lines.append(
                [f"{ms:.3f}", f"{ms / whole / 10:.1f}%", str(n), f"{size / 1e6:.2f}", rate, kernel, what[:110]]
            )
        print(f"\n{graph}\n{table(['ms', 'share', 'times', 'MB', 'GB/s', 'kernel', 'operators -> type'], lines)}")


if __name__ == "__main__":
    main()
