"""Captures kept between processes: the first call of a compiled model then needs no tracing.

    first_call(made, model, session, args, kwargs)      # -> made(*args, **kwargs)

A record is found by a key of everything that can be named without tracing: versions, options, environment, the code
of the function, the modules, parameters and arguments with their shapes, types and strides. It is believed only
where each fingerprint in it holds as well (``frontend/recorded.py``); whatever is in doubt is traced as usual, and
recorded anew. Records lie in a directory that only this user can write to, each named by its key and by the digest
of its own content.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .config import cache_dir, environment_digest
from .driver import Session, compile_graph
from .frontend import recorded
from .frontend.capture import GraphInfo
from .frontend.fingerprint import Fingerprints
from .frontend.importer import Imported
from .ir.parse import parse_graph
from .ops import OPS
from .safe_dir import PrivateDir, open_private

__all__ = ["Calling", "first_call"]

WORTH = 0.5  # seconds of a first call from which on it is recorded
_MOST, _LARGEST = 64, 32 << 20  # records kept, bytes of one
_now = threading.local()


class Calling:
    """``with calling:`` around calls of what was compiled in a session; made once, entered at every call.

    Attributes:
        matters: whether any capture was put back; before, nobody asks who is calling.
    """

    matters = False

    def __init__(self, session: Session) -> None:
        self.session = session

    def __enter__(self) -> None:
        stack = getattr(_now, "sessions", None)
        if stack is None:
            stack = _now.sessions = []
        stack.append(self.session)

    def __exit__(self, *_: object) -> None:
        _now.sessions.pop()


def _is_calling(session: Session) -> bool:
    stack: list[Session] = getattr(_now, "sessions", [])
    return bool(stack) and stack[-1] is session


def first_call(
    made: Callable[..., Any], fn: Callable[..., Any], session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call what torch made of ``fn`` for the first time, with its capture from the cache if it is there.

    Args:
        made: runs ``fn`` through Dynamo with this session's backend.
        fn: a module or a function.
        session: whose report tells of a capture that was found.
        args, kwargs: of the call.
    """
    target = _function(fn)
    if target is None or not session.options.capture_cache or not recorded.possible() or torch.is_grad_enabled():
        return made(*args, **kwargs)
    try:
        folder = open_private(cache_dir() / "captures")
    except OSError:  # no directory of this user's alone, as the cache of kernels has said already
        return made(*args, **kwargs)
    try:
        key = _key(fn, target, session, args, kwargs)
        if _found(folder, key, target, session, args, kwargs):
            return made(*args, **kwargs)
        start = time.perf_counter()
        with recorded.recording() as seen:
            result = made(*args, **kwargs)
        if time.perf_counter() - start >= WORTH:
            data = seen.recorded(target, args, kwargs)
            if data is not None and len(data) <= _LARGEST:
                _write(folder, key, data)
        return result
    finally:
        folder.close()


def _function(fn: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function whose frame Dynamo compiles, of a module the bound ``forward``."""
    if isinstance(fn, torch.nn.Module):
        return fn.forward if type(fn).__call__ is torch.nn.Module.__call__ else None
    return None  # a function of its own is small, or closes over anything


def _found(
    folder: PrivateDir,
    key: str,
    target: Callable[..., Any],
    session: Session,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    data = _read(folder, key)
    if data is None:
        return False
    made: list[Any] = []
    Calling.matters = True

    def make_run(text: str, held: Mapping[str, Any]) -> Callable[[list[Any]], Any]:
        imported = Imported(parse_graph(text, OPS), held["constants"], held["fallbacks"])
        run = compile_graph(imported, GraphInfo("inference", held["static"], (), held["order"]), session)
        made.append(run)
        return run

    try:
        why = recorded.put_back(data, target, args, kwargs, make_run, lambda: _is_calling(session))
    except Exception as e:  # a private part of torch that is not as it was: trace
        why = f"{type(e).__name__}: {e}"
    if why:
        if made:
            session.report.compilations.clear()
        return False
    session.report.compilations[-1].notes.append("the capture is from the cache; torch traced nothing")
    return True


# ---------------------------------------------------------------- the key


def _key(
    fn: Callable[..., Any],
    target: Callable[..., Any],
    session: Session,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str:
    prints = Fingerprints()
    parts = [_surroundings(), session.target, repr(session.options), prints.of(target)]
    parts += [prints.of(x) for x in args] + [f"{k} {prints.of(v)}" for k, v in kwargs.items()]
    if isinstance(fn, torch.nn.Module):
        for name, module in fn.named_modules():
            parts += [name, prints.of(module)]
        for name, tensor in (*fn.named_parameters(remove_duplicate=False), *fn.named_buffers(remove_duplicate=False)):
            parts += [name, prints.of(tensor)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _surroundings() -> str:
    """Versions, environment, installed packages, and Tessel's own source."""
    places = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages") and os.path.isdir(p)]
    packages = [f"{p} {os.stat(p).st_mtime_ns}" for p in places]  # changed by whatever is installed or removed
    system = [sys.version, platform.platform(), str(torch.__version__), str(torch.version.git_version), str(sys.flags)]
    return "\n".join([*system, *packages, environment_digest(), _source_digest()])


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- files


def _read(folder: PrivateDir, key: str) -> bytes | None:
    """A record whose content is what its name says; others of its key are removed."""
    for name in sorted(os.listdir(folder.fd)):
        if not name.startswith(f"{key}-"):
            continue
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder.fd)
            with os.fdopen(fd, "rb") as f:
                data = f.read(_LARGEST + 1)
        except OSError:  # another process removed it, or it cannot be read
            continue
        if name == _name(key, data):
            return data
        _remove(folder, name)
    return None


def _name(key: str, data: bytes) -> str:
    return f"{key}-{hashlib.sha256(data).hexdigest()[:32]}.capture"


def _write(folder: PrivateDir, key: str, data: bytes) -> None:
    """Keep a record, in place of others of its key and of the oldest of too many."""
    new = f".new-{os.getpid()}-{threading.get_ident()}"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder.fd)
        with os.fdopen(fd, "wb") as f:
            f.write(data)
        os.rename(new, _name(key, data), src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
    except OSError:  # a full disk, a directory without the right to write: the next process traces again
        _remove(folder, new)
        return
    ages: list[tuple[float, str]] = []
    for name in os.listdir(folder.fd):
        if name.startswith(f"{key}-") and name != _name(key, data):
            _remove(folder, name)
        elif name.endswith(".capture"):
            ages.append((os.stat(name, dir_fd=folder.fd, follow_symlinks=False).st_mtime, name))
    for _, name in sorted(ages)[: max(0, len(ages) - _MOST)]:
        _remove(folder, name)


def _remove(folder: PrivateDir, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder.fd)
    except OSError:  # gone already, or not to be removed: then it is passed over each time
        return
