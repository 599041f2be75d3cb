"""Logging: metrics, spectrum, progress and summary of a run.

A run's folder has metrics.csv and TensorBoard events of all logged values, eigenvalues.csv with ``log_eigvals``, and a
JSON summary. With ``wandb.enabled`` the values also go to Weights & Biases.
"""

import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.metrics import AppendingRows
from plugins.tools.records import read_rows, versions, write_rows
from plugins.tools.trainer import Guard
from solo_ext.compat import host_release, pl


class AppendingCSVLogger(AppendingRows, pl.loggers.CSVLogger):
    """A CSVLogger that keeps the rows of an interrupted run."""


def loggers(cfg: DictConfig, folder: Path, epochs: int) -> list[Any]:
    """Build Lightning's loggers of a run.

    Args:
        cfg: the configuration.
        folder: the run's folder.
        epochs: the number of epochs already trained, for a resumed run.
    """
    found: list[Any] = [
        AppendingCSVLogger(folder, epochs),
        pl.loggers.TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
    ]
    if cfg.wandb.enabled:
        found.append(_wandb_logger(cfg, folder))
    return found


def _wandb_logger(cfg: DictConfig, folder: Path) -> Any:
    """Build the logger of Weights & Biases; offline on request, and without an account or a network."""
    import wandb

    def start(mode: str | None) -> Any:
        logger = pl.loggers.WandbLogger(
            name=cfg.name,
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            mode=mode,  # None: the environment decides
            id=folder.name,
            resume="allow",
        )
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        return logger

    try:
        return start("offline" if cfg.wandb.offline else None)
    except wandb.errors.Error as error:
        reason = str(error).strip().splitlines()[0]
        print_on_rank_zero(
            f"wandb logs offline to ./wandb, 'wandb sync' uploads it later; it cannot log online: {reason}"
        )
        return start("offline")


def callbacks(cfg: DictConfig) -> list[pl.Callback]:
    """Build the callbacks of every run: progress, checks, seeds, learning rate, CSV flush."""
    shown = [pl.callbacks.TQDMProgressBar()] if sys.stderr.isatty() else [EpochLines()]
    return [
        *shown,
        RunGuard(),
        StopWhenNotFinite(),
        EpochSeed(cfg.seed),
        pl.callbacks.LearningRateMonitor(logging_interval="epoch"),
        FlushMetrics(),
    ]


class RunGuard(Guard, pl.Callback):
    """End an unfinished run with a non-zero status, and end all of its processes."""


class EpochSeed(pl.Callback):
    """Seed torch in each epoch, so that a resumed run draws the same numbers as an uninterrupted one.

    Args:
        seed: the seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Seed from (seed, epoch, process)."""
        torch.manual_seed(hash((self.seed, trainer.current_epoch, trainer.global_rank)) & 0x7FFFFFFF)


class FlushMetrics(pl.Callback):
    """Write metrics.csv at the end of each epoch, before the checkpoint.

    Lightning logs the means over an epoch after the checkpoint of that epoch. The checkpoint has them too, for a run
    that was killed in between.
    """

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the means over the last epoch for the checkpoint."""
        return {"means": dict(self._means)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the means over the last epoch."""
        self._means = dict(state_dict["means"])

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Add the means of the epoch before a resume to metrics.csv if they are missing."""
        for logger in trainer.loggers:
            if trainer.is_global_zero and self._means and isinstance(logger, AppendingCSVLogger):
                logger.experiment.restore(self._means)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the logged rows."""
        means = {name: float(value) for name, value in trainer.logged_metrics.items() if value.numel() == 1}
        means = {name: value for name, value in means.items() if "val_" not in name and not name.endswith("_step")}
        self._means = {**means, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}
        for logger in trainer.loggers:
            logger.save()


