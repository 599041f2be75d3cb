"""The release of lightly that is tested, and digits that the lightly tests share."""

import importlib.metadata
import os
import shutil
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
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real digits, thinned out: 80 training and 40 validation images in a folder a class."""
    from plugins.tools.data import make_digits

    full = tmp_path_factory.mktemp("full") / "digits"
    make_digits(full)
    few = tmp_path_factory.mktemp("few")
    for split, count in (("train", 8), ("val", 4)):
        for folder in sorted((full / split).iterdir()):
            (few / split / folder.name).mkdir(parents=True)
            for source in sorted(folder.iterdir())[:count]:
                shutil.copy(source, few / split / folder.name)
    return few
