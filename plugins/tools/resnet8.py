"""ResNet-8, the small ResNet of the digits configurations."""

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

WIDTHS = (16, 32, 64)
"""Channels of the three stages; the last is the width of the features."""


def resnet8(*, weights: None = None, num_classes: int = 1000, zero_init_residual: bool = False) -> ResNet:
    """Build the ResNet-8 for small images.

    It is the CIFAR network of He et al. with n = 1, which MLPerf Tiny uses too: a 3×3 convolution of stride 1, three
    stages of one basic block with 16, 32 and 64 channels, and average pooling. The shortcuts that change the width are
    1×1 convolutions. Without its classifier it has 77 thousand parameters. A 16-pixel image has 16, 8 and 4 pixels a
    side in the three stages; in a ResNet-18 half of the layers see a single pixel of it.

    Args:
        weights: None; there are no published weights.
        num_classes: width of the classifier ``fc``.
        zero_init_residual: whether each block starts as the identity.

    Returns:
        An instance of torchvision's ``ResNet`` with the same attributes; ``maxpool`` and ``layer4`` return their input.

    Raises:
        ValueError: ``weights`` is not None.

    Reference:
        He et al. 2016, arXiv:1512.03385, section 4.2. Banbury et al. 2021, arXiv:2106.07597.

    >>> network = resnet8()
    >>> sum(parameter.numel() for parameter in network.parameters()) - 65 * 1000
    77392
    """
    if weights is not None:
        raise ValueError(f"resnet8 has no published weights, got weights={weights!r}; leave weights out")
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
    network.bn1 = nn.BatchNorm2d(WIDTHS[0])
    network.maxpool = nn.MaxPool2d(1)  # returns its input
    network.layer1 = _stage(WIDTHS[0], WIDTHS[0], stride=1)
    network.layer2 = _stage(WIDTHS[0], WIDTHS[1], stride=2)
    network.layer3 = _stage(WIDTHS[1], WIDTHS[2], stride=2)
    network.layer4 = nn.Sequential()  # returns its input
    network.fc = nn.Linear(WIDTHS[2], num_classes)
    network.inplanes = WIDTHS[2]  # solo-learn and lightly read the width of the features here
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_residual and isinstance(part, BasicBlock):
            assert isinstance(part.bn2, nn.BatchNorm2d)
            nn.init.zeros_(part.bn2.weight)
    return network


def _stage(inner: int, outer: int, *, stride: int) -> nn.Sequential:
    """Build one basic block, with a 1×1 convolution on the shortcut if the shape changes."""
    shortcut = None
    if (inner, stride) != (outer, 1):
        shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride=stride, bias=False), nn.BatchNorm2d(outer))
    return nn.Sequential(BasicBlock(inner, outer, stride, shortcut))
