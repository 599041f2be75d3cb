"""Two processes on the CPU: they train, evaluate and checkpoint as one would."""

import csv
import json
import shutil
import socket

import pytest
import torch
from omegaconf import OmegaConf

from plugins.testing import spoil, tiny_backbone
from plugins.tools.bad_images import LIST
from solo_ext.checkpoint import find_checkpoint, run_folder
from solo_ext.datasets import image_dataset
from solo_ext.transforms import evaluation_transform

pytestmark = [pytest.mark.solo, pytest.mark.slow, pytest.mark.ddp]


def _two(run, *more: str, **kind: str) -> str:
    """Run a command in two processes, started as torchrun would start them; return their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    more = ("++devices=2", "++strategy=ddp", *more)
    logs, processes = [run.out / f"log{rank}" for rank in (0, 1)], []
    for rank, run.log in enumerate(logs):
        processes.append(run.start(*more, **kind, environment={**place, "LOCAL_RANK": str(rank)}))
    statuses = [process.wait(300) for process in processes]
    text = "".join(log.read_text() for log in logs)
    assert statuses == [0, 0], text
    return text


_COMMON = ("++accelerator=cpu", "++data.num_workers=0")


@pytest.fixture(scope="module")
def pretrained(new_run, tmp_path_factory):
    """Two epochs of IsoLoss in two processes: what was printed, the run, and the validation images that are bad."""
    run = new_run(tmp_path_factory.mktemp("two"))
    shutil.copytree(run.digits / "val", run.out / "val")
    bad = [str(spoil(path)) for path in sorted(run.out.glob("val/*/*.png"))[:2]]  # each process reads one
    images = f"data.train_path={run.digits / 'train'}"
    skip = (f"data.val_path={run.out / 'val'}", "++data.skip_bad_images=true")
    options = ("++checkpoint.keep_prev=true", "++knn_eval.enabled=true", "++knn_eval.k=5")
    return _two(run, *_COMMON, images, *skip, "max_epochs=2", *options), run, bad


def test_two_processes_are_one_run(pretrained):
    text, run, bad = pretrained
    folder = run.folder
    assert text.count("epoch 1/2") == text.count("wrote ") == 1
    names = sorted(path.name.split("-")[-1] for path in folder.glob("*.ckpt"))
    assert names == ["ep=0.ckpt", "ep=1.ckpt"]
    summary = json.loads((folder / "pretrain.json").read_text())
    assert {"val_acc1", "val_knn_acc1", "train_acc1", "eigval_metrics/part_ratio"} <= set(summary["metrics"])
    assert (folder / LIST).read_text().splitlines() == bad and not list(folder.glob(f".{LIST}-*"))
    assert summary["bad_images"] == 2 and text.count("2 images could not be decoded") == 1
    # 96 images, 2 processes of 16: 3 steps an epoch
    assert torch.load(find_checkpoint(folder), weights_only=True)["global_step"] == 6
    with (folder / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file) if row["epoch"]} == {"0", "1"}


def test_learning_rates_grow_with_the_processes(pretrained):
    """lr · batch size · devices / 256, as solo-learn documents."""
    folder = pretrained[1].folder
    given = json.loads((folder / "args.json").read_text())
    raw = given["identity"]["optimizer"]
    assert given["optimizer"]["lr"] == pytest.approx(raw["lr"] * 16 * 2 / 256, rel=1e-12)
    assert given["optimizer"]["classifier_lr"] == pytest.approx(raw["classifier_lr"] * 16 * 2 / 256, rel=1e-12)


def test_one_process_goes_on_where_two_stopped(pretrained, new_run, tmp_path):
    _, two, _ = pretrained
    first = next(two.folder.glob("*ep=0.ckpt"))
    one = new_run(tmp_path / "one")
    images = f"data.train_path={one.digits / 'train'}"
    # half the learning rate a process, so the same rate and the same joined batch
    text = one(*_COMMON, images, "max_epochs=2", f"++resume_from_checkpoint='{first}'")
    assert "resuming after epoch 1 of 2" in text
    assert torch.load(find_checkpoint(one.folder), weights_only=True)["global_step"] == 3 + 6


def test_evaluation_counts_every_image_once(pretrained, new_run, tmp_path):
    """Linear evaluation in two processes: its accuracy is that of its checkpoint over all images, to the last one."""
    run = new_run(tmp_path / "runs")
    more = (f"pretrained_feature_extractor={pretrained[1].folder}", "optimizer.batch_size=7", "++max_epochs=1")
    _two(run, *_COMMON, *more, kind="linear", config="linear")
    folder = run.out / "linear" / "v"
    state = torch.load(find_checkpoint(folder), weights_only=True)["state_dict"]
    backbone = tiny_backbone().eval()
    weights = {name: value for name, value in state.items() if name.startswith("backbone.")}
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in weights.items()})
    options = {"indexed": False, "no_labels": False}
    val = image_dataset("digits", str(run.digits / "val"), "val", evaluation_transform("digits", 16), **options)
    images, labels = torch.stack([image for image, _ in val]), torch.tensor([label for _, label in val])
    with torch.no_grad():
        logits = backbone(images) @ state["classifier.weight"].T + state["classifier.bias"]
    expected = (logits.argmax(dim=1) == labels).double().mean().item() * 100
    assert len(val) == 40
    assert json.loads((folder / "linear.json").read_text())["acc1"] == pytest.approx(expected, abs=1e-4)


def test_processes_of_a_job_do_not_inherit_the_name_of_another_run(monkeypatch):
    """The process that submits a job may have trained before: its environment has the name of that run."""
    cfg = OmegaConf.create({"checkpoint": {"dir": "runs", "version": "", "group": None}})
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    found = set()
    for rank in ("0", "1"):
        monkeypatch.setenv("SOLO_EXT_RUN_VERSION", "offline-submitted")
        monkeypatch.setenv("SLURM_PROCID", rank)
        found.add(run_folder(cfg, "isoloss").name)
    assert len(found) == 1 and found != {"offline-submitted"}
    monkeypatch.setenv("SLURM_NTASKS", "1")  # Lightning has started the process
    monkeypatch.setenv("SOLO_EXT_RUN_VERSION", "offline-started")
    assert run_folder(cfg, "isoloss").name == "offline-started"
