"""Console output of a run: epoch, iteration, loss, learning rate and remaining time; meters after each epoch."""

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

from classy_vision.generic.distributed_util import is_primary

from plugins.tools.command import print_on_rank_zero
from vissl_ext.silent_hook import SilentHook

_PERIOD = 0.3  # seconds between two updates of the bar
_FIRST, _LONGEST = (
    5.0,
    60.0,
)  # first and longest interval between plain lines in seconds; each is 1.5 times the previous


class Progress(SilentHook):
    """Show the progress in the process of rank 0: a bar on a terminal, otherwise lines at increasing intervals."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None

    def on_start(self, task: Any) -> None:
        """Reset the timers."""
        self.began = self.shown = time.perf_counter()
        self.wait = 0.0  # the first iteration is shown immediately
        self.first = task.iteration
        if is_primary() and task.iteration:
            print_on_rank_zero(f"resumed after {task.iteration} of {task.max_iteration} iterations")

    def on_phase_start(self, task: Any) -> None:
        """Create the bar of the epoch."""
        self.step, self.total = 0, len(task.dataloaders["train" if task.train else "test"])
        self.losses = 0.0
        if is_primary() and sys.stderr.isatty():
            from tqdm import tqdm

            title = _epoch(task) + ("" if task.train else " test")
            self.bar = tqdm(total=self.total, desc=title, leave=False, dynamic_ncols=True, mininterval=_PERIOD)

    def on_step(self, task: Any) -> None:
        """Show the iteration if the interval has passed."""
        self.step += 1
        self.losses += float(task.last_batch.loss)  # VISSL has already synchronised with the device
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
        """Close the bar, and print the mean loss and the meters of the epoch."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if not is_primary():
            return
        values = [f"{'train' if task.train else 'test'} loss {self.losses / self.step:.4f}"] if self.step else []
        values += [f"{name} {value:.4g}" for name, value in meters(task).items()]
        if task.train:
            values.append(f"lr {_rate(task):.3g}")
        passed = time.perf_counter() - self.began
        print_on_rank_zero(f"{_epoch(task)}  {'  '.join(values)}  after {_duration(passed)}")

    def on_end(self, task: Any) -> None:
        """Print the folder of the run."""
        if is_primary():
            print_on_rank_zero(f"finished; checkpoints and log.txt are in {task.checkpoint_folder}")


def meters(task: Any) -> dict[str, float]:
    """Return the values of the meters at the end of a phase, with names such as "train top_1"."""
    if task.train and not task.config["METERS"]["enable_training_meter"]:
        return {}
    kind = "train" if task.train else "test"
    return {f"{kind} {name}": value for meter in task.meters for name, value in _numbers(meter.value)}


def _epoch(task: Any) -> str:
    return f"epoch {task.train_phase_idx + 1}/{task.num_train_phases}"


def _rate(task: Any) -> float:
    """Return the largest learning rate of the parameter groups; biases and heads may have others."""
    rates = task.optimizer.options_view.lr
    return max(rates) if isinstance(rates, set | list | tuple) else rates


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in the value of a meter, with the keys above them as names."""
    if isinstance(value, dict):
        for key, entry in value.items():
            # a meter with one head has the key 0
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
