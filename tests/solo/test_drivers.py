"""The commands: files, errors, and that a killed run ends with the weights of an uninterrupted one."""

import csv
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from plugins.methods import METHODS
from plugins.testing import NARROW
from plugins.tools.command import UserError
from plugins.tools.data import make_subset
from solo_ext import main_knn, main_linear, main_pretrain
from solo_ext.checkpoint import Checkpointer, auto_resume, find_checkpoint
from solo_ext.config import parse_pretrain
from solo_ext.logs import AppendingCSVLogger, EpochLines

pytestmark = [pytest.mark.solo, pytest.mark.usefixtures("tiny")]
ROOT = Path(__file__).parents[2]


def _arguments(digits: Path, out: Path, name: str, *more: str) -> list[str]:
    return [
        *("--config-path", str(ROOT / "configs" / "solo" / "digits"), "--config-name", name),
        *(f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}", f"++checkpoint.dir={out}"),
        *("optimizer.batch_size=32", "++check_val_every_n_epoch=1", "++checkpoint.frequency=1"),
        *("backbone.name=tiny", *more),
    ]


def _run(main, argv, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", *argv])
    main()


def _refused(main, argv, monkeypatch, capfd) -> str:
    """Return the one-line error of a command."""
    capfd.readouterr()  # what came before
    with pytest.raises(SystemExit) as stopped:
        _run(main, argv, monkeypatch)
    out, err = capfd.readouterr()
    assert stopped.value.code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert "Error executing job" not in err, "Hydra's own line"
    assert "epoch 1/" not in out
    return lines[0]


@pytest.mark.slow
def test_pretrain_then_knn_then_linear(digits, tmp_path, monkeypatch, capfd):
    more = ("max_epochs=2", "++checkpoint.version=v", "seed=3", "backbone.name=resnet18")
    more = (*more, "++method_kwargs.log_quality=true")
    _run(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", *more), monkeypatch)
    run = tmp_path / "isoloss" / "v"
    files = ("args.json", "eigenvalues.csv", "isoloss-digits-v-ep=1.ckpt", "metrics.csv", "pretrain.json")
    assert {path.name for path in run.iterdir()} == {".lock", "tensorboard", *files}
    rows = list(csv.DictReader((run / "eigenvalues.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    spectrum = [float(rows[1][f"eigval_{index}"]) for index in range(1, 129)]
    assert spectrum == sorted(spectrum, reverse=True) and spectrum[0] > 0
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("eigenvalues")] == [0, 1]
    values = list(csv.DictReader((run / "metrics.csv").open()))
    logged = set().union(*values)
    for name in ("quality/features/rankme", "quality/projections/lidar"):
        of_epochs = [row for row in values if row[name]]
        assert [row["epoch"] for row in of_epochs] == ["0", "1"] and all(float(row[name]) > 1 for row in of_epochs)
    assert {"eigval_metrics/part_ratio_epoch", "train_z_std_epoch", "val_acc1", "train_acc1_epoch", "tau"} <= logged
    summary = json.loads((run / "pretrain.json").read_text())
    assert summary["seed"] == 3 and summary["epochs"] == 2 and summary["images_per_second"] > 0
    assert summary["config"]["method_kwargs"]["rho"] == 0.99
    state = torch.load(find_checkpoint(run), weights_only=True)["state_dict"]
    prefixes = {name.split(".")[0] for name in state}
    assert prefixes == {
        *("backbone", "classifier", "momentum_backbone", "momentum_projector", "predictor", "projector"),
    }
    assert "epoch 2/2" in capfd.readouterr().out

    knn = [
        *("--pretrained_checkpoint_dir", str(run), "--dataset", "digits", "--k", "5", "20"),
        *("--train_data_path", str(digits / "train"), "--val_data_path", str(digits / "val")),
        *("--feature_type", "backbone", "projector", "--distance_function", "cosine", "euclidean"),
        *("--output", str(tmp_path / "knn.json"), "--num_workers", "0"),
    ]
    _run(main_knn.main, knn, monkeypatch)
    rows = json.loads((tmp_path / "knn.json").read_text())
    assert len(rows) == 8 and all(0 <= row["acc1"] <= row["acc5"] <= 100 for row in rows)

    linear = (
        "max_epochs=3",
        "scheduler.name=reduce",
        "++check_val_every_n_epoch=1",
        f"pretrained_feature_extractor={run}",
    )
    more = (*linear, "++checkpoint.version=w", "backbone.name=resnet18")
    _run(main_linear.main, _arguments(digits, tmp_path, "linear", *more), monkeypatch)
    found = json.loads((tmp_path / "linear" / "w" / "linear.json").read_text())
    assert found["train_images"] == 96 and 0 <= found["acc1"] <= found["best_acc1"] <= 100
    frozen = torch.load(find_checkpoint(tmp_path / "linear" / "w"), weights_only=True)["state_dict"]
    assert all(torch.equal(frozen[name], state[name]) for name in frozen if name.startswith("backbone."))


_NATIVE = {
    "byol": {"proj_hidden_dim": 64, "proj_output_dim": 32, "pred_hidden_dim": 64},
    "vicreg": {
        **{"proj_hidden_dim": 64, "proj_output_dim": 64},
        **{"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0},
    },
}
_LARS = [f"++optimizer.kwargs.{entry}" for entry in ("eta=0.02", "clip_lr=true", "exclude_bias_n_norm=true")]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(_NATIVE))
def test_native_methods_train_resume_and_are_evaluated(method, digits, tmp_path, monkeypatch):
    """solo-learn's own BYOL and VICReg, options and LARS as in its own files; VICReg with its own ResNet."""
    backbone = "backbone.name=resnet18" if method == "vicreg" else "backbone.name=tiny"
    config = (ROOT / "configs" / "solo" / "digits" / "base.yaml").read_text()
    quiet = "defaults: [_self_, {override hydra/hydra_logging: disabled}, {override hydra/job_logging: disabled}]\n"
    config = config.replace("defaults:\n  - teacher: ema\n  - _self_\n", quiet)
    config += "\nmethod: " + method + "\nmethod_kwargs: " + json.dumps(_NATIVE[method]) + "\n"
    (tmp_path / "native.yaml").write_text(config)

    def train(version, *more):
        argv = _arguments(digits, tmp_path / "out", "native", "max_epochs=2", f"++checkpoint.version={version}", *more)
        argv[1] = str(tmp_path)
        lars = ("optimizer.name=lars", *_LARS)
        _run(main_pretrain.main, [*argv, "++checkpoint.keep_prev=true", "knn_eval.k=3", *lars, backbone], monkeypatch)
        return tmp_path / "out" / method / version

    whole = train("whole")
    summary = json.loads((whole / "pretrain.json").read_text())
    assert {"val_acc1", "val_knn_acc1", "train_acc1"} <= set(summary["metrics"])
    first = whole / f"{method}-digits-whole-ep=0.ckpt"
    resumed = train("resumed", f"++resume_from_checkpoint='{first}'")
    states = [torch.load(find_checkpoint(folder), weights_only=True)["state_dict"] for folder in (whole, resumed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    more = (f"pretrained_feature_extractor={whole}", "max_epochs=1", "++check_val_every_n_epoch=1", backbone)
    argv = _arguments(digits, tmp_path, "linear", *more, "++checkpoint.version=w")
    _run(main_linear.main, argv, monkeypatch)
    assert 0 <= json.loads((tmp_path / "linear" / "w" / "linear.json").read_text())["acc1"] <= 100
    knn = [
        *("--pretrained_checkpoint_dir", str(whole), "--dataset", "digits", "--num_workers", "0"),
        *("--train_data_path", str(digits / "train"), "--val_data_path", str(digits / "val")),
        *("--output", str(tmp_path / "knn.json"), "--feature_type", "backbone", "projector"),
    ]
    _run(main_knn.main, knn, monkeypatch)
    assert len(json.loads((tmp_path / "knn.json").read_text())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["isoloss", "ssl_ey"])
def test_a_killed_run_resumes_to_the_same_weights(method, new_run, tmp_path):
    """SIGKILL in mid-epoch, then auto-resume: weights, predictor, teacher and logs equal the uninterrupted run's."""
    more = ("max_epochs=6", "auto_resume.enabled=true", "++data.num_workers=0")
    whole, cut = (new_run(tmp_path / side) for side in ("whole", "cut"))
    for run in (whole, cut):
        run.folder = run.out / method / "v"
        run.images = f"data.train_path={run.digits / 'train'}"
    whole(*more, whole.images, config=method)

    process = cut.start(*more, cut.images, config=method)
    cut.wait_for(process, "*-ep=0.ckpt")
    time.sleep(0.05)  # into the second epoch
    os.kill(process.pid, signal.SIGKILL)
    process.wait(120)
    assert int(find_checkpoint(cut.folder).stem.rsplit("=", 1)[1]) < 5

    assert "resuming after epoch" in cut(*more, cut.images, config=method)
    whole, cut = (torch.load(find_checkpoint(tmp_path / side / method / "v"), weights_only=True) for side in
                  ("whole", "cut"))  # fmt: skip
    assert whole["state_dict"].keys() == cut["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name]), name
    for side in ("optimizer_states", "lr_schedulers"):
        assert str(whole[side]) == str(cut[side])
    spectra = [(tmp_path / side / method / "v" / "eigenvalues.csv").read_text() for side in ("whole", "cut")]
    assert spectra[0] == spectra[1]
    epochs = [
        sorted({row["epoch"] for row in csv.DictReader((tmp_path / side / method / "v" / "metrics.csv").open())})
        for side in ("whole", "cut")
    ]
    assert epochs[0] == epochs[1]


_SMALL = {**NARROW, "proj_hidden_dim": 32, "proj_output_dim": 16, "pred_hidden_dim": 16, "n_classes": 16}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_resumes_to_the_same_weights(method, digits, tmp_path, monkeypatch):
    """Resume from the checkpoint of an epoch's end. T9: the teacher's momentum continues from its value."""
    small = [f"++method_kwargs.{key}={value}" for key, value in _SMALL.items() if key in METHODS[method].options]
    small = (*small, f"data.train_path={digits / 'val'}", "optimizer.batch_size=16", "knn_eval.enabled=false")
    states = []
    for version in ("whole", "resumed"):
        first = tmp_path / method / "whole" / f"{method}-digits-whole-ep=0.ckpt"
        more = (f"++resume_from_checkpoint='{first}'",) if version == "resumed" else ("++checkpoint.keep_prev=true",)
        more = (*more, *small, "max_epochs=2", f"++checkpoint.version={version}")
        _run(main_pretrain.main, _arguments(digits, tmp_path, method, *more), monkeypatch)
        states.append(torch.load(find_checkpoint(tmp_path / method / version), weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_auto_resume_takes_the_same_run_only(compose, tmp_path):
    """T10: name, method and dataset alone do not make a run the same."""
    cfg = parse_pretrain(compose("isoloss", "auto_resume.enabled=true", "name=shared"))
    run = Path(cfg.checkpoint.dir) / "isoloss" / "v"
    run.mkdir(parents=True)
    torch.save({"state_dict": {}}, run / "a-ep=0.ckpt")
    from omegaconf import OmegaConf

    (run / "args.json").write_text(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    path, content = auto_resume(cfg, "isoloss")
    assert path == run / "a-ep=0.ckpt" and content == {"state_dict": {}}
    others = (
        *("method_kwargs.rho=0.5", "+method_kwargs.iso=false", "momentum.base_tau=0.5", "seed=6"),
        *("optimizer.lr=0.1", "++max_epochs=2", "name=other", "++shared_flip=0.5"),
    )
    for other in others:
        changed = parse_pretrain(compose("isoloss", "auto_resume.enabled=true", "name=shared", "++seed=5", other))
        assert auto_resume(changed, "isoloss") is None, other
    for changed in ("backbone.name=vit_tiny", "method=vicreg"):
        other = parse_pretrain(compose("isoloss", "auto_resume.enabled=true", changed, "++checkpoint.version=v"))
        with pytest.raises(
            UserError, match=f" {changed.partition('=')[0]} is .* there, and {changed.partition('=')[2]} in"
        ):
            auto_resume(other, "isoloss")
    os.utime(run / "a-ep=0.ckpt", (0, 0))
    assert auto_resume(cfg, "isoloss") is None  # older than max_hours


@pytest.mark.slow
@pytest.mark.sample("1")
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_means_of_an_epoch_outlive_a_kill_after_its_checkpoint(epochs, digits, tmp_path, monkeypatch):
    """Lightning logs them after the checkpoint; without a kill they are there once."""

    def killed(self, trainer, epoch):
        save(self, trainer, epoch)
        if epoch == epochs - 1:
            raise RuntimeError("killed")

    save = Checkpointer.save
    argv = _arguments(digits, tmp_path, "isoloss", "max_epochs=3", "auto_resume.enabled=true", "++checkpoint.version=v")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Checkpointer, "save", killed)
        _run(main_pretrain.main, argv, monkeypatch)
    _run(main_pretrain.main, argv, monkeypatch)
    with (tmp_path / "isoloss" / "v" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train_ssl_loss_epoch"]]
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "2"), ("1", "5"), ("2", "8")]
    assert len({row["train_ssl_loss_epoch"] for row in rows}) == 3 and all(row["tau"] for row in rows)


# refusals


@pytest.fixture(scope="module")
def untrained(digits, tmp_path_factory):
    """A run folder with the weights of an untrained IsoLoss network."""
    out = tmp_path_factory.mktemp("untrained")
    argv = _arguments(digits, out, "isoloss", "max_epochs=0", "++checkpoint.version=v")
    with pytest.MonkeyPatch.context() as patch:
        _run(main_pretrain.main, argv, patch)
    return out / "isoloss" / "v"


_REFUSED = {
    "unknown method": (["method=isolos"], "vicreg, wmse; did you mean isoloss?"),
    "misspelt option": (["+method_kwargs.alhpa=1"], "method isoloss has no option 'alhpa'; known options:"),
    "wrong value": (["+method_kwargs.mode=both"], "mode must be one of sequential, pooled, got 'both'"),
    "missing data": (["data.train_path=nowhere/train"], "data.train_path is not a folder: nowhere/train"),
    "batch of one": (["optimizer.batch_size=1"], "optimizer.batch_size must be an integer, at least 2, got 1"),
    "too few images": (["optimizer.batch_size=512"], "contains 96 images, fewer than one batch of 512"),
    "unknown dataset": (["data.dataset=digit"], "unknown data.dataset 'digit'; choose from cifar10,"),
    "unknown backbone": (["backbone.name=resnet19"], "unknown backbone 'resnet19'; this version of solo-learn has: "),
    "unknown optimizer": (["optimizer.name=lamb"], "unknown optimizer.name 'lamb'; choose from sgd,"),
    "misspelt optimizer option": (["+optimizer.kwargs.momentm=1"], "optimizer adamw has no option 'momentm'"),
    "no checkpoint": (["+resume_from_checkpoint=a.ckpt"], "resume_from_checkpoint: there is no checkpoint a.ckpt"),
    "unknown format": (["data.format=lmdb"], "unknown data.format 'lmdb'; choose from image_folder, dali, h5"),
}


@pytest.mark.sample("misspelt option", "too few images")
@pytest.mark.parametrize("case", _REFUSED)
def test_a_mistake_is_one_sentence_and_status_2(case, digits, tmp_path, monkeypatch, capfd):
    more, sentence = _REFUSED[case]
    said = _refused(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", *more), monkeypatch, capfd)
    assert sentence in said
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_training_that_diverges_names_the_view(digits, tmp_path, monkeypatch, capfd):
    """The error is raised in the step, not at the end of the epoch."""
    rate = ("optimizer.name=sgd", "optimizer.lr=1e30", "++optimizer.kwargs={}", "++max_epochs=1")
    argv = _arguments(digits, tmp_path, "ssl_ey", *rate, "++scheduler.name=none")
    said = _refused(main_pretrain.main, argv, monkeypatch, capfd)
    assert "training diverged: the loss needs finite numbers, got NaN or inf in z of view 0" in said


def test_no_gpu_is_one_sentence(digits, tmp_path, monkeypatch, capfd):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = _refused(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", "accelerator=gpu"), monkeypatch, capfd)
    assert "this machine has no GPU; add ++accelerator=cpu" in said


def test_unknown_configuration_names_the_known(monkeypatch, capfd):
    argv = ["--config-path", str(ROOT / "configs/solo/digits"), "--config-name", "nothing"]
    assert "there is no configuration 'nothing'" in _refused(main_pretrain.main, argv, monkeypatch, capfd)
    argv = ["--config-path", "no/where", "--config-name", "nothing"]
    assert "--config-path is not a folder: no/where" in _refused(main_pretrain.main, argv, monkeypatch, capfd)


def test_help(monkeypatch, capfd):
    for main, word in ((main_pretrain.main, "--config-name"), (main_linear.main, "pretrained_feature_extractor")):
        with pytest.raises(SystemExit) as stopped:
            _run(main, ["--help"], monkeypatch)
        assert stopped.value.code == 0 and word in capfd.readouterr().out


@pytest.mark.slow
def test_checkpoint_of_another_method(untrained, digits, tmp_path, monkeypatch, capfd):
    checkpoint = find_checkpoint(untrained)
    more = (f"++resume_from_checkpoint='{checkpoint}'",)
    said = _refused(main_pretrain.main, _arguments(digits, tmp_path, "ssl_ey", *more), monkeypatch, capfd)
    assert "is a checkpoint with method isoloss, but this run has method ssl_ey" in said
    more = (*more, "method_kwargs.rho=0.5")
    said = _refused(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", *more), monkeypatch, capfd)
    assert "is a checkpoint with method_kwargs.rho 0.99, but this run has method_kwargs.rho 0.5" in said
    more = (more[0], "data.dataset=custom")
    said = _refused(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", *more), monkeypatch, capfd)
    assert "is a checkpoint with dataset digits, but this run has dataset custom" in said


@pytest.mark.slow
def test_linear_refuses_what_is_no_checkpoint(untrained, digits, tmp_path, monkeypatch, capfd):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"nonsense")
    torch.save({"state_dict": None}, tmp_path / "empty.ckpt")
    (tmp_path / "text.ckpt").write_text("a line of text\nand another\n")
    for place, sentence in (
        (tmp_path / "empty.ckpt", "contains no backbone: it has no tensors"),
        (tmp_path / "text.ckpt", "cannot be read as a checkpoint: it was not written by torch.save"),
        (tmp_path / "a.ckpt", "there is no checkpoint"),
        (broken, "cannot be read as a checkpoint"),
    ):
        more = (f"pretrained_feature_extractor={place}",)
        assert sentence in _refused(main_linear.main, _arguments(digits, tmp_path, "linear", *more), monkeypatch, capfd)
    more = (f"pretrained_feature_extractor={untrained}", "backbone.name=resnet50")
    said = _refused(main_linear.main, _arguments(digits, tmp_path, "linear", *more), monkeypatch, capfd)
    assert "contains another backbone" in said


def test_checkpoints_are_read_without_running_code(tmp_path):
    from solo_ext.checkpoint import read_checkpoint

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_knn_refuses_a_folder_that_is_no_run(tmp_path, monkeypatch, capfd):
    argv = [
        *("--pretrained_checkpoint_dir", str(tmp_path), "--dataset", "digits"),
        *("--train_data_path", "x", "--val_data_path", "x"),
    ]
    assert "is not the folder of a run: it has no args.json" in _refused(main_knn.main, argv, monkeypatch, capfd)


# what users do


def _metrics(folder: Path) -> dict:
    return json.loads((folder / "pretrain.json").read_text())["metrics"]


@pytest.mark.slow
def test_unlabelled_images_train(digits, tmp_path, monkeypatch):
    """T13: a batch without labels has a classification loss of 0, not NaN."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (digits / "train").glob("*/*.png"):
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    argv = [
        *_arguments(digits, tmp_path, "isoloss", "max_epochs=1", "++checkpoint.version=v"),
        *(f"data.train_path={flat}", "data.dataset=custom", "++data.no_labels=True", "~data.val_path"),
        "data.num_workers=2",
    ]
    _run(main_pretrain.main, argv, monkeypatch)
    metrics = _metrics(tmp_path / "isoloss" / "v")
    assert metrics["train_class_loss_epoch"] == 0 and 0 < metrics["train_ssl_loss_epoch"] < 8
    assert "val_acc1" not in metrics


@pytest.mark.slow
def test_workers_do_not_change_the_numbers(digits, tmp_path, monkeypatch):
    losses = []
    for workers in (0, 2):
        more = ("max_epochs=1", f"++checkpoint.version=w{workers}", f"data.num_workers={workers}")
        _run(main_pretrain.main, _arguments(digits, tmp_path, "ssl_ey", *more), monkeypatch)
        losses.append(_metrics(tmp_path / "ssl_ey" / f"w{workers}")["train_ssl_loss_epoch"])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_can_be_made_longer_and_its_folder_is_safe(digits, tmp_path, monkeypatch, capfd):
    common = ("++checkpoint.version=v", "scheduler.warmup_epochs=0")
    _run(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", "max_epochs=1", *common), monkeypatch)
    checkpoint = find_checkpoint(tmp_path / "isoloss" / "v")
    checkpoint_copy = tmp_path / "copy.ckpt"
    checkpoint_copy.write_bytes(checkpoint.read_bytes())
    argv = _arguments(digits, tmp_path, "isoloss", "max_epochs=3", *common)
    assert "already contains a run" in _refused(main_pretrain.main, argv, monkeypatch, capfd)

    resume = f"++resume_from_checkpoint='{checkpoint}'"
    said = _refused(main_pretrain.main, [*argv, resume, "optimizer.lr=0.5"], monkeypatch, capfd)
    assert "is a checkpoint with optimizer.lr " in said
    _run(main_pretrain.main, [*argv, f"++resume_from_checkpoint='{checkpoint.parent}'"], monkeypatch)
    state = torch.load(find_checkpoint(tmp_path / "isoloss" / "v"), weights_only=True)
    assert state["lr_schedulers"][0]["last_epoch"] == 9 and state["epoch"] == 2
    before = torch.load(checkpoint_copy, weights_only=True)["state_dict"]["backbone.conv1.weight"]
    moved = (state["state_dict"]["backbone.conv1.weight"] - before).abs().max()
    assert moved > 1e-5, "the schedule of the shorter run would have stayed at 0"
    assert json.loads((tmp_path / "isoloss" / "v" / "args.json").read_text())["max_epochs"] == 3


@pytest.mark.slow
def test_wandb_offline(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = ("max_epochs=1", "++checkpoint.version=v", "++wandb.enabled=True", "++wandb.offline=True")
    _run(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", *more), monkeypatch)
    assert list(tmp_path.rglob("*.wandb"))
    import wandb

    wandb.finish()


@pytest.mark.slow
def test_linear_evaluation_ends_with_a_validation(untrained, digits, tmp_path, monkeypatch):
    more = (f"pretrained_feature_extractor={untrained}", "max_epochs=3", "++check_val_every_n_epoch=2")
    _run(main_linear.main, _arguments(digits, tmp_path, "linear", *more, "++checkpoint.version=w"), monkeypatch)
    assert json.loads((tmp_path / "linear" / "w" / "linear.json").read_text())["acc1"] is not None


@pytest.mark.slow
def test_features_are_normalized_before_the_classifier(untrained, digits, tmp_path, monkeypatch):
    """The statistics are those of the training images; the rate is constant in an epoch and falls along a cosine."""
    more = (f"pretrained_feature_extractor={untrained}", "max_epochs=2", "++checkpoint.version=n")
    _run(main_linear.main, _arguments(digits, tmp_path, "linear_normalized", *more), monkeypatch)
    content = torch.load(find_checkpoint(tmp_path / "linear" / "n"), weights_only=True)
    classifier = {key: value for key, value in content["state_dict"].items() if key.startswith("classifier.")}
    assert {"classifier.1.weight", "classifier.1.bias"} <= set(classifier)
    assert "classifier.0.weight" not in classifier
    assert classifier["classifier.0.num_batches_tracked"] == 6  # two epochs of three batches
    with (tmp_path / "linear" / "n" / "metrics.csv").open() as file:
        rates = [float(row["lr-LARS"]) for row in csv.DictReader(file) if row.get("lr-LARS")]
    assert sorted(set(rates), reverse=True) == pytest.approx([4.0 * 32 / 256, 2.0 * 32 / 256])


@pytest.mark.slow
def test_a_checkpoint_is_fine_tuned_on_a_share_of_the_labels(untrained, digits, tmp_path, monkeypatch):
    """The backbone is trained too, on the images of the share alone."""
    make_subset(digits / "train", tmp_path / "few", fraction=0.25)
    more = (f"pretrained_feature_extractor={untrained}", "max_epochs=2", "++checkpoint.version=f")
    argv = _arguments(digits, tmp_path, "supervised", *more, f"data.train_path={tmp_path / 'few'}", "++finetune=true")
    _run(main_linear.main, [*argv, "optimizer.batch_size=10"], monkeypatch)
    summary = json.loads((tmp_path / "linear" / "f" / "linear.json").read_text())
    assert (summary["finetune"], summary["train_images"]) == (True, 20)
    before = torch.load(find_checkpoint(untrained), weights_only=True)["state_dict"]
    after = torch.load(find_checkpoint(tmp_path / "linear" / "f"), weights_only=True)["state_dict"]
    convolutions = [key for key in before if key.startswith("backbone.conv")]
    assert convolutions and all(not torch.equal(before[key], after[key]) for key in convolutions)


_REFUSED_TOO = {
    "one view": (["augmentations.0.num_crops=1"], "augmentations: method isoloss needs at least two views, got 1"),
    "native option": (["method=vicreg", "+method_kwargs.sim_loss_wieght=3"], "vicreg has no option"),
    "no path": (["data.train_path=null"], "the configuration needs a value for data.train_path"),
    "a word for a number": (["optimizer.batch_size=many"], "optimizer.batch_size must be an integer"),
    "negative power": (["+method_kwargs.alpha=-1.0"], "alpha must be in [0, inf), got -1.0"),
    "momentum above 1": (["momentum.base_tau=2"], "momentum.base_tau must be in [0, 1], got 2"),
    "devices": (["devices=some"], "devices must be a number above 0 or a list of indexes, got 'some'"),
    "negative rate": (["optimizer.lr=-1"], "optimizer.lr must be a number, at least 0, got -1"),
    "infinite decay": (["optimizer.weight_decay=inf"], "optimizer.weight_decay must be a number, at least 0, got inf"),
    "no section": (["scheduler=null"], "scheduler must be a mapping, got None"),
    "no section either": (["++auto_resume=true"], "auto_resume must be a mapping"),
    "a number for options": (["++optimizer.kwargs=3"], "optimizer.kwargs must be a mapping"),
    "an option's kind": (["++optimizer.kwargs.betas=5"], "the optimizer does not accept the configuration"),
    "neither true nor false": (
        ["++momentum.classifier=maybe"],
        "momentum.classifier must be true or false, got 'maybe'",
    ),
    "no folder": (["++checkpoint.dir=null"], "checkpoint.dir must be a string, got None"),
    "slash": (["++checkpoint.version=a/b"], "checkpoint.version is part of a file name and must not contain a slash"),
    "no accumulation": (["++accumulate_grad_batches=0"], "accumulate_grad_batches must be an integer, at least 1"),
    "seed": (["seed=99999999999"], "seed must be an integer in [0, 4294967295], got 99999999999"),
    "warm-up": (["++scheduler.warmup_epochs=abc"], "scheduler.warmup_epochs must be a number, at least 0, got 'abc'"),
    "no width": (["++method_kwargs.proj_hidden_dim=0"], "hidden_dim must be in [1, inf), got 0"),
    "workers": (["data.num_workers=true"], "data.num_workers must be an integer in [0, 1024], got True"),
    "fraction": (["++data.fraction=true"], "data.fraction must be above 0 and at most 1, or -1 for all images"),
    "no epochs": (
        ["scheduler.name=step", "++scheduler.lr_decay_steps=[abc]"],
        "scheduler.lr_decay_steps must be a list of epochs, got ['abc']",
    ),
    "misspelt entry": (["max_epoch=3"], "the configuration has no entry 'max_epoch'; did you mean max_epochs?"),
    "misspelt entry of a section": (["optimizer.weightdecay=1"], "no entry 'weightdecay'; known entries: name, batch_"),
    "missing entry": (
        ["gradient_clip_val=1"],
        "isoloss.yaml has no entry gradient_clip_val; write ++gradient_cl",
    ),
    "misspelt option without a plus": (["method_kwargs.roh=1"], "; did you mean rho?"),
    "removed element": (["~augmentations.0"], "~augmentations.0: an element of a list cannot be removed by an overr"),
    "no override": (["optimizer.lr=[1"], "optimizer.lr=[1: no viable alternative at input '[1'"),
    "unwritable": (["++checkpoint.dir=/dev/null/x"], "checkpoint.dir: cannot write to /dev/null/x"),
}


@pytest.mark.sample("native option", "no override", "seed")
@pytest.mark.parametrize("case", _REFUSED_TOO)
def test_more_mistakes_are_one_sentence(case, digits, tmp_path, monkeypatch, capfd):
    more, sentence = _REFUSED_TOO[case]
    assert sentence in _refused(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", *more), monkeypatch, capfd)


_OUT_OF_RANGE = {
    "matrix_ssl mce_order=0": "method matrix_ssl: mce_order must be in [1, inf), got 0",
    "matrix_ssl mce_lambd=-1": "method matrix_ssl: mce_lambd must be in [0, inf), got -1",
    "matrix_ssl mce_mu=nan": "method matrix_ssl: mce_mu must be in [0, inf), got nan",
    "matrix_ssl mce_mu=0 logarithm=exact": "mce_mu must be in [1e-06, inf), got 0.0",
    "mec eps=0": "method mec: eps must be in [1e-06, inf), got 0.0",
    "mec eps=1e-6": "eps must be in [1.6e-05, inf), got 1e-06",
    "mec eps=-64 warmup_iter=80": "method mec: eps must be in [1e-06, inf), got -64.0",
    "mec warmup_iter=-1": "method mec: warmup_iter must be in [0, inf), got -1",
    "mec mec_order=0": "method mec: mec_order must be in [1, inf), got 0",
    "dissl tau_teacher=0": "method dissl: tau_teacher must be in [1e-06, inf), got 0.0",
    "dissl temperature_assign=0": "method dissl: temperature_assign must be in [1e-06, inf), got 0.0",
    "dissl n_classes=1": "method dissl: n_classes must be in [2, inf), got 1",
    "dissl beta_det_inv=-1": "method dissl: beta_det_inv must be in [0, inf), got -1",
    "cissl temperature=0": "method cissl: temperature must be in [1e-06, inf), got 0.0",
    "isoloss rho=2": "method isoloss: rho must be in [0, 1], got 2",
    "byol pred_lr_scale=-1": "method byol: pred_lr_scale must be in [1e-06, inf), got -1",
    "ssl_ey proj_output_dim=0": "method ssl_ey: proj_output_dim must be in [1, inf), got 0",
}


@pytest.mark.sample("isoloss rho=2", "mec eps=1e-6")
@pytest.mark.parametrize("case", _OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_before_the_run_has_a_folder(case, digits, tmp_path, monkeypatch, capfd):
    name, *given = case.split()
    small = ["++method_kwargs.proj_output_dim=16"] if name in ("matrix_ssl", "mec") else []
    more = [*small, *(f"++method_kwargs.{option}" for option in given)]
    said = _refused(main_pretrain.main, _arguments(digits, tmp_path / "runs", name, *more), monkeypatch, capfd)
    assert _OUT_OF_RANGE[case] in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_vectors_can_be_left_out_of_weight_decay(digits, tmp_path, monkeypatch):
    """Both halves of a group are logged under different names; a version may look like a number."""
    more = ("++optimizer.exclude_bias_n_norm_wd=true", "max_epochs=1", "++checkpoint.version=3")
    _run(main_pretrain.main, _arguments(digits, tmp_path, "isoloss", *more), monkeypatch)
    groups = torch.load(find_checkpoint(tmp_path / "isoloss" / "3"), weights_only=True)["optimizer_states"][0]
    decay = {group["name"]: group["weight_decay"] for group in groups["param_groups"]}
    assert decay["backbone"] > 0 == decay["backbone_no_decay"]


def test_a_resumed_log_keeps_the_rows_before(tmp_path):
    """Learning rates are logged with a step alone."""
    rows = ["epoch,lr,step,loss", ",0.1,0,", "0,,2,1.5", ",0.2,3,", "1,,5,1.4", ",0.3,6,"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    logger = AppendingCSVLogger(tmp_path, epochs=1)
    logger.log_metrics({"loss": 1.3}, step=5)
    logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        assert [(row["step"], row["lr"]) for row in csv.DictReader(file)] == [("0", "0.1"), ("2", ""), ("5", "")]


@pytest.mark.parametrize("own", ["train_ssl_loss", "train_nce_loss", "train_neg_cos_sim", "dino_loss"])
def test_the_line_of_an_epoch_has_the_loss_of_the_method(own, capsys):
    names = (own, "train_loss", "train_class_loss", "train_momentum_class_loss", "train_acc1", "train_z_std")
    values = {f"{name}_epoch": torch.tensor(2.0) for name in names}
    trainer = SimpleNamespace(
        is_global_zero=True,
        current_epoch=0,
        max_epochs=2,
        global_step=1,
        estimated_stepping_batches=1,
        callback_metrics=values,
    )
    lines = EpochLines()
    lines.on_train_start(trainer, None)
    lines.on_train_epoch_end(trainer, None)
    assert capsys.readouterr().out.startswith(f"epoch 1/2  {own} 2  train_loss 2  train_acc1 2  0 s, ")


def test_class_folders_must_agree(untrained, digits, tmp_path, monkeypatch, capfd):
    other = tmp_path / "val"
    (other / "9").mkdir(parents=True)
    source = next((digits / "val" / "9").iterdir())
    (other / "9" / source.name).write_bytes(source.read_bytes())
    more = (f"pretrained_feature_extractor={untrained}", f"data.val_path={other}")
    argv = _arguments(digits, tmp_path, "linear", *more)
    assert "have different class folders: only one of them has" in _refused(main_linear.main, argv, monkeypatch, capfd)


@pytest.mark.slow
def test_a_run_with_masks_sees_the_images_without_their_background(new_run, black_masks, tmp_path):
    """All pixels are background, so that both views of all images are equal, and so are their embeddings."""
    run = new_run(tmp_path / "runs")
    masks = f"masks:{{folder:{black_masks(run.digits / 'val')},prob:1.0,fill:gray}}"
    crop = "rrc:{enabled:true,crop_min_scale:0.6,crop_max_scale:1.0},crop_size:16"
    views = f"augmentations=[{{{crop},num_crops:2,{masks}}}]"
    run("max_epochs=1", views, "++method_kwargs.pred_hidden_dim=8", config="relicv2")
    metrics = json.loads((run.out / "relicv2" / "v" / "pretrain.json").read_text())["metrics"]
    assert metrics["train_invariance"] == pytest.approx(0, abs=1e-9)
    assert math.log(10) - 1e-4 <= metrics["train_contrastive"] <= math.log(11) + 1e-4
