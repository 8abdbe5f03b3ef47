"""Looking after a cache: is every file sound, and what may go."""

from __future__ import annotations

from dataclasses import dataclass

from .cache import Cache
from .entry import Entry
from .key import template_digest, version_of

__all__ = ["Checked", "Pruned", "prune", "stale", "verify"]


@dataclass(frozen=True)
class Checked:
    """``sound`` entries' file names, and ``broken``: file name -> what is wrong with it."""

    sound: tuple[str, ...]
    broken: dict[str, str]


def verify(cache: Cache) -> Checked:
    """Read every file of a cache. Nothing is changed."""
    sound, broken = [], {}
    for name in cache.files():
        entry, wrong = cache.inspect(name)
        if entry is not None:
            sound.append(name)
        else:
            broken[name] = wrong
    return Checked(tuple(sound), broken)


@dataclass(frozen=True)
class Pruned:
    """Removed files with the reason; files and bytes that are left."""

    removed: dict[str, str]
    left: int
    bytes_left: int


def stale(entry: Entry) -> str:
    """Why an entry cannot be hit by this Tessel, or nothing: another version or template, or another Triton."""
    now = {
        "tessel": version_of("tessel"),
        "triton": ".".join(version_of("triton").split(".")[:2]),
        "template": template_digest(entry.key.family),
    }
    return next((f"{n} {getattr(entry.key, n)}, now {v}" for n, v in now.items() if getattr(entry.key, n) != v), "")


def prune(
    cache: Cache,
    *,
    older_than: float | None = None,
    versions: bool = False,
    max_bytes: int | None = None,
) -> Pruned:
    """Remove broken files and leftovers of dead writers, and what the arguments say.

    Args:
        older_than: seconds since an entry was written. A clock that was set back makes files younger, never older.
        versions: remove what other versions of Tessel, its templates and Triton left.
        max_bytes: remove predictions first, then measurements, oldest first, until no more than this is left.
    """
    removed: dict[str, str] = {}
    left: list[tuple[bool, float, str, int]] = []

    def remove(name: str, why: str) -> None:
        if cache.remove(name):
            removed[name] = why

    for name in cache.files():
        age = cache.age(name)
        if age is None:
            continue
        entry, wrong = cache.inspect(name)
        if entry is None:
            if wrong == "leftover":
                continue  # sweep() knows which of them are old
            if wrong not in ("missing", "unreadable"):
                remove(name, wrong)
        elif versions and (why := stale(entry)):
            remove(name, why)
        elif older_than is not None and age > older_than:
            remove(name, f"{age / 86400:.0f} days old")
        else:
            left.append((bool(entry.measured), -age, name, cache.size(name)))
    before = set(cache.files())
    if cache.sweep():
        removed.update((n, "leftover") for n in before - set(cache.files()))
    total = sum(size for *_, size in left)
    kept = len(left)
    for _, _, name, size in sorted(left):
        if max_bytes is None or total <= max_bytes:
            break
        remove(name, "for its size")
        total, kept = total - size, kept - 1
    return Pruned(removed, kept, total)
