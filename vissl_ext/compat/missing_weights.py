"""Weights of a trunk that a checkpoint lacks.

vissl/utils/checkpoint.py:888 leaves them as they were drawn, which only log.txt says: the checkpoint of a ResNet-18 can
be evaluated as a ResNet-34. vissl/utils/checkpoint.py:877 asserts that shapes agree.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from plugins.tools.command import UserError


def activate() -> None:
    """Refuse a checkpoint of VISSL that does not hold the whole trunk; other files are left to VISSL."""
    from vissl.models import base_ssl_model

    stock = base_ssl_model.init_model_from_consolidated_weights
    if not hasattr(stock, "__wrapped__"):
        base_ssl_model.init_model_from_consolidated_weights = wraps(stock)(partial(_checked, stock))


def _checked(load: Callable[..., Any], config: Any, model: Any, state_dict: dict[str, Any], **how: Any) -> Any:
    from vissl.utils.checkpoint import get_checkpoint_model_state_dict

    if how.get("state_dict_key_name") == "classy_state_dict" and "classy_state_dict" in state_dict:
        found = get_checkpoint_model_state_dict(config, state_dict["classy_state_dict"])
        skipped = how.get("skip_layers") or []
        for name, weight in model.state_dict().items():
            if not name.startswith("trunk.") or any(layer in name for layer in skipped) or "pos_embed" in name:
                continue
            if name not in found or found[name].shape != weight.shape:
                what = "lacks" if name not in found else f"has another shape, {tuple(found[name].shape)}, of"
                raise UserError(
                    f"{config.MODEL.WEIGHTS_INIT.PARAMS_FILE} is a checkpoint of another trunk than "
                    f"config.MODEL.TRUNK says: it {what} {name.removeprefix('trunk.')}"
                )
    return load(config, model, state_dict, **how)
