"""The garbage collector's thresholds are left as they were found."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tessel.frontend.collector import fewer_collections


@pytest.fixture(autouse=True)
def _back() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_raised_inside_and_set_back_even_after_an_error() -> None:
    gc.set_threshold(700, 10, 10)
    with pytest.raises(KeyError), fewer_collections():
        assert gc.get_threshold()[0] > 100_000 and gc.get_threshold()[1:] == (10, 10)
        raise KeyError
    assert gc.get_threshold() == (700, 10, 10)


def test_nested_blocks_set_back_once() -> None:
    gc.set_threshold(700, 10, 10)
    with fewer_collections():
        with fewer_collections():
            pass
        assert gc.get_threshold()[0] > 100_000
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("own", [(0, 10, 10), (1_000_000, 5, 5)])
def test_a_collector_that_is_off_or_rare_stays_so(own: tuple[int, int, int]) -> None:
    gc.set_threshold(*own)
    with fewer_collections():
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


def test_what_the_program_sets_meanwhile_stays() -> None:
    with fewer_collections():
        gc.set_threshold(123, 4, 5)
    assert gc.get_threshold() == (123, 4, 5)
