"""The summary that a training leaves in its folder: summary.json."""

import time
from pathlib import Path
from typing import Any

from classy_vision.generic.distributed_util import get_world_size, is_primary

from plugins.tools.records import versions, write_json
from vissl_ext.silent_hook import SilentHook


class Summary(SilentHook):
    """Writes summary.json when a training ends: what was trained, for how long, how fast, and with what.

    ``images_per_second`` counts each training image once, whatever the number of its views, on all processes; tests
    are left out.
    """

    def on_start(self, task: Any) -> None:
        """Start the clock of the whole run."""
        self.began = time.perf_counter()
        self.images, self.seconds = 0, 0.0

    def on_phase_start(self, task: Any) -> None:
        """Start the clock of an epoch."""
        self.phase_began = time.perf_counter()

    def on_step(self, task: Any) -> None:
        """Count the batch."""
        if task.train:
            self.images += task.config["DATA"]["TRAIN"]["BATCHSIZE_PER_REPLICA"]

    def on_phase_end(self, task: Any) -> None:
        """Stop the clock of an epoch."""
        if task.train:
            self.seconds += time.perf_counter() - self.phase_began

    def on_end(self, task: Any) -> None:
        """Write the file."""
        if not is_primary():
            return
        config = task.config
        summary = {
            "framework": "vissl",
            "method": config["LOSS"]["name"],
            "seed": config["SEED_VALUE"],
            "epochs": config["OPTIMIZER"]["num_epochs"],
            "seconds": time.perf_counter() - self.began,
            "images_per_second": self.images * get_world_size() / self.seconds if self.images else None,
            "versions": versions("vissl", "fvcore", "iopath"),
            "config": plain(config),
        }
        write_json(Path(task.checkpoint_folder) / "summary.json", summary)


def plain(value: Any) -> Any:
    """A value as JSON can hold; anything else by its name."""
    if hasattr(value, "items"):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
