"""Memory of one call on the CPU: what torch's allocator hands out, and what the process really takes.

    python benchmarks/cpu.py memory                            # the table of all models
    python benchmarks/memory.py "Llama 4x256" --way tessel     # the largest blocks alive at the peak of one of them

Weights and inputs are there before and count in neither figure; results count in both.
"""

from __future__ import annotations

import argparse
import ctypes
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_cases import MODELS, load

__all__ = ["measure", "resident"]

WARM = 3
Runner = Callable[[], Any]


def _events(run: Runner, calls: int) -> tuple[list[Any], list[Any]]:
    """Allocations and releases of some calls in order of time, and the operators that ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        for _ in range(calls):
            result = run()
            del result
    found = sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return [e for e in found if e.name() == "[memory]"], [e for e in found if e.name() != "[memory]"]


def _balance(run: Runner, calls: int) -> tuple[int, int]:
    """Bytes that are still allocated after some calls, and the most that were at once."""
    now = most = 0
    for event in _events(run, calls)[0]:
        now += event.nbytes()
        most = max(most, now)
    return now, most


def resident(run: Runner) -> int:
    """Bytes by which a call raises the process's resident memory; -1 where the system does not tell.

    Memory that is free is given back to the system first, so that what a call takes from the C library's heap
    counts, and so does what MKL and oneDNN allocate without torch.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        result = run()
        after = _status("VmHWM")
    except (OSError, AttributeError):
        return -1
    del result
    return max(after - before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(run: Runner) -> dict[str, int]:
    """Bytes of one call of a runner that has not been called yet.

    * ``held``: allocated while compiling or in the first calls and not given back: kept results, repacked weights.
    * ``call``: the most that a later call allocates at once on top of it, by the count of torch's allocator. Kernels
      that call ``malloc`` themselves (MKL does, oneDNN asks torch) are not in it.
    * ``resident``: see the function; the largest of three calls.
    """
    held, _ = _balance(run, WARM)
    _, peak = _balance(run, 1)
    return {"held": max(held, 0), "call": peak, "resident": max(resident(run) for _ in range(3))}


def blocks(run: Runner, most: int = 12) -> list[str]:
    """The largest blocks alive at the peak of a call, and the operators that asked for them."""
    for _ in range(WARM):
        run()
    memory, ops = _events(run, 1)
    now = peak = at = 0
    for i, event in enumerate(memory):
        now += event.nbytes()
        if now > peak:
            peak, at = now, i
    # A release says how much, not which: the last block of that size is taken off.
    alive: list[Any] = []
    for event in memory[: at + 1]:
        if event.nbytes() > 0:
            alive.append(event)
        else:
            gone = [e for e in alive if e.nbytes() == -event.nbytes()]
            if gone:
                alive.remove(gone[-1])
    lines = [f"{peak:>12,} bytes at once, event {at} of {len(memory)}"]
    for event in sorted(alive, key=lambda e: -e.nbytes())[:most]:
        inside = [o.name() for o in ops if o.start_ns() <= event.start_ns() <= o.end_ns()]
        lines.append(f"{event.nbytes():>12,} {' > '.join(inside[-2:])}")
    return lines


def main() -> None:
    from cpu_measure import WAYS, runner

    parser = argparse.ArgumentParser(description="The largest blocks alive at the peak of one call.")
    parser.add_argument("case", choices=MODELS)
    parser.add_argument("--way", choices=WAYS, default="tessel")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        run = runner(given.way, load(given.case, getattr(torch, given.dtype))())
        print("\n".join(blocks(run)))


if __name__ == "__main__":
    main()
