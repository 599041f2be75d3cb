"""Removal of the background of images with a folder of masks, :mod:`plugins.tools.masks`, as a transform of VISSL.

``ImgPilRemoveBackground`` changes each image of the list. It is placed between ImgReplicatePil and the random crop. For
large and small crops, ``ImgPilToMultiCrop`` has the option ``background``, which applies to its first, large size.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from classy_vision.dataset.transforms import TRANSFORM_REGISTRY, register_transform
from classy_vision.dataset.transforms.classy_transform import ClassyTransform
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms import Compose
from vissl.data.ssl_transforms.img_pil_to_multicrop import ImgPilToMultiCrop

from plugins.tools.command import UserError
from plugins.tools.images import path_of
from plugins.tools.masks import DEFAULT_PROB, RemoveBackground
from vissl_ext.compat.safe_files import load_file

_NAME = "ImgPilRemoveBackground"
_SOURCES = ("disk_folder", "disk_filelist")


@register_transform(_NAME)
class ImgPilRemoveBackground(ClassyTransform):
    """Replace the background of an image by one grey level, with some probability.

    An image without a path is not changed: VISSL replaces an image that cannot be read by a grey one.

    Args:
        masks: folder of masks.
        images: folder of images; the launcher sets it to the folder in DATA_PATHS.
        prob: probability of the replacement, in [0, 1].
        fill: "random", "gray" or "black".
    """

    def __init__(self, masks: str, images: str, prob: float = DEFAULT_PROB, fill: str = "random") -> None:
        self.remove = RemoveBackground(Path(masks).expanduser(), Path(images).expanduser(), prob=prob, fill=fill)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ImgPilRemoveBackground":
        """Create the transform from an entry of TRANSFORMS."""
        return cls(**{key: config[key] for key in inspect.signature(cls).parameters if key in config})

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image, or a copy with another background."""
        return image if path_of(image) is None else self.remove(image)


class MaskedMultiCrop(ImgPilToMultiCrop):
    """VISSL's ImgPilToMultiCrop with ``background``.

    Args:
        total_num_crops: number of crops.
        num_crops: number of crops of each size.
        size_crops: side of the crops in pixels.
        crop_scales: smallest and largest share of the image's area.
        background: arguments of :class:`ImgPilRemoveBackground`, which is applied before each crop of the first size.
    """

    def __init__(
        self,
        total_num_crops: int,
        num_crops: Sequence[int],
        size_crops: Sequence[int],
        crop_scales: Sequence[Sequence[float]],
        background: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(total_num_crops, num_crops, size_crops, crop_scales)
        if background is not None:
            remove = ImgPilRemoveBackground(**background)
            sizes = [size for size, count in zip(size_crops, num_crops, strict=True) for _ in range(count)]
            self.transforms = [
                Compose([remove, crop]) if size == sizes[0] else crop
                for size, crop in zip(sizes, self.transforms, strict=True)
            ]


def replace_multi_crop() -> None:
    """Register MaskedMultiCrop in place of VISSL's transform."""
    TRANSFORM_REGISTRY["ImgPilToMultiCrop"] = MaskedMultiCrop


def complete_masks(config: Any) -> None:
    """Set ``images`` of each removal of the background to the folder of training images, if there is exactly one.

    Args:
        config: VISSL's configuration, below ``config``; changed in place. DATA_PATHS are those that the user gave.
    """
    paths = config.DATA.TRAIN.DATA_PATHS
    for entry in _entries(config.DATA.TRAIN):
        if entry.get("images") is None and OmegaConf.is_list(paths) and len(paths) == 1:
            folder = Path(str(paths[0])).expanduser().absolute()
            if folder.is_dir():
                OmegaConf.update(entry, "images", str(folder), force_add=True)


def check_masks(config: Any, lists: Mapping[str, list[str]]) -> None:
    """Check that each training image has a mask.

    Args:
        config: VISSL's configuration, below ``config``, after :func:`complete_masks`.
        lists: path of each list that is not yet written → its images.

    Raises:
        UserError: the training images are not files, their folder is unknown, or masks are missing; the message has the
            number of these and the first image without one.
    """
    data = config.DATA.TRAIN
    for entry in _entries(data):
        if any(source not in _SOURCES for source in data.DATA_SOURCES):
            raise UserError(
                f"{_NAME} needs image files, because a mask has the name of its image, got "
                f"config.DATA.TRAIN.DATA_SOURCES={list(data.DATA_SOURCES)}; set config.DATA.TRAIN.DATA_PATHS=[FOLDER]"
            )
        if entry.get("images") is None:
            raise UserError(
                f"{_NAME} needs the option images, the folder with all images, unless config.DATA.TRAIN.DATA_PATHS is "
                f"one folder, got {list(data.DATA_PATHS)}"
            )
        remove = ImgPilRemoveBackground(entry.masks, entry.images).remove
        written = [path for path in data.DATA_PATHS if path not in lists and str(path).endswith(".npy")]
        if len(data.DATA_PATHS) == len(lists) + len(written) > 0:  # else at least one whole folder
            remove.check([*chain(*lists.values()), *chain(*(load_file(path, "r").tolist() for path in written))])
        else:
            remove.check()


def _entries(data: Any) -> Iterator[Any]:
    """Yield the options of each removal of the background in DATA.TRAIN.TRANSFORMS."""
    for entry in data.TRANSFORMS if OmegaConf.is_list(data.TRANSFORMS) else ():
        if OmegaConf.is_dict(entry):
            found = entry if entry.get("name") == _NAME else entry.get("background")
            if OmegaConf.is_dict(found) and "masks" in found:
                yield found
