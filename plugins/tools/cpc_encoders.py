"""The encoders of CPC's papers and of its CIFAR code: pre-activation ResNets without batch norm, untrained.

None of them compares the images of a batch: they have no normalisation, or normalise each image by itself
(GroupNorm with one group).
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from plugins.checks import check_choice

Norm = Callable[[int], nn.Module]


def _identity(width: int) -> nn.Module:
    return nn.Identity()


def _per_sample(width: int) -> nn.Module:
    return nn.GroupNorm(1, width)


class _Block(nn.Module):
    """Pre-activation residual block: two 3×3 convolutions, or with ``inner`` a bottleneck of that width."""

    def __init__(self, width: int, out: int, inner: int | None, stride: int, norm: Norm) -> None:
        super().__init__()
        plan = [(width, out, 3, stride), (out, out, 3, 1)]
        if inner is not None:
            plan = [(width, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
        self.norms = nn.ModuleList(norm(entry[0]) for entry in plan)
        # without normalisation the convolutions have biases
        bias = norm is _identity
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2, bias=bias) for a, b, k, s in plan)
        self.shortcut = nn.Conv2d(width, out, 1, stride, bias=bias) if (width, stride) != (out, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.norms[0](x).relu()
        branch = self.convs[0](active)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            branch = conv(norm(branch).relu())
        return branch + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet(nn.Module):
    """A stem, stacks of pre-activation blocks, normalisation, ReLU, the mean over space, and a classifier ``fc``.

    Args:
        stem: ``[B, 3, H, W]`` → maps of ``width`` channels.
        width: channels of the stem's maps.
        stacks: (number of blocks, channels, inner channels of a bottleneck or None, stride) of each stack.
        norm: width → normalisation.
        num_classes: width of the classifier, which the adapters remove.

    Attributes:
        inplanes: width of the features.
    """

    def __init__(
        self,
        stem: nn.Module,
        width: int,
        stacks: Sequence[tuple[int, int, int | None, int]],
        norm: Norm,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = stem
        for place, (count, out, inner, stride) in enumerate(stacks, 1):
            blocks = [_Block(width, out, inner, stride, norm)]
            blocks += [_Block(out, out, inner, 1, norm) for _ in range(count - 1)]
            self.add_module(f"layer{place}", nn.Sequential(*blocks))
            width = out
        self.norm, self.inplanes, self.depth = norm(width), width, len(stacks)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` to features ``[B, inplanes]``, and those to classes."""
        maps = self.stem(images)
        for place in range(1, self.depth + 1):
            maps = self.get_submodule(f"layer{place}")(maps)
        return self.fc(self.norm(maps).relu().mean((2, 3)))


def _wrn_28_2(num_classes: int) -> PreActResNet:
    stacks = [(4, 32, None, 1), (4, 64, None, 2), (4, 128, None, 2)]
    return PreActResNet(nn.Conv2d(3, 16, 3, padding=1, bias=False), 16, stacks, _per_sample, num_classes)


def _stacks_of_resnet(blocks: int, width: int, inner: int, norm: Norm, num_classes: int) -> PreActResNet:
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=norm is _identity), nn.MaxPool2d(3, 2, 1))
    stacks = [(3, 256, 64, 1), (4, 512, 128, 2), (blocks, width, inner, 2)]
    network = PreActResNet(stem, 64, stacks, norm, num_classes)
    if norm is _identity:  # 30 residual sums without normalisation: each block starts as its shortcut
        for module in network.modules():
            if isinstance(module, _Block):
                last = module.convs[-1]
                assert isinstance(last, nn.Conv2d)
                nn.init.zeros_(last.weight)
    return network


ENCODERS: dict[str, Callable[[int], PreActResNet]] = {
    "wrn_28_2_gn": _wrn_28_2,
    "resnet101_v2_stacks": partial(_stacks_of_resnet, 23, 1024, 256, _identity),
    "resnet161_v2_stacks": partial(_stacks_of_resnet, 46, 4096, 512, _per_sample),
}
"""Name → function that builds the encoder."""


def cpc_encoder(name: str, *, weights: None = None, num_classes: int = 1000) -> PreActResNet:
    """Build an encoder of CPC.

    Args:
        name: ``wrn_28_2_gn`` is WRN-28-2 with 128 features, for CIFAR; ``resnet101_v2_stacks`` the first three stacks
            of a ResNet-101 v2 without normalisation, 1024 features, of CPC v1; ``resnet161_v2_stacks`` has 46 blocks of
            4096 channels in the third stack, and layer normalisation, of CPC v2.
        weights: None; there are no published weights.
        num_classes: width of the classifier ``fc``.

    Raises:
        ValueError: the name is unknown, or ``weights`` is not None.

    Reference:
        He et al. 2016, arXiv:1603.05027; Zagoruyko & Komodakis 2016, arXiv:1605.07146; arXiv:1807.03748, section 3.2;
        arXiv:1905.09272, section 3.

    >>> cpc_encoder("wrn_28_2_gn").inplanes
    128
    """
    check_choice("name", name, tuple(ENCODERS))
    if weights is not None:
        raise ValueError(f"{name} has no published weights, got weights={weights!r}; leave weights out")
    return ENCODERS[name](num_classes)
