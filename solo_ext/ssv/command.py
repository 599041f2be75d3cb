"""The command line of Self-Supervised-Vision's main.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from plugins.tools.command import Parser


class Arguments(NamedTuple):
    """The arguments of a call, and what they name."""

    document: dict[str, Any]
    """The content of the YAML file, validated, with the defaults of missing entries."""
    algo: str
    """The algorithm."""
    arch: str
    """The network."""
    output: str
    """Name of the run's folder; see ``solo_ext.ssv.translate.run_folder``."""
    load: Path | None = None
    """Folder with the checkpoint to read, or the checkpoint itself."""
    devices: int = 1
    """Number of processes."""
    wandb: bool = False
    """Whether to log to Weights & Biases."""


def parser() -> Parser:
    """Return the parser of the command line."""
    raise NotImplementedError


TASKS: dict[str, Callable[[Arguments], None]] = {}
"""The tasks: "train", "linear_eval" and "get_features"."""
