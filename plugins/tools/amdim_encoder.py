"""AMDIM's encoder: a residual network without padding, whose maps see disjoint parts of an image as far as possible."""

import torch.nn.functional as F
from torch import Tensor, nn

from plugins.checks import check_whole

SIZES = (32, 64, 128)
"""Sides of the images, in pixels."""
FINE, COARSE = "map7", "map5"
"""Names of the modules whose outputs are the maps of 7 x 7 and of 5 x 5 locations."""


class Residual(nn.Module):
    """``W₂ relu(W₁ * x) + pooled(x)``: a convolution, and the mean over its window with zeros in further channels.

    W₂ is a 1×1 convolution and 0 at first. Nothing is padded or normalised, and there are no biases.

    Args:
        inner: channels of the input.
        outer: channels of the output, at least ``inner``.
        kernel: side of the window.
        stride: of the window.
    """

    def __init__(self, inner: int, outer: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride, self.further = kernel, stride, outer - inner
        self.conv1 = nn.Conv2d(inner, outer, kernel, stride, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, inner, H, W]`` to ``[B, outer, (H − kernel) / stride + 1, …]``."""
        pooled = x if self.kernel == self.stride == 1 else F.avg_pool2d(x, self.kernel, self.stride)
        return self.conv2(F.relu(self.conv1(x))) + F.pad(pooled, (0, 0, 0, 0, 0, self.further))


class AMDIMEncoder(nn.Sequential):
    """The network of the published code, with one size of images: ``[B, 3, S, S] → [B, n_rkhs]``.

    The modules ``map7`` and ``map5`` have maps of 7 x 7 and 5 x 5 locations, for the options ``fine_map`` and
    ``coarse_map`` of AMDIM. Their receptive fields, and that of the features, are 8, 16 and 32 pixels for S = 32, 16,
    32 and 64 for S = 64, and 35, 67 and 128 for S = 128. The features are normalised with BatchNorm.

    Args:
        size: side S of the images: 32, 64 or 128.
        ndf: channels of the first convolution. The maps have 4 ndf channels for S = 32, otherwise 8 ndf.
        n_rkhs: width of the features, at least the channels of the maps.
        n_depth: number of blocks of each stage.

    Attributes:
        num_features: ``n_rkhs``.

    Raises:
        ValueError: an argument is out of range; in a call, the images have another size.

    Reference:
        Bachman, Hjelm & Buchwalter 2019, arXiv:1906.00910, table 3, and the published code.

    >>> import torch
    >>> encoder = AMDIMEncoder(32, ndf=4, n_rkhs=16, n_depth=1)
    >>> encoder(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 16])
    """

    def __init__(self, size: int = 32, *, ndf: int = 128, n_rkhs: int = 1024, n_depth: int = 3) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(map(str, SIZES))}, got {size!r}")
        for name, value in {"ndf": ndf, "n_depth": n_depth}.items():
            check_whole(name, value, low=1)
        check_whole("n_rkhs", n_rkhs, low=(4 if size == 32 else 8) * ndf)
        self.size, self.num_features = size, n_rkhs

        def stage(inner: int, outer: int, kernel: int, stride: int = 1) -> nn.Sequential:
            first = Residual(inner * ndf, outer * ndf, kernel, stride)
            return nn.Sequential(first, *(Residual(outer * ndf, outer * ndf) for _ in range(n_depth - 1)))

        if size == 32:
            modules = {"conv": _convolution(3, ndf, 3), "block": Residual(ndf, ndf), "stage1": stage(1, 2, 4, 2)}
            wide = 4
            modules |= {FINE: stage(2, 4, 2, 2)}
        else:
            first = {"stem": _convolution(3, ndf, 5, stride=2, padding=2)} if size == 128 else {}
            modules = {**first, "conv": _convolution(ndf if first else 3, ndf, 3)}
            wide = 8
            modules |= {"stage1": stage(1, 2, 4, 2), "stage2": stage(2, 4, 4, 2), FINE: stage(4, 8, 2, 2)}
        modules |= {COARSE: stage(wide, wide, 3), "stage3": stage(wide, wide, 3)}
        modules |= {"last": Residual(wide * ndf, n_rkhs, 3), "norm": nn.BatchNorm2d(n_rkhs), "flatten": nn.Flatten()}
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"this encoder takes images of {self.size} x {self.size} pixels, got {tuple(images.shape)}; "
                f"the argument size is one of {', '.join(map(str, SIZES))}"
            )
        return super().forward(images)


def _convolution(inner: int, outer: int, kernel: int, *, stride: int = 1, padding: int = 0) -> nn.Sequential:
    convolution = nn.Conv2d(inner, outer, kernel, stride, padding, padding_mode="reflect" if padding else "zeros")
    return nn.Sequential(convolution, nn.ReLU())
