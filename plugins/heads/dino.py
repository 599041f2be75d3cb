"""The head of DINO (Caron et al. 2021, arXiv:2104.14294, appendix C)."""

from collections import OrderedDict

from torch import nn

from plugins.checks import check_range
from plugins.heads.dissl import UnitLinear, UnitRows
from plugins.heads.mlp import plain_head


def dino_head(in_dim: int, hidden_dim: int, bottleneck: int, out_dim: int, *, norm: bool = False) -> nn.Sequential:
    """Build DINO's head: an MLP of three layers with GELU, unit rows, and a Linear layer with unit weight rows.

    The last layer is weight-normalised with the gain 1. It is the submodule ``last_layer``, which DINO freezes at
    first. Its input and its weights have unit rows, so that the logits are cosines.

    Args:
        in_dim: width of the backbone's features.
        hidden_dim: width of the two hidden layers; 2048.
        bottleneck: width of the unit rows; 256.
        out_dim: number of prototypes, the width of the logits; 65536 for ImageNet.
        norm: whether a BatchNorm follows each hidden layer; the authors' option for convolutional networks.

    Raises:
        ValueError: a width is below 1.

    >>> [name for name, _ in dino_head(8, 4, 3, 10).named_children()]
    ['mlp', 'unit', 'last_layer']
    """
    check_range("out_dim", out_dim, low=1)
    mlp = dino_mlp(in_dim, hidden_dim, bottleneck, norm=norm)
    last = UnitLinear(bottleneck, out_dim, bias=False)
    return nn.Sequential(OrderedDict(mlp=mlp, unit=UnitRows(), last_layer=last))


def dino_mlp(in_dim: int, hidden_dim: int, out_dim: int, *, norm: bool = False) -> nn.Sequential:
    """Build the MLP of DINO's head: three layers with GELU, truncated normal weights (0.02), biases 0.

    Args:
        in_dim: width of the backbone's features.
        hidden_dim: width of the two hidden layers; 2048.
        out_dim: width of the rows; 256.
        norm: whether a BatchNorm follows each hidden layer.

    Raises:
        ValueError: a width is below 1.

    >>> [type(module).__name__ for module in dino_mlp(8, 4, 3)]
    ['Linear', 'GELU', 'Linear', 'GELU', 'Linear']
    """
    mlp = plain_head(in_dim, hidden_dim, out_dim, layers=3, activation=nn.GELU, norm=norm)
    for module in mlp:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return mlp
