"""The Trainer of a run and its callbacks."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from lightly_ext.benchmarks.schema import Options
from lightly_ext.models import MethodModel
from plugins.tools.metrics import AppendingRows
from plugins.tools.records import write_row
from plugins.tools.trainer import AtomicCheckpointIO, Guard


def trainer(
    options: Options,
    folder: Path,
    epochs: int,
    callbacks: list[Callback],
    *,
    precision: str | None = None,
    sync_batchnorm: bool = False,
    epochs_before: int = 0,
) -> Trainer:
    """Make the Trainer of a training or an evaluation.

    Args:
        options: of the command line.
        folder: for Lightning's own metrics.csv.
        epochs: of the training.
        callbacks: besides RunGuard.
        precision: None: that of Lightning.
        sync_batchnorm: whether batch statistics are those of all devices; this needs GPUs.
        epochs_before: epochs of a run that is resumed; the rows of these stay in metrics.csv.
    """
    return Trainer(
        max_epochs=epochs,
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy or "auto",
        precision=precision,
        callbacks=[RunGuard(), *callbacks],
        plugins=[_CheckpointIO()],
        logger=_AppendingCSVLogger(folder, epochs_before),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=validation_period(epochs),
        log_every_n_steps=10,
        sync_batchnorm=sync_batchnorm and options.devices > 1 and torch.cuda.is_available(),
    )


def validation_period(epochs: int) -> int:
    """Return the epochs between validations: at least ten validations in a long run, and one after the last epoch.

    >>> [validation_period(epochs) for epochs in (1, 7, 12, 90, 100)]
    [1, 1, 1, 9, 10]
    """
    return max((period for period in range(1, epochs // 10 + 1) if epochs % period == 0), default=1)


class EpochRecord(Callback):
    """Writes metrics.csv, and with ``log_eigvals`` eigenvalues.csv, a row an epoch; measures the training's speed.

    The columns of metrics.csv are epoch and loss, the mean of ``train_loss`` over the epoch. ``images`` and ``seconds``
    are those of training alone, on this process; an image counts once, whatever the number of its views.

    Its state is in the checkpoints, so that a resumed run goes on counting.

    Args:
        folder: where the files go.
        identity: of the run, for its checkpoints.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.identity = dict(identity or {})
        self.images, self.seconds, self.epochs = 0, 0.0, 0
        self.metrics: dict[str, float] = {}
        self._before, self._since = 0.0, time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of the run, validation included."""
        return self._before + time.perf_counter() - self._since

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        counted = {"images": self.images, "seconds": self.seconds, "epochs": self.epochs, "elapsed": self.elapsed}
        return {**counted, "metrics": dict(self.metrics), "identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.images, self.seconds, self.epochs = (state_dict[key] for key in ("images", "seconds", "epochs"))
        self.metrics, self._before = dict(state_dict["metrics"]), state_dict["elapsed"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; stop the clock at the epoch's last, before the validation."""
        self.images += len(batch[1])
        if "train_loss" in trainer.callback_metrics:
            self._losses.append(trainer.callback_metrics["train_loss"].detach().clone())
        if trainer.is_last_batch:
            self.seconds += time.perf_counter() - self._began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows."""
        self.epochs = trainer.current_epoch + 1
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if value.numel() == 1}
        self.metrics.update(found)
        if not trainer.is_global_zero:
            return
        if self._losses:
            loss = float(torch.stack(self._losses).mean())
            write_row(self.folder / "metrics.csv", trainer.current_epoch, {"loss": loss})
        if isinstance(pl_module, MethodModel) and pl_module.options.get("log_eigvals"):
            spectrum = pl_module.moment.spectrum().tolist()
            values = {f"eigval_{index}": value for index, value in enumerate(spectrum, 1)}
            write_row(self.folder / "eigenvalues.csv", trainer.current_epoch, values)


class RunGuard(Guard, Callback):
    """A run that does not finish ends with a status that is not 0, and leaves no process behind."""


class _AppendingCSVLogger(AppendingRows, CSVLogger):
    """A CSVLogger that keeps the rows of an interrupted run."""


class _CheckpointIO(AtomicCheckpointIO, TorchCheckpointIO):
    """Write checkpoints so that each file is complete or absent."""
