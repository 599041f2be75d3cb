"""Linear warm-up of a learning rate with automatic scaling.

vissl/utils/hydra_config.py:171 removes the warm-up on a single machine, and line 168 changes its first value on
several. DISSL's fork of VISSL (arXiv:2209.06235) trains with the warm-up in its files.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any


def activate() -> None:
    """Keep the configured warm-up if ``auto_lr_scaling.keep_warmup`` is true, the default for losses of this package.

    ``compose`` sets it for the files of DISSL's fork.
    """
    from vissl.utils import hydra_config

    stock = hydra_config.resolve_linear_schedule
    if not hasattr(stock, "__wrapped__"):
        hydra_config.resolve_linear_schedule = wraps(stock)(partial(_kept, stock))


def _kept(resolve: Callable[..., Any], cfg: Any, param_schedulers: Any) -> Any:
    from classy_vision.losses import LOSS_REGISTRY

    kind = LOSS_REGISTRY.get(cfg.LOSS.name)
    ours = kind is not None and kind.__module__.startswith("vissl_ext.")
    if param_schedulers.auto_lr_scaling.get("keep_warmup", ours):
        return param_schedulers
    return resolve(cfg, param_schedulers)
