"""Code that runs in each process of a run: registrations, hooks, and the wrapper of VISSL's worker.

A spawned process imports these functions by the name of this module. Functions of the launcher would be in
``__main__``, which is another module in a spawned process.
"""

import errno
import gc
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vissl.hooks import default_hook_generator
from vissl.utils.distributed_launcher import _distributed_worker as _vissl_worker
from vissl.utils.distributed_launcher import _ResumableSlurmJob
from vissl.utils.env import get_machine_local_and_dist_rank

from plugins.tools.command import UserError
from plugins.tools.process import GUARD, started_by
from vissl_ext import catalog
from vissl_ext.compat.checkpoints import room
from vissl_ext.compat.console import hide_log
from vissl_ext.compat.cuda_calls import stay_on_cpu
from vissl_ext.compat.restored_losses import RestoreLoss
from vissl_ext.hooks import extra_hooks
from vissl_ext.locks import end_with_parent, lock
from vissl_ext.progress import Progress
from vissl_ext.registry import register
from vissl_ext.silent_hook import SilentHook
from vissl_ext.summary import Summary
from vissl_ext.user_modules import KEY, import_modules

register()

_PRELOADED = (GUARD, __name__)
"""Modules that the fork server of the data loaders imports once, because VISSL starts new workers in each epoch."""
_SERVER = forkserver.ForkServer()
"""The fork server of the data loaders' workers; see ``started_by``."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class EpochSeed(SilentHook):
    """Seed Python, NumPy and torch before each phase, so that a resumed run has the random numbers of a complete one.

    The seed depends on SEED_VALUE, the phase and the process. Seeding is at the end of the previous phase, because the
    data loader draws the seeds of its workers before ``on_phase_start``.
    """

    def on_start(self, task: Any) -> None:
        """Seed the first phase of the run, or of the resumed run."""
        self._seed(task)

    def on_phase_end(self, task: Any) -> None:
        """Seed the next phase."""
        self._seed(task)

    @staticmethod
    def _seed(task: Any) -> None:
        rank = get_machine_local_and_dist_rank()[1]
        phase = task.checkpoint["phase_idx"] if task.phase_idx < 0 and task.checkpoint else task.phase_idx
        sequence = np.random.SeedSequence([task.config["SEED_VALUE"], phase + 1, rank])
        seeds = sequence.generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))
        torch.manual_seed(int(seeds[2]))


def hooks(cfg: Any) -> list[Any]:
    """Return VISSL's default hooks for a configuration and those of this package.

    Args:
        cfg: VISSL's configuration, below ``config``.
    """
    stock = default_hook_generator(cfg)
    return [*stock, *extra_hooks(), RestoreLoss(stock), Progress(), Summary(), EpochSeed()]


def worker(local_rank: int, cfg: Any, *args: Any, **kwargs: Any) -> None:
    """Run VISSL's worker of one process, and convert errors of the user.

    Raises:
        UserError: the loss or the output of the model is inf or NaN; there are fewer images than a batch has, or one
            cannot be read; the disk is full.
    """
    hide_log()
    if multiprocessing.parent_process() is not None:
        end_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM):  # a forked process inherits the handlers of the launcher
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    import_modules(cfg.get(KEY, ()))
    catalog.register(cfg)
    _SERVER.set_forkserver_preload([*_PRELOADED])
    try:
        cpu = stay_on_cpu() if cfg.MACHINE.DEVICE == "cpu" else nullcontext()
        with started_by(_SERVER), cpu, _frozen_imports():
            _vissl_worker(local_rank, cfg, *args, **kwargs)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        folder = Path(cfg.CHECKPOINT.DIR)
        raise UserError(f"{folder} cannot be written to: {error.strerror}; {room(folder)}") from None
    except FloatingPointError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"training diverged: {reason}") from None
    except Exception as error:
        if "No batches to read" in str(error):
            size = cfg.DATA.TRAIN.BATCHSIZE_PER_REPLICA
            raise UserError(
                f"config.DATA.TRAIN.BATCHSIZE_PER_REPLICA={size} is larger than the number of training images per "
                "process; decrease it"
            ) from None
        raise
    except KeyboardInterrupt:
        # a terminal sends SIGINT to all processes; the launcher prints the message
        raise SystemExit(130) from None


@contextmanager
def _frozen_imports() -> Iterator[None]:
    """Exclude the objects that exist from garbage collection, if none are excluded already.

    VISSL collects garbage several times in each phase. The objects of the imports are a million, which take 0.3 s.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def end_server() -> None:
    """Kill the fork server that this process has started, if any.

    On its own it ends after its last worker, and spends seconds of processor time on the unloading of its modules.
    """
    if _SERVER._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(_SERVER._forkserver_pid, signal.SIGKILL)


class SlurmJob(_ResumableSlurmJob):
    """VISSL's job for SLURM. Unpickling it imports this module, which patches VISSL and registers this package."""

    def __call__(self) -> None:
        """Run the processes of one machine of the job."""
        import submitit
        from vissl.utils import distributed_launcher

        distributed_launcher._distributed_worker = worker
        distributed_launcher.default_hook_generator = hooks
        lock(Path(self.config.CHECKPOINT.DIR), submitit.JobEnvironment().global_rank)
        super().__call__()

    def checkpoint(self) -> Any:
        """Return the job that submitit requeues when the time limit is reached."""
        import submitit

        return submitit.helpers.DelayedSubmission(SlurmJob(engine_name=self.engine_name, config=self.config))
