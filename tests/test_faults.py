"""The faults of ``make test-faults``, fewer of each: no wrong read, no crash, nothing tuned twice."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest


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
