"""Hooks that our methods add to VISSL's own."""

from pathlib import Path
from typing import Any

import torch
from classy_vision.generic.distributed_util import is_primary

from plugins.linalg import spectrum_statistics
from plugins.tools.records import write_row
from vissl_ext.methods import TeacherLoss
from vissl_ext.protocol import LossWithMetrics
from vissl_ext.silent_hook import SilentHook


def extra_hooks() -> list[Any]:
    """Return the hooks of our losses. They do nothing for a loss that is no TeacherLoss or LossWithMetrics."""
    return [EMATeacherHook(), MetricsHook()]


class EMATeacherHook(SilentHook):
    """Run and move the teacher of a TeacherLoss: ``θ_t ← τ θ_t + (1 − τ) θ``, τ on BYOL's cosine over all steps.

    τ is a function of the optimiser steps done, which VISSL checkpoints: a resumed run goes on where it stopped.
    """

    def on_start(self, task: Any) -> None:
        """Tell the method's clock how many optimiser steps the run and an epoch have."""
        clock = getattr(task.base_loss, "clock", None)
        if clock is not None:
            clock.total = task.max_iteration
            clock.steps_per_epoch = len(task.dataloaders["train"]) * task.num_train_phases_per_epoch

    def on_forward(self, task: Any) -> None:
        """The teacher's output for the batch, without gradient, where the loss looks for it."""
        loss = task.base_loss
        if isinstance(loss, TeacherLoss) and loss.teacher is not None:
            output = loss.teacher(loss.teacher_input(task.last_batch.sample["input"]))
            # VISSL unwraps the outputs of a model of one head alike
            loss.teacher_output = output[0] if len(output) == 1 else output

    def on_update(self, task: Any) -> None:
        """Called after each optimiser step; ``task.iteration`` counts those before it."""
        loss = task.base_loss
        if isinstance(loss, TeacherLoss) and loss.teacher is not None:
            loss.tau = loss.teacher.update(task.iteration, task.max_iteration)


class MetricsHook(SilentHook):
    """Write metrics.csv, one row per epoch: means of the loss's terms, and the embedding's spectrum.

    Columns: epoch, the terms, ``z_std``, ``tau`` with a teacher, and where the second moment is tracked
    ``eigval_{min,max,mean,std}`` and ``part_ratio``. With ``log_eigvals`` the whole spectrum is in eigenvalues.csv.
    Rows that a resumed run trains again are replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0

    def on_phase_start(self, task: Any) -> None:
        """Forget the last epoch."""
        self._sums, self._steps = {}, 0

    def on_update(self, task: Any) -> None:
        """Add one step, without waiting for the device."""
        if not isinstance(task.base_loss, LossWithMetrics):
            return
        for name, value in task.base_loss.metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps += 1

    def on_phase_end(self, task: Any) -> None:
        """Write the epoch's row."""
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
