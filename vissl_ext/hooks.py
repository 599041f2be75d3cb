"""VISSL hooks for the methods of ``plugins``: life cycle, EMA teacher and metrics."""

from pathlib import Path
from typing import Any

import torch
from classy_vision.generic.distributed_util import is_primary

from plugins.linalg import spectrum_statistics
from plugins.tools.records import write_row
from vissl_ext.life_cycle import LifeCycleHook
from vissl_ext.methods import MethodLoss
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
    """Write metrics.csv, one row per epoch, with the means of the loss terms and the spectrum of the embedding.

    Columns: epoch, the terms, ``z_std``, ``tau`` (with a teacher), and, if the method tracks the second moment,
    ``eigval_{min,max,mean,std}`` and ``part_ratio``. With ``log_eigvals=true`` eigenvalues.csv has the whole spectrum.
    A resumed run replaces the rows of epochs that it repeats.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0

    def on_phase_start(self, task: Any) -> None:
        """Reset the sums."""
        self._sums, self._steps = {}, 0

    def on_update(self, task: Any) -> None:
        """Add the terms of one step, without synchronising with the device."""
        if not isinstance(task.base_loss, LossWithMetrics):
            return
        for name, value in task.base_loss.metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps += 1

    def on_phase_end(self, task: Any) -> None:
        """Write the row of the epoch."""
        if not (task.train and is_primary() and self._steps):
            return
        row = {name: float(value) / self._steps for name, value in self._sums.items()}
        if hasattr(task.base_loss, "tau"):
            row["tau"] = task.base_loss.tau
        folder, epoch = Path(task.checkpoint_folder), task.train_phase_idx
        moment = task.base_loss.moment
        if moment is not None:
            spectrum = moment.spectrum().cpu()
            row.update({name: float(value) for name, value in spectrum_statistics(spectrum).items()})
            if task.base_loss.options["log_eigvals"]:
                values = {f"eigval_{index}": value for index, value in enumerate(spectrum.tolist(), 1)}
                write_row(folder / "eigenvalues.csv", epoch, values)
        write_row(folder / "metrics.csv", epoch, row)
