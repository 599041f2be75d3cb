"""Backbones that torchvision does not have, by the names under which solo-learn and lightly find them."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from plugins.tools.regnet import regnet_y
from plugins.tools.resnet8 import resnet8
from plugins.tools.wide_resnet import wide_resnet

BACKBONES: Mapping[str, Callable[..., nn.Module]] = {
    "regnet_y_256gf": partial(regnet_y, "regnet_y_256gf"),
    "resnet8": resnet8,
    "resnet50x2": partial(wide_resnet, 50, 2),
    "resnet50x4": partial(wide_resnet, 50, 4),
    "resnet200": partial(wide_resnet, 200, 1),
    "resnet200x2": partial(wide_resnet, 200, 2),
}
"""Name → function that builds the untrained network, with a classifier ``fc``; its keywords are the options. To add a
backbone, add one line."""
