"""What Triton made of the kernels that tests compile for absent GPUs: known ones are looked up, new ones compiled.

A row of ``data/offline.json`` is named by a digest of all that decides what comes out: the kernel's text, how it is
compiled, the GPU, Triton's version. What is not there is compiled, and so is one row of sixteen, which ones their
digests say, so that rows that are wrong are found.

    pytest --bless tests/test_kv.py -k offline       # in one process: these tests' rows anew, the others stay
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tessel.codegen.compile_job import compile_job
from tessel.codegen.offline import Compiled, offline_compile
from tessel.codegen.source import Source
from tessel.codegen.triton import job_for
from tessel.targets import TARGETS, Target

FILE = Path(__file__).parent / "data" / "offline.json"
Row = list[int | None]  # bytes of shared memory, registers of a thread, bytes of spills


@cache
def rows() -> dict[str, Row]:
    """All rows, whichever test wrote them, by digest."""
    return {digest: row for of_test in _read().values() for digest, row in of_test.items()}


def _read() -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = json.loads(FILE.read_text())["tests"] if FILE.exists() else {}
    return found


def digest_of(source: Source, arch: str) -> str:
    """Names what comes out of compiling a kernel, but for its name and comments."""
    import triton

    gpu = next(t.gpu_target for t in TARGETS.values() if t.arch == arch and t.gpu_target)
    job = {**job_for(source), "name": ""}
    text = source.body.replace(f"def {source.name}(", "def kernel(")
    parts = (triton.__version__, gpu, json.dumps(job, sort_keys=True), text, inspect.getsource(compile_job))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


@dataclass
class Recorded:
    """``offline_compile`` for a test.

    Attributes:
        test: the name its rows are written under.
        bless: write them.
        own: those that were asked for.
    """

    test: str
    bless: bool
    own: dict[str, Row] = field(default_factory=dict)

    def __call__(self, sources: Sequence[Source], arch: str) -> list[Compiled]:
        """What the compiler says of each source, now or when it was written down.

        Raises:
            AssertionError: a row says something else.
        """
        digests = [digest_of(s, arch) for s in sources]
        known = rows()
        asked = [i for i, d in enumerate(digests) if d not in known or d.startswith("0")]
        done = dict(zip(asked, offline_compile([sources[i] for i in asked], arch), strict=True)) if asked else {}
        found = []
        for i, digest in enumerate(digests):
            got = done.get(i)
            if got is None:
                shared, registers, spills = known[digest]
                got = Compiled(True, shared, registers, spills)
            elif digest in known and not self.bless:
                row = [got.shared_bytes, got.registers, got.spills]
                assert got.ok and row == known[digest], f"{sources[i].name} on {arch}: {got}, not {known[digest]}"
            found.append(got)
        new = sum(i in done and d not in known for i, d in enumerate(digests))
        if self.bless:
            self.own |= {d: [g.shared_bytes, g.registers, g.spills] for d, g in zip(digests, found) if g.ok}
            self._write()
        elif new:
            warnings.warn(f"{new} kernels for {arch} are not in {FILE.name}: pytest --bless writes them", stacklevel=2)
        return found

    def fitting(self, sources: Sequence[Source], target: Target, spills: int | None = 0) -> list[Compiled]:
        """The same for a target, where each kernel must compile and take no more of a unit than its template declares.

        Args:
            spills: bytes that a kernel may spill, less than which is as good as none; ``None`` asks for no number.

        Raises:
            AssertionError: one does not.
        """
        assert target.limits is not None
        done = self(sources, target.arch)
        for source, got in zip(sources, done, strict=True):
            what = f"{source.name} on {target.arch} with {dict(source.knobs)}"
            assert got.ok, f"{what}: {got.error}"
            assert got.shared_bytes is not None, what
            assert got.shared_bytes <= source.smem_bytes <= target.limits.shared_bytes_per_block, what
            assert spills is None or (got.spills or 0) <= spills, f"{what}: {got.spills} bytes of spills"
        return done

    def _write(self) -> None:
        assert "PYTEST_XDIST_WORKER" not in os.environ, "rows are written by one process: leave out -n"
        tests = dict(sorted({**_read(), self.test: self.own}.items()))
        lines = [
            f"{json.dumps(t)}: {json.dumps(dict(sorted(r.items())), separators=(',', ':'))}" for t, r in tests.items()
        ]
        about = "What Triton made of kernels for GPUs that are absent: shared bytes, registers, bytes of spills."
        FILE.write_text(f'{{"about": {json.dumps(about)},\n"tests": {{\n' + ",\n".join(lines) + "\n}}\n")
