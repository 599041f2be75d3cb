"""ResNets whose channels are all multiplied, as SSL-EY and VICReg train them; torchvision has none of them."""

from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from plugins.checks import check_whole

LAYERS: dict[int, tuple[int, int, int, int]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Depth → number of bottleneck blocks in each of the four stages."""


def wide_resnet(
    depth: int, width: int, *, weights: None = None, num_classes: int = 1000, zero_init_residual: bool = False
) -> ResNet:
    """Build an untrained ResNet with ``width`` times as many channels in every layer, the stem included.

    The features have 2048 ``width`` dimensions. torchvision's ``wide_resnet50_2`` is another network: it widens the
    inner layer of each block only, and keeps 2048 features.

    Args:
        depth: a key of LAYERS.
        width: multiplier of the channels, >= 1; 1 is torchvision's ResNet.
        weights: None; there are no published weights.
        num_classes: width of the classifier ``fc``.
        zero_init_residual: whether each block starts as the identity.

    Returns:
        An instance of torchvision's ``ResNet`` with the same names of parameters.

    Raises:
        ValueError: there is no ResNet of that depth, ``width`` is below 1, or ``weights`` is not None.

    Reference:
        Bardes, Ponce & LeCun 2022, arXiv:2105.04906, table 1: ResNet-50 (x2), ResNet-200 (x2).

    >>> with torch.device("meta"):
    ...     network = wide_resnet(50, 2)
    >>> network.fc.in_features
    4096
    """
    if depth not in LAYERS:
        raise ValueError(f"depth must be one of {', '.join(map(str, LAYERS))}, got {depth}")
    check_whole("width", width, low=1)
    if weights is not None:
        raise ValueError(f"a wide ResNet has no published weights, got weights={weights!r}; leave weights out")
    blocks, channels = LAYERS[depth], 64 * width
    with torch.device("meta"):  # all layers are replaced
        network = ResNet(Bottleneck, [*blocks])
    network.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(channels)
    network.inplanes = channels
    for stage, count in enumerate(blocks):
        layer = network._make_layer(Bottleneck, channels * 2**stage, count, stride=1 if stage == 0 else 2)
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = nn.Linear(network.inplanes, num_classes)
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(part, Bottleneck):
            last: Any = part.bn3
            nn.init.zeros_(last.weight)
    return network
