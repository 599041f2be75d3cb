"""Trunks that VISSL 0.1.6 does not have: small and expanded ResNets, ConvNeXt, and the encoders of AMDIM and CPC.

- ``plain_resnet``: ``TRUNK: {NAME: plain_resnet, RESNETS: {DEPTH: 18, CIFAR_STEM: true}}``. DEPTH 8 is the ResNet-8 of
  ``plugins.tools.resnet8``; 18 to 152 are torchvision's ResNets. Further options are STEM_STRIDE, STEM_PADDING and
  STEM_POOL, which change the stem for CIFAR, ZERO_INIT_RESIDUAL, and
  ``Z_DIM_OLD_TMP_NEW: [512, 512, 2048]``, DISSL's name (arXiv:2209.06235) for an expansion from 512 features to 2048
  with a bottleneck of 512. Its state dict has the keys of VISSL's ``resnet``, so checkpoints are interchangeable.
- ``resnet``: VISSL's trunk with the options of DISSL's fork, see :class:`WideResNeXt`.
- ``convnext``: ``TRUNK: {NAME: convnext, CONVNEXT: {DEPTH: [3, 3, 27, 3], DIMS: [96, 192, 384, 768]}}``, with
  ``DROP_PATH_RATE`` in [0, 1).
- each backbone of ``plugins.tools.backbones``; its options are in the section of its name in capitals:
  ``TRUNK: {NAME: wrn_28_2_gn}``, ``TRUNK: {NAME: amdim_encoder, AMDIM_ENCODER: {SIZE: 32, NDF: 128, N_RKHS: 1024}}``.
"""

from copy import deepcopy
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torchvision.models import resnet
from vissl.models.model_helpers import get_trunk_forward_outputs, transform_model_input_data_type
from vissl.models.trunks import MODEL_TRUNKS_REGISTRY, register_model_trunk
from vissl.models.trunks.resnext import ResNeXt

from plugins.heads import ExpandDim
from plugins.tools.backbones import BACKBONES, backbone_options, headless_backbone
from plugins.tools.command import UserError
from plugins.tools.resnet8 import resnet8
from plugins.tools.stems import Stem
from vissl_ext.parts import check_choice, is_number

DEPTHS = {
    8: resnet8,
    18: resnet.resnet18,
    34: resnet.resnet34,
    50: resnet.resnet50,
    101: resnet.resnet101,
    152: resnet.resnet152,
}
_WIDTH = {8: 64, 18: 512, 34: 512, 50: 2048, 101: 2048, 152: 2048}
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
"""Name of a feature in VISSL → name of the block."""
_FIXED = {
    "WIDTH_MULTIPLIER": 1,
    "NORM": "BatchNorm",
    "STANDARDIZE_CONVOLUTIONS": False,
    "GROUPS": 1,
    "WIDTH_PER_GROUP": 64,
    "LAYER4_STRIDE": 2,
}
"""Options of VISSL's trunk ``resnet`` that ``plain_resnet`` does not support, and the value that they must have."""
_OPTIONS = {"DEPTH", "NORM", "GROUPNORM_GROUPS", "ZERO_INIT_RESIDUAL", "Z_DIM_OLD_TMP_NEW", *_FIXED}
"""Options in RESNETS of both trunks."""
STEM = {"STEM_STRIDE": 1, "STEM_PADDING": 2, "STEM_POOL": False}
"""Options of the stem for CIFAR, in the order of :class:`Stem`, and their defaults, which are solo-learn's."""
_FURTHER = {"plain_resnet": {"CIFAR_STEM", *STEM}, "resnet": {"IS_SKIP_RESIZER"}}
"""Further options of one of them."""


def check_trunk(model_config: Any) -> None:
    """Validate the options of ``resnet``, ``plain_resnet``, ``convnext`` and the backbones of BACKBONES.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: an option is unknown, has the wrong type, or is not supported by ``plain_resnet``, or there is no
            ResNet of that depth.
    """
    name, config = model_config.TRUNK.NAME, model_config.TRUNK.RESNETS
    if name == "convnext":
        convnext_settings(model_config)
    if name in BACKBONES:
        _backbone_width(model_config)
    if name not in ("resnet", "plain_resnet"):
        return
    for key in config:
        check_choice(f"config.MODEL.TRUNK.RESNETS: option of {name}", key, _OPTIONS | _FURTHER[name])
    for key in ("CIFAR_STEM", "STEM_POOL", "IS_SKIP_RESIZER", "ZERO_INIT_RESIDUAL", "STANDARDIZE_CONVOLUTIONS"):
        if not isinstance(config.get(key, False), bool):
            raise UserError(f"config.MODEL.TRUNK.RESNETS.{key} must be true or false, got {config[key]!r}")
    if name == "resnet":
        _check_widths(config, 2048 * config.WIDTH_MULTIPLIER)
        return
    for key, least in (("STEM_STRIDE", 1), ("STEM_PADDING", 0)):
        value = config.get(key, least)
        if type(value) is not int or value < least:
            raise UserError(f"config.MODEL.TRUNK.RESNETS.{key} must be an integer, at least {least}, got {value!r}")
    if not config.get("CIFAR_STEM") and (given := [key for key in STEM if key in config]):
        raise UserError(f"config.MODEL.TRUNK.RESNETS.{given[0]} has no effect without RESNETS.CIFAR_STEM=true")
    if config.DEPTH not in DEPTHS:
        raise UserError(
            f"RESNETS.DEPTH of plain_resnet must be one of {', '.join(map(str, DEPTHS))}, got {config.DEPTH}"
        )
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(
                f"RESNETS.{key} of plain_resnet must be {value}, got {config[key]}; otherwise use TRUNK.NAME=resnet"
            )
    _check_widths(config, _WIDTH[config.DEPTH])


