"""The faults of ``make test-faults``, fewer of each: no wrong read, no crash, nothing tuned twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import faults
import pytest

from tessel.autotune import cache as cache_module
from tessel.autotune.cache import Cache
from tessel.autotune.entry import entry_from, parse_json


@pytest.mark.parametrize("case", faults.CASES)
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_wrong_nothing_crashes_nothing_is_tuned_twice(case: str) -> None:
    out = faults.run(case, faults.QUICK)
    assert out.ok and out.reads > 0, out
    if case not in ("corrupt exports", "planted links"):
        assert out.tuned == 1, out


def test_a_disk_that_is_full_by_a_limit_on_files(tmp_path: Path) -> None:
    """What the case does where no tmpfs may be mounted."""
    out = faults.limited_disk(tmp_path)
    assert out.ok and out.seen["not_written"] > 0, out


def _unchecked(data: bytes) -> object:
    """A reader that believes every file."""
    return entry_from(parse_json(data[12:-32]))


def _through_links(cache: Cache, folder: object, name: str) -> object:
    return cache_module.decode((cache.root / name).read_bytes()) if (cache.root / name).exists() else None


def _in_place(folder: Any, name: str, data: bytes) -> None:
    """No temporary file: whoever is killed leaves half an entry in its place."""
    (folder.path / name).write_bytes(data[: len(data) // 2])
    (folder.path / name).chmod(0o600)
    time.sleep(0.01)  # long enough that readers see it
    (folder.path / name).write_bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "where", "name", "value"),
    [
        ("corrupt files", cache_module, "decode", _unchecked),
        ("planted links", Cache, "_read", _through_links),
        ("full disk", Cache, "put", lambda self, entry: True),
        ("killed writers", cache_module, "_write_new", _in_place),
    ],
)
def test_a_worse_cache_is_noticed(
    case: str, where: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, value)
    assert not faults.run(case, faults.QUICK).ok
