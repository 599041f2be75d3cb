"""The arguments of a call of main.py."""

from pathlib import Path
from typing import Any, NamedTuple


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
