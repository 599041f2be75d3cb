"""Our methods train from the multi-crop YAML files of solo-learn's main branch, with its views and its trainer."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from plugins.methods import METHODS
from plugins.testing import NARROW, OF_VIEWS
from solo_ext import main_pretrain
from solo_ext.checkpoint import find_checkpoint

pytestmark = [pytest.mark.solo, pytest.mark.slow]
FOLDER = Path("scripts", "pretrain")
FILES = ("cifar-multicrop/swav", *(f"imagenet-100-multicrop/{name}" for name in ("byol", "simclr", "supcon")))


def _train(file: str, method: str, checkout: Path, digits: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on a CPU with another method and its options in place of the file's."""
    widths = {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 8, "n_classes": 8, "bottleneck_dim": 6}
    spec = METHODS[method]
    own = {key: value for key, value in {**widths, **NARROW}.items() if key in spec.options}
    if "log_eigvals" in spec.options:
        own["log_eigvals"] = True  # an option of ours alone: where both have the method, it selects ours
    folder = (checkout / FOLDER / file).parent
    argv = [
        *("--config-path", str(folder), "--config-name", f"{Path(file).name}.yaml", f"method={method}"),
        *("data.dataset=custom", f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}"),
        *("data.format=image_folder", "data.num_workers=0", "optimizer.batch_size=8", "backbone.name=tiny"),
        *("max_epochs=1", "+limit_train_batches=2", "+limit_val_batches=1", "accelerator=cpu", "devices=1"),
        *("strategy=auto", "precision=32", "wandb.enabled=False", "auto_resume.enabled=False"),
        *(f"checkpoint.dir={out}", "++checkpoint.version=v", "~method_kwargs"),
        *(f"++method_kwargs.{key}={value}" for key, value in own.items()),
        *(("++momentum.base_tau=0.9",) if spec.teacher else ()),
    ]
    monkeypatch.setattr(sys, "argv", ["main_pretrain", *argv])
    main_pretrain.main()
    summary = json.loads((out / method / "v" / "pretrain.json").read_text())
    assert (summary["config"]["data"]["num_large_crops"], summary["config"]["data"]["num_small_crops"]) == (2, 6)
    assert math.isfinite(summary["metrics"]["train_ssl_loss_epoch"])
    checkpoint = torch.load(find_checkpoint(out / method / "v"), weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize("method", OF_VIEWS)
def test_every_method_trains_with_the_crops_of_the_swav_file(method, checkout, tiny, digits, tmp_path, monkeypatch):
    _train(FILES[0], method, checkout, digits, tmp_path, monkeypatch)


@pytest.mark.parametrize(("file", "method"), zip(FILES[1:], ("isoloss", "simclr", "dissl"), strict=True))
def test_files_with_crops_of_224_and_96_pixels_train(file, method, checkout, tiny, digits, tmp_path, monkeypatch):
    _train(file, method, checkout, digits, tmp_path, monkeypatch)
