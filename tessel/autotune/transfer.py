"""Entries as one file that travels: a line that says what it is, a line an entry, a line with the checksum.

    {"entries": 2, "format": 1, "kind": "tessel tiles"}
    {"key": {...}, "knobs": {...}, ...}
    {"key": {...}, "knobs": {...}, ...}
    {"sha256": "..."}

The same entries always give the same bytes. A file is read as a whole and checked before anything is kept, and
nothing in it names a place to write to.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import TesselError
from .cache import Cache
from .entry import MAX_BYTES, Broken, Entry, better, entry_from, parse_json, to_json

__all__ = ["Imported", "dump", "import_entries", "load", "merged", "read_file", "write_file"]

FORMAT = 1
_KIND = "tessel tiles"
_MAX_FILE = 64 * 2**20
_MAX_ENTRIES = 100_000


def dump(entries: Iterable[Entry]) -> bytes:
    """The bytes of an export, one entry a key."""
    chosen = merged(entries)
    lines = [to_json({"kind": _KIND, "format": FORMAT, "entries": len(chosen)})]
    lines += [to_json(e.plain()) for e in chosen]
    body = b"".join(line + b"\n" for line in lines)
    return body + to_json({"sha256": hashlib.sha256(body).hexdigest()}) + b"\n"


def merged(entries: Iterable[Entry]) -> list[Entry]:
    """The better entry of every key (see ``better``), in the order of their digests."""
    best: dict[str, Entry] = {}
    for e in entries:
        known = best.get(e.key.digest)
        best[e.key.digest] = e if known is None else better(known, e)
    return [best[d] for d in sorted(best)]


def load(data: bytes, name: str) -> list[Entry]:
    """The entries of an export.

    Raises:
        TesselError: the bytes are not a whole, sound export of a format known here; ``name`` is who says so.
    """
    try:
        return _load(data)
    except Broken as e:
        raise TesselError(f"{name}: {e}; nothing was taken from it") from e


def _load(data: bytes) -> list[Entry]:
    if len(data) > _MAX_FILE:
        raise Broken(f"more than {_MAX_FILE >> 20} MiB")
    head = data[: MAX_BYTES + 1].partition(b"\n")[0]
    try:
        first = parse_json(head)
    except Broken:
        first = None
    if not isinstance(first, dict) or first.get("kind") != _KIND:
        raise Broken("not an export of tuned tiles")
    version = first.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise Broken(f"written by a newer Tessel (format {version}, this one reads {FORMAT}). Update Tessel")
    if version != FORMAT or set(first) != {"kind", "format", "entries"}:
        raise Broken("the first line is not that of an export")
    count = first["entries"]
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MAX_ENTRIES:
        raise Broken(f"the number of entries must be from 0 to {_MAX_ENTRIES}")
    if not data.endswith(b"\n") or data.count(b"\n") != count + 2:
        raise Broken(f"truncated, or longer than it says ({count} entries)")
    body, last = data[: data.rindex(b"\n", 0, -1) + 1], data[data.rindex(b"\n", 0, -1) + 1 : -1]
    if last != to_json({"sha256": hashlib.sha256(body).hexdigest()}):
        raise Broken("the checksum is wrong: the file was changed after it was written")
    entries = []
    for number, line in enumerate(body.split(b"\n")[1:-1], 2):
        try:
            entries.append(entry_from(parse_json(line)))
        except Broken as e:
            raise Broken(f"line {number}: {e}") from e
    if len({e.key.digest for e in entries}) != len(entries):
        raise Broken("a key stands twice")
    return entries


def read_file(path: Path) -> list[Entry]:
    """The entries of an export file.

    Raises:
        TesselError: it cannot be read, or see ``load``.
    """
    try:
        # not blocked by a pipe of that name
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise TesselError(f"{path} is not a file")
            data = file.read(_MAX_FILE + 1)
    except OSError as e:
        raise TesselError(f"cannot read {path}: {e.strerror}") from e
    return load(data, str(path))


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        TesselError: it cannot be written; what was there before is as it was.
    """
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as e:
        raise TesselError(f"cannot write {path}: {e.strerror}") from e


@dataclass(frozen=True)
class Imported:
    """How many entries were new, replaced a worse one, or were no better than what is there."""

    new: int
    replaced: int
    kept: int


def import_entries(cache: Cache, entries: Iterable[Entry]) -> Imported:
    """Put entries into a cache where they are better than its own (see ``better``).

    Raises:
        TesselError: the cache cannot be written to.
    """
    why = cache.usable(create=True)
    if why:
        raise TesselError(f"the cache cannot be used: {why}")
    own = {e.key.digest: e for e in cache.entries()}
    counts = {"new": 0, "replaced": 0, "kept": 0}
    for entry in merged(entries):
        mine = own.get(entry.key.digest)
        if mine is not None and better(mine, entry) == mine:
            counts["kept"] += 1
            continue
        if not cache.put(entry):
            done = counts["new"] + counts["replaced"]
            raise TesselError(f"the cache in {cache.root} takes no more: {done} entries were written, then one was not")
        counts["new" if mine is None else "replaced"] += 1
    return Imported(**counts)


def readable(entry: Entry) -> str:
    """An entry as indented JSON, for people."""
    return json.dumps({**entry.plain(), "kind": entry.kind, "digest": entry.key.digest}, indent=2)
