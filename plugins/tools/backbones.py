"""Backbones that torchvision does not have, by the names under which solo-learn and lightly find them."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from plugins.tools.amdim_encoder import AMDIMEncoder
from plugins.tools.cpc_encoders import ENCODERS, cpc_encoder
from plugins.tools.regnet import regnet_y
from plugins.tools.resnet8 import resnet8
from plugins.tools.wide_resnet import wide_resnet

BACKBONES: Mapping[str, Callable[..., nn.Module]] = {
    "amdim_encoder": AMDIMEncoder,
    "regnet_y_256gf": partial(regnet_y, "regnet_y_256gf"),
    "resnet8": resnet8,
    "resnet50x2": partial(wide_resnet, 50, 2),
    "resnet50x4": partial(wide_resnet, 50, 4),
    "resnet200": partial(wide_resnet, 200, 1),
    "resnet200x2": partial(wide_resnet, 200, 2),
    **{name: partial(cpc_encoder, name) for name in ENCODERS},
}
"""Name → function that builds the untrained network; its keywords are the options. It has a classifier ``fc``, or
``num_features`` and no classifier. An option ``size`` is the side of its images in pixels. To add a backbone, add one
line."""
