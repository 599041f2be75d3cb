"""The suite of Matrix-SSL and MEC: runs, commands and collected results."""

import json
import pickle
from pathlib import Path

import pytest

from plugins.experiments import report_datasets
from plugins.experiments import run as experiments
from plugins.experiments.report import read_rows
from plugins.experiments.suites import Request, matrix_ssl, solo, vissl
from plugins.testing import composed

ROOT = Path(__file__).parents[2]


def test_both_methods_for_100_200_and_400_epochs(in_checkout):
    wanted = [f"{m}-e{e}_imagenet" for m in ("matrix_ssl", "mec") for e in (100, 200, 400)]
    for framework, runs in (("solo", matrix_ssl.in_solo), ("vissl", matrix_ssl.in_vissl)):
        found = runs(Request())
        assert [run.name for run in found] == [f"{framework}/{name}/seed0" for name in wanted]
        assert len({run.folder for run in found}) == 6
        assert all([step.name for step in run.steps] == ["pretrain", "linear", "export"] for run in found)


@pytest.mark.slow
def test_steps_hand_their_files_on_in_solo(in_checkout):
    for run in matrix_ssl.in_solo(Request(data_folder=Path("/data"))):
        pretrain = composed(run.steps[0].arguments)
        linear = composed(run.steps[1].arguments, "main_linear")
        assert (pretrain.method, pretrain.max_epochs, pretrain.backbone.name) == (run.method, run.epochs, "resnet50")
        assert Path(pretrain.checkpoint.dir, pretrain.checkpoint.group, pretrain.checkpoint.version) == run.folder
        assert Path(linear.pretrained_feature_extractor) == run.folder
        assert (linear.normalized_classifier, linear.data.val_path) == (True, "/data/imagenet/val")
        export = run.steps[2].arguments
        assert (export[2], export[-2:]) == (str(run.folder), ("detectron2", str(run.folder / "backbone.pkl")))


def test_steps_hand_their_files_on_in_vissl(in_checkout):
    runs = {run.label: run for run in matrix_ssl.in_vissl(Request(devices=4))}
    for name, config in {
        "mec-e100_imagenet": "pretrain/mec/imagenet_rn50",
        "matrix_ssl-e400_imagenet": "pretrain/matrix_ssl/imagenet_rn50_e400",
    }.items():
        run = runs[name]
        pretrain, linear, export = (step.arguments for step in run.steps)
        assert pretrain[2] == f"config={config}"
        assert f"config.CHECKPOINT.DIR={run.folder}/pretrain" in pretrain
        assert "config.DISTRIBUTED.NUM_PROC_PER_NODE=4" in pretrain
        assert not any("num_epochs" in argument for argument in pretrain)  # set in the YAML file
        assert f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={run.folder}/pretrain/checkpoint.torch" in linear
        assert not any("NUM_PROC" in argument for argument in linear)
        assert export[2] == f"{run.folder}/pretrain/checkpoint.torch"


def test_epochs_of_the_user_replace_the_three_lengths(in_checkout):
    for runs in (matrix_ssl.in_solo, matrix_ssl.in_vissl):
        assert [run.label for run in runs(Request(epochs=3))] == ["matrix_ssl-e3_imagenet", "mec-e3_imagenet"]
        assert [run.label for run in runs(Request(data=["digits"]))] == ["matrix_ssl_digits", "mec_digits"]
    (step, *_) = matrix_ssl.in_vissl(Request(epochs=3))[0].steps
    assert "config.OPTIMIZER.num_epochs=3" in step.arguments


