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


@pytest.fixture(scope="session")
def augmented_digits(all_digits: Path) -> tuple[list, Callable[..., list]]:
    """Return what all methods share: twelve times an augmented epoch as batches, and images that are decoded once."""
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

    return [*loader] * 12, dataset


@pytest.fixture
def narrow_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the network and the heads of the examples narrower.

    If batch norm's statistics are computed and nothing is learned, kNN rises by at most 4.2 points in this network.
    In the wider one of the examples it would rise by 11.
    """
    from lightly_ext.examples import common

    heads = {"proj_hidden_dim": 128, "proj_output_dim": 64, "pred_hidden_dim": 128}
    monkeypatch.setattr(common, "CHANNELS", 8)
    monkeypatch.setattr(common, "WIDTHS", {**heads, "n_classes": 256, "num_prototypes": 64})
