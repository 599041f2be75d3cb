"""The VISSL runs of the suite digits: commands, collected results, and one training."""

import json
from pathlib import Path

import pytest

from plugins.experiments import run as experiments
from plugins.experiments.suites import Request, vissl
from plugins.methods import METHODS

pytestmark = pytest.mark.vissl


def test_every_method_has_a_column(in_checkout):
    names = [run.method for run in vissl.digits(Request())]
    assert names == sorted(METHODS)


def test_commands_name_configuration_seed_folder_and_data(in_checkout):
    request = Request(seeds=[3], epochs=2, out=Path("my results"))
    run = next(run for run in vissl.digits(request) if run.method == "byol")
    pretrain, knn, linear, few = (step.arguments for step in run.steps)
    assert pretrain == (
        *("-m", "vissl_ext.launch", "config=pretrain/byol/digits", "config.SEED_VALUE=3"),
        "config.DATA.TRAIN.DATA_PATHS=[datasets/digits/train]",
        "config.CHECKPOINT.DIR='my results/digits/vissl/byol/seed3/pretrain'",
        "config.OPTIMIZER.num_epochs=2",
    )
    weights = "config.MODEL.WEIGHTS_INIT.PARAMS_FILE='my results/digits/vissl/byol/seed3/pretrain/checkpoint.torch'"
    assert all(weights in step for step in (knn, linear, few))
    assert knn[-1] == "engine_name=knn"
    assert "config.DATA.TRAIN.DATA_PATHS=[datasets/digits/train_5]" in few
    assert "config.OPTIMIZER.num_epochs=100" in few and "config.OPTIMIZER.num_epochs=2" not in linear


def test_progress_is_rows_of_all_epochs(tmp_path):
    assert vissl.progress(tmp_path) is None
    folder = tmp_path / "pretrain"
    folder.mkdir()
    (folder / "train_config.yaml").write_text("OPTIMIZER:\n  num_epochs: 20\n")
    assert vissl.progress(tmp_path) is None
    (folder / "metrics.csv").write_text("epoch,loss\n0,2.0\n1,1.5\n")
    assert vissl.progress(tmp_path) == (2, 20, 1.5, None)


@pytest.mark.slow
def test_a_method_runs_from_training_to_table(few_digits_here, preload, tmp_path, monkeypatch):
    """On fewer images, epochs and labels: the numbers are those that the evaluations wrote."""
    few_digits_here(60, val=20)

    def short(config, overrides, engine="train", original=vissl.command):
        linear = config == vissl.LINEAR and "OPTIMIZER.num_epochs" not in overrides
        return original(config, {**overrides, **({"OPTIMIZER.num_epochs": 6} if linear else {})}, engine)

    monkeypatch.setattr(vissl, "command", short)
    monkeypatch.setattr(vissl, "FEW", {"batch": 50, "epochs": 2})
    preload("vissl")
    assert experiments.main(["digits", "--only", "vissl/ssl_ey", "--epochs", "1"]) == 0
    out = tmp_path / "results"
    folder = out / "digits" / "vissl" / "ssl_ey" / "seed0"
    result = json.loads((folder / "result.json").read_text())
    assert (result["framework"], result["method"], result["epochs"]) == ("vissl", "ssl_ey", 1)
    assert result["knn"] == json.loads((folder / "knn" / "knn.json").read_text())["res5avg"]["top1"]
    lines = (folder / "linear" / "all" / "metrics.json").read_text().splitlines()
    last = [json.loads(line) for line in lines if "test_accuracy" in line][-1]
    assert result["linear"] == last["test_accuracy_list_meter"]["top_1"]["res5avg"]
    assert result["knn"] > 20 and result["linear"] > 20 and 0 < result["linear_5"] <= 100  # chance is 10
    assert result["images_per_second"] > 0 and result["versions"]["vissl"] == "0.1.6"
    assert result["config"]["LOSS"]["name"] == "ssl_ey"
    assert "| SSL-EY |" in (out / "digits" / "table.md").read_text()
