"""``python -m``: the command that TINY_PROGRAM names, with a tiny network; for tests that start many runs."""

import os
from typing import Any

from torch import nn

from solo_ext import main_linear, main_pretrain
from solo_ext.architectures import ARCHITECTURES


def _tiny(method: str, **kwargs: Any) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    network.num_features = 32
    return network


ARCHITECTURES["tiny"] = _tiny

if __name__ == "__main__":
    main = {"pretrain": main_pretrain.main, "linear": main_linear.main}[os.environ["TINY_PROGRAM"]]
    main()
