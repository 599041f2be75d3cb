"""Fixtures of the whole suite."""

from collections.abc import Iterator

import pytest

from plugins.testing import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Three processes in one gloo group; see :mod:`plugins.testing`."""
    with RankPool() as pool:
        yield pool