def test_without_imagenet_there_is_one_sentence(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert experiments.main(["matrix_ssl"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: imagenet is not in datasets/imagenet: download it manually, and put")
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_result_holds_the_last_and_the_best_epoch(in_checkout, tmp_path):
    training = {"epochs": 3, "seconds": 5.0, "images_per_second": 9.0, "versions": {}, "config": {}}
    run = matrix_ssl.in_solo(Request(out=tmp_path))[0]
    (run.folder / "linear" / "all").mkdir(parents=True)
    (run.folder / "pretrain.json").write_text(json.dumps({**training, "metrics": {"val_acc1": 60.0}}))
    content = {"acc1": 70.0, "acc5": 90.0, "best_acc1": 71.0}
    (run.folder / "linear" / "all" / "linear.json").write_text(json.dumps(content))
    scores = {"linear": 70.0, "linear_top5": 90.0, "linear_best": 71.0}
    assert matrix_ssl.collect_solo(run) == {"online": 60.0, **scores, **training}

    run = matrix_ssl.in_vissl(Request(out=tmp_path))[0]
    for part in ("pretrain", "linear"):
        (run.folder / part).mkdir(parents=True)
    (run.folder / "pretrain" / "summary.json").write_text(json.dumps(training))
    lines = [{"train_accuracy_list_meter": {}}]
    lines += [{"test_accuracy_list_meter": {"top_1": {"0": a}, "top_5": {"0": a + 20}}} for a in (71.0, 70.0)]
    (run.folder / "linear" / "metrics.json").write_text("\n".join(json.dumps(line) for line in lines))
    assert matrix_ssl.collect_vissl(run) == {**scores, **training}


def test_table_tells_the_frameworks_apart(tmp_path):
    suite = tmp_path / "matrix_ssl"
    for framework, linear in (("solo", 70.0), ("vissl", 69.0)):
        folder = suite / framework / "mec-e100_imagenet" / "seed0"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"epochs": 100, "linear": linear, "seconds": 60.0}))
    rows = read_rows(suite)
    assert report_datasets.names(rows) == ["mec-e100 (solo)", "mec-e100 (vissl)"]
    assert report_datasets.names(rows[:1]) == ["mec-e100"]
    table = report_datasets.write(suite)
    assert table is not None
    (line,) = [line for line in table.splitlines() if "mec-e100 (vissl)" in line]
    assert "69.0" in line and "70.80" in line


@pytest.fixture
def short_linear(monkeypatch):
    """Two epochs of linear evaluation, both tested, in place of the twelve of the YAML files."""

    def in_solo(step, configs, name, overrides, original=solo.linear_step):
        return original(step, configs, name, {**overrides, "max_epochs": 2, "check_val_every_n_epoch": 1})

    def in_vissl(config, overrides, original=vissl.command):
        short = {"OPTIMIZER.num_epochs": 2, "TEST_EVERY_NUM_EPOCH": 1} if config.startswith("benchmark/") else {}
        return original(config, {**overrides, **short})

    monkeypatch.setattr(solo, "linear_step", in_solo)
    monkeypatch.setattr(vissl, "command", in_vissl)


@pytest.mark.slow
def test_a_trial_on_the_digits_goes_through_all_steps(tmp_path, few_digits_here, short_linear, preload, capfd):
    few_digits_here(7, val=2)  # two batches of 32 in the training, one of 64 in the linear evaluation
    preload("solo", "vissl")
    options = ("--data", "digits", "--framework", "all", "--only", "mec", "--epochs", "1")
    assert experiments.main(["matrix_ssl", *options]) == 0, capfd.readouterr()
    suite = tmp_path / "results" / "matrix_ssl"
    table = (suite / "table.md").read_text()
    for framework in ("solo", "vissl"):
        folder = suite / framework / "mec-e1_digits" / "seed0"
        result = json.loads((folder / "result.json").read_text())
        assert result["epochs"] == 1
        assert 0 <= result["linear"] <= result["linear_best"] <= 100 and 0 < result["linear_top5"] <= 100
        detector = pickle.loads((folder / "backbone.pkl").read_bytes())  # ours, just written
        assert detector["model"]["res5.2.conv3.weight"].shape == (2048, 512, 1, 1)
        assert f"mec-e1 ({framework})" in table
