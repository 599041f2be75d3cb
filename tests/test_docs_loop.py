"""The complete script of docs/lightly.md: it trains, continues from its checkpoint, and runs on several processes."""

import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from plugins.testing import POOL_SIZE

pytestmark = pytest.mark.lightly
PAGE = (Path(__file__).parents[1] / "docs" / "lightly.md").read_text()
(SCRIPT,) = re.findall(r'```python title="train.py"\n(.*?)```', PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def work(thin_digits: Callable[[int, int], Path]) -> Path:
    """A folder with few of the digits in datasets/digits."""
    return thin_digits(60, 20).parents[1]


def _write(work: Path, epochs: int) -> None:
    small = f"EPOCHS, BATCH = {epochs}, 8"
    text, changes = re.subn(r"EPOCHS, BATCH = \d+, \d+", small, SCRIPT)
    assert changes == 1
    (work / "train.py").write_text(text)


def test_script_is_short():
    assert len(SCRIPT.splitlines()) <= 60


def test_script_trains_and_continues(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    _write(work, 1)
    runpy.run_path("train.py")
    printed = capsys.readouterr().out
    assert re.fullmatch(r"epoch 1: loss [\d.]+\nkNN [\d.]+ %\n", printed), printed
    _write(work, 2)
    made = runpy.run_path("train.py")
    printed = capsys.readouterr().out
    assert re.fullmatch(r"epoch 2: loss [\d.]+\nkNN [\d.]+ %\n", printed), printed
    per_epoch = 60 // 8
    assert int(made["model"].moment.steps) == 2 * per_epoch * len(made["batch"])


def _run(comm: Any, rank: int, folder: str) -> dict[str, torch.Tensor]:
    before = Path.cwd()
    os.chdir(folder)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        with mock.patch.dict(os.environ, place), mock.patch("torch.distributed.init_process_group"):  # the pool has one
            made = runpy.run_path("train.py")
    finally:
        os.chdir(before)
    return dict(made["model"].named_parameters())


@pytest.mark.slow
@pytest.mark.ddp
def test_script_trains_one_model_on_several_processes(work, tmp_path, ranks):
    _write(work, 1)
    (work / "train.py").rename(tmp_path / "train.py")
    (tmp_path / "datasets").symlink_to(work / "datasets")
    found = ranks.run(_run, [(rank, str(tmp_path)) for rank in range(POOL_SIZE)])
    assert (tmp_path / "isoloss.pt").is_file()
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name