def _check_widths(config: Any, own: int) -> None:
    widths = config.get("Z_DIM_OLD_TMP_NEW")
    if widths is None:
        return
    if len(widths) != 3 or any(type(width) is not int or width < 1 for width in widths) or widths[0] != own:
        raise UserError(
            f"RESNETS.Z_DIM_OLD_TMP_NEW must be [{own}, bottleneck, new width] for DEPTH={config.DEPTH}, got {widths}"
        )
    if widths[2] > own and widths[2] % own:
        raise UserError(
            f"RESNETS.Z_DIM_OLD_TMP_NEW: the new width must be below {own} or a multiple of it, got {widths[2]}"
        )


def trunk_width(model_config: Any) -> int | None:
    """Return the width of the features of one of this module's trunks, or None for other trunks."""
    if model_config.TRUNK.NAME in BACKBONES:
        return _backbone_width(model_config)
    if model_config.TRUNK.NAME == "convnext":
        width: int = convnext_settings(model_config)["DIMS"][-1]
        return width
    if model_config.TRUNK.NAME != "plain_resnet":
        return None
    config = model_config.TRUNK.RESNETS
    return config["Z_DIM_OLD_TMP_NEW"][2] if config.get("Z_DIM_OLD_TMP_NEW") else _WIDTH.get(config.DEPTH)


@register_model_trunk("plain_resnet")
class PlainResNet(nn.Module):
    """torchvision's ResNet as a trunk.

    The CIFAR stem is that of solo-learn: the first convolution is 3×3 with stride 1 and padding 2 (32 pixels become
    34), and there is no max-pooling. The options STEM change it, for weights that were trained with another one.

    Args:
        model_config: VISSL's MODEL section.
        model_name: name of the trunk; not used.

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
            stem = Stem(*(config.get(key, default) for key, default in STEM.items()))
            network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stem.stride, stem.padding, bias=False)
            network.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem.pool else nn.Identity()
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
        """Map images ``[B, 3, H, W]`` to the features with the given names, by default to the flat last features."""
        return get_trunk_forward_outputs(
            feat=transform_model_input_data_type(x, self.input_type),
            out_feat_keys=out_feat_keys or [],
            feature_blocks=self._feature_blocks,
            feature_mapping=self.feat_eval_mapping,
            use_checkpointing=self.checkpointing.USE_ACTIVATION_CHECKPOINTING,
            checkpointing_splits=self.checkpointing.NUM_ACTIVATION_CHECKPOINTING_SPLITS,
        )


class WideResNeXt(ResNeXt):
    """VISSL's trunk ``resnet`` with options of DISSL's fork. By default it is VISSL's trunk.

    The options are ``RESNETS.Z_DIM_OLD_TMP_NEW`` (a block between the last stage and the pooling that changes the width
    of the features), ``RESNETS.IS_SKIP_RESIZER`` (the first head receives the pooled input of that block), and
    ``INPUT_TYPE: rgba``.

    Args:
        model_config: VISSL's MODEL section.
        model_name: name of the trunk; not used.
    """

    def __init__(self, model_config: Any, model_name: str) -> None:
        rgba = model_config.INPUT_TYPE == "rgba"
        stock = model_config
        if rgba:
            stock = deepcopy(model_config)
            stock.INPUT_TYPE = "rgb"
        super().__init__(stock, model_name)
        self.model_config = model_config
        config = model_config.TRUNK.RESNETS
        blocks = dict(self._feature_blocks.items())
        if rgba:
            conv = blocks["conv1"]
            blocks["conv1"] = nn.Conv2d(4, conv.out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.skips = config.get("IS_SKIP_RESIZER", False)
        if config.get("Z_DIM_OLD_TMP_NEW"):
            last = {name: blocks.pop(name) for name in ("avgpool", "flatten")}
            blocks = {**blocks, "resizer": ExpandDim(*config.Z_DIM_OLD_TMP_NEW), **last}
            self.feat_eval_mapping = {**self.feat_eval_mapping, "resizer": "resizer"}
        self._feature_blocks = nn.ModuleDict(blocks)

    def forward(self, x: Tensor, out_feat_keys: list[str] | None = None) -> list[Tensor]:
        """Map images to the features with the given names; with IS_SKIP_RESIZER to the narrow and the wide features."""
        if not self.skips:
            return super().forward(x, out_feat_keys)
        narrow, wide = super().forward(x, ["res5", "flatten"])
        blocks = self._feature_blocks
        return [blocks["flatten"](blocks["avgpool"](narrow)), wide]


def replace_resnet() -> None:
    """Register WideResNeXt as ``resnet``."""
    MODEL_TRUNKS_REGISTRY["resnet"] = WideResNeXt


CONVNEXT: dict[str, Any] = {
    "DEPTH": [3, 3, 27, 3],
    "DIMS": [96, 192, 384, 768],
    "DROP_PATH_RATE": 0.0,
}
"""Options of ``convnext`` and their defaults, which are those of DISSL's fork."""
_CHANNELS = {"lab": 1, "rgb": 3, "bgr": 3, "rgba": 4}