class StopWhenNotFinite(pl.Callback):
    """End a run whose loss is inf or NaN.

    Raises:
        UserError: at the end of the first such epoch; the previous checkpoint is kept.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check the losses of the epoch."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train_") and "loss" in name and not torch.isfinite(value).all():
                raise UserError(
                    f"{name} is {float(value)} in epoch {trainer.current_epoch + 1}: training diverged; "
                    "lower optimizer.lr, or use optimizer.name=adam or lars"
                )


class EpochLines(pl.Callback):
    """Print one line per epoch, when there is no terminal for a progress bar."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self.began = time.perf_counter()
        self.first = trainer.current_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Print the epoch, the remaining time, and the losses and accuracies."""
        if not trainer.is_global_zero:
            return
        done = trainer.current_epoch + 1
        passed = time.perf_counter() - self.began
        left = passed / (done - self.first) * (trainer.max_epochs - done)
        shown = ("train_ssl_loss_epoch", "train_loss_epoch", "train_acc1_epoch", "val_acc1", "val_knn_acc1")
        values = trainer.callback_metrics
        text = "  ".join(f"{name.removesuffix('_epoch')} {values[name]:.4g}" for name in shown if name in values)
        print(f"epoch {done}/{trainer.max_epochs}  {text}  {passed:.0f} s, {left:.0f} s left", flush=True)


class SpectrumWriter(pl.Callback):
    """Write the spectrum of the embedding's second moment at the end of each epoch: CSV, TensorBoard and wandb.

    Args:
        folder: the run's folder; eigenvalues.csv has the columns epoch, eigval_1 ≥ eigval_2 ≥ …
        epochs: rows of this epoch and later, from an interrupted run, are dropped.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        self.path = folder / "eigenvalues.csv"
        self.epochs = epochs

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Drop the rows of epochs that are trained again."""
        if trainer.is_global_zero and self.path.is_file():
            rows = read_rows(self.path)
            kept = [row for row in rows if int(row["epoch"]) < self.epochs]
            if kept:
                write_rows(self.path, list(kept[0]), kept)
            else:
                self.path.unlink()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Append the row of this epoch."""
        if not trainer.is_global_zero or module.moment is None:
            return
        spectrum = module.moment.spectrum().cpu()
        new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["epoch", *(f"eigval_{index}" for index in range(1, len(spectrum) + 1))])
            writer.writerow([trainer.current_epoch, *spectrum.tolist()])
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_histogram("eigenvalues", spectrum, trainer.current_epoch)
            elif isinstance(logger, pl.loggers.WandbLogger):
                import wandb

                logger.experiment.log({"eigenvalues": wandb.Histogram(spectrum.numpy())}, commit=False)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the table ``eigvals`` to wandb: one row per epoch, including those before a resume."""
        if not trainer.is_global_zero or not self.path.is_file():
            return
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.WandbLogger):
                import wandb

                with self.path.open(newline="") as file:
                    header, *rows = csv.reader(file)
                table = wandb.Table(columns=header[1:], data=[[float(value) for value in row[1:]] for row in rows])
                logger.experiment.log({"eigvals": table})


class Totals(pl.Callback):
    """Totals of the run for its summary, continued after a resume; must come after the callbacks that log.

    ``metrics`` has the last value of each metric, ``seconds`` the time of training and validation.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._before, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time of this process, and of the resumed ones up to their last checkpoint."""
        return self._before + time.perf_counter() - self._began

    def update(self, trainer: pl.Trainer) -> None:
        """Store the logged values."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        self.metrics.update(found)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store the values that the epoch has logged."""
        self.update(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the values for the checkpoint."""
        return {"metrics": dict(self.metrics), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from these values."""
        self.metrics, self._before = dict(state_dict["metrics"]), state_dict["seconds"]


class Throughput(pl.Callback):
    """Measure the training images per second, without validation."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0

    @property
    def images_per_second(self) -> float | None:
        """Images of this process per second, each counted once for any number of views; None before the first batch."""
        return self.images / self.seconds if self.images else None

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began: float | None = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and stop the clock after the last of the epoch."""
        self.images += len(batch[-1])
        if trainer.is_last_batch and self._began is not None:
            self.seconds += time.perf_counter() - self._began
            self._began = None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for the checkpoint."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from these values."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


class BestAccuracy(pl.Callback):
    """Store the best validation accuracy of all epochs in ``acc1`` (per cent; -inf before the first)."""

    acc1 = float("-inf")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare the accuracy of this epoch."""
        if "val_acc1" in trainer.callback_metrics:
            self.acc1 = max(self.acc1, float(trainer.callback_metrics["val_acc1"]))

    def state_dict(self) -> dict[str, Any]:
        """Return the values for the checkpoint."""
        return {"acc1": self.acc1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from these values."""
        self.acc1 = state_dict["acc1"]


def host_versions() -> dict[str, str | None]:
    """Return the versions of the packages that a result depends on."""
    return {**versions("pytorch-lightning", "torchmetrics", "timm"), "solo-learn": host_release()}
