"""Compile rendered kernels with Triton: the process that ``offline.py`` starts, as a script.

    python -P compile_job.py FOLDER FIRST     # the jobs of FOLDER/jobs.json from number FIRST on

Nothing but Triton is imported, no Tessel and no torch, so that the process is at work at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["BINARY", "compile_job", "write_result"]

# The form in which a device takes machine code, which is also the suffix of its files.
BINARY = {"cuda": "cubin", "hip": "hsaco"}

_RESOURCES = {
    "cuda": {"registers": r"Used (\d+) registers", "spills": r"(\d+) bytes spill stores"},
    "hip": {"registers": r"\.vgpr_count:\s*(\d+)", "spills": r"\.vgpr_spill_count:\s*(\d+)"},
}


def compile_job(path: str, job: Mapping[str, Any], gpu: tuple[str, int | str, int]) -> dict[str, Any]:
    """Compile a kernel for a GPU that need not be there; pointers are taken for 16-byte aligned.

    Runs in a process of its own (see ``offline.py``): an unlucky tile may abort the compiler.

    Args:
        path: the module's file.
        job: what ``job_for`` (``triton.py``) gave.
        gpu: ``Target.gpu_target``.

    Returns:
        ``shared`` (bytes), ``registers`` a thread and ``spills`` (bytes), ``None`` where the compiler does not say;
        and ``binary``, the machine code.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location(job["name"], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fn = getattr(module, job["name"])
    constexprs = {**job["tiles"], "INDEX": getattr(tl, job["index"])}
    signature = {n: "constexpr" if n in constexprs else job["signature"][n] for n in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if signature[n].startswith("*")}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(fn, signature, constexprs, aligned)
        got = triton.compile(source, target=GPUTarget(*gpu), options=dict(job["options"]))
    lost = [f for f in job["features"] if f not in str(got.asm.get("ttgir", ""))]
    if lost:
        raise RuntimeError(
            f"the compiler has left out what was asked for, without a word: no {', '.join(lost)} in its TTGIR"
        )
    found: dict[str, Any] = {"shared": got.metadata.shared, "registers": None, "spills": None}
    found["binary"] = got.asm[BINARY[gpu[0]]]
    text = got.asm.get("amdgcn", "") if gpu[0] == "hip" else log.getvalue()
    for what, pattern in _RESOURCES[gpu[0]].items():
        numbers = [int(n) for n in re.findall(pattern, str(text))]
        found[what] = max(numbers) if numbers else None
    return found


def write_result(folder: Path, number: int, result: Mapping[str, Any]) -> None:
    """One more line of ``FOLDER/results``; ``result``: fields of ``offline.Compiled`` but the binary."""
    with (folder / "results").open("a") as out:
        out.write(json.dumps({"job": number, "result": result}) + "\n")


def main(folder: Path, first: int) -> None:
    """Compile jobs in order, one line of results each."""
    task: dict[str, Any] = json.loads((folder / "jobs.json").read_text())
    for i, job in enumerate(task["jobs"][first:], first):
        result: dict[str, Any]
        try:
            got = compile_job(str(folder / f"k{i}.py"), job, tuple(task["gpu"]))
            result = {"ok": True, "shared_bytes": got["shared"], "registers": got["registers"], "spills": got["spills"]}
            (folder / f"k{i}.bin").write_bytes(got["binary"])
        except Exception as e:  # whatever the compiler raises is this kernel's result
            result = {"ok": False, "error": f"{type(e).__name__}: {e}"[:2000]}
        write_result(folder, i, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
