"""The trunk ``convnext`` of the fork's files, which is timm's ConvNeXt (Liu et al. 2022, arXiv:2201.03545).

``TRUNK: {NAME: convnext, CONVNEXT: {DEPTH: [3, 3, 27, 3], DIMS: [96, 192, 384, 768]}}``; of CONVNEXT it also takes
``DROP_PATH_RATE``, in [0, 1), and ``IS_SKIP_LAST_NORM`` (no layer norm after the pooling). The fork's NORM_TYPE
batchnorm is not here.
"""

from typing import Any

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from vissl.models.model_helpers import transform_model_input_data_type
from vissl.models.trunks import register_model_trunk

from plugins.tools.command import UserError

NAME = "convnext"
DEFAULTS: dict[str, Any] = {
    "DEPTH": [3, 3, 27, 3],
    "DIMS": [96, 192, 384, 768],
    "DROP_PATH_RATE": 0.0,
    "NORM_TYPE": "layernorm",
    "IS_SKIP_LAST_NORM": False,
}
_CHANNELS = {"lab": 1, "rgb": 3, "bgr": 3, "rgba": 4}


def convnext_settings(model_config: Any) -> dict[str, Any]:
    """What a configuration says of the trunk, and the fork's defaults of the rest.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: a setting is unknown, or no ConvNeXt can be made with it.
    """
    where, given = "config.MODEL.TRUNK.CONVNEXT", dict(model_config.TRUNK.get("CONVNEXT") or {})
    for key in given:
        if key not in DEFAULTS:
            raise UserError(f"{where}: {key!r} is no setting of {NAME}; known are {', '.join(sorted(DEFAULTS))}")
    settings = {**DEFAULTS, **given}
    for key in ("DEPTH", "DIMS"):
        value = settings[key]
        if not isinstance(value, list) or len(value) != 4 or any(type(part) is not int or part < 1 for part in value):
            raise UserError(f"{where}.{key} is a list of four whole numbers above 0, got {value!r}")
    rate = settings["DROP_PATH_RATE"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise UserError(f"{where}.DROP_PATH_RATE must be in [0, 1), got {rate!r}")
    if settings["NORM_TYPE"] != "layernorm":
        raise UserError(f"{where}.NORM_TYPE is layernorm, got {settings['NORM_TYPE']!r}")
    if not isinstance(settings["IS_SKIP_LAST_NORM"], bool):
        raise UserError(f"{where}.IS_SKIP_LAST_NORM must be true or false, got {settings['IS_SKIP_LAST_NORM']!r}")
    if model_config.INPUT_TYPE not in _CHANNELS:
        raise UserError(
            f"config.MODEL.INPUT_TYPE of {NAME} is one of {', '.join(_CHANNELS)}, got {model_config.INPUT_TYPE!r}"
        )
    return settings


@register_model_trunk(NAME)
class ConvNeXtTrunk(nn.Module):
    """See the module.

    Args:
        model_config: VISSL's MODEL section.
        model_name: the trunk's name; not used.

    Raises:
        UserError: see ``convnext_settings``.
    """

    def __init__(self, model_config: Any, model_name: str) -> None:
        super().__init__()
        settings = convnext_settings(model_config)
        self.input_type = model_config.INPUT_TYPE
        self.network = ConvNeXt(
            in_chans=_CHANNELS[self.input_type],
            num_classes=0,
            depths=tuple(settings["DEPTH"]),
            dims=tuple(settings["DIMS"]),
            drop_path_rate=settings["DROP_PATH_RATE"],
            norm_eps=1e-6,
        )
        if settings["IS_SKIP_LAST_NORM"]:
            self.network.head.norm = nn.Identity()

    def forward(self, x: Tensor, out_feat_keys: list[str] | None = None) -> list[Tensor]:
        """Images ``[B, C, H, W]`` → the pooled features, as a list of one; it has none of other names."""
        return [self.network(transform_model_input_data_type(x, self.input_type))]
