"""VISSL's trainings on GPUs: NCCL, mixed precision and its resume, the loader that copies ahead.

Each runs on the CPU as far as it can, by the same function. Synchronised batch norm is in test_processes.py, feature
extraction and nearest neighbours are in test_features.py, on both devices too.
"""

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classy_vision.tasks.classification_task import AmpType
from torch.utils.data import DataLoader
from vissl.data import wrap_dataloader
from vissl.trainer.train_task import SelfSupervisionTask
from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

from vissl_ext.registry import register
from vissl_ext.task import PluginTask

register()
pytestmark = pytest.mark.vissl
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

LARC = [
    *("config.OPTIMIZER.name=sgd", "config.OPTIMIZER.use_larc=true", "config.OPTIMIZER.larc_config.clip=false"),
    "config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling.base_value=1.6",
]
AMP = ["config.MODEL.AMP_PARAMS.USE_AMP=true", "config.MODEL.AMP_PARAMS.AMP_TYPE=pytorch"]


def losses(folder: Path) -> list[float]:
    """Return the loss of each epoch."""
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def pretraining(folder: Path, epochs: int) -> list[str]:
    """Return the overrides of IsoLoss on the digits, with a small head."""
    small = [f"config.LOSS.isoloss.{key}" for key in ("proj_hidden_dim=32", "proj_output_dim=16", "log_eigvals=false")]
    return [
        *("config=pretrain/isoloss/digits", *small, "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=32"),
        *("config.DATA.TRAIN.TRANSFORMS.1.size=32", "config.CHECKPOINT.CHECKPOINT_FREQUENCY=1"),
        *(f"config.OPTIMIZER.num_epochs={epochs}", f"config.CHECKPOINT.DIR={folder}"),
    ]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("copy_ahead", ["true", "false"])
def test_nccl_trains_as_the_cpu(copy_ahead: str, on: Callable, tmp_path: Path, launch: Callable) -> None:
    """Two steps on the same augmented images, with either of VISSL's loaders; the sums' order and TF32 differ."""
    gpu = on("cuda")
    for device, overrides in (("cpu", on("cpu")), ("cuda", gpu)):
        limit = ["config.DATA.TRAIN.DATA_LIMIT=64", f"config.DATA.ENABLE_ASYNC_GPU_COPY={copy_ahead}"]
        launch(*pretraining(tmp_path / device, 1), *limit, *overrides)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)
    state = torch.load(tmp_path / "cuda" / "checkpoint.torch")
    assert state["iteration"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_training_with_larc_resumes(device: str, on: Callable, tmp_path: Path, launch: Callable) -> None:
    """On a GPU in mixed precision. To the bit on the CPU; the order of a GPU's sums varies."""
    overrides = [*LARC, *on(device), *(AMP if device == "cuda" else [])]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def train(folder: Path) -> str:
        return launch(*pretraining(folder, 2), *overrides)

    train(whole)
    resumed.mkdir()
    shutil.copy(whole / "model_phase0.torch", resumed)
    assert "resumed after 3 of 6 iterations" in train(resumed)
    name = "model_final_checkpoint_phase1.torch"
    one, other = (torch.load(folder / name)["classy_state_dict"] for folder in (whole, resumed))
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 0.05, "atol": 5e-3}
    torch.testing.assert_close(one["base_model"]["model"], other["base_model"]["model"], **tolerance)
    moments = [state["optimizer"]["optim"]["state"] for state in (one, other)]
    assert len(moments[0]) > 27  # the parameters of a ResNet-8 and its head
    torch.testing.assert_close(*moments, **tolerance)
    before = torch.load(whole / "model_phase0.torch")["classy_state_dict"]
    assert ("amp" in before) is (device == "cuda")
    if device == "cuda":
        # a scale that began anew would have counted fewer steps
        assert one["amp"] == other["amp"] and before["amp"]["scale"] > 0
    assert len(losses(whole)) == 2 and all(map(math.isfinite, losses(whole)))


# the loss scale of mixed precision


def task(scale: float | None) -> Any:
    """A task that can be saved, with a loss scale or without."""
    words = ["config=pretrain/isoloss/digits", "config.LOSS.isoloss.proj_hidden_dim=8"]
    task = PluginTask.from_config(convert_to_attrdict(compose_hydra_configuration(words), dump_config=False)[1])
    task.base_model = task._build_model()
    task.base_loss = task._build_loss()
    task.datasets, task.meters = {}, []
    if scale is not None:
        task.amp_type, task.amp_grad_scaler = AmpType.PYTORCH, torch.amp.GradScaler("cpu", init_scale=scale)
    return task


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, dict], Any]:
    """restored(task, state) → what VISSL is given to restore."""
    seen: list[dict] = []
    monkeypatch.setattr(SelfSupervisionTask, "_set_classy_state", lambda self, state: seen.append(state))

    def restore(task: Any, state: dict) -> dict:
        task._set_classy_state(state)
        return seen.pop()

    return restore


def test_loss_scale_is_saved(restored: Callable) -> None:
    saved = task(8.0)
    stock = SelfSupervisionTask.get_classy_state(saved)
    assert "amp" not in stock, "mended upstream"
    state = saved.get_classy_state()
    assert state["amp"]["scale"] == 8.0
    assert restored(task(2.0), state)["amp"] == state["amp"]
    assert "amp" not in task(None).get_classy_state()


@pytest.mark.parametrize("amp", [{}, {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 3}}])
def test_loss_scale_of_apex_is_left_out(amp: dict, restored: Callable) -> None:
    assert restored(task(2.0), {"amp": amp, "train": True}) == {"train": True}


def test_training_in_full_precision_goes_on_from_mixed(restored: Callable) -> None:
    assert restored(task(None), {"amp": {"scale": 8.0}, "train": True}) == {"train": True}


# loaders


@pytest.mark.parametrize("copy_ahead", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_loader_gives_every_batch_once(device: str, copy_ahead: bool, on: Callable) -> None:
    on(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 4, 4, generator=generator)
    rows = [{"data": [images[index]], "label": [index % 3], "data_valid": [1.0]} for index in range(10)]
    loader = wrap_dataloader(DataLoader(rows, batch_size=4), copy_ahead, torch.device(device))
    assert len(loader) == 3
    for _ in range(2):  # two epochs
        batches = list(loader)
        assert {batch["data"][0].device.type for batch in batches} == {device}
        assert {batch["label"][0].device.type for batch in batches} == {device}
        assert torch.equal(torch.cat([batch["data"][0].cpu() for batch in batches]), images)
        assert torch.cat([batch["label"][0].cpu() for batch in batches]).tolist() == [index % 3 for index in range(10)]
