"""Summary of a training: summary.json in the folder of the run."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from classy_vision.generic.distributed_util import barrier, get_world_size, is_primary

from plugins.tools.records import versions, write_json
from vissl_ext.compat.folder_images import finish_unreadable
from vissl_ext.silent_hook import SilentHook


class Summary(SilentHook):
    """Write summary.json at the end of a training: method, epochs, time, speed, package versions and configuration.

    ``metrics`` has the last values of each meter in metrics.json, such as ``test_accuracy_list_meter`` in per cent.
    ``seconds`` and ``images_per_second`` cover the whole training. The counts are in the checkpoints, so those of a
    resumed run include the time until its last checkpoint. ``images_per_second`` counts each training image of an epoch
    once, independent of the number of views, over all processes; test phases do not count. ``bad_images`` is the number
    of images that could not be read, if there are some or config.DATA.SKIP_BAD_IMAGES is true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state.set_classy_state({"seconds": 0.0, "training_seconds": 0.0, "images": 0})

    def on_start(self, task: Any) -> None:
        """Start the timer, and restore the counts of the checkpoint of a resumed run."""
        saved = task.checkpoint["classy_state_dict"].get("hooks", {}) if task.checkpoint else {}
        self.state.set_classy_state(saved.get(self.name(), {}))
        self.last = time.perf_counter()

    def on_phase_start(self, task: Any) -> None:
        """Add the time between two epochs."""
        self._count(training=False)

    def on_step(self, task: Any) -> None:
        """Add the time and the images of a batch."""
        self._count(task.train)
        if task.train:
            self.state.images += images(task.last_batch.sample) * get_world_size()

    def on_phase_end(self, task: Any) -> None:
        """Add the time at the end of an epoch."""
        self._count(task.train)

    def _count(self, training: bool) -> None:
        before, self.last = self.last, time.perf_counter()
        self.state.seconds += self.last - before
        if training:
            self.state.training_seconds += self.last - before

    def on_end(self, task: Any) -> None:
        """Write the file."""
        self._count(training=False)
        config = task.config
        barrier()  # until the last process has read its last image
        if not is_primary():
            return
        bad = finish_unreadable(Path(task.checkpoint_folder), bool(config["DATA"].get("SKIP_BAD_IMAGES")))
        summary = {
            "framework": "vissl",
            "method": config["LOSS"]["name"],
            "seed": config["SEED_VALUE"],
            "epochs": config["OPTIMIZER"]["num_epochs"],
            "seconds": self.state.seconds,
            "images_per_second": self.state.images / self.state.training_seconds if self.state.images else None,
            "metrics": last_meters(Path(task.checkpoint_folder) / "metrics.json"),
            **bad,
            "versions": versions("vissl", "fvcore", "iopath"),
            "config": plain(config),
        }
        write_json(Path(task.checkpoint_folder) / "summary.json", summary)


def last_meters(path: Path) -> dict[str, Any]:
    """Return the last values of each meter in VISSL's metrics.json, which has a line per phase; {} without the file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    return {key: value for key, value in found.items() if key.endswith("_meter")}


def images(sample: Any) -> int:
    """Return the number of images in a batch of VISSL, in which an image may have several views."""
    if "data_idx" not in sample:  # with siamese_collator and patch_and_image_collator; data_valid has a value per image
        return max(len(valid) for valid in sample["data_valid"])
    return max(len(torch.unique(indices)) for indices in sample["data_idx"])


def plain(value: Any) -> Any:
    """Convert a value to types of JSON; an object of another type becomes its string."""
    if hasattr(value, "items"):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
