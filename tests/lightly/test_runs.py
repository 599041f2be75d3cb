"""The files of ``python -m lightly_ext.benchmarks`` if it is killed, stopped, started twice or out of disk space."""

import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from lightly_ext.benchmarks import __main__ as command
from lightly_ext.benchmarks import run, trainer  # noqa: F401  (the forks need not import them)
from lightly_ext.benchmarks.schema import validate
from lightly_ext.benchmarks.setup import Setup
from plugins.testing import spoil
from plugins.tools.bad_images import LIST, BadImages
from plugins.tools.process import install_signal_handlers, locked_folder
from plugins.tools.records import read_rows

pytestmark = [pytest.mark.lightly, pytest.mark.slow]

METHOD = """
from lightly.utils.benchmarking import OnlineLinearClassifier
from pytorch_lightning import LightningModule
from torch import nn, optim

from lightly_ext.transforms import TwoViewTransform


class Tiny(LightningModule):
    def __init__(self, batch_size_per_device, num_classes):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.online_classifier = OnlineLinearClassifier(8, num_classes)

    def forward(self, x):
        return self.backbone(x)

    def training_step(self, batch, batch_idx):
        loss = sum(self(view).square().mean() for view in batch[0])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.01)


METHODS = {"tiny": {"model": Tiny, "transform": TwoViewTransform(input_size=16)}}
"""


class Runs:
    """Commands in forks of this process; their output."""

    def __init__(self, digits: Path, out: Path) -> None:
        (out / "tiny.py").write_text(METHOD)
        self.folder, self.log = out / "logs" / "tiny", out / "log"
        self.checkpoint = self.folder / "checkpoint.ckpt"
        self.arguments = [
            *("--train-dir", str(digits / "val"), "--val-dir", str(digits / "val"), "--log-dir", str(out / "logs")),
            *(
                "--methods",
                "tiny",
                "--add",
                str(out / "tiny.py"),
                "--batch-size-per-device",
                "16",
                "--num-workers",
                "0",
            ),
            *("--accelerator", "cpu", "--input-size", "16", "--seed", "0", "--skip-linear-eval"),
            *("--skip-finetune-eval", "--skip-knn-eval"),
        ]

    def start(self, *more: str, largest: int | None = None, kill_at: int | None = None) -> int:
        """Start the command; a disk of ``largest`` bytes, or a kill right after the checkpoint of an epoch."""
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
            torch.set_num_threads(1)
            if kill_at is not None:
                _kill_after_checkpoint(kill_at)
            if largest is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            command.main([*self.arguments, *more])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def __call__(self, *more: str, status: int = 0, **how: int) -> str:
        _, ended = os.waitpid(self.start(*more, **how), 0)
        assert os.waitstatus_to_exitcode(ended) == status, self.log.read_text()
        return self.log.read_text()

    def wait_for_a_new_checkpoint(self, before: float) -> None:
        deadline = time.monotonic() + 300
        while not self.checkpoint.is_file() or self.checkpoint.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def more(self) -> tuple[str, ...]:
        return ("--ckpt-path", str(self.checkpoint)) if self.checkpoint.is_file() else ()


def _kill_after_checkpoint(epoch: int) -> None:
    save = trainer._CheckpointIO.save_checkpoint

    def save_and_die(self: object, checkpoint: dict, path: str, storage_options: object = None) -> None:
        save(self, checkpoint, path, storage_options)
        if checkpoint["epoch"] == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer._CheckpointIO.save_checkpoint = save_and_die


