"""Log the metrics, the spectrum, the progress and the summary of a run.

A run's folder contains metrics.csv and TensorBoard events with all logged values, eigenvalues.csv if ``log_eigvals`` is
set, and a JSON summary. With ``wandb.enabled`` the values are also logged to Weights & Biases.
"""

import csv
import math
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
        epochs: number of completed epochs of a resumed run.
    """
    found: list[Any] = [
        AppendingCSVLogger(folder, epochs),
        pl.loggers.TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
    ]
    if cfg.wandb.enabled:
        found.append(_wandb_logger(cfg, folder))
    return found


def _wandb_logger(cfg: DictConfig, folder: Path) -> Any:
    """Build the logger of Weights & Biases; it is offline if requested, or if there is no account or no network."""
    import wandb

    def start(mode: str | None) -> Any:
        logger = pl.loggers.WandbLogger(
            name=cfg.name,
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            mode=mode,  # None: the environment variable WANDB_MODE decides
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
            f"wandb cannot log online: {reason}; it logs offline to ./wandb, and 'wandb sync' uploads the logs later"
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


class WeightDecaySchedule(pl.Callback):
    """Change the weight decay at the start of each epoch t of E: ``last − (last − first) (1 + cos(π t / E)) / 2``.

    Parameter groups without weight decay keep none.

    Args:
        first, last: the weight decay, > 0.
    """

    def __init__(self, first: float, last: float) -> None:
        self.first, self.last = first, last

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Set the weight decay of the epoch."""
        share = (1 + math.cos(math.pi * trainer.current_epoch / max(trainer.max_epochs or 1, 1))) / 2
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if group["weight_decay"]:
                    group["weight_decay"] = self.last - (self.last - self.first) * share


class RunGuard(Guard, pl.Callback):
    """Exit with a non-zero status if the run is interrupted, and end all of its processes."""


class EpochSeed(pl.Callback):
    """Seed torch at the start of each epoch, so that a resumed run draws the same numbers as an uninterrupted one.

    Args:
        seed: the seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Set the seed from (seed, epoch, rank)."""
        torch.manual_seed(hash((self.seed, trainer.current_epoch, trainer.global_rank)) & 0x7FFFFFFF)


class FlushMetrics(pl.Callback):
    """Write metrics.csv at the end of each epoch, before the checkpoint.

    Lightning writes the means over an epoch after the checkpoint of that epoch. The checkpoint contains them too, so
    that they are not lost if the run is killed in between.
    """

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the means over the last epoch."""
        return {"means": dict(self._means)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the means over the last epoch."""
        self._means = dict(state_dict["means"])

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the means of the last epoch before a resume to metrics.csv if they are missing there."""
        for logger in trainer.loggers:
            past = bool(self._means) and self._means["epoch"] < trainer.current_epoch  # not an epoch to be continued
            if trainer.is_global_zero and past and isinstance(logger, AppendingCSVLogger):
                logger.experiment.restore(self._means)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the logged rows."""
        means = {name: float(value) for name, value in trainer.logged_metrics.items() if value.numel() == 1}
        means = {name: value for name, value in means.items() if "val_" not in name and not name.endswith("_step")}
        self._means = {**means, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}
        for logger in trainer.loggers:
            logger.save()


