"""Change the width of a ResNet's representation.

Dubois, Hashimoto, Ermon & Liang (NeurIPS 2022, arXiv:2209.06235): a linear probe needs at least as many dimensions
as there are classes minus one. The added block has the published state-dict keys.
"""

from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range
from plugins.heads.init import issl_init_


class ExpandDim(nn.Module):
    """Bottleneck block ``[B, c, H, W] → [B, d, H, W]`` between the last stage and the pooling.

    Args:
        in_channels: c.
        hidden_channels: width of the inner 1x1 and 3x3 convolutions.
        out_channels: d. If it is a multiple of c, the block has a shortcut: input channel j mod c is added to output
            channel j. A smaller d has no shortcut.

    Raises:
        ValueError: d is greater than c and not a multiple of it.
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__()
        for name, count in {"in_channels": in_channels, "bottleneck": hidden_channels, "dim": out_channels}.items():
            check_range(name, count, low=1)
        if out_channels > in_channels and out_channels % in_channels:
            raise ValueError(f"dim must be a multiple of the backbone's {in_channels} or below it, got {out_channels}")
        self.residual = out_channels % in_channels == 0
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden_channels)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden_channels)
        self.conv3 = nn.Conv2d(hidden_channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        issl_init_(self)
        nn.init.normal_(self.conv1.weight, std=hidden_channels**-0.5)  # a random projection

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B d H W"]:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out = (out.unflatten(1, (-1, x.shape[1])) + x.unsqueeze(1)).flatten(1, 2)
        return self.relu(out)


def expand_resnet_dim(resnet: nn.Module, dim: int, *, bottleneck: int | None = 512) -> nn.Module:
    """Set the width of a ResNet's representation to ``dim``, in place.

    ``avgpool`` becomes the sequence of the new block and the former pooling, and ``fc`` becomes the identity, so that
    the model returns representations. If ``dim`` is already the width of the ResNet, only ``fc`` changes.

    Args:
        resnet: a torchvision ResNet, or a model with the attributes ``layer4``, ``avgpool`` and ``fc``. Its attributes
            ``inplanes`` and ``num_features``, if present, are updated.
        dim: d, a multiple of the ResNet's width, or less than it.
        bottleneck: width of the inner convolutions of the block. None builds a block of one 1x1 convolution, BatchNorm
            and ReLU, which allows any d.

    Returns:
        The same ResNet.

    Raises:
        ValueError: the model is not such a ResNet, has already been expanded, or d is neither a multiple of its width
            nor below it.
    """
    if not all(hasattr(resnet, name) for name in ("layer4", "avgpool", "fc")):
        kind = f"{type(resnet).__module__}.{type(resnet).__qualname__}"
        raise ValueError(f"resnet must be a torchvision ResNet, or have its layer4, avgpool and fc, got a {kind}")
    check_range("dim", dim, low=1)
    if isinstance(resnet.avgpool, nn.Sequential):
        raise ValueError("the width of the ResNet has already been changed; pass a new ResNet")
    # the last convolution of a block gives the width of its output; those of the shortcut are in a submodule
    *_, last = resnet.layer4.children()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    own = [part for part in last.children() if isinstance(part, nn.Conv2d)]
    width = own[-1].out_channels
    resnet.fc = nn.Identity()
    if dim == width:
        return resnet
    if bottleneck is None:
        conv = nn.Conv2d(width, dim, 1, bias=False)
        block = issl_init_(nn.Sequential(conv, nn.BatchNorm2d(dim), nn.ReLU(inplace=True)))
    else:
        block = ExpandDim(width, bottleneck, dim)
    resnet.avgpool = nn.Sequential(block, resnet.avgpool)  # pyright: ignore[reportArgumentType]
    for name in ("inplanes", "num_features"):
        if isinstance(getattr(resnet, name, None), int):
            setattr(resnet, name, dim)
    return resnet
