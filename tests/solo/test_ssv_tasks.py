"""Self-Supervised-Vision: its metric during training, its checkpoints, and the tasks that evaluate a network."""

import csv
from pathlib import Path

import pytest
import torch

from plugins.tools.neighbors import neighbor_consistency
from solo_ext.checkpoint import find_checkpoint, read_checkpoint
from solo_ext.main_pretrain import pretrain
from solo_ext.ssv.metrics import K, NeighborMetrics

pytestmark = pytest.mark.solo

# the metric during training


@pytest.fixture(scope="module")
def measured(tiny, digits, tmp_path_factory, module_compose):
    """Folders of a run of three epochs that was evaluated every second epoch, and of the same run without that."""


def _rows(folder: Path, column: str) -> dict[int, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["epoch"]) + 1: float(row[column]) for row in csv.DictReader(file) if row.get(column)}


def test_the_metric_is_logged_and_changes_nothing(compose, tiny, capsys):
    overrides = (tiny, "++max_epochs=3", "++checkpoint.version=v")
    plain = pretrain(compose("relic", *overrides, "++name=plain", "++checkpoint.group=plain"))
    folder = pretrain(
        compose("relic", *overrides, "++name=measured", "++checkpoint.group=measured"),
        lambda folder: [NeighborMetrics(folder, every=2)],
    )
    weights = [read_checkpoint(find_checkpoint(run))["state_dict"] for run in (plain, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    shares = {part: _rows(folder, f"val_neighbors_{part}") for part in ("head", "trunk")}
    assert [list(each) for each in shares.values()] == [[2, 3], [2, 3]]
    lines = (folder / "trainlogs.txt").read_text().splitlines()
    assert [line.partition("] [")[0][:24] for line in lines]
    valid = [line for line in lines if line.startswith("[VALID]")]
    assert valid == [f"[VALID] Epoch    {e}/   3 [accuracy] {shares['head'][e] / 100:.4f}" for e in (2, 3)]
    assert [line[:24] for line in lines if line.startswith("[TRAIN]")] == [
        f"[TRAIN] Epoch    {e}/   3" for e in (1, 2, 3)
    ]
    print(lines)
