"""Helpers for Lightning's Trainer: number of steps, atomic checkpoints, and a defined exit after a signal.

The classes are mixins, since Lightning has two packages: solo-learn's main branch uses ``lightning``; its release and
lightly use ``pytorch_lightning``.
"""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plugins.clock import Clock
from plugins.tools.command import UserError
from plugins.tools.files import atomic
from plugins.tools.process import install_signal_handlers


def run_steps(trainer: Any) -> tuple[int, int | None]:
    """Return the number of optimiser steps of the run and of one epoch, for schedules in ``configure_optimizers``.

    The numbers respect ``max_epochs``, ``max_steps``, ``limit_train_batches`` and ``accumulate_grad_batches``.

    Returns:
        The steps of the run, at least 1, and the steps of an epoch, or None if the data loader has no length.

    Raises:
        UserError: the length of the run is unknown: only ``max_time`` is set, or the data loader has no length and
            ``max_steps`` is not set.
    """
    total = trainer.estimated_stepping_batches
    if not 0 <= total < math.inf:
        raise UserError(
            "the schedule needs the number of steps of the run, which max_epochs and max_time do not give here; "
            "set max_steps of the Trainer"
        )
    if trainer.train_dataloader is None:  # with max_epochs=-1 Lightning has not created it yet
        trainer.fit_loop.setup_data()
    return max(int(total), 1), _steps_of_epoch(trainer)


def _steps_of_epoch(trainer: Any) -> int | None:
    batches = trainer.num_training_batches
    return None if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)


def set_clock(trainer: Any, clock: Clock) -> None:
    """Set the numbers of steps of the run and of an epoch in the clock, None if unknown, and that of the epoch.

    Lightning does not call ``on_train_epoch_start`` if it resumes within an epoch.
    """
    total = trainer.estimated_stepping_batches
    clock.total = int(total) if 0 <= total < math.inf else None
    clock.steps_per_epoch = _steps_of_epoch(trainer)
    clock.epoch = trainer.current_epoch


def ends_step(trainer: Any, batch_idx: int) -> bool:
    """Return whether Lightning's Trainer makes an optimiser step after a batch.

    The last step of an epoch uses the remaining micro-batches.
    """
    if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
        return True
    return bool(trainer.is_last_batch) or batch_idx + 1 == trainer.num_training_batches


def ends_run(trainer: Any) -> bool:
    """Return whether the epoch that ends is the last: by ``max_epochs``, ``max_steps``, ``max_time`` or a callback."""
    if trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop:
        return True
    return 0 <= trainer.max_steps <= trainer.global_step


def completed_epochs(checkpoint: dict[str, Any], max_steps: int | None) -> int:
    """Return the number of epochs that a run has completed when it is resumed from a checkpoint of an epoch's end.

    An epoch that ``max_steps``, ``max_time`` or a callback cut off counts only if the run has made ``max_steps`` steps.
    Otherwise the resumed run continues that epoch.

    Args:
        checkpoint: the content of Lightning's checkpoint.
        max_steps: that of the resumed run; -1 and None mean no limit.

    Raises:
        KeyError: the checkpoint contains only weights.
    """
    ended = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return max(ended - 1, 0) if batches_done(checkpoint, max_steps) else ended


def batches_done(checkpoint: dict[str, Any], max_steps: int | None) -> int:
    """Return the number of batches that a process has trained on in the epoch that a resumed run continues.

    It is 0 unless ``max_steps``, ``max_time`` or a callback has cut off an epoch.

    Args:
        checkpoint: the content of Lightning's checkpoint of an epoch's end.
        max_steps: that of the resumed run; -1 and None mean no limit.

    Raises:
        KeyError: the checkpoint contains only weights.
    """
    batches = checkpoint["loops"]["fit_loop"].get("epoch_loop.batch_progress", {})
    is_cut = not batches.get("is_last_batch", True) and not steps_done(checkpoint, max_steps)
    return batches["current"]["ready"] if is_cut else 0


