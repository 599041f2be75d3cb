"""The summary that a training leaves in its folder: summary.json."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from classy_vision.generic.distributed_util import get_world_size, is_primary

from plugins.tools.records import versions, write_json
from vissl_ext.silent_hook import SilentHook


class Summary(SilentHook):
    """Writes summary.json when a training ends: what was trained, for how long, how fast, and with what.

    ``seconds`` and ``images_per_second`` are of the whole training: of one that was resumed, of the parts that are in
    the checkpoint, since that is where the counts are kept. ``images_per_second`` counts each training image of an
    epoch once, whatever the number of its views, on all processes; tests are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state.set_classy_state({"seconds": 0.0, "training_seconds": 0.0, "images": 0})

    def on_start(self, task: Any) -> None:
        """Start the clock; go on with the counts of the checkpoint that is resumed from."""
        saved = task.checkpoint["classy_state_dict"].get("hooks", {}) if task.checkpoint else {}
        self.state.set_classy_state(saved.get(self.name(), {}))
        self.read = time.perf_counter()

    def on_phase_start(self, task: Any) -> None:
        """Count what lies between two epochs."""
        self._count(training=False)

    def on_step(self, task: Any) -> None:
        """Count the batch."""
        self._count(task.train)
        if task.train:
            self.state.images += images(task.last_batch.sample) * get_world_size()

    def on_phase_end(self, task: Any) -> None:
        """Count the end of an epoch."""
        self._count(task.train)

    def _count(self, training: bool) -> None:
        before, self.read = self.read, time.perf_counter()
        self.state.seconds += self.read - before
        if training:
            self.state.training_seconds += self.read - before

    def on_end(self, task: Any) -> None:
        """Write the file."""
        self._count(training=False)
        if not is_primary():
            return
        config = task.config
        summary = {
            "framework": "vissl",
            "method": config["LOSS"]["name"],
            "seed": config["SEED_VALUE"],
            "epochs": config["OPTIMIZER"]["num_epochs"],
            "seconds": self.state.seconds,
            "images_per_second": self.state.images / self.state.training_seconds if self.state.images else None,
            "versions": versions("vissl", "fvcore", "iopath"),
            "config": plain(config),
        }
        write_json(Path(task.checkpoint_folder) / "summary.json", summary)


def images(sample: Any) -> int:
    """How many images a batch of VISSL's has: the last one of an epoch may have fewer, and each may have many views."""
    if "data_idx" not in sample:  # siamese_collator and patch_and_image_collator leave it out; of each image a truth
        return max(len(valid) for valid in sample["data_valid"])
    return max(len(torch.unique(indices)) for indices in sample["data_idx"])


def plain(value: Any) -> Any:
    """A value as JSON can hold; anything else by its name."""
    if hasattr(value, "items"):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
