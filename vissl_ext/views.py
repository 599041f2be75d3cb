"""The views that the training transforms make of an image, as a configuration says."""

from typing import Any

from plugins.spec import large_views
from plugins.tools.command import UserError

COLLATORS = ("multicrop_collator", "simclr_collator")
"""Those that hand the model the views one after another."""


def resolutions(transforms: list[Any]) -> list[tuple[int | None, int]]:
    """Side in pixels and number of the views, in the order in which the model gets them.

    Neighbours of one size are one entry, as the model passes them through the trunk at once. The side is None where the
    transforms that make the views do not say it.

    Args:
        transforms: DATA.TRAIN.TRANSFORMS.
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
    return [(None, copies)]


def large_and_small(config: Any) -> tuple[int, int]:
    """How many large views and how many small crops a method of ours gets of an image.

    Args:
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: small crops come before large views.
    """
    sizes = [side or 1 for side, count in resolutions(config.DATA.TRAIN.TRANSFORMS) for _ in range(count)]
    try:
        large = large_views(sizes)
    except ValueError as error:
        raise UserError(f"ImgPilToMultiCrop in config.DATA.TRAIN.TRANSFORMS: {error}") from None
    return large, len(sizes) - large


def check_batches(config: Any) -> None:
    """Refuse batches that no loss on several views can be computed from.

    Args:
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: a batch of one image, or a collator that does not hand over the views one after another.
    """
    name, data = config.LOSS.name, config.DATA.TRAIN
    if data.BATCHSIZE_PER_REPLICA < 2:
        raise UserError(f"config.LOSS.name={name} needs config.DATA.TRAIN.BATCHSIZE_PER_REPLICA of at least 2")
    if data.COLLATE_FUNCTION not in COLLATORS:
        raise UserError(
            f"config.LOSS.name={name} needs config.DATA.TRAIN.COLLATE_FUNCTION={' or '.join(COLLATORS)}, "
            f"got {data.COLLATE_FUNCTION}"
        )
