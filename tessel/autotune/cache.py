"""The cache of tuned tiles: it can be lost; it can never make a result wrong, crash a run, or run code.

One file an entry, under its key's digest, written whole beside its place and renamed into it: a reader sees an entry
or none, and no lock is needed. Predicted and measured entries have different names, so that no order of writers
puts a prediction in a measurement's place. Whatever is wrong with a file or a directory is a miss and a counter
in ``Cache.stats()``; what could not be written is kept in this process's memory. ``known`` asks it for a kernel's tile.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ..config import cache_dir
from ..errors import TesselError
from ..safe_dir import PrivateDir, UnsafeDirectory, open_private
from .entry import MAX_BYTES, Broken, Entry, Key, Knob, decode, encode
from .key import distance

__all__ = ["Cache", "Legal", "default_cache"]

Legal = Callable[[Mapping[str, Knob]], "str | None"]
"""Why a tile may not be used, or None."""

SUFFIXES = (".measured", ".predicted")
_TEMPORARY = ".new-"
_LEFTOVER = 3600.0  # seconds after which a temporary file has no writer any more
_MEMORY = 4096  # entries kept in the process


class Cache:
    """The entries in one directory. Safe for threads and for any number of processes.

    Args:
        root: the directory, made with mode 0700 when first needed; ``cache_dir() / "tiles"`` if not given.
        clock: seconds since 1970, for the age of files.
    """

    def __init__(self, root: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.root = root if root is not None else cache_dir() / "tiles"
        self.clock = clock
        self._open: PrivateDir | None = None
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._memory: dict[str, Entry] = {}
        self._making: dict[str, threading.Lock] = {}
        self._warned = False

    # ------------------------------------------------------------ what callers use

    def get(self, key: Key, legal: Legal | None = None) -> Entry | None:
        """The measured entry of a key, else the predicted one; None for a miss.

        Args:
            legal: says of knobs why they may not be used; entries it objects to are misses.
        """
        folder, refused = self._folder(create=False), []
        for suffix in SUFFIXES:
            entry = self._read(folder, _stem(key) + suffix) if folder else None
            if entry is not None:
                if self._fits(entry, key, suffix, legal):
                    return self._count("hit", entry)
                refused.append(entry)
        entry = self._memory.get(key.digest)
        if entry is not None and entry.key == key and entry not in refused and self._legal(entry, legal):
            return self._count("hit_in_memory", entry)
        self._count("miss")
        return None

    def put(self, entry: Entry) -> bool:
        """Keep an entry; whether it is on disk now. A prediction is not kept where there is a measurement.

        The newer of two measurements stays. An entry that the disk does not take is kept in memory.
        """
        try:
            data = encode(entry)
        except Broken:
            self._count("not_written")
            return False
        with self._lock:
            known = self._memory.get(entry.key.digest)
            if known is None or entry.measured or not known.measured:
                if len(self._memory) >= _MEMORY:
                    self._memory.pop(next(iter(self._memory)))
                self._memory[entry.key.digest] = entry
        folder = self._folder(create=True)
        if folder is None:
            return False
        stem = _stem(entry.key)
        if not entry.measured and self._measured(folder, entry.key):
            return True
        if not self._write(folder, stem + f".{entry.kind}", data):
            return False
        if entry.measured:
            with suppress(OSError):  # the prediction it replaces, if there was one
                os.unlink(stem + ".predicted", dir_fd=folder.fd)
        self._count("put")
        return True

    def find_or_make(self, key: Key, make: Callable[[], Entry | None], legal: Legal | None = None) -> Entry | None:
        """The entry of a key, or what ``make`` gives, which is then kept. In a process one thread makes it."""
        with self._lock:
            making = self._making.setdefault(key.digest, threading.Lock())
        with making:
            entry = self.get(key, legal)
            if entry is None and (entry := make()) is not None:
                self.put(entry)
        return entry

    def nearest(self, key: Key, limit: int = 3) -> list[Entry]:
        """Entries of the same computation on the same device, closest shapes first: where a search may start.

        Their tiles need not be legal for ``key``.
        """
        near: dict[str, tuple[float, Entry]] = {}
        for _, entry in self._entries(key.computation[:16] + "-"):
            apart = distance(key, entry.key)
            if apart is not None and entry.key != key:
                known = near.get(entry.key.digest)
                if known is None or entry.measured:
                    near[entry.key.digest] = apart, entry
        ranked = sorted(near.values(), key=lambda x: (x[0], not x[1].measured, x[1].key.digest))
        return [entry for _, entry in ranked[:limit]]

    def entries(self) -> list[Entry]:
        """One entry a key, measured before predicted, in the order of their digests."""
        best: dict[str, Entry] = {}
        for _, entry in self._entries():
            if entry.measured or entry.key.digest not in best:
                best[entry.key.digest] = entry
        return [best[d] for d in sorted(best)]

    def stats(self) -> dict[str, int]:
        """Counters of this object: ``hit``, ``hit_in_memory``, ``miss``, ``put``, and one a kind of fault:
        ``unsafe_directory``, ``symlink``, ``foreign``, ``not_a_file``, ``too_large``, ``unreadable``, ``corrupt``,
        ``wrong_key``, ``illegal``, ``not_written``."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    # ------------------------------------------------------------ files

    def files(self) -> list[str]:
        """Names of all files in the directory, sorted."""
        folder = self._folder(create=False)
        if folder is None:
            return []
        try:
            # a descriptor of its own: threads and forks would share the place where a listing stands
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder.fd)
            try:
                return sorted(os.listdir(fd))
            finally:
                os.close(fd)
        except OSError:
            self._count("unreadable")
            return []

    def inspect(self, name: str) -> tuple[Entry | None, str]:
        """The entry in one file, or what is wrong with it: ``leftover`` is a writer's temporary file."""
        folder = self._folder(create=False)
        if folder is None:
            return None, "missing"
        if name.startswith(_TEMPORARY):
            return None, "leftover"
        if not name.endswith(SUFFIXES):
            return None, "no entry"
        before = self.stats()
        entry = self._read(folder, name)
        if entry is None:
            after = self.stats()
            return None, next((k for k, n in after.items() if n > before.get(k, 0)), "missing")
        if name != f"{_stem(entry.key)}.{entry.kind}":
            return None, "wrong_key"
        return entry, ""

    def age(self, name: str) -> float | None:
        """Seconds since a file was written, by ``clock``; below 0 if the clock was set back. None: no such file."""
        found = self._stat(name)
        return None if found is None else self.clock() - found.st_mtime

    def size(self, name: str) -> int:
        """Bytes of a file, 0 if there is none."""
        found = self._stat(name)
        return 0 if found is None else found.st_size

    def remove(self, name: str) -> bool:
        """Remove one file by its name in the directory; whether it was there."""
        folder = self._folder(create=False)
        if folder is None or "/" in name:
            return False
        try:
            os.unlink(name, dir_fd=folder.fd)
            return True
        except OSError:
            return False

    def sweep(self) -> int:
        """Remove temporary files that no writer can still be at; how many."""
        old = [n for n in self.files() if n.startswith(_TEMPORARY) and (self.age(n) or 0.0) > _LEFTOVER]
        return sum(self.remove(n) for n in old)

    def usable(self, *, create: bool = False) -> str:
        """Why the directory is not used, or nothing."""
        try:
            open_private(self.root, create=create).close()
        except FileNotFoundError:
            return ""
        except OSError as e:
            return str(e)
        return ""

    # ------------------------------------------------------------ inside

    def _count(self, what: str, entry: Entry | None = None) -> Entry | None:
        with self._lock:
            self._counts[what] += 1
        return entry

    def _folder(self, *, create: bool) -> PrivateDir | None:
        """The open directory, checked at every use; None where there is none to use."""
        with self._lock:
            folder = self._open
            if folder is not None and folder.good():
                return folder
            if folder is not None:
                # not closed: another thread may be using the descriptor, whose number must not become another file's
                self._open = None
            try:
                self._open = open_private(self.root, create=create)
                return self._open
            except FileNotFoundError:
                return None
            except OSError as e:
                self._counts["unsafe_directory" if isinstance(e, UnsafeDirectory) else "unreadable"] += 1
                first, self._warned = not self._warned, True
                why = str(e)
        if first:
            warnings.warn(f"tessel: tuned tiles are not kept: {why}", stacklevel=4)
        return None

    def _read(self, folder: PrivateDir, name: str) -> Entry | None:
        """The entry in a file; None, and a counter, for anything else."""
        try:
            # not blocked by a pipe of that name
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder.fd)
        except FileNotFoundError:
            return None
        except OSError as e:
            return self._count("symlink" if e.errno == errno.ELOOP else "unreadable")
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                return self._count("not_a_file")
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                return self._count("foreign")
            if found.st_size > MAX_BYTES:
                return self._count("too_large")
            with os.fdopen(fd, "rb", closefd=False) as file:
                return decode(file.read(MAX_BYTES + 1))
        except Broken:
            return self._count("corrupt")
        except OSError:
            return self._count("unreadable")
        finally:
            os.close(fd)

    def _write(self, folder: PrivateDir, name: str, data: bytes) -> bool:
        for again in (False, True):
            try:
                _write_new(folder, name, data)
                return True
            except OSError as e:
                if again or e.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.sweep():
                    break
        self._count("not_written")
        return False

    def _measured(self, folder: PrivateDir, key: Key) -> bool:
        entry = self._read(folder, _stem(key) + ".measured")
        return entry is not None and self._fits(entry, key, ".measured", None)

    def _fits(self, entry: Entry, key: Key, suffix: str, legal: Legal | None) -> bool:
        if entry.key != key or f".{entry.kind}" != suffix:
            self._count("wrong_key")
            return False
        return self._legal(entry, legal)

    def _legal(self, entry: Entry, legal: Legal | None) -> bool:
        try:
            allowed = legal is None or legal(entry.knobs) is None
        except (TesselError, ArithmeticError, LookupError, TypeError, ValueError):
            allowed = False  # knobs that the check was not written for
        if not allowed:
            self._count("illegal")
        return allowed

    def _entries(self, prefix: str = "") -> Iterator[tuple[str, Entry]]:
        """Sound entries with their files' names."""
        for name in self.files():
            if name.startswith(prefix) and name.endswith(SUFFIXES):
                folder = self._folder(create=False)
                entry = self._read(folder, name) if folder else None
                if entry is not None and name == f"{_stem(entry.key)}.{entry.kind}":
                    yield name, entry

    def _stat(self, name: str) -> os.stat_result | None:
        folder = self._folder(create=False)
        try:
            return os.stat(name, dir_fd=folder.fd, follow_symlinks=False) if folder else None
        except OSError:
            return None


def _stem(key: Key) -> str:
    """A file's name without what kind of entry it is: the computation first, so that its shapes stand together."""
    return f"{key.computation[:16]}-{key.digest[:32]}"


def _write_new(folder: PrivateDir, name: str, data: bytes) -> None:
    """Write a file beside its place and rename it. No fsync: after a power cut it may be torn, which is a miss."""
    temporary = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=folder.fd)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder.fd)
        raise


_caches: dict[Path, Cache] = {}
_caches_lock = threading.Lock()


def default_cache() -> Cache:
    """The cache in the user's own directory, one object a directory.

    Raises:
        TesselError: the user has no home directory, and ``TESSEL_CACHE_DIR`` names no other.
    """
    try:
        root = cache_dir() / "tiles"
    except RuntimeError as e:
        raise TesselError(f"no place for the cache of tuned tiles ({e}): set TESSEL_CACHE_DIR") from e
    with _caches_lock:
        return _caches.setdefault(root, Cache(root))
