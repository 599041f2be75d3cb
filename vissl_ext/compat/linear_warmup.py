"""Linear warm-up of a learning rate with automatic scaling.

vissl/utils/hydra_config.py:171 removes the warm-up on a single machine, and line 168 changes its first value on
several. DISSL's fork of VISSL (arXiv:2209.06235) trains with the warm-up in its files.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

_FORK_FOLDERS = ("config/pretrain/dstl", "config/pretrain/cntr")
"""Folders that DISSL's fork of VISSL has and VISSL does not have."""


def activate() -> None:
    """Keep the configured warm-up if ``auto_lr_scaling.keep_warmup`` is true, the default for losses of this package.

    :func:`keep_warmup_of_fork` sets it for configurations of DISSL's fork.
    """
    from vissl.utils import hydra_config

    stock = hydra_config.resolve_linear_schedule
    if not hasattr(stock, "__wrapped__"):
        hydra_config.resolve_linear_schedule = wraps(stock)(partial(_kept, stock))


def _kept(resolve: Callable[..., Any], cfg: Any, param_schedulers: Any) -> Any:
    from classy_vision.losses import LOSS_REGISTRY

    kind = LOSS_REGISTRY.get(cfg.LOSS.name)
    default = kind is not None and kind.__module__.startswith("vissl_ext.")
    if param_schedulers.auto_lr_scaling.get("keep_warmup", default):
        return param_schedulers
    return resolve(cfg, param_schedulers)


def keep_warmup_of_fork(config: Any, file: Path, folders: Sequence[Path]) -> None:
    """Set ``auto_lr_scaling.keep_warmup`` in a configuration of DISSL's fork of VISSL, unless it is set.

    A folder belongs to the fork if it contains ``pretrain/dstl`` or ``pretrain/cntr``. There is no other criterion,
    because some files of the fork use a loss of VISSL.

    Args:
        config: VISSL's configuration, below ``config``; changed in place.
        file: path of the user's file within its folder.
        folders: folders of the user, in the order of the search.
    """
    from omegaconf import OmegaConf, open_dict

    folder = next((folder for folder in folders if (folder / file).is_file()), None)
    scaling = OmegaConf.select(config, "OPTIMIZER.param_schedulers.lr.auto_lr_scaling")
    if folder is None or not OmegaConf.is_dict(scaling) or "keep_warmup" in scaling:
        return
    if any((folder / place).is_dir() for place in _FORK_FOLDERS):
        with open_dict(scaling):
            scaling.keep_warmup = True
