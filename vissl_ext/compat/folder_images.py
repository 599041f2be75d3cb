"""Decoding of image files by :mod:`plugins.tools.images`, once per image, with the path in error messages.

vissl/data/disk_dataset.py:121 decodes an image of a class folder to find its path for a message, and line 132 decodes
it again. Line 148 decodes an image of a list of files with ``convert("RGB")``, which clips 16-bit and floating-point
images. Line 146 replaces an image of a list that cannot be read by a grey image, which only the log reports. An image
of a class folder that cannot be decoded ends the run, unless ``config.DATA.SKIP_BAD_IMAGES`` is true.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from plugins.tools.bad_images import BadImages
from plugins.tools.command import UserError
from plugins.tools.folders import ImageFolder
from plugins.tools.images import ImageError, open_image


class PairedReads(ImageFolder):
    """torchvision's ImageFolder that decodes an image once if it is read twice in succession.

    Args:
        root: folder with one subfolder per class.
    """

    skip = False
    """Whether only the second read of an image that cannot be decoded raises the error, which VISSL catches."""
    last: tuple[int, Any] | None = None

    def __init__(self, root: str) -> None:
        super().__init__(root, loader=open_image)

    def __getitem__(self, index: int) -> Any:
        """Return the image and its class.

        Raises:
            UserError: the image cannot be decoded.
        """
        if self.last is not None and self.last[0] == index:
            sample, self.last = self.last[1], None
            if isinstance(sample, ImageError):
                raise sample
            return sample
        try:
            sample = super().__getitem__(index)
        except ImageError as error:
            if not self.skip:
                raise
            sample = error
        self.last = index, sample
        return sample


def _open(file: Any) -> Any:
    """Decode an open file of a list, in place of ``PIL.Image.open``."""
    return open_image(file, file.name)


def finish_unreadable(folder: Path, asked: bool) -> dict[str, int]:
    """Print and list the images of a run that could not be read. Call it in one process, after the last image is read.

    Args:
        folder: folder of the run.
        asked: whether ``config.DATA.SKIP_BAD_IMAGES`` is true; then the command prints also that all could be read.

    Returns:
        The entry ``bad_images`` of the run's summary; an empty dictionary if there is nothing to report.
    """
    bad = BadImages(folder)
    if not (asked or bad.names()):
        return {}
    return {"bad_images": bad.finish("could not be read: replaced by grey images or other images of the training")}


def _report(path: str, folder: Path) -> None:
    """Record and print that an image cannot be read, unless a process of the run has done it."""
    bad = BadImages(folder)  # a new one, because workers restart in each epoch
    if path in bad.names():
        return
    try:
        open_image(path)
        reason = "it cannot be read"
    except UserError as error:
        reason = str(error)
    print(f"{reason}; it is replaced by a grey image or by another image of the training", flush=True)
    with suppress(OSError):  # it will be reported again
        bad.add(path)


def _reporting(get: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``__getitem__`` of VISSL's data set so that it reports images that cannot be read."""

    @wraps(get)
    def item(self: Any, index: int) -> Any:
        self.has_failed = False
        if self.data_source == "disk_folder":
            self.image_dataset.skip = bool(self.cfg["DATA"].get("SKIP_BAD_IMAGES"))
        image, success = get(self, index)
        if success and not self.has_failed:
            return image, success
        if self.data_source == "disk_folder":
            self.image_dataset.last = None  # the message of the log has read the image a third time
            path = self.image_dataset.samples[index][0]
        else:
            path = self._replace_img_path_prefix(str(self.image_dataset[index]), self._remove_prefix, self._new_prefix)
        _report(path, Path(self.cfg["CHECKPOINT"]["DIR"]))
        return image, success

    return item


def _noting(replace: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``on_failure``, after which ENABLE_QUEUE_DATASET counts the image in place of a bad one as a success."""

    @wraps(replace)
    def on_failure(self: Any) -> Any:
        self.has_failed = True
        return replace(self)

    return on_failure


def activate() -> None:
    """Replace the functions with which VISSL reads image files."""
    from vissl.data import disk_dataset

    disk_dataset.ImageFolder = PairedReads
    disk_dataset.Image = SimpleNamespace(open=_open)
    dataset = disk_dataset.DiskImageDataset
    if not hasattr(dataset.__getitem__, "__wrapped__"):
        dataset.__getitem__ = _reporting(dataset.__getitem__)
        dataset.on_failure = _noting(dataset.on_failure)
