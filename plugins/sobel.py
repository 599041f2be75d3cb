"""A fixed Sobel filter before the first convolution of a backbone, so that it sees edges and no colours.

The input of DeepCluster's networks (Caron, Bojanowski, Joulin & Douze, ECCV 2018, arXiv:1807.05520, section 4.1), which
would cluster images by their colours otherwise.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BUFFER = "sobel"
"""Name of the filter in the state dict of the convolution, by which a backbone with the filter is recognised."""


class SobelConv2d(nn.Conv2d):
    """A convolution of the two derivatives of the grey image, ``conv(sobel(mean over channels of x))``.

    The derivatives are those of the Sobel operator, along the rows and along the columns, with a border of zeros. The
    output has the size of that of the convolution which it replaces.

    Args:
        conv: the convolution to replace, with three input channels. The new one has two, with the weights of its first
            two; stride, padding, bias and dtype are the same.

    Buffers:
        sobel: ``[2, 1, 3, 3]``, the filter.

    Raises:
        ValueError: the convolution has another number of input channels.

    >>> conv = SobelConv2d(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    >>> conv.weight.shape, conv(torch.ones(1, 3, 4, 4)).shape
    (torch.Size([8, 2, 3, 3]), torch.Size([1, 8, 4, 4]))
    """

    sobel: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        if conv.in_channels != 3 or conv.groups != 1:
            raise ValueError(
                "a Sobel filter takes the place of colours: the first convolution of the backbone must have 3 input "
                f"channels and 1 group, got {conv}; set sobel=False"
            )
        size, stride, padding = conv.kernel_size, conv.stride, conv.padding
        with torch.device("meta"):  # draws no random numbers
            super().__init__(2, conv.out_channels, size, stride, padding, conv.dilation, 1, False, conv.padding_mode)  # pyright: ignore[reportArgumentType]
        self.weight = nn.Parameter(conv.weight.detach()[:, :2].clone(), requires_grad=conv.weight.requires_grad)
        self.bias = conv.bias
        rows = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer(BUFFER, torch.stack([rows, rows.T])[:, None].to(conv.weight))
        self.train(conv.training)

    def forward(self, input: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Convolve the derivatives of images."""
        return super().forward(F.conv2d(input.mean(1, keepdim=True), self.sobel.to(input.dtype), padding=1))


def sobel_(backbone: nn.Module) -> nn.Module:
    """Put the filter before the first convolution of a backbone, in place.

    The names in the state dict stay; the first weight has two input channels, and ``sobel`` is added beside it.

    Args:
        backbone: images ``[B, 3, H, W]`` → features. Its first convolution is the first one in the order of
            ``modules()``, and must have three input channels.

    Returns:
        The backbone. One that has the filter is unchanged.

    Raises:
        ValueError: there is no convolution in the backbone, or the first one does not take three channels.

    >>> network = sobel_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    >>> sorted(network.state_dict())
    ['0.bias', '0.sobel', '0.weight', '2.bias', '2.weight']
    """
    name, conv = next(((n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if not name or conv is None:
        raise ValueError("a Sobel filter needs a backbone that begins with a convolution, got none; set sobel=False")
    if not isinstance(conv, SobelConv2d):
        parent, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(parent), last, SobelConv2d(conv))
    return backbone


def restore_sobel_(backbone: nn.Module, names: Iterable[str]) -> nn.Module:
    """Put the filter before the first convolution, in place, if the weights to be loaded are those of such a backbone.

    Args:
        backbone: as of :func:`sobel_`.
        names: names of the weights.

    Returns:
        The backbone.
    """
    return sobel_(backbone) if any(name.rpartition(".")[2] == BUFFER for name in names) else backbone
