"""Grids of patches: their size, and the patches of a batch of images."""

from torch import Tensor

from plugins.checks import check_whole

EVAL_INPUTS = ("image", "patches")
"""What a method that is trained on patches sees in evaluation."""


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
