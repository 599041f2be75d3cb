"""What the adapters ask and give a Trainer of Lightning, of either flavour: its steps, whole files, a clear end.

The classes are mixins, since there are two Lightnings: solo-learn's main branch derives from ``lightning``, its release
and lightly from ``pytorch_lightning``.
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
from plugins.tools.process import listen


def run_steps(trainer: Any) -> tuple[int, int | None]:
    """Optimiser steps of the run and of one epoch, as ``configure_optimizers`` needs them for a schedule.

    They follow ``max_epochs``, ``max_steps``, ``limit_train_batches`` and ``accumulate_grad_batches``.

    Returns:
        The steps of the run, at least 1, and those of an epoch, or None where the data have no length.

    Raises:
        UserError: the run has no known end: ``max_time`` alone, or data without a length and no ``max_steps``.
    """
    total = trainer.estimated_stepping_batches
    if not 0 <= total < math.inf:
        raise UserError(
            "the schedule needs the number of steps of the run, which max_epochs and max_time do not give here; "
            "set max_steps of the Trainer"
        )
    if trainer.train_dataloader is None:  # with max_epochs=-1 nothing has asked for it yet
        trainer.fit_loop.setup_data()
    return max(int(total), 1), _steps_of_epoch(trainer)


def _steps_of_epoch(trainer: Any) -> int | None:
    batches = trainer.num_training_batches
    return None if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)


def set_clock(trainer: Any, clock: Clock) -> None:
    """Tell the clock how long the run and an epoch are, where that is known."""
    total = trainer.estimated_stepping_batches
    clock.total = int(total) if 0 <= total < math.inf else None
    clock.steps_per_epoch = _steps_of_epoch(trainer)


def ends_step(trainer: Any, batch_idx: int) -> bool:
    """Whether a Trainer of Lightning, of either flavour, makes its optimiser's step after a batch.

    An epoch's last step has the micro-batches that are left.
    """
    if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
        return True
    return bool(trainer.is_last_batch) or batch_idx + 1 == trainer.num_training_batches


def loss_scale(trainer: Any) -> float:
    """What a Trainer multiplies losses with before backward, in 16-bit precision; 1 elsewhere."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def check_joined(trainer: Any) -> None:
    """Refuse a Trainer under which a module cannot make backward passes of its own.

    Raises:
        UserError: its strategy is neither a single device nor DistributedDataParallel.
    """
    strategy = type(trainer.strategy)
    if not {"SingleDeviceStrategy", "DDPStrategy"} & {base.__name__ for base in strategy.__mro__}:
        raise UserError(f"accumulate=joined needs one device or the strategy ddp, got {strategy.__name__}")


def placeholder_loss(device: torch.device) -> Tensor:
    """A loss of 0 whose backward reaches no parameter, for a step's earlier micro-batches.

    A ``training_step`` that gives None is refused under several processes.
    """
    return torch.zeros((), device=device, requires_grad=True)


def save_atomically(content: Any, path: Path) -> None:
    """Save with torch.save so that ``path`` holds the old or the new file, whatever happens.

    Lightning writes to the system's temporary folder and, on another file system, copies from there.

    Args:
        content: what torch.save takes.
        path: of the file.

    Raises:
        UserError: the disk is full; the file that was there is kept.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic(path) as file:
        file.write(buffer.getbuffer())


class AtomicCheckpointIO:
    """Mixin for TorchCheckpointIO: saves with :func:`save_atomically`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint; a place that is no local path is left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[misc]
        else:
            save_atomically(checkpoint, Path(path))


class Guard:
    """Mixin for Callback: SIGTERM ends a run with a status that is not 0, and no process of it is left behind.

    Lightning ends it with status 0 after the batch, and before that sends a collective in the signal's handler, which
    other processes may never answer.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace the handlers that Lightning has just set; it restores those of before at the end."""
        listen()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Do the same for a validation alone."""
        listen()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the processes that Lightning started: they would wait for this one."""
        for process in getattr(trainer.strategy.launcher, "procs", ()):
            with contextlib.suppress(OSError):
                process.kill()
