"""Compile sources for GPUs that need not be there, in processes of their own.

    done = offline_compile([source], "sm_90")[0]
    done.ok, done.shared_bytes, done.registers

A tile that is too much for the compiler may abort the process it runs in; that kernel is then
reported as failed, and a fresh process goes on with the next. Shared memory above the device's
limit never fails here, only when the kernel is loaded: compare ``shared_bytes`` with the limit.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config import child_environment
from ..errors import TesselError, did_you_mean
from ..targets import TARGETS
from . import compile_job
from .source import Source
from .triton import job_for

__all__ = ["Compiled", "offline_compile"]

_POLL_S = 0.05


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of one source. ``registers`` are a thread's, ``spills`` bytes; ``None``: not said.

    ``binary`` is the machine code (a cubin or hsaco file's content), if it was asked for.
    """

    ok: bool
    shared_bytes: int | None = None
    registers: int | None = None
    spills: int | None = None
    error: str = ""
    binary: bytes = field(default=b"", repr=False)


def offline_compile(
    sources: Sequence[Source],
    arch: str,
    timeout_s: float = 120.0,
    *,
    keep_binaries: bool = False,
    done: Callable[[], None] | None = None,
) -> list[Compiled]:
    """Compile every source for ``arch`` (``sm_80``, ``sm_90``, ``sm_100``, ``gfx942`` ...), one after another.

    Any number of threads may call this at the same time. ``done`` is called after each source.

    Failures, aborts and time-outs (a process that says nothing for ``timeout_s``) are results, not errors.

    Raises:
        TesselError: no known target has that architecture, or a source is for the interpreter.
    """
    gpu = next((t.gpu_target for t in TARGETS.values() if t.arch == arch and t.gpu_target), None)
    known = sorted({t.arch for t in TARGETS.values() if t.gpu_target})
    if gpu is None:
        raise TesselError(f"no GPU of architecture {arch!r}; {did_you_mean(arch, known)}")
    for s in sources:
        if s.interpret:
            raise TesselError(f"{s.name} was rendered for the interpreter; render it for a GPU")
    with tempfile.TemporaryDirectory(prefix="tessel-compile-") as name:
        folder = Path(name)
        jobs = []
        for i, s in enumerate(sources):
            (folder / f"k{i}.py").write_text(s.text)
            jobs.append(job_for(s))
        (folder / "jobs.json").write_text(json.dumps({"gpu": gpu, "jobs": jobs}))
        results: dict[int, Compiled] = {}
        while len(results) < len(sources):
            start = len(results)
            why = _run(folder, start, timeout_s, done or (lambda: None))
            results = _read(folder)
            if len(results) < len(sources) and (why or len(results) == start):
                compile_job.write_result(
                    folder, len(results), {"ok": False, "error": why or "the compiler said nothing"}
                )
                results = _read(folder)
                if done is not None:
                    done()
        if keep_binaries:
            results = {
                i: replace(r, binary=(folder / f"k{i}.bin").read_bytes()) if r.ok else r for i, r in results.items()
            }
    return [results[i] for i in range(len(sources))]


def _run(folder: Path, start: int, timeout_s: float, tell: Callable[[], None]) -> str:
    """One process from job ``start`` on; why it ended early, or nothing. ``tell`` is called after each job."""
    env = child_environment(
        {
            "TRITON_INTERPRET": None,
            "TRITON_CACHE_DIR": str(folder / "cache"),
            "TRITON_ALWAYS_COMPILE": "1",  # a cached kernel, also of this process, would not tell its registers
            "TRITON_DUMP_PTXAS_LOG": "1",
        }
    )
    command = [sys.executable, "-P", compile_job.__file__, str(folder), str(start)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        done, since = start, time.monotonic()
        try:
            while True:
                code = process.poll()
                for _ in range(done, now := len(_read(folder))):
                    tell()
                if now > done:
                    done, since = now, time.monotonic()
                if code is not None:
                    break
                if time.monotonic() - since > timeout_s:
                    return f"the compiler took more than {timeout_s:.0f} s"
                time.sleep(_POLL_S)
        finally:
            process.kill()  # also when the user interrupts
            process.wait()
    if code == 0:
        return ""
    said = (folder / "log").read_text(errors="replace").strip().splitlines()
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"the compiler aborted ({how}): {said[-1] if said else 'no message'}"


def _read(folder: Path) -> dict[int, Compiled]:
    path = folder / "results"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half written
    return {row["job"]: Compiled(**row["result"]) for row in rows}
