"""A tiny trunk, and a hook that compares the state of all processes, for runner.py and a pool of ranks."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plugins.testing import record_quality, toy_backbone
from vissl_ext import ranks  # patches VISSL

# isort: split
from vissl.models.trunks import register_model_trunk

from vissl_ext.silent_hook import SilentHook

TINY = ["config.MODEL.TRUNK.NAME=tiny_trunk", "config.MODEL.HEAD.PARAMS=[[method_head,{in_dim:8}]]"]
"""The overrides that take the trunk."""
REPORT = "differences.json"


@register_model_trunk("tiny_trunk")
class TinyTrunk(nn.Module):
    """One convolution, of eight channels."""

    def __init__(self, model_config: Any, model_name: str) -> None:
        super().__init__()
        self.layers = toy_backbone()
        self.layers.add_module("flatten", nn.Flatten())

    def forward(self, x: torch.Tensor, out_feat_keys: list[str] | None = None) -> list[torch.Tensor]:
        """Images → features."""
        return [self.layers(x)]


def state(task: Any) -> dict[str, torch.Tensor]:
    """Return the state of the model and of the loss of a task.

    BatchNorm's running statistics are left out: the next forward pass replaces those of the model by those of rank 0,
    and those of a teacher differ between processes and are not used.
    """
    parts = {"model": task.base_model, "loss": task.base_loss}
    found = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    return {name: value for name, value in found.items() if not name.endswith(("running_mean", "running_var"))}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal to the bit; NaN, as of a buffer that is not set yet, equals itself."""
    return torch.equal(ours, theirs) or ours.cpu().numpy().tobytes() == theirs.cpu().numpy().tobytes()


class Watch(SilentHook):
    """Record, at the start and after each step, the names of the tensors that differ between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def on_start(self, task: Any) -> None:
        """Compare before the first step."""
        clock = getattr(task.base_loss, "clock", None)
        self.clock = [clock.total, clock.steps_per_epoch] if clock is not None else None
        self.compare(task, "start")

    def on_step(self, task: Any) -> None:
        """Compare after a step."""
        self.compare(task, f"step {task.iteration}")

    def compare(self, task: Any, when: str) -> None:
        """Compare the state with that of all processes."""
        ours = state(task)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, ours)
        self.found[when] = [name for name in ours if not all(same(ours[name], theirs[name]) for theirs in everyone)]
        self.found["names"] = sorted(ours)
        self.found["clock"] = self.clock
        if torch.distributed.get_rank() == 0:
            Path(task.checkpoint_folder, REPORT).write_text(json.dumps(self.found))


_plain = ranks.hooks


def hooks(cfg: Any) -> list[Any]:
    """Return the launcher's hooks and the watch."""
    return [*_plain(cfg), Watch()]


class Killed(SilentHook):
    """Kills a process of the training after its first step.

    Args:
        rank: its rank.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def on_step(self, task: Any) -> None:
        """Kill it."""
        if torch.distributed.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def install(killed: int | None, rows: str | None) -> None:
    """Add the watch to the trainings of the launcher in this process.

    Args:
        killed: the rank of a process that is killed after a step.
        rows: a folder for the rows whose quality is logged.
    """
    ranks.hooks = hooks if killed is None else lambda cfg: [*hooks(cfg), Killed(killed)]
    torch.multiprocessing.spawn = partial(torch.multiprocessing.start_processes, start_method="fork")
    if rows is not None:
        record_quality(Path(rows))
