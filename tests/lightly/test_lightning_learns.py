"""The Lightning class of every method learns the digits with its defaults."""

from pathlib import Path

import pytest
import pytorch_lightning
import torch
from torch.utils.data import DataLoader

from lightly_ext import lightning
from lightly_ext.examples import common
from lightly_ext.names import CLASS_NAMES
from plugins.methods import METHODS
from plugins.testing import OF_VIEWS

pytestmark = pytest.mark.lightly

NAMES = {spec.name: name for name, spec in CLASS_NAMES.items()}


STEPS = (60, 200)
"""Most methods have learned something after the first number of steps; for the others the test begins anew."""


@pytest.mark.slow
@pytest.mark.parametrize("method", OF_VIEWS)
def test_every_lightning_class_learns_the_digits_with_its_defaults(
    method: str, augmented_digits: tuple, all_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, dataset = augmented_digits
    monkeypatch.setattr(common, "dataset", dataset)
    widths = {key: value for key, value in common.WIDTHS.items() if key in METHODS[method].options}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for steps in STEPS:
        torch.manual_seed(0)
        model = getattr(lightning, NAMES[method])(common.BATCH, 10, common._backbone(), input_dim=128, **widths)
        before = common.knn(model, all_digits)
        host = pytorch_lightning.Trainer(accelerator="cpu", devices=1, max_steps=steps, **quiet)
        host.fit(model, DataLoader(batches, batch_size=None))
        assert host.global_step == steps
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        after = common.knn(model, all_digits)
        if after > before + 10:
            return
    pytest.fail(f"kNN {before} before and {after} after the training")
