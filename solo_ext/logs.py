"""What a run writes about itself: metrics, spectrum, progress, and a summary.

In the run's folder: metrics.csv and TensorBoard events of everything that is logged, eigenvalues.csv when
``log_eigvals`` is set, and one JSON summary. Weights & Biases joins them when ``wandb.enabled``.
"""

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.tools.command import UserError, say
from plugins.tools.records import read_rows, versions, write_rows
from plugins.tools.trainer import Guard
from solo_ext.compat import host_release, pl


class AppendingCSVLogger(pl.loggers.CSVLogger):
    """A CSVLogger that keeps the rows of an interrupted run, where Lightning's deletes the file.

    Args:
        folder: the run's folder.
        epochs: rows of this epoch and later are dropped, for they are trained again.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=10**9)
        self._path, self._epochs = folder / "metrics.csv", epochs

    @property
    def experiment(self) -> Any:
        """The writer of the first process, made at the first use; the others have Lightning's dummy."""
        if self._experiment is None and pl.utilities.rank_zero_only.rank == 0:
            rows = _rows_before(self._epochs, read_rows(self._path)) if self._epochs else []
            self._experiment = RowWriter(self._path, rows)
        return super().experiment


class RowWriter:
    """Writes metrics.csv so that a kill at any time leaves all complete rows. Has of Lightning's what a logger calls.

    Args:
        path: of the file.
        rows: that it begins with.
    """

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path = path
        self.metrics: list[dict[str, Any]] = []
        self._columns = sorted(rows[0]) if rows else []
        if rows:
            write_rows(path, self._columns, rows)
        else:
            path.unlink(missing_ok=True)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep a row until the next :meth:`save`."""
        values = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()}
        self.metrics.append({**values, "step": len(self.metrics) if step is None else step})

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Nothing: args.json has them."""

    def save(self) -> None:
        """Append the rows; where they bring new columns, replace the file."""
        if not self.metrics:
            return
        columns = sorted({*self._columns, *(key for row in self.metrics for key in row)})
        if columns == self._columns:
            text = io.StringIO(newline="")
            csv.DictWriter(text, columns).writerows(self.metrics)
            with self.path.open("a", newline="") as file:
                file.write(text.getvalue())
        else:
            write_rows(self.path, columns, [*read_rows(self.path), *self.metrics])
        self._columns, self.metrics = columns, []


def _rows_before(epochs: int, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of the first epochs; one that names no epoch, such as a learning rate's, goes with its step."""
    last = max((int(row["step"]) for row in rows if row.get("epoch") and float(row["epoch"]) < epochs), default=-1)
    return [row for row in rows if (float(row["epoch"]) < epochs if row.get("epoch") else int(row["step"]) <= last)]


def loggers(cfg: DictConfig, folder: Path, epochs: int) -> list[Any]:
    """Lightning's loggers of a run.

    Args:
        cfg: the configuration.
        folder: the run's folder.
        epochs: how many epochs a resumed run has behind it.
    """
    found: list[Any] = [
        AppendingCSVLogger(folder, epochs),
        pl.loggers.TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
    ]
    if cfg.wandb.enabled:
        found.append(_wandb_logger(cfg, folder))
    return found


def _wandb_logger(cfg: DictConfig, folder: Path) -> Any:
    """Weights & Biases; offline where it was asked for, and where there is no account or no network."""
    import wandb

    def start(mode: str | None) -> Any:
        logger = pl.loggers.WandbLogger(
            name=cfg.name,
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            mode=mode,  # None: the environment says
            id=folder.name,
            resume="allow",
        )
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        return logger

    try:
        return start("offline" if cfg.wandb.offline else None)
    except wandb.errors.Error as error:
        reason = str(error).strip().splitlines()[0]
        say(f"wandb logs offline, into ./wandb; 'wandb sync' uploads that later. Why it cannot log online: {reason}")
        return start("offline")


def callbacks(cfg: DictConfig) -> list[pl.Callback]:
    """Progress, random numbers, learning rate, CSV flush."""
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
    """A run that does not finish ends with a status that is not 0, and leaves no process behind."""


class EpochSeed(pl.Callback):
    """Seeds torch anew each epoch, so that a resumed run draws what an uninterrupted one draws.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Seed from (seed, epoch, process)."""
        torch.manual_seed(hash((self.seed, trainer.current_epoch, trainer.global_rank)) & 0x7FFFFFFF)


class FlushMetrics(pl.Callback):
    """Writes metrics.csv at every epoch's end, before the checkpoint that a resumed run goes on from."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write what has been logged."""
        for logger in trainer.loggers:
            logger.save()


class StopWhenNotFinite(pl.Callback):
    """Ends a run whose loss is inf or NaN, instead of training on to the last epoch.

    Raises:
        UserError: at the end of the first such epoch; the checkpoint of the epoch before is kept.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look at the epoch's losses."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train_") and "loss" in name and not torch.isfinite(value).all():
                raise UserError(
                    f"{name} is {float(value)} in epoch {trainer.current_epoch + 1}: training diverged; "
                    "lower optimizer.lr, or take optimizer.name=adam or lars"
                )


class EpochLines(pl.Callback):
    """One line an epoch, where there is no terminal to draw a progress bar on."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self.began = time.perf_counter()
        self.first = trainer.current_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Print the epoch, the time that is left and the losses and accuracies."""
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
    """Writes the spectrum of the embedding's second moment at each epoch's end: CSV, TensorBoard, and wandb.

    Args:
        folder: the run's folder; eigenvalues.csv gets the columns epoch, eigval_1 ≥ eigval_2 ≥ …
        epochs: rows of this epoch and later, of an interrupted run, are dropped.
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
        """Add this epoch's row."""
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
        """Give wandb the whole table, ``eigvals``: one row an epoch, those before a resumption included."""
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
    """What the summary says of the whole run; a resumed run goes on counting. After the callbacks that log.

    ``metrics`` has the last value of each metric, ``seconds`` the time in training and validation.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._before, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of this process and of those that it goes on from, up to their last checkpoint."""
        return self._before + time.perf_counter() - self._began

    def update(self, trainer: pl.Trainer) -> None:
        """Take what has been logged."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        self.metrics.update(found)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take what the epoch has logged."""
        self.update(trainer)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"metrics": dict(self.metrics), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.metrics, self._before = dict(state_dict["metrics"]), state_dict["seconds"]


class Throughput(pl.Callback):
    """Measures the training images per second, validation left out. ``images_per_second`` is None before a batch."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0

    @property
    def images_per_second(self) -> float | None:
        """Images of this process, each counted once whatever the number of views."""
        return self.images / self.seconds if self.images else None

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began: float | None = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and stop the clock at the epoch's last."""
        self.images += len(batch[-1])
        if trainer.is_last_batch and self._began is not None:
            self.seconds += time.perf_counter() - self._began
            self._began = None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run goes on counting."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


class BestAccuracy(pl.Callback):
    """Remembers the best validation accuracy of all epochs, in ``acc1`` (per cent; -inf before the first)."""

    acc1 = float("-inf")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare this epoch's."""
        if "val_acc1" in trainer.callback_metrics:
            self.acc1 = max(self.acc1, float(trainer.callback_metrics["val_acc1"]))

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"acc1": self.acc1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.acc1 = state_dict["acc1"]


def host_versions() -> dict[str, str | None]:
    """Versions of what a result depends on."""
    return {**versions("pytorch-lightning", "torchmetrics", "timm"), "solo-learn": host_release()}
