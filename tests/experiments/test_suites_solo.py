"""The suites in solo-learn: runs, commands, collected results, and one training."""

import json
import re
from pathlib import Path

import pytest

from plugins.experiments import run as experiments
from plugins.experiments.suites import Request, prepare, solo
from plugins.testing import composed

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


RESUMED = ("++auto_resume.enabled=True", f"++auto_resume.max_hours={365 * 24}")


def test_methods_are_those_with_a_yaml_and_the_baselines(digits):
    assert list(digits()) == [f"solo/{name}/seed0" for name in ("untrained", "byol", "ssl_ey", "supervised")]


def test_pretraining_command_names_yaml_seed_folder_and_data(digits):
    run = digits(seeds=[3], epochs=2, out=Path("my results"))["solo/byol/seed3"]
    assert run.steps[0].arguments == (
        *("-m", "solo_ext.main_pretrain", "--config-path", "configs/solo/digits", "--config-name", "byol.yaml"),
        "++seed=3",
        "++checkpoint.dir='my results/digits/solo'",
        "++checkpoint.version=seed3",
        *RESUMED,
        "++data.train_path=datasets/digits/train",
        "++data.val_path=datasets/digits/val",
        "++max_epochs=2",
    )
    assert [step.name for step in run.steps] == ["pretrain", "knn", "linear", "linear_5"]


def test_every_training_resumes_after_a_long_time(digits, in_checkout):
    """A run may wait for days in the queue of a cluster, and be interrupted in any of its trainings."""
    runs = [*digits().values(), *solo.ssl_ey(Request(data=["imagenet100", "cifar10"]))]
    for run in runs:
        for step in run.steps:
            if step.arguments[1] in ("solo_ext.main_pretrain", "solo_ext.main_linear"):
                assert set(RESUMED) <= set(step.arguments), (run.name, step.name)


