"""The suite self_supervised_vision: runs, commands, collected results, the table, and one training."""

import json
import re
from pathlib import Path

import pytest
import yaml
from matplotlib import rc_context
from PIL import Image, ImageColor

from plugins.experiments import report_ssv
from plugins.experiments import run as experiments
from plugins.experiments.results import SECOND
from plugins.experiments.suites import Request, ssv

ROOT = Path(__file__).parents[2]


def test_twelve_methods_on_six_networks(capsys):
    assert experiments.main(["self_supervised_vision", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    archs = ("resnet18", "resnet50", "resnext50", "resnext101", "wide_resnet50", "wide_resnet101")
    algos = ("byol", "relic", "simclr", "swav", "moco", "barlow", "pirl", "amdim", "cpc", "seer", "sela", "dino")
    assert listed == [f"solo/{algo}-{arch}/seed420" for algo in algos for arch in archs]
    runs = [run for data in ssv.DATA for run in ssv.runs(Request(data=[data]))]
    assert len({run.folder for run in runs}) == 3 * 72


@pytest.mark.parametrize(("data", "devices", "gpus"), [("cifar10", None, 1), ("cifar100", 4, 4), ("digits", 4, 0)])
def test_a_job_has_the_gpus_of_its_training(data, devices, gpus):
    assert {run.gpus for run in ssv.runs(Request(data=[data], devices=devices))} == {gpus}


def test_command_is_that_of_the_original(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("--only", "byol-resnet18", "--epochs", "3", "--devices", "2", "--data-folder", "/data")
    assert experiments.main(["self_supervised_vision", *options, "--data", "cifar100", "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "solo_ext.ssv" in line]
    folder = tmp_path / "results" / "self_supervised_vision" / "solo" / "byol-resnet18_cifar100" / "seed420"
    assert line.partition(" -m solo_ext.ssv ")[2].split() == [
        *("--config", "configs/ssv/byol.yaml", "--algo", "byol", "--arch", "resnet18", "--task", "train"),
        *("--output", str(folder), "--devices", "2"),
        *("seed=420", "data.dataset_name=cifar100", "data.root=/data", "epochs=3", "scheduler.warmup_epochs=0"),
    ]
    trial = ssv.runs(Request(data=["digits"], seeds=range(2)))[-1].steps[0].arguments
    assert trial[3] == "configs/ssv/digits/dino.yaml"
    assert trial[-3:] == ("seed=421", "data.dataset_name=digits", "data.root=datasets/digits")


@pytest.mark.parametrize("folder", ["", "digits"])
def test_every_method_has_a_file(folder):
    assert {f"{algo}.yaml" for algo in ssv.ALGORITHMS} <= {
        path.name for path in (ROOT / "configs/ssv" / folder).iterdir()
    }


def _outputs(run):
    """Write what the command of a run leaves."""
    run.folder.mkdir(parents=True)
    training = {"epochs": 3, "seconds": 5400.0, "images_per_second": 9.0, "versions": {}, "config": {}}
    (run.folder / "pretrain.json").write_text(json.dumps({**training, "metrics": {}}))
    found = {"neighbors": {"head": 61.0, "trunk": 62.0}, "knn": {"head": 71.0, "trunk": 72.0}}
    found["linear"] = {"head": 81.0, "trunk": 82.0}
    (run.folder / "linear_eval.json").write_text(json.dumps(found))
    return training


def test_result_and_table(tmp_path):
    wanted = ("byol-resnet18", "sela-wide_resnet50")
    runs = [run for run in ssv.runs(Request(out=tmp_path)) if run.label in wanted]
    runs += [run for run in ssv.runs(Request(out=tmp_path, data=["cifar100"])) if run.label.startswith(wanted)]
    for run in reversed(runs[:3]):
        training = _outputs(run)
        result = ssv.collect(run)
        scores = {"neighbors": 62.0, "neighbors_head": 61.0, "knn": 72.0, "knn_head": 71.0}
        assert result == {**scores, "linear": 82.0, "linear_head": 81.0, **training}
        run.result.write_text(json.dumps(result))
    runs[3].folder.mkdir(parents=True)
    lines = report_ssv.write(tmp_path / "self_supervised_vision").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][-2:] == ["published, best on test", "hours"]
    assert rows[2:] == [
        ["cifar10", "byol", "resnet18", "3", "61.0", "62.0", "72.0", "82.0", "80.09", "1.50"],
        ["cifar10", "sela", "wide_resnet50", "3", "61.0", "62.0", "72.0", "82.0", "", "1.50"],
        ["cifar100", "byol", "resnet18", "3", "61.0", "62.0", "72.0", "82.0", "", "1.50"],
        ["cifar100", "sela", "wide_resnet50: missing", "–", "–", "–", "–", "–", "", "–"],
    ]


@pytest.mark.slow
def test_figure_has_the_methods_and_what_is_published(tmp_path, capsys):
    """kNN and linear accuracy of two networks on two data sets; the published number of BYOL on CIFAR-10 alone."""
    folder = tmp_path / "self_supervised_vision"
    labels = ("byol-resnet18", "sela-resnet18", "byol-resnet50_digits")
    for label, seed in (*((label, 420) for label in labels), ("byol-resnet18", 421)):
        place = folder / "solo" / label / f"seed{seed}"
        place.mkdir(parents=True)
        numbers = {"knn": 70.0 + seed - 420, "linear": 81.0, "neighbors_head": 61.0}
        (place / "result.json").write_text(json.dumps({"method": label.partition("-")[0], **numbers}))
    (folder / "solo" / "dino-resnet18" / "seed420").mkdir(parents=True)  # not finished
    assert report_ssv.main([str(folder)]) == 0
    assert f"{folder / 'figure.png'}, {folder / 'figure.pdf'}" in capsys.readouterr().out
    assert (folder / "figure.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(folder / "figure.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    wanted = {*(colour for _, colour, _ in report_ssv.MARKS.values()), SECOND}
    assert {ImageColor.getrgb(colour) for colour in wanted} <= colours, "a mark is missing"

    svg = tmp_path / "figure.svg"
    with rc_context({"svg.fonttype": "none"}):
        report_ssv.make_figure(report_ssv.ordered_rows(folder), [svg])
    words = re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text())
    of_x = [word for word in words if word in ssv.ALGORITHMS]
    assert of_x == ["byol", "sela", "dino"] * 2, "the axis of each network, in the order of the suite"
    assert {"resnet18", "resnet50", "cifar10: accuracy (%)", "digits: accuracy (%)"} <= {*words}
    legend = ("kNN", "linear", "neighbours, head", "published, best on test")
    assert [words.count(name) for name in legend] == [1] * 4
    assert report_ssv.published("byol", "cifar10") == 80.09
    assert report_ssv.published("byol", "digits") is report_ssv.published("sela", "cifar10") is None


def test_without_runs_the_report_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report_ssv.main([str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"error: no runs in {tmp_path}; expected folders solo/<algo>-<arch>")


def test_no_file_has_a_longer_warm_up():
    """A longer one would make short runs of the suite fail."""
    warmups = [
        yaml.safe_load((ROOT / "configs/ssv" / f"{algo}.yaml").read_text())["scheduler"] for algo in ssv.ALGORITHMS
    ]
    assert max(each.get("warmup_epochs", 0) for each in warmups) == ssv.WARMUP


@pytest.mark.slow
def test_a_trial_on_the_digits(tmp_path, few_digits_here, capfd):
    """Two epochs of SimCLR on a few images, its evaluation, and the suite's table."""
    few_digits_here(10)
    options = ("--data", "digits", "--only", "simclr-resnet18", "--epochs", "2")
    assert experiments.main(["self_supervised_vision", *options]) == 0, capfd.readouterr()
    suite = tmp_path / "results" / "self_supervised_vision"
    result = json.loads((suite / "solo" / "simclr-resnet18_digits" / "seed420" / "result.json").read_text())
    assert (result["method"], result["dataset"], result["epochs"], result["seed"]) == ("simclr", "digits", 2, 420)
    scores = [result[key] for key in ("neighbors_head", "neighbors", "knn", "linear")]
    assert all(0 < score <= 100 for score in scores)
    (line,) = [line for line in (suite / "table.md").read_text().splitlines() if line.startswith("| digits")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:8] == ["digits", "simclr", "resnet18", "2", *(f"{score:.1f}" for score in scores)]
    assert experiments.main(["self_supervised_vision", *options]) == 0
    assert "skipped, finished before" in capfd.readouterr().out
