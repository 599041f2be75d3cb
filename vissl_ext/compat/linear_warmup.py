"""The linear warm-up of a learning rate that is scaled automatically.

vissl/utils/hydra_config.py:171 deletes it on a single machine, and line 168 gives it another first value on several;
VISSL's fork of DISSL (arXiv:2209.06235) trains with the warm-up that its files have.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any


def activate() -> None:
    """Keep the warm-up as it is written with a loss of ours, and where ``auto_lr_scaling.keep_warmup`` is true."""
    from vissl.utils import hydra_config

    stock = hydra_config.resolve_linear_schedule
    if not hasattr(stock, "__wrapped__"):
        hydra_config.resolve_linear_schedule = wraps(stock)(partial(_kept, stock))


def _kept(resolve: Callable[..., Any], cfg: Any, param_schedulers: Any) -> Any:
    from classy_vision.losses import LOSS_REGISTRY

    kind = LOSS_REGISTRY.get(cfg.LOSS.name)
    ours = kind is not None and kind.__module__.startswith("vissl_ext.")
    if ours or param_schedulers.auto_lr_scaling.get("keep_warmup", False):
        return param_schedulers
    return resolve(cfg, param_schedulers)
