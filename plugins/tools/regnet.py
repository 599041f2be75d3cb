"""RegNetY: torchvision's network, from 400MF to the 256GF of SEER, which torchvision does not have."""

from typing import Any

import torch
from torchvision.models.regnet import BlockParams, RegNet

BLOCKS: dict[str, tuple[int, int, float, float, int]] = {
    "regnet_y_400mf": (16, 48, 27.89, 2.09, 8),
    "regnet_y_800mf": (14, 56, 38.84, 2.4, 16),
    "regnet_y_1_6gf": (27, 48, 20.71, 2.65, 24),
    "regnet_y_3_2gf": (21, 80, 42.63, 2.66, 24),
    "regnet_y_8gf": (17, 192, 76.82, 2.19, 56),
    "regnet_y_16gf": (18, 200, 106.23, 2.48, 112),
    "regnet_y_32gf": (20, 232, 115.89, 2.53, 232),
    "regnet_y_128gf": (27, 456, 160.83, 2.52, 264),
    "regnet_y_256gf": (27, 640, 230.83, 2.53, 373),
}
"""{name: (depth, w₀, wₐ, wₘ, group width)}, from Radosavovic et al. 2020, arXiv:2003.13678, and Goyal et al. 2021,
arXiv:2103.01988."""


def regnet_y(name: str, *, weights: None = None, **options: Any) -> RegNet:
    """Build an untrained RegNetY.

    Args:
        name: a key of BLOCKS.
        weights: None; torchvision's own functions load published weights.
        options: arguments of torchvision's ``RegNet``, such as ``num_classes``.

    Returns:
        The network, with the classifier ``fc``.

    Raises:
        ValueError: ``weights`` is not None.

    >>> regnet_y("regnet_y_400mf").fc.in_features
    440
    """
    if weights is not None:
        raise ValueError(f"{name} is built without weights, got weights={weights!r}; leave weights out")
    depth, w_0, w_a, w_m, group_width = BLOCKS[name]
    with torch.device("cpu"):  # the widths are computed with tensors, which have no values on the device "meta"
        blocks = BlockParams.from_init_params(depth, w_0, w_a, w_m, group_width, se_ratio=0.25)
    return RegNet(blocks, **options)


def small_stem_(network: RegNet) -> RegNet:
    """Set the stride of the stem to 1, in place, for images of about 32 pixels.

    The four stages of an image of 32 pixels then have 16, 8, 4 and 2 pixels a side instead of 8, 4, 2 and 1.

    Returns:
        The network.
    """
    stem: Any = network.stem
    stem[0].stride = (1, 1)
    return network
