"""Build the Trainer of a run and its callbacks."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from lightly_ext.benchmarks.schema import Options
from lightly_ext.models import MethodModel
from plugins.tools.metrics import AppendingRows
from plugins.tools.random_state import RandomState
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
    """Build the Trainer of a training or an evaluation.

    Args:
        options: the options of the command line.
        folder: the folder of Lightning's own metrics.csv.
        epochs: number of epochs.
        callbacks: the callbacks in addition to RunGuard.
        precision: floating-point precision; None means Lightning's default.
        sync_batchnorm: whether batch norm uses the statistics of all devices, which needs GPUs.
        epochs_before: number of completed epochs of a resumed run, whose rows in metrics.csv are kept.
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
    """Return the number of epochs between validations: at least ten in a long run, the last after the last epoch.

    >>> [validation_period(epochs) for epochs in (1, 7, 12, 90, 100)]
    [1, 1, 1, 9, 10]
    """
    return max((period for period in range(1, epochs // 10 + 1) if epochs % period == 0), default=1)


class EpochRecord(Callback):
    """Write a row of metrics.csv and, with ``log_eigvals``, of eigenvalues.csv in each epoch, and measure the speed.

    The columns of metrics.csv are epoch and loss, the mean of ``train_loss`` over the epoch. ``images`` and ``seconds``
    count the training on this process, without validation; several views count as one image. The checkpoints contain
    the state of the callback, so that a resumed run continues the counts.

    Args:
        folder: the folder of the files.
        identity: the identity of the run, which is stored in its checkpoints.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.identity = dict(identity or {})
        self.images, self.seconds, self.epochs = 0, 0.0, 0
        self.metrics: dict[str, float] = {}
        self._before, self._since = 0.0, time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of the run, including validation."""
        return self._before + time.perf_counter() - self._since

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, the last metrics and the identity of the run."""
        counts = {"images": self.images, "seconds": self.seconds, "epochs": self.epochs, "elapsed": self.elapsed}
        return {**counts, "metrics": dict(self.metrics), "identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts and the last metrics."""
        self.images, self.seconds, self.epochs = (state_dict[key] for key in ("images", "seconds", "epochs"))
        self.metrics, self._before = dict(state_dict["metrics"]), state_dict["elapsed"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring the time."""
        self._began = time.perf_counter()
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and stop measuring the time after the last batch, before the validation."""
        self.images += len(batch[1])
        if "train_loss" in trainer.callback_metrics:
            self._losses.append(trainer.callback_metrics["train_loss"].detach().clone())
        if trainer.is_last_batch:
            self.seconds += time.perf_counter() - self._began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of the epoch."""
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


class RandomStates(Callback):
    """Continue the random numbers of each process in a resumed run, so that it sees the images of an uninterrupted one.

    The checkpoint of an epoch contains the states after the epoch. A run that is resumed with another number of
    processes draws new numbers.
    """

    def __init__(self) -> None:
        self._states: list[Any] = []
        self._resumed: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all processes."""
        return {"states": self._states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the states until training starts."""
        self._states = self._resumed = state_dict["states"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states in the first epoch of a resumed run."""
        states, self._resumed = self._resumed, []
        if len(states) == trainer.world_size:
            RandomState.from_plain(states[trainer.global_rank]).restore()
            # the data loader of a resumed run has already drawn the order of the images and the seed of its workers
            loop: Any = trainer.fit_loop
            if getattr(loop, "is_resuming", False):
                iter(loop._data_fetcher)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the states of all processes."""
        mine = RandomState.now(pl_module.device).plain()
        self._states = [mine]
        if trainer.world_size > 1:
            self._states = [mine] * trainer.world_size
            dist.all_gather_object(self._states, mine)


class RunGuard(Guard, Callback):
    """Exit with a non-zero status if the run is interrupted, and end all of its processes."""


class _AppendingCSVLogger(AppendingRows, CSVLogger):
    """A CSVLogger that keeps the rows of an interrupted run."""


class _CheckpointIO(AtomicCheckpointIO, TorchCheckpointIO):
    """Lightning's checkpoint format, written atomically."""