def convnext_settings(model_config: Any) -> dict[str, Any]:
    """Return the options of ``convnext`` in a configuration, completed by the defaults.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: an option is unknown or has an invalid value.
    """
    where, given = "config.MODEL.TRUNK.CONVNEXT", dict(model_config.TRUNK.get("CONVNEXT") or {})
    for key in given:
        check_choice(where, key, CONVNEXT)
    settings = {**CONVNEXT, **given}
    for key in ("DEPTH", "DIMS"):
        value = settings[key]
        if not isinstance(value, list) or len(value) != 4 or any(type(part) is not int or part < 1 for part in value):
            raise UserError(f"{where}.{key} must be a list of four integers above 0, got {value!r}")
    rate = settings["DROP_PATH_RATE"]
    if not is_number(rate) or not 0 <= rate < 1:
        raise UserError(f"{where}.DROP_PATH_RATE must be in [0, 1), got {rate!r}")
    if model_config.INPUT_TYPE not in _CHANNELS:
        raise UserError(
            f"config.MODEL.INPUT_TYPE of convnext must be one of {', '.join(_CHANNELS)}, got "
            f"{model_config.INPUT_TYPE!r}"
        )
    return settings


@register_model_trunk("convnext")
class ConvNeXtTrunk(nn.Module):
    """timm's ConvNeXt (Liu et al. 2022, arXiv:2201.03545) as a trunk.

    Args:
        model_config: VISSL's MODEL section.
        model_name: name of the trunk; not used.

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

    def forward(self, x: Tensor, out_feat_keys: list[str] | None = None) -> list[Tensor]:
        """Map images ``[B, C, H, W]`` to a list with the pooled features, for any names."""
        return [self.network(transform_model_input_data_type(x, self.input_type))]


BACKBONE_SECTIONS: dict[str, set[str]] = {
    name.upper(): {key.upper() for key in backbone_options(name)} for name in BACKBONES
}
"""Section of TRUNK with the options of a backbone of BACKBONES → names of the options."""


def _backbone(model_config: Any) -> Any:
    """Build the backbone of BACKBONES that a configuration names.

    Raises:
        UserError: an option is unknown or has an invalid value.
    """
    name = model_config.TRUNK.NAME
    where, given = f"config.MODEL.TRUNK.{name.upper()}", model_config.TRUNK.get(name.upper()) or {}
    for key in given:
        check_choice(where, key, BACKBONE_SECTIONS[name.upper()])
    try:
        return headless_backbone(name, **{key.lower(): value for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _backbone_width(model_config: Any) -> int:
    """Return the width of the features of that backbone, which is built without memory."""
    with torch.device("meta"):
        return _backbone(model_config).num_features


class BackboneTrunk(nn.Module):
    """A backbone of BACKBONES as a trunk.

    Args:
        model_config: VISSL's MODEL section.
        model_name: name of the trunk; not used.

    Raises:
        UserError: an option is unknown or has an invalid value.
    """

    def __init__(self, model_config: Any, model_name: str) -> None:
        super().__init__()
        self.input_type = model_config.INPUT_TYPE
        self.network = _backbone(model_config)
        self.num_features = self.network.num_features

    def forward(self, x: Tensor, out_feat_keys: list[str] | None = None) -> list[Tensor]:
        """Map images ``[B, 3, H, W]`` to a list with the features, for any names."""
        return [self.network(transform_model_input_data_type(x, self.input_type))]


for _name in BACKBONES:
    register_model_trunk(_name)(type(f"Trunk_{_name}", (BackboneTrunk,), {"__module__": __name__}))
