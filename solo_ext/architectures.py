"""Backbones that solo-learn does not have: those of :mod:`plugins.tools.backbones`, and torchvision's deeper and wider
ResNets, ResNeXts and RegNets, all untrained.

The classifier is removed, and ``num_features`` is the width of the features. On CIFAR, a ResNet has the stem of
solo-learn's own ResNets: a 3×3 convolution with stride 1 and padding 2 (32 pixels become 34) and no max-pool. A RegNet
has its usual 3×3 stem with stride 1, so that 32 pixels stay 32. Every ResNet, also solo-learn's own, has the option
``stem`` for another one, see :func:`set_stem_`::

    backbone:
      name: resnet18
      kwargs: {stem: 3x3}

``expanded_resnet18``, ``34``, ``50`` and ``101`` are ResNets of any feature width, with the initialisation and the
stems of the published TinyImageNet code (Dubois et al. 2022, arXiv:2209.06235)::

    backbone:
      name: expanded_resnet18
      kwargs: {dim: 2048, stem: 3x3}

``amdim_encoder`` takes images of one size, see :class:`plugins.tools.amdim_encoder.AMDIMEncoder`::

    backbone:
      name: amdim_encoder
      kwargs: {size: 32, ndf: 256, n_rkhs: 2048, n_depth: 10}
"""

import inspect
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

from torch import nn
from torchvision.models import resnet
from torchvision.models.regnet import RegNet

from plugins.heads import expand_resnet_dim, issl_init_
from plugins.spelling import did_you_mean
from plugins.tools.backbones import BACKBONES, backbone_options, headless_backbone, without_classifier
from plugins.tools.regnet import BLOCKS, regnet_y, small_stem_

_TORCHVISION = {
    "resnet34": resnet.resnet34,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnext50": resnet.resnext50_32x4d,
    "resnext101": resnet.resnext101_32x8d,
    "wide_resnet50": resnet.wide_resnet50_2,
    "wide_resnet101": resnet.wide_resnet101_2,
    **{name: partial(regnet_y, name) for name in BLOCKS},
}
_EXPANDED = {f"expanded_{name}": vars(resnet)[name] for name in ("resnet18", "resnet34", "resnet50", "resnet101")}
_STEMS = ("7x7", "3x3", "cifar")


def set_stem_(network: Any, stem: str) -> Any:
    """Replace the first layers of a ResNet, in place, with new weights.

    Args:
        network: one of torchvision's ``ResNet``, or a ``RegNet``, whose only other stem is "3x3", which has stride 1.
        stem: "7x7" with stride 2; "3x3" with stride 1 and padding 1; "cifar", which is "3x3" without the max-pool.

    Returns:
        The network.

    Raises:
        TypeError: the stem is unknown, or the network has no such stem.

    >>> set_stem_(resnet.resnet18(), "3x3").conv1
    Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    if stem not in _STEMS:
        raise TypeError(f"stem must be one of {', '.join(_STEMS)}, got {stem!r}")
    if isinstance(network, RegNet) and stem == "3x3":
        return small_stem_(network)
    if not isinstance(network, resnet.ResNet):
        raise TypeError(f"stem={stem} is not available for a {type(network).__name__}; remove stem")
    _replace_stem(network, stem)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as all of torchvision's layers
    return network


def _replace_stem(network: Any, stem: str) -> None:
    size, stride, padding = (7, 2, 3) if stem == "7x7" else (3, 1, 1)
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, size, stride, padding, bias=False)
    network.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)


def pop_stem(name: str, kwargs: MutableMapping[str, Any]) -> str | None:
    """Remove ``stem`` from the arguments of a network, and return it; None without it, or if the network takes it."""
    return None if name in _EXPANDED else kwargs.pop("stem", None)


def _expanded(
    name: str,
    method: str,
    *,
    cifar: bool = False,
    dim: int | None = None,
    bottleneck: int | None = 512,
    stem: str | None = None,
) -> nn.Module:
    """Build a ResNet with a representation of any width.

    Args:
        name: a key of ARCHITECTURES.
        method: name of the method that is trained; ignored.
        cifar: whether the images have 32 pixels.
        dim: width of the representation: a multiple of the native width, which is the default, or less.
        bottleneck: inner width of the block that expands the representation; None means a single 1×1 convolution.
        stem: "7x7"; "3x3" with stride 1, for images below 100 pixels; "cifar", which is "3x3" without a max-pool. None
            means "cifar" for images of 32 pixels, else "7x7".

    Raises:
        TypeError: the width is not possible, or the stem is unknown.
    """
    network = _EXPANDED[name](weights=None)
    network.num_features = network.fc.in_features
    stem = stem or ("cifar" if cifar else "7x7")
    if stem not in _STEMS:
        raise TypeError(f"stem of backbone {name} must be one of {', '.join(_STEMS)}, got {stem!r}")
    if stem != "7x7":
        _replace_stem(network, stem)
    network.fc = nn.Identity()
    issl_init_(network)
    try:
        return expand_resnet_dim(network, network.num_features if dim is None else dim, bottleneck=bottleneck)
    except ValueError as error:
        raise TypeError(f"backbone {name}: {error}") from None


def _build(name: str, method: str, *, cifar: bool = False, **kwargs: Any) -> nn.Module:
    """Build one of torchvision's networks, or one of BACKBONES.

    Args:
        name: a key of ARCHITECTURES.
        method: name of the method that is trained; ignored.
        cifar: whether the images have 32 pixels.
        kwargs: options of torchvision's class, or of the function in BACKBONES, such as ``zero_init_residual``.

    Raises:
        TypeError: the network has no such option, or its value is out of range.
    """
    known = _options(name)
    for key in kwargs:
        if key not in known:
            raise TypeError(
                f"backbone {name} has no option {key!r}; known options: {', '.join(known)}{did_you_mean(key, known)}"
            )
    try:
        ours = name in BACKBONES
        network: Any = headless_backbone(name, **kwargs) if ours else without_classifier(_TORCHVISION[name](**kwargs))
    except ValueError as error:
        raise TypeError(f"backbone {name}: {error}") from None
    if cifar and isinstance(network, resnet.ResNet) and name != "resnet8":
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, kernel_size=3, stride=1, padding=2, bias=False)
        network.maxpool = nn.Identity()
    elif cifar and isinstance(network, RegNet):
        small_stem_(network)
    return network


def _options(name: str) -> list[str]:
    """Return the options of a network, without those that its name defines and those of the classifier."""
    if name in BACKBONES and name not in BLOCKS:
        return sorted(backbone_options(name))
    # torchvision's functions pass their options to the class
    fixed = {"num_classes", "block", "layers", "block_params", "groups", "width_per_group"}
    return sorted(set(inspect.signature(RegNet if name in BLOCKS else resnet.ResNet).parameters) - fixed)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(_build, name) for name in sorted({*_TORCHVISION, *BACKBONES})},
    **{name: partial(_expanded, name) for name in _EXPANDED},
}
"""{name: factory(method, cifar=False, **kwargs)}; a network maps images ``[B, 3, H, W]`` to ``[B, num_features]``."""
