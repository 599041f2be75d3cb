"""The release of lightly that is tested, and digits that the lightly tests share."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_report_header() -> str:
    """Print which lightly is tested: a process can import only one."""
    try:
        return f"lightly {importlib.metadata.version('lightly')}"
    except importlib.metadata.PackageNotFoundError:
        return "lightly is NOT tested: it is not installed"


@pytest.fixture(scope="session")
def digits(thin_digits: Callable[[int, int], Path]) -> Path:
    """The real digits, thinned out: 80 training and 40 validation images in a folder a class."""
    return thin_digits(80, 40)