def steps_done(checkpoint: dict[str, Any], max_steps: int | None) -> bool:
    """Return whether the run of a checkpoint has made ``max_steps`` steps; -1 and None mean no limit."""
    return max_steps is not None and 0 <= max_steps <= checkpoint.get("global_step", 0)


def count_epochs(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Count the epochs of a checkpoint that was saved at an epoch's end. Call it in ``on_load_checkpoint``. Idempotent.

    With max_steps, Lightning does not count the last epoch. Without it, Lightning counts one that was cut off.

    Args:
        trainer: Lightning's Trainer.
        checkpoint: the content of the checkpoint; changed in place.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    if progress["current"]["processed"] != progress["current"]["completed"] + 1:
        return
    change = completed_epochs(checkpoint, trainer.max_steps) - progress["current"]["processed"]
    if trainer.max_steps == -1 and change == 0:
        return
    for counts in (progress["total"], progress["current"]):
        counts["processed"] = counts["completed"] = counts["processed"] + change


def start_at_epoch(trainer: Any) -> None:
    """Start a resumed run with a new epoch if the last one is complete. Call it in ``on_train_start``.

    With max_steps, Lightning would repeat the end of that epoch.
    """
    loop, current = trainer.fit_loop, trainer.fit_loop.epoch_progress.current
    if loop.restarting and current.ready == current.started == current.processed:
        super(type(loop), type(loop)).restarting.fset(loop, False)  # type: ignore[attr-defined]


def loss_scale(trainer: Any) -> float:
    """Return the loss scale of a Trainer with 16-bit precision, and 1 for other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def check_strategy(trainer: Any, what: str) -> None:
    """Check that the Trainer's strategy leaves the networks whole: backward passes in ``training_step``, and hooks.

    Args:
        trainer: Lightning's Trainer.
        what: what needs it, for the error message.

    Raises:
        UserError: the strategy is neither a single device nor DistributedDataParallel.
    """
    strategy = type(trainer.strategy)
    if not {"SingleDeviceStrategy", "DDPStrategy"} & {base.__name__ for base in strategy.__mro__}:
        raise UserError(f"{what} needs one device or the strategy ddp, got {strategy.__name__}")


def placeholder_loss(device: torch.device) -> Tensor:
    """Return a loss of 0 that depends on no parameter, for all micro-batches of a step except the last.

    Lightning rejects a ``training_step`` that returns None if there are several processes.
    """
    return torch.zeros((), device=device, requires_grad=True)


def save_atomically(content: Any, path: Path) -> None:
    """Save with torch.save so that after an interruption ``path`` is either the old or the new file.

    Lightning writes to the temporary folder of the system and copies the file if that is another file system.

    Args:
        content: any object that torch.save accepts.
        path: the file.

    Raises:
        UserError: the disk is full; the old file is kept.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic(path) as file:
        file.write(buffer.getbuffer())


class AtomicCheckpointIO:
    """Mixin for TorchCheckpointIO that saves with :func:`save_atomically`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint atomically; Lightning saves to URLs."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[misc]
        else:
            save_atomically(checkpoint, Path(path))


class Guard:
    """Mixin for Callback: on SIGTERM the run exits with a non-zero status, and all of its processes end.

    Lightning exits with status 0 after the current batch. Its signal handler first starts a collective, which blocks if
    other ranks have already exited.
    """

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Count the epochs of the checkpoint, and continue one that was cut off."""
        count_epochs(trainer, checkpoint)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace the signal handlers that Lightning has just installed; Lightning restores the previous ones."""
        install_signal_handlers()
        start_at_epoch(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace the signal handlers for a validation without training."""
        install_signal_handlers()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Kill the processes that Lightning started, which would otherwise wait for this one."""
        for process in getattr(trainer.strategy.launcher, "procs", ()):
            with contextlib.suppress(OSError):
                process.kill()
