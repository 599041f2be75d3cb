"""The release of lightly that is tested, and digits that the lightly tests share."""

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_report_header() -> str:
    """Say which lightly is tested: a process holds one."""
    try:
        release = importlib.metadata.version("lightly")
    except importlib.metadata.PackageNotFoundError:
        return "lightly is NOT tested: it is not installed"
    older = "LIGHTLY_1_5_PYTHON"
    if release.startswith("1.5.") or older in os.environ:
        return f"lightly {release}"
    return f"lightly {release}; 1.5.26 is NOT tested: {older} names no interpreter that has it"


@pytest.fixture(scope="session")
def digits(thin_digits: Callable[[int, int], Path]) -> Path:
    """The real digits, thinned out: 80 training and 40 validation images in a folder a class."""
    return thin_digits(80, 40)
