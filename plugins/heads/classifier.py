"""The classifier of the published linear evaluations of MoCo, SimSiam, MEC and Matrix-SSL."""

from torch import nn

from plugins.checks import check_range


def normalized_classifier(in_dim: int, classes: int) -> nn.Sequential:
    """Build BatchNorm without scale and shift (ε = 1e-6) and a Linear layer: ``[B, in_dim] → [B, classes]``.

    The norm removes the scale of the frozen features, so that one learning rate suits every backbone. The weights are
    initialised from ``N(0, 0.01^2)``, the biases with 0.

    Args:
        in_dim: width of the features, ≥ 1.
        classes: number of classes, ≥ 1.

    Raises:
        ValueError: an argument is below 1.

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
