"""The suites in solo-learn: which runs there are, their exact commands, what their results hold; one for real."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from plugins.tools import experiments
from plugins.tools.suites import Request, prepare, solo

ROOT = Path(__file__).parents[2]

# --------------------------------------------------------------------------------------------------------- digits

@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "solo" / "digits"
    folder.mkdir(parents=True)
    for name in ("byol", "ssl_ey", "untrained", "supervised", "linear", "linear_5", "not_a_method"):
        (folder / f"{name}.yaml").touch()
    return lambda **options: {run.name: run for run in solo.digits(Request(**options))}


def test_methods_are_those_with_a_yaml_and_the_baselines(digits):
    assert list(digits()) == [f"solo/{name}/seed0" for name in ("untrained", "byol", "ssl_ey", "supervised")]


def test_pretraining_command_names_yaml_seed_folder_and_data(digits):
    run = digits(seeds=[3], epochs=2, out=Path("my results"))["solo/byol/seed3"]
    assert run.steps[0].arguments == (
        *("-m", "solo_ext.main_pretrain", "--config-path", "configs/solo/digits", "--config-name", "byol.yaml"),
        "++seed=3",
        "++checkpoint.dir='my results/digits/solo'",
        "++checkpoint.version=seed3",
        "++auto_resume.enabled=True",
        "++data.train_path=datasets/digits/train",
        "++data.val_path=datasets/digits/val",
        "++max_epochs=2",
    )
    assert [step.name for step in run.steps] == ["pretrain", "knn", "linear", "linear_5"]


def test_epochs_change_the_training_of_backbones_only(digits):
    for name, run in digits(epochs=2).items():
        longer = [step.name for step in run.steps if "++max_epochs=2" in step.arguments]
        expected = {"solo/untrained/seed0": [], "solo/supervised/seed0": ["train"]}
        assert longer == expected.get(name, ["pretrain"])


def test_supervised_starts_from_the_untrained_weights(digits):
    run = digits(seeds=[1])["solo/supervised/seed1"]
    assert run.needs == ("solo/untrained/seed1",)
    assert "++pretrained_feature_extractor=results/digits/solo/untrained/seed1" in run.steps[0].arguments


def test_without_configurations_there_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(solo.importlib.util, "find_spec", lambda name: None)
    assert experiments.main(["digits", "--list"]) == 2
    assert capsys.readouterr().err.startswith("error: no folder configs/solo/digits here")


@pytest.mark.parametrize(("value", "text"), [("a/b-1.c", "a/b-1.c"), ("a=b", "'a=b'"), ("it's", r"'it\'s'"), (3, "3")])
def test_override_values_are_quoted_for_hydra(value, text):
    assert solo.hydra_value(value) == text


def _write_outputs(folder, *, pretrain=True):
    for version, accuracy in (("all", 94.0), ("five", 86.0)):
        (folder / "linear" / version).mkdir(parents=True)
        content = {"acc1": accuracy, "best_acc1": 99.0, "epochs": 50, "images_per_second": 900.0, "seconds": 5.0}
        (folder / "linear" / version / "linear.json").write_text(json.dumps(content))
    (folder / "knn.json").write_text(json.dumps([{"feature_type": "backbone", "k": 20, "acc1": 91.0, "acc5": 99.0}]))
    if pretrain:
        content = {"epochs": 25, "images_per_second": 500.0, "seconds": 75.0, "versions": {"torch": "2"}, "config": {}}
        (folder / "pretrain.json").write_text(json.dumps(content))


def test_result_joins_the_numbers_of_all_steps(digits):
    run = digits()["solo/byol/seed0"]
    _write_outputs(run.folder)
    assert solo.collect_digits(run) == {
        "epochs": 25,
        "knn": 91.0,
        "linear": 94.0,
        "linear_5": 86.0,
        "images_per_second": 500.0,
        "seconds": 75.0,
        "versions": {"torch": "2"},
        "config": {},
    }


def test_supervised_result_takes_its_own_accuracy_as_linear(digits):
    run = digits()["solo/supervised/seed0"]
    _write_outputs(run.folder, pretrain=False)
    result = solo.collect_digits(run)
    assert (result["epochs"], result["linear"], result["linear_5"], result["seconds"]) == (50, 94.0, 86.0, 5.0)
