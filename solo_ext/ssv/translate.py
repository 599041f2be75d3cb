"""Translate a configuration of Self-Supervised-Vision to one of solo-learn's main branch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

OUTPUTS = Path("outputs")
"""Folder of all runs, in the working directory."""


def run_folder(algo: str, arch: str, output: str) -> Path:
    """Return the folder of a run, ``outputs/<algo>/<arch>/<output>``."""
    return OUTPUTS / algo / arch / output


def translate(
    document: Mapping[str, Any], algo: str, arch: str, *, output: str = "run", devices: int = 1, wandb: bool = False
) -> DictConfig:
    """Translate a configuration to that of a pre-training, which :func:`solo_ext.main_pretrain.pretrain` runs.

    The result is not yet checked by ``solo_ext.config.parse_pretrain``, which ``pretrain`` does.

    Args:
        document: the content of a YAML file of Self-Supervised-Vision, as plain values; it is not changed.
        algo: a key of ``solo_ext.ssv.grammar.ALGORITHMS``.
        arch: one of ``solo_ext.ssv.grammar.ARCHS``.
        output: name of the run's folder.
        devices: number of processes that share a batch.
        wandb: whether to log to Weights & Biases.

    Raises:
        UserError: an entry is missing, unknown or out of range; the message lists all errors.
    """
    raise NotImplementedError
