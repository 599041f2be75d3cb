"""Fixtures of the whole suite."""

import os
from collections.abc import Iterator

import pytest

from plugins.testing import RankPool


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Undo what a test leaves in the environment: Lightning's DDP writes LOCAL_RANK and WORLD_SIZE into it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Three processes in one gloo group; see :mod:`plugins.testing`."""
    with RankPool() as pool:
        yield pool
