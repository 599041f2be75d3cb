"""Fixtures of the tests of the suites."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in the checkout, whose configs/ the suites look for."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def few_digits_here(all_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """few_digits_here(train) makes tmp_path a folder to run suites in: our YAML, ``train`` and 5 digits of a class."""

    def make(train: int) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        shutil.copytree(all_digits, "datasets/digits")
        for split, left in (("train", train), ("val", 5)):
            for label in (tmp_path / "datasets" / "digits" / split).iterdir():
                for image in sorted(label.iterdir())[left:]:
                    image.unlink()

    return make
