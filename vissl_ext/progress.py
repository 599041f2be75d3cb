"""What a training shows: a line with epoch, iteration, loss, learning rate and the time left; meters after an epoch.

VISSL's own log, several hundred lines before the first iteration, goes to log.txt in the run's folder.
"""

import io
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from classy_vision.generic.distributed_util import is_primary

from plugins.tools.command import print_on_rank_zero
from vissl_ext.silent_hook import SilentHook

_PERIOD = 0.3  # seconds between two refreshments of the bar
_FIRST, _LONGEST = 5.0, 60.0  # seconds until the second plain line; each wait is 1.5 times the one before


def hide_warnings() -> None:
    """Keep VISSL's log, and Python's warnings, out of the console; both go to log.txt.

    vissl/utils/logger.py:44 writes to ``sys.stdout`` by that name, which means nothing in that module from here on.
    """
    from vissl.utils import logger

    def to_log(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        logging.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    logger.sys = SimpleNamespace(stdout=_Nowhere())
    warnings.showwarning = to_log
    logging.raiseExceptions = False  # vissl/utils/distributed_launcher.py:162 logs with an argument too many


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class Progress(SilentHook):
    """Shows the progress, from the first process only: a bar on a terminal, lines at growing intervals elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None

    def on_start(self, task: Any) -> None:
        """Start the clock."""
        self.began = self.shown = time.perf_counter()
        self.wait = 0.0  # the first iteration is shown at once
        self.first = task.iteration
        if is_primary() and task.iteration:
            print_on_rank_zero(f"resumed after {task.iteration} of {task.max_iteration} iterations")

    def on_phase_start(self, task: Any) -> None:
        """Open the epoch's bar."""
        self.step, self.total = 0, len(task.dataloaders["train" if task.train else "test"])
        self.losses = 0.0
        if is_primary() and sys.stderr.isatty():
            from tqdm import tqdm

            title = _epoch(task) + ("" if task.train else " test")
            self.bar = tqdm(total=self.total, desc=title, leave=False, dynamic_ncols=True, mininterval=_PERIOD)

    def on_step(self, task: Any) -> None:
        """Show the iteration, if it is time."""
        self.step += 1
        self.losses += float(task.last_batch.loss)  # VISSL has waited for it already
        if not is_primary():
            return
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update()
            if now - self.shown >= _PERIOD or self.step == self.total:
                self.shown = now
                self.bar.set_postfix_str(self._values(task, now))
        elif task.train and now - self.shown >= self.wait:
            self.wait = min(max(_FIRST, 1.5 * self.wait), _LONGEST)
            self.shown = now
            print_on_rank_zero(f"{_epoch(task)}  iteration {self.step}/{self.total}  {self._values(task, now)}")

    def _values(self, task: Any, now: float) -> str:
        loss = f"loss {float(task.last_batch.loss):.4f}"
        if not task.train:
            return loss
        done = task.iteration - self.first
        left = (now - self.began) / max(done, 1) * (task.max_iteration - task.iteration)
        return f"{loss}  lr {_rate(task):.3g}  ETA {_duration(left)}"

    def on_phase_end(self, task: Any) -> None:
        """Close the bar; print the epoch's mean loss and its meters."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if not is_primary():
            return
        kind = "train" if task.train else "test"
        values = [f"{kind} loss {self.losses / self.step:.4f}"] if self.step else []
        if not task.train or task.config["METERS"]["enable_training_meter"]:
            for meter in task.meters:
                values += [f"{kind} {name} {value:.4g}" for name, value in _numbers(meter.value)]
        if task.train:
            values.append(f"lr {_rate(task):.3g}")
        passed = time.perf_counter() - self.began
        print_on_rank_zero(f"{_epoch(task)}  {'  '.join(values)}  after {_duration(passed)}")

    def on_end(self, task: Any) -> None:
        """Say where everything is."""
        if is_primary():
            print_on_rank_zero(f"finished; checkpoints and log.txt are in {task.checkpoint_folder}")


def _epoch(task: Any) -> str:
    return f"epoch {task.train_phase_idx + 1}/{task.num_train_phases}"


def _rate(task: Any) -> float:
    """The largest learning rate of the parameter groups; bias and heads may have others."""
    rates = task.optimizer.options_view.lr
    return max(rates) if isinstance(rates, set | list | tuple) else rates


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a meter's value, each with the names above it."""
    if isinstance(value, dict):
        for key, entry in value.items():
            # a meter of one head calls it 0
            yield from _numbers(entry, name if len(value) == 1 and str(key).isdigit() else f"{name} {key}".strip())
    elif hasattr(value, "numel") and value.numel() > 1:
        yield name, float(value.float().mean())
    elif isinstance(value, int | float) or hasattr(value, "item"):
        number = float(value)
        if not math.isnan(number):
            yield name, number


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
