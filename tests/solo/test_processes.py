"""Two processes on the CPU: they train, evaluate and checkpoint as one would."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solo_ext.checkpoint import find_checkpoint
from solo_ext.datasets import image_dataset
from solo_ext.transforms import evaluation_transform

pytestmark = [pytest.mark.solo, pytest.mark.slow, pytest.mark.ddp]
ROOT = Path(__file__).parents[2]


def _run(module: str, digits: Path, out: Path, name: str, *more: str) -> str:
    """A command in processes of its own, as a user starts it."""
    argv = [
        *(sys.executable, "-m", f"solo_ext.{module}"),
        *("--config-path", str(ROOT / "configs" / "solo" / "digits"), "--config-name", name),
        *(f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}", f"++checkpoint.dir={out}"),
        *("optimizer.batch_size=16", "++check_val_every_n_epoch=1", "++accelerator=cpu", "++data.num_workers=0"),
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pretrained(digits, tmp_path_factory):
    """Two epochs of IsoLoss in two processes: what was printed, and the run's folder."""
    out = tmp_path_factory.mktemp("two")
    text = _run(
        *("main_pretrain", digits, out, "isoloss", "++devices=2", "++strategy=ddp", "max_epochs=2"),
        *("++checkpoint.keep_prev=true", "++checkpoint.frequency=1", "++knn_eval.enabled=true", "++knn_eval.k=5"),
    )
    (folder,) = (out / "isoloss").iterdir()
    return text, folder


def test_two_processes_are_one_run(pretrained):
    text, folder = pretrained
    assert text.count("epoch 1/2") == text.count("wrote ") == 1
    names = sorted(path.name.split("-")[-1] for path in folder.glob("*.ckpt"))
    assert names == ["ep=0.ckpt", "ep=1.ckpt"]
    summary = json.loads((folder / "pretrain.json").read_text())
    assert {"val_acc1", "val_knn_acc1", "train_acc1", "eigval_metrics/part_ratio"} <= set(summary["metrics"])
    # 96 images, 2 processes of 16: 3 steps an epoch
    assert torch.load(find_checkpoint(folder), weights_only=True)["global_step"] == 6
    with (folder / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file) if row["epoch"]} == {"0", "1"}


def test_learning_rates_grow_with_the_processes(pretrained):
    """lr · batch size · devices / 256, as solo-learn documents."""
    _, folder = pretrained
    given = json.loads((folder / "args.json").read_text())
    raw = given["identity"]["optimizer"]
    assert given["optimizer"]["lr"] == pytest.approx(raw["lr"] * 16 * 2 / 256, rel=1e-12)
    assert given["optimizer"]["classifier_lr"] == pytest.approx(raw["classifier_lr"] * 16 * 2 / 256, rel=1e-12)


def test_one_process_goes_on_where_two_stopped(pretrained, digits, tmp_path):
    _, folder = pretrained
    first = next(folder.glob("*ep=0.ckpt"))
    # half the learning rate a process, so the same rate and the same joined batch
    text = _run(
        *("main_pretrain", digits, tmp_path, "isoloss", "++devices=1", "max_epochs=2", "++checkpoint.version=v"),
        f"++resume_from_checkpoint='{first}'",
    )
    assert "resuming after epoch 1 of 2" in text
    assert torch.load(find_checkpoint(tmp_path / "isoloss" / "v"), weights_only=True)["global_step"] == 3 + 6


def test_evaluation_counts_every_image_once(pretrained, digits, tmp_path):
    """Linear evaluation in two processes: its accuracy is that of its checkpoint over all images, to the last one."""
    from solo_ext.backbones import build_backbone

    _, folder = pretrained
    _run(
        *("main_linear", digits, tmp_path, "linear", "++devices=2", "++strategy=ddp", "++max_epochs=1"),
        *(f"pretrained_feature_extractor={folder}", "++checkpoint.version=v", "optimizer.batch_size=7"),
    )
    run = tmp_path / "linear" / "v"
    summary = json.loads((run / "linear.json").read_text())
    state = torch.load(find_checkpoint(run), weights_only=True)["state_dict"]
    backbone = build_backbone("resnet18", summary["config"]["backbone"]["kwargs"], "digits", 16).eval()
    weights = {name: value for name, value in state.items() if name.startswith("backbone.")}
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in weights.items()})
    val = image_dataset("digits", str(digits / "val"), "val", evaluation_transform("digits", 16), indexed=False,
                        no_labels=False)  # fmt: skip
    images, labels = torch.stack([image for image, _ in val]), torch.tensor([label for _, label in val])
    with torch.no_grad():
        logits = backbone(images) @ state["classifier.weight"].T + state["classifier.bias"]
    expected = (logits.argmax(dim=1) == labels).double().mean().item() * 100
    assert len(val) == 40
    assert summary["acc1"] == pytest.approx(expected, abs=1e-4)
