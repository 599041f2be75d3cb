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


@pytest.fixture(scope="module")
def augmented_digits(all_digits: Path) -> tuple[list, Callable[..., list]]:
    """Return what all methods share: six times two augmented epochs as batches, and images that are decoded once."""
    import torch

    from lightly_ext.examples import common

    torch.manual_seed(0)
    loader = common.views(all_digits / "train")
    open_dataset, opened = common.dataset, {}

    def dataset(folder: Path, transform: Callable | None = None) -> list:
        name = folder, str(transform)
        if name not in opened:
            opened[name] = list(open_dataset(folder, transform))
        return opened[name]

    return [batch for _ in range(2) for batch in loader] * 6, dataset
