"""VISSL's stock configurations run; the commands are those of docs/vissl_stock.md."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.vissl, pytest.mark.slow]

WANTED = (
    "SimCLR",
    "SwAV",
    "MoCo",
    "Barlow Twins",
    "DINO, DeiT",
    "DeepCluster v2",
    "PIRL, jigsaw and memory bank",
    "NPID",
)

_SHORT = ("DATA_LIMIT=16", "BATCHSIZE_PER_REPLICA=8", "TRANSFORMS.0.size=32", "TRANSFORMS.1.size=32")
"""Ends of overrides that make an evaluation short."""


@pytest.fixture(scope="module")
def trained(stock_commands: dict, tmp_path_factory: pytest.TempPathFactory, launches: Callable) -> dict[str, tuple]:
    """Method → the result of its command, and the run's folder."""
    folder = tmp_path_factory.mktemp("stock")
    rng = np.random.default_rng(0)
    np.save(folder / "permutations.npy", np.stack([rng.permutation(9) for _ in range(20)]))
    places = {method: folder / re.sub(r"\W", "_", method) for method in stock_commands}
    jobs = [{"argv": stock_commands[method](place, 1), "folder": str(folder)} for method, place in places.items()]
    return {method: (result, places[method]) for method, result in zip(places, launches(jobs), strict=True)}


def test_page_has_the_methods_that_vissl_is_known_for(stock_commands):
    assert set(WANTED) <= set(stock_commands)


def test_two_iterations_and_a_checkpoint(stock, trained):
    result, folder = trained[stock]
    assert result["status"] == 0, result["output"][-3000:]
    saved = torch.load(folder / "checkpoint.torch", weights_only=False)
    assert saved["iteration"] == 2
    loss = float(re.search(r"epoch 1/1  train loss (\S+)", result["output"]).group(1))
    assert 0 < loss < 100
    log = (folder / "log.txt").read_text()
    assert "Starting training" in log and "Starting training" not in result["output"]


def test_a_run_can_be_evaluated_with_the_command_of_the_page(trained, launches, few_digits):
    _, folder = trained["SimCLR"]
    page = (Path(__file__).parents[2] / "docs" / "vissl_stock.md").read_text()
    (command,) = re.findall(r"vissl_ext\.launch (config=benchmark/nearest_neighbor.*?)\npython", page, re.DOTALL)
    command = (
        command.replace("\\\n", " ").replace("datasets/digits", str(few_digits)).replace("runs/stock", str(folder))
    )
    short = [f"config.DATA.{split}.{what}" for split in ("TRAIN", "TEST") for what in _SHORT]
    argv = [*command.split(), *short, "config.DATA.NUM_DATALOADER_WORKERS=0"]
    (result,) = launches([{"argv": argv, "folder": str(folder.parent)}])
    assert result["status"] == 0, result["output"][-3000:]
    assert "kNN of heads: top-1" in result["output"] and (folder / "knn" / "knn.json").is_file()