@pytest.fixture
def runs(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # as Lightning does: restored after the test
    return Runs(digits, tmp_path)


def test_twenty_kills_lose_no_run(runs):
    moments, reached = random.Random(0), -1
    for kill in range(20):
        before = runs.checkpoint.stat().st_mtime_ns if kill else 0
        child = runs.start("--epochs", "1000", *runs.more())
        runs.wait_for_a_new_checkpoint(before)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        epoch = torch.load(runs.checkpoint, weights_only=True)["epoch"]
        assert epoch > reached, f"kill {kill}"
        reached = epoch
    runs("--epochs", str(reached + 2), *runs.more())
    rows = (runs.folder / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(reached + 2))
    assert [path.name for path in runs.folder.glob(".*")] == [".lock"]


def test_a_kill_right_after_the_checkpoint_loses_no_row(runs):
    """No row of metrics.csv, of eigenvalues.csv or of Lightning's logger is lost."""
    ours = ("--methods", "ssl_ey", "--backbone", "resnet18", "--option", "proj_hidden_dim=8", "proj_output_dim=8")
    folder = runs.folder.parent / "ssl_ey"
    words = (*ours, "log_eigvals=true", "log_quality=true", "--optimizer", "adamw", "--lr", "0.001")
    runs("--epochs", "3", *words, kill_at=1, status=-signal.SIGKILL)
    runs("--epochs", "3", *words, "--ckpt-path", str(folder / "checkpoint.ckpt"))
    for name in ("metrics.csv", "eigenvalues.csv"):
        assert [row["epoch"] for row in read_rows(folder / name)] == ["0", "1", "2"]
    logged = read_rows(folder / "pretrain" / "metrics.csv")
    for name in ("part_ratio", "quality/features/rankme", "quality/projections/lidar", "val_online_cls_top1"):
        assert [row["epoch"] for row in logged if row.get(name)] == ["0", "1", "2"], name


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(workers, runs, tmp_path):
    """The images, their order and their augmentations are the same: all tensors of model and optimiser are equal."""
    words = ("--methods", "moco", "--backbone", "resnet8", "--option", "proj_hidden_dim=8", "proj_output_dim=8")
    words = (
        *words,
        "queue_size=64",
        "--optimizer",
        "adamw",
        "--lr",
        "0.001",
        "--num-workers",
        workers,
        "--epochs",
        "3",
    )
    found = []
    for kill_at in (None, 1):
        folder = tmp_path / f"logs-{kill_at}"
        here = (*words, "--log-dir", str(folder))
        path = folder / "moco" / "checkpoint.ckpt"
        if kill_at is not None:
            runs(*here, kill_at=kill_at, status=-signal.SIGKILL)
            here = (*here, "--ckpt-path", str(path))
        runs(*here)
        checkpoint = torch.load(path, weights_only=True)
        found.append((checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_ends_with_a_status_and_goes_on(number, status, runs):
    """The summary counts the epochs before."""
    child = runs.start("--epochs", "1000")
    runs.wait_for_a_new_checkpoint(0)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status, runs.log.read_text()
    said = runs.log.read_text().splitlines()
    advice = f"run the command with --methods tiny --ckpt-path {runs.checkpoint} to resume"
    assert said == ["tiny: pre-training for 1000 epochs", f"stopped by {number.name} before the end; {advice}"]
    assert not (runs.folder / "result.json").exists()
    state = torch.load(runs.checkpoint, weights_only=True)
    done, record = state["epoch"] + 1, state["callbacks"]["EpochRecord"]
    assert record["epochs"] == done and record["images"] == done * 32
    state["callbacks"]["EpochRecord"]["elapsed"] = 1e6
    torch.save(state, runs.checkpoint)
    for epochs in (done, done + 1):  # with nothing left to train, too
        runs("--epochs", str(epochs), *runs.more())
        result = json.loads((runs.folder / "result.json").read_text())
        assert result["seconds"] > 1e6 and result["train_loss"] is not None and result["images_per_second"] > 0


def test_a_full_disk_keeps_the_checkpoint_of_before(runs):
    runs("--epochs", "1")
    content = runs.checkpoint.read_bytes()
    said = runs("--epochs", "3", *runs.more(), status=2, largest=len(content) // 2)
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error == f"error: {runs.checkpoint} cannot be written: File too large"
    assert runs.checkpoint.read_bytes() == content


def test_another_run_and_a_second_launcher_are_refused(runs):
    runs("--epochs", "2")
    for more, name in (
        (("--lr", "0.5"), "lr is 0.45 there, and 0.5 in this run"),
        (("--transform", "min_scale=0.5"), "transform.min_scale is None there, and 0.5 in this run"),
        (("--seed", "1"), "seed is 0 there, and 1 in this run"),
    ):
        said = runs("--epochs", "3", *runs.more(), *more, status=2)
        assert f"error: --ckpt-path: {runs.checkpoint} belongs to a run with other settings: {name}; use" in said
    said = runs("--epochs", "1", *runs.more(), status=2)
    assert f"{runs.checkpoint} was trained for 2 epochs, more than --epochs 1" in said
    child = os.fork()
    if not child:
        install_signal_handlers()
        with locked_folder(runs.folder):
            (runs.folder / "held").touch()
            time.sleep(60)
    while not (runs.folder / "held").exists():
        time.sleep(0.01)
    assert f"another run (process {child} on " in runs("--epochs", "3", *runs.more(), status=2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    runs("--epochs", "3", *runs.more())


def test_a_run_with_masks_sees_the_images_without_their_background(runs, digits, black_masks):
    """All pixels are background, so that both views of all images are equal, and so are their embeddings."""
    words = (
        "--methods",
        "relicv2",
        "--backbone",
        "resnet8",
        "--epochs",
        "1",
        "--option",
        "num_negatives=0",
        "--transform",
    )
    masks = f"masks={black_masks(digits / 'val')}"
    runs(*words, masks, "mask_prob=1.0", "mask_fill=gray", "cj_prob=0.0", "gaussian_blur=0.0", "solarization_prob=0.0")
    (row,) = read_rows(runs.folder.parent / "relicv2" / "metrics.csv")
    assert float(row["loss"]) == pytest.approx(math.log(16), abs=1e-5)
    said = runs(*words, "masks=nowhere", status=2)
    assert "error: the folder of masks does not exist: nowhere" in said


def test_bad_images_are_skipped_and_counted(runs, digits, tmp_path):
    """A resumed run goes on counting; a new one starts again. With two workers, and the kNN evaluation."""
    for split in ("train", "val"):
        shutil.copytree(digits / split, tmp_path / split)
    good = next((tmp_path / "train" / "4").iterdir())
    content = good.read_bytes()
    bad = [spoil(path) for path in (good, next((tmp_path / "val" / "2").iterdir()))]
    runs.arguments.remove("--skip-knn-eval")
    words = ("--train-dir", str(tmp_path / "train"), "--val-dir", str(tmp_path / "val"), "--num-workers", "2")
    words = (*words, "--knn-k", "5")
    said = runs("--epochs", "1", *words, status=2)
    assert "cannot be read as an image: " in said and "Traceback" not in said
    words = (*words, "--skip-bad-images")
    said = runs("--epochs", "1", *words)
    instead = "replaced by other images in training, left out of validation"
    assert f"2 images could not be decoded: {instead}; list: {runs.folder / LIST}\n" in said
    for path in (bad[0], runs.folder / LIST):
        assert path.is_file()
    bad[0].unlink()
    good.write_bytes(content)
    for more, names in ((runs.more(), bad), ((), bad[1:])):
        said = runs("--epochs", "2", *words, *more)
        assert (runs.folder / LIST).read_text().splitlines() == [str(path) for path in names]
        assert json.loads((runs.folder / "result.json").read_text())["bad_images"] == len(names)
    assert not list(runs.folder.glob(f".{LIST}-*"))


def test_loaders_replace_bad_training_images_and_leave_the_others_out(digits, tmp_path):
    shutil.copytree(digits / "val", tmp_path / "images")
    folder, names = tmp_path / "images", sorted((tmp_path / "images" / "0").iterdir())
    bad = spoil(names[1])
    options = validate({"train_dir": folder, "val_dir": folder, "num_workers": 0, "batch_size_per_device": 8})
    setup = Setup(options, {}, [], bad=BadImages(tmp_path))
    indexed, plain, held_out = (
        setup.loader(folder, setup.plain(), **more) for more in ({"indexed": True}, {}, {"held_out": True})
    )
    every, left = (torch.cat([batch[0] for batch in loader]) for loader in (plain, held_out))
    assert [len(every), len(left)] == [40, 39]
    assert torch.equal(every[1], every[2]) and torch.equal(left[1:], every[2:])
    views, _, index = indexed.dataset[1]
    assert torch.equal(views, every[2]) and index == 1 and torch.equal(indexed.dataset.evaluation[1][0], every[2])
    assert setup.bad.names() == [str(bad)]