class StopWhenNotFinite(pl.Callback):
    """Stop a run whose loss is inf or NaN.

    Raises:
        UserError: a loss of the epoch is inf or NaN. The checkpoint of the previous epoch is kept.
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
    """Print one line per epoch. It replaces the progress bar if the output is not a terminal."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start measuring the time."""
        self.began = time.perf_counter()
        self.first = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Print the epoch, the remaining time, and the losses and accuracies."""
        if not trainer.is_global_zero:
            return
        done = trainer.current_epoch + 1
        elapsed = time.perf_counter() - self.began
        steps, total = trainer.global_step, trainer.estimated_stepping_batches
        left = elapsed / max(steps - self.first, 1) * max(total - steps, 0)
        time_left = "" if left == float("inf") else f", {left:.0f} s left"
        values = trainer.callback_metrics
        losses = [name for name in values if name == "train_neg_cos_sim_epoch" or name.endswith("_loss_epoch")]
        own = [name for name in losses if name != "train_loss_epoch" and not name.endswith("class_loss_epoch")]
        own = ["train_ssl_loss_epoch"] if "train_ssl_loss_epoch" in values else own  # solo-learn has a name per method
        shown = (*own, "train_loss_epoch", "train_acc1_epoch", "val_acc1", "val_knn_acc1")
        text = "  ".join(f"{name.removesuffix('_epoch')} {values[name]:.4g}" for name in shown if name in values)
        print(f"epoch {done}/{trainer.max_epochs}  {text}  {elapsed:.0f} s{time_left}", flush=True)


class SpectrumWriter(pl.Callback):
    """Write the spectrum of the embedding's second moment at the end of each epoch: CSV, TensorBoard and wandb.

    Args:
        folder: the run's folder; eigenvalues.csv has the columns epoch, eigval_1 ≥ eigval_2 ≥ …
        epochs: number of completed epochs. Later rows of an interrupted run are deleted.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        self.path = folder / "eigenvalues.csv"
        self.epochs = epochs

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Delete the rows of epochs that are trained again."""
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
        is_new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["epoch", *(f"eigval_{index}" for index in range(1, len(spectrum) + 1))])
            writer.writerow([trainer.current_epoch, *spectrum.tolist()])
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_histogram("eigenvalues", spectrum, trainer.current_epoch)
            elif isinstance(logger, pl.loggers.WandbLogger):
                import wandb

                logger.experiment.log({"eigenvalues": wandb.Histogram(spectrum.numpy())}, commit=False)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the table ``eigvals`` to wandb, with one row per epoch, including the epochs before a resume."""
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
    """Collect totals for the summary of a run, also over a resume. Place it after the callbacks that log values.

    ``metrics`` contains the last value of each metric, ``seconds`` the time of training and validation.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._before, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of this process and of the interrupted processes of the run up to their last checkpoint."""
        return self._before + time.perf_counter() - self._began

    def update(self, trainer: pl.Trainer) -> None:
        """Store the last value of each logged metric."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        self.metrics.update(found)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store the values that were logged in the epoch."""
        self.update(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics and the time."""
        return {"metrics": dict(self.metrics), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics and the time."""
        self.metrics, self._before = dict(state_dict["metrics"]), state_dict["seconds"]


class Throughput(pl.Callback):
    """Measure the number of training images per second, excluding validation."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self._began = 0.0

    @property
    def images_per_second(self) -> float | None:
        """Images per second of this process, or None before the first batch. Several views count as one image."""
        return self.images / self.seconds if self.images else None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start measuring the time; a run that is resumed within an epoch does not start that epoch."""
        self._began = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start measuring the time."""
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start measuring the time again after a validation within the epoch."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and measure the time up to here."""
        self.images += len(batch[-1])
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now

    def state_dict(self) -> dict[str, Any]:
        """Return the number of images and the time."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of images and the time."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


class BestAccuracy(pl.Callback):
    """Store the best validation accuracy of all epochs in ``acc1``, in per cent; -inf before the first validation."""

    acc1 = float("-inf")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Update the best accuracy with that of this epoch."""
        if "val_acc1" in trainer.callback_metrics:
            self.acc1 = max(self.acc1, float(trainer.callback_metrics["val_acc1"]))

    def state_dict(self) -> dict[str, Any]:
        """Return the best accuracy."""
        return {"acc1": self.acc1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best accuracy."""
        self.acc1 = state_dict["acc1"]


def host_versions() -> dict[str, str | None]:
    """Return the versions of the packages that a result depends on."""
    return {**versions("pytorch-lightning", "torchmetrics", "timm"), "solo-learn": host_release()}
