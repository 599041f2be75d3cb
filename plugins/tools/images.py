"""Decode an image file to 8-bit RGB, identically in every framework and close to DALI.

Pillow's ``convert("RGB")`` clips 16-bit images to white and floating-point images to black. This module decodes:

=========================  ==========================================================================================
file                       pixels
=========================  ==========================================================================================
8-bit grey, RGB, palette   unchanged; grey becomes three equal channels
alpha, transparent colour  ignored: the colour channels are used, as in torchvision, VISSL, lightly and DALI
1-bit                      0 and 255
16-bit grey                value / 257, rounded: 65535 becomes 255. 12-bit data in a 16-bit file stay dark
32-bit integer grey        as 16-bit; a value outside 0…65535 is an error
floating-point grey        value · 255, rounded; a value outside [0, 1] is an error
CMYK, YCbCr                Pillow's conversion
CIE Lab                    converted to sRGB with LittleCMS
EXIF orientation           applied, so that the image is upright, as DALI does; torchvision's loader ignores it
several frames             the first
=========================  ==========================================================================================
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from plugins.tools.command import UserError

_PATH = "path of the image file"  # in the dictionary info, which Pillow copies with the image
_REASON = " cannot be read as an image: "
_DALI_MODES = ("L", "LA", "RGB", "RGBA", "P", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of TIFF files that DALI decodes to the same pixels, as a test checks."""


class ImageError(UserError):
    """The content of an image file cannot be decoded."""

    @property
    def name(self) -> str:
        """The name of the image in the message, which is its path unless another name was given."""
        return str(self).partition(_REASON)[0]


def open_image(source: Any, name: str | None = None) -> Image.Image:
    """Read an image and convert it to RGB, as described in this module.

    Args:
        source: a path, or an open binary file.
        name: name of the image in error messages; None means its path.

    Returns:
        The image; :func:`path_of` returns its path.

    Raises:
        ImageError: the image cannot be decoded, or its values are out of range.
        UserError: the file cannot be opened or read.
    """
    with decoded(source, name) as image:
        return with_path(_rgb(image), source if isinstance(source, str | Path) else getattr(source, "name", None))


@contextmanager
def decoded(source: Any, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image upright, in the mode of its file, for a block that reads its pixels.

    Args:
        source: as for :func:`open_image`.
        name: as for :func:`open_image`.

    Raises:
        ImageError: the image cannot be decoded, or the block raises an error.
        UserError: the file cannot be opened or read.
    """
    try:
        with Image.open(source) as file:
            upright = _upright(file)
            upright.format = file.format  # a rotated copy has none
            yield upright
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds of exceptions for a corrupt file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # an error with a number is of the operating system; Pillow's for a corrupt file has none
        failed = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
        raise (UserError if failed else ImageError)(f"{name or source}{_REASON}{reason}") from None


def with_path(image: Image.Image, path: Any) -> Image.Image:
    """Store the path of its file in an image, for transforms that read other files of the image, such as its mask.

    Args:
        image: is changed. Crops, conversions and copies of it have the path too.
        path: a path; anything else means that the path is unknown.

    Returns:
        The image.

    >>> path_of(with_path(Image.new("L", (4, 4)), "train/cat/1.png").convert("RGB"))
    'train/cat/1.png'
    """
    image.info.pop(_PATH, None)
    if isinstance(path, str | Path):
        image.info[_PATH] = str(path)
    return image


def path_of(image: Image.Image) -> str | None:
    """Return the path of the file of an image; None if it is unknown."""
    return image.info.get(_PATH)


def check_dali_reads(path: str) -> None:
    """Check that DALI decodes a file to the pixels of ``open_image``. Only TIFF and WebP files are checked.

    Args:
        path: the image file.

    Raises:
        UserError: the file is a TIFF file of a mode that DALI cannot read or reads differently, or a WebP file with
            EXIF data, whose chunks DALI 2.4 counts incorrectly.
    """
    if not path.lower().endswith((".tif", ".tiff", ".webp")):
        return
    try:
        with Image.open(path) as file:
            kind, mode, described = file.format, file.mode, "exif" in file.info
    except Exception:
        open_image(path)  # raises the error that names the file
        raise
    why = ""
    if kind == "TIFF" and mode not in _DALI_MODES:
        why = f"a TIFF file of mode {mode}"
    elif kind == "WEBP" and described:
        why = "a WebP file with EXIF data"
    if why:
        raise UserError(f"DALI cannot read {path}, {why}; use data.format=image_folder")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the orientation of the EXIF data, except for TIFF files, for which Pillow applies it on loading."""
    if image.format == "TIFF" or image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey(_in_range(image, 65535) / 257)
    if image.mode == "F":
        return _grey(_in_range(image, 1) * 255)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        exact = ImageCms.Flags.NOOPTIMIZE  # otherwise LittleCMS interpolates in a table, with errors of up to 31 levels
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB", flags=exact)
        assert converted is not None  # None is returned only for conversion in place
        return converted
    if isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; Pillow warns if it converts directly to RGB
    return image.convert("RGB")


def _in_range(image: Image.Image, high: int) -> Any:
    """Return the values in float64 after a check of their range."""
    values = np.asarray(image).astype(np.float64)
    least, largest = values.min(), values.max()
    if not (least >= 0 and largest <= high):
        raise ValueError(f"its values range from {least:g} to {largest:g}, allowed are 0 to {high}; rescale the image")
    return values


def _grey(values: Any) -> Image.Image:
    return Image.fromarray(np.floor(values + 0.5).astype(np.uint8)).convert("RGB")
