"""Number and size of the views of an image that a configuration defines."""

from typing import Any

from plugins.patches import Patches, grid_side
from plugins.spec import large_views
from plugins.tools.command import UserError

COLLATORS = ("multicrop_collator", "simclr_collator")
"""Collators whose batches have one view after another."""
_COLOURLESS = {"ToTensor", "Normalize", "RandomHorizontalFlip", "ImgPilGaussianBlur", "StackPatches", "ImgTensorMask"}
"""Transforms that leave the colours of a patch as they are."""


def resolutions(transforms: list[Any]) -> list[tuple[int | None, int]]:
    """Return the resolutions of the views and how many views have each, in the order of the batch.

    Consecutive views of the same size form one entry, because the model passes them through the trunk together.

    Args:
        transforms: DATA.TRAIN.TRANSFORMS. Stacks of patches are not counted.

    Returns:
        Pairs (side in pixels, number of views); the side is None if the transforms do not determine it.
    """
    copies = 1
    for transform in transforms:
        if transform["name"] == "ImgReplicatePil":
            copies *= transform.get("num_times", 2)
        elif transform["name"] == "ImgPilToMultiCrop":
            found: list[tuple[int | None, int]] = []
            for count, size in zip(transform["num_crops"], transform["size_crops"], strict=True):
                if found and found[-1][0] == size:
                    count += found.pop()[1]
                found.append((size, count))
            return [(size, copies * count) for size, count in found]
        elif transform["name"] == "ImgPilToImageAndPatches":
            return [(transform.get("image_size", 224), 1)]
        elif transform["name"] == "ImgPilToPatches":
            return []
    return [(None, copies)]


def stack_count(transforms: list[Any]) -> int:
    """Return the number of stacks of patches of each image.

    Args:
        transforms: DATA.TRAIN.TRANSFORMS.
    """
    return sum(transform["name"] == "StackPatches" for transform in transforms)


def patches_of(transforms: list[Any]) -> Patches | None:
    """Return what a stack consists of, None if the transforms make no stack or do not determine it.

    Args:
        transforms: DATA.TRAIN.TRANSFORMS.

    Raises:
        ValueError: the patches do not fill the crop.
    """
    for transform in transforms:
        if transform["name"] == "ImgPilToImageAndPatches":
            return Patches(1 if transform.get("jigsaw") is None else transform["jigsaw"].get("grid", 3) ** 2)
        if transform["name"] == "ImgPilToPatches":
            side, patch, stride = (transform.get(*pair) for pair in (("side", 256), ("patch", 64), ("stride", 32)))
            return Patches(grid_side(side, patch, stride) ** 2, patch, stride)
    return None


def shares_colours(transforms: list[Any]) -> bool:
    """Return whether all patches of a grid have the colours of the image, changed by no transform.

    Args:
        transforms: DATA.TRAIN.TRANSFORMS.
    """
    names = [transform["name"] for transform in transforms]
    if "ImgPilToPatches" not in names:
        return False
    return all(map(_keeps_colours, transforms[names.index("ImgPilToPatches") + 1 :]))


def _keeps_colours(transform: Any) -> bool:
    """Return whether a transform leaves colours as they are, by its kind, its probability or its strength."""
    if transform["name"] in _COLOURLESS or 0 in (transform.get("p"), transform.get("strength")):
        return True
    if transform["name"] == "ColorJitter":
        return not any(transform.get(name) for name in ("brightness", "contrast", "saturation", "hue"))
    if transform["name"] == "ImgPilMultiCropRandomApply":
        return not any(transform["prob"]) or all(map(_keeps_colours, transform["transforms"]))
    return False


def large_and_small(config: Any) -> tuple[int, int]:
    """Return the numbers of large views and of small crops of each image.

    Args:
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: a small crop precedes a large view.
    """
    sizes = [side or 1 for side, count in resolutions(config.DATA.TRAIN.TRANSFORMS) for _ in range(count)]
    if not sizes:  # the image is cut into patches
        return 0, 0
    try:
        large = large_views(sizes)
    except ValueError as error:
        raise UserError(f"ImgPilToMultiCrop in config.DATA.TRAIN.TRANSFORMS: {error}") from None
    return large, len(sizes) - large


def check_batches(config: Any, *, views: int = 2, stacks: int = 0) -> None:
    """Check the batch size and the collator of a loss that compares views.

    Args:
        config: VISSL's configuration, below ``config``.
        views: number of views of each image, without stacks.
        stacks: number of stacks of patches of each image.

    Raises:
        UserError: the batch has one image, or the collator cannot make a batch of the views.
    """
    # simclr_collator makes one tensor of all views, default_collate takes one view
    collators = COLLATORS[:1] if stacks else COLLATORS if views > 1 else (*COLLATORS, "default_collate")
    name, data = config.LOSS.name, config.DATA.TRAIN
    if data.BATCHSIZE_PER_REPLICA < 2:
        raise UserError(f"config.LOSS.name={name} requires config.DATA.TRAIN.BATCHSIZE_PER_REPLICA of at least 2")
    if data.COLLATE_FUNCTION not in collators:
        raise UserError(
            f"config.LOSS.name={name} requires config.DATA.TRAIN.COLLATE_FUNCTION={' or '.join(collators)}, "
            f"got {data.COLLATE_FUNCTION}"
        )
