"""The classifier of the linear evaluations that MoCo, SimSiam, MEC and Matrix-SSL publish."""

from torch import nn

from plugins.checks import check_range


def normalized_classifier(in_dim: int, classes: int) -> nn.Sequential:
    """BatchNorm without scale and shift (ε = 1e-6), then a Linear layer: ``[B, in_dim] → [B, classes]``.

    The features of a frozen backbone come at any scale; the norm makes one learning rate fit them all. The weights
    begin as ``N(0, 0.01^2)``, the biases as 0.

    Args:
        in_dim: width of the features, ≥ 1.
        classes: how many, ≥ 1.

    Raises:
        ValueError: a number below 1.

    Example:
        >>> [type(module).__name__ for module in normalized_classifier(512, 10)]
        ['BatchNorm1d', 'Linear']
    """
    check_range("in_dim", in_dim, low=1)
    check_range("classes", classes, low=1)
    linear = nn.Linear(in_dim, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(in_dim, eps=1e-6, affine=False), linear)
