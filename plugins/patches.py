"""Patches of images: what a stack of them consists of, the size of a grid, and the patches of a batch of images."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from plugins.checks import check_whole

EVAL_INPUTS = ("image", "patches")
"""What a method that is trained on patches sees in evaluation."""


class Patches(NamedTuple):
    """What a stack of patches consists of."""

    count: int
    """Number of patches."""
    side: int | None = None
    """Side of a patch in pixels; None if it does not matter."""
    stride: int | None = None
    """Distance of neighbouring patches in pixels; None if it does not matter."""

    def __str__(self) -> str:
        side = "" if self.side is None else f" of {self.side} pixels"
        return f"{self.count} patches{side}" + ("" if self.stride is None else f" at a distance of {self.stride}")

    def fits(self, other: "Patches") -> bool:
        """Return whether the values that both know are equal."""
        return all(a == b for a, b in zip(self, other, strict=True) if None not in (a, b))


def grid_side(side: int, patch: int, stride: int) -> int:
    """Return the number of patches along a side, G = (side − patch) / stride + 1.

    Args:
        side: of the image, in pixels.
        patch: side of a patch, in pixels.
        stride: distance of neighbouring patches, in pixels.

    Raises:
        ValueError: an argument is below 1, the image is smaller than a patch, or a rest of pixels remains.

    >>> grid_side(256, 64, 32), grid_side(260, 80, 36), grid_side(30, 10, 5)
    (7, 6, 5)
    """
    for name, value in {"side": side, "patch": patch, "stride": stride}.items():
        check_whole(name, value, low=1)
    if side < patch or (side - patch) % stride:
        nearest = patch + round(max(side - patch, 0) / stride) * stride
        raise ValueError(
            f"patches of {patch} pixels at a distance of {stride} do not fill an image of {side} pixels: "
            f"side - patch must be a multiple of the distance; side {nearest} is possible"
        )
    return (side - patch) // stride + 1


def patch_stack(images: Tensor, patch: int, stride: int) -> Tensor:
    """Cut images into patches, row by row. Patches that do not reach the border leave out the same width on all sides.

    Args:
        images: ``[B, 3, H, W]``.
        patch: side of a patch, in pixels.
        stride: distance of neighbouring patches, in pixels.

    Returns:
        ``[B, P, 3, patch, patch]``.

    Raises:
        ValueError: the images are smaller than a patch, or a number is below 1.

    >>> import torch
    >>> stack = patch_stack(torch.arange(16.0).view(1, 1, 4, 4), 2, 2)
    >>> stack.shape, stack[0, 1, 0]
    (torch.Size([1, 4, 1, 2, 2]), tensor([[2., 3.],
            [6., 7.]]))
    """
    for name, value in {"patch": patch, "stride": stride}.items():
        check_whole(name, value, low=1)
    height, width = images.shape[-2:]
    if min(height, width) < patch:
        raise ValueError(f"images of {height} x {width} pixels are smaller than a patch of {patch} pixels")
    top, left = (height - patch) % stride // 2, (width - patch) % stride // 2
    rows = images[..., top:, left:].unfold(2, patch, stride).unfold(3, patch, stride)  # [B, 3, G, G', patch, patch]
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def see_patches_(backbone: nn.Module, patch: int, stride: int) -> nn.Module:
    """Let a backbone map an image to the mean features of its patches, for evaluation. Its names do not change.

    Args:
        backbone: images ``[B, 3, H, W]`` → features with B rows, or a list of such; hooks are added in place.
        patch: side of a patch, in pixels.
        stride: distance of neighbouring patches, in pixels.

    Returns:
        The backbone.

    >>> see_patches_(nn.Flatten(), 2, 1)(Tensor([[[[1, 2, 3], [1, 2, 3]]]]))  # the mean of two patches
    tensor([[1.5000, 2.5000, 1.5000, 2.5000]])
    """
    counts: list[int] = []

    def cut(_module: nn.Module, given: Any) -> tuple[Tensor, ...]:
        stack = patch_stack(given[0], patch, stride)
        counts.append(stack.shape[1])
        return (stack.flatten(0, 1), *given[1:])

    def mean(_module: nn.Module, _given: Any, output: Any) -> Any:
        count = counts.pop()
        if isinstance(output, Tensor):
            return output.unflatten(0, (-1, count)).mean(1)
        return [each.unflatten(0, (-1, count)).mean(1) for each in output]

    backbone.register_forward_pre_hook(cut)
    backbone.register_forward_hook(mean)
    return backbone
