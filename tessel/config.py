"""Options and environment. No other module reads ``os.environ``.

Environment variables:

======================  ====================================================================
``TESSEL_DEBUG``        0 to 4, the default of ``Options.debug``
``TESSEL_DUMP``         a directory, the default of ``Options.dump_dir``
``TESSEL_CACHE_DIR``    where the cache lives; else ``$XDG_CACHE_HOME/tessel`` or ``~/.cache/tessel``
``TESSEL_TARGET_PATH``  a folder of JSON files that describe devices; ``target="x"`` then finds ``x.json``
``WORLD_SIZE``          set by torchrun: how many processes there are
``CXX``                 the C++ compiler for the CPU's kernels; else c++, clang++ or g++
======================  ====================================================================
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .errors import TesselError, check, did_you_mean

__all__ = [
    "Options",
    "cache_dir",
    "child_environment",
    "cxx",
    "debug_level",
    "environment_digest",
    "target_file",
    "tile_entries",
    "world_size",
]

_DEBUG_MAX = 4
# Annotation text (annotations are strings here) -> the types a value may have.
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
}


def cache_dir() -> Path:
    """The per-user cache directory, as a path that may not exist yet.

    ``TESSEL_CACHE_DIR`` wins, then ``$XDG_CACHE_HOME/tessel``, then ``~/.cache/tessel``. A relative
    ``XDG_CACHE_HOME`` is ignored, as its specification asks.
    """
    own = os.environ.get("TESSEL_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if os.path.isabs(xdg) else Path("~/.cache").expanduser()
    return base / "tessel"


def debug_level() -> int:
    """The level in ``TESSEL_DEBUG``, 0 when it is not set.

    1 prints the time each pass takes, 2 adds the plan, 3 the IR before and after each pass, 4 the
    generated kernels.

    Raises:
        TesselError: the variable is not a whole number from 0 to 4.
    """
    text = os.environ.get("TESSEL_DEBUG", "").strip()
    if not text:
        return 0
    check(
        text.isdecimal() and int(text) <= _DEBUG_MAX,
        lambda: f"TESSEL_DEBUG: expected a whole number from 0 to {_DEBUG_MAX}, got {text!r}",
    )
    return int(text)


def cxx() -> str | None:
    """The C++ compiler the user names in ``CXX``, with its arguments; None where it is not set."""
    return os.environ.get("CXX", "").strip() or None


def world_size() -> int | None:
    """How many processes torchrun started; None where it did not.

    Raises:
        TesselError: ``WORLD_SIZE`` is no positive whole number.
    """
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return None
    check(text.isdecimal() and int(text) > 0, lambda: f"WORLD_SIZE: expected a positive whole number, got {text!r}")
    return int(text)


def target_file(name: str) -> Path | None:
    """The file ``<name>.json`` in the folder ``TESSEL_TARGET_PATH``; None where there is none."""
    folder = os.environ.get("TESSEL_TARGET_PATH")
    if not folder or not name or name != Path(name).name:  # a name, never a path out of the folder
        return None
    path = Path(folder).expanduser() / f"{name}.json"
    return path if path.is_file() else None


def child_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment for a child process, with some variables set, or dropped (None).

    Tessel is importable in the child, wherever it was imported from here.
    """
    env = {**os.environ, **{k: v for k, v in changes.items() if v is not None}}
    own = str(Path(__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(p for p in (own, os.environ.get("PYTHONPATH")) if p)
    return {k: v for k, v in env.items() if k not in changes or changes[k] is not None}


# Variables that differ from one shell to the next and decide nothing.
_OF_A_SHELL = frozenset(
    "_ COLUMNS DISPLAY LINES LS_COLORS OLDPWD PS1 PWD PYTEST_CURRENT_TEST SHLVL TERM TMPDIR WINDOWID".split()
)


def environment_digest() -> str:
    """A digest of all environment variables but those that are a shell's own."""
    own = sorted((k, v) for k, v in os.environ.items() if k not in _OF_A_SHELL and not k.startswith(("SSH_", "XDG_SE")))
    return hashlib.sha256(repr(own).encode("utf-8", "backslashreplace")).hexdigest()


def _dump_dir() -> str | None:
    return os.environ.get("TESSEL_DUMP") or None


def _choice(*values: str) -> Any:
    """A field that takes one of ``values``; the first is the default."""
    return field(default=values[0], metadata={"choices": values})


@dataclass(frozen=True)
class Options:
    """How to compile. Frozen and hashable; ``dataclasses.replace`` makes a changed copy.

    >>> Options(matmul="library").matmul
    'library'
    >>> Options.of({"fussion": False})
    Traceback (most recent call last):
        ...
    tessel.errors.TesselError: options: unknown name 'fussion'; did you mean 'fusion'? known: attention, ...

    Raises:
        TesselError: a value has the wrong type or is not one of the known ones; the message names the
            field, what it got and what it takes.
    """

    matmul: Literal["auto", "template", "library"] = _choice("auto", "template", "library")
    """Who multiplies matrices: ``"template"`` Tessel's own kernel, ``"library"`` torch's (cuBLAS, oneDNN),
    ``"auto"`` whichever the target is known to run faster."""

    attention: Literal["auto", "template", "library"] = _choice("auto", "template", "library")
    """Who computes scaled dot-product attention; the same three values as ``matmul``."""

    fusion: bool = True
    """Join operators into kernels. False gives one kernel an operator: slower, and useful to find out
    whether a difference comes from fusion."""

    cuda_graphs: bool = False
    """Record a call once and replay it afterwards, where the shapes are static and the device has CUDA
    graphs. Outputs then live in memory that the next call overwrites."""

    deterministic: bool = False
    """Use only kernels that give the same bits on every run (no atomic additions in any order)."""

    rng: Literal["eager"] = _choice("eager")
    """Where random numbers come from. ``"eager"``, the only value now: dropout and the like are library
    calls drawn in eager's order, so that the same seed gives eager's bits."""

    capture_cache: bool = True
    """Keep captures of inference graphs between processes, and skip tracing where code, modules, shapes and
    surroundings are the same. False traces in every process."""

    debug: int = field(default_factory=debug_level)
    """0 to 4, what to print while compiling; see :func:`debug_level`. Default: ``TESSEL_DEBUG``."""

    dump_dir: str | None = field(default_factory=_dump_dir)
    """Directory that generated sources are written to. Default: ``TESSEL_DUMP``; None means ``kernels``
    in :func:`cache_dir`. :meth:`source_dir` resolves it."""

    recompile_limit: int | None = None
    """How many times one function may be compiled again for new shapes before it runs eagerly, at least 1.
    None keeps torch's own limit. Reaching it is said in a warning."""

    keep_results: bool = True
    """On the CPU: the memory of a large value that nobody refers to any more (no tensor, view or array) serves a later
    call, so that the system need not clear fresh pages for it. At most 256 MiB in a process are kept like that: results
    of 1 MiB and more in inference, any value of 32 MiB and more in training, whose smaller ones the C library is told
    to keep from one step to the next. False gives all of it back to the C library."""

    tile: str | None = None
    """Tiles to force on a GPU, the rest being solved: ``"128x128x64"`` for every matrix product, or entries for
    families and kernels, ``"matmul: 128x128x64 warps=8 stages=3; attention: 128x64; matmul_3: BM=256"``. A tile
    that cannot fit is an error that names the limit."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            choices = f.metadata.get("choices")
            if choices is not None:
                ok, want = isinstance(value, str) and value in choices, " or ".join(map(repr, choices))
            else:
                types = _TYPES[str(f.type)]
                # bool is an int to Python, but debug=True is a slip
                ok = isinstance(value, types) and (bool in types or not isinstance(value, bool))
                want = str(f.type).replace("|", "or")
            if not ok:
                raise TesselError(_wrong(f.name, want, value))
        check(
            0 <= self.debug <= _DEBUG_MAX,
            lambda: _wrong("debug", f"an int from 0 to {_DEBUG_MAX}", self.debug),
        )
        check(
            self.recompile_limit is None or self.recompile_limit >= 1,
            lambda: _wrong("recompile_limit", "an int of at least 1, or None", self.recompile_limit),
        )
        if self.tile is not None:
            tile_entries(self.tile)
        check(self.dump_dir != "", lambda: _wrong("dump_dir", "a directory name, or None", self.dump_dir))

    @staticmethod
    def of(x: Options | Mapping[str, Any] | None) -> Options:
        """``x`` as Options: None gives the defaults, a mapping is checked name by name.

        >>> Options.of({"fusion": False}).fusion
        False

        Raises:
            TesselError: an unknown name (with the nearest known one), a bad value, or another type.
        """
        if x is None:
            return Options()
        if isinstance(x, Options):
            return x
        if not isinstance(x, Mapping):
            raise TesselError(f"options: expected Options, a mapping or None, got {type(x).__name__}: {x!r}")
        names = [f.name for f in fields(Options)]
        for name in x:
            if name not in names:
                raise TesselError(f"options: unknown name {name!r}; {did_you_mean(name, names)}")
        return Options(**x)

    def source_dir(self) -> Path:
        """The directory that generated sources are written to, which may not exist yet."""
        return Path(self.dump_dir).expanduser() if self.dump_dir else cache_dir() / "kernels"


_TILES = "entries such as '128x128x64', 'attention: 128x64' or 'matmul_3: BM=256 warps=8', with ';' between them"
_SIDES = re.compile(r"\d+(x\d+)*")


def tile_entries(text: str) -> list[tuple[str, tuple[int, ...], dict[str, int]]]:
    """``Options.tile`` taken apart: for each entry whom it is for, the sides of the tile and the knobs by name.

    >>> tile_entries("128x128x64; attention: 64x32 warps=4")
    [('matmul', (128, 128, 64), {}), ('attention', (64, 32), {'warps': 4})]

    Raises:
        TesselError: it is not written like that.
    """
    out = []
    for entry in text.split(";"):
        where, colon, rest = entry.rpartition(":")
        words = rest.split()
        sides = words.pop(0) if words and _SIDES.fullmatch(words[0]) else ""
        pairs = [w.partition("=") for w in words]
        named = where.strip().isidentifier() if colon else sides.count("x") == 2
        ok = named and (sides or pairs) and all(n.isidentifier() and v.isdecimal() for n, _, v in pairs)
        check(bool(ok), lambda: _wrong("tile", _TILES, text))
        numbers = tuple(int(n) for n in sides.split("x")) if sides else ()
        out.append((where.strip() or "matmul", numbers, {n: int(v) for n, _, v in pairs}))
    return out


def _wrong(name: str, want: str, value: object) -> str:
    return f"options: {name}: expected {want}, got {value!r} ({type(value).__name__})"
