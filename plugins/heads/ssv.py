"""Heads of the repository Self-Supervised-Vision, where they differ from those of the papers.

The repository trains on CIFAR with ResNets. Its hidden layers are as wide as the features of the backbone, its Linear
layers have biases, also before a BatchNorm, and all weights have torch's default initialisation. Its other heads are
those of the methods: BYOL, ReLIC, MoCo, PIRL and SeLa need only their widths.
"""

from collections import OrderedDict

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from plugins.heads.dissl import UnitRows
from plugins.heads.mlp import mlp_head, plain_head

HEADS = ("paper", "ssv")
"""Values of the option ``head``: the head of the paper, or that of Self-Supervised-Vision."""


def ssv_simclr_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Build SimCLR's head: Linear, BN, ReLU, Linear, BN. Each view has its own batch statistics.

    >>> [type(module).__name__ for module in ssv_simclr_head(512, 512, 128)]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear', 'BatchNorm1d']
    """
    return mlp_head(in_dim, hidden_dim, out_dim, final_norm="affine")


def ssv_barlow_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Build the head of Barlow Twins: three Linear layers with BN and ReLU between them, and rows of one length.

    The length is the square root of ``out_dim``, in place of 1. The loss standardises the columns, so that a common
    factor of all rows does not matter, but the constant that keeps its division finite should be small beside them.
    """
    return nn.Sequential(
        *mlp_head(in_dim, hidden_dim, out_dim, layers=3), nn.RMSNorm(out_dim, elementwise_affine=False)
    )


def ssv_swav_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Build SwAV's head: Linear, BN, GELU, Linear, BN, and rows of unit length."""
    layers = plain_head(in_dim, hidden_dim, out_dim, activation=nn.GELU, norm=True)
    return nn.Sequential(*layers, nn.BatchNorm1d(out_dim), UnitRows())


def ssv_simsiam_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Build SimSiam's head: three Linear layers, each with a BN that has scale and shift, and two ReLUs."""
    return mlp_head(in_dim, hidden_dim, out_dim, layers=3, final_norm="affine")


def ssv_dino_head(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Build DINO's head: three Linear layers with GELU, unit rows, and a weight-normalised layer ``last_layer``.

    The gain of the last layer is trained, and it has a bias.

    >>> [name for name, _ in ssv_dino_head(8, 4, 10).named_children()]
    ['mlp', 'unit', 'last_layer']
    """
    mlp = plain_head(in_dim, hidden_dim, hidden_dim, layers=3, activation=nn.GELU)
    last = weight_norm(nn.Linear(hidden_dim, out_dim))
    return nn.Sequential(OrderedDict(mlp=mlp, unit=UnitRows(), last_layer=last))


def ssv_deepcluster_head(in_dim: int, classes: int) -> nn.Sequential:
    """Build the classifier of DeepCluster: features of unit length, and a Linear layer."""
    return nn.Sequential(UnitRows(), nn.Linear(in_dim, classes))
