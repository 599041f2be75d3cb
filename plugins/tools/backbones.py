"""Backbones that torchvision does not have, by the names under which all frameworks find them."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from plugins.tools.amdim_encoder import AMDIMEncoder
from plugins.tools.cpc_encoders import ENCODERS, cpc_encoder
from plugins.tools.regnet import regnet_y
from plugins.tools.resnet8 import resnet8
from plugins.tools.ssv_vit import SSVViT
from plugins.tools.wide_resnet import wide_resnet

BACKBONES: Mapping[str, Callable[..., nn.Module]] = {
    "amdim_encoder": AMDIMEncoder,
    "regnet_y_256gf": partial(regnet_y, "regnet_y_256gf"),
    "resnet8": resnet8,
    "resnet50x2": partial(wide_resnet, 50, 2),
    "resnet50x4": partial(wide_resnet, 50, 4),
    "resnet50x5": partial(wide_resnet, 50, 5),
    "resnet200": partial(wide_resnet, 200, 1),
    "resnet200x2": partial(wide_resnet, 200, 2),
    "ssv_vit": SSVViT,
    **{name: partial(cpc_encoder, name) for name in ENCODERS},
}
"""Name → function that builds the untrained network; its keywords are the options. It has a classifier ``fc``, or
``num_features`` and no classifier. An option ``size`` is the side of its images in pixels. To add a backbone, add one
line."""


CLASSIFIERS = ("fc", "classifier", "heads", "head")
"""Names of the classifier in torchvision's networks."""


def without_classifier(network: Any) -> Any:
    """Replace the classifier of a network by the identity, in place.

    Args:
        network: one of torchvision, or of BACKBONES.

    Returns:
        The network. If its classifier was a linear layer ``fc``, ``num_features`` is the width of its features.
    """
    if isinstance(getattr(network, "fc", None), nn.Linear):
        network.num_features = network.fc.in_features
    for name in CLASSIFIERS:
        if name in network._modules:
            setattr(network, name, nn.Identity())
    return network


def backbone_options(name: str) -> dict[str, Any]:
    """Return the options of a backbone and their defaults.

    Args:
        name: a key of BACKBONES.

    >>> backbone_options("amdim_encoder")
    {'size': 32, 'ndf': 128, 'n_rkhs': 1024, 'n_depth': 3}
    """
    keywords = inspect.signature(BACKBONES[name]).parameters.values()
    return {
        each.name: each.default
        for each in keywords
        if each.default is not each.empty and each.name not in ("weights", "num_classes")
    }


def headless_backbone(name: str, **options: Any) -> nn.Module:
    """Build a backbone without its classifier.

    Args:
        name: a key of BACKBONES.
        options: of the backbone, see :func:`backbone_options`.

    Returns:
        The network, images ``[B, 3, H, W]`` → features ``[B, num_features]``.

    Raises:
        TypeError: the backbone has no such option, or one has the wrong type.
        ValueError: an option is out of range.

    >>> headless_backbone("wrn_28_2_gn").num_features
    128
    """
    return without_classifier(BACKBONES[name](**options))
