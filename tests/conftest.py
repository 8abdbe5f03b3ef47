"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from offline_record import Recorded


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


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache directory of the module's own: nothing built before is found."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TESSEL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache directory that the modules of this run that use it have in common, in all its processes: kernels of few
    bits take the compiler seconds each, and many tests need the same ones."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TESSEL_CACHE_DIR", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        yield


@pytest.fixture
def same_start() -> Iterator[None]:
    """The same random numbers and the same number of threads for every test; nothing traced before."""
    import torch

    torch._dynamo.reset()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def offline(request: pytest.FixtureRequest) -> Recorded:
    """Compile for GPUs that are absent, what is not known by its rows."""
    return Recorded(request.node.nodeid, request.config.getoption("--bless"))
