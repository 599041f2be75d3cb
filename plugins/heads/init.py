"""Weight initialisations of the published DISSL and CISSL code (arXiv:2209.06235)."""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def issl_init_(module: nn.Module) -> nn.Module:
    """Initialise a module in place as the TinyImageNet code does: normal weights truncated at ±2, and zero biases.

    The standard deviation is 0.02 for Linear layers and ``sqrt(1 / fan_in) / 0.8796`` for convolutions. Batch norms are
    set to the identity.

    Returns:
        The module.

    >>> issl_init_(nn.Linear(3, 2)).bias.tolist()
    [0.0, 0.0]
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | _ConvNd):
            fan_in = part.weight[0].numel()
            std = 0.02 if isinstance(part, nn.Linear) else math.sqrt(1 / fan_in) / 0.87962566103423978
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, _BatchNorm) and part.affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    return module


def projection_init_(module: nn.Module) -> nn.Module:
    """Initialise every Linear layer with fewer outputs than inputs as a random projection, in place.

    The weights are drawn from ``N(0, 1 / out)`` (Johnson & Lindenstrauss).

    Returns:
        The module.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear) and part.out_features < part.in_features:
            nn.init.normal_(part.weight, std=part.out_features**-0.5)
    return module
