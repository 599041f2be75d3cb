"""Trunks that VISSL 0.1.6 lacks: ResNet-18 and ResNet-34, the stem for images of 32 pixels, features of any width.

``TRUNK: {NAME: plain_resnet, RESNETS: {DEPTH: 18, CIFAR_STEM: true}}``; of RESNETS it also takes ZERO_INIT_RESIDUAL,
and ``Z_DIM_OLD_TMP_NEW: [512, 512, 2048]``, which is DISSL's name (arXiv:2209.06235) for: from 512 features through 512
to 2048. Its state dict has the keys of VISSL's own ``resnet``, so that a checkpoint of either goes into the other.
"""

from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet
from vissl.models.model_helpers import get_trunk_forward_outputs, transform_model_input_data_type
from vissl.models.trunks import register_model_trunk

from plugins.heads import ExpandDim
from plugins.tools.command import UserError
from vissl_ext.dissl import convnext

DEPTHS = {18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50, 101: resnet.resnet101, 152: resnet.resnet152}
_WIDTH = {18: 512, 34: 512, 50: 2048, 101: 2048, 152: 2048}
_NAMES = {
    "conv1": "conv1_relu",
    "res1": "maxpool",
    "res2": "layer1",
    "res3": "layer2",
    "res4": "layer3",
    "res5": "layer4",
    "res5avg": "avgpool",
    "flatten": "flatten",
}


_FIXED = {
    "WIDTH_MULTIPLIER": 1,
    "NORM": "BatchNorm",
    "STANDARDIZE_CONVOLUTIONS": False,
    "GROUPS": 1,
    "WIDTH_PER_GROUP": 64,
    "LAYER4_STRIDE": 2,
}
"""Settings of VISSL's own trunk that this one does not have, and what they must be."""


_SETTINGS = {"DEPTH", "NORM", "GROUPNORM_GROUPS", "ZERO_INIT_RESIDUAL", "Z_DIM_OLD_TMP_NEW", *_FIXED}
"""What both trunks read of RESNETS."""
_OWN = {"plain_resnet": {"CIFAR_STEM"}, "resnet": {"AVG_POOL_KERNEL_SIZE", "IS_SKIP_RESIZER"}}
"""What one of them reads beside; see ``vissl_ext.dissl.resnet``."""


def check_trunk(model_config: Any) -> None:
    """Refuse settings that a trunk does not read, and what ``plain_resnet`` and ``convnext`` cannot be.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: a setting is unknown or of another kind, is of VISSL's own trunk alone, or there is no ResNet of that
            depth.
    """
    name, config = model_config.TRUNK.NAME, model_config.TRUNK.RESNETS
    if name == convnext.NAME:
        convnext.convnext_settings(model_config)
    if name not in ("resnet", "plain_resnet"):
        return
    allowed = _SETTINGS | _OWN[name]
    for key in config:
        if key not in allowed:
            raise UserError(
                f"config.MODEL.TRUNK.RESNETS: {key!r} is no setting of {name}; known are {', '.join(sorted(allowed))}"
            )
    for key in ("CIFAR_STEM", "IS_SKIP_RESIZER", "ZERO_INIT_RESIDUAL", "STANDARDIZE_CONVOLUTIONS"):
        if not isinstance(config.get(key, False), bool):
            raise UserError(f"config.MODEL.TRUNK.RESNETS.{key} must be true or false, got {config[key]!r}")
    if name == "resnet":
        size = config.get("AVG_POOL_KERNEL_SIZE", -1)
        if size is not None and (type(size) is not int or size < -1 or size == 0):
            raise UserError(f"config.MODEL.TRUNK.RESNETS.AVG_POOL_KERNEL_SIZE is -1, null or a size, got {size!r}")
        _check_widths(config, 2048 * config.WIDTH_MULTIPLIER)
        return
    if config.DEPTH not in DEPTHS:
        raise UserError(f"RESNETS.DEPTH of plain_resnet is one of {', '.join(map(str, DEPTHS))}, got {config.DEPTH}")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"RESNETS.{key} of plain_resnet is {value}, got {config[key]}; see VISSL's trunk resnet")
    _check_widths(config, _WIDTH[config.DEPTH])


