"""C++ kernels compiled and loaded: the compiler that is there, a cache of what it built, calls through ctypes.

    library, path = build(text)    # a shared object, from the cache if it is there
    kernel = NativeKernel(source, library, path)
    kernel((), x, out)

The cache holds one file a build, named by a digest of everything that decides it (source, compiler, flags, CPU)
and by the digest of its own content, which is verified before it is loaded. It is used only where it is a
directory of this user's that nobody else may write to.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

from ..codegen.cpp import CppSource
from ..codegen.cpp.includes import headers
from ..config import cache_dir, cxx
from ..errors import TesselError
from ..safe_dir import open_private
from ..targets import get_target
from .results import keep_freed_memory

__all__ = ["Compiler", "NativeKernel", "build", "c_int64", "find_compiler", "stop"]

_SECONDS = 600  # until a compiler is given up
_ROOM = 16 * 2**20  # free bytes below which a failed compilation is tried again on another disk
_FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -w -fno-math-errno -fno-trapping-math -ffp-contract=off -fvisibility=hidden"
).split()
_OPENMP = (["-fopenmp"], ["-fopenmp-simd"])  # without the library, one thread

OUT_OF_RANGE = "index out of range in self"
_REASONS: tuple[tuple[int, type[Exception], str], ...] = (
    (1, IndexError, OUT_OF_RANGE),
    (2, RuntimeError, "ZeroDivisionError"),
    (4, MemoryError, "no memory for the rows of a reduction"),
)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, and what it says it is."""

    command: tuple[str, ...]
    version: str

    def flags(self) -> list[str]:
        """Flags for this machine's CPU."""
        features = get_target("cpu").features
        wide = ["-mprefer-vector-width=512"] if "avx512f" in features else []
        return [*_FLAGS, "-march=native" if get_target("cpu").arch == "x86_64" else "-mcpu=native", *wide]


@cache
def find_compiler(wanted: str | None) -> Compiler:
    """The compiler named by ``wanted`` (``$CXX``), else the first of c++, clang++ and g++ that runs.

    Raises:
        TesselError: there is none; the message says what was tried.
    """
    tried: list[str] = []
    for name in [wanted] if wanted else ["c++", "clang++", "g++"]:
        command = shlex.split(name)
        path = shutil.which(command[0]) if command else None
        if path is None:
            tried.append(f"{name}: not found")
            continue
        try:
            got = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as e:
            tried.append(f"{name}: {e}")
            continue
        if got.returncode == 0:
            return Compiler((path, *command[1:]), got.stdout.strip())
        tried.append(f"{name}: {_last_lines(got.stderr)}")
    raise TesselError(f"no C++ compiler ({'; '.join(tried)}). Install g++ or clang++, or name one in $CXX")


