"""Settings that VISSL needs where there is no GPU."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

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
    "OPTIMIZER.use_larc": False,
}


def cpu_safe(cfg: DictConfig, given: set[str]) -> list[str]:
    """Change what cannot work without a GPU.

    Args:
        cfg: VISSL's configuration, with ``config`` on top; changed in place.
        given: keys, below ``config``, that the user named on the command line: they are left alone.

    Returns:
        What was changed, as ``KEY=value``.
    """
    changed = []
    for key, value in _CPU.items():
        if key not in given and OmegaConf.select(cfg.config, key) != value:
            OmegaConf.update(cfg.config, key, value)
            changed.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return changed