def _check_widths(config: Any, own: int) -> None:
    widths = config.get("Z_DIM_OLD_TMP_NEW")
    if widths is None:
        return
    if len(widths) != 3 or any(type(width) is not int or width < 1 for width in widths) or widths[0] != own:
        raise UserError(
            f"RESNETS.Z_DIM_OLD_TMP_NEW is [{own}, inner width, new width] for a depth of {config.DEPTH}, got {widths}"
        )
    if widths[2] > own and widths[2] % own:
        raise UserError(f"RESNETS.Z_DIM_OLD_TMP_NEW: the new width is a multiple of {own} or below it, got {widths[2]}")


def trunk_width(model_config: Any) -> int | None:
    """Width of the features of ``plain_resnet`` or ``convnext``; None of others, unknown before they are built."""
    if model_config.TRUNK.NAME == convnext.NAME:
        width: int = convnext.convnext_settings(model_config)["DIMS"][-1]
        return width
    if model_config.TRUNK.NAME != "plain_resnet":
        return None
    config = model_config.TRUNK.RESNETS
    return config["Z_DIM_OLD_TMP_NEW"][2] if config.get("Z_DIM_OLD_TMP_NEW") else _WIDTH.get(config.DEPTH)


@register_model_trunk("plain_resnet")
class PlainResNet(nn.Module):
    """torchvision's ResNet as a trunk.

    With the CIFAR stem, that of solo-learn, the first convolution is 3×3 of stride 1 and padding 2 (32 pixels become
    34) and there is no max-pool.

    Args:
        model_config: VISSL's MODEL section.
        model_name: the trunk's name; not used.

    Raises:
        UserError: see ``check_trunk``.
    """

    def __init__(self, model_config: Any, model_name: str) -> None:
        super().__init__()
        config = model_config.TRUNK.RESNETS
        check_trunk(model_config)
        self.checkpointing = model_config.ACTIVATION_CHECKPOINTING
        self.input_type = model_config.INPUT_TYPE
        network = DEPTHS[config.DEPTH](weights=None, zero_init_residual=config.ZERO_INIT_RESIDUAL)
        self.num_features = network.fc.in_features
        if config.get("CIFAR_STEM", False):
            network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
            network.maxpool = nn.Identity()
        resizer = {}
        if config.get("Z_DIM_OLD_TMP_NEW"):
            old, inner, self.num_features = config["Z_DIM_OLD_TMP_NEW"]
            resizer["resizer"] = ExpandDim(old, inner, self.num_features)
        self._feature_blocks = nn.ModuleDict(
            {
                "conv1": network.conv1,
                "bn1": network.bn1,
                "conv1_relu": network.relu,
                "maxpool": network.maxpool,
                "layer1": network.layer1,
                "layer2": network.layer2,
                "layer3": network.layer3,
                "layer4": network.layer4,
                **resizer,
                "avgpool": network.avgpool,
                "flatten": nn.Flatten(1),
            }
        )
        self.feat_eval_mapping = {**_NAMES, **({"resizer": "resizer"} if resizer else {})}

    def forward(self, x: Tensor, out_feat_keys: list[str] | None = None) -> list[Tensor]:
        """Images ``[B, 3, H, W]`` → the features that are asked for by name; without names the last, flat."""
        return get_trunk_forward_outputs(
            feat=transform_model_input_data_type(x, self.input_type),
            out_feat_keys=out_feat_keys or [],
            feature_blocks=self._feature_blocks,
            feature_mapping=self.feat_eval_mapping,
            use_checkpointing=self.checkpointing.USE_ACTIVATION_CHECKPOINTING,
            checkpointing_splits=self.checkpointing.NUM_ACTIVATION_CHECKPOINTING_SPLITS,
        )
