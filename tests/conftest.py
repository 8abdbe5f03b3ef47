"""What all tests share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless",
        action="store_true",
        help="rewrite the lower half of golden files with what the passes give now",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Every test traces for itself: nothing is kept for the next run (tests/test_capture_cache.py has its own)."""
    from tessel import capture_cache

    capture_cache.WORTH = float("inf")