def test_jobs_have_the_gpus_of_the_configuration_or_those_that_were_asked_for(in_checkout):
    assert {run.gpus for run in solo.implicit_var_reg(Request())} == {1}
    assert {run.gpus for run in solo.implicit_var_reg(Request(devices=2))} == {2}
    assert {run.gpus for run in solo.implicit_var_reg(Request(data=["digits"], devices=2))} == {0}
    for name, data in solo.DATA.items():
        lines = [path.read_text() for path in (ROOT / "configs" / "solo" / data.configs).glob("*linear*.yaml")]
        lines += [path.read_text() for path in (ROOT / "configs" / "solo" / data.configs).glob("matrix_ssl.yaml")]
        devices = {int(found) for text in lines for found in re.findall(r"^devices: (\d+)$", text, re.MULTILINE)}
        assert devices <= {max(data.gpus, 1)}, name


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
    monkeypatch.setattr(solo, "shipped_configs", lambda name: tmp_path / name)
    assert experiments.main(["digits", "--list"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no folder configs/solo, nor")


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


# ------------------------------------------------------------------------------------- implicit_var_reg and ssl_ey


def test_forty_runs_with_the_names_of_the_original_script(in_checkout):
    prefixes = [
        *("byol", "simsiam", "directpred", "directpred-noema", "isoloss", "isoloss-noema"),
        *("directcopy", "directcopy-noema", "directcopy-isocopy", "directcopy-isocopy-noema"),
    ]
    datasets = ("cifar10", "cifar100", "stl10", "tinyimagenet")
    runs = solo.implicit_var_reg(Request())
    assert [run.name for run in runs] == [f"solo/{p}_{d}/seed0" for p in prefixes for d in datasets]
    assert len({run.folder for run in runs}) == 40


@pytest.mark.slow
def test_the_forty_commands_train_what_the_table_says(in_checkout):
    """(method, teacher, weight decay, rho, alpha, eps) of each of the ten blocks, on each of the four data sets."""
    table = {
        "byol": ("byol", 0.99, 1e-5, None, None, None),
        "simsiam": ("byol", 0.0, 1e-5, None, None, None),
        "directpred": ("directpred", 0.99, 1e-4, 0.998, 0.5, 0.0),
        "directpred-noema": ("directpred", 0.0, 1e-4, 0.5, 0.5, 0.0),
        "isoloss": ("isoloss", 0.99, 1e-4, 0.998, 0.5, 0.0),
        "isoloss-noema": ("isoloss", 0.0, 1e-4, 0.5, 0.5, 0.0),
        "directcopy": ("directcopy", 0.99, 1e-4, 0.998, 1.0, 0.25),
        "directcopy-noema": ("directcopy", 0.0, 1e-4, 0.5, 1.0, 0.25),
        "directcopy-isocopy": ("isocopy", 0.99, 1e-4, 0.998, 1.0, 0.25),
        "directcopy-isocopy-noema": ("isocopy", 0.0, 1e-4, 0.5, 1.0, 0.25),
    }
    for run in solo.implicit_var_reg(Request()):
        cfg = composed(run.steps[0].arguments)
        kwargs = cfg.method_kwargs
        powers = (kwargs.get("rho"), kwargs.get("alpha"), kwargs.get("eps"))
        got = (cfg.method, cfg.momentum.base_tau, float(cfg.optimizer.weight_decay), *powers)
        assert got == table[run.method], run.name
        assert (cfg.data.dataset, cfg.name, cfg.max_epochs) == (run.dataset, f"{run.method}_{run.dataset}", 1000)
        assert Path(cfg.checkpoint.dir, cfg.checkpoint.group, cfg.checkpoint.version) == run.folder
        assert cfg.optimizer.name == ("lars" if cfg.momentum.final_tau else "sgd")


def test_ssl_ey_with_and_without_projector(in_checkout):
    runs = {run.name: run for run in solo.ssl_ey(Request())}
    assert list(runs) == [
        f"solo/{variant}_{dataset}/seed0"
        for variant in ("ssl_ey", "ssl_ey-no-projector")
        for dataset in ("cifar10", "cifar100", "imagenet100")
    ]
    for run in runs.values():
        cfg = composed(run.steps[0].arguments)
        assert cfg.method == "ssl_ey"
        assert cfg.method_kwargs.get("projector", True) == (run.method == "ssl_ey")
        steps = ["pretrain", "knn", *(["linear"] if run.dataset == "imagenet100" else [])]
        assert [step.name for step in run.steps] == steps


def test_options_reach_the_pretraining_only(in_checkout):
    (run,) = [
        run
        for run in solo.ssl_ey(Request(epochs=3, devices=2, data=["imagenet100"], data_folder=Path("/data")))
        if run.method == "ssl_ey"
    ]
    cfg = composed(run.steps[0].arguments)
    assert (cfg.max_epochs, cfg.devices, cfg.check_val_every_n_epoch) == (3, 2, 1)
    assert cfg.data.train_path == "/data/imagenet100/train"
    for step in run.steps[1:]:
        assert not any("epoch" in argument or "devices" in argument for argument in step.arguments)
    assert "/data/imagenet100/val" in run.steps[1].arguments


def test_data_replaces_the_data_sets(in_checkout):
    runs = solo.implicit_var_reg(Request(data=["digits"], seeds=range(2)))
    assert len(runs) == 20
    assert {run.dataset for run in runs} == {"digits"}
    assert solo.one_at_a_time(Request(data=["digits"])) is None
    assert solo.one_at_a_time(Request()) == solo.one_at_a_time(Request(data=["digits", "cifar10"])) == 1


def test_only_the_wanted_data_are_prepared(in_checkout):
    runs = solo.implicit_var_reg(Request())
    few = [run for run in runs if run.dataset in ("stl10", "cifar10")]
    assert solo.prepare(few, Request(data_folder=Path("d"))) == [
        ("-m", "plugins.experiments.suites.prepare", "cifar10", "stl10", "--folder", "d")
    ]
    assert solo.prepare([], Request()) == []
    (elsewhere,) = solo.prepare(few, Request(elsewhere=True))
    assert elsewhere[-1] == "--elsewhere"  # on the login node of a cluster, a missing GPU means nothing


def test_result_of_a_table_is_that_of_the_last_epoch(in_checkout, tmp_path):
    run = solo.ssl_ey(Request(out=tmp_path, data=["imagenet100"]))[0]
    _write_outputs(run.folder)
    content = json.loads((run.folder / "pretrain.json").read_text())
    content["metrics"] = {"val_acc1": 80.0, "val_acc5": 95.0}
    (run.folder / "pretrain.json").write_text(json.dumps(content))
    result = solo.collect_table(run)
    expected = {"epochs": 25, "online": 80.0, "online_top5": 95.0, "knn": 91.0, "linear": 94.0, "seconds": 75.0}
    assert {key: result[key] for key in expected} == expected


# ------------------------------------------------------------------------------------------------------ their data


def test_missing_folders_are_named_with_the_command_that_makes_them(tmp_path, capsys):
    assert prepare.main(["tinyimagenet", "imagenet100", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"tinyimagenet is not in {tmp_path / 'tinyimagenet'}" in error
    assert f"python -m plugins.tools.data tinyimagenet --archive tiny-imagenet-200.zip --out {tmp_path}" in error
    assert f"one folder per class into {tmp_path / 'imagenet100'}/train" in error


def _class_folders(place, *counts):
    """Folders of classes, with a file each, in train and val."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for number in range(count):
            (place / split / f"n{number}").mkdir(parents=True)
            (place / split / f"n{number}" / "image.png").touch()


def test_every_folder_data_set_has_its_number_of_classes():
    assert set(prepare.CLASSES) == set(prepare.FOLDERS)


def test_unsorted_or_incomplete_images_are_told_before_anything_is_trained(tmp_path, capsys):
    """The layout of the unpacked archive: the validation images are in a folder called images."""
    place = tmp_path / "tinyimagenet"
    _class_folders(place, 200, 0)
    (place / "val" / "images").mkdir(parents=True)
    (place / "val" / "images" / "val_0.JPEG").touch()
    assert prepare.main(["tinyimagenet", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{place}/train and {place}/val must have the same 200 class folders, got" in error
    assert "got 200 and 1: create it from its archive with" in error


@pytest.mark.slow
def test_without_a_network_there_is_one_sentence_and_nothing_is_trained(tmp_path, monkeypatch, capfd):
    """Run the whole suite on a machine without DNS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\ndef fail(*_, **__): raise socket.gaierror(-2, 'no such name')\nsocket.getaddrinfo = fail\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(experiments, "start_server", lambda environment: None)
    assert experiments.main(["implicit_var_reg", "--data", "cifar10,stl10"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: cifar10 is not in datasets and could not be downloaded (")
    assert "no such name" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_data_that_are_there_are_not_downloaded(tmp_path, capsys, monkeypatch):
    class Found:
        def __init__(self, root, **options):
            assert "download" not in options

    import torchvision

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Found)
    _class_folders(tmp_path / "tinyimagenet", 200, 200)
    assert prepare.main(["cifar10", "tinyimagenet", "--folder", str(tmp_path)]) == 0
    assert "downloading" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- for real


@pytest.mark.slow
def test_a_run_of_the_table_on_the_digits(tmp_path, few_digits_here, capfd):
    """One epoch of IsoLoss without teacher on a few images, its evaluations, and the suite's table."""
    few_digits_here(12)
    done = experiments.main(["implicit_var_reg", "--data", "digits", "--only", "isoloss-noema", "--epochs", "1"])
    assert done == 0, capfd.readouterr()
    folder = tmp_path / "results" / "implicit_var_reg" / "solo" / "isoloss-noema_digits" / "seed0"
    result = json.loads((folder / "result.json").read_text())
    assert (result["method"], result["dataset"], result["epochs"]) == ("isoloss-noema", "digits", 1)
    assert result["config"]["momentum"]["base_tau"] == 0.0
    assert all(0 < result[key] <= 100 for key in ("online", "knn", "linear", "linear_top5"))
    table = (tmp_path / "results" / "implicit_var_reg" / "table.md").read_text()
    line = next(line for line in table.splitlines() if "isoloss-noema" in line)
    assert f"{result['online']:.1f}" in line
    capfd.readouterr()
    again = experiments.main(["implicit_var_reg", "--data", "digits", "--only", "isoloss-noema", "--epochs", "1"])
    assert again == 0
    assert "skipped, finished before" in capfd.readouterr().out
