"""VISSL hooks for the methods of ``plugins``: life cycle, EMA teacher and metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classy_vision.generic.distributed_util import is_primary

from plugins.linalg import spectrum_statistics
from plugins.tools.records import write_row
from vissl_ext.life_cycle import LifeCycleHook
from vissl_ext.methods import MethodLoss
from vissl_ext.progress import meters
from vissl_ext.protocol import LossWithMetrics
from vissl_ext.silent_hook import SilentHook


def extra_hooks() -> list[Any]:
    """Return the hooks that any launcher needs. They have no effect on the losses of VISSL."""
    return [LifeCycleHook(), EMATeacherHook(), MetricsHook()]


class EMATeacherHook(SilentHook):
    """Evaluate and update the teacher of a method: ``θ_t ← τ θ_t + (1 − τ) θ``.

    τ follows BYOL's cosine schedule over all steps. It depends only on the number of optimiser steps done, which VISSL
    checkpoints, so a resumed run continues the schedule.
    """

    def on_start(self, task: Any) -> None:
        """Set the number of optimiser steps of the run and of an epoch in the clock of the loss."""
        clock = getattr(task.base_loss, "clock", None)
        if clock is not None:
            clock.total = task.max_iteration
            clock.steps_per_epoch = len(task.dataloaders["train"]) * task.num_train_phases_per_epoch

    def on_forward(self, task: Any) -> None:
        """Compute the teacher's output for the batch, without gradient."""
        loss = task.base_loss
        if isinstance(loss, MethodLoss) and loss.teacher is not None:
            output = loss.teacher(loss.teacher_input(task.last_batch.sample["input"]))
            # VISSL passes the output of a model with one head to the loss without the surrounding list
            loss.teacher_output = output[0] if len(output) == 1 else output

    def on_update(self, task: Any) -> None:
        """End the step of the method. ``task.iteration`` is the number of optimiser steps before it."""
        if isinstance(task.base_loss, MethodLoss):
            task.base_loss.after_step(task.iteration, task.max_iteration)


class MetricsHook(SilentHook):
    """Write metrics.csv, one row per epoch, and the same values to TensorBoard if its hook is used.

    Columns: epoch; for the losses of this package the means of the terms, ``z_std``, ``tau`` (with a teacher), and, if
    the method tracks the second moment, ``eigval_{min,max,mean,std}`` and ``part_ratio``; for all others the mean loss.
    The meters follow, as ``train top_1``, and after a test phase ``test loss`` and ``test top_1``. With
    ``log_quality=true`` there are ``quality/features/rankme`` and other metrics of :mod:`plugins.metrics`. With
    ``log_eigvals=true`` eigenvalues.csv has the whole spectrum. A resumed run replaces the rows of epochs that it
    repeats. TensorBoard has the values as ``Epoch/<column>``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, Any] = {}
        self._steps = 0
        self._row: dict[str, float] = {}

    def on_phase_start(self, task: Any) -> None:
        """Reset the sums."""
        self._sums, self._steps = {}, 0

    def on_loss_and_meter(self, task: Any) -> None:
        """Add the loss of a test step."""
        if not task.train:
            self._add({"test loss": task.last_batch.loss.detach()})

    def on_update(self, task: Any) -> None:
        """Add the terms of one step, without synchronising with the device."""
        known = isinstance(task.base_loss, LossWithMetrics)
        self._add(task.base_loss.metrics if known else {"loss": task.last_batch.loss.detach()})

    def _add(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps += 1

    def on_phase_end(self, task: Any) -> None:
        """Write the row of the epoch, which a test phase completes."""
        # all processes compute it together
        quality = task.base_loss.objective.epoch_quality() if isinstance(task.base_loss, MethodLoss) else {}
        if not (is_primary() and self._steps):
            return
        folder, epoch = Path(task.checkpoint_folder), max(task.train_phase_idx, 0)  # -1 without training
        row = {name: float(value) / self._steps for name, value in self._sums.items()}
        if task.train and isinstance(task.base_loss, LossWithMetrics):
            row.update(self._of_method(task.base_loss, folder, epoch))
        row.update({name: float(value) for name, value in quality.items()})
        row.update(meters(task))
        self._row = row if task.train else {**self._row, **row}
        write_row(folder / "metrics.csv", epoch, self._row)
        for writer in filter(None, (getattr(hook, "tb_writer", None) for hook in task.hooks)):
            for name, value in row.items():
                writer.add_scalar(f"Epoch/{name}", value, epoch)
            writer.flush()

    @staticmethod
    def _of_method(loss: Any, folder: Path, epoch: int) -> dict[str, float]:
        """Return τ and the statistics of the spectrum, and write eigenvalues.csv."""
        row = {"tau": loss.tau} if hasattr(loss, "tau") else {}
        if loss.moment is not None:
            spectrum = loss.moment.spectrum().cpu()
            row.update({name: float(value) for name, value in spectrum_statistics(spectrum).items()})
            if loss.options["log_eigvals"]:
                values = {f"eigval_{index}": value for index, value in enumerate(spectrum.tolist(), 1)}
                write_row(folder / "eigenvalues.csv", epoch, values)
        return row
