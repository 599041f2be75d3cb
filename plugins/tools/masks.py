"""Remove the background of images with a folder of masks, as ReLICv2 does (Tomasev et al. 2022, arXiv:2201.05119).

The mask of an image has the same path below the folder of masks as the image below the folder of images, and the same
name, or the same name with the suffix .png or that of another image format. A pixel is background where the mask is
black or transparent. In JPEG and WebP files, whose black is not exact, it is background below half of white.

The transform changes the whole image and precedes the random crop, so that no other step needs the mask.
"""

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from plugins.checks import check_choice, check_range
from plugins.tools.command import UserError
from plugins.tools.folders import walk
from plugins.tools.images import decoded, open_image, path_of, with_path

FILLS = ("random", "gray", "black")
DEFAULT_PROB = 0.1
"""Probability that the background of an image is removed. The paper's value is not known here."""
_SUFFIXES = (".png", *(suffix for suffix in IMG_EXTENSIONS if suffix != ".png"))
_SUFFIXES += tuple(suffix.upper() for suffix in _SUFFIXES)


class RemoveBackground:
    """Replace the background of an image by one grey level, with some probability.

    The image must know its path: open it with :func:`plugins.tools.images.open_image`, or call
    :func:`plugins.tools.images.with_path`. A mask of another size is stretched to the size of the upright image,
    without interpolation.

    Args:
        masks: the folder of masks.
        images: the folder of images.
        prob: probability of the replacement, in [0, 1].
        fill: "random" draws the grey level of each image from 0 to 255, "gray" is 128, "black" is 0.

    Raises:
        ValueError: an argument is out of range.
        UserError: a folder is missing, both are the same, or (when called) the image has no path, no mask, or a mask
            that cannot be used.

    >>> RemoveBackground(".", "..", prob=0.5)
    RemoveBackground(masks='.', images='..', prob=0.5, fill='random')
    """

    def __init__(
        self, masks: str | Path, images: str | Path, *, prob: float = DEFAULT_PROB, fill: str = "random"
    ) -> None:
        check_range("prob", prob, low=0.0, high=1.0)
        check_choice("fill", fill, FILLS)
        for name, folder in {"masks": masks, "images": images}.items():
            if not Path(folder).is_dir():
                raise UserError(f"the folder of {name} does not exist: {folder}")
        if os.path.samefile(masks, images):
            raise UserError(f"the folder of masks must be another one than the folder of images, got {masks} for both")
        self.masks, self.images, self.prob, self.fill = str(masks), str(images), prob, fill
        self.folder = os.path.abspath(masks)
        self.roots = list(dict.fromkeys((os.path.abspath(images), os.path.realpath(images))))

    def check(self, paths: Iterable[str] | None = None) -> None:
        """Check that each image has a mask, before the training starts. The masks are not opened.

        Args:
            paths: of the images; None means all images in the folder.

        Raises:
            UserError: masks are missing; the message has their number and the first image without one.
        """
        from tqdm import tqdm

        listing = cache(lambda folder: frozenset(os.listdir(folder) if os.path.isdir(folder) else ()))
        images = list(_image_files(self.images) if paths is None else paths)
        missing = []
        for image in tqdm(images, desc="masks", unit=" images", disable=None, leave=False):
            folder, stem, names = self._candidates(image)
            if not any(name in listing(folder) for name in names):
                missing.append(f"{image}, whose mask would be {os.path.join(folder, stem)}.png")
        if missing:
            raise UserError(
                f"{len(missing)} of {len(images)} images have no mask in {self.masks}; the first is {missing[0]}"
            )

    def mask_path(self, image: str) -> str:
        """Return the path of the mask of an image.

        Args:
            image: path of the image.

        Raises:
            UserError: the image is not in the folder of images, or has no mask.
        """
        folder, stem, names = self._candidates(image)
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return path
        raise UserError(f"{image} has no mask: there is no {os.path.join(folder, stem)}.png")

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image, or a copy with another background."""
        path = path_of(image)
        if path is None:
            raise UserError(
                "an image has no path, by which its mask is found; read it with plugins.tools.images.open_image, or "
                "call plugins.tools.images.with_path(image, path)"
            )
        happens, level = float(torch.rand(())), int(torch.randint(256, ()))
        if happens >= self.prob:
            return image
        level = {"random": level, "gray": 128, "black": 0}[self.fill]
        bands = len(image.getbands())
        background = Image.new(image.mode, image.size, level if bands == 1 else (level,) * bands)
        return with_path(Image.composite(image, background, self._foreground(path, image.size)), path)

    def _foreground(self, image: str, size: tuple[int, int]) -> Image.Image:
        """Return 255 in the foreground of an image and 0 in its background."""
        path = self.mask_path(image)
        mask = Image.fromarray(np.where(_is_foreground(path), 255, 0).astype(np.uint8))
        if mask.size == size:
            return mask
        if mask.size == size[::-1]:
            raise UserError(
                f"the mask {path} has {mask.width} x {mask.height} pixels, but the upright image has "
                f"{size[0]} x {size[1]}; make the mask of the upright image"
            )
        return mask.resize(size, Image.Resampling.NEAREST)

    def _candidates(self, image: str) -> tuple[str, str, list[str]]:
        """Return the folder of the mask of an image, its name without suffix, and the names that it may have."""
        for path in dict.fromkeys((os.path.abspath(image), os.path.realpath(image))):
            for root in self.roots:
                if path.startswith(os.path.join(root, "")):
                    folder, name = os.path.split(os.path.relpath(path, root))
                    stem = os.path.splitext(name)[0]
                    return os.path.join(self.folder, folder), stem, [name, *(stem + suffix for suffix in _SUFFIXES)]
        raise UserError(f"the image {image} is not in {self.images}, the folder of images that has masks")

    def __repr__(self) -> str:
        return f"RemoveBackground(masks={self.masks!r}, images={self.images!r}, prob={self.prob}, fill={self.fill!r})"


def _is_foreground(path: str) -> np.ndarray:
    """Return where a mask is neither black nor transparent, ``[H, W]``. Any number above 0 is white."""
    with decoded(path) as mask:
        if mask.mode.startswith(("I", "F")):
            open_image(path)  # an error if its numbers are out of range
            return np.asarray(mask) > 0
        values = np.asarray(mask.convert("RGBA"))
        least = 128 if mask.format in ("JPEG", "WEBP") else 1
        return (values[..., :3].max(2) >= least) & (values[..., 3] > 0)


def _image_files(folder: str) -> Iterable[str]:
    for place, names in walk(folder):
        yield from (os.path.join(place, name) for name in names if name.lower().endswith(IMG_EXTENSIONS))
