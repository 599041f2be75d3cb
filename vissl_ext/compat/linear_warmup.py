"""The linear warm-up of a learning rate that is scaled automatically.

vissl/utils/hydra_config.py:171 deletes it on a single machine, and line 168 gives it another first value on several;
VISSL's fork of DISSL (arXiv:2209.06235) trains with the warm-up that its files have.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any


def activate() -> None:
    """Keep the warm-up as it is written where ``auto_lr_scaling.keep_warmup`` is true; with a loss of ours by default.

    ``compose`` sets it for the files of the fork with a loss of VISSL's.
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
