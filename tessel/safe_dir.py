"""A directory that only this user can write to, for what is read back and believed later.

    folder = open_private(cache_dir() / "tiles")     # made if it is not there
    fd = os.open("name", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder.fd)

A directory of somebody else's, one that others may write to, and a symlink are refused: whoever can write there
could plant files. The checks are made on an open descriptor, and files are opened relative to it, so that nobody
can swap the directory between the check and the use.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PrivateDir", "UnsafeDirectory", "open_private"]

_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class UnsafeDirectory(OSError):
    """A directory that somebody else could write to, or one that is none."""


@dataclass(frozen=True)
class PrivateDir:
    """An open, checked directory. ``fd`` is good for ``dir_fd=`` and is closed by ``close``."""

    path: Path
    fd: int

    def close(self) -> None:
        os.close(self.fd)

    def good(self) -> bool:
        """Whether ``path`` still names this directory, and nobody else may write to it."""
        try:
            found, mine = os.lstat(self.path), os.fstat(self.fd)
            _check(self.path, mine)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def open_private(path: Path, *, create: bool = True) -> PrivateDir:
    """Open ``path``, made with mode 0700 together with what leads to it unless ``create`` is false.

    Raises:
        UnsafeDirectory: it is a symlink, no directory, another user's, or others may write to it; or the directory
            it lies in is a symlink or may be written to by everybody.
        OSError: it cannot be made or opened.
    """
    if os.open not in os.supports_dir_fd or not hasattr(os, "getuid"):
        raise UnsafeDirectory(f"{path}: this system has no means to check who may write to a directory")
    parent = path.parent
    if create:
        _make(path)
    above = os.lstat(parent)
    if stat.S_ISLNK(above.st_mode):
        raise UnsafeDirectory(f"{parent} is a symlink")
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise UnsafeDirectory(f"{parent} may be written to by everybody (mode {stat.S_IMODE(above.st_mode):o})")
    try:
        fd = os.open(path, _FLAGS)
    except NotADirectoryError:
        raise UnsafeDirectory(f"{path} is {'a symlink' if path.is_symlink() else 'not a directory'}") from None
    except OSError as e:
        if path.is_symlink():  # ELOOP
            raise UnsafeDirectory(f"{path} is a symlink") from None
        raise e
    try:
        _check(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return PrivateDir(path, fd)


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeDirectory(f"{path} is not a directory")
    if found.st_uid != os.getuid():
        raise UnsafeDirectory(f"{path} belongs to another user")
    if found.st_mode & 0o022:
        raise UnsafeDirectory(f"{path} is open to other users (mode {stat.S_IMODE(found.st_mode):o}, not 700)")


def _make(path: Path) -> None:
    """``mkdir -p`` with 0700 for all that is new (``Path.mkdir`` gives its mode to the last one alone)."""
    new: list[Path] = []
    at = path
    while not os.path.lexists(at):
        new.append(at)
        at = at.parent
    for folder in reversed(new):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:  # another process was faster; what it made is checked like any other
            continue
