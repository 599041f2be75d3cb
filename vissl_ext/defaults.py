"""Adapt VISSL's settings to a machine without a GPU, apex or SLURM."""

import shutil
from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.tools.command import UserError
from vissl_ext.parts import NEED_GPU

_CPU: dict[str, Any] = {
    "MACHINE.DEVICE": "cpu",
    "DISTRIBUTED.BACKEND": "gloo",
    "DISTRIBUTED.NUM_NODES": 1,
    "DISTRIBUTED.NUM_PROC_PER_NODE": 1,
    "DISTRIBUTED.INIT_METHOD": "tcp",
    "DISTRIBUTED.RUN_ID": "auto",
    "DATA.PIN_MEMORY": False,
    "MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN": False,
    "MODEL.AMP_PARAMS.USE_AMP": False,
}
_NEED_GPU: dict[str, Any] = {
    "MACHINE.DEVICE": "gpu",
    "DISTRIBUTED.BACKEND": "nccl",
    "MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN": True,
    "MODEL.AMP_PARAMS.USE_AMP": True,
    "MODEL.FSDP_CONFIG.AUTO_SETUP_FSDP": True,
    "MODEL.SHARDED_DDP_SETUP.USE_SDP": True,
}
"""Settings that cannot work on a CPU; they are errors if the user sets them."""
_APEX = (
    ("MODEL.AMP_PARAMS.USE_AMP", "MODEL.AMP_PARAMS.AMP_TYPE"),
    ("MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN", "MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE"),
)
"""Pairs of a switch, and the option that must not be "apex" without apex if the switch is on."""


def adapt(cfg: DictConfig, given: dict[str, Any]) -> list[str]:
    """Change the settings that a run on the CPU requires; the settings of a run on a GPU are not changed.

    Args:
        cfg: the composed configuration, with ``config`` as top-level key; changed in place.
        given: overrides of the command line, key below ``config`` → value; these settings are never changed.

    Returns:
        The changes, as ``KEY=value``.

    Raises:
        UserError: a setting needs a GPU or apex, which is not available.
    """
    changed: list[str] = []
    gpu = torch.cuda.is_available()
    if not gpu or OmegaConf.select(cfg.config, "MACHINE.DEVICE") == "cpu":
        changed = _set_cpu(cfg.config, given, "no GPU is available" if not gpu else "MACHINE.DEVICE is cpu")
        if OmegaConf.select(cfg.config, "MODEL.TRUNK.NAME") in NEED_GPU:
            raise UserError(f"config.MODEL.TRUNK.NAME={cfg.config.MODEL.TRUNK.NAME} needs a GPU; use regnet")
    _check_apex(cfg.config)
    return changed


def without_slurm(config: DictConfig, given: dict[str, Any]) -> str:
    """Turn off SLURM if it is not installed.

    Args:
        config: VISSL's configuration, below ``config``; changed in place.
        given: overrides of the command line, key below ``config`` → value; these settings are never changed.

    Returns:
        A message for the user; empty if nothing was changed.

    Raises:
        UserError: the command line requests SLURM, which is not installed.
    """
    if not OmegaConf.select(config, "SLURM.USE_SLURM") or shutil.which("sbatch"):
        return ""
    if "SLURM.USE_SLURM" in given:
        raise UserError("config.SLURM.USE_SLURM=true needs SLURM, but the program sbatch is not installed")
    config.SLURM.USE_SLURM = False
    return "SLURM is not installed (no sbatch): the run starts on this machine, with SLURM.USE_SLURM=false"


def set_sampler(config: DictConfig, given: dict[str, Any]) -> None:
    """Set the sampler with which a resumed run skips the images that it has processed in the interrupted epoch.

    Args:
        config: VISSL's configuration, below ``config``; changed in place.
        given: overrides of the command line, key below ``config`` → value; these settings are never changed.

    Raises:
        UserError: the command line turns that sampler off.
    """
    key, every = "DATA.TRAIN.USE_STATEFUL_DISTRIBUTED_SAMPLER", config.CHECKPOINT.CHECKPOINT_ITER_FREQUENCY
    skips = config.DATA.TRAIN.USE_DEBUGGING_SAMPLER or "airstore" in config.DATA.TRAIN.DATA_SOURCES
    if every <= 0 or skips:
        return
    if given.get(key) is False:
        raise UserError(
            f"config.CHECKPOINT.CHECKPOINT_ITER_FREQUENCY={every} requires config.{key}=true, got false; set "
            "CHECKPOINT_ITER_FREQUENCY=-1 to write checkpoints, and resume, at the ends of epochs only"
        )
    OmegaConf.update(config, key, True)


def _set_cpu(config: DictConfig, given: dict[str, Any], why: str) -> list[str]:
    wanted = dict(_CPU)
    if given.get("DISTRIBUTED.NUM_NODES", 1) != 1:  # several machines need a common address
        del wanted["DISTRIBUTED.INIT_METHOD"], wanted["DISTRIBUTED.RUN_ID"]
    changed = []
    for key, value in wanted.items():
        if key not in given and OmegaConf.select(config, key) != value:
            OmegaConf.update(config, key, value)
            changed.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    for key, value in _NEED_GPU.items():
        if OmegaConf.select(config, key) == value:
            text = str(value).lower() if isinstance(value, bool) else value
            raise UserError(f"config.{key}={text} needs a GPU, but {why}")
    return changed


def _check_apex(config: DictConfig) -> None:
    if find_spec("apex") is not None:
        return
    for switch, key in _APEX:
        if OmegaConf.select(config, switch) and OmegaConf.select(config, key) == "apex":
            raise UserError(
                f"config.{key} is apex, which is not installed; set config.{key}=pytorch, or config.{switch}=false"
            )