def build(text: str, given: Mapping[str, str] | None = None) -> tuple[ctypes.CDLL, Path]:
    """Compile a file and load it; the library and where it lies.

    Args:
        text: of the file; the headers it includes are Tessel's own (``codegen.cpp.includes``).
        given: texts of headers by name, in place of those.

    Raises:
        TesselError: there is no compiler, or it fails; the message holds what it says.
    """
    compiler = find_compiler(cxx())
    flags = compiler.flags()
    cpu = get_target("cpu")
    files = {"kernels.cpp": text, **headers(text, given)}
    parts = [*(f"{k}\n{v}" for k, v in sorted(files.items())), *compiler.command, compiler.version, *flags]
    parts += [cpu.arch, *cpu.device_names, *sorted(cpu.features)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    known = _loaded.get(key)
    if known is not None:
        return known
    folder = _own_folder()
    path = _cached(folder, key)
    if path is None:
        with _alone(folder, key):
            path = _cached(folder, key) or _compile_into(folder, compiler, flags, files, key)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise TesselError(f"the compiled kernels cannot be loaded: {e}") from e
    _loaded[key] = library, path
    keep_freed_memory()
    return library, path


_loaded: dict[str, tuple[ctypes.CDLL, Path]] = {}
_private: list[tempfile.TemporaryDirectory[str]] = []  # lives as long as the process
_warned: set[str] = set()


def _cached(folder: Path, key: str) -> Path | None:
    """A build of this key whose content is what its name says. Others are removed."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
            if path.name == f"{key}-{digest}.so":
                return path
            path.unlink()
        except OSError:  # another process removed it, or it cannot be read: built again
            continue
    return None


@contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """One process at a time builds a key: the ranks of a program, which start together, compile it once.

    The lock goes with the process that holds it. Where there are no locks, everybody compiles.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # no room for a file, or a file system without locks
            if fcntl is not None:
                fcntl.flock(stack.enter_context((folder / f"lock-{key[0]}").open("w")), fcntl.LOCK_EX)
        yield


def _compile_into(
    folder: Path, compiler: Compiler, flags: Sequence[str], files: Mapping[str, str], key: str
) -> Path:
    """Compile in a folder, or in the process's own where that one has no room."""
    try:
        return _compile(compiler, flags, files, folder, key)
    except OSError as e:
        reason = str(e)
    except TesselError:  # the compiler may have found the disk full
        if shutil.disk_usage(folder).free >= _ROOM:
            raise
        reason = f"{folder} has less than {_ROOM >> 20} MiB free"
    _not_kept(folder, reason)
    try:
        return _compile(compiler, flags, files, _private_folder(), key)
    except OSError as e:
        raise TesselError(f"no room for the compiled kernels, neither in the cache nor elsewhere: {e}") from e


def _compile(
    compiler: Compiler, flags: Sequence[str], files: Mapping[str, str], folder: Path, key: str
) -> Path:
    said = ""
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work:
        for name, content in files.items():
            (Path(work) / name).write_text(content, encoding="utf-8")
        out = Path(work) / "kernels.so"
        for openmp in _OPENMP:
            command = [*compiler.command, *flags, *openmp, "kernels.cpp", "-o", str(out)]
            try:
                got = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as e:
                raise TesselError(f"{compiler.command[0]} failed: {e}") from e
            if got.returncode == 0 and out.exists():
                digest = hashlib.sha256(out.read_bytes()).hexdigest()[:32]
                final = folder / f"{key}-{digest}.so"
                os.replace(out, final)
                return final
            said = said or got.stderr
            if "omp" not in got.stderr:
                break
    raise TesselError(f"{compiler.command[0]} could not compile the kernels:\n{_last_lines(said, 12)}")


def _last_lines(text: str, n: int = 3) -> str:
    return "\n".join(text.strip().splitlines()[-n:])


def _own_folder() -> Path:
    """The cache directory if only this user can write to it, else a private one that the process takes along."""
    folder = cache_dir() / "native"
    try:
        open_private(folder).close()
        with tempfile.TemporaryFile(dir=folder):  # it can be written to
            pass
        return folder
    except OSError as e:
        _not_kept(folder, str(e))
    try:
        return _private_folder()
    except OSError as e:
        raise TesselError(f"no directory for the compiled kernels, neither the cache nor a temporary one: {e}") from e


def _not_kept(folder: Path, reason: str) -> None:
    """Say once why a cache directory is not used."""
    if str(folder) not in _warned:
        _warned.add(str(folder))
        warnings.warn(f"tessel: compiled kernels are not kept: {reason}", stacklevel=3)


def _private_folder() -> Path:
    if not _private:
        _private.append(tempfile.TemporaryDirectory(prefix="tessel-"))
    return Path(_private[0].name)


class NativeKernel:
    """A compiled kernel: called with a grid (ignored), a tensor for every parameter, then its sizes.

    Raises:
        IndexError: an index read from memory is out of range.
        RuntimeError: a whole number is divided by zero.
    """

    def __init__(self, source: CppSource, library: ctypes.CDLL, path: Path) -> None:
        self.source, self.path, self.library = source, path, library
        self.fn = library[source.name]
        self.fn.restype = ctypes.c_int  # no argtypes: converting by them takes as long as the call
        self.tensors = len(source.kernel.params)
        self.pack = struct.Struct(f"{self.tensors + len(source.sizes)}q").pack

    def __call__(self, grid: Any, *args: Any) -> None:
        n = self.tensors
        bad = self.fn(self.pack(*[x.data_ptr() for x in args[:n]], *args[n:]), c_int64(torch.get_num_threads()))
        if bad:
            stop(bad)


c_int64 = cache(ctypes.c_int64)  # numbers as a foreign function takes them


def stop(bad: int) -> None:
    """Raise what a kernel's answer means.

    Raises:
        IndexError, RuntimeError, MemoryError: see ``_REASONS``.
    """
    for bit, kind, words in _REASONS:
        if bad & bit:
            raise kind(words)
