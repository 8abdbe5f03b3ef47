"""Generated source text: written to a directory for people to read, executed from memory.

What runs is always the text just generated, never a file found on disk. The file name is the
text's hash, so that any number of processes can write at once; ``linecache`` knows the text, so that
tracebacks and Triton (which reads a kernel's source) find it even where the directory cannot be written.
"""

from __future__ import annotations

import hashlib
import linecache
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["execute", "place"]

_warned: set[str] = set()


def place(name: str, text: str, directory: Path, suffix: str = ".py") -> Path:
    """Write ``text`` under a name that holds its hash; returns the path, written or not.

    A directory that cannot be written to is said once and costs nothing but the file.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    path = directory / f"{name}_{digest}{suffix}"
    try:
        if path.exists() and path.read_text() == text:
            return path
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as f:
                f.write(text)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as e:
        if str(directory) not in _warned:
            _warned.add(str(directory))
            warnings.warn(f"tessel: generated sources are not kept: {e}", stacklevel=2)
    return path


def execute(text: str, path: Path, names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the text as a module body and return its namespace."""
    file = str(path)
    # No modification time: linecache then never looks at the file.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {
        "__name__": f"tessel_generated.{path.stem}",
        "__file__": file,
        **(names or {}),
    }
    exec(compile(text, file, "exec"), namespace)
    return namespace
