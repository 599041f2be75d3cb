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

pytestmark = [pytest.mark.lightly, pytest.mark.usefixtures("narrow_examples")]

NAMES = {spec.name: name for name, spec in CLASS_NAMES.items()}
STEPS = (10, 20, 40, 70, 100, 150, 200)


class Learned(pytorch_lightning.Callback):
    """Compute kNN after STEPS, and end the training as soon as it is 10 points above ``before``."""

    def __init__(self, before: float, data: Path) -> None:
        self.before, self.data, self.found = before, data, []

    def on_train_batch_end(self, trainer: pytorch_lightning.Trainer, module: torch.nn.Module, *_: object) -> None:
        """Compute it."""
        if trainer.global_step in STEPS:
            self.found.append(common.knn(module, self.data))
            trainer.should_stop = self.enough

    @property
    def enough(self) -> bool:
        """The last kNN is 10 points above the one before the training."""
        return self.found[-1] > self.before + 10


@pytest.mark.slow
@pytest.mark.parametrize("method", OF_VIEWS)
def test_every_lightning_class_learns_the_digits_with_its_defaults(
    method: str, augmented_digits: tuple, all_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, dataset = augmented_digits
    monkeypatch.setattr(common, "dataset", dataset)
    widths = {key: value for key, value in common.WIDTHS.items() if key in METHODS[method].options}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    torch.manual_seed(0)
    model = getattr(lightning, NAMES[method])(common.BATCH, 10, common._backbone(), input_dim=64, **widths)
    before = common.knn(model, all_digits)
    learned = Learned(before, all_digits)
    host = pytorch_lightning.Trainer(accelerator="cpu", devices=1, max_steps=STEPS[-1], callbacks=[learned], **quiet)
    host.fit(model, DataLoader(batches, batch_size=None))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert learned.enough, (before, learned.found)
