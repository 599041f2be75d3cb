"""Backbones that solo-learn lacks: deeper and wider ResNets, ResNeXts, RegNets, all untrained, from torchvision.

Each comes without its classifier, with its feature width as ``num_features``. On CIFAR a ResNet gets the stem that
solo-learn gives its own: a 3×3 convolution of stride 1 and padding 2 (32 pixels become 34) and no max-pool. A RegNet
keeps its 3×3 stem and loses its stride, so that 32 pixels stay 32.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.models import regnet, resnet

_RESNETS = {
    "resnet34": resnet.resnet34,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnext50": resnet.resnext50_32x4d,
    "resnext101": resnet.resnext101_32x8d,
    "wide_resnet50": resnet.wide_resnet50_2,
    "wide_resnet101": resnet.wide_resnet101_2,
}
_REGNETS = {
    "regnet_y_400mf": regnet.regnet_y_400mf,
    "regnet_y_800mf": regnet.regnet_y_800mf,
    "regnet_y_1_6gf": regnet.regnet_y_1_6gf,
    "regnet_y_3_2gf": regnet.regnet_y_3_2gf,
    "regnet_y_8gf": regnet.regnet_y_8gf,
    "regnet_y_16gf": regnet.regnet_y_16gf,
    "regnet_y_32gf": regnet.regnet_y_32gf,
}


def _build(name: str, method: str, *, cifar: bool = False, **kwargs: Any) -> nn.Module:
    """One of the networks.

    Args:
        name: a key of ARCHITECTURES.
        method: name of the method that is trained; no network here depends on it.
        cifar: whether the images have 32 pixels.
        kwargs: options of torchvision's class, such as ``zero_init_residual``.

    Raises:
        TypeError: it has no such option.
    """
    build, cls = (_RESNETS[name], resnet.ResNet) if name in _RESNETS else (_REGNETS[name], regnet.RegNet)
    # the classifier goes, and what makes the network this network is fixed
    fixed = {"self", "num_classes", "block", "layers", "block_params", "groups", "width_per_group"}
    known = sorted(set(inspect.signature(cls.__init__).parameters) - fixed)
    for key in kwargs:
        if key not in known:
            raise TypeError(f"backbone {name} has no option {key!r}; it knows {', '.join(known)}")
    network = build(weights=None, **kwargs)
    network.num_features = network.fc.in_features
    network.fc = nn.Identity()
    if cifar and name in _RESNETS:
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, kernel_size=3, stride=1, padding=2, bias=False)
        network.maxpool = nn.Identity()
    elif cifar:
        network.stem[0].stride = (1, 1)
    return network


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    name: partial(_build, name) for name in sorted((*_RESNETS, *_REGNETS))
}
"""Name → factory(method, cifar=False, **kwargs) → network; images ``[B, 3, H, W]`` → features ``[B, num_features]``."""
